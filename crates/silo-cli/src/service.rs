//! What a config describes, running: devices open, front ends listening, metrics answered.
//!
//! Callers: `silo serve`, `silo expose`, `silo connect`, `silo sync`. What must hold: everything is
//! started or nothing is; an orderly stop ends the front ends first, then flushes every device, also
//! when one of them fails.

use crate::{
    backup::{Running, Target},
    cli::stop::Stop,
    config::{AttachConfig, Config, ExposeConfig, FuseConfig, NbdConfig, UblkConfig, VhostConfig},
    metrics::{Endpoint, Readings, Source, names},
    note,
    stack::{DeviceStack, Devices, Host, ROOM_LIMIT, Role},
};
use anyhow::{Context, Result, bail};
use identity::TlsServer;
use serde::Serialize;
#[cfg(feature = "ublk")]
use silo::expose::ublk::{UblkOptions, UblkServer};
use silo::{
    expose::{
        fuse::{Caching, FuseMount, FuseOptions},
        nbd::{
            self, Access, Attach, ExportOptions, Exports, NbdOptions, NbdSecurity, NbdServer, Peers,
        },
        vhost::{VhostOptions, VhostServer},
    },
    io::BlockDevice,
    moving::Volume,
    store::capture::Capture,
};
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// How long requests in hand may take after a signal.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// How often operations that wait for room try again, and a backup is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How long the last generation may take.
const LAST_GENERATION: Duration = Duration::from_secs(600);

/// One way to reach a device, for people and for `--json`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Address {
    /// The device.
    pub(crate) device: String,
    /// Its size.
    pub(crate) bytes: u64,
    /// By what.
    pub(crate) protocol: &'static str,
    /// Where.
    pub(crate) at: String,
}

/// A front end that runs.
enum Front {
    Nbd(NbdServer),
    Vhost(VhostServer),
    Fuse(FuseMount),
    Attached(PathBuf),
    #[cfg(feature = "ublk")]
    Ublk(UblkServer),
}

impl Front {
    fn stop(self) -> Result<()> {
        match self {
            Self::Nbd(server) => server.stop(STOP_LIMIT)?,
            Self::Vhost(server) => server.stop(STOP_LIMIT)?,
            Self::Fuse(mount) => mount.stop(STOP_LIMIT)?,
            Self::Attached(node) => nbd::detach(&node)?,
            #[cfg(feature = "ublk")]
            Self::Ublk(server) => server.stop(STOP_LIMIT)?,
        }
        Ok(())
    }
}

/// Front ends with the device that each serves; the metrics ask it too.
#[derive(Default)]
struct Fronts(Mutex<Vec<(String, Front)>>);

impl Fronts {
    fn all(&self) -> std::sync::MutexGuard<'_, Vec<(String, Front)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source for Fronts {
    fn read(&self, readings: &mut Readings) {
        for (device, front) in self.all().iter() {
            let (protocol, clients) = match front {
                Front::Nbd(server) => match server.endpoint() {
                    nbd::Endpoint::Unix(_) => ("nbd-unix", server.connections()),
                    nbd::Endpoint::Tcp(_) => ("nbd-tcp", server.connections()),
                },
                Front::Vhost(server) => ("vhost-user-blk", server.connections()),
                Front::Fuse(mount) => ("fuse", usize::from(mount.is_mounted())),
                Front::Attached(_) => continue,
                #[cfg(feature = "ublk")]
                Front::Ublk(server) => ("ublk", usize::from(server.is_live())),
            };
            readings.level(&names::FRONT_CLIENTS, &[device, protocol], clients as f64);
        }
    }
}

/// Everything that runs.
pub(crate) struct Service {
    host: Host,
    fronts: Arc<Fronts>,
    backup: Option<Arc<Running>>,
    capture: Option<Arc<dyn Capture>>,
    volumes: Vec<Arc<Volume>>,
    stacks: Vec<DeviceStack>,
    addresses: Vec<Address>,
    endpoint: Option<Endpoint>,
}

