//! The block server against a client that behaves, and one that does not.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{
    BLOCK, Client, DISCONNECT, FLUSH, FUA, LIMIT, NO_HOLE, READ, TRIM, WRITE, WRITE_ZEROES, disk,
};
use silo::{
    block::{BlockIndex, BlockRange, BlockSet},
    device::Device,
    disk::Disk,
    nbd::{NbdError, NbdOptions, NbdServer},
};
use std::{
    io::Write,
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

struct Rig {
    dir: tempfile::TempDir,
    disk: Arc<Disk>,
    server: Option<NbdServer>,
}

impl Rig {
    fn new(options: NbdOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(disk(dir.path(), &base(), 64));
        let socket = dir.path().join("nbd");
        let server = Some(NbdServer::start(&socket, disk.clone(), options).unwrap());
        Self { dir, disk, server }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd")
    }

    fn client(&self) -> Client {
        let (client, size) = Client::go(&self.socket()).unwrap();
        assert_eq!(size, 64 * BLOCK);
        client
    }
}

fn base() -> Vec<u8> {
    (0..32 * BLOCK).map(|at| (at / 512 % 251) as u8 + 1).collect()
}

fn defaults() -> NbdOptions {
    NbdOptions::default()
}

#[test]
fn what_is_written_on_one_connection_is_read_flushed_and_zeroed_on_another() {
    let rig = Rig::new(defaults());
    let (mut one, mut two) = (rig.client(), rig.client());
    assert_eq!(two.read(0, 512).unwrap(), base()[..512]);
    assert_eq!(two.read(31 * BLOCK, 8192).unwrap()[4096..], [0; 4096]);
    assert_eq!(one.write(100, &[9; 5000], 0).unwrap(), 0);
    assert_eq!(two.call(FLUSH, 0, 0, 0).unwrap(), 0);
    assert_eq!(two.read(99, 5002).unwrap()[1..5001], [9; 5000]);
    assert_eq!(one.write(40 * BLOCK, &vec![7; 2 << 10], FUA).unwrap(), 0);
    assert_eq!(two.call(WRITE_ZEROES, 0, 0, 8192).unwrap(), 0);
    assert_eq!(two.call(WRITE_ZEROES, NO_HOLE | FUA, 8192, 8192).unwrap(), 0);
    assert_eq!(one.call(TRIM, FUA, 4 * BLOCK, 4096).unwrap(), 0);
    assert_eq!(one.read(0, 5 * 4096).unwrap(), vec![0; 5 * 4096]);
    // The longest there is, both ways.
    let long = vec![3; 2 << 20];
    let dir = tempfile::tempdir().unwrap();
    let big = Arc::new(disk(dir.path(), &[1; 10], 1024));
    let server = NbdServer::start(&dir.path().join("s"), big, defaults()).unwrap();
    let (mut client, _) = Client::go(server.path()).unwrap();
    assert_eq!(client.write(BLOCK, &long, 0).unwrap(), 0);
    assert!(client.read(BLOCK, 2 << 20).unwrap() == long);
    assert_eq!(rig.server.as_ref().unwrap().connections(), 2);
}

#[test]
fn options_are_answered_as_the_protocol_says() {
    let rig = Rig::new(NbdOptions { export: "root".to_owned(), ..defaults() });
    let mut client = Client::connect(&rig.socket()).unwrap();
    client.send(&3u32.to_be_bytes()).unwrap();
    client.option(3, b"").unwrap();
    assert_eq!(client.option_reply(3).unwrap(), (2, b"\0\0\0\x04root".to_vec()));
    assert_eq!(client.option_reply(3).unwrap().0, 1);
    let too_long = vec![0; 100_000];
    for (option, data, error) in [
        (8, &b"x"[..], 0x8000_0003_u32), // structured replies with data
        (5, b"", 0x8000_0002),           // TLS, which is not set up
        (10, b"\0\0\0\0\0\0\0\0", 0x8000_0003), // meta context before structured replies
        (4242, &[7; 3000], 0x8000_0001), // of the future
        (3, b"x", 0x8000_0003),          // LIST with data
        (7, b"\0\0\0\x05roo", 0x8000_0003), // lengths
        (7, b"\0\0\0\x03hda\0\0", 0x8000_0006), // another export
        (6, &too_long, 0x8000_0009),     // too long
    ] {
        client.option(option, data).unwrap();
        assert_eq!(client.option_reply(option).unwrap().0, error, "option {option}");
    }
    client.option(6, b"\0\0\0\x04root\0\0").unwrap();
    assert_eq!(client.option_reply(6).unwrap().0, 3);
    assert_eq!(client.option_reply(6).unwrap().0, 3);
    assert_eq!(client.option_reply(6).unwrap().0, 1);
    client.option(2, b"").unwrap();
    assert_eq!(client.option_reply(2).unwrap().0, 1);
    assert!(client.is_cut_off());

    // The oldest way in, with and without padding.
    for (flags, padding) in [(1u32, 124), (3, 0)] {
        let mut client = Client::connect(&rig.socket()).unwrap();
        client.send(&flags.to_be_bytes()).unwrap();
        client.option(1, b"root").unwrap();
        let reply = client.read_data(10 + padding).unwrap();
        assert_eq!(reply[..10], *b"\0\0\0\0\0\x04\0\0\x0d\x6d");
        assert_eq!(client.read(0, 4).unwrap(), base()[..4]);
    }
}

#[test]
fn hostile_handshakes_are_cut_off_and_harm_nobody() {
    let rig = Rig::new(NbdOptions { handshake_limit: Duration::from_secs(1), ..defaults() });
    let mut witness = rig.client();
    let with_flags = |rest: &[u8]| [&[0, 0, 0, 3], rest].concat();
    let many = b"IHAVEOPT\0\0\0\x63\0\0\0\0".repeat(100);
    for (name, bytes) in [
        ("flags that are not", vec![0xff; 4]),
        ("not fixed newstyle", vec![0; 4]),
        ("no magic", with_flags(b"GET / HTTP/1.1\r\n\r\n")),
        ("option of 4 GiB", with_flags(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff")),
        ("export name of 1 MiB", with_flags(b"IHAVEOPT\0\0\0\x01\0\x10\0\0")),
        ("another export", with_flags(b"IHAVEOPT\0\0\0\x01\0\0\0\x03foo")),
        ("options without end", with_flags(&many)),
        ("silence", with_flags(b"")),
        ("half an option", with_flags(b"IHAVEOPT\0\0")),
        ("half a payload", with_flags(b"IHAVEOPT\0\0\0\x07\0\0\0\x10ab")),
    ] {
        let mut client = Client::connect(&rig.socket()).unwrap();
        client.send(&bytes).unwrap();
        let start = Instant::now();
        assert!(client.is_cut_off(), "{name}");
        assert!(start.elapsed() < LIMIT / 2, "{name}");
    }
    assert_eq!(witness.read(0, 512).unwrap(), base()[..512]);
}

#[test]
fn a_handshake_that_drips_ends_by_the_deadline() {
    let rig = Rig::new(NbdOptions { handshake_limit: Duration::from_millis(200), ..defaults() });
    let mut client = Client::connect(&rig.socket()).unwrap();
    let start = Instant::now();
    let mut sent = 0;
    for byte in [0, 0, 0, 3].into_iter().chain(b"IHAVEOPT\0\0\0\x07\0\0\x10\0".iter().copied()) {
        if client.send(&[byte]).is_err() {
            break;
        }
        sent += 1;
        thread::sleep(Duration::from_millis(50));
    }
    assert!(sent < 15, "{sent} bytes in {:?}", start.elapsed());
}

#[test]
fn requests_that_cannot_be_are_refused_and_the_connection_goes_on() {
    let rig = Rig::new(defaults());
    let mut client = rig.client();
    let size = 64 * BLOCK;
    let (invalid, no_space) = (22, 28);
    for (command, flags, offset, length, error) in [
        (READ, 0, size, 1, invalid),
        (READ, 0, size - 1, 2, invalid),
        (READ, 0, u64::MAX, 2, invalid),
        (READ, 0, u64::MAX - 1, 1, invalid),
        (READ, 0, 0, (2 << 20) + 1, invalid),
        (READ, 0, 0, u32::MAX, invalid),
        (TRIM, 0, size - 1, 2, invalid),
        (TRIM, 0, u64::MAX, u32::MAX, invalid),
        (WRITE_ZEROES, 0, size, 1, no_space),
        (WRITE_ZEROES, 32, 0, 1, invalid),
        (READ, 4, 0, 1, invalid),
        (FLUSH, 0x8000, 0, 0, invalid),
        (7, 0, 0, 1, invalid),
        (5, 0, 0, 1, 0),
        (5, 0, size, 1, invalid),
        (999, 0, 0, 1, invalid),
        (READ, 0, 0, 0, 0),
        (TRIM, 0, 0, 0, 0),
        (WRITE_ZEROES, 0, size, 0, 0),
    ] {
        let got = client.call(command, flags, offset, length).unwrap();
        assert_eq!(got, error, "command {command} flags {flags} {length} at {offset}");
    }
    assert_eq!(client.write(size - 1, b"xy", 0).unwrap(), no_space);
    assert_eq!(client.write(u64::MAX, b"xy", 0).unwrap(), no_space);
    assert_eq!(client.write(0, &vec![1; 3 << 20], 0).unwrap(), invalid);
    assert_eq!(client.write(0, b"", 0).unwrap(), 0);
    assert_eq!(client.read(0, 512).unwrap(), base()[..512], "nothing was changed");

    client.request(WRITE, 0, 0, u32::MAX, b"").unwrap();
    assert!(client.is_cut_off(), "4 GiB are not skipped");
    let mut client = rig.client();
    client.send(&[0x55; 28]).unwrap();
    assert!(client.is_cut_off(), "a request without its magic");
    let mut client = rig.client();
    client.request(DISCONNECT, 0, 0, 0, b"").unwrap();
    assert!(client.is_cut_off(), "goodbye");
}

#[test]
fn garbage_after_the_handshake_harms_nobody() {
    let rig = Rig::new(NbdOptions { stall_limit: Duration::from_millis(200), ..defaults() });
    let mut state = 88_172_645_463_325_252_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..200 {
        let mut client = rig.client();
        let mut bytes = Vec::new();
        for _ in 0..random() % 6 {
            bytes.extend(0x2560_9513_u32.to_be_bytes());
            bytes.extend(((random() & random() & random()) as u16).to_be_bytes());
            bytes.extend(((random() % 9) as u16).to_be_bytes());
            bytes.extend(random().to_be_bytes());
            bytes.extend((random() >> (random() % 64)).to_be_bytes());
            bytes.extend(((random() >> (random() % 64)) as u32).to_be_bytes());
            bytes.extend((0..random() % 40).map(|byte| byte as u8));
        }
        if round % 4 == 0 {
            bytes = (0..random() % 200).map(|_| random() as u8).collect();
        }
        // It may hang up while we write.
        let _ = client.stream.write_all(&bytes);
        let _ = client.stream.shutdown(std::net::Shutdown::Write);
        assert!(client.is_cut_off(), "round {round}");
    }
    let mut witness = rig.client();
    assert_eq!(witness.write(0, b"fine", 0).unwrap(), 0);
    assert_eq!(witness.read(0, 4).unwrap(), b"fine");
}

#[test]
fn a_client_that_stalls_inside_a_request_is_cut_off_and_one_that_is_silent_is_not() {
    let rig = Rig::new(NbdOptions { stall_limit: Duration::from_millis(100), ..defaults() });
    let (mut silent, mut header, mut data) = (rig.client(), rig.client(), rig.client());
    header.send(&0x2560_9513_u32.to_be_bytes()).unwrap();
    data.request(WRITE, 0, 0, 4096, b"not all").unwrap();
    assert!(header.is_cut_off());
    assert!(data.is_cut_off());
    thread::sleep(Duration::from_millis(300));
    assert_eq!(silent.read(0, 512).unwrap(), base()[..512]);
}

/// Arms the rig's disk with `missing`; what it asks for ends up in the list.
fn arm(rig: &Rig, missing: BlockRange) -> Arc<Mutex<Vec<BlockRange>>> {
    let mut set = BlockSet::new(64);
    set.insert_range(missing);
    let asked = Arc::new(Mutex::new(Vec::new()));
    let record = asked.clone();
    rig.disk.reset().unwrap();
    rig.disk.arm(&set, Box::new(move |range| record.lock().unwrap().push(range))).unwrap();
    asked
}

#[test]
fn requests_that_wait_for_blocks_hold_up_none_of_the_others_on_the_connection() {
    let rig = Rig::new(defaults());
    let asked = arm(&rig, BlockRange::new(0, 32));
    let mut client = rig.client();
    let mut waiting = Vec::new();
    for block in 0..30 {
        waiting.push(client.request(READ, 0, block * BLOCK, 4096, b"").unwrap());
    }
    // Part of a block that is missing: waits too.
    let partial = client.request(WRITE, 0, 31 * BLOCK + 10, 2, b"hi").unwrap();
    let start = Instant::now();
    assert_eq!(client.read(40 * BLOCK, 4096).unwrap(), [0; 4096]);
    assert_eq!(client.write(30 * BLOCK, &[5; 4096], 0).unwrap(), 0, "a whole missing block");
    assert_eq!(client.read(30 * BLOCK, 4096).unwrap(), [5; 4096]);
    assert_eq!(client.call(FLUSH, 0, 0, 0).unwrap(), 0);
    assert!(start.elapsed() < LIMIT / 2);

    while asked.lock().unwrap().len() < 31 {
        assert!(start.elapsed() < LIMIT);
        thread::sleep(Duration::from_millis(1));
    }
    for block in (0..32).rev() {
        rig.disk.fill(BlockIndex(block), &[block as u8 + 1; 4096]).unwrap();
    }
    let mut answered = Vec::new();
    for _ in 0..31 {
        let (error, cookie) = client.reply().unwrap();
        assert_eq!(error, 0);
        if cookie != partial {
            let block = waiting.iter().position(|other| *other == cookie).unwrap();
            assert_eq!(client.read_data(4096).unwrap(), [block as u8 + 1; 4096]);
        }
        answered.push(cookie);
    }
    answered.sort_unstable();
    answered.dedup();
    assert_eq!(answered.len(), 31, "each once");
    assert_eq!(client.read(31 * BLOCK + 9, 4).unwrap(), [32, b'h', b'i', 32]);
}

#[test]
fn more_waiting_requests_than_workers_are_all_answered_in_the_end() {
    let rig = Rig::new(defaults());
    arm(&rig, BlockRange::new(0, 64));
    let mut client = rig.client();
    for block in 0..64 {
        client.request(READ, 0, block * BLOCK, 512, b"").unwrap();
    }
    thread::sleep(Duration::from_millis(50));
    rig.disk.fill_zero(BlockRange::new(0, 64)).unwrap();
    for _ in 0..64 {
        assert_eq!(client.reply().unwrap().0, 0);
        assert_eq!(client.read_data(512).unwrap(), [0; 512]);
    }
}

#[test]
fn stopping_ends_waits_hangs_up_and_leaves_the_device_alone() {
    let mut rig = Rig::new(defaults());
    arm(&rig, BlockRange::new(0, 32));
    let (mut waiting, mut idle) = (rig.client(), rig.client());
    for block in 0..20 {
        waiting.request(READ, 0, block * BLOCK, 4096, b"").unwrap();
    }
    // One is still shaking hands.
    let mut shaking = Client::connect(&rig.socket()).unwrap();
    thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    rig.server.take().unwrap().stop(LIMIT * 2).unwrap();
    assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
    assert_eq!(Arc::strong_count(&rig.disk), 1, "no thread has the device any more");
    assert!(waiting.is_cut_off() && idle.is_cut_off() && shaking.is_cut_off());
    assert!(!rig.socket().exists());
    assert!(Client::connect(&rig.socket()).is_err());
}

#[test]
fn a_frozen_disk_answers_writes_with_shutdown_and_reads_with_data() {
    let rig = Rig::new(defaults());
    let mut client = rig.client();
    rig.disk.freeze(LIMIT).unwrap();
    assert_eq!(client.write(0, b"no", 0).unwrap(), 108);
    assert_eq!(client.call(TRIM, 0, 0, 4096).unwrap(), 108);
    assert_eq!(client.call(WRITE_ZEROES, 0, 0, 4096).unwrap(), 108);
    assert_eq!(client.read(0, 512).unwrap(), base()[..512]);
    rig.disk.thaw().unwrap();
    assert_eq!(client.write(0, b"ok", 0).unwrap(), 0);
    // A disk that is being received answers the monitor's first look, and takes no write.
    rig.disk.reset().unwrap();
    assert_eq!(client.read(0, 512).unwrap(), base()[..512]);
    assert_eq!(client.write(0, b"no", 0).unwrap(), 1);
}

#[test]
fn a_path_is_taken_by_one_server_and_freed_by_a_dead_one() {
    let rig = Rig::new(NbdOptions { max_connections: 2, ..defaults() });
    let again = NbdServer::start(&rig.socket(), rig.disk.clone(), defaults());
    assert!(matches!(again, Err(NbdError::Taken { .. })));
    let stale = rig.dir.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    let server = NbdServer::start(&stale, rig.disk.clone(), defaults()).unwrap();
    Client::go(&stale).unwrap();
    drop(server);
    let nowhere = NbdServer::start(&rig.dir.path().join("no/such"), rig.disk.clone(), defaults());
    assert!(matches!(nowhere, Err(NbdError::Listen { .. })));

    // The look of the second server above may still count for a moment.
    let start = Instant::now();
    while rig.server.as_ref().unwrap().connections() > 0 {
        assert!(start.elapsed() < LIMIT);
        thread::sleep(Duration::from_millis(1));
    }
    let (_one, _two) = (rig.client(), rig.client());
    assert!(Client::go(&rig.socket()).is_err(), "a third is turned away");
}
