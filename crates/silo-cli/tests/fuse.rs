//! A journaled disk as a file by FUSE: ext4 in it over a loop device, its server killed, the file
//! system clean afterwards; and fio's verification through the file.
//!
//! Needs root, /dev/fuse, loop devices, and the packages e2fsprogs, mount and fio.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use silo::{
    device::DeviceName,
    disk::{Disk, DiskOptions},
    expose::fuse::{Caching, FuseMount, FuseOptions},
};
use std::{
    fs,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

const LIMIT: Duration = Duration::from_secs(20);

fn options() -> DiskOptions {
    DiskOptions::new(DeviceName::new("disk").unwrap())
}

fn open(path: &Path) -> Disk {
    Disk::open(path, Some(&path.with_extension("base")), &options()).unwrap()
}

/// Not a test: the server, in a process of its own that can be killed. It serves until its input
/// ends.
#[test]
#[ignore = "the server of the other tests"]
fn server() {
    let (Some(disk), Some(at)) =
        (std::env::var_os("SERVER_DISK"), std::env::var_os("SERVER_MOUNT"))
    else {
        return;
    };
    let disk = Arc::new(open(Path::new(&disk)));
    let mount = FuseMount::mount(Path::new(&at), "disk", disk, &FuseOptions::default()).unwrap();
    println!("\nserving");
    io::stdin().read_to_end(&mut Vec::new()).unwrap();
    mount.stop(LIMIT).unwrap();
    println!("stopped");
    std::process::exit(0);
}

struct Server {
    child: Child,
    _input: ChildStdin,
}

impl Server {
    fn start(disk: &Path, at: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["server", "--exact", "--ignored", "--nocapture"])
            .env("SERVER_DISK", disk)
            .env("SERVER_MOUNT", at)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let served =
            BufReader::new(output).lines().map_while(Result::ok).any(|line| line == "serving");
        assert!(served, "the server ended");
        Self { child, _input: input }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn run(name: &str, args: &[&str]) -> (bool, String) {
    let output = Command::new(name)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{name}: {error}; install e2fsprogs, mount and fio"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

fn tool(name: &str, args: &[&str]) -> String {
    let (fine, text) = run(name, args);
    assert!(fine, "{name} {args:?}: {text}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Undoes mounts and loops whatever happens.
struct Undo {
    mounts: Vec<PathBuf>,
    loops: Vec<String>,
}

impl Drop for Undo {
    fn drop(&mut self) {
        for mount in self.mounts.iter().rev() {
            let _ = run("umount", &["-l", text(mount)]);
        }
        for device in &self.loops {
            let _ = run("losetup", &["-d", device]);
        }
    }
}

/// An ext4 file system on a journaled disk.
fn ext4(dir: &Path) -> PathBuf {
    let (overlay, base) = (dir.join("disk"), dir.join("disk.base"));
    fs::File::create(&base).unwrap().set_len(64 << 20).unwrap();
    tool("mkfs.ext4", &["-q", "-F", text(&base)]);
    drop(Disk::create(&overlay, Some(&base), 0, &options()).unwrap());
    overlay
}

#[test]
fn an_ext4_in_the_file_survives_the_death_of_its_server_with_all_that_was_synced() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, at, inner) = (ext4(dir.path()), dir.path().join("fuse"), dir.path().join("ext4"));
    fs::create_dir(&at).unwrap();
    fs::create_dir(&inner).unwrap();
    let mut undo = Undo { mounts: vec![at.clone()], loops: Vec::new() };
    let mut synced = 0u32;
    for round in 0..3 {
        let server = Server::start(&disk, &at);
        let file = at.join("disk");
        let device = tool("losetup", &["--find", "--show", text(&file)]).trim().to_owned();
        undo.loops = vec![device.clone()];
        undo.mounts = vec![at.clone(), inner.clone()];
        tool("mount", &["-t", "ext4", &device, text(&inner)]);
        // What was synced before an earlier death is here.
        for number in 0..synced {
            let content = fs::read(inner.join(format!("f{number}"))).unwrap();
            assert_eq!(content, number.to_le_bytes().repeat(5000), "round {round}, file {number}");
        }
        let (began, before) = (Instant::now(), synced);
        while began.elapsed() < Duration::from_millis(300) || synced < before + 3 {
            let file = fs::File::create(inner.join(format!("f{synced}"))).unwrap();
            io::Write::write_all(&mut &file, &synced.to_le_bytes().repeat(5000)).unwrap();
            file.sync_all().unwrap();
            fs::File::open(&inner).unwrap().sync_all().unwrap();
            synced += 1;
        }
        // Some more that nobody syncs.
        fs::write(inner.join("lost"), vec![7; 3 << 20]).unwrap();
        server.kill();
        tool("umount", &["-l", text(&inner)]);
        let _ = run("losetup", &["-d", &device]);
    }
    // The last server's mount is dead; the next takes it over. The file system is sound.
    let server = Server::start(&disk, &at);
    let (_, journal) = run("e2fsck", &["-p", text(&at.join("disk"))]);
    let checked = tool("e2fsck", &["-f", "-n", text(&at.join("disk"))]);
    assert!(!checked.contains("UNEXPECTED"), "{journal}\n{checked}");
    let listed = tool("debugfs", &["-R", "ls -l /", text(&at.join("disk"))]);
    assert!((0..synced).all(|number| listed.contains(&format!(" f{number}\n"))), "{listed}");
    server.kill();
}

#[test]
fn fio_verifies_what_it_wrote_through_the_file() {
    for (caching, direct) in [(Caching::WriteThrough, "0"), (Caching::None, "1")] {
        let dir = tempfile::tempdir().unwrap();
        let (overlay, at) = (dir.path().join("disk"), dir.path().join("fuse"));
        fs::create_dir(&at).unwrap();
        let disk = Arc::new(Disk::create(&overlay, None, 32 << 20, &options()).unwrap());
        let options = FuseOptions { caching, ..FuseOptions::default() };
        let mount = FuseMount::mount(&at, "disk", disk, &options).unwrap();
        let file = format!("--filename={}", mount.path().display());
        let direct = format!("--direct={direct}");
        tool(
            "fio",
            &[
                "--name=verify",
                &file,
                &direct,
                "--rw=randwrite",
                "--bsrange=512-128k",
                "--bs_unaligned=0",
                "--blockalign=512",
                "--size=32m",
                "--io_size=48m",
                "--ioengine=psync",
                "--numjobs=1",
                "--verify=crc32c",
                "--do_verify=1",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--trim_percentage=0",
                "--fsync=64",
                "--fallocate=none",
                "--overwrite=1",
                "--allow_file_create=0",
            ],
        );
        mount.stop(LIMIT).unwrap();
    }
}

#[test]
fn a_disk_over_fuse_and_a_reader_of_its_own_agree() {
    let dir = tempfile::tempdir().unwrap();
    let (overlay, at) = (dir.path().join("disk"), dir.path().join("fuse"));
    fs::create_dir(&at).unwrap();
    let disk = Arc::new(Disk::create(&overlay, None, 8 << 20, &options()).unwrap());
    let mount = FuseMount::mount(&at, "disk", disk.clone(), &FuseOptions::default()).unwrap();
    let target = format!("driver=file,filename={}", mount.path().display());
    tool(
        "qemu-io",
        &[
            "--image-opts",
            &target,
            "-c",
            "write -P 0x11 64k 1M",
            "-c",
            "write -z 128k 64k",
            "-c",
            "discard 512k 64k",
            "-c",
            "flush",
            "-c",
            "read -P 0x11 64k 64k",
            "-c",
            "read -P 0 128k 64k",
        ],
    );
    let mut bytes = vec![1; 64 << 10];
    disk.read_at(512 << 10, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0), "the discarded part");
    disk.read_at(256 << 10, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0x11));
    mount.stop(LIMIT).unwrap();
}
