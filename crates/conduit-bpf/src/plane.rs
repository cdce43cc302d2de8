//! The owner of the data path: loads the programs, takes up what an earlier owner left, attaches,
//! and changes entries.
//!
//! Interfaces are looked up in the calling thread's network namespace: use a [`DataPlane`] on
//! threads of the namespace it was opened in.

use crate::{
    Event,
    abi::{
        CHANGE_AT, Config, DRAIN, Entry, Front, Key, LAYOUT, Port, RawChange, RawConfig, RawEntry,
        RawFront, RawKey, RawPort, Role, mapped, unmapped,
    },
    error::{Error, whole},
    layout,
    pins::Pins,
    sys,
    view::View,
};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray},
    programs::{
        LinkOrder, SchedClassifier, TcAttachType, TestRun, TestRunOptions,
        links::{FdLink, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
    },
};
use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd, AsRawFd},
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/conduit.bpf.o"));

/// Our place among clsact filters of an interface: replaced by the next owner, not added to.
const PRIORITY: u16 = 64;
const HANDLE: TcHandle = TcHandle::new(0, 64);

/// How programs are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attach {
    /// By tcx links where the kernel has them (6.6), else by clsact.
    #[default]
    Auto,
    /// By tcx links.
    Tcx,
    /// By filters of the clsact queueing discipline.
    Clsact,
}

/// A program that is attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Ingress of a machine's tap.
    Tap,
    /// Ingress of the tunnel device.
    Decap,
    /// Egress of the tunnel device.
    Stack,
    /// Ingress of the hold tap.
    Replay,
}

impl Program {
    const ALL: [Self; 4] = [Self::Tap, Self::Decap, Self::Stack, Self::Replay];

    fn name(self) -> &'static str {
        match self {
            Self::Tap => "cd_tap",
            Self::Decap => "cd_decap",
            Self::Stack => "cd_stack",
            Self::Replay => "cd_replay",
        }
    }

    fn hook(self) -> TcAttachType {
        match self {
            Self::Tap | Self::Decap | Self::Replay => TcAttachType::Ingress,
            Self::Stack => TcAttachType::Egress,
        }
    }
}

/// What a change did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// The entry is as asked now.
    Changed,
    /// It was so already.
    Same,
}

struct Maps {
    forward: HashMap<MapData, RawKey, RawEntry>,
    ports: HashMap<MapData, u32, RawPort>,
    peers: HashMap<MapData, [u8; 16], u32>,
    config: Array<MapData, RawConfig>,
    counts: PerCpuArray<MapData, u64>,
    homes: HashMap<MapData, RawKey, u32>,
    fronts: HashMap<MapData, u32, RawFront>,
}

/// See the module.
pub struct DataPlane {
    pins: Pins,
    attach: Attach,
    programs: Mutex<Ebpf>,
    change: SchedClassifier,
    maps: Mutex<Maps>,
}

impl DataPlane {
    /// Loads the programs and takes up what is pinned below `root` for this network namespace:
    /// maps (of an older layout too) and links, which run the new programs when this returns.
    pub fn open(root: &Path, attach: Attach) -> Result<Self, Error> {
        let pins = Pins::open(root)?;
        let older = layout::older(&pins)?;
        let folder = pins.maps(LAYOUT);
        pins.make(&folder)?;
        let refused = |operation: &str, detail: &dyn std::fmt::Display| Error::Refused {
            operation: operation.into(),
            detail: end_of(&detail.to_string()).to_owned(),
        };
        let mut programs = EbpfLoader::new()
            .btf(None)
            .default_map_pin_directory(&folder)
            .load(OBJECT)
            .map_err(|e| refused("make the maps", &whole(&e)))?;
        let mut maps = Maps::of(&mut programs)?;
        for &from in &older {
            let Maps { forward, ports, peers, config, .. } = &mut maps;
            let old = pins.maps(from);
            let carried = layout::carry(from, &old, forward, ports, peers, config)?;
            tracing::info!(from, to = LAYOUT, carried, "entries carried over to a new layout");
        }
        let names: Vec<String> = programs.programs().map(|(name, _)| name.to_owned()).collect();
        for name in &names {
            let program = classifier(&mut programs, name)?;
            program.load().map_err(|e| refused(&format!("load {name}"), &whole(&e)))?;
            let pin = pins.program(name);
            pins.remove(&pin)?;
            program.pin(&pin).map_err(|e| refused(&format!("pin {name}"), &whole(&e)))?;
        }
        let change = SchedClassifier::from_pin(pins.program("cd_change"))
            .map_err(|e| refused("open cd_change", &whole(&e)))?;
        let this =
            Self { pins, attach, programs: Mutex::new(programs), change, maps: Mutex::new(maps) };
        this.take_up()?;
        for from in older {
            this.pins.remove(&this.pins.maps(from))?;
        }
        Ok(this)
    }

