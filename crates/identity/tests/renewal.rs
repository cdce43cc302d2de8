//! Certificates that are renewed or revoked while their hosts run.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use identity::{
    Authority, Error, HostName, Identity, Result, Security, Stream, TlsClient, TlsServer,
};
use std::{fs, net::TcpListener, os::unix::net::UnixStream, path::Path, thread, time::Duration};

const HOUR: Duration = Duration::from_secs(3600);
const LIMIT: Duration = Duration::from_secs(10);

fn name(text: &str) -> HostName {
    HostName::new(text).unwrap()
}

/// A host's folder, with what the authority has for it.
fn folder(authority: &Authority, host: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(authority, dir.path(), &["ca.crt", &format!("{host}.crt"), &format!("{host}.key")]);
    dir
}

fn copy(authority: &Authority, to: &Path, files: &[&str]) {
    for file in files {
        fs::copy(authority.dir().join(file), to.join(file)).unwrap();
    }
}

struct Two {
    /// The authority's folder.
    home: tempfile::TempDir,
    authority: Authority,
    dirs: [tempfile::TempDir; 2],
    a: Identity,
    b: Identity,
}

impl Two {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let authority = Authority::create(home.path()).unwrap();
        let dirs = ["a", "b"].map(|host| {
            authority.issue(&name(host), HOUR).unwrap();
            folder(&authority, host)
        });
        let load = |at: usize, host| Identity::load(dirs[at].path(), &name(host)).unwrap();
        let (a, b) = (load(0, "a"), load(1, "b"));
        Self { home, authority, dirs, a, b }
    }

    /// A handshake of `a`, which calls, with `b`: what each end makes of it.
    fn shake(&self) -> (Result<Stream>, Result<Stream>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = Security::Mutual(self.b.clone());
        let other =
            thread::spawn(move || Stream::server(listener.accept().unwrap().0, &server, LIMIT));
        let client = Security::Mutual(self.a.clone());
        let ours = Stream::connect(address, &name("b"), &client, LIMIT);
        (ours, other.join().unwrap())
    }

    #[track_caller]
    fn talk(&self) {
        let (ours, theirs) = self.shake();
        assert_eq!(theirs.unwrap().peer_name(), Some(&name("a")));
        ours.unwrap();
    }
}

#[test]
fn a_revoked_host_is_refused_and_its_next_certificate_is_not_without_a_restart() {
    let two = Two::new();
    two.talk();
    assert_eq!(two.authority.revoke(&name("a")).unwrap(), 1);
    assert_eq!(two.authority.revoke(&name("a")).unwrap(), 0, "it is revoked already");
    // b has not heard of it.
    two.talk();
    copy(&two.authority, two.dirs[1].path(), &["revoked.crl"]);
    let (_, theirs) = two.shake();
    assert!(matches!(theirs, Err(Error::Revoked { .. })), "{theirs:?}");
    assert!(two.b.trouble().is_none());

    // The next one counts, for the identity that was loaded long ago.
    two.authority.issue(&name("a"), HOUR).unwrap();
    copy(&two.authority, two.dirs[0].path(), &["a.key", "a.crt"]);
    two.talk();
    assert!(two.a.trouble().is_none());

    // And is revoked like the first.
    assert_eq!(two.authority.revoke(&name("a")).unwrap(), 1);
    copy(&two.authority, two.dirs[0].path(), &["revoked.crl"]);
    copy(&two.authority, two.dirs[1].path(), &["revoked.crl"]);
    assert!(matches!(two.shake().1, Err(Error::Revoked { .. })));
    // By its own list it would not even start.
    let error = Identity::load(two.dirs[0].path(), &name("a")).unwrap_err();
    assert!(matches!(error, Error::Revoked { .. }), "{error}");
    assert!(two.a.trouble().unwrap().contains("revoked"));
}

#[test]
fn a_server_that_was_revoked_is_refused_by_its_clients() {
    let two = Two::new();
    two.authority.revoke(&name("b")).unwrap();
    copy(&two.authority, two.dirs[0].path(), &["revoked.crl"]);
    let (ours, _) = two.shake();
    assert!(matches!(ours, Err(Error::Revoked { .. })), "{ours:?}");
}