impl Service {
    /// Opens all devices and serves them.
    ///
    /// # Errors
    /// If anything cannot be opened or listened on; then nothing is left running.
    pub(crate) fn start(config: &Config) -> Result<Self> {
        let mut service = Self::open(config, &Role::Use)?;
        service.back_up(config)?;
        service.serve(config)?;
        Ok(service)
    }

    /// Opens all devices; nobody can reach them yet.
    ///
    /// # Errors
    /// If one cannot be opened, or is not this host's to use.
    pub(crate) fn open(config: &Config, role: &Role) -> Result<Self> {
        if *role == Role::Use {
            note::check_use(config)?;
        }
        let host = Host::new(config)?;
        let fronts = Arc::new(Fronts::default());
        host.metrics.add(fronts.clone());
        let Devices { stacks, capture, volumes } = Devices::open(config, &host, role)?;
        let (addresses, endpoint, backup) = (Vec::new(), None, None);
        Ok(Self { host, fronts, backup, capture, volumes, stacks, addresses, endpoint })
    }

    /// Lets clients in, and answers for metrics.
    ///
    /// # Errors
    /// If something cannot be listened on.
    pub(crate) fn serve(&mut self, config: &Config) -> Result<()> {
        for at in 0..self.stacks.len() {
            let name = self.stacks[at].name().to_owned();
            let device = self.stacks[at].device();
            self.expose(&name, &device, &config.device[&name].expose)
                .with_context(|| format!("device \"{name}\""))?;
        }
        if let Some(wanted) = &config.metrics {
            self.endpoint = Some(Endpoint::start(wanted.listen, self.host.metrics.clone())?);
        }
        Ok(())
    }

    /// Backs up, if the config says so.
    ///
    /// # Errors
    /// If the store cannot be reached, or a key is lost.
    pub(crate) fn back_up(&mut self, config: &Config) -> Result<()> {
        let (Some(wanted), Some(capture)) = (&config.backup, &self.capture) else { return Ok(()) };
        let (group, _) = config.members(wanted.group.as_deref()).context("the group to back up")?;
        let target = Target::by_config(wanted, &group)?;
        let rate = wanted.bandwidth.map(|rate| rate.0);
        let running = Running::start(&target, capture.clone(), wanted.max_age.0, rate)?;
        self.set_backup(running);
        Ok(())
    }

    /// What is to be backed up.
    pub(crate) fn capture(&self) -> Option<Arc<dyn Capture>> {
        self.capture.clone()
    }

    /// Looks after a backup that was started elsewhere, and tells its figures.
    pub(crate) fn set_backup(&mut self, running: Arc<Running>) {
        self.host.metrics.add(running.clone());
        self.backup = Some(running);
    }

    /// Looks after the backup no longer: no last generation is made.
    pub(crate) fn without_backup(mut self) -> Self {
        self.backup = None;
        self
    }

    /// Serves one device in all the ways that are asked for.
    ///
    /// # Errors
    /// If something cannot be listened on.
    pub(crate) fn expose(
        &mut self,
        name: &str,
        device: &Arc<dyn BlockDevice>,
        expose: &ExposeConfig,
    ) -> Result<()> {
        if let Some(nbd) = &expose.nbd {
            self.serve_nbd(name, device, nbd)?;
        }
        if let Some(vhost) = &expose.vhost_user_blk {
            self.serve_vhost(name, device, vhost)?;
        }
        if let Some(fuse) = &expose.fuse {
            self.mount_fuse(name, device, fuse)?;
        }
        if let Some(attach) = &expose.attach {
            self.attach(name, device, attach, expose.nbd.as_ref())?;
        }
        if let Some(ublk) = &expose.ublk {
            self.serve_ublk(name, device, ublk)?;
        }
        Ok(())
    }