    /// Everything that is attached runs our programs from here on.
    fn take_up(&self) -> Result<(), Error> {
        for (interface, name) in self.pins.links()? {
            match Program::ALL.into_iter().find(|p| p.name() == name) {
                Some(program) if name_of(interface).is_some() => self.attach(interface, program)?,
                // The interface is gone, or no program of that name exists any more.
                _ => self.pins.remove(&self.pins.link(interface, &name))?,
            }
        }
        Ok(())
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the pins are.
    #[must_use]
    pub fn pins(&self) -> &Path {
        self.pins.path()
    }

    /// For looking on.
    pub fn view(&self) -> Result<View, Error> {
        View::of(self.pins.path().to_owned())
    }

    /// Attaches a program to an interface, or replaces ours there by this one, in one step.
    pub fn attach(&self, interface: u32, program: Program) -> Result<(), Error> {
        let fail = |operation: &'static str, detail: String| Error::Interface {
            operation,
            interface,
            detail: format!("{detail} ({})", program.name()),
        };
        let mut programs = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        let classifier = classifier(&mut programs, program.name())?;
        let pin = self.pins.link(interface, program.name());
        if self.attach != Attach::Clsact && pin.exists() {
            let link = PinnedLink::from_pin(&pin)
                .and_then(|link| SchedClassifierLink::try_from(FdLink::from(link)))
                .map_err(|e| fail("take up the link of", whole(&e)))?;
            match classifier.attach_to_link(link) {
                Ok(id) => {
                    // The pin keeps it: our descriptor is not needed, and would keep it too.
                    drop(classifier.take_link(id));
                    return Ok(());
                }
                Err(error) => {
                    tracing::warn!(interface, error = whole(&error), "a pinned link is dead");
                    self.pins.remove(&pin)?;
                }
            }
        }
        let Some(name) = name_of(interface) else {
            return Err(fail("attach to", "it does not exist".into()));
        };
        if self.attach != Attach::Clsact {
            let order = TcAttachOptions::TcxOrder(LinkOrder::default());
            match classifier.attach_with_options(&name, program.hook(), order) {
                Ok(id) => {
                    let link = classifier.take_link(id).map_err(|e| fail("keep", whole(&e)))?;
                    let link =
                        FdLink::try_from(link).map_err(|e| fail("keep the link of", whole(&e)))?;
                    link.pin(&pin).map_err(|e| fail("pin the link of", whole(&e)))?;
                    return Ok(());
                }
                Err(error) if self.attach == Attach::Tcx => {
                    return Err(fail("attach by tcx to", whole(&error)));
                }
                Err(error) => {
                    tracing::info!(interface, error = whole(&error), "no tcx here, using clsact");
                }
            }
        }
        match tc::qdisc_add_clsact(&name) {
            Ok(()) | Err(tc::TcError::AlreadyAttached) => {}
            Err(error) if whole(&error).contains("exists") => {}
            Err(error) => return Err(fail("add clsact to", whole(&error))),
        }
        let old = SchedClassifierLink::attached(&name, program.hook(), PRIORITY, HANDLE, None)
            .map_err(|e| fail("attach to", e.to_string()))?;
        let id = match classifier.attach_to_link(old) {
            Ok(id) => id,
            Err(_) => {
                let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
                classifier
                    .attach_with_options(&name, program.hook(), TcAttachOptions::Netlink(options))
                    .map_err(|e| fail("attach by clsact to", whole(&e)))?
            }
        };
        // It stays when we end: a link of this kind must not be dropped.
        let link = classifier.take_link(id).map_err(|e| fail("keep", whole(&e)))?;
        std::mem::forget(link);
        Ok(())
    }

