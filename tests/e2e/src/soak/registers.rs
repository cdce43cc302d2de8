//! Clients that write and read registers in a machine's Redis, and keep what they asked for and were told
//! for [`check`](super::history::check). Each waits for its answer before it asks again; one that gets
//! none in time, or loses its connection, does not know what became of a write, and makes a new one.

use super::{
    history::{Did, NOTHING, Operation},
    plan::Random,
};
use std::{
    collections::HashMap,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How long an answer is waited for. A machine that stands still for longer makes outcomes unknown, which
/// is right, and many of them prove little.
const ANSWER: Duration = Duration::from_secs(20);
/// Clients of one machine.
const CLIENTS: u64 = 3;
/// Registers of one machine.
pub const KEYS: u16 = 6;
/// Mean time between an answer and the next question.
const THINK_MS: u64 = 15;
/// Longest line and value that is taken.
const LONGEST: u64 = 64;

/// Makes a connection to the machine's Redis.
pub type Connect = dyn Fn() -> io::Result<TcpStream> + Send + Sync;

/// See the module. Dropping it ends it.
pub struct Registers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    machine: u16,
    /// The history's beginning.
    origin: Instant,
    stop: AtomicBool,
    answered: AtomicU64,
    unknown: AtomicU64,
    /// How often all had to hang up.
    turn: AtomicU64,
    /// The connections, to hang up.
    open: Mutex<HashMap<u64, TcpStream>>,
    history: Mutex<Vec<Operation>>,
}

impl Registers {
    /// Starts the clients of a machine.
    #[must_use]
    pub fn start(machine: u16, origin: Instant, seed: u64, connect: &Arc<Connect>) -> Self {
        let shared = Arc::new(Shared {
            machine,
            origin,
            stop: AtomicBool::new(false),
            answered: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
            turn: AtomicU64::new(0),
            open: Mutex::default(),
            history: Mutex::default(),
        });
        let client = |number: u64| {
            let (shared, connect) = (Arc::clone(&shared), Arc::clone(connect));
            let random = Random::new(seed ^ (u64::from(machine) << 32) ^ number);
            let values = Values { next: 0, number };
            thread::spawn(move || shared.serve(&*connect, random, values))
        };
        let threads = (0..CLIENTS).map(client).collect();
        Self { shared, threads }
    }

