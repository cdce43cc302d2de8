//! Who may say where a machine's frames go: the host that its lease names, at that epoch.

use crate::rig::{
    CLIENTS, LIMIT, Rig, SILENCE, epoch, heard, net, public, translated, udp, udp_of,
};
use conduit::{
    DataPath, MachineNet, NetError, PathKind,
    edge::EdgeOptions,
    lab::machine::{Guest, Vmm},
    wire::{self, EdgeSays, HostSays, Peer},
};
use identity::{HostName, Security, Stream};
use lease::{AttemptId, FileStore, LeaseStore, MachineName, Nonce, Outcome, Record};
use std::{io::BufReader, net::Ipv4Addr, time::Duration};

/// An edge that reads leases, and the leases.
fn leased() -> (Rig, FileStore, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let leases = folder.path().join("leases");
    let store = FileStore::open(&leases, LIMIT).unwrap();
    let options = EdgeOptions { lease: Some(leases), ..translated() };
    (Rig::new(&options), store, folder)
}

/// The host takes the lease: the next epoch is its own.
fn take(store: &FileStore, host: &str) -> u64 {
    let machine = MachineName::new("redis").unwrap();
    let host = HostName::new(host).unwrap();
    let (attempt, nonce) = (AttemptId::random().unwrap(), Nonce::random().unwrap());
    let old = store.read(&machine).unwrap();
    let new = match &old {
        Some(old) => old.taken(host, attempt, nonce),
        None => Record::first(machine.clone(), host, attempt, nonce),
    };
    assert_eq!(store.compare_and_set(&machine, old.as_ref(), &new).unwrap(), Outcome::Won);
    new.epoch.0
}

fn redis() -> MachineNet {
    MachineNet { ports: vec![udp(7001, 9)], ..net("redis", 7, 5) }
}

/// A host of the fleet that says what it likes.
struct Foreigner {
    reader: BufReader<identity::Reader>,
    writer: identity::Writer,
    id: u64,
}

const FOREIGN: Peer =
    Peer { overlay: Ipv4Addr::new(100, 64, 0, 99), underlay: Ipv4Addr::new(10, 88, 0, 99) };

impl Foreigner {
    fn join(rig: &Rig) -> Self {
        let (edge, name) = ("10.88.0.1:7450".parse().unwrap(), HostName::new("edge").unwrap());
        let stream = rig
            .edge_space
            .run(|| Stream::connect(edge, &name, &Security::Plaintext, LIMIT))
            .unwrap();
        stream.control().set_read_timeout(Some(LIMIT));
        let (reader, writer) = stream.split();
        let mut this = Self { reader: BufReader::new(reader), writer, id: 0 };
        let hello = HostSays::Hello {
            version: wire::VERSION,
            host: "foreign".into(),
            peer: FOREIGN,
            path: PathKind::Bpf,
        };
        wire::send(&mut this.writer, &hello).unwrap();
        let welcome = wire::receive::<EdgeSays>(&mut this.reader).unwrap();
        assert!(matches!(welcome, Some(EdgeSays::Welcome { .. })), "{welcome:?}");
        this
    }

