//! `receive`: a runner that waits for one machine, or (`--any`) one place on this host where others ask
//! for such runners.
//!
//! ```text
//!   other host's runner ──Ask { machine }──▶ receive --any ──starts──▶ a runner, which waits for it
//!                       ◀──where it listens──┘                            │
//!                       ──────────────── the move, as ever ──────────────▶│
//! ```
//!
//! With a store (`--store`), a machine that another host has put to sleep there is woken here when that host
//! asks for it: `Wake { machine }` starts a runner as `drafter resume --store` would, and is answered when
//! the machine runs. And what is there of a machine that comes is brought from it. The store, its keys and
//! its credentials are this host's.
//!
//! What must hold: nobody gets a runner whose host is not accepted; of one machine there is one runner; a
//! runner whose machine does not come ends by itself; nobody has a machine woken that another host put to
//! sleep; and this process may end or be killed at any time, runners go on.

use super::{
    StateArgs,
    backup::{self, parse_time},
    output,
    run::{self, HostArgs},
    spawned::{self, Spawned},
};
use crate::{
    migrate::{
        link::CONNECT_LIMIT,
        reception::{Answer, Ask, Asked, Offers, say},
    },
    runner::{
        api::{Client, Request, Status},
        config::{Launch, RestoreFrom, RunnerConfig, StoreAt},
        free_memory,
        state::{MachineDir, check_name},
    },
};
use anyhow::{Context, bail};
use clap::Args;
use identity::{HostName, Security, Stream};
use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::Child,
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
/// How long a machine may take to wake until whoever asked is told that it takes long; it goes on.
const WAKE_LIMIT: Duration = Duration::from_secs(75);
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
    /// Bring from this store what it has of a machine that comes, so that it need not be sent (`migrate
    /// --from-store`, `evacuate --store`). With --any also wake machines that other hosts put to sleep there,
    /// when they ask for it. s3://bucket/folder?endpoint=…&region=…, gs://…, az://… or file:///folder;
    /// credentials come from the provider's usual variables, as AWS_ACCESS_KEY_ID
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// The file with the keys to that store; without it the variable SILO_KEYS holds them
    #[arg(long, value_name = "FILE", env = "SILO_KEY_FILE")]
    keys: Option<PathBuf>,
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
            config.bring_from = args.store_at()?;
            run::start(config, Launch::Receive, args.on.detach)
        }
        None => serve(args, state),
    }
}

/// What all who ask have in common.
struct Reception<'a> {
    args: &'a ReceiveArgs,
    state: &'a StateArgs,
    /// That of a runner of no machine.
    config: RunnerConfig,
    security: Security,
    address: SocketAddr,
    /// Where it wakes machines from, and brings what is there of those that come.
    sleeps: Option<StoreAt>,
    /// One runner is started at a time: two who ask for one machine get the same.
    starting: Mutex<()>,
    asking: AtomicUsize,
}

impl ReceiveArgs {
    /// The store of the flags, if one is named.
    fn store_at(&self) -> anyhow::Result<Option<StoreAt>> {
        let Some(store) = self.store.clone() else { return Ok(None) };
        let keys = self.keys.as_ref().map(std::path::absolute).transpose()?;
        backup::check_store(&store, keys.as_deref())?;
        Ok(Some(StoreAt { store, keys }))
    }
}

/// What a machine sleeps as in a store that `host` put to sleep.
fn asleep(from: &StoreAt, machine: &str, host: &HostName) -> RestoreFrom {
    RestoreFrom {
        store: from.store.clone(),
        line: backup::sleeps_line(machine),
        generation: None,
        keys: from.keys.clone(),
        take_from: None,
        lazy: true,
        suspended: true,
        slept_at: Some(host.as_str().to_owned()),
        copy: None,
    }
}

