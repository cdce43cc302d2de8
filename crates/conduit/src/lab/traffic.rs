//! What clients and servers of tests and benchmarks do: TCP echoes and UDP datagrams, one a
//! millisecond, and what they saw of it. What goes wrong here is a panic: a rig's own sockets work.

use nix::sys::socket::{setsockopt, sockopt};
use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// TCP that met an outage tries again at the latest when as much time has passed again: an outage of 10 s
/// on a computer with too much to do is felt for 20.
const WAIT: Duration = Duration::from_secs(30);
const EVERY: Duration = Duration::from_millis(1);
/// Who has heard nothing for so long hears no more.
const QUIET: Duration = Duration::from_millis(1500);

/// Answers every connection with what it sends. Ends with the process.
pub fn serve_echo(listener: TcpListener) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            thread::spawn(move || {
                let _ = stream.set_nodelay(true);
                let mut buffer = [0; 4096];
                while let Ok(size @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..size]).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// Collects the numbers of datagrams that arrive.
#[derive(Clone, Default)]
pub struct Received(Arc<Mutex<BTreeSet<u64>>>);

impl Received {
    /// Starts to collect.
    pub fn collect(socket: UdpSocket) -> Self {
        // The test is of the network, not of a guest's small socket buffer.
        setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20)).expect("a rig's own call works");
        Self::collect_as_usual(socket)
    }

    /// Likewise, with the buffer that every socket has.
    pub fn collect_as_usual(socket: UdpSocket) -> Self {
        let this = Self::default();
        let received = this.clone();
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok(size) = socket.recv(&mut buffer) {
                if let Some(number) = buffer[..size].first_chunk() {
                    received
                        .0
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .insert(u64::from_be_bytes(*number));
                }
            }
        });
        this
    }

    /// How many have arrived.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.count(0..u64::MAX)
    }

    fn count(&self, numbers: std::ops::Range<u64>) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).range(numbers).count() as u64
    }
}

/// A stream of numbered echoes over one TCP connection, one a millisecond.
pub struct Echoes {
    stop: Arc<AtomicBool>,
    threads: (JoinHandle<io::Result<u64>>, JoinHandle<io::Result<Vec<Instant>>>),
    answered: Arc<AtomicU64>,
}

/// What a client saw.
#[derive(Debug)]
pub struct Seen {
    /// Echoes asked for.
    pub sent: u64,
    /// Echoes that came.
    pub answered: u64,
    /// The longest time without an answer.
    pub gap: Duration,
}

