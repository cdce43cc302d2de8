//! NBD next to qemu-nbd and nbdkit: the same client, the same content, the same requests.
//!
//! Each server is a process of its own (ours is this program, started again), and each serves its
//! own copy. "File" is a file on the disk's file system, all of it in the page cache; "memory" is
//! nbdkit's memory plugin, qemu-nbd over a file in memory, and our device in memory. The client is
//! one thread that keeps as many requests under way as are asked for and takes all answers that
//! have come at once; it uses simple replies, which all three speak. Of every 4 KiB that were read
//! the first and the last word are compared while it runs, and all bytes at the end.
//!
//! One request at a time takes what waking the other side takes, and that differs by factors with
//! where the kernel happens to put both: on one processor, or on two of which one sleeps. So these
//! rows are measured in both ways, each with client and server bound to their places.

use super::{Group, Setting};
use anyhow::{Context, Result, bail, ensure};
use bench::{
    Row, Samples, Target,
    pattern::{BLOCK, fill, word},
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use silo::{
    expose::nbd::{BlockDevice, Endpoint, NbdClient, NbdClientOptions, NbdOptions, NbdServer},
    source::{FileDevice, FileMode, MemoryDevice},
};
use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

pub(super) const GROUPS: &[Group] = &[Group {
    name: "nbd",
    about: "NBD, next to qemu-nbd and nbdkit: a file in the page cache, memory",
    bars: &["silo.nbd."],
    run,
}];

/// Names the socket and what is served, in the process that is the server.
const SERVE: &str = "SILO_BENCH_NBD";
const BYTES: u64 = 256 << 20;
const LARGE: usize = 1 << 20;
const RUNS: usize = 7;
const LIMIT: Duration = Duration::from_secs(20);
const REQUEST_BYTES: usize = 28;
const REPLY_BYTES: usize = 16;
const READ: u16 = 0;
const WRITE: u16 = 1;

struct Server {
    child: Child,
    socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves until the input ends: the other process of the benchmark.
fn serve(place: &str) -> Result<()> {
    let (socket, file) = place.split_once('\n').context("a socket and a file")?;
    let device: Arc<dyn BlockDevice> = match file {
        "" => Arc::new(MemoryDevice::new("bench", BYTES)?),
        file => Arc::new(FileDevice::open(Path::new(file), FileMode::ReadWrite)?),
    };
    let server = NbdServer::start(Path::new(socket), device, NbdOptions::default())?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop(LIMIT)?;
    Ok(())
}

/// Starts a server. `folder`: where its file goes; none for a server that keeps it in memory.
fn start(name: &str, folder: Option<&Path>, scratch: &Path) -> Result<Server> {
    let kind = if folder.is_some() { "file" } else { "memory" };
    let socket = scratch.join(format!("{name}-{kind}.sock"));
    let memory = Path::new("/dev/shm");
    let in_memory = format!("silo-bench-{}-{name}.img", std::process::id());
    let file = folder.map_or_else(|| memory.join(in_memory), |f| f.join(format!("{name}.img")));
    // Left by an earlier one of the same name.
    let _ = fs::remove_file(&socket);
    let keeps_file = folder.is_some() || name == "qemu-nbd";
    if keeps_file {
        File::create(&file)?.set_len(BYTES)?;
    }
    let (file_text, socket_text) = (file.display().to_string(), socket.display().to_string());
    let mut command;
    match name {
        "silo" => {
            command = Command::new(std::env::current_exe()?);
            command.args(["bench", "--only", "silo.nbd.", "--quick", "--output"]);
            command.arg(scratch.join("server"));
            let served = if keeps_file { file_text.as_str() } else { "" };
            command.env(SERVE, format!("{socket_text}\n{served}"));
        }
        "nbdkit" => {
            command = Command::new("nbdkit");
            command.args(["-f", "-U", &socket_text]);
            match keeps_file {
                true => command.args(["file", &file_text]),
                false => command.args(["memory", &BYTES.to_string()]),
            };
        }
        _ => {
            command = Command::new("qemu-nbd");
            command.args(["-f", "raw", "-t", "-e", "16", "-k", &socket_text, &file_text]);
        }
    }
    let package = if name == "nbdkit" { "nbdkit" } else { "qemu-utils" };
    let child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("could not start {name}; install the package {package}"))?;
    let mut server = Server { child, socket };
    let deadline = Instant::now() + LIMIT;
    while UnixStream::connect(&server.socket).is_err() {
        let ended = server.child.try_wait()?.is_some() || Instant::now() > deadline;
        ensure!(!ended, "{name} does not answer on {}", server.socket.display());
        std::thread::sleep(Duration::from_millis(10));
    }
    if folder.is_none() && keeps_file {
        // The server has it open; the name is not needed.
        fs::remove_file(&file)?;
    }
    Ok(server)
}

/// One connection, one thread.
struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    filled: usize,
    /// The round of every block's last write.
    rounds: Vec<u64>,
}