#[test]
fn half_of_a_renewal_changes_nothing_and_is_told() {
    let two = Two::new();
    two.authority.issue(&name("a"), HOUR).unwrap();
    copy(&two.authority, two.dirs[0].path(), &["a.key"]);
    two.talk();
    assert!(two.a.trouble().unwrap().contains("a.key"), "{:?}", two.a.trouble());
    copy(&two.authority, two.dirs[0].path(), &["a.crt"]);
    assert_eq!(two.a.trouble(), None);
    two.talk();
    // A file that is gone, too.
    fs::remove_file(two.dirs[1].path().join("ca.crt")).unwrap();
    assert!(two.b.trouble().unwrap().contains("ca.crt"));
    two.talk();
}

#[test]
fn what_is_made_of_an_identity_follows_it() {
    let two = Two::new();
    let (server, client) = (TlsServer::new(&two.b), TlsClient::new(&two.a, &name("b")));
    let shake = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = server.clone();
        let other = thread::spawn(move || server.accept(theirs, LIMIT).map(drop));
        let _ = client.connect(ours, LIMIT);
        other.join().unwrap()
    };
    shake().unwrap();
    two.authority.revoke(&name("a")).unwrap();
    copy(&two.authority, two.dirs[1].path(), &["revoked.crl"]);
    let error = shake().unwrap_err();
    assert!(matches!(error, Error::Revoked { .. }), "{error}");
    two.authority.issue(&name("a"), HOUR).unwrap();
    copy(&two.authority, two.dirs[0].path(), &["a.crt", "a.key"]);
    shake().unwrap();
}

#[test]
fn a_list_that_says_nothing_of_the_authority_or_is_none_trusts_nobody() {
    let two = Two::new();
    let other = Two::new();
    other.authority.revoke(&name("a")).unwrap();
    let list = two.dirs[1].path().join("revoked.crl");
    fs::copy(other.home.path().join("revoked.crl"), &list).unwrap();
    let error = Identity::load(two.dirs[1].path(), &name("b")).unwrap_err();
    assert!(matches!(error, Error::NoRevocationList { .. }), "{error}");
    let whole = fs::read_to_string(other.home.path().join("revoked.crl")).unwrap();
    for damaged in [String::new(), whole[..whole.len() / 2].to_owned(), "nonsense".to_owned()] {
        fs::write(&list, &damaged).unwrap();
        let error = Identity::load(two.dirs[1].path(), &name("b")).unwrap_err();
        assert!(matches!(error, Error::BadFile { .. }), "{damaged:?}: {error}");
        assert!(error.to_string().contains("revoked.crl"), "{error}");
    }
    // To a host that runs it does nothing but be told.
    assert!(two.b.trouble().unwrap().contains("revoked.crl"));
    two.talk();
}

#[test]
fn an_authority_revokes_what_it_issued_before_it_kept_lists_and_nothing_else() {
    let two = Two::new();
    let error = two.authority.revoke(&name("nobody")).unwrap_err();
    assert!(matches!(error, Error::NeverIssued { .. }), "{error}");
    fs::remove_file(two.home.path().join("issued")).unwrap();
    let reopened = Authority::open(two.home.path()).unwrap();
    assert_eq!(reopened.revoke(&name("a")).unwrap(), 1);
    copy(&two.authority, two.dirs[1].path(), &["revoked.crl"]);
    assert!(matches!(two.shake().1, Err(Error::Revoked { .. })));
    for (file, line) in [("issued", "00 a"), ("revoked", "zz"), ("issued", "00 a soon\n")] {
        let path = two.home.path().join(file);
        let before = fs::read(&path).unwrap_or_default();
        fs::write(&path, line).unwrap();
        let error = two.authority.revoke(&name("a")).unwrap_err();
        assert!(matches!(error, Error::BadFile { .. }), "{error}");
        assert!(error.to_string().contains(file), "{error}");
        fs::write(&path, before).unwrap();
    }
}