impl Echoes {
    /// Connects in the calling thread's namespace and starts.
    pub fn start(address: SocketAddr) -> Self {
        let stream = TcpStream::connect_timeout(&address, WAIT).expect("the machine is reached");
        stream.set_nodelay(true).expect("a rig's own call works");
        stream.set_read_timeout(Some(WAIT)).expect("a rig's own call works");
        stream.set_write_timeout(Some(WAIT)).expect("a rig's own call works");
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let (mut writer, mut reader) =
            (stream.try_clone().expect("a rig's own call works"), stream);
        let (stopping, count) = (stop.clone(), answered.clone());
        let send = thread::spawn(move || {
            let mut next = Instant::now();
            let mut sent = 0_u64;
            while !stopping.load(Ordering::Relaxed) {
                writer.write_all(&sent.to_be_bytes())?;
                sent += 1;
                next += EVERY;
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            writer.shutdown(std::net::Shutdown::Write)?;
            Ok(sent)
        });
        let receive = thread::spawn(move || {
            let mut times = vec![Instant::now()];
            let mut number = [0; 8];
            loop {
                match reader.read_exact(&mut number) {
                    Ok(()) => {}
                    Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(times),
                    Err(e) => return Err(e),
                }
                assert_eq!(u64::from_be_bytes(number), times.len() as u64 - 1, "in order, whole");
                times.push(Instant::now());
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { stop, threads: (send, receive), answered }
    }

    /// Waits until echoes flow.
    pub fn wait(&self, more: u64) {
        self.wait_or(more, String::new);
    }

    /// Likewise; `why` is asked if none come.
    pub fn wait_or(&self, more: u64, why: impl FnOnce() -> String) {
        let want = self.answered.load(Ordering::Relaxed) + more;
        let flows = || self.answered.load(Ordering::Relaxed) >= want;
        assert!(super::wait_for(WAIT, flows), "no echoes: {}", why());
    }

    /// Ends cleanly; a connection that was reset or stalled is an error here.
    pub fn finish(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self
            .threads
            .0
            .join()
            .expect("its thread ended well")
            .expect("the stream was not broken");
        let times = self
            .threads
            .1
            .join()
            .expect("its thread ended well")
            .expect("the stream was not broken");
        let gap = times.windows(2).map(|w| w[1] - w[0]).max().unwrap_or_default();
        Seen { sent, answered: times.len() as u64 - 1, gap }
    }
}

/// Numbered datagrams, a thousand a second unless told otherwise.
pub struct Datagrams {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
    first: u64,
    sent: Arc<AtomicU64>,
}

/// Each stream has numbers of its own.
static NEXT_STREAM: AtomicU64 = AtomicU64::new(0);

impl Datagrams {
    /// Starts in the calling thread's namespace.
    pub fn start(to: SocketAddr) -> Self {
        Self::start_at(to, EVERY)
    }

    /// Likewise, one every so often: for processors that are slow.
    pub fn start_at(to: SocketAddr, every: Duration) -> Self {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0)).expect("a rig's own call works");
        socket.connect(to).expect("a rig's own call works");
        let stop = Arc::new(AtomicBool::new(false));
        let first = NEXT_STREAM.fetch_add(1, Ordering::Relaxed) << 32;
        let stopping = stop.clone();
        let counted = Arc::new(AtomicU64::new(0));
        let counting = counted.clone();
        let thread = thread::spawn(move || {
            let mut next = Instant::now();
            let mut sent = 0_u64;
            while !stopping.load(Ordering::Relaxed) {
                socket.send(&(first + sent).to_be_bytes()).expect("a rig's own call works");
                sent += 1;
                counting.store(sent, Ordering::Relaxed);
                next += every;
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            sent
        });
        Self { stop, thread, first, sent: counted }
    }

    /// How many were sent so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Waits until `more` were sent.
    pub fn wait(&self, more: u64) {
        let want = self.sent() + more;
        assert!(super::wait_for(WAIT, || self.sent() >= want), "no datagrams are sent");
    }

    /// Ends, and says how many were sent and how many did not arrive.
    pub fn finish(self, received: &Received) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.thread.join().expect("its thread ended well");
        let arrived = || received.count(self.first..self.first + sent);
        // What is late on a busy computer is not lost: until nothing comes any more.
        let (mut before, mut since) = (arrived(), Instant::now());
        super::wait_for(WAIT, || {
            let now = arrived();
            if now > before {
                (before, since) = (now, Instant::now());
            }
            now >= sent || since.elapsed() > QUIET
        });
        (sent, sent - arrived())
    }
}

/// Sends as fast as it goes until told to stop. Returns the bytes sent.
pub fn flood(to: SocketAddr, stop: Arc<AtomicBool>) -> JoinHandle<u64> {
    flood_at(to, stop, None)
}

/// Likewise, at most so many bytes a second; what could not be sent in time is sent after.
pub fn flood_at(to: SocketAddr, stop: Arc<AtomicBool>, rate: Option<u64>) -> JoinHandle<u64> {
    let mut stream = TcpStream::connect_timeout(&to, WAIT).expect("the machine is reached");
    stream.set_write_timeout(Some(WAIT)).expect("a rig's own call works");
    stream.set_read_timeout(Some(WAIT)).expect("a rig's own call works");
    thread::spawn(move || {
        let data = vec![7; 128 * 1024];
        let (start, mut sent) = (Instant::now(), 0);
        while !stop.load(Ordering::Relaxed) {
            if let Some(rate) = rate {
                let due = Duration::from_secs_f64(sent as f64 / rate as f64);
                thread::sleep((start + due).saturating_duration_since(Instant::now()));
            }
            let data = if rate.is_some() { &data[..16 * 1024] } else { &data };
            sent += stream.write(data).expect("a rig's own call works") as u64;
        }
        stream.shutdown(std::net::Shutdown::Write).expect("a rig's own call works");
        assert_eq!(
            stream.read(&mut [0]).expect("a rig's own call works"),
            0,
            "the other end has it all"
        );
        sent
    })
}

/// What this socket sends may not be cut on its way, nor here.
pub fn never_cut(socket: &UdpSocket) {
    crate::sys::never_cut(socket).expect("a rig's own call works");
}

/// TCP segments that this namespace has sent again so far.
pub fn retransmits() -> u64 {
    let text =
        std::fs::read_to_string("/proc/thread-self/net/snmp").expect("a rig's own call works");
    let mut lines = text.lines().filter(|l| l.starts_with("Tcp:"));
    let (names, values) = (
        lines.next().expect("a rig's own call works"),
        lines.next().expect("a rig's own call works"),
    );
    let at =
        names.split_whitespace().position(|n| n == "RetransSegs").expect("a rig's own call works");
    values
        .split_whitespace()
        .nth(at)
        .expect("a rig's own call works")
        .parse()
        .expect("a rig's own call works")
}

/// Takes one connection to its end. Returns its bytes and the longest silence.
pub fn swallow(listener: &TcpListener) -> (u64, Duration) {
    let (mut stream, _) = listener.accept().expect("a rig's own call works");
    stream.set_read_timeout(Some(WAIT)).expect("a rig's own call works");
    let mut buffer = vec![0; 256 * 1024];
    let (mut bytes, mut gap, mut last) = (0, Duration::ZERO, Instant::now());
    loop {
        let size = stream.read(&mut buffer).expect("a rig's own call works");
        gap = gap.max(last.elapsed());
        last = Instant::now();
        if size == 0 {
            return (bytes, gap);
        }
        bytes += size as u64;
    }
}