    fn serve_nbd(
        &mut self,
        name: &str,
        device: &Arc<dyn BlockDevice>,
        wanted: &NbdConfig,
    ) -> Result<()> {
        let export = wanted.export.clone().unwrap_or_else(|| name.to_owned());
        let access = if wanted.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let unix = wanted.unix.iter().map(|path| nbd::Endpoint::unix(path));
        let tcp = wanted.tcp.iter().map(|address| nbd::Endpoint::Tcp(*address));
        for endpoint in unix.chain(tcp) {
            let mut options = ExportOptions { access, ..ExportOptions::default() };
            let security = match (&endpoint, wanted.plaintext, &self.host.identity) {
                (nbd::Endpoint::Unix(_), _, _) | (_, true, _) => NbdSecurity::Plain,
                (_, false, Some(identity)) => {
                    if !wanted.clients.is_empty() {
                        let clients = wanted.clients.iter().map(|name| name.parse());
                        options.peers = Peers::Named(clients.collect::<Result<_, _>>()?);
                    }
                    NbdSecurity::Required(TlsServer::new(identity))
                }
                (_, false, None) => bail!("{endpoint} needs TLS, and this host has no certificate"),
            };
            let exports = Arc::new(Exports::new());
            exports.add(&export, device.clone(), options)?;
            let options = NbdOptions {
                max_connections: wanted.max_connections,
                security,
                ..NbdOptions::default()
            };
            let server = NbdServer::serve(&endpoint, exports, options)?;
            let place = server.endpoint().to_string();
            self.listening(name, device, "nbd", place, Front::Nbd(server));
        }
        Ok(())
    }

    fn serve_vhost(
        &mut self,
        name: &str,
        device: &Arc<dyn BlockDevice>,
        wanted: &VhostConfig,
    ) -> Result<()> {
        let options = VhostOptions {
            serial: name.to_owned(),
            queues: u16::try_from(wanted.queues)?,
            ..VhostOptions::default()
        };
        let server = VhostServer::start(&wanted.socket, device.clone(), options)?;
        let place = wanted.socket.display().to_string();
        self.listening(name, device, "vhost-user-blk", place, Front::Vhost(server));
        Ok(())
    }

    fn mount_fuse(
        &mut self,
        name: &str,
        device: &Arc<dyn BlockDevice>,
        wanted: &FuseConfig,
    ) -> Result<()> {
        let caching = if wanted.write_back { Caching::WriteBack } else { Caching::WriteThrough };
        let options = FuseOptions { caching, ..FuseOptions::default() };
        let mount = FuseMount::mount(&wanted.mount, name, device.clone(), &options)?;
        let place = mount.path().display().to_string();
        self.listening(name, device, "fuse", place, Front::Fuse(mount));
        Ok(())
    }

    /// The kernel's client needs a server to connect to: the unix socket of the same device.
    fn attach(
        &mut self,
        name: &str,
        device: &Arc<dyn BlockDevice>,
        wanted: &AttachConfig,
        server: Option<&NbdConfig>,
    ) -> Result<()> {
        let socket = server
            .and_then(|nbd| nbd.unix.clone())
            .context("attaching needs an NBD export on a unix socket; add nbd = { unix = … }")?;
        let export = server.and_then(|nbd| nbd.export.clone()).unwrap_or_else(|| name.to_owned());
        let endpoint = nbd::Endpoint::Unix(socket);
        nbd::attach(&Attach { endpoint, export, node: wanted.device.clone(), connections: 1 })?;
        let place = wanted.device.display().to_string();
        self.listening(name, device, "attach", place, Front::Attached(wanted.device.clone()));
        Ok(())
    }

