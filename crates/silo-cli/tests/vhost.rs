//! vhost-user-blk under a real guest: ext4 on a journaled disk of silo's, the daemon killed and
//! started again while the guest writes, a disk that grows under it. And the daemon's death under
//! our own client, at any moment, with nothing lost and nothing done twice.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "the benchmark uses all of it")]
#[path = "../src/bench/guest.rs"]
mod guest;

use guest::{Disk, Guest, LIMIT};
use silo::{
    device::DeviceName,
    disk::{self, DiskOptions},
    expose::vhost::{
        VhostOptions, VhostServer,
        client::{Ask, ClientOptions, VhostClient},
    },
    io::BlockDevice,
    source::{FileDevice, FileMode},
};
use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

fn options() -> DiskOptions {
    DiskOptions::new(DeviceName::new("disk").unwrap())
}

fn open(path: &Path) -> Arc<dyn BlockDevice> {
    if path.is_dir() {
        Arc::new(disk::Disk::open(path, Some(&path.with_extension("base")), &options()).unwrap())
    } else {
        Arc::new(FileDevice::open(path, FileMode::ReadWrite).unwrap())
    }
}

/// Not a test: the daemon, in a process of its own that can be killed. It serves until its input
/// ends; the line "grow N" makes its file longer.
#[test]
#[ignore = "the daemon of the other tests"]
fn daemon() {
    let (Some(device), Some(socket)) =
        (std::env::var_os("DAEMON_DEVICE"), std::env::var_os("DAEMON_SOCKET"))
    else {
        return;
    };
    let path = PathBuf::from(device);
    let mut device = open(&path);
    let server =
        VhostServer::start(Path::new(&socket), device.clone(), VhostOptions::default()).unwrap();
    println!("\nserving");
    for line in io::stdin().lines().map_while(Result::ok) {
        if let Some(bytes) = line.strip_prefix("grow ") {
            let file = fs::File::options().read(true).write(true).open(&path).unwrap();
            file.set_len(bytes.parse().unwrap()).unwrap();
            device = Arc::new(Grown(device));
            server.resize(device.clone());
            println!("grown");
        }
    }
    server.stop(Duration::from_secs(10)).unwrap();
    std::process::exit(0);
}

/// The same file, as long as it is now.
struct Grown(Arc<dyn BlockDevice>);

impl Grown {
    fn file(&self) -> fs::File {
        let path = std::env::var_os("DAEMON_DEVICE").unwrap();
        fs::File::options().read(true).write(true).open(path).unwrap()
    }
}

impl BlockDevice for Grown {
    fn size(&self) -> u64 {
        self.file().metadata().unwrap().len()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file(), buf, offset)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(&self.file(), data, offset)
    }
    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.write_at(offset, &vec![0; length as usize])
    }
}

struct Daemon {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Daemon {
    fn start(device: &Path, socket: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["daemon", "--exact", "--ignored", "--nocapture"])
            .env("DAEMON_DEVICE", device)
            .env("DAEMON_SOCKET", socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut daemon = Self { child, input, output: BufReader::new(output) };
        daemon.await_line("serving");
        daemon
    }

