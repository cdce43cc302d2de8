//! The BPF data path of a host or an edge, in the words of agents: overlay addresses, machines and
//! epochs. Called by [`crate::host`] and [`crate::edge`]; the rules of epochs are [`crate::book`]'s
//! and the ledger's, and the kernel's map holds to them once more.

use crate::{
    book,
    datapath::{MachineKey, MachineNet, NetworkId},
    exec::KernelError,
    metrics,
    recall::Known as Recalled,
    tap::GATEWAY_MAC,
    tunnel::{self, NETWORK, Tunnel},
    wire::Peer,
};
use conduit_bpf::{Config, DataPlane, Entry, Error, Front, Key, Place, Port, Program, Role};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

/// How frames find their way. All hosts of a fleet and their edge use the same one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PathChoice {
    /// By BPF where this kernel can, else by routes.
    #[default]
    Auto,
    /// By BPF programs and one tunnel device; fails where the kernel cannot.
    Bpf,
    /// By routes and a plain vxlan device: for kernels without the other.
    Routes,
}

/// Which one it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathKind {
    /// See [`PathChoice::Bpf`].
    Bpf,
    /// See [`PathChoice::Routes`].
    Routes,
}

impl std::fmt::Display for PathKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bpf => "bpf",
            Self::Routes => "routes",
        })
    }
}

/// See the module.
pub(crate) struct Plane {
    bpf: DataPlane,
    tunnel: Tunnel,
    /// The tunnel's MTU as its paths are now.
    mtu: AtomicU32,
    /// Nobody owns it any more.
    ended: AtomicBool,
    known: Mutex<Known>,
}

struct Known {
    /// Where each host of the overlay is.
    underlays: BTreeMap<Ipv4Addr, Ipv4Addr>,
    /// Entries to be removed when what was held for them has been sent on.
    lingering: BTreeSet<Key>,
    config: Config,
}

impl Plane {
    /// Opens the data path; `None` if this kernel cannot and routes will do. Must be called in the
    /// host's network namespace, and used on threads of it.
    pub(crate) fn open(
        choice: PathChoice,
        this: Peer,
        role: Role,
        pins: &Path,
    ) -> Result<Option<Self>, KernelError> {
        match Self::bpf(this, role, pins) {
            Ok(plane) => Ok(Some(plane)),
            Err(error) if error.kernel_cannot && choice == PathChoice::Auto => {
                tracing::warn!(error = %error.error, "no BPF here: frames are led by routes");
                Ok(None)
            }
            Err(error) => Err(error.error),
        }
    }

