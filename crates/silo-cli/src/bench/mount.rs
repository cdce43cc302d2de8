//! Bars of mounts: by round-trip time on the thesis' terms (the backend is memory in this process
//! that answers after a time, as many requests at once as are made, no limit of bandwidth), mapped
//! stores and what tracking them costs.
//!
//! Each read adds up what it reads, and the sums are compared with those of the content; afterwards,
//! untimed, all bytes are compared, so that a figure counts only for the right bytes at their
//! places. Memory is touched before a timed row: what a mount frees is used by the next, and the
//! first one is not counted.

use super::{Group, Setting};
use anyhow::{Context, ensure};
use bench::{Row, Samples, Target};
use identity::{Authority, HostName, Identity, TlsClient};
use nix::sys::signal::{Signal, kill};
use silo::{
    device::DeviceName,
    io::BlockDevice,
    mapped::{
        mount::{Mount, Options, PullFirst},
        sys,
    },
    nbd::{Endpoint, NbdClient, NbdClientOptions},
};
use std::{
    fs::File,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    ptr::NonNull,
    sync::{Arc, RwLock},
    time::{Duration, Instant},
};

pub(super) const GROUPS: &[Group] = &[
    Group {
        name: "mount",
        about: "a device 0, 10 and 40 ms away, as memory here",
        bars: &["silo.mount.first", "silo.mount.read", "silo.mount.write"],
        run: distances,
    },
    Group {
        name: "mount-tls",
        about: "a device of a silo serve in its own process, under mutual TLS, as memory here",
        bars: &["silo.mount.tls"],
        run: remote,
    },
    Group {
        name: "mount-stores",
        about: "stores to mapped memory, and what it costs to see them",
        bars: &["silo.mount.store", "silo.mount.tracking"],
        run: stores,
    },
];

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;

/// Memory that is far away.
struct Distant {
    content: RwLock<Vec<u8>>,
    trip: Duration,
}

impl Distant {
    fn new(bytes: usize, trip: Duration) -> Self {
        let mut content = Vec::with_capacity(bytes);
        let mut state = 1u64;
        while content.len() < bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            content.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
        }
        content.truncate(bytes);
        Self { content: RwLock::new(content), trip }
    }

    fn sum(&self) -> u64 {
        let content = self.content.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        Bytes { base: NonNull::from(&content[0]), len: content.len() }.sum()
    }

    fn content(&self) -> std::sync::RwLockReadGuard<'_, Vec<u8>> {
        self.content.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The answer comes a round trip after the question, and not when the kernel thinks that it is
    /// as good to wake more threads at once (50 µs later by default).
    fn travel(&self) {
        thread_local!(static EXACT: () = {
            // If it fails the trip is longer.
            let _ = nix::sys::prctl::set_timerslack(1);
        });
        if !self.trip.is_zero() {
            EXACT.with(|()| std::thread::sleep(self.trip));
        }
    }
}

impl BlockDevice for Distant {
    fn size(&self) -> u64 {
        self.content().len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.travel();
        let at = offset as usize;
        buf.copy_from_slice(&self.content()[at..at + buf.len()]);
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if self.trip.is_zero() { self.read_at(offset, buf).map(|()| true) } else { Ok(false) }
    }

    fn may_wait(&self, _: u64, _: u64) -> bool {
        !self.trip.is_zero()
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.travel();
        let at = offset as usize;
        let mut content = self.content.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        content[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.travel();
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length, false)
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.write_at(offset, &vec![0; length as usize])
    }
}

/// Mapped bytes, read and written the way a program does.
#[derive(Clone, Copy)]
struct Bytes {
    base: NonNull<u8>,
    len: usize,
}

impl Bytes {
    fn of(mount: &Mount) -> Self {
        Self { base: mount.address(), len: mount.mapped_len() }
    }

