//! `receive`: a runner that waits for one machine, or (`--any`) one place on this host where others ask
//! for such runners.
//!
//! ```text
//!   other host's runner ──Ask { machine }──▶ receive --any ──starts──▶ a runner, which waits for it
//!                       ◀──where it listens──┘                            │
//!                       ──────────────── the move, as ever ──────────────▶│
//! ```
//!
//! What must hold: nobody gets a runner whose host is not accepted; of one machine there is one runner; a
//! runner whose machine does not come ends by itself; and this process may end or be killed at any time,
//! runners go on.

use super::{
    StateArgs,
    backup::parse_time,
    run::{self, HostArgs},
    spawned::{self, Spawned},
};
use crate::{
    migrate::{
        link::CONNECT_LIMIT,
        reception::{Answer, Ask, hear, say},
    },
    runner::{
        api::{Client, Request, Status},
        config::Launch,
        state::{MachineDir, check_name},
    },
};
use anyhow::{Context, bail};
use clap::Args;
use identity::{HostName, Security, Stream};
use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// How long a runner that was asked for waits for its machine.
const WAIT: Duration = Duration::from_secs(120);
/// How long such a runner may take until it waits.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How often it is looked.
const LOOK: Duration = Duration::from_millis(5);
/// Hosts that ask at once, at most.
const MOST: usize = 64;

/// `drafter receive`.
#[derive(Args, Debug)]
pub struct ReceiveArgs {
    /// The machine's name
    #[arg(required_unless_present = "any")]
    name: Option<String>,
    /// Take every machine that comes: hosts that send ask here for a runner (`migrate --to-host`,
    /// `evacuate --to-host`)
    #[arg(long, conflicts_with_all = ["name", "detach", "protect_line"])]
    any: bool,
    /// How long to wait for the first machine, as 30s or 5m, and end if none comes [default: for ever;
    /// two minutes for each runner that --any starts]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    wait: Option<Duration>,
    /// Packages, or directories of packages, that machines may need
    #[arg(long, required = true)]
    package: Vec<PathBuf>,
    #[command(flatten)]
    on: HostArgs,
}

pub(super) fn receive(args: &ReceiveArgs, state: &StateArgs) -> anyhow::Result<()> {
    if args.on.listen.is_none() {
        bail!("whoever waits for a machine needs --listen ADDRESS:PORT");
    }
    match &args.name {
        Some(name) => {
            let mut config = run::config(name, &args.on, args.package.clone(), state)?;
            config.wait_ms = args.wait.map(|wait| wait.as_millis() as u64);
            run::start(config, Launch::Receive, args.on.detach)
        }
        None => serve(args, state),
    }
}

/// What all who ask have in common.
struct Reception<'a> {
    args: &'a ReceiveArgs,
    state: &'a StateArgs,
    security: Security,
    address: SocketAddr,
    /// One runner is started at a time: two who ask for one machine get the same.
    starting: Mutex<()>,
    asking: AtomicUsize,
}

fn serve(args: &ReceiveArgs, state: &StateArgs) -> anyhow::Result<()> {
    // Whatever is wrong with the flags shows now. (The name is nobody's.)
    let config = run::config("any", &args.on, args.package.clone(), state)?;
    let security = config.security.load(&HostName::new(&config.host)?)?;
    let address = config.listen.context("it listens nowhere")?;
    let listener = TcpListener::bind(address)
        .with_context(|| format!("listening for other hosts on {address}"))?;
    let address = listener.local_addr()?;
    let reception = Reception {
        args,
        state,
        security,
        address,
        starting: Mutex::new(()),
        asking: AtomicUsize::new(0),
    };
    println!("host \"{}\" takes machines at {address}", config.host);
    let reception = &reception;
    thread::scope(|scope| {
        for socket in listener.incoming() {
            let Ok(socket) = socket else {
                // No descriptor is free, say: not at full speed.
                thread::sleep(LOOK);
                continue;
            };
            if reception.asking.fetch_add(1, Ordering::AcqRel) >= MOST {
                reception.asking.fetch_sub(1, Ordering::AcqRel);
                tracing::warn!("a peer was turned away: {MOST} ask already");
                continue;
            }
            let attended =
                thread::Builder::new().name("asks".into()).spawn_scoped(scope, move || {
                    reception.attend(socket);
                    reception.asking.fetch_sub(1, Ordering::AcqRel);
                });
            if let Err(error) = attended {
                reception.asking.fetch_sub(1, Ordering::AcqRel);
                tracing::error!(%error, "no thread for a peer");
            }
        }
    });
    Ok(())
}