    /// Waits for `more` answers from now on; false if they do not come in time.
    #[must_use]
    pub fn wait_for(&self, more: u64, limit: Duration) -> bool {
        let answered = || self.shared.answered.load(Ordering::Relaxed);
        let (goal, deadline) = (answered() + more, Instant::now() + limit);
        while answered() < goal {
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Answers so far, and writes of which nobody knows what became of them.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (load(&self.shared.answered), load(&self.shared.unknown))
    }

    /// Hangs up: what is asked for after the returned time is asked on new connections. For a machine that
    /// is not as its connections know it.
    #[must_use]
    pub fn hang_up(&self) -> u64 {
        self.shared.turn.fetch_add(1, Ordering::SeqCst);
        let now = self.shared.now();
        for stream in self.shared.connections().values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        now
    }

    /// Ends; what was asked for and told.
    #[must_use]
    pub fn finish(mut self) -> Vec<Operation> {
        self.end();
        std::mem::take(&mut self.shared.history.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for client in self.threads.drain(..) {
            client.thread().unpark();
            let _ = client.join();
        }
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        self.end();
    }
}

/// Values that no other client writes.
struct Values {
    next: u64,
    number: u64,
}

impl Values {
    fn take(&mut self) -> u64 {
        self.next += 1;
        self.next * CLIENTS + self.number
    }
}

impl Shared {
    fn now(&self) -> u64 {
        1 + self.origin.elapsed().as_nanos() as u64
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn note(&self, operation: Operation) {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).push(operation);
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<u64, TcpStream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, connect: &Connect, mut random: Random, mut values: Values) {
        while self.goes_on() {
            let served = connect().and_then(|stream| self.talk(stream, &mut random, &mut values));
            self.connections().remove(&values.number);
            if served.is_err() {
                thread::park_timeout(Duration::from_millis(20));
            }
        }
    }

    /// Asks until an answer does not come or makes no sense.
    fn talk(&self, stream: TcpStream, random: &mut Random, values: &mut Values) -> io::Result<()> {
        // Before it can be used, so that nobody misses it.
        let turn = self.turn.load(Ordering::SeqCst);
        self.connections().insert(values.number, stream.try_clone()?);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        let mut stream = BufReader::new(stream);
        while self.goes_on() {
            let key = random.below(u64::from(KEYS)) as u16;
            let writes = random.below(2) == 0;
            let value = if writes { values.take() } else { NOTHING };
            let begun = self.now();
            // Looked at after the time was: who is told to hang up at a time asks nothing later.
            if self.turn.load(Ordering::SeqCst) != turn {
                return Err(io::Error::other("told to hang up"));
            }
            let told = if writes { set(&mut stream, key, value) } else { get(&mut stream, key) };
            let answered = self.now();
            let note = |did, answered| {
                self.note(Operation { machine: self.machine, key, did, begun, answered });
            };
            match told {
                Ok(seen) => {
                    let did = if writes { Did::Wrote(value) } else { Did::Saw(seen) };
                    note(did, Some(answered));
                    self.answered.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    if writes {
                        note(Did::Wrote(value), None);
                        self.unknown.fetch_add(1, Ordering::Relaxed);
                    }
                    return Err(error);
                }
            }
            thread::park_timeout(Duration::from_millis(random.below(2 * THINK_MS)));
        }
        Ok(())
    }
}

fn line(stream: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    stream.take(LONGEST).read_line(&mut line)?;
    match line.strip_suffix("\r\n") {
        Some(line) => Ok(line.to_owned()),
        None => Err(io::Error::other(format!("a line that does not end: {line:?}"))),
    }
}

fn foreign(text: &str) -> io::Error {
    io::Error::other(format!("an answer of {text:?}"))
}

fn set(stream: &mut BufReader<TcpStream>, key: u16, value: u64) -> io::Result<u64> {
    stream.get_mut().write_all(format!("SET register:{key} {value}\r\n").as_bytes())?;
    match line(stream)?.as_str() {
        "+OK" => Ok(value),
        other => Err(foreign(other)),
    }
}

fn get(stream: &mut BufReader<TcpStream>, key: u16) -> io::Result<u64> {
    stream.get_mut().write_all(format!("GET register:{key}\r\n").as_bytes())?;
    let first = line(stream)?;
    if first == "$-1" {
        return Ok(NOTHING);
    }
    if !first.starts_with('$') {
        return Err(foreign(&first));
    }
    let value = line(stream)?;
    value.parse().map_err(|_| foreign(&value))
}

#[cfg(test)]
mod tests {
    use super::{super::history::check, *};
    use std::net::{SocketAddr, TcpListener};

    /// Registers that can be told to forget the newest write, and to hang up before the answer.
    fn server(forgets_every: u64, hangs_up_every: u64) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let content: Arc<Mutex<HashMap<String, String>>> = Arc::default();
        let writes = Arc::new(AtomicU64::new(0));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (content, writes) = (content.clone(), writes.clone());
                thread::spawn(move || {
                    let mut out = stream.try_clone().unwrap();
                    for asked in BufReader::new(stream).lines().map_while(Result::ok) {
                        let words: Vec<&str> = asked.split(' ').collect();
                        let answer = if let ["SET", key, value] = words[..] {
                            let number = writes.fetch_add(1, Ordering::SeqCst) + 1;
                            if !number.is_multiple_of(forgets_every) {
                                content.lock().unwrap().insert(key.to_owned(), value.to_owned());
                            }
                            if number.is_multiple_of(hangs_up_every) {
                                return;
                            }
                            "+OK\r\n".to_owned()
                        } else {
                            let value = content.lock().unwrap().get(words[1]).cloned();
                            value.map_or("$-1\r\n".into(), |v| format!("${}\r\n{v}\r\n", v.len()))
                        };
                        if out.write_all(answer.as_bytes()).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        address
    }

    fn history(address: SocketAddr) -> Vec<Operation> {
        let connect: Arc<Connect> = Arc::new(move || TcpStream::connect(address));
        let registers = Registers::start(3, Instant::now(), 5, &connect);
        assert!(registers.wait_for(400, Duration::from_secs(60)), "{:?}", registers.counts());
        registers.finish()
    }

    #[test]
    fn after_hanging_up_everything_is_asked_on_new_connections() {
        let address = server(u64::MAX, u64::MAX);
        let connected = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&connected);
        let connect: Arc<Connect> = Arc::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
            TcpStream::connect(address)
        });
        let registers = Registers::start(3, Instant::now(), 5, &connect);
        for turn in 1..=20 {
            assert!(registers.wait_for(10, Duration::from_secs(60)), "{:?}", registers.counts());
            let at = registers.hang_up();
            assert!(at > 0);
            let until = Instant::now() + Duration::from_secs(60);
            while connected.load(Ordering::SeqCst) < CLIENTS * (turn + 1) {
                assert!(Instant::now() < until, "a client does not hang up");
                thread::sleep(Duration::from_millis(1));
            }
        }
        assert_eq!(check(&registers.finish()), []);
    }

    #[test]
    fn a_server_that_keeps_what_it_acknowledges_passes_and_one_that_forgets_a_write_does_not() {
        let fine = history(server(u64::MAX, 10));
        assert_eq!(check(&fine), []);
        assert!(fine.iter().any(|operation| operation.answered.is_none()));
        assert!(fine.iter().any(|operation| matches!(operation.did, Did::Saw(1..))));
        assert!(!check(&history(server(20, u64::MAX))).is_empty(), "a lost write is not found");
    }
}
