//! For whoever looks on: `conduit map`, `flows` and `trace`. Opens what is pinned, whether its owner
//! runs or not, and changes nothing that leads a frame.
//!
//! Frames are counted by flow, or told one by one, only while somebody looks on (`bpf/watch.h`). Who
//! does holds a lock that ends with its process, and says every second for how long it will: so one
//! that was killed costs frames nothing after [`HEARD`]. The locks are of folders among the pins:
//!
//! | folder | held |
//! |---|---|
//! | `programs` | shared, by each who counts flows: the last one empties the map |
//! | `links` | by the one who traces |
//! | the maps' | for the moment of a change of what is watched |

use crate::{
    Event,
    abi::{
        Config, Entry, Key, LAYOUT, RawConfig, RawEntry, RawFlow, RawFlowKey, RawKey, RawWatch,
        Role, SEEN, mapped, state_name, unmapped,
    },
    error::{Error, whole},
    pins,
};
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use nix::{
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    time::{ClockId, clock_gettime},
};
use std::{
    fs::File,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

/// For how long one word of somebody who looks on counts.
const HEARD: Duration = Duration::from_secs(3);

/// What is pinned for a network namespace.
#[derive(Clone, Debug)]
pub struct View {
    folder: PathBuf,
}

/// Where a frame was when its way was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum At {
    /// Out of a machine's tap.
    Tap,
    /// Out of the tunnel.
    Tunnel,
    /// Out of this host's own stack, into the tunnel.
    Stack,
    /// Out of the hold tap.
    Hold,
}

impl At {
    fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            1 => Some(Self::Tap),
            2 => Some(Self::Tunnel),
            3 => Some(Self::Stack),
            4 => Some(Self::Hold),
            _ => None,
        }
    }

    /// A word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tap => "tap",
            Self::Tunnel => "tunnel",
            Self::Stack => "stack",
            Self::Hold => "hold",
        }
    }

    /// The program that decides there.
    #[must_use]
    pub fn program(self) -> &'static str {
        match self {
            Self::Tap => "cd_tap",
            Self::Tunnel => "cd_decap",
            Self::Stack => "cd_stack",
            Self::Hold => "cd_replay",
        }
    }
}

/// Frames of one flow in one direction, since somebody began to look on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The tenant's network.
    pub net: u32,
    /// Who sent them. The port is an echo's identifier for ICMP, and 0 where there is none.
    pub from: SocketAddr,
    /// To whom.
    pub to: SocketAddr,
    /// IP protocol.
    pub protocol: u8,
    /// Where they were counted.
    pub at: At,
    /// Packets, of large segments each piece.
    pub packets: u64,
    /// Bytes with Ethernet headers.
    pub bytes: u64,
    /// Frames that ended here; not in the others.
    pub dropped: u64,
}

/// Which frames a trace tells of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// To or from this address.
    pub address: Option<IpAddr>,
    /// Of this network.
    pub net: Option<u32>,
    /// To or from this port.
    pub port: Option<u16>,
    /// Of this IP protocol.
    pub protocol: Option<u8>,
    /// Only those that end here.
    pub drops: bool,
}

/// A frame, and what was decided about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// `CLOCK_MONOTONIC`.
    pub at: Duration,
    /// Where it was.
    pub place: At,
    /// The interface there.
    pub interface: u32,
    /// What was decided; `None` from a newer program.
    pub event: Option<Event>,
    /// The tenant's network.
    pub net: u32,
    /// Who sent it; unspecified if it is not IP.
    pub from: SocketAddr,
    /// To whom.
    pub to: SocketAddr,
    /// IP protocol.
    pub protocol: u8,
    /// The flags of TCP.
    pub tcp_flags: u8,
    /// Bytes with the Ethernet header.
    pub len: u32,
    /// Pieces that it is cut into on the wire; 0 for one that is not cut.
    pub segments: u16,
    /// Of what no hop changes: the same frame has the same at every host. Pieces of a large segment
    /// have their own, and the first of them the segment's.
    pub hash: u32,
    /// The entry that decided: its state, its epoch, its owner.
    pub entry: Option<(&'static str, u64, IpAddr)>,
}

fn failed(what: &'static str) -> impl Fn(MapError) -> Error {
    move |e| Error::map(what, whole(&e))
}

impl View {
    /// Of the calling thread's network namespace.
    pub fn open(root: &Path) -> Result<Self, Error> {
        Self::of(pins::folder(root)?)
    }

    pub(crate) fn of(folder: PathBuf) -> Result<Self, Error> {
        if folder.join(format!("v{LAYOUT}")).join("watch").exists() {
            Ok(Self { folder })
        } else {
            Err(Error::Absent { path: folder })
        }
    }

