//! Bars of moves: a memory device goes to another silo over loopback, both ends in this process.
//!
//! A move is timed from its start to the point where the source may go: everything is at the
//! destination, and said to be durable there. After each the devices are compared byte for byte; a
//! figure counts only if they are the same. The baseline is the least that must be done with a
//! byte: a socket, and `UFFDIO_COPY` into memory that nobody has touched.

use super::{Group, Setting};
use anyhow::{Context, ensure};
use bench::{Row, Samples, Target};
use identity::{Authority, HostName, Identity, Security};
use silo::{
    device::DeviceName,
    io::BlockDevice,
    mapped::sys,
    moving::{
        Content, Outbound, Server, Volume,
        destination::{self, Accepted, DestinationHost, Inbound, Offer, Reception},
        peer::{Dial, Limits, Listener},
        report::SourceReport,
        source::{self, Handover, SourceHost, new_session},
    },
    source::MemoryDevice,
};
use std::{
    fs::File,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

pub(super) const GROUPS: &[Group] = &[Group {
    name: "move",
    about: "a memory device moves over loopback, both ends on this host",
    bars: &["silo.move."],
    run,
}];

const MIB: usize = 1 << 20;
const BLOCK: u32 = 4096;
const DEVICE: &str = "memory";
/// Out of ten parts, one is content and nine are what the row is about.
const PARTS: usize = 10;

struct Nobody;

impl SourceHost for Nobody {
    fn quiesce(&self, _: silo::moving::SessionId, _: u32) -> Result<Handover, String> {
        Ok(Handover::default())
    }

    fn resume(&self) {}
}

impl DestinationHost for Nobody {
    fn run(&self, _: u32, _: Vec<u8>, _: Vec<Vec<u64>>) -> Result<(), String> {
        Ok(())
    }
}

/// Takes one volume, once.
struct Taker {
    volume: Arc<Volume>,
    began: Mutex<mpsc::Sender<Arc<Inbound>>>,
}

impl Reception for Taker {
    fn receive(&self, _: &Offer<'_>) -> Result<Accepted, String> {
        Ok(Accepted {
            volumes: vec![self.volume.clone()],
            host: Arc::new(Nobody),
            options: destination::Options::default(),
            running: None,
        })
    }

    fn began(&self, session: &Arc<Inbound>) {
        let began = self.began.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever waits for it may have given up.
        let _ = began.send(session.clone());
    }
}

/// Certificates of two hosts, in a folder of the bench.
struct Hosts {
    _folder: tempfile::TempDir,
    a: Security,
    b: Security,
}

impl Hosts {
    fn new(setting: &Setting) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir_in(&setting.scratch)?;
        let authority = Authority::create(folder.path())?;
        let security = |name: &str| -> anyhow::Result<Security> {
            let name = HostName::new(name)?;
            authority.issue(&name, Duration::from_secs(3600))?;
            Ok(Security::Mutual(Identity::load(folder.path(), &name)?))
        };
        let (a, b) = (security("a")?, security("b")?);
        Ok(Self { _folder: folder, a, b })
    }
}

fn name() -> anyhow::Result<DeviceName> {
    DeviceName::new(DEVICE).context("a device's name")
}

fn device(size: usize) -> anyhow::Result<Arc<MemoryDevice>> {
    Ok(Arc::new(MemoryDevice::new("silo-bench", size as u64)?))
}

fn owned(device: &Arc<MemoryDevice>) -> anyhow::Result<Arc<Volume>> {
    let volume = Volume::owned(name()?, device.clone(), BLOCK, Content::Unknown, new_session()?)?;
    Ok(Arc::new(volume))
}

fn empty(device: &Arc<MemoryDevice>) -> anyhow::Result<Arc<Volume>> {
    Ok(Arc::new(Volume::untouched(name()?, device.clone(), BLOCK, Content::Zeros)?))
}

