//! Which address a machine gets that comes without one. No I/O; time comes in as seconds since 1970,
//! because it must mean the same after a restart.
//!
//! ```text
//!            give                       release
//!  free ───────────→ given to a name ───────────→ returned ── quarantine ──→ free
//!                      │ never claimed for a day                (at once for the same name)
//!                      └──────────────────────────→ free
//! ```
//!
//! What must hold: an address that was given is written down before anybody is told ([`super::Shared`] does
//! that), so that no kill gives it twice; the same name in the same network is given the same address for as
//! long as it has it; nothing is given that a machine has, whoever gave it to that one.

use crate::{
    agent::guests::router::of_mac,
    datapath::{MachineKey, NetworkId, mac_of},
    policy::Prefix,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
    time::Duration,
};

/// Version of [`Given`] as written today.
pub(super) const GIVEN_VERSION: u32 = 1;
/// Who has not claimed its address by then will not come.
const UNCLAIMED: Duration = Duration::from_secs(24 * 3600);

/// Addresses for the machines of one network, or of all that have no range of their own. Written
/// `10.77.0.0/24`, or `7=10.77.0.0/24` for network 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Of which network; `None`: of all that have none.
    pub network: Option<NetworkId>,
    first: Ipv4Addr,
    bits: u8,
}

/// Text that is no [`Range`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no range of IPv4 addresses like 10.77.0.0/24, or 7=10.77.0.0/24 for network 7")]
pub struct BadRange(String);

impl Range {
    /// All addresses of a network.
    #[must_use]
    pub fn new(network: Option<NetworkId>, prefix: Prefix) -> Option<Self> {
        let IpAddr::V4(first) = prefix.address() else { return None };
        Some(Self { network, first, bits: prefix.bits() })
    }

    /// The addresses that machines can have: not the first and the last, where there are others.
    fn addresses(self) -> std::ops::RangeInclusive<u32> {
        let first = u32::from(self.first);
        let last = first | u32::MAX.checked_shr(self.bits.into()).unwrap_or(0);
        if self.bits < 31 { first + 1..=last - 1 } else { first..=last }
    }

    /// Its first and last address.
    pub(super) fn ends(self) -> [Ipv4Addr; 2] {
        let all = self.addresses();
        [(*all.start()).into(), (*all.end()).into()]
    }
}

impl FromStr for Range {
    type Err = BadRange;

    fn from_str(text: &str) -> Result<Self, BadRange> {
        let parse = || {
            let (network, prefix) = match text.split_once('=') {
                Some((id, prefix)) => {
                    (Some(NetworkId(id.parse().ok().filter(|&id| id > 0)?)), prefix)
                }
                None => (None, text),
            };
            Self::new(network, prefix.parse().ok()?)
        };
        parse().ok_or_else(|| BadRange(text.to_owned()))
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(network) = self.network {
            write!(f, "{network}=")?;
        }
        write!(f, "{}/{}", self.first, self.bits)
    }
}

/// Who has an address that was given. This is also its state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Given {
    /// Version of the state file.
    pub(super) version: u32,
    /// The machine's name.
    pub(super) machine: String,
    /// Its network.
    pub(super) network: NetworkId,
    /// Its address.
    pub(super) address: Ipv4Addr,
    /// Its IPv6 address, if it was given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) address_v6: Option<Ipv6Addr>,
    /// Whether it still has it.
    #[serde(flatten)]
    pub(super) state: State,
}

/// Whether a machine has the address that it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub(super) enum State {
    /// It has it, since then.
    Given {
        /// Seconds since 1970.
        at: u64,
    },
    /// It is gone, since then.
    Returned {
        /// Seconds since 1970.
        at: u64,
    },
}

impl Given {
    pub(super) fn key(&self) -> MachineKey {
        MachineKey { network: self.network, address: self.address }
    }
}

/// Why no address was given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PoolError {
    /// No range is for this network.
    #[error("this edge has no addresses for network {0}; add some with --pool, or choose one")]
    NoRange(NetworkId),
    /// Everything is in use.
    #[error(
        "all {all} addresses of {ranges} are in use, {waiting} of them by machines that went less than \
         {quarantine:?} ago; remove machines, or add addresses with --pool"
    )]
    Exhausted {
        /// How many there are.
        all: usize,
        /// Of which ranges.
        ranges: String,
        /// How many come back by themselves.
        waiting: usize,
        /// How long that takes.
        quarantine: Duration,
    },
}