    #[cfg(feature = "ublk")]
    fn serve_ublk(
        &mut self,
        name: &str,
        device: &Arc<dyn BlockDevice>,
        wanted: &UblkConfig,
    ) -> Result<()> {
        let options = UblkOptions {
            id: wanted.id,
            queues: u16::try_from(wanted.queues)?,
            recover: wanted.recover,
            ..UblkOptions::default()
        };
        let server = UblkServer::start(device.clone(), &options)?;
        let place = server.node().display().to_string();
        self.listening(name, device, "ublk", place, Front::Ublk(server));
        Ok(())
    }

    #[cfg(not(feature = "ublk"))]
    #[allow(clippy::unused_self, reason = "as with the feature")]
    fn serve_ublk(&mut self, name: &str, _: &Arc<dyn BlockDevice>, _: &UblkConfig) -> Result<()> {
        bail!("device \"{name}\": this silo was built without ublk (cargo feature \"ublk\")")
    }

    fn listening(
        &mut self,
        name: &str,
        device: &Arc<dyn BlockDevice>,
        protocol: &'static str,
        at: String,
        front: Front,
    ) {
        self.fronts.all().push((name.to_owned(), front));
        self.addresses.push(Address {
            device: name.to_owned(),
            bytes: device.size(),
            protocol,
            at,
        });
    }

    /// What the devices of this process share.
    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    /// The first device and its name.
    pub(crate) fn first_device(&self) -> Option<(String, Arc<dyn BlockDevice>)> {
        self.stacks.first().map(|stack| (stack.name().to_owned(), stack.device()))
    }

    /// The devices that may move, or are coming.
    pub(crate) fn volumes(&self) -> &[Arc<Volume>] {
        &self.volumes
    }

    /// How the devices are reached.
    pub(crate) fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Where metrics are answered.
    pub(crate) fn metrics(&self) -> Option<std::net::SocketAddr> {
        self.endpoint.as_ref().map(Endpoint::address)
    }

    /// Serves until the end is asked for, or the backup cannot go on.
    ///
    /// # Errors
    /// If another writer has taken the backup's line.
    pub(crate) fn run(&self, stop: &Stop) -> Result<()> {
        while !stop.wait(LOOK) {
            self.retry();
            self.backup.as_ref().map_or(Ok(()), |backup| backup.check())?;
        }
        Ok(())
    }

    /// Lets operations try again that wait because something failed.
    pub(crate) fn retry(&self) {
        self.stacks.iter().for_each(DeviceStack::retry);
    }

    /// Makes everything durable, while clients go on.
    ///
    /// # Errors
    /// If that failed.
    pub(crate) fn flush(&self) -> Result<()> {
        for stack in self.stacks.iter().filter(|stack| !stack.device().is_read_only()) {
            let flushed = stack.flush(ROOM_LIMIT);
            flushed.with_context(|| format!("device \"{}\": a flush", stack.name()))?;
        }
        Ok(())
    }

    /// Ends the front ends, then makes everything durable.
    ///
    /// # Errors
    /// The first thing that failed; the rest was done all the same.
    #[tracing::instrument(name = "stop", skip_all, err(level = "debug"))]
    pub(crate) fn stop(self) -> Result<()> {
        let mut outcome = self.stop_fronts();
        if let Some(running) = self.backup.filter(|running| !running.backup().status().ended) {
            let last = running.backup().now("the last one", LAST_GENERATION);
            outcome = outcome.and(last.map(drop).context("the last generation"));
        }
        for stack in self.stacks {
            outcome = outcome.and(stack.close());
        }
        outcome
    }

    /// Ends the front ends: nobody reaches the devices any more.
    ///
    /// # Errors
    /// The first that failed; the others were ended all the same.
    pub(crate) fn stop_fronts(&self) -> Result<()> {
        let fronts = std::mem::take(&mut *self.fronts.all());
        let mut outcome = Ok(());
        // What was attached to another front end first.
        for (device, front) in fronts.into_iter().rev() {
            let stopped = front.stop().with_context(|| format!("device \"{device}\""));
            // All of them are stopped, whatever became of one.
            outcome = outcome.and(stopped);
        }
        outcome
    }
}
