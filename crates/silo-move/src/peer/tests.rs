use super::*;
use crate::wire::{Header, Preamble, Role, WireError};
use identity::{Authority, HostName, Identity, Security, Stream};
use silo_block::session::messages::SessionId;
use std::{
    io::{self, Write},
    net::{TcpListener, TcpStream},
    time::Instant,
};

const WAIT: Duration = Duration::from_secs(20);

struct Hosts {
    _dir: tempfile::TempDir,
    a: Security,
    b: Security,
}

fn name(text: &str) -> HostName {
    HostName::new(text).unwrap()
}

fn hosts() -> Hosts {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create(dir.path()).unwrap();
    let identity = |host: &str| {
        authority.issue(&name(host), Duration::from_secs(3600)).unwrap();
        Security::Mutual(Identity::load(dir.path(), &name(host)).unwrap())
    };
    let (a, b) = (identity("a"), identity("b"));
    Hosts { _dir: dir, a, b }
}

fn limits() -> Limits {
    Limits { connect: Duration::from_secs(5), data: 3, ..Limits::default() }
}

fn listen(security: &Security, allow: fn(Option<&HostName>) -> bool) -> Listener {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    Listener::new(socket, security.clone(), limits(), allow).unwrap()
}

fn dial(listener: &Listener, security: &Security) -> Dial {
    Dial::new(listener.address(), name("b"), security.clone(), limits())
}

fn link_of(listener: &Listener) -> Link {
    match listener.accept(WAIT).unwrap() {
        Arrival::Session(link) => *link,
        Arrival::Fetch(_) => panic!("a fetch connection"),
    }
}

#[test]
fn a_link_has_all_its_connections_whatever_order_they_come_in_and_both_names_are_proved() {
    let hosts = hosts();
    let listener = listen(&hosts.b, |peer| peer.is_some_and(|name| name.as_str() == "a"));
    let session = SessionId([7; 16]);
    for attempt in 0..4 {
        let mut ours = dial(&listener, &hosts.a).link(session, attempt).unwrap();
        let mut theirs = link_of(&listener);
        assert_eq!((theirs.session, theirs.attempt, theirs.data.len()), (session, attempt, 3));
        assert_eq!(theirs.peer_name(), Some(&name("a")));
        // Each role is connected to the same role.
        let pairs = ours.data.iter_mut().zip(&mut theirs.data);
        let pairs = pairs.chain([
            (&mut ours.control, &mut theirs.control),
            (&mut ours.demand, &mut theirs.demand),
        ]);
        for (number, (out, back)) in pairs.enumerate() {
            let header = Header { kind: 9, class: 0, device: 0, a: number as u64, b: 0 };
            out.outgoing.write(header, &[b"x"]).unwrap();
            out.outgoing.flush().unwrap();
            assert_eq!(back.incoming.read().unwrap().header.a, number as u64);
        }
        ours.hangup().hang_up();
        assert!(theirs.control.incoming.read().is_err());
    }
}

#[test]
fn a_peer_that_is_not_allowed_gets_nothing() {
    let hosts = hosts();
    let listener = listen(&hosts.b, |peer| peer.is_some_and(|name| name.as_str() == "c"));
    let opened = dial(&listener, &hosts.a).link(SessionId([1; 16]), 0);
    // The handshake is done before the name is judged: the connection is closed at once.
    if let Ok(mut link) = opened {
        assert!(link.control.incoming.read().is_err());
    }
    assert!(matches!(listener.accept(Duration::from_millis(50)), Err(PeerError::Nobody(_))));
}

#[test]
fn plaintext_is_taken_only_by_explicit_choice_on_both_ends() {
    let hosts = hosts();
    let listener = listen(&hosts.b, |_| true);
    let error = dial(&listener, &Security::Plaintext).link(SessionId([1; 16]), 0);
    assert!(error.is_err_and(|error| error.to_string().contains("TLS")));
    let listener = listen(&Security::Plaintext, |_| true);
    let error = dial(&listener, &hosts.a).link(SessionId([1; 16]), 0).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("TLS"), "{error}");
    dial(&listener, &Security::Plaintext).link(SessionId([1; 16]), 0).unwrap();
    assert!(link_of(&listener).peer_name().is_none());
}

#[test]
fn strangers_and_half_links_are_turned_away_and_the_next_session_is_served() {
    let listener = listen(&Security::Plaintext, |_| true);
    // Somebody who speaks another protocol.
    let mut stranger = TcpStream::connect(listener.address()).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    // Somebody who opens one connection of a session and no more.
    let stream =
        Stream::connect(listener.address(), &name("b"), &Security::Plaintext, WAIT).unwrap();
    let session = SessionId([2; 16]);
    let preamble = Preamble { role: Role::Control, data: 3, session, attempt: 1 };
    let half = Connection::open(stream, &Security::Plaintext, &preamble, &limits()).unwrap();
    let _ours = dial(&listener, &Security::Plaintext).link(SessionId([3; 16]), 0).unwrap();
    assert_eq!(link_of(&listener).session, SessionId([3; 16]));
    drop((stranger, half));
}

#[test]
fn a_silent_peer_is_an_error_after_the_limit() {
    let listener = listen(&Security::Plaintext, |_| true);
    let short = Limits { silence: Duration::from_millis(800), ..limits() };
    let dial = Dial::new(listener.address(), name("b"), Security::Plaintext, short);
    let mut link = dial.link(SessionId([4; 16]), 0).unwrap();
    let _theirs = link_of(&listener);
    let begin = Instant::now();
    let error = link.control.incoming.read().unwrap_err();
    assert!(matches!(&error, WireError::Io(e) if e.kind() == io::ErrorKind::TimedOut), "{error}");
    assert!(begin.elapsed() < WAIT);
}

#[test]
fn a_listener_that_is_dropped_lets_its_port_go() {
    let listener = listen(&Security::Plaintext, |_| true);
    let address = listener.address();
    drop(listener);
    TcpListener::bind(address).unwrap();
}
