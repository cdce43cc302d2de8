use super::*;
use crate::{Authority, Validity};
use std::{
    net::{Shutdown, TcpListener},
    os::unix::net::UnixStream,
    thread,
    time::{Instant, SystemTime},
};

const LIMIT: Duration = Duration::from_secs(10);

fn name(text: &str) -> HostName {
    HostName::new(text).unwrap()
}

fn identity(dir: &std::path::Path, host: &str) -> Identity {
    Identity::load(dir, &name(host)).unwrap()
}

/// An authority with hosts `a` and `b`.
fn hosts() -> (tempfile::TempDir, Security, Security) {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create(dir.path()).unwrap();
    let hour = Duration::from_secs(3600);
    for host in ["a", "b"] {
        authority.issue(&name(host), hour).unwrap();
    }
    let (a, b) = (identity(dir.path(), "a"), identity(dir.path(), "b"));
    (dir, Security::Mutual(a), Security::Mutual(b))
}

/// Both ends' results of a handshake in which the client expects `peer`.
fn shake(client: &Security, server: &Security, peer: &str) -> (Result<Stream>, Result<Stream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = server.clone();
    let other = thread::spawn(move || Stream::server(listener.accept().unwrap().0, &server, LIMIT));
    let ours = Stream::connect(address, &name(peer), client, LIMIT);
    (ours, other.join().unwrap())
}

fn pair(client: &Security, server: &Security) -> (Stream, Stream) {
    let (c, s) = shake(client, server, "b");
    (c.unwrap(), s.unwrap())
}

/// A byte of a pattern whose period (a prime) fits no buffer or record size.
fn pattern(i: u64) -> u8 {
    (((i % 65_521) * 31) >> 3) as u8
}

fn send_pattern(writer: &mut Writer, total: u64) {
    let period: Vec<u8> = (0..65_521 * 5).map(pattern).collect();
    let mut at = 0;
    let mut size = 1;
    while at < total {
        size = size * 7 % 300_007;
        let from = (at % 65_521) as usize;
        let n = (size as u64).min(total - at).min(262_000) as usize;
        writer.write_all(&period[from..from + n]).unwrap();
        at += n as u64;
    }
    writer.finish().unwrap();
}

fn check_pattern(reader: &mut Reader, total: u64) {
    let period: Vec<u8> = (0..65_521 * 5).map(pattern).collect();
    let mut buf = vec![0; 200_003];
    let mut at = 0;
    loop {
        let n = reader.read(&mut buf).unwrap();
        if n == 0 {
            break;
        }
        let from = (at % 65_521) as usize;
        assert_eq!(&buf[..n], &period[from..from + n], "at byte {at}");
        at += n as u64;
    }
    assert_eq!(at, total);
}

fn full_duplex(client: &Security, server: &Security) {
    const TOTAL: u64 = 300 << 20;
    let (c, s) = pair(client, server);
    let ends = [c.split(), s.split()];
    thread::scope(|scope| {
        for (mut reader, mut writer) in ends {
            scope.spawn(move || check_pattern(&mut reader, TOTAL));
            scope.spawn(move || send_pattern(&mut writer, TOTAL));
        }
    });
}

#[test]
fn two_threads_a_side_move_300_mib_both_ways_at_once_under_tls() {
    let (_dir, a, b) = hosts();
    full_duplex(&a, &b);
}

#[test]
fn two_threads_a_side_move_300_mib_both_ways_at_once_in_plaintext() {
    full_duplex(&Security::Plaintext, &Security::Plaintext);
}

#[test]
fn both_ends_learn_the_others_proven_name() {
    let (_dir, a, b) = hosts();
    let (c, s) = pair(&a, &b);
    assert_eq!(c.peer_name().unwrap().as_str(), "b");
    assert_eq!(s.peer_name().unwrap().as_str(), "a");
    let (c, _s) = pair(&Security::Plaintext, &Security::Plaintext);
    assert_eq!(c.peer_name(), None);
}

#[test]
fn a_peer_with_another_name_is_refused_by_both_ends() {
    let (_dir, a, b) = hosts();
    let (c, s) = shake(&a, &b, "elsewhere");
    let e = c.unwrap_err();
    assert!(matches!(&e, Error::WrongName { expected, .. } if expected == "elsewhere"), "{e}");
    assert!(e.to_string().contains("\"b\"") || e.to_string().contains("for b"), "{e}");
    assert!(matches!(s.unwrap_err(), Error::Refused { .. }));
}

