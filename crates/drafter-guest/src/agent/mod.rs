//! The agent: answers the host over the guest channel.
//!
//! It runs as its own process below the init, which starts it again if it ends; so a fault in it
//! costs a conversation and never the machine. One thread reads the port and answers what is quick;
//! hooks, probes and commands get a thread each, at most [`MAX_WORKERS`] at once. All that a
//! conversation asked for ends with it, except hooks, which always run to their end or limit.

mod identity;
mod link;
mod platform;
mod port;
mod work;

pub use platform::{Machine, Platform};
pub use port::Port;

pub use identity::IDENTITY_FILE;

pub(crate) use platform::ENTRY_FILE;

use crate::{
    config::{InstanceConfig, MACHINE_CONFIG_PATH, MachineConfig},
    log::say,
    process::Cancel,
    protocol::{
        Decoded, Failure, FailureCode, GuestMessage, HostMessage, PROTOCOL_VERSION,
        line::{Line, LineReader},
    },
};
use link::{Conversation, Link};
use std::{
    collections::HashMap,
    io,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// How many hooks, probes and commands run at once.
pub const MAX_WORKERS: usize = 32;

/// How long the agent waits for its port to appear.
const PORT_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait for bytes; there is nothing to do in between, it only bounds the wait.
const IDLE: Duration = Duration::from_secs(3600);

/// The agent's program: reads the machine's files and serves the port until it is gone.
#[must_use]
pub fn main() -> ExitCode {
    let config = match std::fs::read(MACHINE_CONFIG_PATH) {
        Ok(bytes) => MachineConfig::from_json(&bytes).map_err(|error| error.to_string()),
        Err(error) => Err(format!("{MACHINE_CONFIG_PATH}: {error}")),
    };
    let config = config.unwrap_or_else(|error| {
        say!("agent without hooks and probes: {error}");
        MachineConfig::new(Vec::new())
    });
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let booted = InstanceConfig::parse(&line).unwrap_or_default();
    let port = match port::open_within(PORT_LIMIT) {
        Ok(port) => port,
        Err(error) => {
            say!("no agent: {error}");
            // The init tries again later; not at once, because nothing changes quickly.
            return ExitCode::FAILURE;
        }
    };
    match serve(port, config, Arc::new(Machine::new(booted))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say!("the guest channel broke: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves `port` until no host can come any more (which a virtio port never says).
///
/// # Errors
/// When the port itself fails.
pub fn serve(port: Port, config: MachineConfig, platform: Arc<dyn Platform>) -> io::Result<()> {
    let agent = Arc::new(Agent { config, platform, jobs: Mutex::default() });
    let link = Link::new(port);
    // A host that talked to the agent before this one learns that it must begin anew. If no host
    // is there, nobody needs to learn it.
    if !link.port.wait(false, Duration::ZERO)?.hung_up {
        link.begin().send(&GuestMessage::Started {});
        link.end();
    }
    let served = read_port(&agent, &link);
    link.end();
    agent.cancel_commands(None);
    served
}

fn read_port(agent: &Arc<Agent>, link: &Arc<Link>) -> io::Result<()> {
    let mut lines = LineReader::new();
    let mut conversation = None;
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let ready = link.port.wait(false, IDLE)?;
        if !ready.readable && !ready.hung_up {
            continue;
        }
        match link.port.read(&mut buffer)? {
            None if ready.hung_up => {}
            None => continue,
            Some(0) => {}
            Some(read) => {
                lines.push(&buffer[..read]);
                while let Some(line) = lines.next_line() {
                    agent.take_line(link, &mut conversation, line);
                }
                continue;
            }
        }
        if !link.port.hang_up_lasts(true)? {
            continue;
        }
        // No host is connected and all it had written is read.
        link.end();
        agent.cancel_commands(None);
        conversation = None;
        lines.reset();
        if !link.port.wait_for_host()? {
            return Ok(());
        }
    }
}

struct Agent {
    config: MachineConfig,
    platform: Arc<dyn Platform>,
    jobs: Mutex<Jobs>,
}

#[derive(Default)]
struct Jobs {
    workers: usize,
    /// Running commands by conversation and request.
    commands: HashMap<(u64, u64), Arc<Cancel>>,
}

impl Agent {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        // Nobody panics with the lock held; and if so, the counts are still right.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills all commands but those of the conversation `keep`.
    fn cancel_commands(&self, keep: Option<u64>) {
        for ((conversation, _), cancel) in &self.jobs().commands {
            if Some(*conversation) != keep {
                cancel.cancel();
            }
        }
    }

    fn take_line(
        self: &Arc<Self>,
        link: &Arc<Link>,
        conversation: &mut Option<Conversation>,
        line: Line,
    ) {
        let Line::Text(text) = line else {
            say!("the host sent a line that is too long; it was dropped");
            return;
        };
        match (HostMessage::decode(&text), &*conversation) {
            (Ok(Decoded::Known(HostMessage::Hello { version, nonce })), _) => {
                let new = link.begin();
                self.cancel_commands(Some(new.number()));
                if version != PROTOCOL_VERSION {
                    say!("the host speaks version {version}, this agent {PROTOCOL_VERSION}");
                }
                let agent = env!("CARGO_PKG_VERSION").to_owned();
                new.send(&GuestMessage::Hello { version: PROTOCOL_VERSION, nonce, agent });
                // With another version nothing else is understood.
                *conversation = (version == PROTOCOL_VERSION).then_some(new);
            }
            // The rest of a line or a request of a conversation that is over.
            (_, None) => {}
            (Ok(Decoded::Known(message)), Some(present)) => self.answer(present, message),
            (Ok(Decoded::Unknown { name, id: Some(id) }), Some(present)) => {
                let message = format!("this agent does not know \"{name}\"");
                fail(present, id, FailureCode::Unsupported, message);
            }
            (Ok(Decoded::Unknown { name, id: None }), _) => ignored(&name),
            (Err(error), Some(present)) => {
                say!("{error}");
                // Without an id there is nobody to tell.
                #[derive(serde::Deserialize)]
                struct Id {
                    id: u64,
                }
                if let Ok(Id { id }) = serde_json::from_slice(&text) {
                    fail(present, id, FailureCode::Invalid, error.to_string());
                }
            }
        }
    }

    fn answer(self: &Arc<Self>, to: &Conversation, message: HostMessage) {
        match message {
            // Taken care of by `take_line`.
            HostMessage::Hello { .. } => {}
            HostMessage::Ping { id } => {
                to.send(&GuestMessage::Done { id });
            }
            HostMessage::Status { id } => {
                let uptime_ms = self.platform.uptime().as_millis() as u64;
                to.send(&GuestMessage::Status { id, entry: self.platform.entry(), uptime_ms });
            }
            HostMessage::BeforeSuspend { id, sync } => {
                self.spawn(to, id, move |agent, to| agent.before_suspend(to, id, sync));
            }
            HostMessage::AfterResume { id, wall_clock_ns, entropy, host_name } => {
                // The quick parts here and now, so that no other request sees the old clock.
                let refreshed = self.refresh(wall_clock_ns, &entropy, host_name.as_deref());
                let hook = self.config.hooks.after_resume.is_some();
                self.after(hook, to, id, move |agent, to| agent.after_resume(to, id, refreshed));
            }
            HostMessage::Become { id, wall_clock_ns, entropy, identity } => {
                let became = self.become_another(wall_clock_ns, &entropy, &identity);
                let hooks = &self.config.hooks;
                let hook = hooks.after_fork.is_some() || hooks.after_resume.is_some();
                self.after(hook, to, id, move |agent, to| agent.after_fork(to, id, became));
            }
            HostMessage::Probe { id, kind } => {
                self.spawn(to, id, move |agent, to| agent.probe(to, id, kind));
            }
            HostMessage::Exec { id, exec } => match Cancel::new() {
                Ok(cancel) => {
                    let cancel = Arc::new(cancel);
                    let key = (to.number(), id);
                    self.jobs().commands.insert(key, Arc::clone(&cancel));
                    let started = self.spawn(to, id, move |agent, to| {
                        agent.exec(to, id, &exec, &cancel);
                        agent.jobs().commands.remove(&key);
                    });
                    if !started {
                        self.jobs().commands.remove(&key);
                    }
                }
                Err(error) => fail(to, id, FailureCode::System, format!("no descriptor: {error}")),
            },
            HostMessage::Cancel { id, exec } => {
                if let Some(cancel) = self.jobs().commands.get(&(to.number(), exec)) {
                    cancel.cancel();
                }
                to.send(&GuestMessage::Done { id });
            }
            HostMessage::Shutdown { id } => match self.platform.shut_down() {
                Ok(()) => {
                    to.send(&GuestMessage::Done { id });
                }
                Err(error) => {
                    fail(to, id, FailureCode::System, format!("cannot tell the init: {error}"));
                }
            },
        }
    }

    /// Where the package has a `hook` for it, on its own thread. Without one, here and now: a new thread is
    /// an eighth of the code that a copy runs until it has its identity, and a translator begins with none.
    fn after(
        self: &Arc<Self>,
        hook: bool,
        to: &Conversation,
        id: u64,
        work: impl FnOnce(&Self, &Conversation) + Send + 'static,
    ) {
        if hook {
            self.spawn(to, id, work);
        } else {
            work(self, to);
        }
    }

    /// Runs `work` on its own thread, or answers that there are too many.
    fn spawn(
        self: &Arc<Self>,
        to: &Conversation,
        id: u64,
        work: impl FnOnce(&Self, &Conversation) + Send + 'static,
    ) -> bool {
        {
            let mut jobs = self.jobs();
            if jobs.workers >= MAX_WORKERS {
                drop(jobs);
                let message = format!("{MAX_WORKERS} commands run already; try again later");
                fail(to, id, FailureCode::Busy, message);
                return false;
            }
            jobs.workers += 1;
        }
        let (agent, conversation) = (Arc::clone(self), to.clone());
        let spawned = std::thread::Builder::new().name(format!("work-{id}")).spawn(move || {
            work(&agent, &conversation);
            agent.jobs().workers -= 1;
        });
        if let Err(error) = &spawned {
            self.jobs().workers -= 1;
            fail(to, id, FailureCode::Busy, format!("no thread for it: {error}"));
        }
        spawned.is_ok()
    }
}

/// Says that an unknown message was ignored.
fn ignored(name: &str) {
    say!("the host sent \"{name}\"; ignored");
}

fn fail(to: &Conversation, id: u64, code: FailureCode, message: impl Into<String>) {
    to.send(&GuestMessage::Failed { id, failure: Failure { code, message: message.into() } });
}

#[cfg(test)]
mod tests;
