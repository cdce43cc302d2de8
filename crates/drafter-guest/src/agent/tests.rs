//! The agent over a socket pair, with a machine that only records what is done to it.

use super::*;
use crate::{
    config::{Check, Hook, Probe},
    protocol::{Entry, EntryState, ExecRequest, ExitStatus, NewIdentity, ProbeKind, Stream},
};
use std::{
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, TcpListener},
    os::unix::net::UnixStream,
    thread::JoinHandle,
    time::Instant,
};

#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

impl Recorder {
    fn note(&self, what: String) {
        self.0.lock().unwrap().push(what);
    }
}

impl Platform for Recorder {
    fn set_clock(&self, unix: Duration) -> io::Result<i64> {
        self.note(format!("clock {}", unix.as_secs()));
        Ok(7)
    }
    fn add_entropy(&self, bytes: &[u8]) -> io::Result<()> {
        self.note(format!("entropy {}", bytes.len()));
        Ok(())
    }
    fn set_host_name(&self, name: &str) -> io::Result<()> {
        self.note(format!("name {name}"));
        if name == "refused" { Err(io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
    }
    fn become_another(&self, identity: &NewIdentity) -> Vec<String> {
        self.note(format!("become {} {:?}", identity.host_name, identity.address));
        if identity.copy_of == "refused" { vec!["no".into()] } else { Vec::new() }
    }
    fn sync(&self) {
        self.note("sync".into());
    }
    fn shut_down(&self) -> io::Result<()> {
        self.note("shut down".into());
        Ok(())
    }
    fn entry(&self) -> Entry {
        Entry { state: EntryState::Running { pid: 71 }, restarts: 0, last_end: None }
    }
    fn uptime(&self) -> Duration {
        Duration::from_secs(3)
    }
    fn probe_addresses(&self) -> Vec<Ipv4Addr> {
        vec![Ipv4Addr::LOCALHOST]
    }
}

/// A host's end for tests: says what it is told and reads lines with a deadline.
struct Host {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    platform: Arc<Recorder>,
    agent: JoinHandle<io::Result<()>>,
}

fn sh(script: &str) -> Vec<String> {
    vec!["sh".into(), "-c".into(), script.into()]
}

fn config() -> MachineConfig {
    let mut config = MachineConfig::new(sh("true"));
    config.user = nix::unistd::geteuid().to_string();
    config
}

fn exec(script: &str, seconds: u64) -> ExecRequest {
    let mut request = ExecRequest::new(sh(script), Duration::from_secs(seconds));
    request.user = Some(nix::unistd::geteuid().to_string());
    request
}

impl Host {
    fn start(config: MachineConfig) -> Self {
        let (stream, theirs) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let platform = Arc::new(Recorder::default());
        let given = Arc::clone(&platform);
        let port = Port::from_stream(theirs).unwrap();
        let agent = std::thread::spawn(move || serve(port, config, given));
        let reader = BufReader::new(stream.try_clone().unwrap());
        Self { stream, reader, platform, agent }
    }

    fn greeted(config: MachineConfig) -> Self {
        let mut host = Self::start(config);
        host.hello(1);
        host
    }

    fn hello(&mut self, nonce: u64) {
        self.say(&HostMessage::Hello { version: PROTOCOL_VERSION, nonce });
        loop {
            if matches!(self.hear(), GuestMessage::Hello { nonce: heard, .. } if heard == nonce) {
                return;
            }
        }
    }

    fn say(&mut self, message: &HostMessage) {
        self.stream.write_all(&message.encode().unwrap()).unwrap();
    }

    fn hear(&mut self) -> GuestMessage {
        loop {
            let mut line = Vec::new();
            assert!(self.reader.read_until(b'\n', &mut line).unwrap() > 0, "the agent ended");
            line.pop();
            if line.is_empty() {
                continue;
            }
            match GuestMessage::decode(&line).unwrap() {
                Decoded::Known(message) => return message,
                Decoded::Unknown { name, .. } => panic!("the agent said {name}"),
            }
        }
    }

    fn ask(&mut self, message: &HostMessage) -> GuestMessage {
        self.say(message);
        self.hear()
    }

    fn done(&self) -> Vec<String> {
        self.platform.0.lock().unwrap().clone()
    }

    fn end(self) {
        drop((self.stream, self.reader));
        self.agent.join().unwrap().unwrap();
    }
}

fn after_resume(id: u64, host_name: Option<&str>) -> HostMessage {
    HostMessage::AfterResume {
        id,
        wall_clock_ns: 1_700_000_000_000_000_000,
        entropy: vec![9; 32],
        host_name: host_name.map(str::to_owned),
    }
}

#[test]
fn requests_before_a_hello_are_not_answered() {
    let mut host = Host::start(config());
    host.say(&HostMessage::Ping { id: 1 });
    host.say(&HostMessage::Shutdown { id: 2 });
    host.hello(77);
    assert_eq!(host.ask(&HostMessage::Ping { id: 3 }), GuestMessage::Done { id: 3 });
    assert_eq!(host.done(), [""; 0]);
    host.end();
}

#[test]
fn a_host_of_another_version_gets_the_agents_version_and_nothing_else() {
    let mut host = Host::start(config());
    let hello = host.ask(&HostMessage::Hello { version: 99, nonce: 5 });
    assert_eq!(hello, GuestMessage::Started {}, "it has just started");
    let hello = host.hear();
    assert!(matches!(hello, GuestMessage::Hello { version: PROTOCOL_VERSION, nonce: 5, .. }));
    host.say(&HostMessage::Shutdown { id: 1 });
    host.hello(6);
    assert_eq!(host.done(), [""; 0]);
    host.end();
}

#[test]
fn a_command_streams_its_output_and_ends_with_its_status() {
    let mut host = Host::greeted(config());
    host.say(&HostMessage::Exec { id: 4, exec: exec("echo out; echo err >&2; exit 5", 10) });
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = loop {
        match host.hear() {
            GuestMessage::Output { id: 4, stream: Stream::Stdout, data } => out.extend(data),
            GuestMessage::Output { id: 4, stream: Stream::Stderr, data } => err.extend(data),
            GuestMessage::Exited { id: 4, status } => break status,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((status, &out[..], &err[..]), (ExitStatus::Code(5), &b"out\n"[..], &b"err\n"[..]));
    host.end();
}

#[test]
fn a_command_is_cancelled_and_others_are_answered_meanwhile() {
    let mut host = Host::greeted(config());
    host.say(&HostMessage::Exec { id: 4, exec: exec("sleep 60", 60) });
    assert_eq!(host.ask(&HostMessage::Ping { id: 5 }), GuestMessage::Done { id: 5 });
    host.say(&HostMessage::Cancel { id: 6, exec: 4 });
    let mut answers = [host.hear(), host.hear()];
    answers.sort_by_key(GuestMessage::id);
    let exited = GuestMessage::Exited { id: 4, status: ExitStatus::Cancelled };
    assert_eq!(answers, [exited, GuestMessage::Done { id: 6 }]);
    host.end();
}

#[test]
fn a_new_hello_mid_line_ends_the_old_conversation_and_kills_its_commands() {
    let mut host = Host::greeted(config());
    let file = std::env::temp_dir().join(format!("drafter-agent-{}", std::process::id()));
    let script = format!("echo $$ > {}; exec sleep 60", file.display());
    host.say(&HostMessage::Exec { id: 4, exec: exec(&script, 60) });
    let deadline = Instant::now() + Duration::from_secs(10);
    let pid: i32 = loop {
        assert!(Instant::now() < deadline, "the command did not start");
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        if let Some(pid) = text.trim().parse().ok().filter(|_| text.ends_with('\n')) {
            break pid;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    // The host's process dies in the middle of a request; the next one connects.
    host.stream.write_all(br#"{"type":"shutdo"#).unwrap();
    host.stream.write_all(b"\n").unwrap();
    host.hello(2);
    assert_eq!(host.ask(&HostMessage::Ping { id: 4 }), GuestMessage::Done { id: 4 });
    while nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None).is_ok() {
        assert!(Instant::now() < deadline, "the command outlived its conversation");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::fs::remove_file(file).unwrap();
    assert_eq!(host.done(), [""; 0]);
    host.end();
}

#[test]
fn a_failing_hook_is_reported_with_its_words_and_nothing_is_synced() {
    let mut config = config();
    config.hooks.before_suspend = Some(Hook {
        argv: sh("echo saving; echo no space >&2; exit 1"),
        timeout: Duration::from_secs(10),
    });
    let mut host = Host::greeted(config);
    match host.ask(&HostMessage::BeforeSuspend { id: 1, sync: true }) {
        GuestMessage::Failed { id: 1, failure } => {
            assert_eq!(failure.code, FailureCode::Hook);
            assert!(failure.message.contains("before_suspend hook"), "{}", failure.message);
            assert!(failure.message.contains("no space"), "{}", failure.message);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(host.done(), [""; 0]);
    host.end();
}

#[test]
fn a_hook_that_hangs_fails_at_its_limit() {
    let mut config = config();
    config.hooks.before_suspend =
        Some(Hook { argv: sh("sleep 60"), timeout: Duration::from_millis(100) });
    let mut host = Host::greeted(config);
    let started = Instant::now();
    let answer = host.ask(&HostMessage::BeforeSuspend { id: 1, sync: false });
    assert!(matches!(answer, GuestMessage::Failed { id: 1, .. }), "{answer:?}");
    assert!(started.elapsed() < Duration::from_secs(10));
    host.end();
}

#[test]
fn a_resume_sets_clock_entropy_and_name_before_the_hook_and_reports_the_step() {
    let mut config = config();
    config.hooks.after_resume = Some(Hook { argv: sh("exit 0"), timeout: Duration::from_secs(10) });
    let mut host = Host::greeted(config);
    let answer = host.ask(&after_resume(1, Some("fork-2")));
    assert_eq!(answer, GuestMessage::Resumed { id: 1, clock_step_ns: 7 });
    assert_eq!(host.done(), ["entropy 32", "clock 1700000000", "name fork-2"]);
    host.end();
}

fn become_another(id: u64, copy_of: &str) -> HostMessage {
    HostMessage::Become {
        id,
        wall_clock_ns: 1_700_000_000_000_000_000,
        entropy: vec![9; 32],
        identity: NewIdentity {
            host_name: "copy-1".into(),
            copy_of: copy_of.into(),
            address: Some(Ipv4Addr::new(10, 9, 0, 6)),
            address_v6: None,
            instance: "ff".into(),
        },
    }
}

#[test]
fn a_copy_has_new_random_numbers_first_then_its_identity_then_its_hooks() {
    let mut config = config();
    let log = std::env::temp_dir().join(format!("drafter-fork-{}", std::process::id()));
    let hook = |word: &str| Hook {
        argv: sh(&format!("echo {word} >> {}", log.display())),
        timeout: Duration::from_secs(10),
    };
    config.hooks.after_resume = Some(hook("resume"));
    config.hooks.after_fork = Some(hook("fork"));
    let mut host = Host::greeted(config);
    let answer = host.ask(&become_another(1, "redis"));
    assert_eq!(answer, GuestMessage::Resumed { id: 1, clock_step_ns: 7 });
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "fork\nresume\n");
    match host.ask(&become_another(2, "refused")) {
        GuestMessage::Failed { id: 2, failure } => assert_eq!(failure.message, "no"),
        other => panic!("{other:?}"),
    }
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "fork\nresume\n", "no hook runs for it");
    std::fs::remove_file(log).unwrap();
    let once = ["entropy 32", "clock 1700000000", "name copy-1", "become copy-1 Some(10.9.0.6)"];
    assert_eq!(host.done(), [once, once].concat());
    host.end();
}

#[test]
fn a_part_of_a_resume_that_fails_does_not_stop_the_others() {
    let mut config = config();
    let marker = std::env::temp_dir().join(format!("drafter-hook-{}", std::process::id()));
    config.hooks.after_resume = Some(Hook {
        argv: sh(&format!("touch {}", marker.display())),
        timeout: Duration::from_secs(10),
    });
    let mut host = Host::greeted(config);
    match host.ask(&after_resume(1, Some("refused"))) {
        GuestMessage::Failed { failure, .. } => assert!(failure.message.contains("host name")),
        other => panic!("{other:?}"),
    }
    assert_eq!(host.done(), ["entropy 32", "clock 1700000000", "name refused"]);
    std::fs::remove_file(marker).expect("the hook ran all the same");
    host.end();
}

#[test]
fn a_tcp_probe_tells_a_listening_port_from_a_closed_one() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = config();
    config.probes.readiness = Some(Probe {
        check: Check::Tcp { port: listener.local_addr().unwrap().port() },
        interval: Duration::from_millis(200),
        timeout: Duration::from_secs(5),
    });
    let mut host = Host::greeted(config);
    let probe = HostMessage::Probe { id: 1, kind: ProbeKind::Readiness };
    let open = host.ask(&probe);
    assert!(matches!(open, GuestMessage::Probed { ok: true, interval_ms: 200, .. }), "{open:?}");
    drop(listener);
    let closed = host.ask(&probe);
    assert!(matches!(closed, GuestMessage::Probed { ok: false, .. }), "{closed:?}");
    let liveness = host.ask(&HostMessage::Probe { id: 2, kind: ProbeKind::Liveness });
    assert!(matches!(liveness, GuestMessage::Probed { ok: true, .. }), "without one: it runs");
    host.end();
}

#[test]
fn a_message_that_is_unknown_or_broken_gets_an_answer_and_harms_nothing() {
    let mut host = Host::greeted(config());
    host.stream.write_all(b"{\"type\":\"hibernate\",\"id\":8}\n").unwrap();
    match host.hear() {
        GuestMessage::Failed { id: 8, failure } => {
            assert_eq!(failure.code, FailureCode::Unsupported);
        }
        other => panic!("{other:?}"),
    }
    host.stream.write_all(b"{\"type\":\"exec\",\"id\":9,\"argv\":7}\n").unwrap();
    match host.hear() {
        GuestMessage::Failed { id: 9, failure } => assert_eq!(failure.code, FailureCode::Invalid),
        other => panic!("{other:?}"),
    }
    host.stream.write_all(&vec![b'x'; 200_000]).unwrap();
    host.stream.write_all(b"\n\xff\xfe\n{}\n").unwrap();
    assert_eq!(host.ask(&HostMessage::Ping { id: 10 }), GuestMessage::Done { id: 10 });
    host.end();
}

#[test]
fn too_many_commands_at_once_are_refused_and_the_rest_still_works() {
    let mut host = Host::greeted(config());
    for id in 0..=MAX_WORKERS as u64 {
        host.say(&HostMessage::Exec { id, exec: exec("sleep 60", 60) });
    }
    match host.hear() {
        GuestMessage::Failed { id, failure } => {
            assert_eq!((id, failure.code), (MAX_WORKERS as u64, FailureCode::Busy));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(host.ask(&HostMessage::Ping { id: 99 }), GuestMessage::Done { id: 99 });
    host.end();
}
