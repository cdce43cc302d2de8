//! Devices that can be slow, stuck or lose their power, and helpers around other people's programs.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use silo_block::io::{Allocation, BlockDevice, Extent};
use silo_expose::nbd::{
    Endpoint, ExportOptions, Exports, NbdClient, NbdClientOptions, NbdOptions, NbdServer,
};
use std::{
    fs::OpenOptions,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

pub const LIMIT: Duration = Duration::from_secs(30);
const BLOCK: usize = 4096;

struct Image {
    now: Vec<u8>,
    /// What a power cut would leave.
    durable: Vec<u8>,
    /// Blocks that were never written, or trimmed.
    holes: Vec<bool>,
}

/// Memory that knows what is durable, and waits when it is told to.
pub struct Ram {
    image: Mutex<Image>,
    pub flushes: AtomicU64,
    pub reads: AtomicU64,
    stuck: Mutex<bool>,
    waiting: AtomicU64,
    freed: Condvar,
    interruptible: AtomicBool,
    interrupts: AtomicU64,
    pub read_only: bool,
    pub full: AtomicBool,
}

impl Ram {
    pub fn new(bytes: usize) -> Self {
        Self {
            image: Mutex::new(Image {
                now: vec![0; bytes],
                durable: vec![0; bytes],
                holes: vec![true; bytes.div_ceil(BLOCK)],
            }),
            flushes: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            stuck: Mutex::new(false),
            waiting: AtomicU64::new(0),
            freed: Condvar::new(),
            interruptible: AtomicBool::new(true),
            interrupts: AtomicU64::new(0),
            read_only: false,
            full: AtomicBool::new(false),
        }
    }

    pub fn read_only(bytes: Vec<u8>) -> Self {
        let device = Self { read_only: true, ..Self::new(bytes.len()) };
        *device.image.lock().unwrap() =
            Image { durable: bytes.clone(), holes: vec![false; bytes.len()], now: bytes };
        device
    }

    /// From now on every request waits.
    pub fn stick(&self, interruptible: bool) {
        self.interruptible.store(interruptible, Ordering::SeqCst);
        *self.stuck.lock().unwrap() = true;
    }

    /// Waits until a request waits.
    pub fn await_waiting(&self) {
        let start = Instant::now();
        while self.waiting.load(Ordering::SeqCst) == 0 {
            assert!(start.elapsed() < LIMIT, "no request waits");
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn free(&self) {
        *self.stuck.lock().unwrap() = false;
        self.freed.notify_all();
    }

    pub fn now(&self) -> Vec<u8> {
        self.image.lock().unwrap().now.clone()
    }

    pub fn durable(&self) -> Vec<u8> {
        self.image.lock().unwrap().durable.clone()
    }

    /// What was not flushed is gone.
    pub fn cut_power(&self) {
        let mut image = self.image.lock().unwrap();
        image.now = image.durable.clone();
    }

    fn pass(&self) -> io::Result<()> {
        let before = self.interrupts.load(Ordering::SeqCst);
        let mut stuck = self.stuck.lock().unwrap();
        while *stuck {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            stuck = self.freed.wait_timeout(stuck, Duration::from_millis(5)).unwrap().0;
            let interrupted = self.interrupts.load(Ordering::SeqCst) != before;
            if interrupted && self.interruptible.load(Ordering::SeqCst) {
                return Err(io::Error::other("interrupted"));
            }
        }
        Ok(())
    }

    fn change(&self, offset: u64, length: u64, work: impl FnOnce(&mut [u8])) -> io::Result<()> {
        self.pass()?;
        if self.read_only {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        if self.full.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let range = offset as usize..(offset + length) as usize;
        let mut image = self.image.lock().unwrap();
        work(&mut image.now[range.clone()]);
        if !range.is_empty() {
            image.holes[range.start / BLOCK..=(range.end - 1) / BLOCK].fill(false);
        }
        Ok(())
    }
}

impl BlockDevice for Ram {
    fn size(&self) -> u64 {
        self.image.lock().unwrap().now.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.pass()?;
        self.reads.fetch_add(1, Ordering::Relaxed);
        let at = offset as usize;
        buf.copy_from_slice(&self.image.lock().unwrap().now[at..at + buf.len()]);
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if *self.stuck.lock().unwrap() {
            return Ok(false);
        }
        self.read_at(offset, buf).map(|()| true)
    }

    fn may_wait(&self, _offset: u64, _length: u64) -> bool {
        *self.stuck.lock().unwrap()
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(offset, data.len() as u64, |bytes| bytes.copy_from_slice(data))
    }

    fn flush(&self) -> io::Result<()> {
        self.pass()?;
        let mut image = self.image.lock().unwrap();
        image.durable = image.now.clone();
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length, false)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.change(offset, length, |bytes| bytes.fill(0))?;
        if !allocate {
            let from = (offset as usize).div_ceil(BLOCK);
            let to = (offset + length) as usize / BLOCK;
            if from < to {
                self.image.lock().unwrap().holes[from..to].fill(true);
            }
        }
        Ok(())
    }

    fn interrupt(&self) {
        self.interrupts.fetch_add(1, Ordering::SeqCst);
        self.freed.notify_all();
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        let image = self.image.lock().unwrap();
        let (mut at, end, mut runs) = (offset, offset + length, Vec::<Extent>::new());
        while at < end {
            let block = at as usize / BLOCK;
            let next = end.min((block as u64 + 1) * BLOCK as u64);
            let allocation = if image.holes[block] { Allocation::Hole } else { Allocation::Data };
            match runs.last_mut() {
                Some(run) if run.allocation == allocation => run.length += next - at,
                _ => runs.push(Extent { length: next - at, allocation }),
            }
            at = next;
        }
        Ok(runs)
    }

    fn zeroes_fast(&self) -> bool {
        true
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }
}

pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut random = Random(seed | 1);
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        out.extend(random.next().to_le_bytes());
    }
    out.truncate(bytes);
    out
}

/// xorshift64*
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A server on a unix socket in a folder of its own.
pub struct Rig {
    pub dir: tempfile::TempDir,
    pub exports: Arc<Exports>,
    pub server: Option<NbdServer>,
    options: NbdOptions,
}

impl Rig {
    pub fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self::with(device, NbdOptions::default())
    }

    pub fn with(device: Arc<dyn BlockDevice>, options: NbdOptions) -> Self {
        let exports = Arc::new(Exports::new());
        exports.add("", device, ExportOptions::default()).unwrap();
        Self::serving(exports, options)
    }

    pub fn serving(exports: Arc<Exports>, options: NbdOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut rig = Self { dir, exports, server: None, options };
        rig.start();
        rig
    }

    pub fn start(&mut self) {
        let endpoint = self.endpoint();
        let server = NbdServer::serve(&endpoint, self.exports.clone(), self.options.clone());
        self.server = Some(server.unwrap());
    }

    /// As a process that is killed: nothing is answered any more.
    pub fn kill(&mut self) {
        drop(self.server.take());
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd")
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint::Unix(self.socket())
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub fn client(&self, options: NbdClientOptions) -> NbdClient {
        NbdClient::connect(&self.endpoint(), options).unwrap()
    }
}

/// Notes that a program is missing, as `make test` wants it, unless it is there.
pub fn have(program: &str, package: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .any(|dir| dir.join(program).exists());
    if !found {
        note(&format!("{program}: install the package {package}"));
    }
    found
}

fn note(line: &str) {
    eprintln!("missing capability: {line}");
    let Some(path) = std::env::var_os("ARCHITECT_MISSING").filter(|path| !path.is_empty()) else {
        return;
    };
    let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
    file.write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// Runs a program, which must succeed, and gives what it prints.
pub fn tool(program: &str, arguments: &[&str]) -> String {
    let (fine, text) = try_tool(program, arguments);
    assert!(fine, "{program} {arguments:?}: {text}");
    text
}

/// Runs a program for at most [`LIMIT`]; whether it succeeded, and what it prints.
pub fn try_tool(program: &str, arguments: &[&str]) -> (bool, String) {
    // Debian's own Python, which has Debian's libnbd, before any other.
    let path = format!("/usr/bin:/usr/sbin:{}", std::env::var("PATH").unwrap_or_default());
    let output = Command::new("timeout")
        .env("PATH", path)
        .arg(LIMIT.as_secs().to_string())
        .arg(program)
        .args(arguments)
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    (output.status.success(), text)
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A child process that dies with the test.
pub struct Process(pub Child);

impl Process {
    /// Starts a server that makes `socket`, and waits for it.
    pub fn server(program: &str, arguments: &[&str], socket: &Path) -> Self {
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let process = Self(child);
        wait_for(program, || std::os::unix::net::UnixStream::connect(socket).is_ok());
        process
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "{what} takes too long");
        thread::sleep(Duration::from_millis(2));
    }
}
