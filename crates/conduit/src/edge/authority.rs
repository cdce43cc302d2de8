//! Who may say where a machine's frames go. The connection proves which host speaks; this says what it
//! may say. Asked by the edge before the ledger, and never on behalf of one's own word within one epoch
//! of the lease: a flip costs no read of the store.
//!
//! The rule, where the edge can read the leases: *an epoch of the lease comes in only with the host that
//! the lease names at exactly that epoch, and within it only that host says anything.* So a foreign host,
//! a host that has lost the machine, and a host that made up an epoch are refused alike, and a flip that
//! is played again finds its epoch over. `docs/decisions/0008-who-may-flip.md` says why it is no token.

use super::ledger::Entry;
use crate::datapath::{MachineNet, NetError};
use lease::{Epoch, LeaseStore, MachineName};

/// See the module.
pub(super) enum Authority {
    /// Any host of the fleet may take any machine with a newer epoch, and give away what it has.
    Fleet,
    /// The lease says who.
    Lease(Box<dyn LeaseStore>),
}

/// A word about a machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Word<'a> {
    /// Name of the host that says it.
    pub(super) by: &'a str,
    /// Name of the host that is to have the machine's frames.
    pub(super) owner: &'a str,
    /// The data path's epoch.
    pub(super) epoch: u64,
}

/// Why a word has no effect.
#[derive(Debug)]
pub(super) enum Refusal {
    /// Nothing will change that.
    Final(NetError),
    /// The leases could not be read: it may be said again.
    Later(NetError),
}

/// The lease's part of an epoch of the data path (`docs/protocol.md`); the rest counts flips.
pub(super) fn lease_epoch(epoch: u64) -> u64 {
    epoch >> 16
}

impl Authority {
    /// Whether `word` may have an effect, `known` being what the ledger has of the machine. Returns
    /// whose lease its epoch is, where that is known.
    pub(super) fn judge(
        &self,
        known: Option<&Entry>,
        net: &MachineNet,
        word: Word<'_>,
    ) -> Result<Option<String>, Refusal> {
        let Self::Lease(store) = self else { return Ok(None) };
        let said = lease_epoch(word.epoch);
        if let Some(known) = known.filter(|k| k.net.machine == net.machine) {
            let holder = known.holder.as_deref();
            // An older one is refused by the ledger, with its own words.
            let own = said == lease_epoch(known.epoch) && holder == Some(word.by);
            if own || word.epoch < known.epoch {
                return Ok(known.holder.clone());
            }
        }
        let unauthorised = |detail: String| {
            let (machine, host) = (net.machine.clone(), word.by.to_owned());
            Refusal::Final(NetError::Unauthorised { machine, host, epoch: word.epoch, detail })
        };
        let name = MachineName::new(&net.machine).map_err(|e| unauthorised(e.to_string()))?;
        let record = store
            .read(&name)
            .map_err(|e| Refusal::Later(NetError::failed(net, "read its lease at the edge", e)))?;
        match record {
            None => Err(unauthorised("the machine has no lease".into())),
            Some(record) if record.epoch != Epoch(said) || record.owner.as_str() != word.owner => {
                Err(unauthorised(format!(
                    "its lease is host \"{}\"'s at {}, and this is about host \"{}\" at {}",
                    record.owner,
                    record.epoch,
                    word.owner,
                    Epoch(said)
                )))
            }
            Some(record) => Ok(Some(record.owner.to_string())),
        }
    }

    /// Whether a host may name the next one whose frames are believed before its claim: the machine's
    /// owner may; without leases the next one itself, too.
    pub(super) fn may_announce(&self, known: &Entry, by: &str, next: &str) -> bool {
        match self {
            Self::Fleet => true,
            Self::Lease(_) => known.holder.as_deref() == Some(by) && by != next,
        }
    }

