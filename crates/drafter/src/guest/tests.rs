//! The channel against the real agent behind a socket, and against scripted peers that misbehave.

use super::*;
use drafter_guest::{
    agent::{Platform, Port, serve},
    config::{Check, Hook, MachineConfig, Probe},
    protocol::{Decoded, EntryState, FailureCode, NewIdentity, PROTOCOL_VERSION},
};
use std::{
    io::{self, BufRead, BufReader, Write},
    net::Ipv4Addr,
    os::unix::net::{UnixListener, UnixStream},
    sync::Mutex,
};

const SOON: Duration = Duration::from_secs(20);

/// A machine that only records.
#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

impl Recorder {
    fn note(&self, what: &str) {
        self.0.lock().unwrap().push(what.to_owned());
    }
}

impl Platform for Recorder {
    fn set_clock(&self, unix: Duration) -> io::Result<i64> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        assert!(now.abs_diff(unix) < SOON, "the host's own clock is sent");
        self.note("clock");
        Ok(-3)
    }
    fn add_entropy(&self, bytes: &[u8]) -> io::Result<()> {
        assert!(bytes.iter().any(|byte| *byte != 0));
        self.note("entropy");
        Ok(())
    }
    fn set_host_name(&self, name: &str) -> io::Result<()> {
        self.note(name);
        Ok(())
    }
    fn become_another(&self, identity: &NewIdentity) -> Vec<String> {
        self.note(&format!("become {}", identity.host_name));
        Vec::new()
    }
    fn sync(&self) {
        self.note("sync");
    }
    fn shut_down(&self) -> io::Result<()> {
        self.note("shut down");
        Ok(())
    }
    fn entry(&self) -> Entry {
        Entry { state: EntryState::Waiting, restarts: 4, last_end: None }
    }
    fn uptime(&self) -> Duration {
        Duration::from_secs(1)
    }
    fn probe_addresses(&self) -> Vec<Ipv4Addr> {
        vec![Ipv4Addr::LOCALHOST]
    }
}

/// A socket in a folder of its own, as a monitor would have it.
fn socket() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    (folder, path)
}

/// Serves the real agent on every connection, as a machine would.
fn agent(path: &Path, config: &MachineConfig) -> Arc<Recorder> {
    let listener = UnixListener::bind(path).unwrap();
    let recorder = Arc::new(Recorder::default());
    let (given, config) = (Arc::clone(&recorder), config.clone());
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let port = Port::from_stream(stream).unwrap();
            serve(port, config.clone(), Arc::clone(&given) as Arc<dyn Platform>).unwrap();
        }
    });
    recorder
}

fn sh(script: &str) -> Vec<String> {
    vec!["sh".into(), "-c".into(), script.into()]
}

fn config() -> MachineConfig {
    let mut config = MachineConfig::new(sh("true"));
    config.user = nix::unistd::geteuid().to_string();
    config
}

fn command(script: &str) -> ExecRequest {
    let mut request = ExecRequest::new(sh(script), SOON);
    request.user = Some(nix::unistd::geteuid().to_string());
    request
}

/// Reads the host's lines on a scripted peer's end.
fn hear(reader: &mut BufReader<UnixStream>) -> Option<HostMessage> {
    loop {
        let mut line = Vec::new();
        if reader.read_until(b'\n', &mut line).unwrap_or(0) == 0 {
            return None;
        }
        line.pop();
        if let Ok(Decoded::Known(message)) = HostMessage::decode(&line) {
            return Some(message);
        }
    }
}

/// Accepts a host and answers its hello; the rest is the script's.
fn greet(listener: &UnixListener) -> (UnixStream, BufReader<UnixStream>) {
    let (mut stream, nonce, reader) = accept(listener);
    stream.write_all(&hello(PROTOCOL_VERSION, nonce)).unwrap();
    (stream, reader)
}

fn accept(listener: &UnixListener) -> (UnixStream, u64, BufReader<UnixStream>) {
    let (stream, _) = listener.accept().unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    match hear(&mut reader) {
        Some(HostMessage::Hello { nonce, .. }) => (stream, nonce, reader),
        other => panic!("the host began with {other:?}"),
    }
}

fn hello(version: u32, nonce: u64) -> Vec<u8> {
    GuestMessage::Hello { version, nonce, agent: "test".into() }.encode().unwrap()
}