/// Moves a volume; gives the time until the source may go, and what it says.
fn transfer(
    from: &Arc<Volume>,
    to: &Arc<Volume>,
    ends: (&Security, &Security),
) -> anyhow::Result<(Duration, SourceReport)> {
    let socket = TcpListener::bind("127.0.0.1:0")?;
    let listener = Listener::new(socket, ends.1.clone(), Limits::default(), |_| true)?;
    let (sender, sessions) = mpsc::channel();
    let taker = Taker { volume: to.clone(), began: Mutex::new(sender) };
    let server = Server::new(listener, Arc::new(taker), None)?;
    let dial = Dial::new(server.address(), HostName::new("b")?, ends.0.clone(), Limits::default());
    let begin = Instant::now();
    let options = source::Options::default();
    let outbound = Outbound::start(vec![from.clone()], dial, Arc::new(Nobody), options)?;
    let report = outbound.wait()?;
    let took = begin.elapsed();
    let session = sessions.recv_timeout(Duration::from_secs(10))?;
    session.wait()?;
    Ok((took, report))
}

/// Fails unless both devices hold the same bytes.
fn compare(a: &MemoryDevice, b: &MemoryDevice) -> anyhow::Result<()> {
    let (mut x, mut y) = (vec![0; MIB], vec![0; MIB]);
    for at in (0..a.size()).step_by(MIB) {
        a.read_at(at, &mut x)?;
        b.read_at(at, &mut y)?;
        ensure!(x == y, "the devices differ in the mebibyte at {at}");
    }
    Ok(())
}

/// Bytes that nothing compresses.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word.copy_from_slice(&(mixed ^ (mixed >> 27)).to_le_bytes());
        }
    }
}

/// A device whose mebibytes are made by `make`, which is told their number.
fn made(
    size: usize,
    mut make: impl FnMut(usize, &mut [u8]) -> bool,
) -> anyhow::Result<Arc<MemoryDevice>> {
    let device = device(size)?;
    let mut chunk = vec![0; MIB];
    for number in 0..size / MIB {
        if make(number, &mut chunk) {
            device.write_at((number * MIB) as u64, &chunk)?;
        }
    }
    Ok(device)
}

/// A socket whose bytes are copied into memory that nobody has touched, in GB/s.
fn plain_loop(content: &MemoryDevice) -> anyhow::Result<f64> {
    let size = content.size() as usize;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let file = File::from(sys::memfd("plain", size as u64)?);
    let map = sys::SharedMap::new(&file, size, true)?;
    let from = sys::SharedMap::new(content.file(), size, false)?;
    let device = File::options().read(true).write(true).open("/dev/userfaultfd")?;
    let userfault =
        sys::Userfault::new(sys::new_userfaultfd(&device)?, sys::feature::MISSING_SHMEM)?;
    let base = map.base().as_ptr() as u64;
    userfault.register(base, size as u64, sys::REGISTER_MISSING)?;
    drop(from);
    let began = Instant::now();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let sender = scope.spawn(move || -> io::Result<()> {
            let (mut line, _) = listener.accept()?;
            let mut buffer = vec![0; 256 << 10];
            for at in (0..size).step_by(buffer.len()) {
                content.read_at(at as u64, &mut buffer)?;
                line.write_all(&buffer)?;
            }
            Ok(())
        });
        let mut line = TcpStream::connect(address)?;
        let mut buffer = vec![0; 256 << 10];
        for at in (0..size).step_by(buffer.len()) {
            line.read_exact(&mut buffer)?;
            userfault.copy(base + at as u64, &buffer)?;
        }
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok(())
    })?;
    let took = began.elapsed();
    let (mut x, mut y) = (vec![0; MIB], vec![0; MIB]);
    for at in (0..size as u64).step_by(MIB) {
        content.read_at(at, &mut x)?;
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut y, at)?;
        ensure!(x == y, "the socket brought other bytes");
    }
    Ok(size as f64 / took.as_secs_f64() / 1e9)
}

fn median(values: &[f64]) -> anyhow::Result<f64> {
    Samples::new(values.iter().copied())
        .and_then(|all| all.median())
        .context("nothing was measured")
}

