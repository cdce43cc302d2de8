//! PostgreSQL and etcd, the real ones, each in a folder of its own, under a user without rights; and the
//! note of what this computer lacks. For tests of `lease` and of whole machines: whatever fails here ends
//! the test by a panic that says why.
#![allow(clippy::unwrap_used, reason = "for tests, which end by panicking")]

use identity::{Authority, HostName};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// How long a server may take to start.
const START: Duration = Duration::from_secs(120);

/// How long certificates are good: longer than a test.
const VALID: Duration = Duration::from_secs(24 * 60 * 60);

/// nobody and nogroup.
const NOBODY: u32 = 65_534;

/// Says to the runner of the tests that something was not proven here.
pub fn missing(what: &str) {
    eprintln!("not proven here: {what}");
    if let Ok(path) = std::env::var("ARCHITECT_MISSING") {
        let file = fs::File::options().append(true).create(true).open(path);
        writeln!(file.unwrap(), "{what}").unwrap();
    }
}

/// A file with a secret in it; its path.
#[must_use]
pub fn secret_file(folder: &Path, name: &str, secret: &str) -> String {
    let path = folder.join(name);
    fs::write(&path, format!("{secret}\n")).unwrap();
    path.display().to_string()
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A process that can be killed, stopped, and started again.
pub struct Server {
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    child: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stand_still(false);
        self.kill();
    }
}

impl Server {
    fn spawn(program: PathBuf, arguments: Vec<String>, log: PathBuf) -> Self {
        let child = Self::run(&program, &arguments, &log);
        Self { program, arguments, log, child }
    }

    fn run(program: &Path, arguments: &[String], log: &Path) -> Child {
        let log = fs::File::options().create(true).append(true).open(log).unwrap();
        let mut command = as_nobody(program);
        command.args(arguments).stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
    }

