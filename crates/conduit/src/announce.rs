//! Tells the network around a host which machines run here, where hosts and clients share a link or a routed
//! fabric: a machine's frames then come straight to its host and leave by it, without tunnel and edge.
//!
//! | | the machine's address is | the network hears of it by |
//! |---|---|---|
//! | [`Announce::Link`] | of the link that hosts and clients share | this host's answers for it (proxy ARP and NDP), and a word unasked when the machine has come |
//! | [`Announce::Routes`] | routed to hosts | a routing daemon that takes the routes of table 6472 ([`crate::host::MACHINES`]), protocol 64 |
//!
//! Used by [`crate::host`] at every step of a move. The tunnel between hosts stays, for what still comes to the
//! host that the machine has left, and while it stands still.
//!
//! What must hold: on a link, of two hosts only the one that the machine runs on speaks for it. The one that it
//! leaves falls silent at the flip; the next one speaks when it runs there. A route stays where it is until the
//! host forgets the machine, and leads to the next one meanwhile: a routing daemon always has one.

use crate::{
    datapath::MachineNet,
    exec::{self, KernelError},
    netlink::{Netlink, interface_index},
    overlay, sys,
};
use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, OwnedFd},
    str::FromStr,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

/// Unasked words may be lost like any frame, and are said again.
const AGAIN: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1)];
/// Machines whose words may wait to be said again.
const QUEUE: usize = 4096;

/// How a host's machines are announced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Announce {
    /// On the link of this interface.
    Link(String),
    /// By routes, which a routing daemon takes further.
    Routes,
}

/// Text that is no [`Announce`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is neither routes nor link:INTERFACE")]
pub struct BadAnnounce(String);

impl FromStr for Announce {
    type Err = BadAnnounce;

    fn from_str(text: &str) -> Result<Self, BadAnnounce> {
        match (text, text.strip_prefix("link:")) {
            ("routes", _) => Ok(Self::Routes),
            (_, Some(name)) if (1..16).contains(&name.len()) => Ok(Self::Link(name.to_owned())),
            _ => Err(BadAnnounce(text.to_owned())),
        }
    }
}

impl fmt::Display for Announce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Routes => f.write_str("routes"),
            Self::Link(name) => write!(f, "link:{name}"),
        }
    }
}

/// Speaks for the machines of a host. Must be made in its network namespace.
pub(crate) struct Announcer {
    uplink: Option<Uplink>,
}

/// The interface of the link.
struct Uplink {
    name: String,
    index: u32,
    voice: Arc<Voice>,
    /// The machines that are here, by address; the number tells one stay from the next.
    here: Arc<Mutex<BTreeMap<IpAddr, u64>>>,
    again: SyncSender<(IpAddr, u64)>,
}

impl Announcer {
    pub(crate) fn open(announce: &Announce) -> Result<Self, KernelError> {
        let Announce::Link(name) = announce else { return Ok(Self { uplink: None }) };
        let facts = overlay::link_facts(name)?.ok_or_else(|| {
            let what = format!("announce machines on {name}");
            KernelError::new(what, "there is no such interface; see --announce link:INTERFACE")
        })?;
        let mac = overlay::mac_of_text(&facts.address).ok_or_else(|| {
            KernelError::new(format!("announce machines on {name}"), "it has no MAC")
        })?;
        // Else questions wait for up to 0.8 seconds, in case the machine itself answers.
        exec::sysctl(&format!("net/ipv4/neigh/{name}/proxy_delay"), "0")?;
        if crate::host::has_ipv6() {
            exec::sysctl(&format!("net/ipv6/neigh/{name}/proxy_delay"), "0")?;
            exec::sysctl(&format!("net/ipv6/conf/{name}/proxy_ndp"), "1")?;
        }
        let index = interface_index(name)?;
        let here = Arc::new(Mutex::new(BTreeMap::new()));
        let socket = sys::frame_socket()
            .map_err(|e| KernelError::new(format!("announce machines on {name}"), e))?;
        let voice = Arc::new(Voice { index, mac, socket });
        let again = repeat(voice.clone(), here.clone());
        Ok(Self { uplink: Some(Uplink { name: name.clone(), index, voice, here, again }) })
    }

    /// The machine's frames are led into its tap from now on. Said again, it is heard again.
    pub(crate) fn here(
        &self,
        netlink: &mut Netlink,
        addresses: impl Iterator<Item = IpAddr>,
    ) -> Result<(), KernelError> {
        let Some(Uplink { index, voice, here, again, .. }) = &self.uplink else { return Ok(()) };
        for address in addresses {
            netlink.set_proxy(*index, address)?;
            let mut here = here.lock().unwrap_or_else(PoisonError::into_inner);
            let stay = here.get(&address).map_or(0, |stay| stay + 1);
            here.insert(address, stay);
            drop(here);
            voice.say(address);
            // A full queue costs repetitions only.
            let _ = again.try_send((address, stay));
        }
        Ok(())
    }

    /// The machine's frames go elsewhere from now on.
    pub(crate) fn gone(
        &self,
        netlink: &mut Netlink,
        addresses: impl Iterator<Item = IpAddr>,
    ) -> Result<(), KernelError> {
        let Some(Uplink { index, here, .. }) = &self.uplink else { return Ok(()) };
        for address in addresses {
            // First, so that nothing is said again of it.
            here.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
            netlink.remove_proxy(*index, address)?;
        }
        Ok(())
    }