    /// Adds up everything, in order.
    fn sum(self) -> u64 {
        // SAFETY: the memory is mapped for as long as the owner lives, who outlives this call in
        // every caller; it is page-aligned or a vector's, and nobody writes it meanwhile.
        let words = unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) };
        words
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
            .fold(0, u64::wrapping_add)
    }

    /// Whether it begins with these bytes; a sum says nothing of their places.
    fn holds(self, content: &[u8]) -> bool {
        assert!(content.len() <= self.len);
        // SAFETY: as in `sum`.
        let bytes = unsafe { std::slice::from_raw_parts(self.base.as_ptr(), content.len()) };
        bytes == content
    }

    /// Reads the first word of a page.
    fn touch(self, page: usize) -> u64 {
        assert!((page + 1) * PAGE <= self.len);
        // SAFETY: inside the mapping, aligned to a page.
        unsafe { self.base.as_ptr().add(page * PAGE).cast::<u64>().read_volatile() }
    }

    /// Writes the first word of a page.
    fn mark(self, page: usize, value: u64) {
        assert!((page + 1) * PAGE <= self.len);
        // SAFETY: inside the mapping, aligned to a page, and no reference to it exists.
        unsafe { self.base.as_ptr().add(page * PAGE).cast::<u64>().write_volatile(value) };
    }

    /// Writes everything, in order, from a buffer that stays in the cache.
    fn store(self, piece: &[u8]) {
        for at in (0..self.len - self.len % piece.len()).step_by(piece.len()) {
            // SAFETY: inside the mapping, and no reference to it exists.
            unsafe {
                self.base.as_ptr().add(at).copy_from_nonoverlapping(piece.as_ptr(), piece.len());
            };
        }
    }
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options::new(DeviceName::new("bench").context("a name")?);
    options.write_back = None;
    Ok(options)
}

fn median(values: impl IntoIterator<Item = f64>) -> anyhow::Result<f64> {
    Samples::new(values).and_then(|samples| samples.median()).context("nothing was measured")
}

fn gigabytes(bytes: usize, took: Duration) -> f64 {
    bytes as f64 / took.as_secs_f64() / 1e9
}

fn distances(setting: &Setting) -> anyhow::Result<Vec<Row>> {
    let size = if setting.quick { 256 * MIB } else { 1024 * MIB };
    let mut rows = Vec::new();
    let mut far = Distant::new(size, Duration::ZERO);
    let sum = far.sum();
    for trip in [0u64, 10, 40] {
        far.trip = Duration::from_millis(trip);
        let device = Arc::new(far);
        rows.extend(first_block(setting, &device)?);
        let least = [(0, 2.5), (10, 1.5), (40, 1.0)].into_iter().find(|(at, _)| *at == trip);
        let mut rates = Vec::new();
        // One more, which only touches the memory.
        for _ in 0..=setting.times(5).max(3) {
            let began = Instant::now();
            let mount = Mount::managed(Arc::clone(&device) as _, options()?)?;
            let found = Bytes::of(&mount).sum();
            rates.push(gigabytes(size, began.elapsed()));
            let all = found == sum && Bytes::of(&mount).holds(&device.content());
            ensure!(all, "a managed mount {trip} ms away read other bytes");
        }
        let bar = format!("silo.mount.read_managed_rtt{trip}");
        let target = least.map(|(_, rate)| Target::AtLeast(rate));
        rows.push(Row::judged(&bar, median(rates.split_off(1))?, "GB/s", None, target));
        if trip == 10 {
            rows.push(direct(&device, size, sum)?);
        }
        if trip > 0 {
            rows.push(whole_blocks(setting, &device, trip)?);
            rows.push(pulled_first(setting, &device, trip)?);
        }
        far = Arc::into_inner(device).context("a mount still holds the device")?;
        ensure!(trip == 0 || far.sum() != sum, "writes did not reach the device");
        far = Distant::new(size, Duration::ZERO);
    }
    Ok(rows)
}

/// The first touch of a mount, from the call that opens it and from its return.
fn first_block(setting: &Setting, device: &Arc<Distant>) -> anyhow::Result<Vec<Row>> {
    let trip = device.trip.as_millis();
    let pages = device.content().len() / PAGE;
    let (mut opened, mut touched) = (Vec::new(), Vec::new());
    for number in 0..setting.times(if trip == 0 { 300 } else { 30 }).max(10) {
        let page = number * 7919 % pages;
        let began = Instant::now();
        let mount = Mount::direct(Arc::clone(device) as _, options()?)?;
        let open = Instant::now();
        let found = Bytes::of(&mount).touch(page);
        touched.push(open.elapsed().as_secs_f64());
        opened.push(began.elapsed().as_secs_f64());
        let expected = device.content()[page * PAGE..page * PAGE + 8].try_into()?;
        ensure!(found == u64::from_le_bytes(expected), "the first block has other bytes");
    }
    let bar = |what: &str| format!("silo.mount.first_{what}_rtt{trip}");
    Ok(if trip == 0 {
        vec![
            Row::judged(
                &bar("block"),
                median(touched)? * 1e6,
                "us",
                None,
                Some(Target::AtMost(60.0)),
            ),
            Row::judged(&bar("block_with_open"), median(opened)? * 1e6, "us", None, None),
        ]
    } else {
        let limit = Target::AtMost(trip as f64 + 0.5);
        vec![
            Row::judged(&bar("block"), median(touched)? * 1e3, "ms", None, Some(limit)),
            Row::judged(&bar("block_with_open"), median(opened)? * 1e3, "ms", None, Some(limit)),
        ]
    })
}