    /// SIGKILL, without a word.
    ///
    /// # Panics
    /// If that fails.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Again, after [`Server::kill`]: as soon as what it left lets it.
    ///
    /// # Panics
    /// If that fails.
    pub fn start_again(&mut self) {
        let until = Instant::now() + START;
        loop {
            self.child = Self::run(&self.program, &self.arguments, &self.log);
            // PostgreSQL refuses as long as a child of the killed one lives, at once.
            let look = Instant::now() + Duration::from_millis(500);
            while Instant::now() < look && self.child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(10));
            }
            if self.child.try_wait().unwrap().is_none() {
                return;
            }
            assert!(Instant::now() < until, "{}", self.said());
        }
    }

    /// Stops (or continues) the process and its children.
    pub fn stand_still(&self, still: bool) {
        let signal = if still { Signal::SIGSTOP } else { Signal::SIGCONT };
        let parent = self.child.id();
        let children = format!("/proc/{parent}/task/{parent}/children");
        let children = fs::read_to_string(children).unwrap_or_default();
        // The parent first, so that no child comes after.
        let all = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        for pid in std::iter::once(parent as i32).chain(all) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

fn as_nobody(program: &Path) -> Command {
    let mut command = Command::new(program);
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

fn give_to_nobody(path: &Path) {
    if is_root() {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
}

/// A folder for a server.
fn folder_in(parent: &Path, name: &str) -> PathBuf {
    let folder = parent.join(name);
    fs::create_dir(&folder).unwrap();
    give_to_nobody(&folder);
    // The way there, for a user without rights.
    fs::set_permissions(parent, fs::Permissions::from_mode(0o711)).unwrap();
    folder
}

/// A certificate for `localhost`; the authority's file, and those of the server.
fn certificates(folder: &Path) -> (PathBuf, PathBuf, PathBuf) {
    let dir = folder.join("authority");
    let authority = Authority::create(&dir).unwrap();
    authority.issue(&HostName::new("localhost").unwrap(), VALID).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).unwrap();
    let (certificate, key) = (dir.join("localhost.crt"), dir.join("localhost.key"));
    give_to_nobody(&key);
    (dir.join("ca.crt"), certificate, key)
}

/// PostgreSQL with the user `owner` and the database `leases`.
pub struct Postgres {
    /// Its process.
    pub server: Server,
    /// On a Unix socket.
    pub address: String,
    /// What it was started in.
    pub folder: PathBuf,
    /// With TLS, on this port of `localhost`; the file of the authority.
    pub tls: Option<(u16, PathBuf)>,
    programs: PathBuf,
}

impl Postgres {
    const PASSWORD: &str = "the owner's password";

    /// Where Debian puts the programs, the newest version first; elsewhere they are in the path.
    fn programs() -> Option<PathBuf> {
        let versions = fs::read_dir("/usr/lib/postgresql").ok().into_iter().flatten().flatten();
        let mut found: Vec<PathBuf> = versions.map(|entry| entry.path().join("bin")).collect();
        found.sort();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path: Vec<PathBuf> = std::env::split_paths(&path).collect();
        let has_all = |bin: &&PathBuf| {
            ["postgres", "initdb", "psql"].iter().all(|name| bin.join(name).is_file())
        };
        found.iter().rev().chain(&path).find(has_all).cloned()
    }

    /// Starts one in a folder of `parent`; `None` if it is not installed, which is noted. The first
    /// requests may come before it listens.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(parent: &Path, encrypted: bool) -> Option<Self> {
        let Some(programs) = Self::programs() else {
            missing("PostgreSQL's server (package postgresql)");
            return None;
        };
        let folder = folder_in(parent, "postgres");
        let data = folder.join("data");
        let password = secret_file(parent, "password", Self::PASSWORD);
        fs::set_permissions(&password, fs::Permissions::from_mode(0o644)).unwrap();
        let made = as_nobody(&programs.join("initdb"))
            .args(["--no-sync", "--auth=scram-sha-256", "--username=owner", "--locale=C"])
            .arg(format!("--pwfile={password}"))
            .arg("-D")
            .arg(&data)
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let setting = |text: String| ["-c".to_owned(), text];
        let port = free_port();
        let mut arguments = vec!["-D".to_owned(), data.display().to_string()];
        arguments.extend(setting(format!("port={port}")));
        arguments.extend(setting(format!("unix_socket_directories={}", folder.display())));
        arguments.extend(setting("shared_buffers=16MB".to_owned()));
        let tls = if encrypted {
            let (authority, certificate, key) = certificates(parent);
            arguments.extend(setting("listen_addresses=localhost".to_owned()));
            arguments.extend(setting("ssl=on".to_owned()));
            arguments.extend(setting(format!("ssl_cert_file={}", certificate.display())));
            arguments.extend(setting(format!("ssl_key_file={}", key.display())));
            Some((port, authority))
        } else {
            arguments.extend(setting("listen_addresses=".to_owned()));
            None
        };
        let log = parent.join("postgres.log");
        let server = Server::spawn(programs.join("postgres"), arguments, log);
        let host = folder.display().to_string().replace('/', "%2F");
        let address = format!("postgres://owner@{host}:{port}/postgres?password_file={password}");
        Some(Self { server, address, folder: parent.to_owned(), tls, programs })
    }

    /// As the owner.
    ///
    /// # Panics
    /// If that fails.
    pub fn sql(&self, text: &str) {
        let socket = self.folder.join("postgres");
        let port = self.address.rsplit_once(':').unwrap().1;
        let port: String = port.chars().take_while(char::is_ascii_digit).collect();
        let done = Command::new(self.programs.join("psql"))
            .env("PGPASSWORD", Self::PASSWORD)
            .args([
                "-h",
                &socket.display().to_string(),
                "-p",
                &port,
                "-U",
                "owner",
                "-d",
                "postgres",
            ])
            .args(["-q", "-v", "ON_ERROR_STOP=1", "-c", text])
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
}

/// How an etcd lets people in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Security {
    /// Anyone may, in the clear.
    None,
    /// TLS.
    Encrypted,
    /// The user `root` with the password `right`.
    Password,
}

/// One member of etcd.
pub struct Etcd {
    /// Its process.
    pub server: Server,
    /// As `lease::open` takes it.
    pub address: String,
    /// `host:port` of it.
    pub host: String,
    /// The file of the authority that its certificate is from.
    pub authority: Option<PathBuf>,
}

impl Etcd {
    /// Starts one in a folder of `parent`; `None` if it is not installed, which is noted.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(parent: &Path, security: Security) -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program = std::env::split_paths(&path)
            .map(|folder| folder.join("etcd"))
            .find(|program| program.is_file());
        let Some(program) = program else {
            missing("etcd's server (package etcd-server)");
            return None;
        };
        let folder = folder_in(parent, "etcd");
        let encrypted = security == Security::Encrypted;
        let files = encrypted.then(|| certificates(parent));
        let scheme = if encrypted { "https" } else { "http" };
        // Somebody else may take a port before etcd does.
        for attempt in 0..5 {
            let (clients, peers) = (free_port(), free_port());
            let clients_url = format!("{scheme}://127.0.0.1:{clients}");
            let peers_url = format!("http://127.0.0.1:{peers}");
            let mut arguments: Vec<String> = [
                ("data-dir", folder.join(attempt.to_string()).display().to_string()),
                ("listen-client-urls", clients_url.clone()),
                ("advertise-client-urls", clients_url),
                ("listen-peer-urls", peers_url.clone()),
                ("initial-advertise-peer-urls", peers_url.clone()),
                ("initial-cluster", format!("default={peers_url}")),
            ]
            .map(|(name, value)| format!("--{name}={value}"))
            .into();
            if let Some((_, certificate, key)) = &files {
                arguments.push(format!("--cert-file={}", certificate.display()));
                arguments.push(format!("--key-file={}", key.display()));
            }
            let log = parent.join("etcd.log");
            let server = Server::spawn(program.clone(), arguments, log);
            let host = format!("localhost:{clients}");
            let authority = files.as_ref().map(|(authority, ..)| authority.clone());
            let address = match &authority {
                Some(file) => format!("etcd://{host}/leases?ca={}", file.display()),
                None => format!("etcd://{host}/leases"),
            };
            let mut etcd = Self { server, address, host, authority };
            if etcd.is_up() {
                return Some(etcd);
            }
        }
        panic!("etcd does not start: {}", fs::read_to_string(parent.join("etcd.log")).unwrap());
    }

    /// Whether it listens; not if it has ended.
    fn is_up(&mut self) -> bool {
        let until = Instant::now() + START;
        while TcpStream::connect(&self.host).is_err() {
            if self.server.child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(Instant::now() < until, "{}", self.server.said());
            std::thread::sleep(Duration::from_millis(10));
        }
        true
    }

    /// Makes a user and switches passwords on, as `etcdctl` would.
    ///
    /// # Panics
    /// If that fails.
    pub fn switch_passwords_on(&self) {
        for (path, body) in [
            ("/v3/auth/user/add", r#"{"name": "root", "password": "right"}"#),
            ("/v3/auth/role/add", r#"{"name": "root"}"#),
            ("/v3/auth/user/grant", r#"{"user": "root", "role": "root"}"#),
            ("/v3/auth/enable", "{}"),
        ] {
            let answer = post(&self.host, path, body);
            assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        }
    }
}

/// A request by hand.
fn post(host: &str, path: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(host).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