    fn bpf(this: Peer, role: Role, pins: &Path) -> Result<Self, OpenError> {
        let bpf = DataPlane::open(pins, conduit_bpf::Attach::Auto).map_err(|e| OpenError {
            kernel_cannot: matches!(e, Error::Refused { .. } | Error::Pins { .. }),
            error: failed("open the BPF data path", &e),
        })?;
        let fatal = |error| OpenError { kernel_cannot: false, error };
        let tunnel = tunnel::ensure(this.underlay.into()).map_err(|error| {
            // Not left behind for nobody.
            let _ = bpf.remove();
            OpenError { kernel_cannot: true, error }
        })?;
        // What an earlier owner was told stays until somebody says otherwise: frames flow.
        let before = bpf.config().map_err(|e| fatal(failed("read what this host is", &e)))?;
        let before = before.filter(|c| c.role == role);
        let config = Config {
            this: this.underlay.into(),
            edge: before.and_then(|c| c.edge),
            tunnel: tunnel.index,
            hold: before.and_then(|c| c.hold).filter(|&tap| exists(tap)),
            net: NETWORK,
            role,
            gateway: GATEWAY_MAC,
            by_stack: before.is_some_and(|c| c.by_stack),
        };
        bpf.configure(&config).map_err(|e| fatal(failed("set what this host is", &e)))?;
        for program in [Program::Decap, Program::Stack] {
            bpf.attach(tunnel.index, program)
                .map_err(|e| fatal(failed("attach to the tunnel", &e)))?;
        }
        let known =
            Mutex::new(Known { underlays: BTreeMap::new(), lingering: BTreeSet::new(), config });
        let (mtu, ended) = (AtomicU32::new(tunnel.mtu), AtomicBool::new(false));
        Ok(Self { bpf, tunnel, mtu, ended, known })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn tunnel(&self) -> Tunnel {
        self.tunnel
    }

    /// Lets a host in.
    pub(crate) fn set_peer(&self, peer: &Peer, role: Role) -> Result<(), KernelError> {
        let old = self.known().underlays.insert(peer.overlay, peer.underlay);
        self.bpf
            .set_peer(peer.underlay.into(), role)
            .and_then(|()| match old.filter(|&old| old != peer.underlay) {
                Some(old) => self.bpf.remove_peer(old.into()),
                None => Ok(()),
            })
            .map_err(|e| failed(format!("let host {} in", peer.overlay), &e))
    }

    /// Frames for the outside go there.
    pub(crate) fn set_edge(&self, edge: &Peer) -> Result<(), KernelError> {
        self.set_peer(edge, Role::Edge)?;
        let mut known = self.known();
        known.config.edge = Some(edge.underlay.into());
        self.bpf
            .configure(&known.config)
            .map_err(|e| failed(format!("lead frames to the edge {}", edge.overlay), &e))
    }

    /// Machines' frames for the outside leave by this host's own routes, or else by the edge.
    pub(crate) fn leave_by_stack(&self, by_stack: bool) -> Result<(), KernelError> {
        let mut known = self.known();
        known.config.by_stack = by_stack;
        self.bpf
            .configure(&known.config)
            .map_err(|e| failed("say where frames for the outside go", &e))
    }

    /// Another edge: it may send here, and what is for the outside may be sent there.
    pub(crate) fn let_edge_in(&self, edge: &Peer) -> Result<(), KernelError> {
        self.set_peer(edge, Role::Edge)
    }

    /// Says which home a machine has.
    pub(crate) fn set_home(&self, net: &MachineNet, home: Ipv4Addr) -> Result<(), KernelError> {
        keys(net)
            .try_for_each(|key| self.bpf.set_home(key, home))
            .map_err(|e| failed(format!("say which home {} has", net.key()), &e))
    }

    /// Leads all machines of a home to the edge that serves it. An older word changes nothing.
    pub(crate) fn set_front(
        &self,
        home: Ipv4Addr,
        by: &Peer,
        epoch: u64,
    ) -> Result<(), KernelError> {
        let fail = |e: Error| failed(format!("lead machines of {home} to {}", by.overlay), &e);
        // Two words at a time are put in order here.
        let _one_at_a_time = self.known();
        let fronts = self.bpf.fronts().map_err(fail)?;
        if fronts.iter().any(|(h, front)| *h == home && front.epoch > epoch) {
            return Ok(());
        }
        self.bpf.set_front(home, &Front { edge: by.underlay.into(), epoch }).map_err(fail)
    }

    /// A machine is behind a tap.
    pub(crate) fn set_tap(&self, tap: u32, net: &MachineNet) -> Result<(), KernelError> {
        let port = Port {
            net: net.network.0.into(),
            mac: net.mac,
            v4: Some(net.address),
            v6: net.address_v6,
        };
        self.bpf
            .set_port(tap, &port)
            .and_then(|()| self.bpf.attach(tap, Program::Tap))
            .map_err(|e| failed(format!("guard the tap of {}", net.address), &e))
    }

    /// A tap is about to go.
    pub(crate) fn remove_tap(&self, tap: u32) -> Result<(), KernelError> {
        self.bpf
            .detach(tap)
            .and_then(|()| self.bpf.remove_port(tap))
            .map_err(|e| failed(format!("leave tap #{tap}"), &e))
    }

    /// Frames for a machine go into its tap; of a candidate none come out.
    pub(crate) fn local(
        &self,
        net: &MachineNet,
        tap: u32,
        epoch: u64,
        candidate: bool,
    ) -> Result<(), KernelError> {
        let this = self.known().config.this;
        self.change(net, epoch, this, None, Place::Local { tap, candidate })
    }

    /// Frames on hold go into this tap, and what comes back out of it is led on.
    /// `None`: nothing is held from now on.
    pub(crate) fn set_hold(&self, tap: Option<u32>) -> Result<(), KernelError> {
        let fail = |e: Error| failed("say where frames are held", &e);
        if let Some(tap) = tap {
            self.bpf.attach(tap, Program::Replay).map_err(fail)?;
        }
        let mut known = self.known();
        known.config.hold = tap;
        self.bpf.configure(&known.config).map_err(fail)
    }

    /// Whether frames can be held here.
    pub(crate) fn holds(&self) -> bool {
        self.known().config.hold.is_some()
    }

    /// Frames for a machine are held: `owner` has it, and cannot be reached.
    pub(crate) fn hold(
        &self,
        net: &MachineNet,
        owner: Ipv4Addr,
        epoch: u64,
        candidate: Option<Ipv4Addr>,
    ) -> Result<(), KernelError> {
        let (owner, candidate) = self.find(net, owner, candidate)?;
        self.change(net, epoch, owner, candidate, Place::Hold)
    }

    /// Frames for a machine, and those that were held for it, are dropped.
    pub(crate) fn drop_frames(
        &self,
        net: &MachineNet,
        owner: Ipv4Addr,
        epoch: u64,
    ) -> Result<(), KernelError> {
        let (owner, _) = self.find(net, owner, None)?;
        self.change(net, epoch, owner, None, Place::Drop)
    }

    /// Where an owner and a candidate are.
    fn find(
        &self,
        net: &MachineNet,
        owner: Ipv4Addr,
        candidate: Option<Ipv4Addr>,
    ) -> Result<(IpAddr, Option<IpAddr>), KernelError> {
        let known = self.known();
        let find = |host: Ipv4Addr| known.underlays.get(&host).map(|&a| IpAddr::from(a));
        let found = find(owner).ok_or_else(|| {
            let what = format!("lead {} to {owner}", net.address);
            KernelError::new(what, "no such host is known here")
        })?;
        Ok((found, candidate.and_then(find)))
    }

    /// Frames are held for a machine that is to come here, or (at an edge) to the host `to`; nobody
    /// owns this epoch yet. Without `to` an edge believes no host's frames.
    pub(crate) fn expect(
        &self,
        net: &MachineNet,
        epoch: u64,
        to: Option<Ipv4Addr>,
    ) -> Result<(), KernelError> {
        let (this, candidate) = {
            let known = self.known();
            let this = known.config.this;
            let find = |host| known.underlays.get(&host).map(|&a| a.into());
            (this, to.map_or(Some(this), find))
        };
        self.change(net, epoch, this, candidate, Place::Expected)
    }

    /// Whether frames for a machine are held, or dropped, because its owner cannot be reached.
    pub(crate) fn is_held_back(&self, net: &MachineNet) -> bool {
        let held = |key| {
            let entry = self.bpf.entry(key).ok().flatten();
            entry.is_some_and(|e| matches!(e.place, Place::Hold | Place::Drop))
        };
        keys(net).any(held)
    }

    /// Whether frames that were held for a machine are still being given back.
    pub(crate) fn is_draining(&self, net: &MachineNet) -> bool {
        keys(net).any(|key| self.bpf.is_draining(key).unwrap_or(false))
    }

    /// The addresses of machines that are to come here or to somebody.
    pub(crate) fn expected(&self) -> Result<Vec<Key>, KernelError> {
        let entries = self.bpf.entries().map_err(|e| failed("list the entries", &e))?;
        let expected = entries.into_iter().filter(|(_, entry)| entry.place == Place::Expected);
        Ok(expected.map(|(key, _)| key).collect())
    }

    /// Nobody is expected at these addresses any more, but for `these` machines.
    pub(crate) fn expect_only<'a>(
        &self,
        expected: &[Key],
        these: impl Iterator<Item = &'a MachineNet>,
    ) -> Result<(), KernelError> {
        let these: BTreeSet<Key> = these.flat_map(keys).collect();
        for &key in expected.iter().filter(|key| !these.contains(key)) {
            let entry = self.bpf.entry(key).map_err(|e| failed(format!("look at {key}"), &e))?;
            if entry.is_some_and(|e| e.place == Place::Expected) {
                self.remove_entry(key)?;
            }
        }
        Ok(())
    }