/// The first touch where the block had to be there before the mount opened.
fn pulled_first(setting: &Setting, device: &Arc<Distant>, trip: u64) -> anyhow::Result<Row> {
    let mut touched = Vec::new();
    for number in 0..setting.times(30).max(10) {
        let page = number * 7919 % 1000;
        let at = (page * PAGE) as u64;
        let around = at..at + MIB as u64;
        let first = PullFirst::Ranges(vec![around]);
        let mount =
            Mount::managed(Arc::clone(device) as _, Options { pull_first: first, ..options()? })?;
        let open = Instant::now();
        let found = Bytes::of(&mount).touch(page);
        touched.push(open.elapsed().as_secs_f64() * 1e3);
        let expected = device.content()[page * PAGE..page * PAGE + 8].try_into()?;
        ensure!(found == u64::from_le_bytes(expected), "what was pulled first has other bytes");
    }
    let bar = format!("silo.mount.first_pulled_rtt{trip}");
    Ok(Row::judged(&bar, median(touched)?, "ms", None, Some(Target::AtMost(1.0))))
}

/// A direct mount read in order: read-ahead is all that helps.
fn direct(device: &Arc<Distant>, size: usize, sum: u64) -> anyhow::Result<Row> {
    let mut rates = Vec::new();
    for _ in 0..3 {
        let began = Instant::now();
        let mount = Mount::direct(Arc::clone(device) as _, options()?)?;
        let found = Bytes::of(&mount).sum();
        rates.push(gigabytes(size, began.elapsed()) * 1e3);
        let all = found == sum && Bytes::of(&mount).holds(&device.content());
        ensure!(all, "a direct mount read other bytes");
    }
    // What the thesis' direct mount reached at this distance.
    let (before, target) = (Some(7.0), Some(Target::RatioAtLeast(20.0)));
    Ok(Row::judged("silo.mount.read_direct_rtt10", median(rates)?, "MB/s", before, target))
}

/// Whole blocks written through the library up to the limit of write-back, and all of it written
/// back afterwards.
fn whole_blocks(setting: &Setting, device: &Arc<Distant>, trip: u64) -> anyhow::Result<Row> {
    let mut rates = Vec::new();
    for round in 0..=setting.times(5).max(3) {
        let options = options()?;
        let bytes = (options.dirty_limit as usize).min(device.content().len());
        let mount = Mount::direct(Arc::clone(device) as _, options)?;
        let piece = vec![round as u8 + 1; MIB];
        let began = Instant::now();
        for at in (0..bytes).step_by(MIB) {
            mount.write_at(at as u64, &piece)?;
        }
        rates.push(gigabytes(bytes, began.elapsed()));
        mount.sync()?;
        let content = device.content();
        ensure!(content[..bytes].iter().all(|byte| *byte == round as u8 + 1), "not written back");
    }
    let bar = format!("silo.mount.write_whole_rtt{trip}");
    Ok(Row::judged(&bar, median(rates.split_off(1))?, "GB/s", None, Some(Target::AtLeast(1.0))))
}