#[derive(Clone, Copy)]
struct Work {
    command: u16,
    bytes: usize,
    depth: usize,
    sequential: bool,
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

impl Client {
    fn connect(socket: &Path) -> Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        ensure!(&greeting[..16] == b"NBDMAGICIHAVEOPT", "the server does not speak NBD");
        // Fixed newstyle without padding; EXPORT_NAME "".
        stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0")?;
        let mut export = [0; 10];
        stream.read_exact(&mut export)?;
        let size = u64::from_be_bytes(export[..8].try_into()?);
        ensure!(size == BYTES, "the server offers {size} bytes");
        let room = (LARGE + REPLY_BYTES) * 2;
        let rounds = vec![0; BYTES as usize / BLOCK];
        Ok(Self { stream, input: vec![0; room], filled: 0, rounds })
    }

    /// Does requests; gives the median time of one in µs, and the seconds for all.
    fn drive(&mut self, work: Work, count: usize, seed: u64, round: u64) -> Result<(f64, f64)> {
        let Work { command, bytes, depth, sequential } = work;
        let (places, blocks) = (BYTES / bytes as u64, (bytes / BLOCK) as u64);
        let mut state = seed | 1;
        let (mut sent, mut done, mut waits) = (0, 0, Vec::with_capacity(count));
        // A slot's number is the request's cookie.
        let mut slots = vec![(0, Instant::now()); depth];
        let mut free: Vec<usize> = (0..depth).collect();
        let payload = if command == WRITE { bytes } else { 0 };
        let mut output = vec![0; (REQUEST_BYTES + payload) * depth];
        let reply = REPLY_BYTES + if command == READ { bytes } else { 0 };
        let began = Instant::now();
        while done < count {
            let mut end = 0;
            while sent < count
                && let Some(slot) = free.pop()
            {
                let place = if sequential { sent as u64 } else { random(&mut state) } % places;
                let first = place * blocks;
                let request = &mut output[end..end + REQUEST_BYTES + payload];
                request[..6].copy_from_slice(b"\x25\x60\x95\x13\0\0");
                request[6..8].copy_from_slice(&command.to_be_bytes());
                request[8..16].copy_from_slice(&(slot as u64).to_be_bytes());
                request[16..24].copy_from_slice(&(place * bytes as u64).to_be_bytes());
                request[24..28].copy_from_slice(&(bytes as u32).to_be_bytes());
                if command == WRITE {
                    fill(&mut request[REQUEST_BYTES..], first, round);
                    let range = first as usize..(first + blocks) as usize;
                    self.rounds[range].fill(round);
                }
                end += request.len();
                slots[slot] = (first, Instant::now());
                sent += 1;
            }
            self.stream.write_all(&output[..end])?;
            let room = self.filled + reply.max(64 << 10);
            let room = room.min(self.input.len());
            let read = self.stream.read(&mut self.input[self.filled..room])?;
            ensure!(read > 0, "the server hung up");
            self.filled += read;
            let mut at = 0;
            while self.filled - at >= reply {
                let (head, data) = self.input[at..at + reply].split_at(REPLY_BYTES);
                ensure!(head[..8] == *b"\x67\x44\x66\x98\0\0\0\0", "a request failed: {head:?}");
                let slot = u64::from_be_bytes(head[8..].try_into()?) as usize;
                let (first, start) = *slots.get(slot).context("a wrong cookie")?;
                waits.push(start.elapsed().as_secs_f64() * 1e6);
                for (index, block) in data.chunks_exact(BLOCK).enumerate() {
                    let number = first + index as u64;
                    let expected = word(number, self.rounds[number as usize]);
                    let fits = block.starts_with(&expected) && block.ends_with(&expected);
                    ensure!(fits, "block {number} is wrong");
                }
                free.push(slot);
                done += 1;
                at += reply;
            }
            self.input.copy_within(at..self.filled, 0);
            self.filled -= at;
        }
        let seconds = began.elapsed().as_secs_f64();
        let median = Samples::new(waits).and_then(|waits| waits.median());
        Ok((median.context("no request was done")?, seconds))
    }