#[test]
fn a_channel_that_is_opened_before_the_machine_exists_finds_its_agent() {
    let (_folder, path) = socket();
    let channel = GuestChannel::connect(&path, "m").unwrap();
    let error = channel.ping(Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, GuestError::NotConnected { .. }), "{error}");
    assert!(error.to_string().contains("agent.sock"), "{error}");
    agent(&path, &config());
    channel.ping(SOON).unwrap();
    let entry = channel.status(SOON).unwrap();
    assert_eq!((entry.state, entry.restarts), (EntryState::Waiting, 4));
}

#[test]
fn a_command_hands_on_all_it_writes_even_to_a_slow_caller() {
    let (_folder, path) = socket();
    agent(&path, &config());
    let channel = GuestChannel::connect(&path, "m").unwrap();
    let mut text = Vec::new();
    let mut pieces = 0;
    let script = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); echo line $i; done; exit 4";
    let status = channel
        .exec(&command(script), |output| {
            pieces += 1;
            if pieces < 20 {
                std::thread::sleep(Duration::from_millis(10));
            }
            text.extend(output.data);
        })
        .unwrap();
    assert_eq!(status, ExitStatus::Code(4));
    let text = String::from_utf8(text).unwrap();
    let expected: String = (1..=300_000).map(|i| format!("line {i}\n")).collect();
    assert!(text == expected, "{} of {} bytes", text.len(), expected.len());
}

#[test]
fn calls_from_several_threads_get_each_their_own_answer() {
    let (_folder, path) = socket();
    agent(&path, &config());
    let channel = GuestChannel::connect(&path, "m").unwrap();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let channel = &channel;
            scope.spawn(move || {
                let mut text = Vec::new();
                let script = format!("echo {number}; exit {number}");
                let status =
                    channel.exec(&command(&script), |output| text.extend(output.data)).unwrap();
                assert_eq!(status, ExitStatus::Code(number));
                assert_eq!(text, format!("{number}\n").as_bytes());
            });
        }
    });
}

#[test]
fn hop_check_07_hooks_resume_and_shutdown_reach_the_machine_and_a_failing_hook_comes_back_in_words()
{
    let (_folder, path) = socket();
    let mut config = config();
    config.hooks.before_suspend = Some(Hook { argv: sh("echo disk full; exit 1"), timeout: SOON });
    let machine = agent(&path, &config);
    let channel = GuestChannel::connect(&path, "m").unwrap();
    match channel.before_suspend(true, SOON).unwrap_err() {
        error @ GuestError::Failed { .. } => {
            assert!(error.to_string().contains("disk full"), "{error}");
        }
        other => panic!("{other}"),
    }
    assert_eq!(channel.after_resume(Some("fork"), SOON).unwrap(), Resume { clock_step_ns: -3 });
    let identity = NewIdentity {
        host_name: "fork-2".into(),
        copy_of: "m".into(),
        address: None,
        address_v6: None,
        instance: "1".into(),
    };
    let became = channel.become_another(&identity, SOON).unwrap();
    assert_eq!(became, Resume { clock_step_ns: -3 });
    channel.shut_down(SOON).unwrap();
    assert_eq!(
        *machine.0.lock().unwrap(),
        ["entropy", "clock", "fork", "entropy", "clock", "fork-2", "become fork-2", "shut down"]
    );
}

#[test]
fn waiting_for_a_service_ends_when_it_listens_and_says_why_when_it_does_not() {
    let (_folder, path) = socket();
    let reserved = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = reserved.local_addr().unwrap().port();
    drop(reserved);
    let mut config = config();
    config.probes.readiness = Some(Probe {
        check: Check::Tcp { port },
        interval: Duration::from_millis(30),
        timeout: Duration::from_secs(1),
    });
    agent(&path, &config);
    let channel = GuestChannel::connect(&path, "m").unwrap();
    let error = channel.wait_ready(Duration::from_secs(2)).unwrap_err();
    assert!(matches!(error, GuestError::NotReady { .. }), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
    let (ready, until_ready) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            let _listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
            until_ready.recv_timeout(SOON).unwrap();
        });
        channel.wait_ready(SOON).unwrap();
        ready.send(()).unwrap();
    });
}

