//! The load against a real Redis: what is well is found well, and each way of being broken is
//! caught. The server comes from Debian's packages, unpacked and never installed.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::load::{Load, LoadConfig, LoadError, LoadHandle, LoadReport};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

const PACKAGES: [&str; 5] =
    ["redis-server", "redis-tools", "libjemalloc2", "liblzf1", "libatomic1"];

/// Where the unpacked packages are; `None`, and a note, if they cannot be had.
fn redis() -> Option<PathBuf> {
    let base = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let root = base.join("redis");
    fs::create_dir_all(base).unwrap();
    let lock = File::create(base.join("redis.lock")).unwrap();
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    if root.exists() {
        return Some(root);
    }
    let fresh = base.join("redis.fresh");
    let _ = fs::remove_dir_all(&fresh);
    fs::create_dir_all(&fresh).unwrap();
    let script = r#"timeout 120 apt-get -qq download "$@" && for deb in *.deb; do dpkg-deb -x "$deb" .; done"#;
    let output = Command::new("sh")
        .args(["-ec", script, "sh"])
        .args(PACKAGES)
        .current_dir(&fresh)
        .output()
        .unwrap();
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        architect::doctor::missing::note(
            "redis-server (Debian package, for the load's tests)",
            &why,
        );
        return None;
    }
    fs::rename(&fresh, &root).unwrap();
    Some(root)
}

/// A running server; killed when dropped.
struct Server {
    root: PathBuf,
    data: tempfile::TempDir,
    port: u16,
    durable: bool,
    process: Child,
}

impl Server {
    fn start(durable: bool) -> Option<Server> {
        let root = redis()?;
        let data = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let process = spawn(&root, data.path(), port, durable);
        Some(Server { root, data, port, durable, process })
    }

    fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn restart(&mut self) {
        self.kill();
        self.process = spawn(&self.root, self.data.path(), self.port, self.durable);
    }

