//! The block server against QEMU's own client, and the death of its process under load.
//! Needs the package qemu-utils.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{Client, FLUSH, Process, qemu, qemu_io, serve};
use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend(state.to_le_bytes());
    }
    out.truncate(bytes);
    out
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn qemu_reads_writes_flushes_discards_and_copies_through_it() {
    let dir = tempfile::tempdir().unwrap();
    let (base, socket) = (dir.path().join("base"), dir.path().join("nbd"));
    fs::write(&base, vec![0x5a; 8 << 20]).unwrap();
    let overlay = dir.path().join("overlay");
    let _server = serve(&base, &overlay, &socket);
    let url = format!("nbd:unix:{}", text(&socket));
    let commands = [
        "read -P 0x5a 0 8M",
        "write -P 0x11 512 512",
        "write -P 0x22 64k 3M",
        "write -f -P 0x33 5M 4k",
        "flush",
        "read -P 0x5a 0 512",
        "read -P 0x11 512 512",
        "read -P 0x5a 1024 3072",
        "read -P 0x22 64k 3M",
        "discard 1M 1M",
        "read -P 0 1M 1M",
        "read -P 0x22 2M 64k",
        "write -z 6M 1000",
        "write -z -u 7M 512k",
        "read -P 0 6M 1000",
        "read -P 0x5a 6292456 8",
        "read -P 0 7M 512k",
        "aio_write -P 0x44 4M 64k",
        "aio_write -P 0x55 4160k 64k",
        "aio_read -P 0x5a 4608k 64k",
        "aio_flush",
        "read -P 0x44 4M 64k",
        "read -P 0x55 4160k 64k",
    ]
    .map(str::to_owned);
    qemu_io(&["-f", "raw", &url], &commands);
    assert!(qemu("qemu-img", &["info", &url]).contains("8 MiB"));

    let image = dir.path().join("image");
    let mut bytes = noise(3, 8 << 20);
    bytes[1 << 20..3 << 20].fill(0);
    fs::write(&image, &bytes).unwrap();
    qemu("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&image), &url]);
    let compared = qemu("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&image), &url]);
    assert!(compared.contains("identical"), "{compared}");
    assert_eq!(fs::read(&base).unwrap(), vec![0x5a; 8 << 20], "the base is never written");
}

#[test]
fn qemu_goes_on_after_its_server_was_killed_and_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let (base, socket) = (dir.path().join("base"), dir.path().join("nbd"));
    fs::write(&base, noise(1, 4 << 20)).unwrap();
    let overlay = dir.path().join("overlay");
    let mut server = serve(&base, &overlay, &socket);
    let target = format!(
        "driver=nbd,server.type=unix,server.path={},reconnect-delay=30,open-timeout=30",
        text(&socket)
    );
    let mut client = Process(
        Command::new("qemu-io")
            .args(["--image-opts", &target])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("install the package qemu-utils"),
    );
    // 3000 writes of 512 to 4096 bytes, a flush now and then; each block gets its own pattern.
    let mut input = client.0.stdin.take().unwrap();
    let writer = thread::spawn(move || {
        for step in 0..3000u32 {
            let (block, pattern) = (step * 7 % 1000, step % 250 + 1);
            let length = 512 << (step % 4);
            let line = format!("write -P {pattern} {} {length}\n", block * 4096);
            input.write_all(line.as_bytes()).unwrap();
            if step % 50 == 0 {
                input.write_all(b"flush\n").unwrap();
                // Spread over all the kills below.
                thread::sleep(Duration::from_millis(12));
            }
        }
        for block in 0..1000u32 {
            // The last step that wrote this block, and the pattern it left.
            let step = (0..3000).rev().find(|step| step * 7 % 1000 == block).unwrap();
            let length = 512 << (step % 4);
            let line = format!("read -P {} {} {length}\n", step % 250 + 1, block * 4096);
            input.write_all(line.as_bytes()).unwrap();
        }
        input.write_all(b"quit\n").unwrap();
    });
    let mut out = client.0.stdout.take().unwrap();
    let reader = thread::spawn(move || std::io::read_to_string(&mut out).unwrap());
    for round in 0..5 {
        thread::sleep(Duration::from_millis(40 + round * 23));
        server.0.kill().unwrap();
        server.0.wait().unwrap();
        server = serve(&base, &overlay, &socket);
    }
    writer.join().unwrap();
    let printed = reader.join().unwrap();
    assert!(client.0.wait().unwrap().success());
    assert!(!printed.contains("failed"), "{printed}");
    let count = |what| printed.lines().filter(|line| line.contains(what)).count();
    let bad = printed.lines().find(|line| line.contains("verification") || line.contains("error"));
    assert_eq!((count("wrote "), count("read "), bad), (3000, 1000, None));
    drop(server);
}

#[test]
fn every_write_that_was_answered_is_there_after_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let (base, socket) = (dir.path().join("base"), dir.path().join("nbd"));
    fs::write(&base, noise(1, 1 << 20)).unwrap();
    let overlay = dir.path().join("overlay");
    let mut expected = fs::read(&base).unwrap();
    let mut random = 4u64;
    let answered = Arc::new(AtomicU64::new(0));
    for round in 0..8u64 {
        let mut server = serve(&base, &overlay, &socket);
        let (mut client, size) = Client::go(&socket).unwrap();
        // What was answered before the last kill, and perhaps the one write that was not.
        let found = client.read(0, size as u32).unwrap();
        assert!(found == expected, "round {round}, {answered:?} writes");
        let victim = server.0.id();
        let pause = Duration::from_millis(20 + round * 9);
        let (start, enough) = (Instant::now(), answered.load(Ordering::Relaxed) + 20);
        let so_far = answered.clone();
        let killer = thread::spawn(move || {
            // When some writes were answered: a busy computer takes its time.
            while start.elapsed() < pause || so_far.load(Ordering::Relaxed) < enough {
                assert!(start.elapsed() < common::LIMIT, "hardly a write is answered");
                thread::sleep(Duration::from_millis(1));
            }
            let killed = Command::new("kill").args(["-9", &victim.to_string()]).status();
            assert!(killed.unwrap().success());
        });
        loop {
            assert!(start.elapsed() < common::LIMIT, "the server does not die");
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let length = (random >> 40) % 9000 + 1;
            let offset = (random >> 20) % (size - length);
            let data = noise(random, length as usize);
            if client.write(offset, &data, 0).is_err() {
                break;
            }
            answered.fetch_add(1, Ordering::Relaxed);
            expected[offset as usize..(offset + length) as usize].copy_from_slice(&data);
            if random >> 60 == 0 && client.call(FLUSH, 0, 0, 0).is_err() {
                break;
            }
        }
        killer.join().unwrap();
        server.0.wait().unwrap();
        // The last write was not answered: it may be there in part. Write it again, as QEMU does.
        server = serve(&base, &overlay, &socket);
        let (mut client, _) = Client::go(&socket).unwrap();
        let length = (random >> 40) % 9000 + 1;
        let offset = (random >> 20) % (size - length);
        let data = noise(random, length as usize);
        assert_eq!(client.write(offset, &data, 0).unwrap(), 0);
        expected[offset as usize..(offset + length) as usize].copy_from_slice(&data);
        drop(server);
    }
}