#[test]
fn hop_check_30_a_machine_that_vanishes_at_any_byte_loses_the_call_and_the_next_one_works() {
    let (_folder, path) = socket();
    let listener = UnixListener::bind(&path).unwrap();
    let answer_length = GuestMessage::Done { id: 100 }.encode().unwrap().len();
    let peer = std::thread::spawn(move || {
        for cut in 0..answer_length {
            let (mut stream, mut reader) = greet(&listener);
            let Some(request) = hear(&mut reader) else { panic!("no request") };
            let mut line = GuestMessage::Done { id: request.id().unwrap() }.encode().unwrap();
            line.truncate(cut.min(line.len() - 1));
            stream.write_all(&line).unwrap();
        }
        let (mut stream, mut reader) = greet(&listener);
        let request = hear(&mut reader).unwrap();
        let line = GuestMessage::Done { id: request.id().unwrap() }.encode().unwrap();
        stream.write_all(&line).unwrap();
        // Held until the host has read it.
        hear(&mut reader);
    });
    let channel = GuestChannel::connect(&path, "m").unwrap();
    for cut in 0..answer_length {
        let error = channel.ping(SOON).unwrap_err();
        assert!(matches!(error, GuestError::Lost { .. }), "cut at {cut}: {error}");
    }
    channel.ping(SOON).unwrap();
    drop(channel);
    peer.join().unwrap();
}

#[test]
fn bytes_from_before_the_hello_are_never_taken_for_answers() {
    let (_folder, path) = socket();
    let listener = UnixListener::bind(&path).unwrap();
    let peer = std::thread::spawn(move || {
        let (mut stream, nonce, mut reader) = accept(&listener);
        // The rest of an answer to the host before, an answer with an id that will be used, a hello
        // to somebody else, a line without end, and nonsense.
        stream.write_all(b"one\",\"id\":1}\n{\"type\":\"done\",\"id\":1}\n").unwrap();
        stream.write_all(&hello(PROTOCOL_VERSION, nonce ^ 1)).unwrap();
        stream.write_all(&vec![b'x'; 300_000]).unwrap();
        stream.write_all(b"\n\xff\x00\n\n{\"type\":\"weather\"}\n").unwrap();
        stream.write_all(&hello(PROTOCOL_VERSION, nonce)).unwrap();
        let Some(HostMessage::Probe { id, .. }) = hear(&mut reader) else { panic!("no request") };
        let probed = GuestMessage::Probed { id, ok: true, detail: "well".into(), interval_ms: 1 };
        stream.write_all(&probed.encode().unwrap()).unwrap();
        hear(&mut reader);
    });
    let channel = GuestChannel::connect(&path, "m").unwrap();
    assert_eq!(channel.probe(ProbeKind::Liveness, SOON).unwrap(), (true, "well".to_owned()));
    drop(channel);
    peer.join().unwrap();
}

#[test]
fn hop_check_30_an_agent_that_starts_again_below_the_same_connection_loses_the_call_and_is_greeted_anew()
 {
    let (_folder, path) = socket();
    let listener = UnixListener::bind(&path).unwrap();
    let peer = std::thread::spawn(move || {
        let (mut stream, mut reader) = greet(&listener);
        hear(&mut reader).expect("a request");
        stream.write_all(b"\n").unwrap();
        stream.write_all(&GuestMessage::Started {}.encode().unwrap()).unwrap();
        let (mut again, mut reader) = greet(&listener);
        let id = hear(&mut reader).unwrap().id().unwrap();
        again.write_all(&GuestMessage::Done { id }.encode().unwrap()).unwrap();
        hear(&mut reader);
    });
    let channel = GuestChannel::connect(&path, "m").unwrap();
    let error = channel.ping(SOON).unwrap_err();
    assert!(error.to_string().contains("started again"), "{error}");
    channel.ping(SOON).unwrap();
    drop(channel);
    peer.join().unwrap();
}

#[test]
fn an_agent_of_another_version_is_named_in_the_error() {
    let (_folder, path) = socket();
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        loop {
            let (mut stream, nonce, _) = accept(&listener);
            stream.write_all(&hello(PROTOCOL_VERSION + 1, nonce)).unwrap();
        }
    });
    let channel = GuestChannel::connect(&path, "m").unwrap();
    let error = channel.ping(Duration::from_millis(500)).unwrap_err().to_string();
    assert!(error.contains("speaks version 2"), "{error}");
}

