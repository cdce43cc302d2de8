//! The `silo` command as a user runs it.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses a part of it")]

use super::{LIMIT, Process};
use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::process::ExitStatusExt,
    process::{Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::Instant,
};

/// What a command said and how it ended.
#[derive(Debug)]
pub struct Said {
    pub out: String,
    pub err: String,
    /// Its exit code, or 128 and the signal.
    pub code: i32,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let signal = || 128 + output.status.signal().unwrap_or_default();
        Self {
            out: text(&output.stdout),
            err: text(&output.stderr),
            code: output.status.code().unwrap_or_else(signal),
        }
    }
}

impl Said {
    /// It must have succeeded.
    #[track_caller]
    pub fn good(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    /// It must have failed with this code, and said this on stderr.
    #[track_caller]
    pub fn failed(self, code: i32, words: &str) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        assert!(self.err.contains(words), "{words} is not in\n{}", self.err);
        self
    }

    /// What it printed, as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

pub fn command(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_silo"));
    command.args(arguments).env("RUST_LOG", "warn").stdin(Stdio::null());
    command
}

/// Runs `silo` to its end.
pub fn silo(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Said {
    command(arguments).output().unwrap().into()
}

/// A `silo` that stays, and the JSON object that it said when it was ready.
pub struct Running {
    process: Process,
    pub ready: serde_json::Value,
    lines: mpsc::Receiver<String>,
    errors: Option<thread::JoinHandle<String>>,
}

impl Running {
    /// Starts it with `--json` and waits for its first line.
    pub fn start(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        Self::of(command(["--json"]).args(arguments))
    }

    /// Starts a command that prints JSON, and waits for its first line.
    pub fn of(command: &mut Command) -> Self {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut process = Process(child);
        let stdout = process.0.stdout.take().unwrap();
        let mut stderr = process.0.stderr.take().unwrap();
        let errors = thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut running =
            Self { process, ready: serde_json::Value::Null, lines, errors: Some(errors) };
        match running.lines.recv_timeout(LIMIT) {
            Ok(line) => running.ready = serde_json::from_str(&line).unwrap(),
            Err(error) => {
                let _ = running.process.0.kill();
                let said = running.errors.take().unwrap().join().unwrap();
                panic!("{command:?} did not get ready ({error}): {said}");
            }
        }
        running
    }

    /// The next line that it says, as JSON.
    #[track_caller]
    pub fn next(&self) -> serde_json::Value {
        let line = self.lines.recv_timeout(LIMIT).expect("it says nothing more");
        serde_json::from_str(&line).unwrap()
    }

    pub fn id(&self) -> i32 {
        self.process.0.id() as i32
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.id()), signal).unwrap();
    }

    /// Ends it as a service manager does, and waits for that.
    pub fn stop(self) -> Said {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        self.wait()
    }

    /// Waits until it has ended by itself.
    pub fn wait(mut self) -> Said {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.process.0.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(std::time::Duration::from_millis(5));
        };
        let err = self.errors.take().unwrap().join().unwrap();
        let out = self.lines.iter().collect::<Vec<_>>().join("\n");
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
        Said { out, err, code }
    }
}

/// One HTTP request by hand: the status line and the body.
pub fn http(address: &str, method: &str, path: &str) -> (String, String) {
    let address: SocketAddr = address.parse().unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}
