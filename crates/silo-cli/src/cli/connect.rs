//! `silo connect`: takes devices from a source, then serves them, also while blocks still come.

use super::{
    assist::{AssistArgs, TakeArgs},
    device::{DeviceArgs, FrontArgs, MetricsArgs, TlsArgs},
    human, print,
    progress::Progress,
    serve,
    stop::Stop,
};
use crate::{
    assist,
    config::{Config, DeviceConfig, MigrateConfig},
    moving::{Parking, peer_name, security},
    note::{self, Start},
    service::Service,
    stack::Role,
};
use anyhow::{Context, Result, bail};
use clap::Args;
use identity::HostName;
use silo::{
    device::DeviceName,
    moving::{
        Inbound, Server, Volume,
        destination::{Accepted, DestinationHost, DestinationReport, Offer, Options, Reception},
        peer::Listener,
        report::MoveError,
    },
};
use std::{
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, RecvTimeoutError, SyncSender},
    },
    thread,
    time::Duration,
};

/// How often a move is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// How long the devices may take to be served once they are here.
const RUN_LIMIT: Duration = Duration::from_secs(30);

#[derive(Args)]
pub(super) struct ConnectArgs {
    /// The source, as in host-a:5170; that of the config's [migrate] if not given
    source: Option<String>,
    /// The source's name in its certificate
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    source_name: Option<String>,
    /// End as soon as everything is here and durable
    #[arg(long)]
    once: bool,
    /// Note in this file who owns the device; without it in DEVICE.silo-note beside it
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    note: Option<PathBuf>,
    #[command(flatten)]
    assist: AssistArgs,
    #[command(flatten)]
    takes: TakeArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    fronts: FrontArgs,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

impl ConnectArgs {
    fn config(&self) -> Result<(Config, MigrateConfig)> {
        let mut config = self.device.config()?;
        if self.device.config.is_none() {
            for device in config.device.values_mut() {
                device.expose = self.fronts.expose(self.tls.plaintext);
            }
            config.identity = self.tls.identity();
            config.metrics = self.metrics.config();
            let mut migrate = MigrateConfig::new(self.tls.plaintext, self.source_name.clone());
            let own = || config.device.values().find_map(DeviceConfig::own_note);
            migrate.note = self.note.clone().or_else(own);
            if let Some(device) = config.device.keys().next() {
                self.assist.apply(device, self.takes.early_release(), &mut migrate)?;
            }
            self.takes.apply(&mut migrate);
            config.migrate = Some(migrate);
        }
        let migrate = config.migrate.as_mut().context("the config has no [migrate]")?;
        if let Some(source) = &self.source {
            migrate.peer = Some(source.clone());
        }
        let migrate = migrate.clone();
        config.check()?;
        Ok((config, migrate))
    }
}

/// The devices are to run: answered when they are served.
type Run = SyncSender<Result<(), String>>;

/// What the library tells this command.
enum Said {
    Began(Arc<Inbound>),
    Run(Run),
    Refused(String),
    Trouble(String),
}

/// Passes on what happens to the main thread.
struct Bell(Mutex<mpsc::Sender<Said>>);

impl Bell {
    fn ring(&self, said: Said) {
        // Nobody listens any more when the command ends.
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).send(said);
    }
}

impl DestinationHost for Bell {
    fn run(&self, _: u32, _: Vec<u8>, _: Vec<Vec<u64>>) -> Result<(), String> {
        let (answer, answered) = mpsc::sync_channel(1);
        self.ring(Said::Run(answer));
        let late = |_| format!("the destination did not serve the devices within {RUN_LIMIT:?}");
        answered.recv_timeout(RUN_LIMIT).map_err(late)?
    }

    fn trouble(&self, what: &str) {
        self.ring(Said::Trouble(what.to_owned()));
    }

    fn overdue(&self, what: &str) {
        tracing::warn!(what, "the move takes longer than it should");
    }
}

/// Takes the devices that this host has under the names that the source says, and nothing else.
struct Desk {
    volumes: Vec<Arc<Volume>>,
    bell: Arc<Bell>,
    options: Options,
}

impl Reception for Desk {
    fn receive(&self, offer: &Offer<'_>) -> Result<Accepted, String> {
        let accepted = self.look_at(offer);
        if let Err(why) = &accepted {
            self.bell.ring(Said::Refused(why.clone()));
        }
        accepted
    }

    fn began(&self, session: &Arc<Inbound>) {
        self.bell.ring(Said::Began(session.clone()));
    }
}

