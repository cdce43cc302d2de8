//! The same against an S3 server that is not ours, over TCP: moto, from PyPI.

use crate::support::*;
use silo_block::io::BlockDevice;
use silo_store::{Access, Depth, Environment, Reading, Store, StoreError, StoreUrl, capture::Want};
use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

struct Moto {
    child: Child,
    port: u16,
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says to the runner of the tests that something was not proven here.
fn missing(what: &str) {
    eprintln!("not proven here: {what}");
    if let Ok(path) = std::env::var("ARCHITECT_MISSING") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        writeln!(file.unwrap(), "{what}").unwrap();
    }
}

fn start() -> Option<Moto> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/moto.sh");
    let made = Command::new("timeout").arg("240").arg(script).output().ok()?;
    if !made.status.success() {
        missing("moto (a second S3 server, from PyPI): it could not be installed");
        return None;
    }
    let command = String::from_utf8(made.stdout).unwrap();
    let mut words = command.split_whitespace();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let child = Command::new(words.next().unwrap())
        .args(words)
        .args(["-H", "127.0.0.1", "-p", &port.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let moto = Moto { child, port };
    let until = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < until, "moto does not listen on its port");
        std::thread::sleep(Duration::from_millis(50));
    }
    // A bucket; moto takes any signature, and none.
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "PUT /bucket HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 0\r\nAuthorization: AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Some(moto)
}

#[test]
fn a_second_s3_server_takes_generations_and_fences_writers() {
    let Some(moto) = start() else { return };
    let url =
        format!("s3://bucket/folder?endpoint=http://127.0.0.1:{}&region=us-east-1", moto.port);
    let url: StoreUrl = url.parse().unwrap();
    let environment =
        Environment::given([("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")]);
    let store = match Store::open(&url, Access::Write, &environment, limits()) {
        Ok(store) => store,
        // A version of moto without the lock of conditional puts is refused, which is right.
        Err(error @ StoreError::NoCreateIfAbsent { .. }) => {
            missing(&format!("moto with create-if-absent that has one winner ({error})"));
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let disk = Disk::new(noise(1, 1 << 20));
    let group = group(&[("disk", 4096, &disk)]);
    let mut first = writer(&store, "vm");
    round(&mut first, &group, Want::Changed).unwrap();
    group.device(0).write_at(77, &noise(2, 50_000)).unwrap();
    round(&mut first, &group, Want::Changed).unwrap();
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
    let (done, stop) = (Reading::default(), AtomicBool::new(false));
    let verified = store.verify(&ring(), &line("vm"), None, Depth::Full, &done, &stop).unwrap();
    assert!(verified.is_well(), "{verified:?}");
    let _second = writer(&store, "vm");
    let error = round(&mut first, &group, Want::Everything).unwrap_err();
    assert!(matches!(error, StoreError::Fenced { .. }), "{error}");
}
