//! The client against our own server: every command, every kind of line, and a server that dies.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod nbd_support;

use identity::{Authority, HostName, Identity, PeerCheck, TlsClient, TlsServer};
use nbd_support::{LIMIT, Ram, Random, Rig, noise, wait_for};
use silo_block::io::{Allocation, BlockDevice, Extent};
use silo_expose::nbd::{
    Access, Endpoint, ExportOptions, Exports, NbdClient, NbdClientOptions, NbdError, NbdOptions,
    NbdSecurity, NbdServer, Peers, Unflushed,
};
use std::{
    fs, io,
    path::Path,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

const MIB: usize = 1 << 20;

fn defaults() -> NbdClientOptions {
    NbdClientOptions::default()
}

/// Writes, reads, trims and zeroes at random, next to a model; `threads` share the device, each in
/// a part of its own.
fn exercise(device: &dyn BlockDevice, seed: u64, threads: u64, steps: usize) {
    let part = device.size() / threads;
    thread::scope(|scope| {
        for number in 0..threads {
            scope.spawn(move || {
                let (start, mut random) = (number * part, Random(seed * 77 + number + 1));
                let mut model = vec![0; part as usize];
                device.read_at(start, &mut model).unwrap();
                for step in 0..steps {
                    let offset = random.below(part);
                    let longest = if random.below(8) == 0 { part } else { 20_000.min(part) };
                    let length = random.below(longest.min(part - offset) + 1);
                    let range = offset as usize..(offset + length) as usize;
                    match random.below(10) {
                        0..=3 => {
                            let data = noise(random.next(), length as usize);
                            device.write_at(start + offset, &data).unwrap();
                            model[range].copy_from_slice(&data);
                        }
                        4..=7 => {
                            let mut data = vec![0xee; length as usize];
                            device.read_at(start + offset, &mut data).unwrap();
                            assert!(data == model[range], "step {step}: {length} at {offset}");
                        }
                        8 => {
                            let allocate = random.below(2) == 0;
                            device.zero(start + offset, length, allocate).unwrap();
                            model[range].fill(0);
                        }
                        _ => device.flush().unwrap(),
                    }
                }
                let mut data = vec![0; part as usize];
                device.read_at(start, &mut data).unwrap();
                assert!(data == model, "part {number}");
            });
        }
    });
}

#[test]
fn many_threads_on_several_connections_read_what_they_wrote() {
    let ram = Arc::new(Ram::new(24 * MIB + 78));
    let rig = Rig::new(ram.clone());
    let client = rig.client(NbdClientOptions { connections: 3, ..defaults() });
    assert_eq!((client.size(), client.connections()), (24 * MIB as u64 + 78, 3));
    exercise(&client, 1, 6, 150);
    client.flush().unwrap();
    assert!(ram.durable() == ram.now());
    // Longer than any request, both ways, from one thread.
    let data = noise(5, 23 * MIB);
    client.write_at(77, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.read_at(77, &mut back).unwrap();
    assert!(back == data);
}

#[test]
fn every_answer_of_the_device_arrives_as_what_it_is() {
    let ram = Arc::new(Ram::new(MIB));
    let rig = Rig::new(ram.clone());
    let client = rig.client(defaults());
    ram.full.store(true, Ordering::SeqCst);
    assert_eq!(client.write_at(0, &[1]).unwrap_err().kind(), io::ErrorKind::StorageFull);
    ram.full.store(false, Ordering::SeqCst);
    for (offset, length) in [(MIB as u64, 1), (u64::MAX, 2), (MIB as u64 - 1, 2)] {
        let error = client.read_at(offset, &mut vec![0; length]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
    }
    client.read_at(MIB as u64, &mut []).unwrap();
    client.prefetch(0, 4096).unwrap();

    let exports = Arc::new(Exports::new());
    exports
        .add("base", Arc::new(Ram::read_only(noise(1, 8192))), ExportOptions::default())
        .unwrap();
    let options = ExportOptions { access: Access::ReadOnly, ..ExportOptions::default() };
    exports.add("kept", ram.clone(), options).unwrap();
    let rig = Rig::serving(exports, NbdOptions::default());
    for export in ["base", "kept"] {
        let client = rig.client(NbdClientOptions { export: export.to_owned(), ..defaults() });
        assert!(client.is_read_only());
        let error = client.write_at(0, &[1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{export}: {error}");
        client.read_at(0, &mut [0; 512]).unwrap();
    }
    let nothing = NbdClient::connect(&rig.endpoint(), defaults()).map(drop).unwrap_err();
    assert!(
        nothing.to_string().contains("it has none"),
        "two exports, and none is \"\": {nothing}"
    );
}

#[test]
fn extents_and_holes_come_through() {
    let ram = Arc::new(Ram::new(64 * MIB));
    let rig = Rig::new(ram.clone());
    let client = rig.client(defaults());
    client.write_at(MIB as u64, &noise(1, MIB)).unwrap();
    client.write_at(40 * MIB as u64, &noise(2, 4096)).unwrap();
    let whole = client.extents(0, 64 * MIB as u64).unwrap();
    assert_eq!(whole, ram.extents(0, 64 * MIB as u64).unwrap());
    assert_eq!(whole.len(), 5);
    let run = |length, allocation| Extent { length, allocation };
    assert_eq!(
        client.extents(MIB as u64 - 10, 20).unwrap(),
        [run(10, Allocation::Hole), run(10, Allocation::Data)]
    );
    assert!(client.extents(5, 0).unwrap().is_empty());
    // A read over holes gives zeros where they are, and reads only what is none.
    let mut data = vec![0xee; 3 * MIB];
    let before = ram.reads.load(Ordering::Relaxed);
    client.read_at(0, &mut data).unwrap();
    assert!(data == ram.now()[..3 * MIB]);
    client.read_at(50 * MIB as u64, &mut data).unwrap();
    assert!(data.iter().all(|byte| *byte == 0));
    let reads = ram.reads.load(Ordering::Relaxed) - before;
    assert!(reads <= 2, "{reads} reads of the device for one MiB that is no hole");
}

fn authority(dir: &Path, hosts: &[&str]) {
    let authority = Authority::create(dir).unwrap();
    for host in hosts {
        authority.issue(&HostName::new(host).unwrap(), Duration::from_secs(3600)).unwrap();
    }
}

fn identity(dir: &Path, host: &str) -> Identity {
    Identity::load(dir, &HostName::new(host).unwrap()).unwrap()
}

#[test]
fn tls_and_tcp_carry_the_same_and_strangers_get_nothing() {
    let dir = tempfile::tempdir().unwrap();
    authority(dir.path(), &["server", "client", "other"]);
    let name = |host: &str| HostName::new(host).unwrap();
    let tls = TlsServer::new(&identity(dir.path(), "server"));
    let exports = Arc::new(Exports::new());
    let ram = Arc::new(Ram::new(4 * MIB));
    exports.add("all", ram, ExportOptions::default()).unwrap();
    let peers = Peers::Named([name("client")].into());
    let options = ExportOptions { peers, ..ExportOptions::default() };
    exports.add("one", Arc::new(Ram::new(MIB)), options).unwrap();
    let security = NbdSecurity::Required(tls);
    let options = NbdOptions { security, ..NbdOptions::default() };
    let any = Endpoint::Tcp(([127, 0, 0, 1], 0).into());
    let server = NbdServer::serve(&any, exports.clone(), options).unwrap();
    let connect = |host: &str, export: &str, peer: &str| {
        let tls = TlsClient::new(&identity(dir.path(), host), &name(peer));
        let export = export.to_owned();
        let options = NbdClientOptions { tls: Some(tls), export, connections: 2, ..defaults() };
        NbdClient::connect(server.endpoint(), options)
    };
    let client = connect("client", "all", "server").unwrap();
    assert_eq!(client.connections(), 2);
    exercise(&client, 2, 4, 60);
    exercise(&connect("client", "one", "server").unwrap(), 3, 1, 40);
    let refused = connect("other", "one", "server").map(drop).unwrap_err();
    assert!(refused.to_string().contains("not for us"), "{refused}");
    let wrong = connect("client", "all", "other").map(drop).unwrap_err();
    assert!(wrong.to_string().contains("certificate"), "{wrong}");
    let plain = NbdClientOptions { export: "all".to_owned(), ..defaults() };
    let refused = NbdClient::connect(server.endpoint(), plain).map(drop).unwrap_err();
    assert!(refused.to_string().contains("it wants TLS"), "{refused}");
    let elsewhere = tempfile::tempdir().unwrap();
    authority(elsewhere.path(), &["server", "client"]);
    let stranger = TlsClient::new(&identity(elsewhere.path(), "client"), &name("server"));
    let options = NbdClientOptions { tls: Some(stranger), ..defaults() };
    assert!(NbdClient::connect(server.endpoint(), options).is_err());

    // A server without TLS, and a client that insists.
    let plain = Rig::new(Arc::new(Ram::new(MIB)));
    let tls = TlsClient::new(&identity(dir.path(), "client"), &name("server"));
    let options = NbdClientOptions { tls: Some(tls), ..defaults() };
    let refused = NbdClient::connect(&plain.endpoint(), options).map(drop).unwrap_err();
    assert!(refused.to_string().contains("without TLS"), "{refused}");

    // The files of other programs, over a unix socket.
    let pem = tempfile::tempdir().unwrap();
    for (from, to) in [
        ("ca.crt", "ca-cert.pem"),
        ("server.crt", "server-cert.pem"),
        ("server.key", "server-key.pem"),
        ("client.crt", "client-cert.pem"),
        ("client.key", "client-key.pem"),
    ] {
        fs::copy(dir.path().join(from), pem.path().join(to)).unwrap();
    }
    let tls = TlsServer::load_pem(pem.path(), PeerCheck::Required).unwrap();
    let security = NbdSecurity::Optional(tls);
    let options = NbdOptions { security, ..NbdOptions::default() };
    let rig = Rig::with(Arc::new(Ram::new(2 * MIB)), options);
    let tls = TlsClient::load_pem(pem.path(), "server").unwrap();
    exercise(&rig.client(NbdClientOptions { tls: Some(tls), ..defaults() }), 4, 2, 40);
    exercise(&rig.client(defaults()), 5, 2, 40);
}

#[test]
fn what_was_not_flushed_is_written_again_to_a_server_that_lost_it() {
    let ram = Arc::new(Ram::new(4 * MIB));
    let mut rig = Rig::new(ram.clone());
    let unflushed = Unflushed::WriteAgain { bytes: 8 << 20 };
    let client = rig.client(NbdClientOptions { connections: 2, unflushed, ..defaults() });
    client.write_at(0, &[1; 8192]).unwrap();
    client.flush().unwrap();
    client.write_at(4096, &[2; 4096]).unwrap();
    client.write_at(MIB as u64, &noise(9, MIB)).unwrap();
    client.zero(0, 100, false).unwrap();
    rig.kill();
    ram.cut_power();
    assert_eq!(ram.now()[4096], 1);
    // The client finds out while the server is away, and waits for it.
    let reader = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut byte = [0xee];
            client.read_at(4096, &mut byte).map(|()| byte[0])
        });
        thread::sleep(Duration::from_millis(50));
        rig.start();
        reader.join().unwrap()
    });
    assert_eq!(reader.unwrap(), 2);
    client.flush().unwrap();
    let durable = ram.durable();
    assert_eq!((durable[0], durable[100], durable[4096]), (0, 1, 2));
    assert!(durable[MIB..2 * MIB] == noise(9, MIB));
    assert_eq!(client.reconnects(), 1);
}

#[test]
fn a_loss_that_cannot_be_made_good_fails_the_next_flush() {
    let ram = Arc::new(Ram::new(MIB));
    let mut rig = Rig::new(ram.clone());
    let client = rig.client(defaults());
    client.write_at(0, &[1; 4096]).unwrap();
    client.flush().unwrap();
    rig.kill();
    rig.start();
    client.flush().unwrap();
    client.write_at(0, &[2; 4096]).unwrap();
    rig.kill();
    ram.cut_power();
    rig.start();
    let error = client.flush().unwrap_err();
    assert!(error.to_string().contains("not been flushed"), "{error}");
    client.write_at(0, &[3; 4096]).unwrap();
    client.flush().unwrap();
    assert_eq!(ram.durable()[0], 3);
}

/// Interrupts whoever waits, again if that came before it waited.
fn interrupt<T>(client: &NbdClient, waiting: &thread::ScopedJoinHandle<'_, T>) {
    let start = Instant::now();
    while !waiting.is_finished() {
        assert!(start.elapsed() < LIMIT, "it waits on");
        client.interrupt();
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_server_that_does_not_come_back_fails_requests_in_time() {
    let mut rig = Rig::new(Arc::new(Ram::new(MIB)));
    let quick = NbdClientOptions { reconnect: Duration::from_millis(200), ..defaults() };
    let (client, patient) = (rig.client(quick), rig.client(defaults()));
    rig.kill();
    let start = Instant::now();
    let error = client.read_at(0, &mut [0; 1]).unwrap_err();
    assert!(error.to_string().contains("was not found again within 200ms"), "{error}");
    assert!(start.elapsed() < LIMIT);
    // Who waits longer can be interrupted.
    thread::scope(|scope| {
        let waiting = scope.spawn(|| patient.write_at(0, &[1]));
        thread::sleep(Duration::from_millis(100));
        assert!(!waiting.is_finished());
        interrupt(&patient, &waiting);
        let error = waiting.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted, "{error}");
    });
    // Another device in the place of the first is not taken for it.
    let exports = Arc::new(Exports::new());
    exports.add("", Arc::new(Ram::new(2 * MIB)), ExportOptions::default()).unwrap();
    rig.exports = exports;
    rig.start();
    let error = client.read_at(0, &mut [0; 1]).unwrap_err();
    assert!(error.to_string().contains("has changed"), "{error}");
}

#[test]
fn a_server_that_is_silent_counts_as_lost() {
    let ram = Arc::new(Ram::new(MIB));
    let rig = Rig::new(ram.clone());
    // Longer than a busy computer lets a request wait.
    let silence_limit = Duration::from_secs(1);
    let reconnect = Duration::from_secs(1);
    let client = rig.client(NbdClientOptions { silence_limit, reconnect, ..defaults() });
    client.read_at(0, &mut [0; 512]).unwrap();
    thread::sleep(silence_limit * 3 / 2);
    client.read_at(0, &mut [0; 512]).unwrap();
    assert_eq!(client.reconnects(), 0, "nobody waited while it was silent");
    ram.stick(true);
    let start = Instant::now();
    assert!(client.read_at(0, &mut [0; 512]).is_err());
    assert!(start.elapsed() < LIMIT);
    ram.free();
    client.read_at(0, &mut [0; 512]).unwrap();
    // A server that works on a request for long: an interrupt ends the wait.
    let client = rig.client(defaults());
    ram.stick(true);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| client.flush());
        interrupt(&client, &waiting);
        assert!(waiting.join().unwrap().is_err());
    });
    ram.free();
    client.flush().unwrap();
}