impl Desk {
    fn look_at(&self, offer: &Offer<'_>) -> Result<Accepted, String> {
        let ours: Vec<&DeviceName> = self.volumes.iter().map(|volume| volume.name()).collect();
        let mut volumes = Vec::new();
        for device in offer.devices {
            let found = self.volumes.iter().find(|volume| *volume.name() == device.name);
            let volume = found.ok_or_else(|| {
                let names = ours.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                format!("the destination has no device \"{}\", but {names}", device.name)
            })?;
            if volume.geometry() != device.geometry {
                return Err(format!(
                    "device \"{}\" has {} bytes in blocks of {} at the source, {} in blocks of {} \
                     at the destination",
                    device.name,
                    device.geometry.bytes(),
                    device.geometry.block(),
                    volume.geometry().bytes(),
                    volume.geometry().block()
                ));
            }
            volumes.push(volume.clone());
        }
        if volumes.len() != self.volumes.len() {
            return Err(format!(
                "the destination expects {} devices, {} are offered",
                self.volumes.len(),
                volumes.len()
            ));
        }
        let (host, options) = (self.bell.clone(), self.options.clone());
        Ok(Accepted { volumes, host, options, running: None })
    }
}

pub(super) fn run(args: &ConnectArgs, json: bool) -> Result<()> {
    let stop = Stop::on_signals()?;
    let (config, migrate) = args.config()?;
    let source = migrate.peer.clone();
    let source = source.context("where is the source? add HOST:PORT, or peer to [migrate]")?;
    let start = note::receiving(&config, migrate.note.as_deref())?;
    let role = match &start {
        Start::New => Role::Receive,
        Start::Filling(noted) | Start::Running(noted, ..) => Role::GoOn(noted.clone()),
    };
    let mut service = Service::open(&config, &role)?;
    let (security, limits) = security(&migrate, service.host())?;
    let mut options = Options { ledger: note::ledger(migrate.note.as_ref()), ..Options::default() };
    assist::at_destination(&config, &migrate, service.host(), &mut options)?;
    let (sender, said) = mpsc::channel();
    let bell = Arc::new(Bell(Mutex::new(sender)));
    let volumes = service.volumes().to_vec();
    let desk = Arc::new(Desk { volumes, bell: bell.clone(), options: options.clone() });
    let expected = (!migrate.plaintext).then(|| peer_name(&migrate)).transpose()?;
    let owner = expected.clone();
    let allow = move |name: Option<&HostName>| expected.as_ref() == name;
    // Sources speak on connections that are made from here; nobody else has a reason to connect.
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let listener = Listener::new(socket, security, limits.clone(), allow)?;
    let server = Arc::new(Server::new(listener, desk, None)?);
    let parking = Parking::start(source.clone(), &limits, server.clone())?;
    if json {
        print(json, &serde_json::json!({ "connecting": source }), "")?;
    } else {
        eprintln!("waiting for {source} to give its devices; SIGINT ends it");
    }
    let inbound = match start {
        Start::New | Start::Filling(_) => receive(args, &config, &mut service, &said, &stop, json)?,
        // The devices are this host's since a process that is no more: whoever uses them need not
        // wait for the source.
        Start::Running(noted, session, attempt) => {
            let volumes = note::in_order(&noted, service.volumes())?;
            let inbound = Arc::new(Inbound::running(session, attempt, volumes, bell, options)?);
            server.adopt(inbound.clone(), owner);
            service.host().moves.receives(&inbound);
            service.serve(&config)?;
            serve::announce(&service, args.fronts.socket.as_deref(), json)?;
            Some(inbound)
        }
    };
    let Some(inbound) = inbound else { return service.stop() };
    let following = thread::spawn({
        let inbound = inbound.clone();
        move || inbound.wait().map_err(Box::new)
    });
    let over = || following.is_finished();
    follow(&service, &inbound, &over, &said, &stop, json);
    // Until here the source may have to come back.
    drop((parking, server));
    match following.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)) {
        Ok(report) => {
            service.host().moves.received(&report, inbound.wait_times());
            service.flush()?;
            note::note_whole(migrate.note.as_deref(), service.volumes())?;
            say(&report, json)?;
            if !args.once {
                service.back_up(&config)?;
                service.run(&stop)?;
            }
            let volumes = service.volumes().to_vec();
            service.stop()?;
            note::leave(&config, migrate.note.as_deref(), volumes)
        }
        Err(error) => {
            // What is here stays served until nobody can gain by it: the error ends it.
            let stopped = service.stop();
            Err(anyhow::Error::from(*error)).context(match stopped {
                Ok(()) => "the devices are not complete".to_owned(),
                Err(stopped) => format!("the devices are not complete, and {stopped:#}"),
            })
        }
    }
}

