//! Which hosts are silent: a machine whose host is, has its frames held until the host speaks again or
//! another one has the machine, up to a bound; then they are dropped.
//!
//! ```text
//!  speaking ──── nothing heard, nothing acknowledged ────► silent: held
//!      ▲                                                               │
//!      └── heard again, or connected again ◄───────────────────────────┤ for the bound
//!                                                                      ▼
//!                                                                  silent: dropped
//! ```
//!
//! A host is judged by its kernel, not by its agent: an agent that was killed has its connection ended
//! by the kernel, and one that hangs has what we say acknowledged by it; in both cases the machines
//! there run on. Only a host that cannot be reached acknowledges nothing. Agents ping, and only when the
//! last ping was answered, so that a ping says that the way there works too; one that does not for a while
//! is spoken to, so that its kernel has something to acknowledge.

use super::{Shared, server::Agents};
use crate::agent::spawn;
use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// How often hosts are judged.
const EVERY: Duration = Duration::from_millis(50);
/// A host that was not heard for this long is spoken to.
pub(super) const ASK_AFTER: Duration = Duration::from_millis(250);
/// A host whose agent was not heard for this long...
const QUIET: Duration = Duration::from_millis(600);
/// ...and whose kernel has not acknowledged for this long what we said is silent. The kernel repeats what
/// is lost after 200 ms.
const UNANSWERED: Duration = Duration::from_millis(350);

/// What is known of one connection of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Signs {
    /// Since its agent said something.
    pub(super) heard: Duration,
    /// For how long what we said has not been acknowledged by its kernel; `None` if that is not known.
    pub(super) unanswered: Option<Duration>,
}

impl Signs {
    fn speaks(self) -> bool {
        self.heard < QUIET || self.unanswered.is_some_and(|u| u < UNANSWERED)
    }
}

/// How frames for the machines of a silent host are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Treatment {
    Hold,
    Drop,
}

#[derive(Clone, Copy, Debug)]
struct Silence {
    since: Instant,
    treatment: Treatment,
}

/// The silent hosts. No I/O.
#[derive(Debug)]
pub(super) struct Health {
    silent: BTreeMap<Ipv4Addr, Silence>,
    bound: Duration,
}

impl Health {
    pub(super) fn new(bound: Duration) -> Self {
        Self { silent: BTreeMap::new(), bound }
    }

    /// How frames for machines of this host are treated; `None`: they are sent there.
    pub(super) fn treatment(&self, host: Ipv4Addr) -> Option<Treatment> {
        self.silent.get(&host).map(|s| s.treatment)
    }

    pub(super) fn bound(&self) -> Duration {
        self.bound
    }

    pub(super) fn silent(&self) -> Vec<Ipv4Addr> {
        self.silent.keys().copied().collect()
    }

    /// A host has said something, or connected again; true if it was silent.
    pub(super) fn heard(&mut self, host: Ipv4Addr) -> bool {
        self.silent.remove(&host).is_some()
    }

    /// Judges all hosts; those in `signs` are connected. Returns the hosts whose machines are treated
    /// in another way now.
    pub(super) fn judge(
        &mut self,
        signs: &BTreeMap<Ipv4Addr, Vec<Signs>>,
        now: Instant,
    ) -> Vec<Ipv4Addr> {
        let mut changed = Vec::new();
        for (&host, signs) in signs {
            let speaks = signs.iter().any(|s| s.speaks());
            if speaks && self.silent.remove(&host).is_some() {
                changed.push(host);
            } else if !speaks && !self.silent.contains_key(&host) {
                let silence = Silence { since: now, treatment: Treatment::Hold };
                self.silent.insert(host, silence);
                changed.push(host);
            }
        }
        for (&host, silence) in &mut self.silent {
            let long = now.saturating_duration_since(silence.since) > self.bound;
            if long && silence.treatment == Treatment::Hold {
                silence.treatment = Treatment::Drop;
                changed.push(host);
            }
        }
        changed
    }
}

/// Judges hosts from now on.
pub(super) fn watch(agents: Arc<Agents>, shared: Arc<Shared>) {
    spawn("edge-health", move || {
        loop {
            thread::sleep(EVERY);
            let signs = agents.signs(Instant::now());
            shared.judge_hosts(&signs, Instant::now());
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);
    const BOUND: Duration = Duration::from_secs(30);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn of(heard: u64, unanswered: u64) -> BTreeMap<Ipv4Addr, Vec<Signs>> {
        let signs = Signs { heard: ms(heard), unanswered: Some(ms(unanswered)) };
        BTreeMap::from([(A, vec![signs])])
    }

    #[test]
    fn a_host_that_answers_nothing_is_silent_until_it_speaks() {
        let (mut health, now) = (Health::new(BOUND), Instant::now());
        assert!(health.judge(&of(100, 100), now).is_empty());
        assert_eq!(health.judge(&of(700, 700), now), [A]);
        assert_eq!(health.treatment(A), Some(Treatment::Hold));
        assert!(health.judge(&of(750, 750), now + ms(50)).is_empty(), "said once");
        assert_eq!(health.judge(&of(10, 750), now + ms(100)), [A]);
        assert_eq!(health.treatment(A), None);
    }

    #[test]
    fn an_agent_that_hangs_is_not_a_silent_host() {
        let mut health = Health::new(BOUND);
        assert!(health.judge(&of(60_000, 60), Instant::now()).is_empty());
    }

    #[test]
    fn an_agent_that_was_killed_is_not_a_silent_host() {
        let (mut health, now) = (Health::new(BOUND), Instant::now());
        health.judge(&of(100, 100), now);
        assert!(health.judge(&BTreeMap::new(), now + ms(60_000)).is_empty());
        assert_eq!(health.treatment(A), None);
    }

    #[test]
    fn a_host_that_stays_silent_is_given_up_and_taken_back_when_it_connects() {
        let (mut health, now) = (Health::new(BOUND), Instant::now());
        health.judge(&of(700, 700), now);
        // Its connection has ended by now, which is no sign of life.
        assert!(health.judge(&BTreeMap::new(), now + BOUND).is_empty());
        assert_eq!(health.judge(&BTreeMap::new(), now + BOUND + ms(1)), [A]);
        assert_eq!(health.treatment(A), Some(Treatment::Drop));
        assert!(health.heard(A) && !health.heard(A));
        assert_eq!(health.treatment(A), None);
    }
}