#[test]
fn hosts_of_two_authorities_refuse_each_other_and_say_why() {
    let (_dir, a, _) = hosts();
    let (_other_dir, _, b) = hosts();
    let (c, s) = shake(&a, &b, "b");
    let e = c.unwrap_err();
    assert!(matches!(e, Error::UnknownAuthority { .. }), "{e}");
    assert!(e.to_string().contains("ca.crt"), "{e}");
    let e = s.unwrap_err();
    assert!(matches!(e, Error::Refused { .. }), "{e}");
    assert!(e.to_string().contains("ca.crt"), "{e}");
}

#[test]
fn a_client_from_another_authority_that_trusts_ours_learns_that_it_is_refused() {
    // The client trusts the server's authority but has a certificate of its own authority: only
    // the server finds fault, after the client's part of the handshake is done.
    let (dir, _, b) = hosts();
    let (stranger, _, _) = hosts();
    std::fs::copy(dir.path().join("ca.crt"), stranger.path().join("both.crt")).unwrap();
    let ours = std::fs::read_to_string(stranger.path().join("ca.crt")).unwrap();
    let theirs = std::fs::read_to_string(dir.path().join("ca.crt")).unwrap();
    std::fs::write(stranger.path().join("ca.crt"), ours + &theirs).unwrap();
    let a = Security::Mutual(identity(stranger.path(), "a"));
    let (c, s) = shake(&a, &b, "b");
    assert!(matches!(s.unwrap_err(), Error::UnknownAuthority { .. }));
    let e = c.unwrap_err();
    assert!(matches!(e, Error::Refused { .. }), "{e}");
}

#[test]
fn an_expired_certificate_is_found_at_load_and_by_the_peer() {
    let (dir, a, _) = hosts();
    let authority = Authority::open(dir.path()).unwrap();
    let now = SystemTime::now();
    let (from, until) = (now - Duration::from_secs(7200), now - Duration::from_secs(3600));
    authority.issue_for(&name("b"), Validity { from, until }).unwrap();
    let e = Identity::load(dir.path(), &name("b")).unwrap_err();
    assert!(matches!(e, Error::OutOfTime { .. }), "{e}");
    assert!(e.to_string().contains("expired 1 h"), "{e}");

    let then = from + Duration::from_secs(60);
    let b = Security::Mutual(Identity::load_at(dir.path(), &name("b"), then).unwrap());
    let (c, s) = shake(&a, &b, "b");
    assert!(matches!(c.unwrap_err(), Error::OutOfTime { .. }));
    let e = s.unwrap_err();
    assert!(e.to_string().contains("expired"), "{e}");

    let (c, s) = shake(&b, &a, "a");
    let e = c.unwrap_err();
    assert!(matches!(e, Error::Refused { .. }), "{e}");
    assert!(matches!(s.unwrap_err(), Error::OutOfTime { .. }));
}

#[test]
fn a_certificate_of_the_future_is_refused_with_the_time_left() {
    let (dir, _, _) = hosts();
    let authority = Authority::open(dir.path()).unwrap();
    let from = SystemTime::now() + Duration::from_secs(7200);
    let until = from + Duration::from_secs(3600);
    authority.issue_for(&name("b"), Validity { from, until }).unwrap();
    let e = Identity::load(dir.path(), &name("b")).unwrap_err();
    assert!(e.to_string().contains("not valid for another"), "{e}");
}

#[test]
fn a_plaintext_client_at_a_tls_server_is_an_error_that_names_the_cause_on_both_ends() {
    let (_dir, _, b) = hosts();
    let (c, s) = shake(&Security::Plaintext, &b, "b");
    let e = s.unwrap_err();
    assert!(matches!(e, Error::PeerNotTls { .. }), "{e}");
    let e = c.unwrap_err();
    assert!(matches!(e, Error::PeerIsTls { .. }), "{e}");
}

#[test]
fn a_tls_client_at_a_plaintext_server_is_an_error_that_names_the_cause_on_both_ends() {
    let (_dir, a, _) = hosts();
    let (c, s) = shake(&a, &Security::Plaintext, "b");
    let e = s.unwrap_err();
    assert!(matches!(e, Error::PeerIsTls { .. }), "{e}");
    let e = c.unwrap_err();
    assert!(matches!(e, Error::PeerNotTls { .. }), "{e}");
}

