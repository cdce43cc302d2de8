//! The tap of a machine: where its frames wait, and how those left behind are taken out.
//!
//! The interface is persistent and made by [`crate::host`]; the process that runs the machine
//! opens it here, in the host's network namespace, before the machine's frames are sent to it: a
//! tap that nobody has open drops what comes.

use crate::{
    datapath::{MachineKey, NetworkId, Tap},
    netlink::{Netlink, interface_index},
    sys,
};
use nix::fcntl::OFlag;
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    net::{Ipv4Addr, Ipv6Addr},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
    time::{Duration, Instant},
};

/// The MAC of the gateway that every machine sees, on every host.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x64, 0x72, 0x61, 0x66, 0xfe];
/// The address of that gateway.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same for IPv6.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Frames that wait in a tap's queue while nobody reads; the kernel drops what comes after. A
/// large TCP segment (up to 64 KiB) counts as one.
pub const QUEUE: u32 = 16_384;
/// Names of our taps start with this.
pub const PREFIX: &str = "dr-";

/// How long the kernel may take to see that a tap was opened; milliseconds on a busy host.
const RUNNING_LIMIT: Duration = Duration::from_secs(3);
/// Longest time that [`drain`] spends, whatever the queue holds.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);
/// More than the largest frame that the kernel puts into a tap, with its header.
const FRAME_BYTES: usize = 256 * 1024;

/// The name of a machine's tap: the same on every host, and one per address and network. With the
/// network's four digits it has the 15 characters that the kernel allows.
#[must_use]
pub fn name(key: impl Into<MachineKey>) -> String {
    let MachineKey { network, address } = key.into();
    let address = u32::from(address);
    if network == NetworkId::COMMON {
        return format!("{PREFIX}{address:08x}");
    }
    format!("{PREFIX}{:04x}{address:08x}", network.0)
}

/// The machine whose tap has this name.
#[must_use]
pub(crate) fn key(name: &str) -> Option<MachineKey> {
    let digits = name.strip_prefix(PREFIX)?;
    let (network, address) = match digits.len() {
        8 => (NetworkId::COMMON, digits),
        12 => (NetworkId(u16::from_str_radix(digits.get(..4)?, 16).ok()?), digits.get(4..)?),
        _ => return None,
    };
    let address = u32::from_str_radix(address, 16).ok()?.into();
    Some(MachineKey { network, address })
}

const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

fn open_clone_device() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open("/dev/net/tun")
        .map_err(|e| {
            io::Error::new(e.kind(), format!("{e} (/dev/net/tun; is the module tun loaded?)"))
        })
}

/// Makes the interface and leaves it without an opener.
pub(crate) fn create_persistent(name: &str) -> io::Result<()> {
    let file = open_clone_device()?;
    sys::attach(file.as_fd(), name, FLAGS)?;
    sys::set_persistent(file.as_fd(), true)
}

/// Opens the existing tap of a machine. It has one queue: a second opener is refused by the
/// kernel, so whoever needs a second descriptor duplicates this one.
pub(crate) fn open(name: &str) -> io::Result<Tap> {
    let file = open_clone_device()?;
    sys::attach(file.as_fd(), name, FLAGS).map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY) => io::Error::new(
            e.kind(),
            "another process has this tap open: the machine already runs here, or its last \
             runner has not ended",
        ),
        _ => e,
    })?;
    // What the last opener asked for stays with the interface; a new monitor expects the
    // defaults until it asks itself.
    sys::set_offload(file.as_fd(), 0)?;
    sys::set_vnet_header_size(file.as_fd(), 10)?;
    // Only now does it hold what comes.
    interface_index(name)
        .and_then(|index| Netlink::open()?.wait_running(index, RUNNING_LIMIT))
        .map_err(io::Error::other)?;
    Ok(Tap { name: name.to_owned(), fd: file.into() })
}