    /// One command behind the load's back.
    fn meddle(&self, command: &str) {
        let mut stream = TcpStream::connect(self.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.write_all(format!("{command}\r\n").as_bytes()).unwrap();
        let mut answer = [0; 64];
        let read = stream.read(&mut answer).unwrap();
        assert!(matches!(answer[0], b'+' | b':'), "{}", String::from_utf8_lossy(&answer[..read]));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn spawn(root: &Path, data: &Path, port: u16, durable: bool) -> Child {
    Command::new(root.join("usr/bin/redis-server"))
        .env("LD_LIBRARY_PATH", root.join("usr/lib/x86_64-linux-gnu"))
        .args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", ""])
        .args(["--appendonly", if durable { "yes" } else { "no" }, "--appendfsync", "always"])
        .args(["--dir", data.to_str().unwrap()])
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn start(server: &Server, pipeline: usize) -> LoadHandle {
    let config = LoadConfig { pipeline, keys: 90, ..LoadConfig::default() };
    let load = Load::start(server.address(), config).unwrap();
    assert!(load.wait_for(2000, Duration::from_secs(60)), "{:?}", load.progress());
    load
}

fn assert_untouched(report: &LoadReport) {
    assert!(report.is_clean(), "{report:#?}");
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!(report.operations, report.reads + report.writes);
}

#[test]
fn a_healthy_server_is_found_healthy_with_one_command_in_flight_and_with_many() {
    let Some(server) = Server::start(false) else { return };
    for pipeline in [1, 32] {
        let report = start(&server, pipeline).finish().unwrap();
        assert_untouched(&report);
        assert!(report.writes > report.reads && report.reads > 90, "{report:#?}");
        assert_eq!(report.tcp.retransmits, 0);
        assert!(report.latency_p50_us > 0 && report.latency_p99_us >= report.latency_p50_us);
    }
}

#[test]
fn a_server_that_stops_for_300_ms_is_a_gap_of_that_length_and_nothing_else() {
    let Some(server) = Server::start(false) else { return };
    // On a busy computer the client stands still for other reasons, in some of the tries.
    assert!((0..20).any(|_| is_seen_as_it_was(&server)), "in none of twenty tries");
}

/// Whether a stop of 300 ms was found as long as it was, and nothing like it before.
fn is_seen_as_it_was(server: &Server) -> bool {
    let load = start(server, 1);
    let before = Instant::now();
    sleep(Duration::from_millis(100));
    let from = Instant::now();
    server.signal(Signal::SIGSTOP);
    sleep(Duration::from_millis(300));
    server.signal(Signal::SIGCONT);
    let to = Instant::now();
    assert!(load.wait_for(100, Duration::from_secs(10)));
    let gap = load.gap_between(from, to);
    assert!(gap >= Duration::from_millis(290), "{gap:?}");
    let timeline = load.timeline();
    let report = load.finish().unwrap();
    assert_untouched(&report);
    assert!(report.longest_gap_ms >= 290.0);
    let quiet = timeline.longest_between(before, from - Duration::from_millis(20));
    eprintln!("a gap of {gap:?} in {:?}, {quiet:?} before it", to - from);
    gap <= to - from + Duration::from_millis(200) && quiet < Duration::from_millis(250)
}

#[test]
fn a_server_that_comes_back_empty_has_lost_writes_and_broke_the_connection() {
    let Some(mut server) = Server::start(false) else { return };
    let load = start(&server, 8);
    server.restart();
    assert!(load.wait_for(500, Duration::from_secs(20)));
    let report = load.finish().unwrap();
    assert!(report.verified, "{report:#?}");
    assert!(
        report.reconnects >= 1 && report.errors >= 1 && report.lost_writes >= 30,
        "{report:#?}"
    );
    assert!(report.problems.iter().any(|problem| problem.contains("broke")), "{report:#?}");
}

#[test]
fn a_server_that_comes_back_with_everything_lost_nothing_but_the_connection() {
    let Some(mut server) = Server::start(true) else { return };
    let load = start(&server, 8);
    server.restart();
    assert!(load.wait_for(500, Duration::from_secs(20)));
    let report = load.finish().unwrap();
    assert!(report.verified && report.reconnects >= 1, "{report:#?}");
    let LoadReport { lost_writes, doubled_writes, wrong_answers, .. } = report;
    assert_eq!((lost_writes, doubled_writes, wrong_answers), (0, 0, 0), "{report:#?}");
}

#[test]
fn a_server_that_refuses_while_it_loads_its_data_is_asked_until_it_has() {
    let Some(mut server) = Server::start(true) else { return };
    let load = start(&server, 8);
    // Some hundred milliseconds of loading, in which Redis answers and refuses.
    server.meddle("EVAL \"for i=1,200000 do redis.call('SET','x'..i,'y') end return 1\" 0");
    server.restart();
    assert!(load.wait_for(500, Duration::from_secs(30)));
    let report = load.finish().unwrap();
    assert!(report.problems.iter().any(|problem| problem.contains("LOADING")), "{report:#?}");
    assert!(report.verified, "{report:#?}");
    let LoadReport { lost_writes, doubled_writes, wrong_answers, .. } = report;
    assert_eq!((lost_writes, doubled_writes, wrong_answers), (0, 0, 0), "{report:#?}");
}

#[test]
fn data_that_changes_behind_the_clients_back_is_caught_on_an_unbroken_connection() {
    type Count = fn(&LoadReport) -> u64;
    let cases: [(&str, Count); 4] = [
        ("FLUSHALL", |report| report.lost_writes),
        ("DECRBY load:counter:3 5", |report| report.lost_writes),
        ("INCRBY load:counter:3 1", |report| report.doubled_writes),
        ("APPEND load:log:2 00112233445566778899aabbccddeef", |report| report.doubled_writes),
    ];
    let Some(server) = Server::start(false) else { return };
    for (command, count) in cases {
        let load = start(&server, 4);
        server.meddle(command);
        assert!(load.wait_for(500, Duration::from_secs(20)));
        let report = load.finish().unwrap();
        assert!(count(&report) >= 1 && !report.is_clean(), "{command}: {report:#?}");
        assert_eq!((report.reconnects, report.verified), (0, true), "{command}: {report:#?}");
    }
}

#[test]
fn a_server_that_never_comes_back_ends_in_a_report_that_is_not_verified() {
    let Some(mut server) = Server::start(false) else { return };
    let config = LoadConfig {
        reconnect_within: Duration::from_millis(300),
        verify_within: Duration::from_millis(300),
        ..LoadConfig::default()
    };
    let load = Load::start(server.address(), config).unwrap();
    assert!(load.wait_for(100, Duration::from_secs(20)));
    server.kill();
    let asked = Instant::now();
    let report = load.finish().unwrap();
    assert!(asked.elapsed() < Duration::from_secs(30), "{:?}", asked.elapsed());
    assert!(!report.verified && !report.is_clean() && report.errors >= 1, "{report:#?}");
}

#[test]
fn a_silent_server_breaks_the_connection_by_deadline() {
    let Some(server) = Server::start(false) else { return };
    let config = LoadConfig { answer_within: Duration::from_millis(200), ..LoadConfig::default() };
    let load = Load::start(server.address(), config).unwrap();
    assert!(load.wait_for(100, Duration::from_secs(20)));
    server.signal(Signal::SIGSTOP);
    sleep(Duration::from_millis(600));
    server.signal(Signal::SIGCONT);
    assert!(load.wait_for(100, Duration::from_secs(20)));
    let report = load.finish().unwrap();
    assert!(report.reconnects >= 1 && report.verified, "{report:#?}");
    assert!(report.problems[0].contains("no answer within 200ms"), "{report:#?}");
}

#[test]
fn nobody_at_the_address_is_an_error_that_names_it() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = LoadConfig { connect_within: Duration::from_millis(200), ..LoadConfig::default() };
    match Load::start(address, config).err() {
        Some(error @ LoadError::Unreachable { .. }) => {
            assert!(error.to_string().contains(&address.to_string()), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_hook_runs_on_the_clients_thread_before_it_connects_and_its_failure_is_told() {
    let address = (Ipv4Addr::LOCALHOST, 1).into();
    let enter: architect::load::Enter = Box::new(|| {
        assert_eq!(std::thread::current().name(), Some("load"));
        Err(std::io::Error::other("no such namespace"))
    });
    let config = LoadConfig { enter: Some(enter), ..LoadConfig::default() };
    let error = Load::start(address, config).err().unwrap();
    assert!(error.to_string().contains("namespace: no such namespace"), "{error}");
}
