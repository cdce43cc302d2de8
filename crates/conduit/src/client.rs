//! The runner's end: asks the agent of its host over a unix socket, and does what only the process
//! that runs the machine can do (open the tap, drain it).
//!
//! An agent that restarts in the middle of a question is asked again on a new connection, within
//! the same deadline: every question may be asked twice.

use crate::{
    datapath::{DataPath, HostEndpoint, MachineNet, NetError, NetworkId, Tap},
    tap,
    wire::{self, Answer, Ask, Drained, Status},
};
use std::{
    io::{self, BufReader},
    net::{Ipv4Addr, Ipv6Addr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// How long a quick question may take, restarts of the agent included.
const QUICK: Duration = Duration::from_secs(2);
/// How long set-up and removal may take.
const SLOW: Duration = Duration::from_secs(20);
/// Between two attempts to reach an agent that is not there.
const RETRY: Duration = Duration::from_millis(20);

/// The data path of a host with an agent. Must be used in the host's network namespace (the tap is
/// opened there).
pub struct AgentDataPath {
    socket: PathBuf,
    endpoint: Ipv4Addr,
    /// Kept open, so that the first question of a move finds it warm.
    connection: Mutex<Option<Connection>>,
}

struct Connection {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Connection {
    fn open(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        Ok(Self { reader: BufReader::new(stream.try_clone()?), stream })
    }

    fn ask(&mut self, ask: &Ask, deadline: Instant) -> io::Result<Answer> {
        let left = deadline.saturating_duration_since(Instant::now());
        // A timeout of zero is refused by the standard library.
        let left = Some(left.max(Duration::from_millis(1)));
        self.stream.set_read_timeout(left)?;
        self.stream.set_write_timeout(left)?;
        wire::send(&mut self.stream, ask)?;
        wire::receive(&mut self.reader)?.ok_or_else(|| {
            io::Error::new(io::ErrorKind::UnexpectedEof, "the agent ended the connection")
        })
    }
}

/// Asks the agent or edge on a socket how it is, on a connection of its own; for commands.
pub fn status(socket: &Path) -> io::Result<Status> {
    let hint = |e: io::Error| {
        io::Error::new(
            e.kind(),
            format!("no answer on {}: {e}; is an agent or edge running here?", socket.display()),
        )
    };
    let mut connection = Connection::open(socket).map_err(hint)?;
    let unexpected = |other| Err(io::Error::other(format!("an unexpected answer: {other:?}")));
    let mut status = match connection.ask(&Ask::Status, Instant::now() + QUICK).map_err(hint)? {
        Answer::Status(status) => status,
        other => return unexpected(other),
    };
    while status.machines.len() < status.machine_count {
        let after = status.machines.last().map(|m| wire::cursor(&m.net));
        match connection.ask(&Ask::Machines { after }, Instant::now() + QUICK).map_err(hint)? {
            // Some may have gone meanwhile.
            Answer::Machines(more) if more.is_empty() => break,
            Answer::Machines(more) => status.machines.extend(more),
            other => return unexpected(other),
        }
    }
    Ok(status)
}

/// Asks the edge on a socket to hand its homes over, and waits for it; for commands.
pub(crate) fn drain(socket: &Path, order: &Ask, limit: Duration) -> io::Result<Vec<Drained>> {
    let hint = |e: io::Error| {
        let socket = socket.display();
        io::Error::new(e.kind(), format!("no answer on {socket}: {e}; is an edge running here?"))
    };
    let mut connection = Connection::open(socket).map_err(hint)?;
    match connection.ask(order, Instant::now() + limit + SLOW).map_err(hint)? {
        Answer::Drained(drained) => Ok(drained),
        Answer::Failed(error) => Err(io::Error::other(error)),
        other => Err(io::Error::other(format!("an unexpected answer: {other:?}"))),
    }
}

/// Asks the agent or edge on a socket to change keys; for commands.
pub(crate) fn rotate(socket: &Path) -> io::Result<()> {
    let hint = |e: io::Error| {
        let socket = socket.display();
        io::Error::new(
            e.kind(),
            format!("no answer on {socket}: {e}; is an agent or edge running here?"),
        )
    };
    let mut connection = Connection::open(socket).map_err(hint)?;
    match connection.ask(&Ask::Rotate, Instant::now() + QUICK).map_err(hint)? {
        Answer::Done => Ok(()),
        Answer::Failed(error) => Err(io::Error::other(error)),
        other => Err(io::Error::other(format!("an unexpected answer: {other:?}"))),
    }
}

impl AgentDataPath {
    /// Connects to the agent on this host.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let mut this = Self {
            socket: socket.to_owned(),
            endpoint: Ipv4Addr::UNSPECIFIED,
            connection: Mutex::default(),
        };
        match this.exchange(&Ask::Endpoint, QUICK)? {
            Answer::Endpoint(address) => this.endpoint = address,
            other => return Err(io::Error::other(format!("an unexpected answer: {other:?}"))),
        }
        Ok(this)
    }

    fn exchange(&self, ask: &Ask, limit: Duration) -> io::Result<Answer> {
        let deadline = Instant::now() + limit;
        let mut slot = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        self.retry(&mut slot, ask, deadline)
    }

    fn retry(
        &self,
        slot: &mut Option<Connection>,
        ask: &Ask,
        deadline: Instant,
    ) -> io::Result<Answer> {
        loop {
            let attempt = match slot.take() {
                Some(connection) => Ok(connection),
                None => Connection::open(&self.socket),
            };
            let error = match attempt {
                Ok(mut connection) => match connection.ask(ask, deadline) {
                    Ok(answer) => {
                        *slot = Some(connection);
                        return Ok(answer);
                    }
                    Err(e) => e,
                },
                Err(e) => e,
            };
            if Instant::now() + RETRY >= deadline {
                let text = format!(
                    "the network agent did not answer on {} in time: {error}; see that `conduit \
                     agent` runs on this host",
                    self.socket.display()
                );
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            thread::sleep(RETRY);
        }
    }

    fn prepare_within(
        &self,
        net: &MachineNet,
        blackout: Option<Duration>,
    ) -> Result<Tap, NetError> {
        let name = self.ask_to_prepare(net, blackout)?;
        tap::open(&name).map_err(|e| NetError::failed(net, format!("open tap {name}"), e))
    }

    /// Returns the name of its tap.
    fn ask_to_prepare(
        &self,
        net: &MachineNet,
        blackout: Option<Duration>,
    ) -> Result<String, NetError> {
        let what = "prepare its network";
        let blackout_ms = blackout.map(|b| u64::try_from(b.as_millis()).unwrap_or(u64::MAX));
        match self.ask(net, what, &Ask::Prepare { net: net.clone(), blackout_ms }, SLOW)? {
            Answer::Tap(name) => Ok(name),
            other => Err(NetError::failed(net, what, format!("unexpected answer {other:?}"))),
        }
    }

    /// The addresses of a machine that comes without any, for its life: the edge gives them, and the same
    /// ones whenever it is asked for that name again.
    pub fn address(
        &self,
        machine: &str,
        network: NetworkId,
    ) -> Result<(Ipv4Addr, Option<Ipv6Addr>), NetError> {
        let fail = |detail: String| NetError::failed_for(machine, "get it an address", detail);
        let ask = Ask::Address { machine: machine.to_owned(), network };
        match self.exchange(&ask, SLOW) {
            Ok(Answer::Address { address, address_v6 }) => Ok((address, address_v6)),
            Ok(Answer::Failed(error)) => Err(error),
            Ok(other) => Err(fail(format!("an unexpected answer: {other:?}"))),
            Err(e) => Err(fail(e.to_string())),
        }
    }

    fn ask(
        &self,
        net: &MachineNet,
        what: &str,
        ask: &Ask,
        limit: Duration,
    ) -> Result<Answer, NetError> {
        match self.exchange(ask, limit) {
            Ok(Answer::Failed(error)) => Err(error),
            Ok(answer) => Ok(answer),
            Err(e) => Err(NetError::failed(net, what, e)),
        }
    }
}

impl DataPath for AgentDataPath {
    fn endpoint(&self) -> HostEndpoint {
        HostEndpoint(self.endpoint)
    }

    fn prepare(&self, net: &MachineNet) -> Result<Tap, NetError> {
        self.prepare_within(net, None)
    }

    fn prepare_for(&self, net: &MachineNet, blackout: Duration) -> Result<Tap, NetError> {
        self.prepare_within(net, Some(blackout))
    }

    fn expect(&self, net: &MachineNet, blackout: Duration) -> Result<(), NetError> {
        self.ask_to_prepare(net, Some(blackout)).map(drop)
    }

    fn divert(&self, net: &MachineNet, to: &HostEndpoint, epoch: u64) -> Result<(), NetError> {
        let ask = Ask::Divert { net: net.clone(), to: to.0, epoch };
        self.ask(net, &format!("send its frames to {}", to.0), &ask, QUICK).map(drop)
    }

    fn pause(
        &self,
        net: &MachineNet,
        tap: &Tap,
        to: &HostEndpoint,
        epoch: u64,
    ) -> Result<u64, NetError> {
        self.divert(net, to, epoch)?;
        let drained = tap::drain(tap)
            .map_err(|e| NetError::failed(net, format!("drain tap {}", tap.name), e));
        // Drained or not, the edge is to send its frames to their owner.
        let ask = Ask::Drained { net: net.clone(), epoch };
        self.ask(net, "tell the edge", &ask, QUICK)?;
        Ok(drained?.forwarded)
    }

    fn resume(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        let ask = Ask::Resume { net: net.clone(), epoch };
        self.ask(net, "take its frames", &ask, QUICK).map(drop)
    }

    /// On a connection of its own: a long wait here delays no other call.
    fn settled(&self, net: &MachineNet, epoch: u64, limit: Duration) -> Result<(), NetError> {
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let ask = Ask::Settled { net: net.clone(), epoch, limit_ms };
        let what = format!("wait for the edge to confirm epoch {epoch}");
        match self.retry(&mut None, &ask, Instant::now() + limit + QUICK) {
            Ok(Answer::Failed(error)) => Err(error),
            Ok(_) => Ok(()),
            Err(e) => Err(NetError::failed(net, what, e)),
        }
    }

    fn forget(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        self.ask(net, "forget it", &Ask::Forget { net: net.clone(), epoch }, SLOW).map(drop)
    }
}