impl Reception<'_> {
    fn attend(&self, socket: TcpStream) {
        let mut stream = match Stream::server(socket, &self.security, CONNECT_LIMIT) {
            Ok(stream) => stream,
            Err(error) => return tracing::warn!(%error, "a peer was turned away"),
        };
        let peer = stream.peer_name().cloned();
        let asked = hear::<Ask>(&mut stream, CONNECT_LIMIT)
            .map_err(|error| format!("it does not ask for a runner: {error}"));
        let answer = match asked.and_then(|ask| self.runner_for(&ask, peer.as_ref())) {
            Ok(address) => Answer::Runner(address),
            Err(why) => {
                tracing::info!(why, "no runner for a peer");
                Answer::Refused(why)
            }
        };
        if let Err(error) = say(&mut stream, &answer).and_then(|()| stream.finish()) {
            tracing::warn!(%error, "a peer did not hear the answer");
        }
    }

    /// Where a runner waits for the machine.
    fn runner_for(&self, ask: &Ask, peer: Option<&HostName>) -> Result<SocketAddr, String> {
        let from = HostName::new(&ask.host).map_err(|error| error.to_string())?;
        if let Some(proved) = peer.filter(|proved| **proved != from) {
            return Err(format!(
                "the peer says it is \"{from}\", but its certificate is \"{proved}\"'s"
            ));
        }
        check_name(&ask.machine)?;
        let config =
            run::config(&ask.machine, &self.args.on, self.args.package.clone(), self.state);
        let mut config = config.map_err(|error| format!("{error:#}"))?;
        config.accepts(&from)?;
        config.listen = Some(SocketAddr::new(self.address.ip(), 0));
        config.wait_ms = Some(self.args.wait.unwrap_or(WAIT).as_millis() as u64);
        let dir = MachineDir::at(&self.state.state, &ask.machine);
        let _one = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        match status(&dir) {
            Some(Status { state, listen: Some(address), .. }) if state == "standby" => {
                return Ok(address);
            }
            Some(status) => {
                return Err(format!("\"{}\" is {} there already", ask.machine, status.state));
            }
            None => {}
        }
        let folder = dir.root().to_owned();
        MachineDir::create(&self.state.state, &ask.machine).map_err(|e| e.to_string())?;
        let start = Spawned { config, launch: Launch::Receive };
        let mut child =
            spawned::spawn(&start, &folder, self.state).map_err(|error| format!("{error:#}"))?;
        let pid = child.id();
        tracing::info!(machine = ask.machine, %from, pid, "a runner was started");
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Ok(Some(ended)) = child.try_wait() {
                return Err(format!("its runner ended ({ended}): {}", spawned::last_words(&dir)));
            }
            let found = status(&dir).filter(|status| status.runner_pid == pid);
            if let Some(address) = found.and_then(|status| status.listen) {
                reap(child, ask.machine.clone());
                return Ok(address);
            }
            if Instant::now() > deadline {
                let _ = child.kill().and_then(|()| child.wait());
                return Err(format!("its runner was not ready within {START_LIMIT:?}"));
            }
            thread::sleep(LOOK);
        }
    }
}

fn status(dir: &MachineDir) -> Option<Status> {
    let mut client = Client::connect(&dir.socket()).ok()?;
    client.set_deadline(Some(START_LIMIT)).ok()?;
    client.get(&Request::Status).ok()
}

/// Waits for a runner's end, whenever that is.
fn reap(mut child: std::process::Child, machine: String) {
    let reaping = thread::Builder::new().name("reap".into()).spawn(move || match child.wait() {
        Ok(ended) if ended.success() => tracing::info!(machine, "its runner has ended"),
        Ok(ended) => tracing::warn!(machine, %ended, "its runner has ended"),
        Err(error) => tracing::warn!(machine, %error, "its runner's end is not known"),
    });
    if let Err(error) = reaping {
        tracing::warn!(%error, "an ended runner stays a zombie until this ends");
    }
}