    /// Compares every byte.
    fn verify(&mut self) -> Result<()> {
        let mut expected = vec![0; LARGE];
        let mut found = vec![0; LARGE + REPLY_BYTES];
        for start in (0..BYTES).step_by(LARGE) {
            let mut request = [0; REQUEST_BYTES];
            request[..4].copy_from_slice(b"\x25\x60\x95\x13");
            request[16..24].copy_from_slice(&start.to_be_bytes());
            request[24..28].copy_from_slice(&(LARGE as u32).to_be_bytes());
            self.stream.write_all(&request)?;
            self.stream.read_exact(&mut found)?;
            for (index, block) in expected.chunks_exact_mut(BLOCK).enumerate() {
                let number = start / BLOCK as u64 + index as u64;
                fill(block, number, self.rounds[number as usize]);
            }
            ensure!(found[REPLY_BYTES..] == expected, "the MiB at {start} is wrong");
        }
        Ok(())
    }
}

/// Where client and server run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Places {
    /// Wherever the kernel puts them.
    Any,
    /// On the same processor.
    One,
    /// Each on one of its own.
    Two,
}

impl Places {
    /// Binds this thread and all threads of the servers.
    fn bind(self, processors: &CpuSet, servers: &[u32]) -> Result<()> {
        let every = (0..CpuSet::count()).filter(|at| processors.is_set(*at).unwrap_or(false));
        let every: Vec<usize> = every.collect();
        let one = |at: usize| -> Result<CpuSet> {
            let mut set = CpuSet::new();
            set.set(every[at.min(every.len() - 1)])?;
            Ok(set)
        };
        let (client, server) = match self {
            Self::Any => (*processors, *processors),
            Self::One => (one(0)?, one(0)?),
            Self::Two => (one(0)?, one(1)?),
        };
        sched_setaffinity(Pid::from_raw(0), &client).context("could not bind the client")?;
        for process in servers {
            for task in fs::read_dir(format!("/proc/{process}/task"))? {
                let thread = task?.file_name().into_string().ok().and_then(|t| t.parse().ok());
                let thread = Pid::from_raw(thread.context("a thread's number")?);
                match sched_setaffinity(thread, &server) {
                    // It ended meanwhile.
                    Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                    Err(error) => bail!("could not bind a server: {error}"),
                }
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Figure {
    Latency,
    Rate,
    Throughput,
}

struct Bar {
    name: &'static str,
    work: Work,
    count: usize,
    figure: Figure,
    places: Places,
}

fn bars() -> Vec<Bar> {
    let small = |command, depth| Work { command, bytes: BLOCK, depth, sequential: false };
    let large = |command| Work { command, bytes: LARGE, depth: 4, sequential: true };
    let bar = |name, work, count, figure, places| Bar { name, work, count, figure, places };
    let latency =
        |name, command, places| bar(name, small(command, 1), 8000, Figure::Latency, places);
    vec![
        latency("read 4 KiB, 1 at a time, one processor", READ, Places::One),
        latency("read 4 KiB, 1 at a time, two processors", READ, Places::Two),
        latency("write 4 KiB, 1 at a time, one processor", WRITE, Places::One),
        latency("write 4 KiB, 1 at a time, two processors", WRITE, Places::Two),
        bar("read 4 KiB, 16 at a time", small(READ, 16), 30_000, Figure::Rate, Places::Any),
        bar("write 4 KiB, 16 at a time", small(WRITE, 16), 30_000, Figure::Rate, Places::Any),
        bar("read 1 MiB", large(READ), 1536, Figure::Throughput, Places::Any),
        bar("write 1 MiB", large(WRITE), 768, Figure::Throughput, Places::Any),
    ]
}

fn measure(kind: &str, folder: Option<&Path>, setting: &Setting) -> Result<Vec<Row>> {
    let mut subjects = Vec::new();
    for name in ["silo", "qemu-nbd", "nbdkit"] {
        let server = start(name, folder, &setting.scratch)?;
        let mut client = Client::connect(&server.socket).with_context(|| name.to_owned())?;
        // Everything is written once, so that nobody finds holes.
        let work = Work { command: WRITE, bytes: LARGE, depth: 4, sequential: true };
        client.drive(work, BYTES as usize / LARGE, 1, 1)?;
        subjects.push((name, client, server));
    }
    if let Some(folder) = folder {
        // Nothing is written back while something is measured.
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|end| end == "img") {
                File::open(path)?.sync_all()?;
            }
        }
    }
    let processors = sched_getaffinity(Pid::from_raw(0))?;
    let servers: Vec<u32> = subjects.iter().map(|(_, _, server)| server.child.id()).collect();
    let measured = interleaved(kind, &mut subjects, setting, |places: Places| {
        places.bind(&processors, &servers)
    });
    // Whatever comes next runs anywhere.
    Places::Any.bind(&processors, &[])?;
    let mut rows = measured?;
    for (name, client, _) in &mut subjects {
        client.verify().with_context(|| (*name).to_owned())?;
    }
    rows.extend(own_client(kind, &subjects[0].2.socket, &subjects[0].1.rounds, setting)?);
    Ok(rows)
}

/// Runs every bar with all of them in turn.
fn interleaved(
    kind: &str,
    subjects: &mut [(&'static str, Client, Server)],
    setting: &Setting,
    bind: impl Fn(Places) -> Result<()>,
) -> Result<Vec<Row>> {
    let (mut rows, mut round) = (Vec::new(), 1);
    for bar in bars() {
        bind(bar.places)?;
        let mut figures = vec![Vec::new(); subjects.len()];
        for run in 0..RUNS {
            round += 1;
            let count = setting.times(bar.count);
            for step in 0..subjects.len() {
                // Each is first as often as the others.
                let index = (step + run) % subjects.len();
                let (name, client, _) = &mut subjects[index];
                let (median, seconds) = client
                    .drive(bar.work, count, run as u64 + 1, round)
                    .with_context(|| format!("{name}: {}", bar.name))?;
                figures[index].push(match bar.figure {
                    Figure::Latency => median,
                    Figure::Rate => count as f64 / seconds,
                    Figure::Throughput => (count * bar.work.bytes) as f64 / seconds / 1e9,
                });
            }
        }
        let medians: Vec<f64> =
            figures.into_iter().filter_map(|figures| Samples::new(figures)?.median()).collect();
        let [ours, qemu, nbdkit] = medians[..] else { bail!("a run gave no figure") };
        let (unit, better, target) = match bar.figure {
            Figure::Latency => ("µs", qemu.min(nbdkit), Target::RatioAtMost(1.0 / 0.95)),
            Figure::Rate => ("/s", qemu.max(nbdkit), Target::RatioAtLeast(0.95)),
            Figure::Throughput => ("GB/s", qemu.max(nbdkit), Target::RatioAtLeast(0.95)),
        };
        let name = format!("silo.nbd.{kind} {}", bar.name);
        println!("   {name}: silo {ours:.2}, qemu-nbd {qemu:.2}, nbdkit {nbdkit:.2} {unit}");
        rows.push(Row::judged(&name, ours, unit, Some(better), Some(target)));
    }
    Ok(rows)
}

/// Our client against our server: what a mount over NBD has to work with. Nothing is promised.
fn own_client(kind: &str, socket: &Path, rounds: &[u64], setting: &Setting) -> Result<Vec<Row>> {
    let options = NbdClientOptions { connections: 2, ..NbdClientOptions::default() };
    let client = NbdClient::connect(&Endpoint::unix(socket), options)?;
    let (mut small, mut large) = (Vec::new(), Vec::new());
    let (mut state, mut buf, mut expected) = (1, vec![0; 8 * LARGE], vec![0; BLOCK]);
    let mut check = |data: &[u8], first: u64| -> Result<()> {
        for (index, block) in data.chunks_exact(BLOCK).enumerate() {
            let number = first + index as u64;
            fill(&mut expected, number, rounds[number as usize]);
            ensure!(block == expected, "block {number} is wrong");
        }
        Ok(())
    };
    for _ in 0..setting.times(8000) {
        let block = random(&mut state) % (BYTES / BLOCK as u64);
        let start = Instant::now();
        client.read_at(block * BLOCK as u64, &mut buf[..BLOCK])?;
        small.push(start.elapsed().as_secs_f64() * 1e6);
        check(&buf[..BLOCK], block)?;
    }
    for offset in (0..BYTES).step_by(buf.len()) {
        let start = Instant::now();
        client.read_at(offset, &mut buf)?;
        large.push(buf.len() as f64 / start.elapsed().as_secs_f64() / 1e9);
        check(&buf, offset / BLOCK as u64)?;
    }
    let median = |samples| Samples::new(samples).and_then(|samples| samples.median());
    let row = |name: &str, value: Option<f64>, unit: &str| -> Result<Row> {
        let value = value.context("nothing was measured")?;
        Ok(Row::judged(&format!("silo.nbd.{kind} {name}"), value, unit, None, None))
    };
    Ok(vec![
        row("read 4 KiB by our client", median(small), "µs")?,
        row("read 8 MiB by our client", median(large), "GB/s")?,
    ])
}

/// nbdcopy, which is nobody's but libnbd's, copies what each serves.
fn nbdcopy(setting: &Setting) -> Result<Vec<Row>> {
    let mut servers = Vec::new();
    for name in ["silo", "qemu-nbd", "nbdkit"] {
        let server = start(name, None, &setting.scratch)?;
        let work = Work { command: WRITE, bytes: LARGE, depth: 4, sequential: true };
        Client::connect(&server.socket)?.drive(work, BYTES as usize / LARGE, 1, 1)?;
        servers.push(server);
    }
    let mut rates = vec![Vec::new(); servers.len()];
    for run in 0..RUNS {
        for step in 0..servers.len() {
            let index = (step + run) % servers.len();
            let uri = format!("nbd+unix:///?socket={}", servers[index].socket.display());
            let start = Instant::now();
            let copied = Command::new("nbdcopy")
                .args([uri.as_str(), "null:"])
                .output()
                .context("could not start nbdcopy; install the package libnbd-bin")?;
            ensure!(
                copied.status.success(),
                "nbdcopy: {}",
                String::from_utf8_lossy(&copied.stderr)
            );
            rates[index].push(BYTES as f64 / start.elapsed().as_secs_f64() / 1e9);
        }
    }
    let medians: Vec<f64> =
        rates.into_iter().filter_map(|rates| Samples::new(rates)?.median()).collect();
    let [ours, qemu, nbdkit] = medians[..] else { bail!("a run gave no figure") };
    let name = "silo.nbd.memory: copied by nbdcopy";
    println!("   {name}: silo {ours:.2}, qemu-nbd {qemu:.2}, nbdkit {nbdkit:.2} GB/s");
    let target = Some(Target::RatioAtLeast(0.95));
    Ok(vec![Row::judged(name, ours, "GB/s", Some(qemu.max(nbdkit)), target)])
}

fn run(setting: &Setting) -> Result<Vec<Row>> {
    if let Ok(place) = std::env::var(SERVE) {
        return serve(&place).map(|()| Vec::new());
    }
    let mut rows = measure("file:", Some(&setting.scratch), setting)?;
    rows.extend(measure("memory:", None, setting)?);
    rows.extend(nbdcopy(setting)?);
    Ok(rows)
}
