//! How the tunnel is asked: one JSON object a line over a unix socket (mode 0600), one line as the
//! answer. The thread here talks to people and agents; the tunnel's loop answers between packets.

use crate::{PeerConfig, PublicKey, TunnelError, sys};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Read, Write},
    net::SocketAddr,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    sync::mpsc,
    thread,
    time::Duration,
};

/// Version of what is said here, and of what is handed over.
pub(crate) const VERSION: u32 = 1;
/// Longest line.
const LIMIT: u64 = 8 << 20;
/// How long somebody may take to say or hear a line.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the tunnel is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Ask {
    /// How is it?
    Status,
    /// These are the peers from now on.
    Peers {
        /// All of them.
        peers: Vec<PeerConfig>,
    },
    /// Make a new key pair and use it with everybody who knows it.
    Rotate,
    /// Hand everything to the process that asks.
    Upgrade {
        /// See [`VERSION`].
        version: u32,
    },
    /// End.
    Stop {
        /// And take the interface away.
        remove: bool,
    },
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// See [`Ask::Status`].
    Status(Box<Status>),
    /// The descriptors follow with this line.
    Handed(Handed),
    /// Not done, and why.
    Failed(String),
}

/// What is said with the descriptors: the tun device, the outer socket, the control socket, and one
/// for datagrams that belong to sessions of the process that hands over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handed {
    /// The interface's name.
    pub interface: String,
    /// Its MTU may become no larger.
    pub mtu: u32,
    /// Peers with a session: the new process gets one with each before it sends.
    pub live: Vec<String>,
}

/// The tunnel as people see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The interface's name.
    pub interface: String,
    /// Its MTU.
    pub mtu: u32,
    /// Where it listens.
    pub listen: SocketAddr,
    /// Its process.
    pub process: u32,
    /// Its keys, the newest first; two while they are changed.
    pub keys: Vec<PublicKey>,
    /// For how many seconds the older key has been in use.
    pub key_age: u64,
    /// The peers.
    pub peers: Vec<PeerStatus>,
    /// What was counted.
    pub counts: BTreeMap<String, u64>,
}

/// A peer in a [`Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// What it is called, and so on.
    #[serde(flatten)]
    pub config: PeerConfig,
    /// Where it is.
    pub at: Option<SocketAddr>,
    /// Seconds since the last handshake; nothing if there is no session.
    pub handshake: Option<u64>,
    /// Its key in use.
    pub key: Option<PublicKey>,
    /// Our key in use with it.
    pub own: Option<PublicKey>,
    /// What a packet on the way to it may measure, if that is known.
    pub path: Option<u32>,
}

/// A question for the loop, with the way back.
pub(crate) struct Question {
    pub(crate) ask: Ask,
    pub(crate) from: UnixStream,
    pub(crate) reply: mpsc::SyncSender<Reply>,
}

/// The loop's answer.
pub(crate) enum Reply {
    Say(Answer),
    /// The connection is the loop's now, until it says that this process keeps the tunnel.
    Handing(mpsc::Receiver<Kept>),
}

/// A hand-over was given up: this process goes on.
pub(crate) struct Kept;

/// Makes the control socket, in place of one that nobody answers on any more.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, TunnelError> {
    let fail = |e| TunnelError::system(format!("listen on {}", path.display()))(e);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(fail)?;
    }
    if UnixStream::connect(path).is_ok() {
        return Err(TunnelError::invalid(
            format!("listen on {}", path.display()),
            "a tunnel answers there already; start with --upgrade to take its place",
        ));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(fail)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    Ok(listener)
}

/// Answers on `listener` until the process ends or the tunnel is handed over; `wake` makes the loop
/// look at its questions.
pub(crate) fn serve(
    listener: UnixListener,
    questions: mpsc::Sender<Question>,
    wake: impl Fn() + Send + 'static,
) -> io::Result<()> {
    let run = move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                thread::sleep(Duration::from_millis(50));
                continue;
            };
            match converse(&stream, &questions, &wake) {
                // Waiting for the outcome, so that nobody else is answered meanwhile.
                Ok(Some(outcome)) if outcome.recv().is_err() => return,
                Err(error) => tracing::debug!(%error, "a connection ended"),
                Ok(_) => {}
            }
        }
    };
    thread::Builder::new().name("control".into()).spawn(run).map(drop)
}