#[test]
fn the_command_creates_inspects_hashes_and_stops_cleanly() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay) = (dir.path().join("base"), dir.path().join("overlay"));
    fs::write(&base, b"abc").unwrap();
    let silo = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_silo")).args(arguments).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.success(), text(output.stdout), text(output.stderr))
    };
    let json = |arguments: &[&str]| -> serde_json::Value {
        let (fine, out, error) = silo(&[arguments, &["--json"]].concat());
        assert!(fine, "{error}");
        serde_json::from_str(&out).unwrap()
    };
    let hash = json(&["hash", text(&base)]);
    let known = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85";
    assert_eq!((hash["blake3"].as_str(), hash["bytes"].as_u64()), (Some(known), Some(3)));
    let create = ["create", "--base", text(&base), "--overlay", text(&overlay), "--size", "64K"];
    assert_eq!(json(&create)["bytes"], 65_536);
    let (fine, _, error) = silo(&create);
    assert!(!fine && error.contains("already holds a disk"), "{error}");

    let socket = dir.path().join("nbd");
    let mut server = serve(&base, &overlay, &socket);
    let (mut client, size) = Client::go(&socket).unwrap();
    assert_eq!(size, 65_536);
    assert_eq!(client.write(4096, &[1; 8192], 0).unwrap(), 0);
    let seen = json(&["inspect", text(&overlay)]);
    assert_eq!(
        (seen["data_blocks"].as_u64(), seen["unflushed_blocks"].as_u64()),
        (Some(2), Some(2))
    );
    let status = Command::new("kill").arg(server.0.id().to_string()).status().unwrap();
    assert!(status.success());
    assert!(server.0.wait().unwrap().success(), "SIGTERM is a clean end");
    let seen = json(&["inspect", text(&overlay)]);
    assert_eq!(
        (seen["unflushed_blocks"].as_u64(), seen["status"].as_str()),
        (Some(0), Some("whole"))
    );
    let (fine, out, _) = silo(&["inspect", text(&overlay)]);
    assert!(fine && out.contains("2 in the overlay"), "{out}");
    let (fine, out, _) = silo(&["completions", "bash"]);
    assert!(fine && out.contains("silo"));
    let (fine, _, error) = silo(&["inspect", text(dir.path())]);
    assert!(!fine && error.contains("holds no disk"), "{error}");
}
