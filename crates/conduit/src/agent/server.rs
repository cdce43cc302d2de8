//! The agent's socket for runners: one thread per connection, one line a question, one line an
//! answer. Only this user may connect; whoever may is trusted with all machines of the host.

use super::Shared;
use crate::{
    datapath::{MachineNet, NetError},
    exec::KernelError,
    wire::{self, Answer, Ask},
};
use std::{
    io::BufReader,
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// More than the machines that fit on a host.
const CONNECTIONS: usize = 1024;
/// How long an answer may wait to be taken.
const WRITE_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait that a runner may ask for.
const WAIT_LIMIT: Duration = Duration::from_secs(60);

/// Makes the socket (a stale one is replaced, one in use is refused) and answers on it.
pub(super) fn serve(path: &Path, shared: Arc<Shared>) -> Result<(), KernelError> {
    let listener = listen(path)?;
    spawn("agent-listen", move || {
        let open = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                thread::sleep(Duration::from_millis(50));
                continue;
            };
            if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS {
                tracing::warn!(limit = CONNECTIONS, "too many connections, one refused");
                open.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (shared, open) = (shared.clone(), open.clone());
            spawn("agent-runner", move || {
                if let Err(error) = converse(&stream, &shared) {
                    tracing::debug!(%error, "a runner's connection ended");
                }
                open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    Ok(())
}

/// A unix socket for this user alone, in place of one that nobody listens on any more.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, KernelError> {
    let fail = |e: std::io::Error| KernelError::new(format!("listen on {}", path.display()), e);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(fail)?;
    }
    if UnixStream::connect(path).is_ok() {
        return Err(KernelError::new(
            format!("listen on {}", path.display()),
            "another one is running and answers there",
        ));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(fail)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    Ok(listener)
}

pub(crate) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) {
    if let Err(error) = thread::Builder::new().name(name.to_owned()).spawn(run) {
        tracing::error!(thread = name, %error, "no thread, so this is not done");
    }
}

fn converse(stream: &UnixStream, shared: &Shared) -> std::io::Result<()> {
    stream.set_write_timeout(Some(WRITE_LIMIT))?;
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    while let Some(ask) = wire::receive::<Ask>(&mut reader)? {
        let (asked, operation) = (Instant::now(), ask.operation());
        let changed = ask.changes().cloned();
        let answer = answer(shared, ask);
        let done = !matches!(answer, Answer::Failed(_));
        let sent = wire::send(&mut writer, &answer);
        shared.changes.count(operation, done, asked);
        // A machine may stand still until it is answered; nobody else is in such a hurry.
        if let Some(net) = changed {
            shared.tell(&net, done);
        }
        sent?;
    }
    Ok(())
}

impl Ask {
    /// Its name among what is counted.
    fn operation(&self) -> &'static str {
        match self {
            Self::Prepare { .. } => "prepare",
            Self::Divert { .. } => "divert",
            Self::Drained { .. } => "drained",
            Self::Resume { .. } => "resume",
            Self::Forget { .. } => "forget",
            _ => "",
        }
    }

    /// The machine whose way it changes.
    fn changes(&self) -> Option<&MachineNet> {
        match self {
            Self::Prepare { net, .. } | Self::Divert { net, .. } | Self::Resume { net, .. } => {
                Some(net)
            }
            _ => None,
        }
    }
}

fn answer(shared: &Shared, ask: Ask) -> Answer {
    let done = match ask {
        Ask::Endpoint => return Answer::Endpoint(shared.this.overlay),
        Ask::Status => return Answer::Status(shared.status()),
        Ask::Machines { after } => return Answer::Machines(shared.machines_after(after)),
        Ask::Address { machine, network } => {
            return match shared.address(&machine, network) {
                Ok((address, address_v6)) => Answer::Address { address, address_v6 },
                Err(error) => Answer::Failed(error),
            };
        }
        Ask::Drain { to, .. } => {
            return Answer::Failed(NetError::Failed {
                machine: String::new(),
                operation: format!("drain to {to}"),
                detail: "this is a host's agent; ask the edge (--socket)".into(),
            });
        }
        Ask::Rotate => return crate::secure::rotate(shared.secure.as_deref()),
        Ask::Prepare { net, blackout_ms } => {
            let blackout = blackout_ms.map(Duration::from_millis);
            return match shared.prepare(&net, blackout) {
                Ok(name) => Answer::Tap(name),
                Err(error) => Answer::Failed(error),
            };
        }
        Ask::Divert { net, to, epoch } => shared.divert(&net, to, epoch),
        Ask::Drained { net, epoch } => {
            shared.follow(net.key(), epoch);
            shared.drained(net.key(), epoch);
            shared.say(net.key(), epoch);
            Ok(())
        }
        Ask::Resume { net, epoch } => shared.resume(&net, epoch),
        Ask::Settled { net, epoch, limit_ms } => {
            shared.settled(&net, epoch, Duration::from_millis(limit_ms).min(WAIT_LIMIT))
        }
        Ask::Forget { net, epoch } => shared.forget(&net, epoch),
    };
    match done {
        Ok(()) => Answer::Done,
        Err(error) => Answer::Failed(error),
    }
}
