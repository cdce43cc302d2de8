//! Decides what follows the end of the entry point. Pure: time comes in as durations.

use crate::{
    config::{AtEnd, MachineConfig, Restart, RestartPolicy},
    protocol::ExitStatus,
};
use std::time::Duration;

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    StartIn(Duration),
    Stay,
    PowerOff,
}

/// Counts ends and restarts of the entry point.
pub(super) struct Supervisor {
    restart: Restart,
    at_end: AtEnd,
    next_wait: Duration,
    restarts: u32,
    last_end: Option<ExitStatus>,
}

impl Supervisor {
    pub(super) fn new(config: &MachineConfig) -> Self {
        let restart = config.restart.clone();
        let next_wait = restart.backoff_first;
        Self { restart, at_end: config.at_end, next_wait, restarts: 0, last_end: None }
    }

    /// The entry point has ended after it `ran` so long.
    pub(super) fn ended(&mut self, status: ExitStatus, ran: Duration) -> Next {
        self.last_end = Some(status);
        let again = match self.restart.policy {
            RestartPolicy::Never => false,
            RestartPolicy::OnFailure => !status.success(),
            RestartPolicy::Always => true,
        };
        if !again {
            return match self.at_end {
                AtEnd::PowerOff => Next::PowerOff,
                AtEnd::Stay => Next::Stay,
            };
        }
        if ran >= self.restart.backoff_reset {
            self.next_wait = self.restart.backoff_first;
        }
        let wait = self.next_wait;
        self.next_wait = wait.saturating_mul(2).min(self.restart.backoff_max);
        self.restarts = self.restarts.saturating_add(1);
        Next::StartIn(wait)
    }

    pub(super) fn restarts(&self) -> u32 {
        self.restarts
    }

    pub(super) fn last_end(&self) -> Option<ExitStatus> {
        self.last_end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(1);

    fn supervisor(policy: RestartPolicy, at_end: AtEnd) -> Supervisor {
        let mut config = MachineConfig::new(vec!["a".into()]);
        config.restart = Restart {
            policy,
            backoff_first: Duration::from_secs(1),
            backoff_max: Duration::from_secs(3),
            backoff_reset: Duration::from_secs(10),
        };
        config.at_end = at_end;
        Supervisor::new(&config)
    }

    fn waits(supervisor: &mut Supervisor, runs: &[Duration]) -> Vec<u64> {
        runs.iter()
            .map(|ran| match supervisor.ended(ExitStatus::Code(1), *ran) {
                Next::StartIn(wait) => wait.as_secs(),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn never_means_once_and_then_what_the_package_wants() {
        for status in [ExitStatus::Code(0), ExitStatus::Code(1), ExitStatus::Signal(9)] {
            let mut once = supervisor(RestartPolicy::Never, AtEnd::PowerOff);
            assert_eq!(once.ended(status, SHORT), Next::PowerOff);
            let mut stays = supervisor(RestartPolicy::Never, AtEnd::Stay);
            assert_eq!(stays.ended(status, SHORT), Next::Stay);
            assert_eq!((stays.restarts(), stays.last_end()), (0, Some(status)));
        }
    }

    #[test]
    fn on_failure_restarts_after_a_bad_end_only() {
        let mut it = supervisor(RestartPolicy::OnFailure, AtEnd::Stay);
        assert!(matches!(it.ended(ExitStatus::Signal(11), SHORT), Next::StartIn(_)));
        assert!(matches!(it.ended(ExitStatus::Code(1), SHORT), Next::StartIn(_)));
        assert_eq!(it.ended(ExitStatus::Code(0), SHORT), Next::Stay);
        assert_eq!(it.restarts(), 2);
    }

    #[test]
    fn always_restarts_after_a_good_end_too() {
        let mut it = supervisor(RestartPolicy::Always, AtEnd::PowerOff);
        assert!(matches!(it.ended(ExitStatus::Code(0), SHORT), Next::StartIn(_)));
    }

    #[test]
    fn the_wait_doubles_to_its_limit_and_a_long_run_makes_it_short_again() {
        let mut it = supervisor(RestartPolicy::OnFailure, AtEnd::Stay);
        let long = Duration::from_secs(10);
        assert_eq!(waits(&mut it, &[SHORT, SHORT, SHORT, SHORT, long, SHORT]), [1, 2, 3, 3, 1, 2]);
    }
}