    fn await_line(&mut self, wanted: &str) {
        let mut line = String::new();
        while line.trim() != wanted {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the daemon ended");
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn end(mut self) {
        drop(self.input);
        assert!(self.child.wait().unwrap().success());
    }
}

fn tool(name: &str, args: &[&str]) -> String {
    let output = Command::new(name)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{name}: {error}; install e2fsprogs"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {args:?}: {text}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An ext4 file system on a journaled disk: base, overlay.
fn ext4(dir: &Path, mib: u64) -> PathBuf {
    let (overlay, base) = (dir.join("disk"), dir.join("disk.base"));
    fs::File::create(&base).unwrap().set_len(mib << 20).unwrap();
    tool("mkfs.ext4", &["-q", "-F", text(&base)]);
    drop(disk::Disk::create(&overlay, Some(&base), 0, &options()).unwrap());
    overlay
}

#[test]
fn a_guest_goes_on_while_its_daemon_is_killed_and_started_again_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (device, socket) = (ext4(dir.path(), 128), dir.path().join("vhost"));
    let mut daemon = Daemon::start(&device, &socket);
    let disk = Disk::Vhost { socket: &socket, queues: 2 };
    let mut guest = Guest::start(dir.path(), &[disk]).unwrap();
    guest.run("mount -t ext4 /dev/vda /mnt").unwrap();
    // Writers and a reader that never rest; sums are kept in memory.
    guest.begin(
        "for i in $(seq 1 60); do dd if=/dev/urandom of=/mnt/f$i bs=64k count=8 2> /dev/null && \
         md5sum /mnt/f$i >> /tmp/sums && sync; done; echo written",
    )
    .unwrap();
    for _ in 0..4 {
        thread::sleep(Duration::from_millis(1500)); // the guest writes meanwhile
        daemon.kill();
        daemon = Daemon::start(&device, &socket);
    }
    assert!(guest.finish(Duration::from_secs(300)).unwrap().contains("written"));
    guest
        .run("umount /mnt && echo 3 > /proc/sys/vm/drop_caches && mount -t ext4 /dev/vda /mnt")
        .unwrap();
    let sums = guest.run("md5sum -c /tmp/sums | grep -c OK").unwrap();
    assert_eq!(sums.trim(), "60");
    let errors = guest.run("dmesg | grep -ciE 'I/O error|EXT4-fs error|hung' || true").unwrap();
    assert_eq!(errors.trim(), "0");
    guest.run("rm /mnt/f1? && sync && fstrim /mnt && umount /mnt").unwrap();
    drop(guest);
    daemon.end();

    // What lies on the disk is a clean file system.
    let (whole, image) = (open(&device), dir.path().join("image"));
    let mut bytes = vec![0; whole.size() as usize];
    whole.read_at(0, &mut bytes).unwrap();
    fs::write(&image, bytes).unwrap();
    tool("e2fsck", &["-f", "-n", text(&image)]);
}

#[test]
fn a_guest_sees_its_disk_grow() {
    let dir = tempfile::tempdir().unwrap();
    let (device, socket) = (dir.path().join("file"), dir.path().join("vhost"));
    fs::File::create(&device).unwrap().set_len(16 << 20).unwrap();
    let mut daemon = Daemon::start(&device, &socket);
    let disk = Disk::Vhost { socket: &socket, queues: 1 };
    let mut guest = Guest::start(dir.path(), &[disk]).unwrap();
    assert_eq!(guest.run("cat /sys/block/vda/size").unwrap().trim(), "32768");
    writeln!(daemon.input, "grow {}", 32 << 20).unwrap();
    daemon.await_line("grown");
    let grown = "for i in $(seq 1 100); do [ $(cat /sys/block/vda/size) = 65536 ] && break; \
                 sleep 0.1; done; cat /sys/block/vda/size";
    assert_eq!(guest.run(grown).unwrap().trim(), "65536");
    guest
        .run("dd if=/proc/version of=/dev/vda bs=4k seek=8191 conv=sync,fsync 2> /dev/null")
        .unwrap();
    drop(guest);
    daemon.end();
    let bytes = fs::read(&device).unwrap();
    assert!(bytes[8191 << 12..].starts_with(b"Linux version"));
}

/// Blocks, each written whole with a number that only grows: what is found must be the last number
/// that was answered, or a later one that was under way.
#[test]
fn our_client_loses_nothing_whenever_the_daemon_dies() {
    const BLOCKS: u64 = 64;
    let dir = tempfile::tempdir().unwrap();
    let (device, socket) = (dir.path().join("disk"), dir.path().join("vhost"));
    let base = dir.path().join("disk.base");
    fs::write(&base, vec![0; 1 << 20]).unwrap();
    drop(disk::Disk::create(&device, Some(&base), 0, &options()).unwrap());
    let mut daemon = Daemon::start(&device, &socket);
    let options = ClientOptions { slot_bytes: 4096, ..ClientOptions::default() };
    let mut client = VhostClient::connect(&socket, options).unwrap();
    let (mut number, mut kills, mut answers, mut before) = (0u64, 0, 0u64, 0);
    let mut answered = [0u64; BLOCKS as usize];
    let mut under_way: Vec<Option<(u64, u64)>> = vec![None; 64];
    let mut last_kill = Instant::now();
    let deadline = Instant::now() + LIMIT;
    while kills < 12 || client.queues[0].under_way() > 0 {
        assert!(Instant::now() < deadline, "{kills} kills, {answers} answers");
        let queue = &mut client.queues[0];
        while let Some(slot) = queue.take_slot() {
            if kills >= 12 {
                queue.return_slot(slot);
                break;
            }
            let block = number * 7 % BLOCKS;
            if under_way.iter().flatten().any(|&(other, _)| other == block) {
                queue.return_slot(slot);
                break;
            }
            number += 1;
            queue.fill(slot, &number.to_le_bytes().repeat(512));
            queue.submit(slot, Ask::Write, block * 8, 4096);
            under_way[usize::from(slot)] = Some((block, number));
        }
        let _ = queue.kick();
        while let Some((slot, status)) = queue.poll() {
            let (block, number) = under_way[usize::from(slot)].take().expect("answered once");
            assert_eq!(status, 0, "block {block}");
            answered[block as usize] = number;
            answers += 1;
        }
        // Any moment after the first answers: requests are taken, written, or half handed back.
        let time = Duration::from_micros(20_000 + 3_777 * kills);
        if kills < 12 && last_kill.elapsed() > time && answers >= before + 10 {
            daemon.kill();
            daemon = Daemon::start(&device, &socket);
            client.reconnect(&socket).unwrap();
            (kills, last_kill, before) = (kills + 1, Instant::now(), answers);
        }
    }
    for block in 0..BLOCKS {
        let mut data = [0; 4096];
        assert_eq!(client.queues[0].call(Ask::Read, block * 8, &mut data).unwrap(), 0);
        let numbers: Vec<u64> =
            data.chunks(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).collect();
        assert!(numbers.iter().all(|&found| found == answered[block as usize]), "block {block}");
    }
    assert_eq!(client.queues[0].call(Ask::Flush, 0, &mut []).unwrap(), 0);
    drop(client);
    daemon.end();
}