    /// Detaches our programs from an interface, if they are attached.
    pub fn detach(&self, interface: u32) -> Result<(), Error> {
        for program in Program::ALL {
            let pin = self.pins.link(interface, program.name());
            if pin.exists() {
                self.pins.remove(&pin)?;
            } else if let Some(name) = name_of(interface)
                && self.attach != Attach::Tcx
                && let Ok(link) =
                    SchedClassifierLink::attached(&name, program.hook(), PRIORITY, HANDLE, None)
            {
                // There may be none.
                drop(link);
            }
        }
        Ok(())
    }

    /// Tells the programs what this host is.
    pub fn configure(&self, config: &Config) -> Result<(), Error> {
        self.maps()
            .config
            .set(0, RawConfig::from(*config), 0)
            .map_err(|e| Error::map("set what this host is", whole(&e)))
    }

    /// What the programs were told of this host; `None` before anybody has.
    pub fn config(&self) -> Result<Option<Config>, Error> {
        let raw = self.maps().config.get(&0, 0);
        let raw = raw.map_err(|e| Error::map("read what this host is", whole(&e)))?;
        Ok(Config::from_raw(&raw))
    }

    /// Says which machine is behind a tap.
    pub fn set_port(&self, tap: u32, port: &Port) -> Result<(), Error> {
        self.maps()
            .ports
            .insert(tap, RawPort::from(*port), 0)
            .map_err(|e| Error::map(format!("say whose tap #{tap} is"), whole(&e)))
    }

    /// No machine is behind this tap any more.
    pub fn remove_port(&self, tap: u32) -> Result<(), Error> {
        gone(self.maps().ports.remove(&tap))
            .map_err(|e| Error::map(format!("forget tap #{tap}"), whole(&e)))
    }

    /// Lets a host send through the tunnel.
    pub fn set_peer(&self, underlay: IpAddr, role: Role) -> Result<(), Error> {
        self.maps()
            .peers
            .insert(mapped(underlay), role.raw(), 0)
            .map_err(|e| Error::map(format!("let {underlay} in"), whole(&e)))
    }

    /// Does so no more.
    pub fn remove_peer(&self, underlay: IpAddr) -> Result<(), Error> {
        gone(self.maps().peers.remove(&mapped(underlay)))
            .map_err(|e| Error::map(format!("shut {underlay} out"), whole(&e)))
    }

    /// The hosts that may send through the tunnel.
    pub fn peers(&self) -> Result<Vec<IpAddr>, Error> {
        let maps = self.maps();
        let keys: Result<Vec<_>, _> = maps.peers.keys().collect();
        let keys = keys.map_err(|e| Error::map("list the hosts that are let in", whole(&e)))?;
        Ok(keys.into_iter().map(unmapped).collect())
    }