fn run(setting: &Setting) -> anyhow::Result<Vec<Row>> {
    let size = if setting.quick { 512 * MIB } else { 4096 * MIB };
    let times = if setting.quick { 1 } else { 3 };
    let hosts = Hosts::new(setting)?;
    let tls = (&hosts.a, &hosts.b);
    let plain = (&Security::Plaintext, &Security::Plaintext);
    let speed = |took: Duration| size as f64 / took.as_secs_f64() / 1e9;
    let mut noise = Noise(7);
    let mut rows = Vec::new();

    // Once around untimed, so that the host's memory is there.
    let random = made(size, |_, chunk| {
        noise.fill(chunk);
        true
    })?;
    let (mut over_tls, mut over_plain, mut loops) = (Vec::new(), Vec::new(), Vec::new());
    let mut switches = Vec::new();
    for turn in 0..=times {
        for (ends, speeds) in [(tls, &mut over_tls), (plain, &mut over_plain)] {
            let target = device(size)?;
            let (took, report) = transfer(&owned(&random)?, &empty(&target)?, ends)?;
            compare(&random, &target)?;
            ensure!(report.paths.plain == (size / BLOCK as usize) as u64, "{:?}", report.paths);
            if turn > 0 {
                speeds.push(speed(took));
                let switch = report.timings.quiesce + report.timings.switch;
                switches.push(switch.as_secs_f64() * 1e3);
            }
        }
        let reached = plain_loop(&random)?;
        if turn > 0 {
            loops.push(reached);
        }
    }
    let (over_tls, over_plain, reached) =
        (median(&over_tls)?, median(&over_plain)?, median(&loops)?);
    rows.push(Row::judged(
        "silo.move.random.tls",
        over_tls,
        "GB/s",
        None,
        Some(Target::AtLeast(0.8)),
    ));
    rows.push(Row::judged(
        "silo.move.random.plain",
        over_plain,
        "GB/s",
        Some(reached),
        Some(Target::RatioAtLeast(0.7)),
    ));
    rows.push(Row::judged("silo.move.switch", median(&switches)?, "ms", None, None));
    drop(random);

    let sparse = made(size, |number, chunk| {
        noise.fill(chunk);
        number % PARTS == 0
    })?;
    let zeros = made(size, |_, chunk| {
        let content = MIB / PARTS / BLOCK as usize * BLOCK as usize;
        noise.fill(&mut chunk[..content]);
        chunk[content..].fill(0);
        true
    })?;
    for (bar, content, goal) in
        [("silo.move.tracked", sparse, 8.0), ("silo.move.zeros", zeros, 4.0)]
    {
        let mut speeds = Vec::new();
        for turn in 0..=times {
            let target = device(size)?;
            let (took, _) = transfer(&owned(&content)?, &empty(&target)?, plain)?;
            compare(&content, &target)?;
            if turn > 0 {
                speeds.push(speed(took));
            }
        }
        let reached = median(&speeds)?;
        rows.push(Row::judged(bar, reached, "GB/s", None, Some(Target::AtLeast(goal))));
    }
    rows.push(held(size, times, plain, speed)?);
    Ok(rows)
}

/// A device that comes back to a host that still has nine tenths of it.
fn held(
    size: usize,
    times: usize,
    ends: (&Security, &Security),
    speed: impl Fn(Duration) -> f64,
) -> anyhow::Result<Row> {
    let mut noise = Noise(9);
    let (here, there) = (
        made(size, |_, chunk| {
            noise.fill(chunk);
            true
        })?,
        device(size)?,
    );
    let (home, away) = (owned(&here)?, empty(&there)?);
    let mut speeds = Vec::new();
    let mut chunk = vec![0; MIB];
    for _ in 0..=times {
        transfer(&home, &away, ends)?;
        for number in (0..size / MIB).step_by(PARTS) {
            noise.fill(&mut chunk);
            away.write_at((number * MIB) as u64, &chunk)?;
        }
        let (took, report) = transfer(&away, &home, ends)?;
        compare(&here, &there)?;
        ensure!(report.paths.content <= size.div_ceil(PARTS) as u64 + MIB as u64);
        speeds.push(speed(took));
    }
    let reached = median(&speeds)?;
    Ok(Row::judged("silo.move.held", reached, "GB/s", None, Some(Target::AtLeast(8.0))))
}