#[test]
fn hop_check_30_a_call_that_is_never_answered_ends_at_its_deadline_and_the_command_is_cancelled() {
    let (_folder, path) = socket();
    let listener = UnixListener::bind(&path).unwrap();
    let peer = std::thread::spawn(move || {
        let (_stream, mut reader) = greet(&listener);
        let Some(HostMessage::Exec { id: exec, .. }) = hear(&mut reader) else {
            panic!("no command")
        };
        let Some(HostMessage::Cancel { exec: cancelled, .. }) = hear(&mut reader) else {
            panic!("not cancelled")
        };
        assert_eq!(cancelled, exec);
    });
    let channel = GuestChannel::connect(&path, "m").unwrap();
    let started = Instant::now();
    let limit = Duration::from_millis(400);
    let error = channel
        .call(EXEC, limit, |id| HostMessage::Exec { id, exec: command("sleep 60") })
        .unwrap_err();
    assert!(matches!(error, GuestError::Timeout { .. }), "{error}");
    assert!(started.elapsed() >= limit && started.elapsed() < SOON);
    peer.join().unwrap();
}

#[test]
fn a_request_beyond_a_line_is_refused_and_the_channel_stays() {
    let (_folder, path) = socket();
    agent(&path, &config());
    let channel = GuestChannel::connect(&path, "m").unwrap();
    let error = channel.exec(&command(&"x".repeat(70_000)), |_| {}).unwrap_err();
    assert!(matches!(error, GuestError::Invalid { .. }), "{error}");
    channel.ping(SOON).unwrap();
}

#[test]
fn a_refused_command_carries_the_agents_reason() {
    let (_folder, path) = socket();
    agent(&path, &config());
    let channel = GuestChannel::connect(&path, "m").unwrap();
    let mut request = command("true");
    request.argv = vec!["/no/such/program".into()];
    match channel.exec(&request, |_| {}).unwrap_err() {
        GuestError::Failed { failure, .. } => {
            assert_eq!(failure.code, FailureCode::Start);
            assert!(failure.message.contains("/no/such/program"), "{}", failure.message);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn dropping_the_channel_ends_its_thread_at_once_even_below_a_flood() {
    let (_folder, path) = socket();
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, mut reader) = greet(&listener);
        let id = hear(&mut reader).unwrap().id().unwrap();
        let output = GuestMessage::Output { id, stream: Stream::Stdout, data: vec![b'x'; 1000] };
        let line = output.encode().unwrap();
        while stream.write_all(&line).is_ok() {}
    });
    let channel = GuestChannel::connect(&path, "m").unwrap();
    let error = channel.ping(Duration::from_millis(300)).unwrap_err();
    assert!(matches!(error, GuestError::Timeout { .. }), "{error}");
    let started = Instant::now();
    drop(channel);
    assert!(started.elapsed() < SOON);
}

/// Whether the host has said something by now (and has not hung up).
fn heard_something(stream: &UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let mut byte = [0];
    let read = nix::sys::socket::recv(
        std::os::fd::AsRawFd::as_raw_fd(stream),
        &mut byte,
        nix::sys::socket::MsgFlags::MSG_PEEK,
    );
    stream.set_nonblocking(false).unwrap();
    match read {
        Ok(read) => {
            assert_ne!(read, 0, "the host hung up");
            true
        }
        Err(error) => {
            assert_eq!(error, nix::errno::Errno::EAGAIN);
            false
        }
    }
}

#[test]
fn a_channel_of_an_arriving_machine_is_connected_and_silent_until_its_time_has_come() {
    let (_folder, path) = socket();
    let listener = UnixListener::bind(&path).unwrap();
    let channel = GuestChannel::attach(&path, "m").unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    assert!(!channel.greeted_within(Duration::from_millis(50)));
    assert!(!heard_something(&stream), "the guest does not run yet");
    let pause = Duration::from_millis(100);
    let told = Instant::now();
    channel.speak_in(pause);
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let Some(HostMessage::Hello { nonce, .. }) = hear(&mut reader) else { panic!("no hello") };
    assert!(told.elapsed() >= pause, "{:?}", told.elapsed());
    stream.write_all(&hello(PROTOCOL_VERSION, nonce)).unwrap();
    assert!(channel.greeted_within(SOON));
}