#[test]
fn what_cannot_be_connected_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let nobody = Endpoint::Unix(dir.path().join("nobody"));
    let error = NbdClient::connect(&nobody, defaults()).map(drop).unwrap_err();
    assert!(matches!(error, NbdError::Connect { .. }) && error.to_string().contains("nobody"));
    // Something that speaks another language, or nothing.
    for (bytes, reason) in
        [(&b"HTTP/1.1 200 OK\r\n\r\n"[..], "does not speak NBD"), (b"", "timed out")]
    {
        let path = dir.path().join(format!("s{}", bytes.len()));
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            io::Write::write_all(&mut stream, bytes).unwrap();
            // Until the client hangs up.
            let _ = io::copy(&mut stream, &mut io::sink());
        });
        let limit = Duration::from_millis(300);
        let options = NbdClientOptions { handshake_limit: limit, ..defaults() };
        let error = NbdClient::connect(&Endpoint::Unix(path), options).map(drop).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
        server.join().unwrap();
    }
}

#[test]
fn dropping_a_client_says_goodbye() {
    let rig = Rig::new(Arc::new(Ram::new(MIB)));
    let client = rig.client(NbdClientOptions { connections: 2, ..defaults() });
    client.read_at(0, &mut [0; 512]).unwrap();
    let server = rig.server.as_ref().unwrap();
    assert_eq!(server.connections(), 2);
    drop(client);
    wait_for("the goodbye", || server.connections() == 0);
    assert!(LIMIT > Duration::ZERO);
}