    fn pin(&self, map: &str) -> Result<MapData, Error> {
        let path = self.maps().join(map);
        MapData::from_pin(&path)
            .map_err(|e| Error::map(format!("open {}", path.display()), whole(&e)))
    }

    fn maps(&self) -> PathBuf {
        self.folder.join(format!("v{LAYOUT}"))
    }

    /// All entries, by address.
    pub fn entries(&self) -> Result<Vec<(Key, Entry)>, Error> {
        let fail = failed("list the entries");
        let map = Map::HashMap(self.pin("forward")?);
        let map = HashMap::<_, RawKey, RawEntry>::try_from(map).map_err(&fail)?;
        let mut found = Vec::new();
        for pair in &map {
            let (key, raw) = pair.map_err(&fail)?;
            found.extend(Entry::from_raw(&raw).map(|entry| (Key::from(key), entry)));
        }
        found.sort_unstable_by_key(|(key, _)| *key);
        Ok(found)
    }

    /// What this host is; `None` before anybody has said so.
    pub fn config(&self) -> Result<Option<Config>, Error> {
        let fail = failed("read what this host is");
        let map = Map::Array(self.pin("config")?);
        let map = Array::<_, RawConfig>::try_from(map).map_err(&fail)?;
        Ok(Config::from_raw(&map.get(&0, 0).map_err(&fail)?))
    }

    /// Who may send through the tunnel.
    pub fn peers(&self) -> Result<Vec<(IpAddr, Role)>, Error> {
        let fail = failed("list the hosts that are let in");
        let map = Map::HashMap(self.pin("peers")?);
        let map = HashMap::<_, [u8; 16], u32>::try_from(map).map_err(&fail)?;
        let mut found = Vec::new();
        for pair in &map {
            let (address, role) = pair.map_err(&fail)?;
            found.extend(Role::from_raw(role).map(|role| (unmapped(address), role)));
        }
        found.sort_unstable();
        Ok(found)
    }

    /// What was counted since the layout was made, over all processors.
    pub fn counts(&self) -> Result<Vec<(Event, u64)>, Error> {
        let fail = failed("read the counters");
        let map = Map::PerCpuArray(self.pin("counts")?);
        let map = PerCpuArray::<_, u64>::try_from(map).map_err(&fail)?;
        let each = Event::ALL.iter().enumerate().map(|(index, &event)| {
            let values = map.get(&(index as u32), 0).map_err(&fail)?;
            Ok((event, values.iter().sum()))
        });
        each.collect()
    }

    /// Begins to count frames by flow.
    pub fn flows(&self) -> Result<Flows, Error> {
        let lock = self.lock("programs", FlockArg::LockShared)?;
        let flows = Flows { view: self.clone(), lock: Some(lock) };
        flows.renew()?;
        Ok(flows)
    }

    /// Begins to have frames told one by one. Only one at a time can.
    pub fn trace(&self, filter: Filter) -> Result<Trace, Error> {
        let fail = failed("open the trace");
        let Some(lock) = self.try_lock("links")? else {
            return Err(Error::Traced { path: self.folder.clone() });
        };
        let ring = RingBuf::try_from(Map::RingBuf(self.pin("trace")?)).map_err(&fail)?;
        let mut trace = Trace { view: self.clone(), ring, filter, renewed: now(), _lock: lock };
        // What somebody else left.
        while trace.ring.next().is_some() {}
        trace.renew()?;
        Ok(trace)
    }

    /// Ends what somebody began who is gone, so that frames no longer look at the clock. Cheap where
    /// there is nothing to do; the owner of the data path calls it every second.
    pub fn expire(&self) -> Result<(), Error> {
        let watch = self.watched()?;
        let at = nanoseconds(now());
        let over = |until: u64| until != 0 && until < at;
        if over(watch.flows_until) {
            self.forget_flows()?;
        }
        if over(watch.trace_until) {
            self.change_watch(|watch| {
                if watch.trace_until < at {
                    watch.trace_until = 0;
                }
            })?;
        }
        Ok(())
    }