fn serve(args: &ReceiveArgs, state: &StateArgs) -> anyhow::Result<()> {
    // Whatever is wrong with the flags shows now. (The name is nobody's.)
    let config = run::config("any", &args.on, args.package.clone(), state)?;
    let sleeps = args.store_at()?;
    let security = config.security.load(&HostName::new(&config.host)?)?;
    let address = config.listen.context("it listens nowhere")?;
    let listener = TcpListener::bind(address)
        .with_context(|| format!("listening for other hosts on {address}"))?;
    let address = listener.local_addr()?;
    output::say(&format!("host \"{}\" takes machines at {address}", config.host));
    let reception = Reception {
        args,
        state,
        config,
        security,
        address,
        sleeps,
        starting: Mutex::new(()),
        asking: AtomicUsize::new(0),
    };
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
        let asked = Asked::hear(&mut stream, CONNECT_LIMIT)
            .map_err(|error| format!("it does not ask for a runner: {error}"));
        let found = asked.and_then(|asked| match asked {
            Asked::ToTake(ask) => self.runner_for(&ask, peer.as_ref()).map(Answer::Runner),
            Asked::ToWake(ask) => self.wake(&ask, peer.as_ref()).map(Answer::Runner),
            Asked::ToLook(host) => self.offers(&host, peer.as_ref()).map(Answer::Offers),
        });
        let answer = found.unwrap_or_else(|why| {
            tracing::info!(why, "nothing for a peer");
            Answer::Refused(why)
        });
        if let Err(error) = say(&mut stream, &answer).and_then(|()| stream.finish()) {
            tracing::warn!(%error, "a peer did not hear the answer");
        }
    }

    /// The host that asks, if its machines are taken.
    fn who_asks(&self, host: &str, peer: Option<&HostName>) -> Result<HostName, String> {
        let from = HostName::new(host).map_err(|error| error.to_string())?;
        if let Some(proved) = peer.filter(|proved| **proved != from) {
            return Err(format!(
                "the peer says it is \"{from}\", but its certificate is \"{proved}\"'s"
            ));
        }
        self.config.accepts(&from)?;
        Ok(from)
    }

    /// What this host has for machines of the host that asks.
    fn offers(&self, host: &str, peer: Option<&HostName>) -> Result<Offers, String> {
        self.who_asks(host, peer)?;
        let memory_bytes = free_memory().ok_or("the kernel does not say how much memory it has")?;
        // What survives the loss of its host has its generations there, as well.
        let store = self.sleeps.is_some() || self.config.protect.is_some();
        Ok(Offers { memory_bytes, store })
    }

    /// What a runner of the machine is started with, if whoever asks may have one.
    fn config(
        &self,
        ask: &Ask,
        peer: Option<&HostName>,
    ) -> Result<(RunnerConfig, HostName), String> {
        let from = self.who_asks(&ask.host, peer)?;
        check_name(&ask.machine)?;
        let config =
            run::config(&ask.machine, &self.args.on, self.args.package.clone(), self.state);
        let mut config = config.map_err(|error| format!("{error:#}"))?;
        config.listen = Some(SocketAddr::new(self.address.ip(), 0));
        // Until it has had the machine; from then on it waits for it to come back.
        config.wait_ms = Some(self.args.wait.unwrap_or(WAIT).as_millis() as u64);
        config.bring_from = self.sleeps.clone();
        Ok((config, from))
    }

    /// Where a runner waits for the machine.
    fn runner_for(&self, ask: &Ask, peer: Option<&HostName>) -> Result<SocketAddr, String> {
        let (config, from) = self.config(ask, peer)?;
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
        let (child, address) = self.start(config, Launch::Receive, &from)?;
        reap(child, ask.machine.clone());
        Ok(address)
    }

    /// Wakes the machine that the other host has put to sleep; where its runner listens.
    fn wake(&self, ask: &Ask, peer: Option<&HostName>) -> Result<SocketAddr, String> {
        let (config, from) = self.config(ask, peer)?;
        let sleeps = self.sleeps.as_ref().ok_or(
            "it was given no store to wake machines from (`receive --any --store URL --keys FILE`)",
        )?;
        let dir = MachineDir::at(&self.state.state, &ask.machine);
        let (mut child, address) = {
            let _one = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(status) = status(&dir) {
                Self::end_waiting(&dir, &status)?;
            }
            let launch = Launch::Restore(asleep(sleeps, &ask.machine, &from));
            self.start(config, launch, &from)?
        };
        // Others are attended to meanwhile.
        let deadline = Instant::now() + WAKE_LIMIT;
        loop {
            if let Ok(Some(ended)) = child.try_wait() {
                return Err(format!("its runner ended ({ended}): {}", spawned::last_words(&dir)));
            }
            if status(&dir)
                .is_some_and(|now| now.state == "running" && now.runner_pid == child.id())
            {
                reap(child, ask.machine.clone());
                return Ok(address);
            }
            if Instant::now() > deadline {
                // By now it may have taken the lease: it is not ended.
                reap(child, ask.machine.clone());
                return Err(format!(
                    "it does not run within {WAKE_LIMIT:?}; its runner goes on (`drafter status {}` there)",
                    ask.machine
                ));
            }
            thread::sleep(LOOK);
        }
    }

    /// Ends a runner that waits here for this very machine, which comes from the store now.
    fn end_waiting(dir: &MachineDir, status: &Status) -> Result<(), String> {
        if status.state != "standby" {
            return Err(format!("\"{}\" is {} there already", status.machine, status.state));
        }
        let lives = || matches!(dir.read_record(), Ok(Some(record)) if record.alive());
        let end = || -> Result<String, crate::runner::api::ClientError> {
            let mut client = Client::connect(&dir.socket())?;
            client.set_deadline(Some(START_LIMIT))?;
            client.get(&Request::Stop { grace_s: 0 })
        };
        end().map_err(|error| format!("its runner there does not end: {error}"))?;
        let deadline = Instant::now() + START_LIMIT;
        while lives() {
            if Instant::now() > deadline {
                return Err(format!("its runner there has not ended within {START_LIMIT:?}"));
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Starts a runner; returns when it listens, and where.
    fn start(
        &self,
        config: RunnerConfig,
        launch: Launch,
        from: &HostName,
    ) -> Result<(Child, SocketAddr), String> {
        let machine = config.machine.clone();
        let dir = MachineDir::create(&self.state.state, &machine).map_err(|e| e.to_string())?;
        let start = Spawned { config, launch };
        let mut child =
            spawned::spawn(&start, dir.root(), self.state).map_err(|error| format!("{error:#}"))?;
        let pid = child.id();
        tracing::info!(machine, %from, pid, "a runner was started");
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Ok(Some(ended)) = child.try_wait() {
                return Err(format!("its runner ended ({ended}): {}", spawned::last_words(&dir)));
            }
            let found = status(&dir).filter(|status| status.runner_pid == pid);
            if let Some(address) = found.and_then(|status| status.listen) {
                return Ok((child, address));
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
fn reap(mut child: Child, machine: String) {
    let reaping = thread::Builder::new().name("reap".into()).spawn(move || match child.wait() {
        Ok(ended) if ended.success() => tracing::info!(machine, "its runner has ended"),
        Ok(ended) => tracing::warn!(machine, %ended, "its runner has ended"),
        Err(error) => tracing::warn!(machine, %error, "its runner's end is not known"),
    });
    if let Err(error) = reaping {
        tracing::warn!(%error, "an ended runner stays a zombie until this ends");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Command;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Typed {
        #[command(subcommand)]
        command: Command,
    }

    fn typed(words: &[&str]) -> Result<ReceiveArgs, String> {
        let all = ["drafter", "receive", "--listen", "127.0.0.1:0", "--package", "p"];
        match Typed::try_parse_from([&all, words].concat()) {
            Ok(Typed { command: Command::Receive(args) }) => Ok(args),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn a_store_is_read_with_its_keys_and_only_what_the_host_that_asks_put_to_sleep_is_woken() {
        let folder = tempfile::tempdir().unwrap();
        assert!(typed(&["--store", "file:///s"]).unwrap_err().contains("<NAME>"));
        assert!(typed(&["--any"]).unwrap().store_at().unwrap().is_none());
        let keys = folder.path().join("keys").display().to_string();
        for who in ["--any", "redis"] {
            let args = typed(&[who, "--store", "file:///s", "--keys", &keys]).unwrap();
            let why = args.store_at().err().unwrap().to_string();
            assert!(why.contains(&keys), "{why}");
        }
        let store = StoreAt { store: "file:///s".into(), keys: None };
        let from = asleep(&store, "redis", &HostName::new("a").unwrap());
        assert_eq!(from.line, "machines/redis.suspended");
        assert_eq!((from.suspended, from.slept_at.as_deref()), (true, Some("a")));
        assert_eq!((from.generation, from.take_from), (None, None));
    }
}