    fn say(&mut self, message: &HostSays) -> Result<(), NetError> {
        wire::send(&mut self.writer, message).unwrap();
        loop {
            match wire::receive::<EdgeSays>(&mut self.reader).unwrap() {
                Some(EdgeSays::Done { id }) if id == self.id => return Ok(()),
                Some(EdgeSays::Refused { id, error }) if id == self.id => return Err(error),
                Some(EdgeSays::Peers { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn claim(&mut self, owner: Ipv4Addr, epoch: u64) -> Result<(), NetError> {
        self.id += 1;
        self.say(&HostSays::Claim { id: self.id, net: redis(), owner, epoch, home: None })
    }

    fn release(&mut self, epoch: u64) -> Result<(), NetError> {
        self.id += 1;
        self.say(&HostSays::Release { id: self.id, net: redis(), epoch })
    }
}

#[test]
fn a_foreign_host_neither_takes_nor_moves_nor_releases_a_machine_at_any_epoch() {
    let (rig, store, _folder) = leased();
    assert_eq!(take(&store, "a"), 1);
    let machine = rig.boot(redis(), 0);
    let inside = machine.udp(9);
    let mut foreign = Foreigner::join(&rig);
    let others = [FOREIGN.overlay, rig.hosts[1].peer.overlay];
    for owner in others {
        for at in [epoch(1), epoch(1) + 1, epoch(2), epoch(2) + 7, u64::MAX] {
            let error = foreign.claim(owner, at).unwrap_err();
            let expected = matches!(error, NetError::Unauthorised { .. });
            assert!(expected, "owner {owner}, epoch {at:#x}: {error}");
        }
        // One that is over is refused by the epoch itself.
        let error = foreign.claim(owner, epoch(1) - 1).unwrap_err();
        assert!(matches!(error, NetError::StaleEpoch { .. }), "{error}");
    }
    assert!(matches!(foreign.release(epoch(1)), Err(NetError::Unauthorised { .. })));
    assert!(matches!(foreign.release(epoch(2)), Err(NetError::Unauthorised { .. })));
    assert_eq!(rig.count("flip_unauthorised"), 12);
    assert_eq!(rig.count("flip_stale_epoch"), 2);
    let client = udp_of(&rig.clients[0], CLIENTS[0], 4000);
    client.send_to(b"still here", public(7001)).unwrap();
    assert!(heard(&inside, LIMIT).is_some());
}

#[test]
fn a_machine_moves_with_its_lease_and_a_flip_that_is_played_again_changes_nothing() {
    let (rig, store, _folder) = leased();
    take(&store, "a");
    let mut machine = rig.boot(redis(), 0);
    let inside = machine.udp(9);
    let client = udp_of(&rig.clients[0], CLIENTS[0], 4000);
    for host in ["b", "a", "b"] {
        take(&store, host);
        rig.move_machine(&mut machine, Duration::from_millis(20));
        client.send_to(b"hello", public(7001)).unwrap();
        let (_, from) = heard(&inside, LIMIT).expect("it is reached where it went");
        inside.send_to(b"answer", from).unwrap();
        assert!(heard(&client, LIMIT).is_some(), "and heard");
    }
    // What host a said when it had the machine, from a host that can say anything.
    let mut foreign = Foreigner::join(&rig);
    for said in [epoch(1), epoch(1) + 1, epoch(3), epoch(3) + 1] {
        let error = foreign.claim(rig.hosts[0].peer.overlay, said).unwrap_err();
        assert!(matches!(error, NetError::StaleEpoch { .. }), "{error}");
    }
    client.send_to(b"hello", public(7001)).unwrap();
    assert!(heard(&inside, LIMIT).is_some());
}

#[test]
fn a_host_that_has_lost_the_lease_cannot_take_the_frames_back() {
    let (rig, store, _folder) = leased();
    take(&store, "a");
    let mut machine = rig.boot(redis(), 0);
    take(&store, "b");
    rig.move_machine(&mut machine, Duration::from_millis(20));
    let former = &rig.hosts[0];
    let _tap = former.space.run(|| former.path.prepare(&machine.net)).unwrap();
    former.path.resume(&machine.net, epoch(3)).unwrap();
    let error = former.path.settled(&machine.net, epoch(3), LIMIT).unwrap_err();
    assert!(matches!(error, NetError::Unauthorised { .. }), "{error}");
    let inside = machine.udp(9);
    let client = udp_of(&rig.clients[0], CLIENTS[0], 4000);
    client.send_to(b"hello", public(7001)).unwrap();
    assert!(heard(&inside, LIMIT).is_some());
    former.path.forget(&machine.net, epoch(3)).unwrap();
}

#[test]
fn what_a_second_copy_says_is_not_heard_while_the_lease_is_anothers() {
    let (rig, store, _folder) = leased();
    take(&store, "a");
    let machine = rig.boot(redis(), 0);
    let other = &rig.hosts[1];
    let tap = other.space.run(|| other.path.prepare(&machine.net)).unwrap();
    other.path.resume(&machine.net, epoch(2)).unwrap();
    assert!(other.path.settled(&machine.net, epoch(2), LIMIT).is_err());
    let copy = Guest::new(&machine.net).unwrap();
    let vmm = Vmm::run(&copy, &tap);
    let client = udp_of(&rig.clients[0], CLIENTS[0], 4000);
    let socket = udp_of(copy.space(), machine.net.address, 9);
    let before = rig.count("not_owner");
    socket.send_to(b"second copy", (CLIENTS[0], 4000)).unwrap();
    assert_eq!(heard(&client, SILENCE), None);
    assert!(rig.count("not_owner") > before, "its frame reached the edge, and ended there");
    machine.udp(9).send_to(b"the machine", (CLIENTS[0], 4000)).unwrap();
    assert_eq!(heard(&client, LIMIT).map(|h| h.0), Some("the machine".into()));
    vmm.pause();
    other.path.forget(&machine.net, epoch(2)).unwrap();
}

#[test]
fn leases_that_cannot_be_read_hold_a_flip_up_and_do_not_end_it() {
    let (rig, store, folder) = leased();
    take(&store, "a");
    let (leases, away) = (folder.path().join("leases"), folder.path().join("away"));
    std::fs::rename(&leases, &away).unwrap();
    let host = &rig.hosts[0];
    let _tap = host.space.run(|| host.path.prepare(&redis())).unwrap();
    host.path.resume(&redis(), epoch(1)).unwrap();
    assert!(host.path.settled(&redis(), epoch(1), SILENCE).is_err(), "nobody can say");
    std::fs::rename(&away, &leases).unwrap();
    host.path.settled(&redis(), epoch(1), LIMIT).unwrap();
}