fn converse(
    stream: &UnixStream,
    questions: &mpsc::Sender<Question>,
    wake: &impl Fn(),
) -> io::Result<Option<mpsc::Receiver<Kept>>> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut line = String::new();
        if (&mut reader).take(LIMIT).read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let ask = match serde_json::from_str(&line) {
            Ok(ask) => ask,
            Err(e) => {
                say(stream, &Answer::Failed(format!("not a question: {e}")))?;
                continue;
            }
        };
        let (reply, answer) = mpsc::sync_channel(1);
        let gone = |_| io::Error::other("the tunnel has ended");
        let question = Question { ask, from: stream.try_clone()?, reply };
        questions.send(question).map_err(|_| io::Error::other("the tunnel has ended"))?;
        wake();
        match answer.recv().map_err(gone)? {
            Reply::Say(answer) => say(stream, &answer)?,
            Reply::Handing(outcome) => return Ok(Some(outcome)),
        }
    }
}

pub(crate) fn say(mut stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    stream.write_all(&line(answer)?)
}

fn line(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// Says that the tunnel is handed over, with its descriptors.
pub(crate) fn hand(
    to: &UnixStream,
    handed: Handed,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let line = line(&Answer::Handed(handed))?;
    // The line may be longer than the socket's buffer; its first byte carries the descriptors.
    sys::send_with_descriptors(to.as_fd(), &line[..1], descriptors)?;
    let mut to = to;
    to.write_all(&line[1..])
}

fn connect(path: &Path, ask: &Ask) -> Result<UnixStream, TunnelError> {
    let fail = |e| TunnelError::system(format!("ask the tunnel at {}", path.display()))(e);
    let mut stream = UnixStream::connect(path).map_err(fail)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(fail)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(fail)?;
    stream.write_all(&line(ask).map_err(fail)?).map_err(fail)?;
    Ok(stream)
}

/// Asks a running tunnel something.
pub fn ask(path: &Path, ask: &Ask) -> Result<Answer, TunnelError> {
    let fail = |e| TunnelError::system(format!("hear the tunnel at {}", path.display()))(e);
    let mut line = String::new();
    let stream = connect(path, ask)?;
    BufReader::new(stream).take(LIMIT).read_line(&mut line).map_err(fail)?;
    serde_json::from_str(&line).map_err(|e| {
        TunnelError::invalid(format!("the answer of the tunnel at {}", path.display()), e)
    })
}

/// Asks for something that is only done or not.
pub fn tell(path: &Path, what: &Ask) -> Result<(), TunnelError> {
    match ask(path, what)? {
        Answer::Done => Ok(()),
        Answer::Failed(why) => {
            Err(TunnelError::invalid(format!("the tunnel at {}", path.display()), why))
        }
        other => Err(TunnelError::invalid("the tunnel's answer", format!("{other:?}"))),
    }
}

/// Asks how a tunnel is.
pub fn status(path: &Path) -> Result<Status, TunnelError> {
    match ask(path, &Ask::Status)? {
        Answer::Status(status) => Ok(*status),
        other => Err(TunnelError::invalid("the tunnel's answer", format!("{other:?}"))),
    }
}

/// Asks a running tunnel to hand itself over.
pub(crate) fn take(path: &Path) -> Result<(UnixStream, Handed, Vec<OwnedFd>), TunnelError> {
    let fail = |e| TunnelError::system(format!("take over the tunnel at {}", path.display()))(e);
    let stream = connect(path, &Ask::Upgrade { version: VERSION })?;
    let mut first = [0];
    let (size, descriptors) =
        sys::receive_with_descriptors(stream.as_fd(), &mut first).map_err(fail)?;
    let mut line = first[..size].to_vec();
    // Byte by byte: what follows the line is not ours to read yet.
    let mut byte = [0];
    while line.last() != Some(&b'\n') && (line.len() as u64) < LIMIT {
        (&stream).read_exact(&mut byte).map_err(fail)?;
        line.push(byte[0]);
    }
    match serde_json::from_slice(&line) {
        Ok(Answer::Handed(handed)) if descriptors.len() == sys::DESCRIPTORS => {
            Ok((stream, handed, descriptors))
        }
        Ok(Answer::Failed(why)) => {
            Err(TunnelError::invalid(format!("the tunnel at {}", path.display()), why))
        }
        other => Err(TunnelError::invalid("the tunnel's answer", format!("{other:?}"))),
    }
}