    /// Whether frames are believed from a host that nobody has announced.
    pub(super) fn believes_strangers(&self) -> bool {
        matches!(self, Self::Fleet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::ledger::ENTRY_VERSION;
    use lease::{AttemptId, FileStore, HostName, Nonce, Outcome, Record, StoreError};
    use std::{net::Ipv4Addr, time::Duration};

    fn net() -> MachineNet {
        MachineNet::new("redis", Ipv4Addr::new(10, 77, 0, 5), [2, 0, 0, 0, 0, 5], 1400)
    }

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    /// Epoch 1 was host a's, epoch 2 is host b's.
    fn store(folder: &std::path::Path) -> FileStore {
        let store = FileStore::open(folder, Duration::from_secs(1)).unwrap();
        let machine = MachineName::new("redis").unwrap();
        let first = Record::first(machine.clone(), host("a"), AttemptId(1), Nonce(1));
        assert_eq!(store.compare_and_set(&machine, None, &first).unwrap(), Outcome::Won);
        let next = first.taken(host("b"), AttemptId(2), Nonce(2));
        assert_eq!(store.compare_and_set(&machine, Some(&first), &next).unwrap(), Outcome::Won);
        store
    }

    fn entry(epoch: u64, holder: &str) -> Entry {
        Entry {
            version: ENTRY_VERSION,
            net: net(),
            owner: Ipv4Addr::new(100, 64, 0, 2),
            epoch,
            released: false,
            holder: Some(holder.into()),
            home: None,
        }
    }

    fn word<'a>(by: &'a str, owner: &'a str, epoch: u64) -> Word<'a> {
        Word { by, owner, epoch }
    }

    const ONE: u64 = 1 << 16;
    const TWO: u64 = 2 << 16;

    #[test]
    fn an_epoch_comes_in_only_with_the_host_that_the_lease_names() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::Lease(Box::new(store(folder.path())));
        let known = entry(ONE, "a");
        let judge = |word| authority.judge(Some(&known), &net(), word);
        assert_eq!(judge(word("b", "b", TWO)).unwrap().as_deref(), Some("b"));
        for (why, word) in [
            ("a foreign host", word("c", "c", TWO)),
            ("the host that lost it", word("a", "a", TWO)),
            ("an epoch made up", word("b", "b", 3 << 16)),
            ("a foreign host for the former owner", word("c", "a", TWO)),
            ("a foreign host within the epoch", word("c", "c", ONE + 1)),
        ] {
            let refusal = judge(word).expect_err(why);
            let Refusal::Final(error) = refusal else { panic!("{why}: {refusal:?}") };
            assert!(matches!(error, NetError::Unauthorised { .. }), "{why}: {error}");
        }
    }

    /// A store that must not be asked.
    struct Unread;

    impl LeaseStore for Unread {
        fn read(&self, machine: &MachineName) -> Result<Option<Record>, StoreError> {
            Err(StoreError::Unavailable {
                of: lease::Key::Lease(machine.clone()),
                operation: "read".into(),
                detail: "cut off".into(),
            })
        }

        fn compare_and_set(
            &self,
            _machine: &MachineName,
            _expected: Option<&Record>,
            _new: &Record,
        ) -> Result<Outcome, StoreError> {
            unreachable!("an edge writes no lease")
        }

        fn read_beat(&self, _: &lease::BeatName) -> Result<Option<lease::Beat>, StoreError> {
            unreachable!("an edge reads no beat")
        }

        fn compare_and_set_beat(
            &self,
            _: &lease::BeatName,
            _expected: Option<&lease::Beat>,
            _new: &lease::Beat,
        ) -> Result<Outcome<lease::Beat>, StoreError> {
            unreachable!("an edge writes no beat")
        }
    }

    #[test]
    fn an_owners_own_flips_need_no_store_and_a_new_epoch_waits_for_it() {
        let authority = Authority::Lease(Box::new(Unread));
        let known = entry(ONE, "a");
        let judge = |word| authority.judge(Some(&known), &net(), word);
        assert!(judge(word("a", "b", ONE + 1)).is_ok(), "it gives its frames away");
        assert!(judge(word("a", "a", ONE + 2)).is_ok(), "and takes them back");
        assert!(matches!(judge(word("b", "b", TWO)), Err(Refusal::Later(_))));
    }

    #[test]
    fn only_the_owner_announces_who_is_next() {
        let authority = Authority::Lease(Box::new(Unread));
        let known = entry(ONE, "a");
        assert!(authority.may_announce(&known, "a", "b"));
        assert!(!authority.may_announce(&known, "b", "b"), "nobody announces itself");
        assert!(!authority.may_announce(&known, "c", "b"));
        assert!(!authority.believes_strangers() && Authority::Fleet.believes_strangers());
    }
}