#[test]
fn garbage_from_a_peer_is_an_error_and_never_a_panic() {
    let (_dir, _, b) = hosts();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..200 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = if round % 4 == 0 { Security::Plaintext } else { b.clone() };
        let mut bytes: Vec<u8> = (0..3000)
            .map(|_| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed as u8
            })
            .collect();
        if round % 2 == 0 {
            // Looks like a handshake record with a ClientHello of some length.
            bytes[..4].copy_from_slice(&[22, 3, 1, 4]);
            bytes[5] = 1;
        }
        peer.write_all(&bytes).unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        assert!(Stream::server(listener.accept().unwrap().0, &server, LIMIT).is_err());
    }
}

#[test]
fn a_stalled_or_dripping_handshake_ends_at_its_deadline() {
    let (_dir, a, b) = hosts();
    let limit = Duration::from_millis(300);
    for (drip, security) in
        [(false, &b), (true, &b), (false, &Security::Plaintext), (true, &Security::Plaintext)]
    {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = listener.accept().unwrap().0;
        let started = Instant::now();
        let result = thread::scope(|scope| {
            scope.spawn(move || {
                // The start of a plausible greeting or of a long ClientHello, a byte at a time.
                let start: &[u8] =
                    if matches!(security, Security::Plaintext) { b"arch" } else { &[22, 3, 1, 64] };
                for i in 0..12 {
                    if drip {
                        let byte = start.get(i).copied().unwrap_or(0);
                        if peer.write_all(&[byte]).is_err() {
                            break;
                        }
                    }
                    thread::sleep(Duration::from_millis(60));
                }
            });
            Stream::server(socket, security, limit)
        });
        let e = result.unwrap_err();
        let took = started.elapsed();
        assert!(matches!(e, Error::HandshakeTimeout { .. }), "{e}");
        assert!(took >= limit && took < LIMIT * 2, "{took:?}");
    }
    // The client's side of it: a server that never answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let e = Stream::connect(address, &name("b"), &a, limit).unwrap_err();
    assert!(matches!(e, Error::HandshakeTimeout { .. }), "{e}");
}

#[test]
fn a_read_times_out_without_losing_what_comes_later() {
    let (_dir, a, b) = hosts();
    for (client, server) in [(&a, &b), (&Security::Plaintext, &Security::Plaintext)] {
        let (mut c, mut s) = pair(client, server);
        c.control().set_read_timeout(Some(Duration::from_millis(50)));
        let mut buf = [0; 8];
        assert_eq!(c.read(&mut buf).unwrap_err().kind(), io::ErrorKind::TimedOut);
        s.write_all(b"later").unwrap();
        assert_eq!(c.read(&mut buf).unwrap(), 5);
        assert_eq!(&buf[..5], b"later");
    }
}

#[test]
fn a_write_to_a_peer_that_does_not_read_times_out_and_closes_the_way() {
    let (_dir, a, b) = hosts();
    for (client, server) in [(&a, &b), (&Security::Plaintext, &Security::Plaintext)] {
        let (mut c, _s) = pair(client, server);
        c.control().set_write_timeout(Some(Duration::from_millis(100)));
        let data = vec![7; 32 << 20];
        assert_eq!(c.write_all(&data).unwrap_err().kind(), io::ErrorKind::TimedOut);
        if c.peer_name().is_some() {
            assert_eq!(c.write(&data).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        }
    }
}

#[test]
fn a_cut_is_an_error_and_a_goodbye_is_an_end() {
    let (_dir, a, b) = hosts();
    let (mut c, mut s) = pair(&a, &b);
    c.write_all(b"all").unwrap();
    c.finish().unwrap();
    let mut got = Vec::new();
    s.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"all");
    // The other direction is still open.
    s.write_all(b"answer").unwrap();
    s.finish().unwrap();
    got.clear();
    c.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"answer");

    let (mut c, s) = pair(&a, &b);
    drop(s);
    let e = c.read(&mut [0; 8]).unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof, "{e}");
}

#[test]
fn shutdown_wakes_a_reader_that_waits_for_ever() {
    let (_dir, a, b) = hosts();
    for (client, server) in [(&a, &b), (&Security::Plaintext, &Security::Plaintext)] {
        let (c, _s) = pair(client, server);
        let control = c.control();
        let (mut reader, _writer) = c.split();
        let waiting = thread::spawn(move || reader.read(&mut [0; 8]));
        thread::sleep(Duration::from_millis(50));
        control.shutdown();
        assert!(!matches!(waiting.join().unwrap(), Ok(1..)));
    }
}