/// How a machine came to what it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Has {
    pub(super) address: Ipv4Addr,
    pub(super) address_v6: Option<Ipv6Addr>,
}

/// The addresses that were given.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    ranges: Vec<Range>,
    v6: Option<Prefix>,
    quarantine: Duration,
    given: BTreeMap<MachineKey, Given>,
    names: BTreeMap<(NetworkId, String), Ipv4Addr>,
    /// The last address that was given of a network: the next one is after it, so that one that was
    /// returned rests for longer than it must.
    last: BTreeMap<NetworkId, u32>,
}

impl Pool {
    pub(super) fn new(ranges: Vec<Range>, v6: Option<Prefix>, quarantine: Duration) -> Self {
        let (given, names, last) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { ranges, v6, quarantine, given, names, last }
    }

    /// Takes what a state file says, or what was written down.
    pub(super) fn put(&mut self, given: Given) {
        let key = given.key();
        if let Some(before) = self.given.remove(&key) {
            let name = (before.network, before.machine);
            if self.names.get(&name) == Some(&key.address) {
                self.names.remove(&name);
            }
        }
        self.names.insert((given.network, given.machine.clone()), given.address);
        self.last.insert(given.network, given.address.into());
        self.given.insert(key, given);
    }

    /// Puts an address back to what it was, when it could not be written down.
    pub(super) fn undo(&mut self, key: MachineKey, before: Option<Given>) {
        if let Some(given) = self.given.remove(&key) {
            self.names.remove(&(given.network, given.machine));
        }
        if let Some(before) = before {
            self.put(before);
        }
    }

    /// Who was given an address last.
    pub(super) fn get(&self, key: MachineKey) -> Option<&Given> {
        self.given.get(&key)
    }

    /// What was given.
    pub(super) fn given(&self) -> impl Iterator<Item = &Given> {
        self.given.values()
    }

    /// What a machine is to be given, which must be [`Pool::put`] once it is written down. `has`: the
    /// address that a machine of this name has already. `taken`: whether another one has these.
    pub(super) fn choose(
        &self,
        machine: &str,
        network: NetworkId,
        now: u64,
        has: Option<Has>,
        taken: impl Fn(Ipv4Addr, Option<Ipv6Addr>) -> bool,
    ) -> Result<Given, PoolError> {
        let give = |address, address_v6| Given {
            version: GIVEN_VERSION,
            machine: machine.to_owned(),
            network,
            address,
            address_v6,
            state: State::Given { at: now },
        };
        if let Some(Has { address, address_v6 }) = has {
            return Ok(give(address, address_v6));
        }
        if let Some(&address) = self.names.get(&(network, machine.to_owned()))
            && let Some(before) = self.given.get(&MachineKey { network, address })
            && !taken(address, before.address_v6)
        {
            return Ok(match before.state {
                State::Given { .. } => before.clone(),
                State::Returned { .. } => give(address, before.address_v6),
            });
        }
        let own: Vec<Range> =
            self.ranges.iter().copied().filter(|r| r.network == Some(network)).collect();
        let ranges = if own.is_empty() {
            self.ranges.iter().copied().filter(|r| r.network.is_none()).collect()
        } else {
            own
        };
        let last = self.last.get(&network).copied().unwrap_or(0);
        let all = || ranges.iter().flat_map(|r| r.addresses());
        let free = |number: &u32| {
            let address = Ipv4Addr::from(*number);
            !self.is_held(MachineKey { network, address }, now)
                && !taken(address, self.v6_of(network, address))
        };
        let found = all().filter(|&n| n > last).find(free).or_else(|| all().find(free));
        if let Some(number) = found {
            let address = number.into();
            return Ok(give(address, self.v6_of(network, address)));
        }
        if ranges.is_empty() {
            return Err(PoolError::NoRange(network));
        }
        let waits = |n: &u32| {
            let given = self.given.get(&MachineKey { network, address: (*n).into() });
            given.is_some_and(|g| matches!(g.state, State::Returned { .. }))
        };
        Err(PoolError::Exhausted {
            all: all().count(),
            ranges: ranges.iter().map(Range::to_string).collect::<Vec<_>>().join(", "),
            waiting: all().filter(waits).count(),
            quarantine: self.quarantine,
        })
    }