    /// Frames for a machine go to the host with the overlay address `to`. `leaving`: it still runs
    /// here, for a moment. `candidate`: of the host that may have it next.
    pub(crate) fn remote(
        &self,
        net: &MachineNet,
        to: Ipv4Addr,
        epoch: u64,
        leaving: bool,
        candidate: Option<Ipv4Addr>,
    ) -> Result<(), KernelError> {
        let (owner, candidate) = self.find(net, to, candidate)?;
        self.change(net, epoch, owner, candidate, Place::Remote { leaving })
    }

    fn change(
        &self,
        net: &MachineNet,
        epoch: u64,
        owner: IpAddr,
        candidate: Option<IpAddr>,
        place: Place,
    ) -> Result<(), KernelError> {
        let entry = Entry { epoch, owner, candidate, place, mac: net.mac };
        for key in keys(net) {
            self.known().lingering.remove(&key);
            self.bpf
                .change(key, &entry)
                .map_err(|e| failed(format!("lead the frames of {key}"), &e))?;
        }
        Ok(())
    }

    /// Nothing is known of a machine any more; as soon as the last frame that was held for it has
    /// been sent on, if some are on their way.
    pub(crate) fn forget(&self, net: &MachineNet) -> Result<(), KernelError> {
        for key in keys(net) {
            if self.bpf.is_draining(key).unwrap_or(false) {
                self.known().lingering.insert(key);
            } else {
                self.remove_entry(key)?;
            }
        }
        Ok(())
    }

    fn remove_entry(&self, key: Key) -> Result<(), KernelError> {
        let gone = self.bpf.remove_entry(key).and_then(|()| self.bpf.remove_home(key));
        gone.map_err(|e| failed(format!("forget the way to {key}"), &e))
    }