fn stores(setting: &Setting) -> anyhow::Result<Vec<Row>> {
    let size = if setting.quick { 128 * MIB } else { 512 * MIB };
    let pages = size / PAGE;
    let device = Arc::new(Distant::new(size, Duration::ZERO));
    let mount = Mount::managed(Arc::clone(&device) as _, options()?)?;
    ensure!(mount.wait_complete(Duration::from_secs(60)), "the mount never filled");
    let tracked = Bytes::of(&mount);
    // The same memory without tracking.
    let file = File::from(sys::memfd("plain", size as u64)?);
    let map = sys::SharedMap::new(&file, size, true)?;
    let plain = Bytes { base: map.base(), len: size };
    let (mut rates, mut costs, mut shares) = (Vec::new(), Vec::new(), Vec::new());
    let piece: Vec<u8> = (0..64 << 10).map(|at: u32| at as u8).collect();
    plain.store(&piece);
    for round in 0..=setting.times(7).max(3) as u64 {
        let began = Instant::now();
        tracked.store(&piece);
        rates.push(gigabytes(size, began.elapsed()));
        mount.sync()?;
        ensure!(
            device.content().chunks_exact(piece.len()).all(|found| found == piece),
            "lost stores"
        );

        // A page written first in a round costs a fault, and a share of looking for it.
        let began = cpu()?;
        (0..pages).for_each(|page| plain.mark(page, round));
        let bare = cpu()? - began;
        let began = cpu()?;
        (0..pages).for_each(|page| tracked.mark(page, round));
        mount.look()?;
        let seen = cpu()? - began;
        costs.push(seen.saturating_sub(bare).as_secs_f64() * 1e6 / pages as f64);
        let dirty = mount.status().dirty_bytes;
        ensure!(dirty == size as u64, "{dirty} bytes seen of {size} written");
        mount.sync()?;

        shares.push(paced(&mount, tracked, plain)?);
    }
    Ok(vec![
        Row::judged(
            "silo.mount.store_present",
            median(rates.split_off(1))?,
            "GB/s",
            None,
            Some(Target::AtLeast(1.0)),
        ),
        Row::judged(
            "silo.mount.tracking_page",
            median(costs.split_off(1))?,
            "us",
            None,
            Some(Target::AtMost(2.5)),
        ),
        Row::judged(
            "silo.mount.tracking_50MBs",
            median(shares.split_off(1))?,
            "%",
            None,
            Some(Target::AtMost(3.0)),
        ),
    ])
}

/// Time that this thread was on a processor.
fn cpu() -> anyhow::Result<Duration> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(Duration::new(now.tv_sec() as u64, now.tv_nsec() as u32))
}

/// Percent more processor time for work that dirties 50 MB a second of it, each page once in a
/// round of one second, with looking for the pages at the end of the round.
fn paced(mount: &Mount, tracked: Bytes, plain: Bytes) -> anyhow::Result<f64> {
    const PAGES: usize = 50_000_000 / PAGE / 4; // a quarter of a second
    let share = Duration::from_millis(250) / PAGES as u32;
    let work = |steps: u64| {
        std::hint::black_box((0..steps).fold(1u64, |a, n| std::hint::black_box(a ^ n)))
    };
    // How much work fills the time between two stores.
    let began = cpu()?;
    work(4_000_000);
    let step = (cpu()? - began).as_secs_f64() / 4e6;
    let steps = (share.as_secs_f64() / step) as u64;
    let run = |bytes: Bytes| -> anyhow::Result<Duration> {
        let began = cpu()?;
        for page in 0..PAGES.min(bytes.len / PAGE) {
            work(steps);
            bytes.mark(page, steps);
        }
        Ok(cpu()? - began)
    };
    let bare = run(plain)?;
    let began = cpu()?;
    let seen = run(tracked)?;
    mount.look()?;
    let looked = cpu()? - began;
    mount.sync()?;
    debug_assert!(looked >= seen);
    Ok((looked.as_secs_f64() / bare.as_secs_f64() - 1.0) * 100.0)
}