    /// If nobody counts flows any more, ends it.
    fn forget_flows(&self) -> Result<(), Error> {
        let Some(_nobody_else) = self.try_lock("programs")? else { return Ok(()) };
        self.change_watch(|watch| watch.flows_until = 0)?;
        let fail = failed("empty the flows");
        let mut map = self.flow_map()?;
        let keys: Vec<RawFlowKey> = map.keys().filter_map(Result::ok).collect();
        for key in keys {
            match map.remove(&key) {
                Err(MapError::SyscallError(e)) if e.io_error.kind() != io::ErrorKind::NotFound => {
                    return Err(fail(MapError::SyscallError(e)));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn flow_map(&self) -> Result<HashMap<MapData, RawFlowKey, RawFlow>, Error> {
        HashMap::try_from(Map::HashMap(self.pin("flows")?)).map_err(failed("open the flows"))
    }

    fn watch_map(&self) -> Result<Array<MapData, RawWatch>, Error> {
        Array::try_from(Map::Array(self.pin("watch")?)).map_err(failed("open what is watched"))
    }

    fn watched(&self) -> Result<RawWatch, Error> {
        self.watch_map()?.get(&0, 0).map_err(failed("read what is watched"))
    }

    fn change_watch(&self, change: impl FnOnce(&mut RawWatch)) -> Result<(), Error> {
        let _one_at_a_time = self.lock(&format!("v{LAYOUT}"), FlockArg::LockExclusive)?;
        let mut map = self.watch_map()?;
        let fail = failed("say what is watched");
        let mut watch = map.get(&0, 0).map_err(&fail)?;
        change(&mut watch);
        map.set(0, watch, 0).map_err(&fail)
    }

    /// Waits for a lock that is never held for long.
    fn lock(&self, name: &str, how: FlockArg) -> Result<Flock<File>, Error> {
        let path = self.folder.join(name);
        let fail = |source| Error::Pins { path: path.clone(), source };
        let file = File::open(&path).map_err(fail)?;
        Flock::lock(file, how).map_err(|(_, e)| fail(e.into()))
    }

    fn try_lock(&self, name: &str) -> Result<Option<Flock<File>>, Error> {
        match self.lock(name, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(lock)),
            Err(Error::Pins { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Frames are counted by flow while this lives, and [`Flows::renew`] is called every second.
pub struct Flows {
    view: View,
    lock: Option<Flock<File>>,
}

impl Flows {
    /// Goes on for a while.
    pub fn renew(&self) -> Result<(), Error> {
        let until = nanoseconds(now() + HEARD);
        self.view.change_watch(|watch| watch.flows_until = watch.flows_until.max(until))
    }

    /// What was counted so far.
    pub fn read(&self) -> Result<Vec<Flow>, Error> {
        let mut found = Vec::new();
        for pair in &self.view.flow_map()? {
            let (key, count) = pair.map_err(failed("list the flows"))?;
            found.extend(flow(&key, &count));
        }
        Ok(found)
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        drop(self.lock.take());
        // The owner of the data path does so too, a second later.
        if let Err(error) = self.view.forget_flows() {
            tracing::debug!(%error, "the flows are left to the agent");
        }
    }
}

fn flow(key: &RawFlowKey, count: &RawFlow) -> Option<Flow> {
    Some(Flow {
        net: key.net,
        from: SocketAddr::new(unmapped(key.src), u16::from_be_bytes(key.sport)),
        to: SocketAddr::new(unmapped(key.dst), u16::from_be_bytes(key.dport)),
        protocol: key.proto,
        at: At::from_raw(key.program)?,
        packets: count.packets,
        bytes: count.bytes,
        dropped: count.dropped,
    })
}

/// Frames that are told one by one while this lives.
pub struct Trace {
    view: View,
    ring: RingBuf<MapData>,
    filter: Filter,
    renewed: Duration,
    _lock: Flock<File>,
}

impl Trace {
    fn renew(&mut self) -> Result<(), Error> {
        self.renewed = now();
        let until = nanoseconds(self.renewed + HEARD);
        let filter = self.filter;
        self.view.change_watch(|watch| {
            watch.addr = filter.address.map_or([0; 16], mapped);
            watch.net = filter.net.unwrap_or(0);
            watch.port = filter.port.unwrap_or(0).to_be_bytes();
            watch.proto = filter.protocol.unwrap_or(0);
            watch.drops = u8::from(filter.drops);
            watch.trace_until = until;
        })
    }

    /// The time by the clock of [`Seen::at`].
    #[must_use]
    pub fn now(&self) -> Duration {
        now()
    }

    /// The next frame; `None` if none came for `limit`. To be called at least every second.
    pub fn next(&mut self, limit: Duration) -> Result<Option<Seen>, Error> {
        let deadline = now() + limit;
        loop {
            if now().saturating_sub(self.renewed) > HEARD / 3 {
                self.renew()?;
            }
            if let Some(item) = self.ring.next() {
                return Ok(seen(&item));
            }
            let left = deadline.saturating_sub(now());
            if left.is_zero() {
                return Ok(None);
            }
            let wait = left.min(HEARD / 3).max(Duration::from_millis(1));
            let wait = PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO);
            let mut fds = [PollFd::new(self.ring.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, wait) {
                Ok(_) => {}
                // A signal: whoever asked may want to end.
                Err(nix::errno::Errno::EINTR) => return Ok(None),
                Err(e) => return Err(Error::map("wait for frames", e)),
            }
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if let Err(error) = self.view.change_watch(|watch| watch.trace_until = 0) {
            tracing::debug!(%error, "the trace ends by itself in a moment");
        }
    }
}

/// `struct cd_seen`.
fn seen(bytes: &[u8]) -> Option<Seen> {
    let bytes: &[u8; SEEN] = bytes.first_chunk()?;
    let u64_at = |at: usize| u64::from_ne_bytes(std::array::from_fn(|n| bytes[at + n]));
    let u32_at = |at: usize| u32::from_ne_bytes(std::array::from_fn(|n| bytes[at + n]));
    let address = |at: usize| unmapped(std::array::from_fn(|n| bytes[at + n]));
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    Some(Seen {
        at: Duration::from_nanos(u64_at(0)),
        place: At::from_raw(bytes[88])?,
        interface: u32_at(72),
        event: Event::ALL.get(usize::from(bytes[89])).copied(),
        net: u32_at(64),
        from: SocketAddr::new(address(16), port(80)),
        to: SocketAddr::new(address(32), port(82)),
        protocol: bytes[86],
        tcp_flags: bytes[87],
        len: u32_at(76),
        segments: u16::from_ne_bytes([bytes[84], bytes[85]]),
        hash: u32_at(68),
        entry: state_name(bytes[90]).map(|state| (state, u64_at(8), address(48))),
    })
}

fn now() -> Duration {
    // It cannot fail: the clock is there, and the place to write it too.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default()
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_read_as_the_program_wrote_it() {
        let mut bytes = [0; SEEN];
        bytes[..8].copy_from_slice(&1_500_000_000_u64.to_ne_bytes());
        bytes[8..16].copy_from_slice(&(7_u64 << 16).to_ne_bytes());
        bytes[16..32].copy_from_slice(&mapped(IpAddr::from([10, 77, 0, 5])));
        bytes[32..48].copy_from_slice(&mapped("fd00::1".parse().unwrap()));
        bytes[48..64].copy_from_slice(&mapped(IpAddr::from([10, 88, 0, 2])));
        bytes[64..68].copy_from_slice(&6472_u32.to_ne_bytes());
        bytes[68..72].copy_from_slice(&0xdead_beef_u32.to_ne_bytes());
        bytes[72..76].copy_from_slice(&9_u32.to_ne_bytes());
        bytes[76..80].copy_from_slice(&1414_u32.to_ne_bytes());
        bytes[80..82].copy_from_slice(&443_u16.to_be_bytes());
        bytes[82..84].copy_from_slice(&40_000_u16.to_be_bytes());
        bytes[84..86].copy_from_slice(&2_u16.to_ne_bytes());
        bytes[86..91].copy_from_slice(&[6, 0x12, 2, Event::Forwarded as u8, 1]);
        let frame = seen(&bytes).unwrap();
        assert_eq!(frame.at, Duration::from_millis(1500));
        assert_eq!((frame.place, frame.event), (At::Tunnel, Some(Event::Forwarded)));
        assert_eq!(
            (frame.from, frame.to),
            ("10.77.0.5:443".parse().unwrap(), "[fd00::1]:40000".parse().unwrap())
        );
        assert_eq!((frame.protocol, frame.tcp_flags, frame.segments), (6, 0x12, 2));
        assert_eq!(
            (frame.net, frame.hash, frame.interface, frame.len),
            (6472, 0xdead_beef, 9, 1414)
        );
        assert_eq!(frame.entry, Some(("remote", 7 << 16, IpAddr::from([10, 88, 0, 2]))));
        assert_eq!(seen(&bytes[..95]), None, "cut short");
        bytes[89] = 255;
        assert_eq!(seen(&bytes).unwrap().event, None, "an event of a newer program");
    }

    #[test]
    fn a_flow_is_read_with_its_ports_the_right_way_round() {
        let key = RawFlowKey {
            net: 1,
            src: mapped(IpAddr::from([10, 0, 0, 1])),
            dst: mapped(IpAddr::from([10, 0, 0, 2])),
            sport: [0x01, 0xbb],
            dport: [0, 9],
            proto: 17,
            program: 1,
            pad: [0; 2],
        };
        let found = flow(&key, &RawFlow { packets: 3, bytes: 4, dropped: 5 }).unwrap();
        assert_eq!((found.from.port(), found.to.port(), found.at), (443, 9, At::Tap));
        assert_eq!((found.packets, found.bytes, found.dropped), (3, 4, 5));
        assert!(flow(&RawFlowKey { program: 99, ..key }, &RawFlow::default()).is_none());
    }
}