    /// Makes an address's entry what is asked: refused if its epoch is newer, or the same and
    /// another host's. Decided in the kernel, whole for every frame.
    pub fn change(&self, key: Key, entry: &Entry) -> Result<Changed, Error> {
        let fail = |detail: String| Error::map(format!("change the entry of {key}"), detail);
        let answer = run_change(&self.change, &entry.change(key)).map_err(fail)?;
        // enum cd_verdict
        match answer.verdict {
            1 => Ok(Changed::Changed),
            2 => Ok(Changed::Same),
            3 => Err(Error::Stale { key, asked: entry.epoch, current: answer.epoch }),
            4 => Err(Error::Taken { key, epoch: entry.epoch, owner: unmapped(answer.owner) }),
            5 => Err(fail("the map is full, or the kernel has no memory for it".into())),
            other => Err(fail(format!("an unknown verdict {other}"))),
        }
    }

    /// An address's entry.
    pub fn entry(&self, key: Key) -> Result<Option<Entry>, Error> {
        match self.maps().forward.get(&key.into(), 0) {
            Ok(raw) => Ok(Entry::from_raw(&raw)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(e) => Err(Error::map(format!("read the entry of {key}"), whole(&e))),
        }
    }

    /// Whether an address has an owner, and frames that were held for it are still being given back.
    pub fn is_draining(&self, key: Key) -> Result<bool, Error> {
        match self.maps().forward.get(&key.into(), 0) {
            Ok(raw) => Ok(raw.flags & DRAIN != 0),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(e) => Err(Error::map(format!("read the entry of {key}"), whole(&e))),
        }
    }

    /// All entries.
    pub fn entries(&self) -> Result<Vec<(Key, Entry)>, Error> {
        let maps = self.maps();
        let mut found = Vec::new();
        for pair in &maps.forward {
            let (key, raw) = pair.map_err(|e| Error::map("list the entries", whole(&e)))?;
            found.extend(Entry::from_raw(&raw).map(|entry| (Key::from(key), entry)));
        }
        Ok(found)
    }

    /// Forgets an address, its epoch too: whoever may not go back must remember it elsewhere.
    pub fn remove_entry(&self, key: Key) -> Result<(), Error> {
        gone(self.maps().forward.remove(&key.into()))
            .map_err(|e| Error::map(format!("remove the entry of {key}"), whole(&e)))
    }

    /// Says which home an address has.
    pub fn set_home(&self, key: Key, home: Ipv4Addr) -> Result<(), Error> {
        self.maps()
            .homes
            .insert(RawKey::from(key), home.to_bits(), 0)
            .map_err(|e| Error::map(format!("say which home {key} has"), whole(&e)))
    }

    /// Forgets it.
    pub fn remove_home(&self, key: Key) -> Result<(), Error> {
        gone(self.maps().homes.remove(&key.into()))
            .map_err(|e| Error::map(format!("forget the home of {key}"), whole(&e)))
    }

    /// Says which edge serves a home: for all its machines at once.
    pub fn set_front(&self, home: Ipv4Addr, front: &Front) -> Result<(), Error> {
        self.maps()
            .fronts
            .insert(home.to_bits(), RawFront::from(*front), 0)
            .map_err(|e| Error::map(format!("lead machines of {home} to their edge"), whole(&e)))
    }

    /// The edges that serve homes.
    pub fn fronts(&self) -> Result<Vec<(Ipv4Addr, Front)>, Error> {
        let maps = self.maps();
        let mut found = Vec::new();
        for pair in &maps.fronts {
            let (home, raw) = pair.map_err(|e| Error::map("list the edges", whole(&e)))?;
            found.push((Ipv4Addr::from_bits(home), Front::from(raw)));
        }
        Ok(found)
    }

    /// What was counted since the layout was made, over all processors.
    pub fn counts(&self) -> Result<Vec<(Event, u64)>, Error> {
        let maps = self.maps();
        let mut counts = Vec::with_capacity(Event::ALL.len());
        for (index, &event) in Event::ALL.iter().enumerate() {
            let values = maps
                .counts
                .get(&(index as u32), 0)
                .map_err(|e| Error::map("read the counters", whole(&e)))?;
            counts.push((event, values.iter().sum()));
        }
        Ok(counts)
    }

    /// One counter.
    pub fn count(&self, event: Event) -> Result<u64, Error> {
        let counts = self.counts()?;
        Ok(counts.into_iter().find_map(|(e, n)| (e == event).then_some(n)).unwrap_or(0))
    }

    /// Bytes of kernel memory that the entries take, as the kernel accounts for them.
    pub fn memory(&self) -> Result<u64, Error> {
        let fail = |e: &dyn std::fmt::Display| Error::map("ask what the entries take", e);
        let map = MapData::from_pin(self.pins.maps(LAYOUT).join("forward"))
            .map_err(|e| fail(&whole(&e)))?;
        let path = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
        let text = std::fs::read_to_string(path).map_err(|e| fail(&e))?;
        let bytes = text.lines().find_map(|l| l.strip_prefix("memlock:")?.trim().parse().ok());
        bytes.ok_or_else(|| fail(&"the kernel does not say"))
    }

    /// Removes programs, maps and links: the traffic of machines here ends. Nothing can be changed
    /// or attached afterwards.
    pub fn remove(&self) -> Result<(), Error> {
        let mut interfaces: Vec<u32> = self.pins.links()?.into_iter().map(|(at, _)| at).collect();
        {
            let maps = self.maps();
            interfaces.extend(maps.ports.keys().filter_map(Result::ok));
            interfaces.extend(maps.config.get(&0, 0).into_iter().flat_map(|c| [c.tunnel, c.hold]));
        }
        for interface in interfaces {
            self.detach(interface)?;
        }
        self.pins.remove(self.pins.path())
    }
}

/// Runs the change program. An error is the kernel's words.
pub(crate) fn run_change(change: &SchedClassifier, ask: &RawChange) -> Result<RawChange, String> {
    const SIZE: usize = CHANGE_AT + size_of::<RawChange>();
    let mut frame = [0; SIZE];
    frame[CHANGE_AT..].copy_from_slice(&sys::bytes_of(ask));
    let mut answer = [0; SIZE];
    let options = TestRunOptions {
        data_in: Some(&frame),
        data_out: Some(&mut answer),
        ..TestRunOptions::default()
    };
    change.test_run(options).map_err(|e| whole(&e))?;
    let mut bytes = [0; size_of::<RawChange>()];
    bytes.copy_from_slice(&answer[CHANGE_AT..]);
    Ok(sys::change_of(bytes))
}

impl Maps {
    fn of(programs: &mut Ebpf) -> Result<Self, Error> {
        Ok(Self {
            forward: map(programs, "forward")?,
            ports: map(programs, "ports")?,
            peers: map(programs, "peers")?,
            config: map(programs, "config")?,
            counts: map(programs, "counts")?,
            homes: map(programs, "homes")?,
            fronts: map(programs, "fronts")?,
        })
    }
}

fn map<M: TryFrom<Map, Error = MapError>>(programs: &mut Ebpf, name: &str) -> Result<M, Error> {
    let map = programs.take_map(name).ok_or_else(|| Error::map(name, "no such map"))?;
    M::try_from(map).map_err(|e| Error::map(format!("use the map {name}"), whole(&e)))
}

fn classifier<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, Error> {
    let refused = |detail: String| Error::Refused { operation: format!("use {name}"), detail };
    programs
        .program_mut(name)
        .ok_or_else(|| refused("no such program".into()))?
        .try_into()
        .map_err(|e: aya::programs::ProgramError| refused(whole(&e)))
}

fn gone(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(e)) if e.io_error.kind() == std::io::ErrorKind::NotFound => {
            Ok(())
        }
        other => other,
    }
}

/// The name of an interface of this namespace.
fn name_of(interface: u32) -> Option<String> {
    let name = nix::net::if_::if_indextoname(interface).ok()?;
    Some(name.to_string_lossy().into_owned())
}

/// The end of a long text, where a verifier says what it minds.
fn end_of(text: &str) -> &str {
    const KEPT: usize = 800;
    let mut from = text.len().saturating_sub(KEPT);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}