/// A `silo serve` of its own; ended when dropped.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    /// Serves a file under mutual TLS, each answer `trip` milliseconds late by the server's timer.
    fn start(scratch: &Path, trip: u64) -> anyhow::Result<Self> {
        let delay = if trip > 0 { format!("delay = \"{trip}ms\"\n") } else { String::new() };
        let config = scratch.join("silo.toml");
        let text = format!(
            "[identity]\ndir = \"tls\"\nname = \"server\"\n\n[device.far]\nread-only = true\n{delay}\
             source = {{ file = {{ path = \"far.img\" }} }}\n\
             expose = {{ nbd = {{ tcp = \"127.0.0.1:0\" }} }}\n"
        );
        std::fs::write(&config, text)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--json", "serve", "--config"]).arg(&config).stdout(Stdio::piped());
        let mut server = Self {
            child: command.spawn().context("starting silo serve")?,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
        };
        // Ended by being dropped if it does not say where it is.
        let output = server.child.stdout.take().context("no output")?;
        let told = serde_json::Deserializer::from_reader(output)
            .into_iter::<serde_json::Value>()
            .next()
            .context("silo serve said nothing")??;
        let at = told["devices"][0]["at"].as_str();
        let address = at.and_then(|at| at.rsplit('/').find_map(|part| part.parse().ok()));
        server.address = address.with_context(|| format!("no address in {told}"))?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill(nix::unistd::Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

/// A mount over a server under mutual TLS, next to a plain socket whose bytes go straight into
/// memory by `UFFDIO_COPY`.
fn remote(setting: &Setting) -> anyhow::Result<Vec<Row>> {
    let size = if setting.quick { 256 * MIB } else { 1024 * MIB };
    let far = Distant::new(size, Duration::ZERO);
    let sum = far.sum();
    std::fs::write(setting.scratch.join("far.img"), &*far.content())?;
    let tls = setting.scratch.join("tls");
    Authority::create(&tls)?;
    let authority = Authority::open(&tls)?;
    let (server, client) = (HostName::new("server")?, HostName::new("client")?);
    for name in [&server, &client] {
        authority.issue(name, Duration::from_secs(24 * 3600))?;
    }
    let tls = TlsClient::new(&Identity::load(&tls, &client)?, &server);
    let mut rows = Vec::new();
    for trip in [0u64, 10] {
        let server = Server::start(&setting.scratch, trip)?;
        let (mut plain, mut mounted) = (Vec::new(), Vec::new());
        for _ in 0..=setting.times(5).max(3) {
            plain.push(plain_socket(&far, Duration::from_millis(trip), sum)?);
            let options =
                NbdClientOptions { tls: Some(tls.clone()), connections: 4, ..Default::default() };
            let device = NbdClient::connect(&Endpoint::Tcp(server.address), options)?;
            let began = Instant::now();
            let mount = Mount::managed(Arc::new(device), self::options()?)?;
            let found = Bytes::of(&mount).sum();
            mounted.push(gigabytes(size, began.elapsed()));
            let all = found == sum && Bytes::of(&mount).holds(&far.content());
            ensure!(all, "a mount over TLS read other bytes");
        }
        let (plain, mounted) = (median(plain.split_off(1))?, median(mounted.split_off(1))?);
        let bar = format!("silo.mount.tls_rtt{trip}");
        rows.push(Row::judged(&bar, mounted, "GB/s", Some(plain), Some(Target::RatioAtLeast(0.6))));
    }
    Ok(rows)
}

/// GB/s of a socket whose bytes are copied into memory that faults; the first comes after `trip`.
fn plain_socket(far: &Distant, trip: Duration, sum: u64) -> anyhow::Result<f64> {
    let content = far.content();
    let size = content.len();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let file = File::from(sys::memfd("plain", size as u64)?);
    let map = sys::SharedMap::new(&file, size, true)?;
    let device = File::options().read(true).write(true).open("/dev/userfaultfd")?;
    let userfault =
        sys::Userfault::new(sys::new_userfaultfd(&device)?, sys::feature::MISSING_SHMEM)?;
    let base = map.base().as_ptr() as u64;
    userfault.register(base, size as u64, sys::REGISTER_MISSING)?;
    let began = Instant::now();
    let took = std::thread::scope(|scope| -> anyhow::Result<Duration> {
        let content = &content;
        let sender = scope.spawn(move || -> io::Result<()> {
            let (mut line, _) = listener.accept()?;
            line.read_exact(&mut [0])?;
            std::thread::sleep(trip);
            line.write_all(content)
        });
        let mut line = TcpStream::connect(address)?;
        line.write_all(&[1])?;
        let mut buffer = vec![0; 256 << 10];
        for at in (0..size).step_by(buffer.len()) {
            line.read_exact(&mut buffer)?;
            userfault.copy(base + at as u64, &buffer)?;
        }
        let took = began.elapsed();
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok(took)
    })?;
    let all = Bytes { base: map.base(), len: size };
    ensure!(all.sum() == sum && all.holds(&content), "the socket brought other bytes");
    Ok(gigabytes(size, took))
}
