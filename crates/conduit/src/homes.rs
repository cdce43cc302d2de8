//! Several edges: which of them a machine belongs to, and which serves it now.
//!
//! A machine's *home* is the edge whose public addresses it has: chosen once, when it first runs, by
//! rendezvous hash over the edges that its host hears, recorded with the machine, and the same for its
//! life. A home is *served* by one edge at a time: the home itself, or after its death or a drain
//! another one. So an edge that is added moves nobody, and one that goes hands over a home as a whole:
//! one word, one epoch, whatever the number of machines.
//!
//! A home is named by its edge's overlay address. The epoch of who serves it is the lease's
//! ([`crate::edge`]); everybody who hears two words believes the newer. No I/O here.

use crate::{datapath::MachineNet, wire::Peer};
use identity::HostName;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, btree_map},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// The home of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Home {
    /// Overlay address of the edge.
    pub edge: Ipv4Addr,
    /// The machine's epoch when it was chosen: of two choices the older one stands.
    pub since: u64,
}

impl Home {
    /// The choice that stands, of two.
    #[must_use]
    pub fn older(self, other: Self) -> Self {
        if (other.since, other.edge) < (self.since, self.edge) { other } else { self }
    }
}

/// An edge's word on a home: its addresses, and who serves it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomeWord {
    /// Overlay address of the edge that it is named by.
    pub home: Ipv4Addr,
    /// That edge's name.
    pub name: String,
    /// The address that clients use.
    pub public: Ipv4Addr,
    /// Likewise, of IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_v6: Option<Ipv6Addr>,
    /// Addresses that machines may have whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spare: Vec<IpAddr>,
    /// The edge that serves it.
    pub by: Peer,
    /// Of who serves it.
    pub epoch: u64,
}

impl HomeWord {
    /// All its public addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let v6 = self.public_v6.map(IpAddr::V6);
        std::iter::once(IpAddr::V4(self.public)).chain(v6).chain(self.spare.iter().copied())
    }
}

/// The newest word on each home.
pub type Words = BTreeMap<Ipv4Addr, HomeWord>;

/// More homes than this are not believed.
pub const HOMES: usize = 64;

/// Takes a word if it is news.
pub fn hear(words: &mut Words, word: HomeWord) -> bool {
    let room = words.len() < HOMES;
    match words.entry(word.home) {
        btree_map::Entry::Occupied(mut known) => {
            let (old, new) = (known.get(), &word);
            let addresses = |w: &HomeWord| (w.name.clone(), w.public, w.public_v6, w.spare.clone());
            // At one epoch only the addresses can be news, and only from whoever serves it.
            let news = new.epoch > old.epoch
                || new.epoch == old.epoch && new.by == old.by && addresses(new) != addresses(old);
            if news {
                known.insert(word);
            }
            news
        }
        btree_map::Entry::Vacant(free) => {
            if room {
                free.insert(word);
            }
            room
        }
    }
}

/// A number made of text and two numbers, the same on every computer and in every version: what was
/// chosen by it must not depend on who chose. FNV-1a, then splitmix64's end.
fn mix(text: &str, a: u32, b: u32) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in text.bytes().chain(a.to_be_bytes()).chain(b.to_be_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// The home of a new machine: the one that has the address it wants whole, else the first by
/// rendezvous hash among the homes that may be chosen.
pub fn choose<'a>(
    net: &MachineNet,
    among: impl Iterator<Item = &'a HomeWord> + Clone,
) -> Option<Ipv4Addr> {
    if let Some(whole) = net.policy.public.first()
        && let Some(has) = among.clone().find(|word| word.spare.contains(whole))
    {
        return Some(has.home);
    }
    let network = u32::from(net.network.0);
    let rank = |word: &&HomeWord| {
        let place = mix(&net.machine, network, net.address.to_bits());
        mix("", (place >> 32) as u32 ^ place as u32, word.home.to_bits())
    };
    among.max_by_key(rank).map(|word| word.home)
}

/// The edge that takes over a home of one that is dead: the first by rendezvous hash of those that are
/// alive.
#[must_use]
pub fn heir(home: Ipv4Addr, alive: &[Ipv4Addr]) -> Option<Ipv4Addr> {
    let rank = |edge: &&Ipv4Addr| mix("heir", home.to_bits(), edge.to_bits());
    alive.iter().max_by_key(rank).copied()
}

/// Where an edge listens, and the name that it must prove: `NAME=ADDRESS:PORT`, or without a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgeAt {
    /// Its name.
    pub name: Option<HostName>,
    /// Where it listens for agents and other edges.
    pub address: SocketAddr,
}