    /// Removes the entries whose last frames have been sent on.
    fn forget_lingering(&self) {
        // Under the lock, so that no change comes between the question and the removal.
        let mut known = self.known();
        known.lingering.retain(|&key| {
            let draining = self.bpf.is_draining(key).unwrap_or(false);
            if !draining && let Err(error) = self.remove_entry(key) {
                tracing::warn!(%error, "an entry stays");
            }
            draining
        });
    }

    /// What the entries say of each machine, for an owner whose files may be behind them.
    pub(crate) fn recall(&self) -> Result<BTreeMap<MachineKey, Recalled>, KernelError> {
        let entries = self.bpf.entries().map_err(|e| failed("list the entries", &e))?;
        let hosts = self.known();
        let this = hosts.config.this;
        let overlay = |underlay: IpAddr| {
            hosts.underlays.iter().find_map(|(&o, &u)| (IpAddr::from(u) == underlay).then_some(o))
        };
        let known = entries.into_iter().filter_map(|(key, entry)| {
            // A machine's IPv6 address has the same epoch.
            let IpAddr::V4(address) = key.address else { return None };
            let network = NetworkId(u16::try_from(key.net).ok()?);
            let owner = overlay(entry.owner);
            let place = match entry.place {
                Place::Local { candidate: true, .. } | Place::Expected => {
                    Some(book::Place::Candidate)
                }
                Place::Local { candidate: false, .. } => Some(book::Place::Here),
                Place::Remote { .. } => owner.map(|to| book::Place::Away { to }),
                Place::Hold | Place::Drop => None,
            };
            let wait = match entry.place {
                Place::Expected => book::Wait::Hold,
                _ => book::Wait::Tap,
            };
            // An epoch that was given to another host is its for good.
            let floor = entry.epoch.saturating_add(u64::from(entry.owner != this));
            Some((
                MachineKey { network, address },
                Recalled { epoch: entry.epoch, floor, owner, place, wait },
            ))
        });
        Ok(known.collect())
    }

    /// Keeps the tunnel's MTU to what its paths carry, for as long as this lives. The thread is of
    /// the caller's network namespace.
    pub(crate) fn keep_fit(self: &Arc<Self>) {
        let (this, plane) = (self.known().config.this, Arc::downgrade(self));
        let mut mtu = self.tunnel.mtu;
        crate::agent::spawn("path-mtu", move || {
            loop {
                std::thread::sleep(Duration::from_secs(1));
                let Some(plane) = plane.upgrade() else { return };
                if plane.ended.load(Ordering::Relaxed) {
                    return;
                }
                plane.forget_lingering();
                // A `conduit flows` or `trace` that was killed.
                if let Err(error) = plane.bpf.view().and_then(|view| view.expire()) {
                    tracing::debug!(%error, "what is watched could not be looked at");
                }
                let peers: Vec<IpAddr> =
                    plane.known().underlays.values().map(|&a| a.into()).collect();
                match tunnel::fit(this, &peers, mtu) {
                    Ok(now) => {
                        mtu = now;
                        plane.mtu.store(now, Ordering::Relaxed);
                    }
                    Err(error) => tracing::debug!(%error, "the path MTU could not be followed"),
                }
            }
        });
    }

    /// Its owner goes, in a process that goes on: nothing is followed from now on.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Figures for Prometheus. What the kernel does not say is left out.
    pub(crate) fn read_figures(&self, readings: &mut scrape::Readings) {
        metrics::frames(readings, &self.bpf.counts().unwrap_or_default());
        if let Ok(bytes) = self.bpf.memory() {
            readings.level(&metrics::MAP_MEMORY, &[], bytes as f64);
        }
        readings.level(&metrics::MTU, &[], f64::from(self.mtu.load(Ordering::Relaxed)));
    }

    /// What was counted, by name.
    pub(crate) fn counts(&self) -> BTreeMap<String, u64> {
        let counts = self.bpf.counts().unwrap_or_default();
        counts.into_iter().map(|(event, n)| (event.name().to_owned(), n)).collect()
    }

    /// Removes the data path and its device.
    pub(crate) fn remove(&self) -> Result<(), KernelError> {
        self.bpf.remove().map_err(|e| failed("remove the BPF data path", &e))?;
        tunnel::remove()
    }
}

struct OpenError {
    kernel_cannot: bool,
    error: KernelError,
}

fn exists(interface: u32) -> bool {
    nix::net::if_::if_indextoname(interface).is_ok()
}

/// A machine's entries: one for each of its addresses.
fn keys(net: &MachineNet) -> impl Iterator<Item = Key> {
    let addresses = [Some(IpAddr::V4(net.address)), net.address_v6.map(IpAddr::V6)];
    let network = net.network.0.into();
    addresses.into_iter().flatten().map(move |address| Key { net: network, address })
}

fn failed(operation: impl Into<String>, error: &Error) -> KernelError {
    KernelError::new(operation, error)
}
