//! vhost-user-blk next to qemu-storage-daemon: the same client, the same file, the same requests.
//!
//! Each server is a process of its own (ours is this program, started again), and each serves its
//! own copy of the file. The client is silo's own on the `vhost` crate's front end; it sleeps for
//! its answers as a guest does. Every byte of every 4 KiB answer is compared, of the 1 MiB answers
//! a part of each and every sixteenth as a whole; what was written is compared in the file.

#[path = "guest.rs"]
mod guest;

use super::{Group, Setting};
use anyhow::{Context, Result, bail, ensure};
use bench::{
    Row, Samples, Target,
    pattern::{self, BLOCK},
};
use guest::{Disk, Guest};
use silo::{
    expose::nbd::{NbdOptions, NbdServer},
    expose::vhost::{
        VhostOptions, VhostServer,
        client::{Ask, ClientOptions, ClientQueue, VhostClient},
    },
    source::{FileDevice, FileMode},
};
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    os::unix::{fs::FileExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

pub(super) const GROUPS: &[Group] = &[
    Group {
        name: "vhost",
        about: "vhost-user-blk, next to qemu-storage-daemon: a file in the page cache, a file in memory",
        bars: &["silo.vhost."],
        run,
    },
    Group {
        name: "vhost-guest",
        about: "a guest's disk by vhost-user-blk, next to qemu-storage-daemon and to NBD",
        bars: &["silo.vhost-guest."],
        run: run_guest,
    },
];

/// Names the socket and the file, in the process that is the server.
const SERVE: &str = "SILO_BENCH_VHOST";
const BYTES: u64 = 256 << 20;
const LARGE: usize = 1 << 20;
const RUNS: usize = 7;
/// In a guest: more and shorter ones, because its figures scatter with whatever else the host does.
const GUEST_RUNS: usize = 21;
const LIMIT: Duration = Duration::from_secs(20);

/// A server's process, and what it serves.
struct Server {
    child: Child,
    file: PathBuf,
    socket: PathBuf,
}

/// A client of one of the servers.
struct Subject {
    name: &'static str,
    client: VhostClient,
    server: Server,
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
    let device = FileDevice::open(Path::new(file), FileMode::ReadWrite)?;
    let server = VhostServer::start(Path::new(socket), Arc::new(device), VhostOptions::default())?;
    println!("serving");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop(LIMIT)?;
    Ok(())
}

fn make_file(path: &Path) -> Result<()> {
    let file = File::create(path)?;
    let mut bytes = vec![0; LARGE];
    for start in (0..BYTES).step_by(LARGE) {
        let block = start / BLOCK as u64;
        pattern::fill(&mut bytes, block, 0);
        file.write_all_at(&bytes, start)?;
    }
    // Nothing of it is written back while something is measured.
    file.sync_all()?;
    Ok(())
}

/// Starts a server, and waits until it answers.
fn start_server(name: &str, folder: &Path, scratch: &Path) -> Result<Server> {
    let (file, socket) = (folder.join(format!("{name}.img")), scratch.join(format!("{name}.sock")));
    let _ = fs::remove_file(&socket);
    make_file(&file)?;
    let (file_text, socket_text) = (file.display(), socket.display());
    let mut command = if name == "silo" {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "--only", "silo.vhost.", "--quick", "--output"]);
        command.arg(scratch.join("server"));
        command.env(SERVE, format!("{socket_text}\n{file_text}"));
        command
    } else {
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--object", "iothread,id=io"]);
        command.arg("--blockdev");
        command.arg(format!("driver=file,node-name=file,filename={file_text}"));
        command.args(["--blockdev", "driver=raw,node-name=disk,file=file", "--export"]);
        let thread = if name == "qemu-iothread" { ",iothread=io" } else { "" };
        command.arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,\
             addr.path={socket_text}{thread}"
        ));
        command
    };
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().with_context(|| {
            format!("could not start {name}; install the package qemu-system-common")
        })?;
    if name == "silo" {
        let output = child.stdout.take().context("the server has no output")?;
        let mut lines = BufReader::new(output).lines();
        while lines.next().context("the server ended")?? != "serving" {}
    }
    let mut server = Server { child, file, socket };
    let deadline = Instant::now() + LIMIT;
    // QEMU's makes its socket in a moment; there is nothing else to wait for.
    while UnixStream::connect(&server.socket).is_err() {
        let ended = server.child.try_wait()?.is_some() || Instant::now() > deadline;
        ensure!(!ended, "{name} does not answer on {}", server.socket.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(server)
}

fn start(name: &'static str, folder: &Path, scratch: &Path) -> Result<Subject> {
    let server = start_server(name, folder, scratch)?;
    let options = ClientOptions { slot_bytes: LARGE, ..ClientOptions::default() };
    let client = VhostClient::connect(&server.socket, options)
        .with_context(|| format!("{name} refuses the client"))?;
    Ok(Subject { name, client, server })
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// What is asked for, over and over.
#[derive(Clone, Copy)]
struct Work {
    ask: Ask,
    bytes: usize,
    depth: usize,
    sequential: bool,
}

/// Random or sequential requests for a while; how long each took in µs, and how long all took.
fn drive(
    queue: &mut ClientQueue,
    work: Work,
    count: usize,
    seed: u64,
    round: u64,
    rounds: &mut [u64],
) -> Result<(f64, f64)> {
    let Work { ask, bytes, depth, sequential } = work;
    let (mut state, blocks) = (seed | 1, (bytes / BLOCK) as u64);
    let places = BYTES / bytes as u64;
    let mut buffer = vec![0; bytes];
    let mut under_way = vec![None; 64];
    let (mut sent, mut done, mut waits) = (0, 0, Vec::with_capacity(count));
    let began = Instant::now();
    while done < count {
        while sent < count && usize::from(queue.under_way()) < depth {
            let Some(slot) = queue.take_slot() else { break };
            let place = if sequential { sent as u64 % places } else { random(&mut state) % places };
            let first = place * blocks;
            if ask == Ask::Write {
                // The same block may be under way twice: both carry the same bytes.
                pattern::fill(&mut buffer[..bytes], first, round);
                rounds[first as usize..(first + blocks) as usize].fill(round);
                queue.fill(slot, &buffer);
            }
            queue.submit(slot, ask, first * (BLOCK / 512) as u64, bytes);
            under_way[usize::from(slot)] = Some((first, Instant::now()));
            sent += 1;
        }
        queue.kick()?;
        let (slot, status) = queue.wait(LIMIT)?;
        ensure!(status == 0, "a request failed with status {status}");
        let (first, at) = under_way[usize::from(slot)].take().context("answered twice")?;
        waits.push(at.elapsed().as_secs_f64() * 1e6);
        if ask == Ask::Read {
            let (start, length) = if bytes == BLOCK || done % 16 == 0 {
                (0, bytes)
            } else {
                (random(&mut state) as usize % blocks as usize * BLOCK, BLOCK)
            };
            queue.fetch_part(slot, start, &mut buffer[..length]);
            for (index, bytes) in buffer[..length].chunks_exact(BLOCK).enumerate() {
                let block = first + (start / BLOCK + index) as u64;
                ensure!(
                    pattern::is(bytes, block, rounds[block as usize]),
                    "block {block} is wrong"
                );
            }
        }
        done += 1;
    }
    let seconds = began.elapsed().as_secs_f64();
    Ok((Samples::new(waits).and_then(|waits| waits.median()).unwrap_or(0.0), seconds))
}

/// A bar: its name, its work, and how many requests a run has.
struct Bar {
    name: &'static str,
    work: Work,
    count: usize,
    figure: Figure,
}

#[derive(Clone, Copy)]
enum Figure {
    Latency,
    Rate,
    Throughput,
}

fn bars() -> Vec<Bar> {
    let small = |ask, depth| Work { ask, bytes: BLOCK, depth, sequential: false };
    let large = |ask| Work { ask, bytes: LARGE, depth: 4, sequential: true };
    let bar = |name, work, count, figure| Bar { name, work, count, figure };
    vec![
        bar("read 4 KiB, 1 at a time", small(Ask::Read, 1), 8000, Figure::Latency),
        bar("write 4 KiB, 1 at a time", small(Ask::Write, 1), 8000, Figure::Latency),
        bar("read 4 KiB, 16 at a time", small(Ask::Read, 16), 30_000, Figure::Rate),
        bar("read 4 KiB, 32 at a time", small(Ask::Read, 32), 30_000, Figure::Rate),
        bar("write 4 KiB, 32 at a time", small(Ask::Write, 32), 30_000, Figure::Rate),
        bar("read 1 MiB", large(Ask::Read), 2304, Figure::Throughput),
        bar("write 1 MiB", large(Ask::Write), 768, Figure::Throughput),
    ]
}

fn measure(place: &str, folder: &Path, setting: &Setting) -> Result<Vec<Row>> {
    let names = ["silo", "qemu", "qemu-iothread"];
    let mut servers = Vec::new();
    for name in names {
        servers.push(start(name, folder, &setting.scratch)?);
    }
    let mut rounds = vec![vec![0u64; BYTES as usize / BLOCK]; servers.len()];
    let (mut rows, mut round) = (Vec::new(), 0);
    for bar in bars() {
        let mut figures = vec![Vec::new(); servers.len()];
        for run in 0..RUNS {
            round += 1;
            for (index, server) in servers.iter_mut().enumerate() {
                let count = setting.times(bar.count);
                let queue = &mut server.client.queues[0];
                let (median, seconds) =
                    drive(queue, bar.work, count, run as u64 + 1, round, &mut rounds[index])
                        .with_context(|| format!("{}: {}", server.name, bar.name))?;
                figures[index].push(match bar.figure {
                    Figure::Latency => median,
                    Figure::Rate => count as f64 / seconds,
                    Figure::Throughput => (count * bar.work.bytes) as f64 / seconds / 1e9,
                });
            }
        }
        let medians: Vec<f64> =
            figures.into_iter().filter_map(|figures| Samples::new(figures)?.median()).collect();
        let [ours, plain, iothread] = medians[..] else { bail!("a run gave no figure") };
        let (unit, better, target) = match bar.figure {
            Figure::Latency => ("µs", plain.min(iothread), Target::RatioAtMost(1.0)),
            Figure::Rate => ("/s", plain.max(iothread), Target::RatioAtLeast(1.0)),
            Figure::Throughput => ("GB/s", plain.max(iothread), Target::RatioAtLeast(1.0)),
        };
        let name = format!("silo.vhost.{place} {}", bar.name);
        println!(
            "   {name}: silo {ours:.2}, qemu {plain:.2}, with an I/O thread {iothread:.2} {unit}"
        );
        rows.push(Row::judged(&name, ours, unit, Some(better), Some(target)));
    }
    for (server, rounds) in servers.iter_mut().zip(&rounds) {
        let queue = &mut server.client.queues[0];
        ensure!(queue.call(Ask::Flush, 0, &mut [])? == 0, "{}: a flush failed", server.name);
        let content = fs::read(&server.server.file)?;
        for (block, bytes) in content.chunks_exact(BLOCK).enumerate() {
            let fits = pattern::is(bytes, block as u64, rounds[block]);
            ensure!(fits, "{}: block {block} of the file is wrong", server.name);
        }
    }
    Ok(rows)
}

fn run(setting: &Setting) -> Result<Vec<Row>> {
    if let Ok(place) = std::env::var(SERVE) {
        return serve(&place).map(|()| Vec::new());
    }
    let mut rows = measure("file:", &setting.scratch, setting)?;
    let memory = tempfile::Builder::new().prefix("silo-").tempdir_in("/dev/shm")?;
    rows.extend(measure("memory:", memory.path(), setting)?);
    Ok(rows)
}

/// The same file three times, in one guest: our server, QEMU's, and our NBD server by QEMU's own
/// driver, as drafter starts its machines. All requests bypass the guest's cache; its processors
/// are translated, so that every figure has a large part that is the guest's own. Timed here, from a
/// command to its end.
fn run_guest(setting: &Setting) -> Result<Vec<Row>> {
    let ours = start_server("silo", &setting.scratch, &setting.scratch)?;
    let theirs = start_server("qemu", &setting.scratch, &setting.scratch)?;
    let file = setting.scratch.join("nbd.img");
    make_file(&file)?;
    let socket = setting.scratch.join("nbd.sock");
    let device = Arc::new(FileDevice::open(&file, FileMode::ReadWrite)?);
    let nbd = NbdServer::start(&socket, device, NbdOptions::default())?;
    let disks = [
        Disk::Vhost { socket: &ours.socket, queues: 1 },
        Disk::Vhost { socket: &theirs.socket, queues: 1 },
        Disk::Nbd { socket: &socket },
    ];
    let mut guest = Guest::start(&setting.scratch, &disks)?;
    let names = ["vda", "vdb", "vdc"];
    // All three are what they should be, by what the guest reads.
    let sums: Vec<String> = names
        .iter()
        .map(|name| {
            guest.run(&format!(
                "dd if=/dev/{name} bs=1M count=16 iflag=direct 2> /dev/null | md5sum"
            ))
        })
        .collect::<Result<_>>()?;
    let begin = setting.scratch.join("begin");
    fs::write(&begin, &fs::read(&file)?[..16 << 20])?;
    let expected = Command::new("md5sum").arg(&begin).output().context("md5sum")?.stdout;
    let expected = String::from_utf8_lossy(&expected[..32.min(expected.len())]).into_owned();
    ensure!(sums.iter().all(|sum| sum.starts_with(&expected)), "the guest reads {sums:?}");
    guest.run("dd if=/dev/urandom of=/tmp/noise bs=1M count=16 2> /dev/null")?;

    let count = setting.times(1500);
    let parallel = |name: &str| {
        let one = format!(
            "dd if=/dev/{name} of=/dev/null bs=4k count={} skip=$((i * 4000)) iflag=direct &",
            count / 3
        );
        format!("for i in 0 1 2 3 4 5 6 7; do {one} done; wait")
    };
    type Line<'a> = Box<dyn Fn(&str) -> String + 'a>;
    let works: [(&str, f64, Line<'_>); 5] = [
        (
            "read 4 KiB",
            count as f64,
            Box::new(|name| {
                format!("dd if=/dev/{name} of=/dev/null bs=4k count={count} iflag=direct")
            }),
        ),
        (
            "write 4 KiB",
            count as f64,
            Box::new(|name| {
                let to = format!("of=/dev/{name} bs=4k count={count} seek=8192");
                format!("dd if=/tmp/noise {to} oflag=direct conv=notrunc")
            }),
        ),
        ("read 4 KiB, 8 at a time", (count / 3 * 8) as f64, Box::new(parallel)),
        (
            "read 1 MiB",
            96.0,
            Box::new(|name| format!("dd if=/dev/{name} of=/dev/null bs=1M count=96 iflag=direct")),
        ),
        (
            "write 1 MiB",
            16.0,
            Box::new(|name| {
                format!("dd if=/tmp/noise of=/dev/{name} bs=1M seek=64 oflag=direct conv=notrunc")
            }),
        ),
    ];
    let mut rows = Vec::new();
    for (what, requests, command) in &works {
        let mut figures = vec![Vec::new(); names.len()];
        for _ in 0..GUEST_RUNS {
            for (figures, name) in figures.iter_mut().zip(names) {
                // The guest's `dd` does not say; a command that does nothing takes 2 ms.
                let began = Instant::now();
                guest.run(&command(name))?;
                figures.push(began.elapsed().as_secs_f64() * 1e6 / requests);
            }
        }
        let medians: Vec<f64> =
            figures.into_iter().filter_map(|figures| Samples::new(figures)?.median()).collect();
        let [ours, theirs, nbd] = medians[..] else { bail!("a run gave no figure") };
        let (bar, target) = (format!("silo.vhost-guest.{what}"), Target::RatioAtMost(1.0));
        rows.push(Row::judged(&bar, ours, "µs", Some(theirs), Some(target)));
        rows.push(Row::judged(&format!("{bar}, next to NBD"), ours, "µs", Some(nbd), None));
    }
    guest.run("sync; for d in vda vdb vdc; do blockdev --flushbufs /dev/$d; done")?;
    drop(guest);
    nbd.stop(LIMIT)?;
    let contents: Vec<Vec<u8>> = [&ours.file, &theirs.file, &file]
        .into_iter()
        .map(fs::read)
        .collect::<std::io::Result<_>>()?;
    ensure!(contents.iter().all(|content| *content == contents[0]), "the disks differ");
    ensure!(!pattern::is(&contents[0][64 << 20..][..BLOCK], 16_384, 0), "nothing was written");
    Ok(rows)
}