/// Opens (and makes, if need be) the tap of that name, which stays when it is closed, for a reader
/// that takes whatever the kernel has put together.
pub(crate) fn open_persistent(name: &str) -> io::Result<Tap> {
    let file = open_clone_device()?;
    let name = sys::attach(file.as_fd(), name, FLAGS)?;
    sys::set_persistent(file.as_fd(), true)?;
    sys::set_vnet_header_size(file.as_fd(), 10)?;
    let tcp = sys::TUN_F_CSUM | sys::TUN_F_TSO4 | sys::TUN_F_TSO6 | sys::TUN_F_TSO_ECN;
    sys::set_offload(file.as_fd(), tcp | sys::TUN_F_USO)
        .or_else(|_| sys::set_offload(file.as_fd(), tcp))?;
    Ok(Tap { name, fd: file.into() })
}

/// The interface goes when the last descriptor of it closes.
pub(crate) fn let_go(tap: BorrowedFd<'_>) -> io::Result<()> {
    sys::set_persistent(tap, false)
}

/// A tap that leads nowhere and goes when it is closed.
pub(crate) fn open_isolated() -> io::Result<Tap> {
    open_temporary("")
}

/// Opens a tap of that name with the same layout as a machine's, which goes when it is closed: for
/// monitors in tests, whose guest is a network namespace.
pub fn open_temporary(name: &str) -> io::Result<Tap> {
    let file = open_clone_device()?;
    let name = sys::attach(file.as_fd(), name, FLAGS)?;
    Ok(Tap { name, fd: file.into() })
}

/// Opens a tunnel interface (IP packets, no Ethernet) that goes when it is closed; each packet has
/// a `virtio_net_hdr` of 10 bytes before it. With `large` the kernel hands over TCP segments of up
/// to 64 KiB whole and checksums unfinished.
pub fn open_tunnel(name: &str, large: bool) -> io::Result<Tap> {
    let file = open_clone_device()?;
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let name = sys::attach(file.as_fd(), name, flags)?;
    sys::set_offload(file.as_fd(), if large { sys::TUN_F_CSUM | sys::TUN_F_TSO4 } else { 0 })?;
    Ok(Tap { name, fd: file.into() })
}

/// Says that the reader of this tap takes large TCP frames and unfinished checksums, as a monitor
/// does whose guest takes them; for monitors other than QEMU (which does it itself).
pub fn offer_offload(tap: BorrowedFd<'_>) -> io::Result<()> {
    sys::set_offload(tap, sys::TUN_F_CSUM | sys::TUN_F_TSO4)
}

/// Bytes before each frame that is read from or written to this tap.
pub fn header_size(tap: BorrowedFd<'_>) -> io::Result<usize> {
    sys::vnet_header_size(tap)
}

/// Puts a frame that no machine takes into a tap's queue. Called at a destination before its
/// monitor starts: QEMU takes one frame out of the queue although its guest cannot receive yet,
/// keeps it, and reads no further until the guest runs. Loading the guest's state then changes
/// the length of the header before each frame (10 to 12 bytes), so that the frame which was taken
/// before is misread and lost: let it be this one, and not the client's.
pub fn give_decoy(tap: &Tap) -> io::Result<()> {
    let index = interface_index(&tap.name).map_err(io::Error::other)?;
    sys::send_frame(index, &decoy())
}

/// For nobody, from nobody, of no protocol; and so also when read two bytes too late.
fn decoy() -> [u8; 60] {
    const LOCAL_EXPERIMENT: [u8; 2] = [0x88, 0xb5];
    let mut frame = [0; 60];
    frame[..12].fill(0x02);
    frame[12..14].copy_from_slice(&LOCAL_EXPERIMENT);
    frame
}

/// What [`drain`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Frames sent on.
    pub forwarded: u64,
    /// Frames that are not the machine's traffic (ARP and the like), or that the kernel refused.
    pub dropped: u64,
}

