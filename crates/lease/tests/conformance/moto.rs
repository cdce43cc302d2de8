//! An S3 server that is not ours: moto, from PyPI.

use lease_testing::missing;
use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

pub(crate) struct Moto {
    child: Child,
    port: u16,
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Moto {
    pub(crate) fn address(&self) -> String {
        format!("s3://bucket/leases?endpoint=http://127.0.0.1:{}&region=us-east-1", self.port)
    }
}

/// It takes any.
pub(crate) fn credentials() -> Vec<(&'static str, String)> {
    vec![("AWS_ACCESS_KEY_ID", "a".to_owned()), ("AWS_SECRET_ACCESS_KEY", "b".to_owned())]
}

pub(crate) fn start() -> Option<Moto> {
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
    let mut stream = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(e) => assert!(Instant::now() < until, "moto does not listen on its port: {e}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    write!(
        stream,
        "PUT /bucket HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 0\r\n\
         Authorization: AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, \
         SignedHeaders=host, Signature=0\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Some(moto)
}
