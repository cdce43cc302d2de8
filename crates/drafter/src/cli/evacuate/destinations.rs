//! Where machines go: as a file says, or spread over hosts that take all.

use super::super::moves::HostAt;
use crate::{migrate::reception::Offers, runner::state};
use anyhow::Context;
use std::{collections::BTreeMap, path::Path};

/// Where a machine goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Destination {
    pub(super) place: Place,
    pub(super) worth: u32,
}

/// See [`Destination::place`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// To a runner that waits for it.
    Runner(HostAt),
    /// To the first of these hosts that has a runner for it.
    Hosts(Vec<HostAt>),
}

impl Place {
    /// The host that is tried first.
    pub(super) fn first(&self) -> Option<&str> {
        match self {
            Self::Runner(host) => Some(&host.host),
            Self::Hosts(hosts) => hosts.first().map(|host| host.host.as_str()),
        }
    }
}

/// A host that takes every machine, and what it said that it has.
#[derive(Clone, Debug)]
pub(super) struct Taker {
    pub(super) at: HostAt,
    /// None: it does not say.
    pub(super) offers: Option<Offers>,
}

/// Spreads machines, of so many bytes of memory and in all, over hosts: the largest first, each to the host
/// with the fewest bytes so far among those with memory for it; the others are asked, in the same order,
/// should that refuse it.
pub(super) fn spread(loads: &[(&str, u64, u64)], hosts: &[Taker]) -> BTreeMap<String, Destination> {
    let room = |host: &Taker| host.offers.map_or(u64::MAX, |offers| offers.memory_bytes);
    let mut taken: Vec<(u64, u64, &Taker)> =
        hosts.iter().map(|host| (0, room(host), host)).collect();
    let mut largest: Vec<_> = loads.to_vec();
    largest.sort_by_key(|&(name, _, bytes)| (std::cmp::Reverse(bytes), name));
    let mut all = BTreeMap::new();
    for (name, memory, bytes) in largest {
        taken.sort_by_key(|(taken, room, _)| (*room < memory, *taken));
        let place = Place::Hosts(taken.iter().map(|(_, _, host)| host.at.clone()).collect());
        if let Some((first, room, _)) = taken.first_mut() {
            *first += bytes;
            *room = room.saturating_sub(memory);
        }
        all.insert(name.to_owned(), Destination { place, worth: 1 });
    }
    all
}

/// Reads the file of destinations.
pub(super) fn destinations(path: &Path) -> anyhow::Result<BTreeMap<String, Destination>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    parse_destinations(&text).map_err(|why| anyhow::anyhow!("{}: {why}", path.display()))
}

fn parse_destinations(text: &str) -> Result<BTreeMap<String, Destination>, String> {
    let mut all = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let wrong = |what: String| format!("line {}: {what}", number + 1);
        let words: Vec<&str> = line.split_whitespace().collect();
        let (&[machine, host, address], rest) = words
            .split_first_chunk::<3>()
            .ok_or_else(|| wrong("write MACHINE HOST ADDRESS:PORT [WORTH]".into()))?;
        state::check_name(machine).map_err(wrong)?;
        identity::HostName::new(host).map_err(|e| wrong(e.to_string()))?;
        let address =
            address.parse().map_err(|_| wrong(format!("\"{address}\" is no ADDRESS:PORT")))?;
        let worth = match rest {
            [] => 1,
            [worth] => worth
                .parse()
                .map_err(|_| wrong(format!("\"{worth}\" is no worth: write a whole number")))?,
            more => return Err(wrong(format!("{} words too many", more.len() - 1))),
        };
        let place = Place::Runner(HostAt { host: host.to_owned(), address });
        let to = Destination { place, worth };
        if all.insert(machine.to_owned(), to).is_some() {
            return Err(wrong(format!("\"{machine}\" has a destination already")));
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_and_what_is_wrong_is_named_with_its_line() {
        let text = "# where they go\n redis  b 10.0.0.2:7500\nweb c [::1]:7501 5 # dear\n\n";
        let all = parse_destinations(text).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!((all["redis"].worth, all["web"].worth), (1, 5));
        let web = HostAt { host: "c".into(), address: "[::1]:7501".parse().unwrap() };
        assert_eq!(all["web"].place, Place::Runner(web));
        for (bad, what) in [
            ("redis b", "line 1: write MACHINE"),
            ("\nredis B 10.0.0.2:1", "line 2: \"B\" cannot name a host"),
            ("redis b 10.0.0.2", "no ADDRESS:PORT"),
            ("redis b 10.0.0.2:1 dear", "no worth"),
            ("redis b 10.0.0.2:1 1 2 3", "2 words too many"),
            ("a b 10.0.0.2:1\na c 10.0.0.3:1", "line 2: \"a\" has a destination already"),
            ("../a b 10.0.0.2:1", "line 1: "),
        ] {
            let why = parse_destinations(bad).unwrap_err();
            assert!(why.contains(what), "{bad}: {why}");
        }
    }

    fn takers(offers: [Option<u64>; 2]) -> Vec<Taker> {
        let hosts = ["b=10.0.0.2:1", "c=10.0.0.3:1"].map(|host| host.parse::<HostAt>().unwrap());
        let offers =
            offers.map(|room| room.map(|bytes| Offers { memory_bytes: bytes, store: true }));
        hosts.into_iter().zip(offers).map(|(at, offers)| Taker { at, offers }).collect()
    }

    fn firsts(loads: [(&str, u64); 4], hosts: &[Taker]) -> [String; 4] {
        let sizes = loads.map(|(name, bytes)| (name, bytes, bytes));
        let all = spread(&sizes, hosts);
        loads.map(|(name, _)| match &all[name].place {
            Place::Hosts(order) => {
                assert_eq!(order.len(), 2);
                order[0].host.clone()
            }
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn machines_are_spread_by_size_and_every_host_is_asked_in_turn() {
        let loads = [("l", 100), ("m", 60), ("t", 50), ("s", 10)];
        // b: 100, then c: 60, c: 110, b: 110.
        assert_eq!(firsts(loads, &takers([None, None])), ["b", "c", "c", "b"]);
        assert!(spread(&[], &takers([None, None])).is_empty());
    }

    #[test]
    fn nobody_is_sent_first_to_a_host_without_room_as_long_as_another_has_some() {
        let loads = [("l", 100), ("m", 60), ("t", 50), ("s", 10)];
        // c has room for m and s; t goes to b although that has more by then.
        assert_eq!(firsts(loads, &takers([Some(1000), Some(75)])), ["b", "c", "b", "c"]);
        // Nowhere is room for l and then for m: they are spread as if it were, and the hosts decide.
        assert_eq!(firsts(loads, &takers([Some(55), Some(15)])), ["b", "c", "c", "b"]);
    }
}