/// Takes the frames that wait in a tap's queue and gives them back to the kernel as if they had
/// come from the tap, addressed to the gateway: it routes them again, and by now the machine's
/// route leads elsewhere. Offload headers are kept, so a large segment stays one frame.
///
/// The machine must be paused and its route changed before, else the frames come back here. Needs
/// no more privileges than the descriptor itself.
pub fn drain(tap: &Tap) -> io::Result<Drained> {
    let header = header_size(tap.fd.as_fd())?;
    let mut file = File::from(tap.fd.try_clone()?);
    let mut frame = vec![0; FRAME_BYTES];
    let deadline = Instant::now() + DRAIN_LIMIT;
    let mut drained = Drained::default();
    // Twice the queue: an honest queue ends long before, a loop (route not changed) ends here.
    for _ in 0..2 * QUEUE {
        let size = match file.read(&mut frame) {
            Ok(size) => size,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(drained),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        if !readdress(&mut frame[..size], header) {
            drained.dropped += 1;
            continue;
        }
        match file.write(&frame[..size]) {
            Ok(_) => drained.forwarded += 1,
            Err(e) => {
                tracing::warn!(tap = tap.name, error = %e, bytes = size, "frame refused in drain");
                drained.dropped += 1;
            }
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        format!(
            "the queue of {} did not end after {} frames: its route still leads here",
            tap.name, drained.forwarded
        ),
    ))
}

/// Addresses a frame (after `header` bytes) to the gateway; false if it is not the machine's traffic:
/// neither IPv4 nor IPv6, or IPv6 that is the link's own (neighbours ask each other).
fn readdress(frame: &mut [u8], header: usize) -> bool {
    const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
    const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
    let Some(ethernet) = frame.get_mut(header..) else { return false };
    let Some((link, packet)) = ethernet.split_at_checked(14) else { return false };
    let ours = match [link[12], link[13]] {
        ETHERTYPE_IPV4 => true,
        ETHERTYPE_IPV6 => packet.get(24..26).is_some_and(|to| {
            let link_local = to[0] == 0xfe && to[1] & 0xc0 == 0x80;
            !link_local && to[0] != 0xff
        }),
        _ => false,
    };
    if !ours {
        return false;
    }
    ethernet[..6].copy_from_slice(&GATEWAY_MAC);
    true
}

#[cfg(test)]
mod tests {
    use super::{key as tap_key, *};

    #[test]
    fn tap_names_fit_the_kernel_and_differ_by_address() {
        let a = name(Ipv4Addr::new(10, 77, 0, 5));
        assert_eq!(a, "dr-0a4d0005");
        assert!(a.len() < libc::IFNAMSIZ);
        assert_ne!(a, name(Ipv4Addr::new(10, 77, 0, 6)));
        for key in [
            "10.77.0.5".parse::<Ipv4Addr>().unwrap().into(),
            MachineKey { network: NetworkId(7), address: Ipv4Addr::new(203, 0, 113, 255) },
        ] {
            assert_eq!(tap_key(&name(key)), Some(key));
        }
        for other in ["eth0", "dr-", "dr-0a4d000g", "dr-0a4d00055", "cd-hold"] {
            assert_eq!(tap_key(other), None, "{other}");
        }
    }

    #[test]
    fn a_decoy_is_for_nobody_however_it_is_read_and_is_not_drained_to_anybody() {
        let frame = decoy();
        assert_eq!((&frame[..6], &frame[2..8]), (&[2; 6][..], &[2; 6][..]));
        assert_eq!(frame[0] & 1, 0, "not for all");
        let mut waiting = [&[0; 10][..], &frame].concat();
        assert!(!readdress(&mut waiting, 10));
    }

    #[test]
    fn only_whole_frames_of_the_machines_traffic_are_readdressed() {
        let mut frame = vec![0_u8; 12 + 14 + 20];
        frame[12..18].copy_from_slice(&[2, 0, 0, 0, 0, 5]);
        frame[24..26].copy_from_slice(&[0x08, 0x00]);
        assert!(readdress(&mut frame, 12));
        assert_eq!(frame[12..18], GATEWAY_MAC);
        frame[24..26].copy_from_slice(&[0x08, 0x06]);
        assert!(!readdress(&mut frame, 12), "ARP is not for another host");
        let mut v6 = vec![0_u8; 12 + 14 + 40];
        v6[24..26].copy_from_slice(&[0x86, 0xdd]);
        for (to, expected) in [([0xfd, 0x77], true), ([0xfe, 0x80], false), ([0xff, 0x02], false)] {
            v6[12 + 14 + 24..][..2].copy_from_slice(&to);
            assert_eq!(readdress(&mut v6, 12), expected, "IPv6 to {to:02x?}");
        }
        assert!(!readdress(&mut v6[..12 + 14 + 20], 12), "IPv6 cut short");
        assert!(!readdress(&mut frame[..20], 12), "cut short");
        assert!(!readdress(&mut [], 12));
    }
}