    /// Whether an address must not be given to anybody new.
    fn is_held(&self, key: MachineKey, now: u64) -> bool {
        self.given.get(&key).is_some_and(|given| {
            let (since, bound) = match given.state {
                // Where it was claimed, the ledger has it.
                State::Given { at } => (at, UNCLAIMED),
                State::Returned { at } => (at, self.quarantine),
            };
            // A clock that was set back holds it for longer, not for ever.
            now < since.saturating_add(bound.as_secs())
        })
    }

    /// Whom an address was given to that has not claimed it yet, if that is not `machine`.
    pub(super) fn other_owner(&self, key: MachineKey, machine: &str, now: u64) -> Option<&str> {
        let given = self.given.get(&key)?;
        let theirs = matches!(given.state, State::Given { .. }) && given.machine != machine;
        (theirs && self.is_held(key, now)).then_some(given.machine.as_str())
    }

    /// A machine is gone; says what is to be written down, if it had its address from here.
    pub(super) fn returned(&self, key: MachineKey, machine: &str, now: u64) -> Option<Given> {
        let given = self.given.get(&key).filter(|g| g.machine == machine)?;
        let state = State::Returned { at: now };
        matches!(given.state, State::Given { .. }).then(|| Given { state, ..given.clone() })
    }

    /// The IPv6 address that goes with an IPv4 address: one that a stock kernel makes itself of what its
    /// router says, in a /64 of the tenant's own where the network has room for that.
    fn v6_of(&self, network: NetworkId, address: Ipv4Addr) -> Option<Ipv6Addr> {
        let prefix = self.v6?;
        let IpAddr::V6(first) = prefix.address() else { return None };
        let first = u128::from(first);
        match prefix.bits() {
            ..=48 => Some(of_mac((first | u128::from(network.0) << 64).into(), mac_of(address))),
            49..=64 => Some(of_mac(first.into(), mac_of(address))),
            65..=96 => Some((first | u128::from(u32::from(address))).into()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const COMMON: NetworkId = NetworkId::COMMON;
    const QUARANTINE: u64 = 300;

    fn pool(ranges: &[&str], v6: Option<&str>) -> Pool {
        let ranges = ranges.iter().map(|r| r.parse().unwrap()).collect();
        Pool::new(ranges, v6.map(|v| v.parse().unwrap()), Duration::from_secs(QUARANTINE))
    }

    fn nobody(_: Ipv4Addr, _: Option<Ipv6Addr>) -> bool {
        false
    }

    fn give(pool: &mut Pool, machine: &str, network: NetworkId, now: u64) -> Option<Given> {
        let given = pool.choose(machine, network, now, None, nobody).ok()?;
        pool.put(given.clone());
        Some(given)
    }

    #[test]
    fn each_name_gets_one_address_and_the_same_one_again() {
        let mut pool = pool(&["10.77.0.0/29"], None);
        let mut seen = BTreeSet::new();
        for name in ["a", "b", "c", "d", "e", "f"] {
            let given = give(&mut pool, name, COMMON, 0).unwrap();
            assert!(seen.insert(given.address), "{given:?}");
            assert_eq!(give(&mut pool, name, COMMON, 9).unwrap(), given);
        }
        assert_eq!(seen.first(), Some(&Ipv4Addr::new(10, 77, 0, 1)));
        assert_eq!(seen.last(), Some(&Ipv4Addr::new(10, 77, 0, 6)));
        let error = pool.choose("g", COMMON, 9, None, nobody).unwrap_err().to_string();
        assert!(error.contains("all 6 addresses of 10.77.0.0/29"), "{error}");
        assert!(give(&mut pool, "g", NetworkId(7), 9).is_some(), "tenants have the same addresses");
    }

    #[test]
    fn what_was_returned_rests_for_its_quarantine_and_is_given_to_its_own_name_at_once() {
        let mut pool = pool(&["10.77.0.4/31"], None);
        let (a, b) =
            (give(&mut pool, "a", COMMON, 0).unwrap(), give(&mut pool, "b", COMMON, 0).unwrap());
        let returned = pool.returned(a.key(), "a", 100).unwrap();
        assert_eq!(pool.returned(b.key(), "a", 100), None, "it has another");
        pool.put(returned);
        assert_eq!(pool.returned(a.key(), "a", 100), None, "once");
        let error = pool.choose("c", COMMON, 100 + QUARANTINE - 1, None, nobody).unwrap_err();
        assert!(error.to_string().contains("1 of them by machines that went"), "{error}");
        assert_eq!(pool.choose("a", COMMON, 101, None, nobody).unwrap().address, a.address);
        let c = give(&mut pool, "c", COMMON, 100 + QUARANTINE).unwrap();
        assert_eq!(c.address, a.address);
        assert!(give(&mut pool, "a", COMMON, 100 + QUARANTINE).is_none(), "it is another's now");
    }

    #[test]
    fn what_was_never_claimed_comes_back_after_a_day_and_is_nobody_elses_before() {
        let mut pool = pool(&["10.77.0.4/32"], None);
        let a = give(&mut pool, "a", COMMON, 0).unwrap();
        let day = UNCLAIMED.as_secs();
        assert_eq!(pool.other_owner(a.key(), "b", day - 1), Some("a"));
        assert_eq!(pool.other_owner(a.key(), "a", day - 1), None);
        assert!(give(&mut pool, "b", COMMON, day - 1).is_none());
        assert_eq!(pool.other_owner(a.key(), "b", day), None);
        // Claimed, which the ledger knows.
        assert!(pool.choose("b", COMMON, day, None, |_, _| true).is_err());
        assert_eq!(give(&mut pool, "b", COMMON, day).unwrap().address, a.address);
    }

    #[test]
    fn nothing_is_given_that_a_machine_has_and_a_machine_gets_what_it_has() {
        let pool = pool(&["10.77.0.0/24"], None);
        let has = Has { address: Ipv4Addr::new(10, 77, 9, 9), address_v6: None };
        assert_eq!(pool.choose("a", COMMON, 0, Some(has), nobody).unwrap().address, has.address);
        let taken = |a: Ipv4Addr, _| a.octets()[3] < 200;
        let given = pool.choose("b", COMMON, 0, None, taken).unwrap();
        assert_eq!(given.address, Ipv4Addr::new(10, 77, 0, 200));
    }

    #[test]
    fn a_network_with_a_range_of_its_own_gets_its_addresses_there() {
        let mut pool = pool(&["10.77.0.0/24", "7=10.77.7.0/24"], None);
        assert_eq!(
            give(&mut pool, "a", NetworkId(7), 0).unwrap().address,
            Ipv4Addr::new(10, 77, 7, 1)
        );
        assert_eq!(
            give(&mut pool, "a", NetworkId(8), 0).unwrap().address,
            Ipv4Addr::new(10, 77, 0, 1)
        );
        let only = self::pool(&["7=10.77.7.0/24"], None);
        assert_eq!(only.choose("a", COMMON, 0, None, nobody), Err(PoolError::NoRange(COMMON)));
        for bad in ["0=10.0.0.0/8", "fd00::/8", "x=10.0.0.0/8", "10.0.0.0/33", ""] {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ipv6_addresses_follow_from_ipv4_ones_by_the_size_of_the_network() {
        for (v6, expected) in [
            ("fd77::/48", "fd77:0:0:7:5054:aff:fe4d:1"),
            ("fd77::/64", "fd77::5054:aff:fe4d:1"),
            ("fd77::/96", "fd77::a4d:1"),
        ] {
            let mut pool = pool(&["10.77.0.0/24"], Some(v6));
            let given = give(&mut pool, "a", NetworkId(7), 0).unwrap();
            assert_eq!(given.address_v6, expected.parse().ok(), "{v6}");
        }
    }

    #[test]
    fn the_state_file_is_fixed() {
        let mut pool = pool(&["10.77.0.0/24"], Some("fd77::/64"));
        let given = give(&mut pool, "a", NetworkId(7), 5).unwrap();
        let text = r#"{"version":1,"machine":"a","network":7,"address":"10.77.0.1","address_v6":"fd77::5054:aff:fe4d:1","state":"given","at":5}"#;
        assert_eq!(serde_json::to_string(&given).unwrap(), text);
        assert_eq!(serde_json::from_str::<Given>(text).unwrap(), given);
    }
}