#[test]
fn bytes_changed_on_the_way_are_never_delivered() {
    let (_dir, a, b) = hosts();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let back = TcpListener::bind("127.0.0.1:0").unwrap();
    let (front_address, back_address) =
        (listener.local_addr().unwrap(), back.local_addr().unwrap());
    // A relay that changes one byte after the first 100 kB from the client.
    thread::spawn(move || {
        let near = listener.accept().unwrap().0;
        let far = TcpStream::connect(back_address).unwrap();
        let (mut near_in, mut far_out) = (near.try_clone().unwrap(), far.try_clone().unwrap());
        let (mut near_out, mut far_in) = (near, far);
        let answers = thread::spawn(move || io::copy(&mut far_in, &mut near_out));
        let (mut buf, mut seen) = ([0; 4096], 0);
        while let Ok(n @ 1..) = near_in.read(&mut buf) {
            if (seen..seen + n).contains(&100_000) {
                buf[100_000 - seen] ^= 1;
            }
            seen += n;
            if far_out.write_all(&buf[..n]).is_err() {
                break;
            }
        }
        let _ = answers.join();
    });
    let server = thread::spawn(move || Stream::server(back.accept().unwrap().0, &b, LIMIT));
    let mut c = Stream::connect(front_address, &name("b"), &a, LIMIT).unwrap();
    let mut s = server.join().unwrap().unwrap();
    let writer = thread::spawn(move || {
        let _ = c.write_all(&vec![5; 400_000]);
        c
    });
    let mut buf = vec![0; 65_536];
    let e = loop {
        match s.read(&mut buf) {
            Ok(n) => {
                assert!(n > 0, "a changed stream must not end cleanly");
                assert!(buf[..n].iter().all(|b| *b == 5));
            }
            Err(e) => break e,
        }
    };
    assert_eq!(e.kind(), io::ErrorKind::InvalidData, "{e}");
    drop(s);
    let _ = writer.join();
}

#[test]
fn tls_inside_another_protocol_works_over_a_unix_socket_and_proves_names() {
    let (dir, a, b) = hosts();
    let (Security::Mutual(a), Security::Mutual(b)) = (a, b) else { unreachable!() };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || TlsServer::new(&b).accept(theirs, LIMIT));
    let mut ours = TlsClient::new(&a, &name("b")).connect(ours, LIMIT).unwrap();
    let mut theirs = server.join().unwrap().unwrap();
    assert_eq!(theirs.peer_name(), Some(&name("a")));
    ours.write_all(b"hello").unwrap();
    ours.finish().unwrap();
    let mut heard = Vec::new();
    theirs.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"hello");

    // The files that other programs use; a client without a certificate is refused or not.
    let pem = tempfile::tempdir().unwrap();
    for (from, to) in
        [("ca.crt", "ca-cert.pem"), ("b.crt", "server-cert.pem"), ("b.key", "server-key.pem")]
    {
        std::fs::copy(dir.path().join(from), pem.path().join(to)).unwrap();
    }
    for check in [PeerCheck::Off, PeerCheck::Required] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = TlsServer::load_pem(pem.path(), check).unwrap();
        let server = thread::spawn(move || server.accept(theirs, LIMIT));
        let client = TlsClient::load_pem(pem.path(), "b").unwrap();
        let ours = client.connect(ours, LIMIT);
        let accepted = server.join().unwrap();
        assert_eq!(accepted.is_ok(), check == PeerCheck::Off);
        let Err(refused) = accepted else { continue };
        assert!(matches!(refused, Error::BadCertificate { .. }), "{refused}");
        // The client learns it from its first read.
        assert!(ours.unwrap().read(&mut [0; 16]).is_err());
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = TlsServer::load_pem(pem.path(), PeerCheck::Off).unwrap();
    let server = thread::spawn(move || server.accept(theirs, LIMIT));
    let wrong = TlsClient::load_pem(pem.path(), "c").unwrap().connect(ours, LIMIT).unwrap_err();
    assert!(matches!(wrong, Error::WrongName { .. }), "{wrong}");
    assert!(server.join().unwrap().is_err());
    std::fs::remove_file(pem.path().join("ca-cert.pem")).unwrap();
    let missing = TlsServer::load_pem(pem.path(), PeerCheck::Required).unwrap_err();
    assert!(missing.to_string().contains("ca-cert.pem"), "{missing}");
}
