//! What a machine that was saved has in common, wherever it lies: how it is described, whether this
//! host can take it, and how it is started again.

use super::{
    Runner,
    config::CopyOf,
    hosted::{Content, Hosted},
    take_over::Noted,
};
use crate::{
    checkpoint::{description::Description, fill::StoreFill},
    driver::Start,
    lease::{AttemptId, BootClock, Clock as _, Epoch, HostName, Nonce, Outcome, Record},
    migrate::{
        destination::DestinationMachine,
        switchover::{FlipEpoch, Holding, Terms},
    },
    package::Package,
};
use conduit::MachineNet;
use silo::block::BlockSet;
use std::{
    collections::BTreeMap,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// What a saved machine is started as.
#[derive(Clone, Copy, Debug)]
pub(super) enum As<'a> {
    /// The machine that was saved.
    Itself(Claim<'a>),
    /// Another one, which begins as what was saved.
    Copy(&'a CopyOf),
}

impl As<'_> {
    /// For how long the network is told that it stands still.
    const fn stands_still(&self) -> Option<Duration> {
        match self {
            // Since it was saved: long, however long.
            Self::Itself(_) => Some(Duration::MAX),
            Self::Copy(_) => None,
        }
    }
}

/// With what right a saved machine is started.
#[derive(Clone, Copy, Debug)]
pub(super) enum Claim<'a> {
    /// It was suspended under this record, which must still be the newest.
    Suspended(&'a Record),
    /// The same, and it must not have run since, here or anywhere.
    Asleep(&'a Record),
    /// It is restored from a generation that was made under this record. Whoever owns the machine now
    /// must be this host, or the one of which somebody says that it will not run it again.
    Restored {
        /// The record then.
        made_under: &'a Record,
        /// The host that will not run it again.
        take_from: Option<&'a HostName>,
        /// The record under which the machine was suspended, if it was: if that is still the newest, it
        /// runs nowhere.
        asleep: Option<&'a Record>,
    },
}

/// How a machine that is being started comes to its lease.
enum Right<'a> {
    /// When its state is loaded.
    Claim(Claim<'a>),
    /// Has it: nobody else's is.
    Own(&'a CopyOf, Holding),
}

impl Right<'_> {
    fn epoch(&self) -> Option<Epoch> {
        match self {
            Self::Claim(_) => None,
            Self::Own(_, own) => Some(own.record.epoch),
        }
    }
}

/// What of a machine is not here yet.
pub(super) struct Elsewhere {
    /// Brings it.
    pub fill: Arc<StoreFill>,
    /// The blocks, for each device of the group.
    pub missing: Vec<BlockSet>,
    /// Memory that is brought while everything is built, before the machine runs.
    pub early: Option<Early>,
}

/// Blocks of memory that are on their way.
pub(super) struct Early {
    /// Which.
    pub blocks: BlockSet,
    /// Brings them.
    pub bringing: JoinHandle<Result<(), String>>,
}

impl Elsewhere {
    /// Waits for what is brought before the machine runs.
    fn await_early(&mut self) -> Result<(), String> {
        let Some(Early { blocks, bringing }) = self.early.take() else { return Ok(()) };
        match bringing.join() {
            Ok(Ok(())) => {
                self.missing[0].subtract(&blocks);
                Ok(())
            }
            Ok(Err(error)) => {
                // It is asked for when it is touched, as everything else.
                tracing::warn!(error, "what is touched first could not be brought before");
                Ok(())
            }
            Err(_) => Err("the thread that brings what is touched first has panicked".into()),
        }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The record that this host would write to run a machine.
///
/// # Errors
/// If it must not, with what to do about it.
fn next_record(
    found: Option<&Record>,
    claim: Claim<'_>,
    here: &HostName,
    attempt: AttemptId,
    nonce: Nonce,
) -> Result<Record, String> {
    let (saved, take_from) = match claim {
        Claim::Suspended(record) | Claim::Asleep(record) => (record, None),
        Claim::Restored { made_under, take_from, .. } => (made_under, take_from),
    };
    let Some(found) = found else {
        // Nobody owns it here; its epochs go on, so that the network believes the newer one.
        return Ok(saved.taken(here.clone(), attempt, nonce));
    };
    if let (Some(beat), true) = (&found.beat, found.owner != *here) {
        // Its owner must have stood still for its whole term, which no person can know.
        return Err(format!(
            "host \"{}\" owns it ({}) and protects it ({beat}): run a stand-in here (`drafter stand-in`), \
             which takes it when that host is lost",
            found.owner, found.epoch
        ));
    }
    let is_ours = match claim {
        Claim::Suspended(record) => found == record || found.owner == *here,
        Claim::Asleep(record) => found == record,
        Claim::Restored { asleep, .. } => {
            found.owner == *here || Some(&found.owner) == take_from || Some(found) == asleep
        }
    };
    if is_ours {
        let newer = if saved.epoch > found.epoch { saved } else { found };
        return Ok(newer.taken(here.clone(), attempt, nonce));
    }
    if matches!(claim, Claim::Asleep(_)) {
        let from = match found.owner == *here {
            true => String::new(),
            false => format!(", and by --take-from {} if it was stopped there", found.owner),
        };
        return Err(format!(
            "it has run at host \"{}\" since it was suspended ({}, then {}): this generation is not its \
             last state; to go back to it, and forget what the machine did since, name it by \
             --generation{from}",
            found.owner, found.epoch, saved.epoch
        ));
    }
    let advice = match claim {
        Claim::Suspended(_) | Claim::Asleep(_) => {
            "stop it there, or remove its lease if that host will never come back".to_owned()
        }
        Claim::Restored { .. } => format!(
            "if it runs there, move or suspend it instead; if it was stopped there, or that host will \
             never come back, say so by --take-from {}",
            found.owner
        ),
    };
    Err(format!("host \"{}\" owns it ({}); {advice}", found.owner, found.epoch))
}

impl Runner {
    /// What this machine is, for whoever starts it again.
    pub(super) fn describe(&self, body: &Hosted) -> Result<Description, String> {
        let lease = {
            let inner = self.lock();
            let holding =
                inner.holding.as_ref().ok_or("this host holds no lease of the machine")?;
            holding.record.encode()
        };
        let mut description = Description {
            shape: body.shape.clone(),
            facts: self.driver.facts().map_err(text)?,
            package: body.package.id().to_string(),
            package_name: body.package.manifest().name.clone(),
            network: body.net.clone(),
            lease: String::from_utf8_lossy(&lease).into_owned(),
            beat: self.life_sign(),
            paused_at_ns: BootClock.now().0.as_nanos() as u64,
            first_touch: BTreeMap::new(),
            overlays: BTreeMap::new(),
            suspended: false,
        };
        let inner = self.lock();
        description.set_first_touches(&match &inner.filling {
            Some(filling) => filling.first_touches(),
            None => inner.first_touches.clone(),
        });
        Ok(description)
    }

    /// Whether a saved machine is `machine`, and can go on here: its package, verified, and the lease
    /// under which it was saved.
    pub(super) fn check_saved(
        &self,
        saved: &Description,
        machine: &str,
    ) -> Result<(Package, Record), String> {
        if saved.shape.name != machine {
            return Err(format!(
                "what was saved is machine \"{}\", not \"{machine}\"",
                saved.shape.name
            ));
        }
        let facts = self.driver.facts().map_err(text)?;
        crate::driver::compatible(&saved.facts, &saved.shape, &facts).map_err(|why| {
            format!("{}; it can be started from its disks instead", why.join("; "))
        })?;
        let package = self.find_package(&saved.package).ok_or_else(|| {
            format!(
                "package \"{}\" ({}) is not here; give it with --package",
                saved.package_name, saved.package
            )
        })?;
        package.verify(&self.cache).map_err(text)?;
        let record = Record::decode(saved.lease.as_bytes()).map_err(text)?;
        Ok((package, record))
    }

    /// Whether the lease would be given to this host, as of now.
    pub(super) fn may_claim(&self, claim: Claim<'_>) -> Result<(), String> {
        let found = self.store.read(&self.name).map_err(text)?;
        let (attempt, nonce) = fresh()?;
        next_record(found.as_ref(), claim, &self.host, attempt, nonce).map(drop)
    }

    /// Takes the lease.
    fn claim(&self, claim: Claim<'_>) -> Result<Holding, String> {
        let mut found = self.store.read(&self.name).map_err(text)?;
        if let (Claim::Restored { .. }, Some(record)) = (claim, &found)
            && record.handing_to.is_some()
        {
            // A token may be out, and a copy run by it unheard until its offer ends.
            self.wait_for_offers();
            found = self.store.read(&self.name).map_err(text)?;
        }
        let (attempt, nonce) = fresh()?;
        let new = next_record(found.as_ref(), claim, &self.host, attempt, nonce)?;
        match self.store.compare_and_set(&self.name, found.as_ref(), &new) {
            Ok(Outcome::Won) => Ok(Holding::new(new)),
            Ok(Outcome::Lost(_)) => Err("another host took its lease just now".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Waits until no offer that a token could name holds any more.
    pub(super) fn wait_for_offers(&self) {
        let terms = Terms::default();
        let wait = terms.expiry(terms.longest_offer);
        tracing::info!(?wait, "a move was under way: waiting until its offer is over");
        let over = Instant::now() + wait;
        while let Some(left) = over.checked_duration_since(Instant::now()) {
            std::thread::park_timeout(left);
        }
    }

    /// Begins to make the tap of a machine that is started as `what`, with what it was saved with.
    pub(super) fn make_its_tap(&self, saved: Option<&MachineNet>, what: As<'_>) {
        let net = saved.cloned().and_then(|net| match what {
            As::Itself(_) => Some(net),
            As::Copy(identity) => self.own_net(net, identity),
        });
        if let Some(net) = net {
            self.path.make_tap(&net, what.stands_still());
        }
    }

    /// Starts a saved machine whose memory and disks are in `content`, but for what is `elsewhere`.
    pub(super) fn start_saved(
        self: &Arc<Self>,
        saved: Description,
        package: Package,
        content: Content,
        state: &[u8],
        what: As<'_>,
        mut elsewhere: Option<Elsewhere>,
    ) -> Result<(), String> {
        let began = Instant::now();
        self.lock().first_touches = saved.first_touches();
        let paths = self.site();
        let site = paths.site(&*self.driver, &self.path);
        let expected = what.stands_still();
        let (right, shape, net) = match what {
            As::Itself(claim) => (Right::Claim(claim), saved.shape, saved.network),
            As::Copy(identity) => {
                let (shape, net) = self.own(saved, identity);
                // Whoever removes what is left of a copy that came to nothing finds it.
                self.lock().net.clone_from(&net);
                (Right::Own(identity, self.acquire()?), shape, net)
            }
        };
        let start = Start::Incoming;
        let mut body =
            Hosted::build(shape, package, net, content, &site, start, expected).map_err(text)?;
        let built = began.elapsed();
        let early = elsewhere.as_mut().map_or(Ok(()), Elsewhere::await_early);
        let brought = began.elapsed();
        let epoch = right.epoch();
        let started = early.and_then(|()| {
            Self::load_saved(&mut body, state, elsewhere.as_ref())?;
            match right {
                Right::Claim(claim) => self.start_loaded(&mut body, claim),
                Right::Own(identity, own) => {
                    self.set_going(&mut body, own.record.epoch, identity).map(|()| own)
                }
            }
        });
        tracing::info!(?built, ?brought, runs = ?began.elapsed(), "a saved machine was started");
        let holding = match started {
            Ok(holding) => holding,
            Err(why) => {
                match epoch {
                    Some(epoch) => body.give_up(epoch.0),
                    None => body.tear_down(),
                }
                return Err(why);
            }
        };
        let noted = Noted::of(&body, true);
        if let Some(guest) = &body.guest {
            guest.speak_in(Duration::ZERO);
        }
        // Nothing that could be taken over, until it is complete.
        super::take_over::forget(&self.dir);
        self.install(Box::new(body), holding, None);
        match elsewhere {
            None => self.complete(&noted),
            Some(elsewhere) => self.fill(elsewhere.fill, noted)?,
        }
        self.refresh();
        Ok(())
    }

    /// Brings the rest of a machine that runs, on a thread of its own.
    pub(super) fn fill(self: &Arc<Self>, fill: Arc<StoreFill>, noted: Noted) -> Result<(), String> {
        self.lock().filling = Some(Arc::clone(&fill));
        let runner = Arc::clone(self);
        // What it says leaves once there is a generation of it, and that once everything is here.
        let is_awaited = self.protection().is_some_and(|protection| protection.wants_commit());
        let filling = std::thread::Builder::new().name("fill".into()).spawn(move || {
            if !fill.run(is_awaited) {
                return;
            }
            fill.end();
            {
                let mut inner = runner.lock();
                // Of a machine that has left it is nobody's.
                if inner.filling.take().is_some() {
                    inner.first_touches = fill.first_touches();
                }
            }
            runner.complete(&noted);
            tracing::info!(machine = %runner.name.as_str(), "everything has come from the store");
        });
        filling.map(drop).map_err(|error| format!("no thread to bring the rest of it: {error}"))
    }

    fn start_loaded(&self, body: &mut Hosted, claim: Claim<'_>) -> Result<Holding, String> {
        // From here on nobody else starts it.
        let holding = self.claim(claim)?;
        Self::run_saved(body, &holding)?;
        body.release_output().map_err(text)?;
        Ok(holding)
    }

    /// Loads a machine's state; what is `elsewhere` comes when it is touched.
    pub(super) fn load_saved(
        body: &mut Hosted,
        state: &[u8],
        elsewhere: Option<&Elsewhere>,
    ) -> Result<(), String> {
        for (at, device) in body.content.devices().into_iter().enumerate() {
            match elsewhere {
                Some(elsewhere) => {
                    device.arm(&elsewhere.missing[at], elsewhere.fill.demand(at)).map_err(text)?;
                }
                None => {
                    let none = BlockSet::new(device.blocks());
                    device.arm(&none, Box::new(|_| {})).map_err(text)?;
                    device.complete().map_err(text)?;
                }
            }
        }
        body.load(state).map_err(text)
    }

    /// Runs a loaded machine whose lease this host has; what it sends is still held.
    pub(super) fn run_saved(body: &mut Hosted, holding: &Holding) -> Result<(), String> {
        let flip = FlipEpoch::of(holding.record.epoch, 0).0;
        // The lease is ours: it runs, whatever its network says, which learns of it beside its first
        // instructions.
        body.run().map_err(text)?;
        body.lead_here(flip);
        Ok(())
    }
}

pub(super) fn fresh() -> Result<(AttemptId, Nonce), String> {
    Ok((AttemptId::random().map_err(text)?, Nonce::random().map_err(text)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::MachineName;

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    fn record(owner: &str, epoch: u64) -> Record {
        let machine = MachineName::new("m").unwrap();
        let first = Record::first(machine, host(owner), AttemptId(1), Nonce::random().unwrap());
        Record { epoch: Epoch(epoch), ..first }
    }

    fn next(found: Option<&Record>, claim: Claim<'_>) -> Result<(String, u64), String> {
        let nonce = Nonce::random().unwrap();
        let next = next_record(found, claim, &host("here"), AttemptId(2), nonce)?;
        Ok((next.owner.as_str().to_owned(), next.epoch.0))
    }

    #[test]
    fn a_suspended_machine_goes_on_under_its_record_or_where_it_was_and_nowhere_else() {
        let suspended = record("there", 4);
        let claim = Claim::Suspended(&suspended);
        assert_eq!(next(Some(&suspended), claim).unwrap(), ("here".into(), 5));
        assert_eq!(next(Some(&record("here", 7)), claim).unwrap(), ("here".into(), 8));
        assert_eq!(next(None, claim).unwrap(), ("here".into(), 5));
        let refused = next(Some(&record("there", 4)), claim).unwrap_err();
        assert!(refused.contains("\"there\" owns it"), "the same host has started it: {refused}");
    }

    #[test]
    fn a_generation_is_restored_where_the_machine_was_or_from_a_host_that_is_named_as_gone() {
        let made_under = record("there", 4);
        let claim =
            |take_from| Claim::Restored { made_under: &made_under, take_from, asleep: None };
        let (there, other) = (host("there"), host("other"));
        // Even under the very record: the machine may run there.
        let refused = next(Some(&made_under), claim(None)).unwrap_err();
        assert!(refused.contains("--take-from there"), "{refused}");
        assert!(next(Some(&made_under), claim(Some(&other))).is_err());
        assert_eq!(next(Some(&made_under), claim(Some(&there))).unwrap(), ("here".into(), 5));
        let moved = record("other", 9);
        assert!(next(Some(&moved), claim(Some(&there))).is_err(), "it has moved on since");
        assert_eq!(next(Some(&moved), claim(Some(&other))).unwrap(), ("here".into(), 10));
        assert_eq!(next(Some(&record("here", 6)), claim(None)).unwrap(), ("here".into(), 7));
    }

    #[test]
    fn a_protected_machine_is_never_taken_by_a_persons_word() {
        use crate::lease::{BeatName, BeatRef};
        let name = BeatName::of_host(host("there"));
        let found = record("there", 4).bound(Some(BeatRef { name, incarnation: 1 }));
        let there = host("there");
        let claim = Claim::Restored { made_under: &found, take_from: Some(&there), asleep: None };
        let refused = next(Some(&found), claim).unwrap_err();
        assert!(refused.contains("drafter stand-in"), "{refused}");
        let ours = record("here", 4).bound(found.beat.clone());
        assert_eq!(next(Some(&ours), claim).unwrap(), ("here".into(), 5));
    }

    #[test]
    fn what_was_suspended_to_a_store_is_resumed_once_and_gone_back_to_when_it_runs_nowhere() {
        let suspended = record("there", 4);
        let claim = Claim::Asleep(&suspended);
        assert_eq!(next(Some(&suspended), claim).unwrap(), ("here".into(), 5));
        assert_eq!(next(None, claim).unwrap(), ("here".into(), 5));
        // Resumed by others, by this host, or taken anew by the one that suspended it.
        for since in [record("other", 5), record("here", 5), record("there", 5)] {
            let refused = next(Some(&since), claim).unwrap_err();
            assert!(refused.contains("has run at host") && refused.contains("--generation"));
        }
        let older = record("before", 2);
        let back =
            Claim::Restored { made_under: &older, take_from: None, asleep: Some(&suspended) };
        assert_eq!(next(Some(&suspended), back).unwrap(), ("here".into(), 5));
        let refused = next(Some(&record("there", 5)), back).unwrap_err();
        assert!(refused.contains("--take-from there"), "it runs again: {refused}");
    }

    #[test]
    fn epochs_go_on_where_the_lease_was_lost() {
        let made_under = record("there", 40);
        let claim = Claim::Restored { made_under: &made_under, take_from: None, asleep: None };
        assert_eq!(next(None, claim).unwrap(), ("here".into(), 41));
        assert_eq!(next(Some(&record("here", 2)), claim).unwrap(), ("here".into(), 41));
    }
}
