//! An S3 server that is not ours, in a process of its own: moto, from PyPI.
#![allow(clippy::unwrap_used, reason = "for tests, which end by panicking")]

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// How long it may take to listen.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Says to the runner of the tests that something was not proven here.
pub fn missing(what: &str) {
    eprintln!("not proven here: {what}");
    if let Ok(path) = std::env::var("ARCHITECT_MISSING") {
        let file = fs::File::options().append(true).create(true).open(path);
        writeln!(file.unwrap(), "{what}").unwrap();
    }
}

/// A moto with one bucket, `bucket`. Ends with this.
pub struct Moto {
    child: Child,
    port: u16,
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A moto that can be started: the command.
pub struct Installed(String);

impl Installed {
    /// Starts it, in this thread's network.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(self) -> Moto {
        let mut words = self.0.split_whitespace();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new(words.next().unwrap())
            .args(words)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let moto = Moto { child, port };
        moto.make_bucket();
        moto
    }
}

impl Moto {
    /// It takes any.
    pub const CREDENTIALS: [(&str, &str); 2] =
        [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];

    /// Starts one, after it was installed if need be. `None` (and it is said to the runner of the tests)
    /// if it cannot be installed here.
    ///
    /// # Panics
    /// If it is there and does not start.
    #[must_use]
    pub fn start() -> Option<Self> {
        Self::install().map(Installed::start)
    }

    /// Installs it if need be, which takes a network; see [`Moto::start`].
    #[must_use]
    pub fn install() -> Option<Installed> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/moto.sh");
        let made = Command::new("timeout").arg("240").arg(script).output().ok()?;
        if !made.status.success() {
            missing("moto (a second S3 server, from PyPI): it could not be installed");
            return None;
        }
        Some(Installed(String::from_utf8(made.stdout).unwrap()))
    }

    /// The address of a folder of its bucket.
    #[must_use]
    pub fn address(&self, folder: &str) -> String {
        format!("s3://bucket/{folder}?endpoint=http://127.0.0.1:{}&region=us-east-1", self.port)
    }

    fn make_bucket(&self) {
        let port = self.port;
        let until = Instant::now() + START_LIMIT;
        let mut stream = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(e) => assert!(Instant::now() < until, "moto does not listen on its port: {e}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        stream.set_read_timeout(Some(START_LIMIT)).unwrap();
        // It takes any signature.
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
    }
}