/// Until the devices are this host's and served. `None`: the user has ended it before.
fn receive(
    args: &ConnectArgs,
    config: &Config,
    service: &mut Service,
    said: &mpsc::Receiver<Said>,
    stop: &Stop,
    json: bool,
) -> Result<Option<Arc<Inbound>>> {
    let progress = Progress::bytes("receiving", 0, json);
    let mut session: Option<Arc<Inbound>> = None;
    loop {
        match said.recv_timeout(LOOK) {
            Ok(Said::Began(inbound)) => {
                service.host().moves.receives(&inbound);
                session = Some(inbound);
            }
            Ok(Said::Run(answer)) => {
                progress.end();
                let served = service.serve(config);
                let told = served.as_ref().copied().map_err(|error| format!("{error:#}"));
                // Gone only if it has waited too long; then the move has failed.
                let _ = answer.send(told);
                served?;
                serve::announce(service, args.fronts.socket.as_deref(), json)?;
                let inbound = session.take().context("a session ran that had not begun")?;
                return Ok(Some(inbound));
            }
            Ok(Said::Refused(why)) => bail!("the devices do not fit: {why}"),
            Ok(Said::Trouble(what)) => tracing::error!(what, "a block cannot be had"),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => bail!("the move has no host any more"),
        }
        if let Some(inbound) = &session {
            let now = inbound.progress();
            progress.set(now.size.saturating_sub(now.remaining), now.size);
            if inbound.is_over() {
                let failed: MoveError = match inbound.wait() {
                    Ok(_) => bail!("the move ended before the devices ran here"),
                    Err(failed) => failed,
                };
                return Err(failed.into());
            }
        }
        if stop.is_asked() {
            if let Some(inbound) = &session {
                inbound.cancel("the destination is being stopped");
            }
            return Ok(None);
        }
    }
}

/// Serves while blocks still come. A first signal waits for them: nobody else has them all.
fn follow(
    service: &Service,
    inbound: &Inbound,
    over: &dyn Fn() -> bool,
    said: &mpsc::Receiver<Said>,
    stop: &Stop,
    json: bool,
) {
    let progress = Progress::bytes("receiving", 0, json);
    let mut told = false;
    while !over() {
        if let Ok(Said::Trouble(what)) = said.recv_timeout(LOOK) {
            eprintln!("silo: {what}");
        }
        service.retry();
        let now = inbound.progress();
        progress.set(now.size.saturating_sub(now.remaining), now.size);
        if stop.is_asked() && !told {
            eprintln!(
                "silo: {} are still to come; waiting for them, a second signal ends at once",
                human(now.remaining)
            );
            told = true;
        }
    }
}

fn say(report: &DestinationReport, json: bool) -> Result<()> {
    let value = serde_json::json!({
        "complete": true,
        "session": report.session.to_string(),
        "peer": report.peer,
        "wire_bytes": report.wire.total(),
        "demands": report.counters.demands,
        "blocks": {
            "from_source": report.counters.from_peer,
            "from_store": report.counters.from_store,
            "written_here": report.counters.written,
        },
        "places": report.by_place.iter().map(|(name, counts)| serde_json::json!({
            "name": name,
            "fetched": counts.fetched,
            "wrong": counts.wrong,
            "missing": counts.missing,
            "failed": counts.failed,
        })).collect::<Vec<_>>(),
        "read_waits": {
            "count": report.waits.count,
            "p50_seconds": report.waits.p50.as_secs_f64(),
            "p99_seconds": report.waits.p99.as_secs_f64(),
            "longest_seconds": report.waits.longest.as_secs_f64(),
        },
        "seconds": {
            "connect": report.timings.connect.as_secs_f64(),
            "pre_copy": report.timings.filling.as_secs_f64(),
            "switch": report.timings.switch.as_secs_f64(),
            "post_copy": report.timings.following.as_secs_f64(),
            "total": report.timings.total.as_secs_f64(),
        },
    });
    let text = format!(
        "everything is here, from {}: {} on the line, {} reads waited (p99 {:.1} ms), {}",
        report.peer,
        human(report.wire.total()),
        report.waits.count,
        report.waits.p99.as_secs_f64() * 1e3,
        report.timings
    );
    print(json, &value, &text)
}