impl FromStr for EdgeAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, address) = match text.split_once('=') {
            Some((name, address)) => {
                (Some(HostName::new(name).map_err(|e| e.to_string())?), address)
            }
            None => (None, text),
        };
        let address = address.parse().map_err(|_| {
            format!("\"{text}\" is not ADDRESS:PORT or NAME=ADDRESS:PORT, as in west=10.0.0.1:7450")
        })?;
        Ok(Self { name, address })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(last: u8, by: u8, epoch: u64) -> HomeWord {
        let at = |n| Ipv4Addr::new(100, 64, 0, n);
        HomeWord {
            home: at(last),
            name: format!("edge{last}"),
            public: Ipv4Addr::new(203, 0, 113, last),
            public_v6: None,
            spare: Vec::new(),
            by: Peer { overlay: at(by), underlay: Ipv4Addr::new(10, 88, 0, by) },
            epoch,
        }
    }

    fn machine(number: u32) -> MachineNet {
        let address = Ipv4Addr::from_bits(0x0a4d_0000 + number);
        MachineNet::new(format!("m{number}"), address, [2, 0, 0, 0, 0, 1], 1400)
    }

    #[test]
    fn machines_are_spread_and_an_edge_more_takes_only_its_share_of_new_ones() {
        let homes: Vec<_> = (1..=4).map(|n| word(n, n, 1)).collect();
        let mut shares = BTreeMap::<_, usize>::new();
        for number in 0..3000 {
            let three = choose(&machine(number), homes[..3].iter()).unwrap();
            let four = choose(&machine(number), homes.iter()).unwrap();
            assert!(four == three || four == homes[3].home, "it moved between the old ones");
            *shares.entry(four).or_default() += 1;
        }
        assert!(shares.values().all(|&n| (600..900).contains(&n)), "{shares:?}");
    }

    #[test]
    fn a_choice_is_the_same_on_every_computer() {
        let homes: Vec<_> = (1..=3).map(|n| word(n, n, 1)).collect();
        let chosen: Vec<u8> =
            (0..8).map(|n| choose(&machine(n), homes.iter()).unwrap().octets()[3]).collect();
        assert_eq!(chosen, CHOSEN);
    }

    const CHOSEN: [u8; 8] = [2, 3, 3, 2, 2, 1, 2, 2];

    #[test]
    fn a_machine_with_a_whole_address_is_at_home_where_that_is() {
        let spare = IpAddr::from([203, 0, 113, 9]);
        let homes = [word(1, 1, 1), HomeWord { spare: vec![spare], ..word(2, 2, 1) }];
        for number in 0..20 {
            let mut net = machine(number);
            net.policy.public = vec![spare];
            assert_eq!(choose(&net, homes.iter()), Some(homes[1].home));
        }
    }

    #[test]
    fn the_newer_word_is_believed_and_one_epoch_has_one_edge() {
        let mut words = Words::new();
        assert!(hear(&mut words, word(1, 1, 3)));
        assert!(!hear(&mut words, word(1, 2, 2)), "older");
        assert!(!hear(&mut words, word(1, 2, 3)), "the same epoch, another edge");
        assert!(hear(&mut words, word(1, 2, 4)));
        assert_eq!(words[&word(1, 1, 0).home].by, word(1, 2, 0).by);
        let more = HomeWord { spare: vec![[203, 0, 113, 9].into()], ..word(1, 2, 4) };
        assert!(hear(&mut words, more.clone()) && !hear(&mut words, more));
    }

    #[test]
    fn of_two_choices_the_older_one_stands_whoever_hears_which_first() {
        let home = |last, since| Home { edge: Ipv4Addr::new(100, 64, 0, last), since };
        for (a, b) in [(home(1, 5), home(2, 6)), (home(2, 6), home(1, 5))] {
            assert_eq!(a.older(b), home(1, 5));
        }
        assert_eq!(home(2, 5).older(home(1, 5)), home(1, 5).older(home(2, 5)));
    }

    #[test]
    fn an_edge_is_given_with_or_without_its_name() {
        let at: EdgeAt = "west=10.88.0.9:7450".parse().unwrap();
        assert_eq!(at.name.unwrap().as_str(), "west");
        assert_eq!("10.88.0.9:7450".parse::<EdgeAt>().unwrap().name, None);
        for bad in ["west", "west=", "=10.0.0.1:1", "a b=10.0.0.1:1", "10.0.0.1"] {
            assert!(bad.parse::<EdgeAt>().is_err(), "{bad}");
        }
    }
}