    /// Removes what was set up: nobody is answered for any more.
    pub(crate) fn remove(&self, netlink: &mut Netlink) -> Result<(), KernelError> {
        let Some(Uplink { name, here, .. }) = &self.uplink else { return Ok(()) };
        let all: Vec<IpAddr> =
            here.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect();
        tracing::debug!(interface = name, count = all.len(), "not announced any more");
        self.gone(netlink, all.into_iter())
    }
}

/// Starts the thread that says things again, of machines that are still here.
fn repeat(voice: Arc<Voice>, here: Arc<Mutex<BTreeMap<IpAddr, u64>>>) -> SyncSender<(IpAddr, u64)> {
    let (again, waiting) = sync_channel::<(IpAddr, u64)>(QUEUE);
    crate::agent::spawn("announce", move || {
        while let Ok(first) = waiting.recv() {
            let mut all = vec![first];
            for pause in AGAIN {
                thread::sleep(pause);
                all.extend(waiting.try_iter());
                for (address, stay) in &all {
                    // Under the lock: who falls silent does so before anything else.
                    let here = here.lock().unwrap_or_else(PoisonError::into_inner);
                    if here.get(address) == Some(stay) {
                        voice.say(*address);
                    }
                }
            }
        }
    });
    again
}

/// What unasked words leave by. Its socket stays open: a machine waits for the first word, and closing one
/// takes the kernel tens of milliseconds.
struct Voice {
    index: u32,
    mac: [u8; 6],
    socket: OwnedFd,
}

impl Voice {
    fn say(&self, address: IpAddr) {
        let frames = match address {
            IpAddr::V4(address) => vec![arp(self.mac, address, 1), arp(self.mac, address, 2)],
            IpAddr::V6(address) => vec![advertisement(self.mac, address)],
        };
        for frame in frames {
            if let Err(error) = sys::send_frame_by(self.socket.as_fd(), self.index, &frame) {
                tracing::warn!(%address, %error, "neighbours were not told that it is here now");
            }
        }
    }
}

/// "I am `address`", to all (RFC 5227, 3; RFC 826), as question and as answer: some believe only one.
fn arp(mac: [u8; 6], address: Ipv4Addr, operation: u16) -> Vec<u8> {
    const ALL: [u8; 6] = [0xff; 6];
    let mut frame = [ALL, mac].concat();
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4]);
    frame.extend(operation.to_be_bytes());
    for target in [mac, if operation == 1 { [0; 6] } else { mac }] {
        frame.extend(target);
        frame.extend(address.octets());
    }
    frame.resize(60, 0);
    frame
}

/// The same for IPv6: an unsolicited neighbour advertisement that overrides (RFC 4861, 7.2.6).
fn advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    const OVERRIDE: u8 = 0x20;
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(mac);
    let (size, next) = (message.len() as u16, 58_u8);
    let pseudo = [&address.octets()[..], &ALL_NODES.octets(), &u32::from(size).to_be_bytes()];
    let pseudo = [pseudo.concat(), vec![0, 0, 0, next]].concat();
    let sum = checksum(&[pseudo.as_slice(), &message].concat());
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = [[0x33, 0x33, 0, 0, 0, 1], mac].concat();
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend(size.to_be_bytes());
    frame.extend([next, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

/// The internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let pairs = bytes.as_chunks::<2>().0;
    let mut sum: u32 = pairs.iter().map(|&pair| u32::from(u16::from_be_bytes(pair))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// The addresses of a machine that can be announced; an error says why it cannot.
pub(crate) fn check(net: &MachineNet) -> Result<(), &'static str> {
    if net.network != crate::NetworkId::COMMON {
        return Err("this host announces addresses (--announce), which are of one network only");
    }
    if !net.ports.is_empty() || !net.policy.is_default() {
        return Err(
            "this host announces addresses (--announce): clients reach the machine there and not by \
             the edge, so ports and policies have no effect; leave them out",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_fixed() {
        let mac = [2, 0, 0, 0, 0, 7];
        let hex = |frame: Vec<u8>| frame.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let question = hex(arp(mac, [10, 77, 0, 5].into(), 1));
        assert!(question.starts_with(
            "ffffffffffff020000000007080600010800060400010200000000070a4d00050000000000000a4d0005"
        ));
        let said = advertisement(mac, "fd77::5".parse().unwrap());
        assert_eq!(
            hex(said.clone()),
            concat!(
                "333300000001",
                "020000000007",
                "86dd",
                "6000000000203aff",
                "fd770000000000000000000000000005",
                "ff020000000000000000000000000001",
                "8800",
                "SUM",
                "20000000",
                "fd770000000000000000000000000005",
                "0201020000000007"
            )
            .replace("SUM", &hex(said[56..58].to_vec()))
        );
        // With its checksum, all sums up to nothing.
        let pseudo = [&said[22..54], &[0, 0, 0, 32, 0, 0, 0, 58], &said[54..]].concat();
        assert_eq!(checksum(&pseudo), 0);
    }

    #[test]
    fn words_for_it_are_read_or_refused() {
        for good in ["routes", "link:eth0"] {
            assert_eq!(good.parse::<Announce>().unwrap().to_string(), good);
        }
        for bad in ["", "link:", "link", "eth0", "link:0123456789abcdef"] {
            assert!(bad.parse::<Announce>().is_err(), "{bad}");
        }
    }
}