#[test]
fn who_wants_something_of_a_guest_that_has_just_arrived_does_not_wait_for_its_time() {
    let (_folder, path) = socket();
    agent(&path, &config());
    let channel = GuestChannel::attach(&path, "m").unwrap();
    channel.speak_in(Duration::from_secs(3600));
    channel.ping(SOON).unwrap();
}

#[test]
fn a_hushed_channel_stays_connected_says_nothing_and_fails_what_is_asked() {
    let (_folder, path) = socket();
    let listener = UnixListener::bind(&path).unwrap();
    let channel = Arc::new(GuestChannel::connect(&path, "m").unwrap());
    let (stream, mut reader) = greet(&listener);
    let asking = Arc::clone(&channel);
    let asked = std::thread::spawn(move || asking.ping(SOON));
    assert!(matches!(hear(&mut reader), Some(HostMessage::Ping { .. })));
    channel.hush(SOON);
    assert!(channel.is_over());
    let error = asked.join().unwrap().unwrap_err();
    assert!(matches!(error, GuestError::Lost { .. }), "{error}");
    let error = channel.ping(SOON).unwrap_err();
    assert!(error.to_string().contains("stand still"), "{error}");
    assert!(!heard_something(&stream));
}

#[test]
fn a_channel_whose_monitor_takes_nothing_is_closed_rather_than_hushed() {
    let (_folder, path) = socket();
    let listener = UnixListener::bind(&path).unwrap();
    let channel = Arc::new(GuestChannel::connect(&path, "m").unwrap());
    let (stream, mut reader) = greet(&listener);
    assert!(channel.greeted_within(SOON));
    let asking = Arc::clone(&channel);
    let asked = std::thread::spawn(move || asking.ping(SOON));
    // The request is in the socket and stays there.
    while !heard_something(&stream) {
        std::thread::yield_now();
    }
    channel.hush(Duration::from_millis(30));
    assert!(asked.join().unwrap().is_err());
    assert!(matches!(hear(&mut reader), Some(HostMessage::Ping { .. })));
    assert!(hear(&mut reader).is_none(), "the connection ended");
}

#[test]
fn a_held_channel_says_nothing_and_after_it_every_request_has_its_answer() {
    let (_folder, path) = socket();
    let listener = UnixListener::bind(&path).unwrap();
    let channel = Arc::new(GuestChannel::connect(&path, "m").unwrap());
    let (stream, mut reader) = greet(&listener);
    let ask = || {
        let asking = Arc::clone(&channel);
        std::thread::spawn(move || asking.ping(SOON))
    };
    let before = ask();
    let Some(HostMessage::Ping { id: first }) = hear(&mut reader) else { panic!("no ping") };
    assert!(channel.hold(SOON), "the monitor has taken everything");
    assert!(!channel.is_over());
    let during = ask();
    std::thread::sleep(Duration::from_millis(20));
    assert!(!heard_something(&stream), "something was said to a guest that stands still");
    channel.release();
    let Some(HostMessage::Ping { id: second }) = hear(&mut reader) else { panic!("no ping") };
    for id in [second, first] {
        (&stream).write_all(&GuestMessage::Done { id }.encode().unwrap()).unwrap();
    }
    before.join().unwrap().unwrap();
    during.join().unwrap().unwrap();
}

#[test]
fn a_channel_whose_monitor_takes_nothing_is_held_but_not_quiet() {
    let (_folder, path) = socket();
    let listener = UnixListener::bind(&path).unwrap();
    let channel = Arc::new(GuestChannel::connect(&path, "m").unwrap());
    let (stream, mut reader) = greet(&listener);
    assert!(channel.greeted_within(SOON));
    let asking = Arc::clone(&channel);
    let asked = std::thread::spawn(move || asking.ping(SOON));
    while !heard_something(&stream) {
        std::thread::yield_now();
    }
    assert!(!channel.hold(Duration::from_millis(30)), "the request is in the socket");
    channel.release();
    let Some(HostMessage::Ping { id }) = hear(&mut reader) else { panic!("no ping") };
    (&stream).write_all(&GuestMessage::Done { id }.encode().unwrap()).unwrap();
    asked.join().unwrap().unwrap();
}
