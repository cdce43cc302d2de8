//! The holder process: what it keeps, gives back, throws away and says of it, and what its own death
//! costs.

use crate::rig::{CLIENT, MAC, MACHINE, Node, PORT, Rig, eventually, key};
use conduit::{
    holder::{Bound, HoldSettings, Keeper, Limits, Stats},
    netlink::interface_index,
};
use conduit_bpf::{Entry, Event, Place, Program};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    net::UdpSocket,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

const CONDUIT: &str = env!("CARGO_BIN_EXE_conduit");

/// A node's holder, kept as an agent or edge does.
struct Held {
    keeper: Keeper,
    folder: tempfile::TempDir,
}

impl Held {
    fn on(node: &Node, limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let settings = HoldSettings::of(Path::new(CONDUIT), limits);
        let keeper =
            node.space.run(|| Keeper::start(settings, folder.path(), node.root(), |_| Ok(())));
        let index = node.space.run(|| interface_index("cd-hold")).expect("a holder has started");
        node.space.run(|| node.plane().attach(index, Program::Replay).unwrap());
        let edge = node.plane().config().unwrap().unwrap().edge;
        node.configure(edge, Some(index));
        Self { keeper, folder }
    }

    fn stats(&self) -> Stats {
        // It may be restarting.
        let mut stats = None;
        eventually("the holder answers", || {
            stats = self.keeper.stats();
            stats.is_some()
        });
        stats.unwrap()
    }

    fn signal(&self, signal: Signal) {
        let pid = self.keeper.pid().expect("a holder runs");
        kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("hold.sock")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let pid = self.keeper.pid();
        let stopped = self.keeper.stop();
        if !thread::panicking() {
            stopped.unwrap();
            let gone = |pid: u32| !Path::new(&format!("/proc/{pid}")).exists();
            assert!(pid.is_none_or(gone), "the holder still runs");
        }
    }
}

/// Numbered datagrams to the machine.
struct Sender {
    socket: UdpSocket,
    next: u64,
}

impl Sender {
    fn new(rig: &Rig) -> Self {
        let socket = rig.client.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        socket.connect((MACHINE, PORT)).unwrap();
        Self { socket, next: 0 }
    }

    fn send(&mut self, count: u64) {
        for _ in 0..count {
            self.socket.send(&self.next.to_be_bytes()).unwrap();
            self.next += 1;
        }
    }
}

/// The numbers that a machine hears, until it hears nothing for half a second.
fn numbers(socket: &UdpSocket) -> Vec<u64> {
    let mut found = Vec::new();
    let mut buffer = [0; 64];
    while let Ok(size) = socket.recv(&mut buffer) {
        found.push(u64::from_be_bytes(*buffer[..size].first_chunk().unwrap()));
    }
    found
}

/// The machine is on host a, which cannot be reached: its frames are held at the edge.
fn held_at_edge() -> Rig {
    let rig = Rig::new();
    rig.place(0, 1);
    hold(&rig, 1);
    rig
}

fn hold(rig: &Rig, epoch: u64) {
    rig.edge.set(key(), epoch, Place::Hold, rig.hosts[0].this);
}

/// Host b has the machine.
fn release(rig: &Rig, epoch: u64) {
    let b = rig.hosts[1].this;
    rig.hosts[1].set(key(), epoch, rig.local(1), b);
    rig.edge.set(key(), epoch, Place::Remote { leaving: false }, b);
}

/// Nothing waits any more: frames go their direct way.
fn opens(rig: &Rig) {
    eventually("the way opens", || !rig.edge.plane().is_draining(key()).unwrap());
}

#[test]
fn what_was_held_arrives_whole_and_in_order_at_a_socket_with_the_usual_buffer() {
    let rig = held_at_edge();
    // Slow enough for a receiver that a busy computer does not let run for a while.
    let held = Held::on(&rig.edge, Limits { pace: 2000, ..Limits::default() });
    let b = rig.listen(1);
    let mut sender = Sender::new(&rig);
    // Four times what the buffer of a socket takes at once.
    sender.send(1000);
    eventually("all are held", || held.stats().frames == 1000);
    let _open = b.try_clone().unwrap();
    let heard = thread::spawn(move || numbers(&b));
    release(&rig, 2);
    // Beside live traffic, which goes behind what was held.
    for _ in 0..300 {
        sender.send(1);
        thread::sleep(Duration::from_millis(1));
    }
    let heard = heard.join().unwrap();
    assert_eq!(heard.len(), 1300, "none is lost");
    assert!(heard.is_sorted(), "none overtakes another");
    opens(&rig);
    let replayed = rig.edge.count(Event::Replayed);
    sender.send(10);
    let stats = held.stats();
    assert_eq!(rig.edge.count(Event::Replayed), replayed, "no detour is left");
    assert_eq!((stats.frames, stats.machines, stats.lost), (0, 0, 0));
    assert_eq!(stats.given, stats.taken);
}

#[test]
fn a_full_hold_throws_the_newest_away_and_says_so() {
    let rig = held_at_edge();
    let machine = Bound { frames: 10, ..Limits::default().machine };
    let held = Held::on(&rig.edge, Limits { machine, ..Limits::default() });
    let b = rig.listen(1);
    let mut sender = Sender::new(&rig);
    sender.send(30);
    eventually("it is full", || held.stats().machine_full == 20);
    release(&rig, 2);
    assert_eq!(numbers(&b), (0..10).collect::<Vec<_>>());
    opens(&rig);
    sender.send(1);
    assert_eq!(numbers(&b), [30]);
}

#[test]
fn what_waits_too_long_is_thrown_away_and_counted() {
    let rig = held_at_edge();
    let held = Held::on(&rig.edge, Limits { age: Duration::from_secs(1), ..Limits::default() });
    let b = rig.listen(1);
    let mut sender = Sender::new(&rig);
    sender.send(5);
    eventually("they are held", || held.stats().frames == 5);
    eventually("they expire", || held.stats().expired == 5);
    sender.send(1);
    release(&rig, 2);
    assert_eq!(numbers(&b), [5]);
    opens(&rig);
}

#[test]
fn frames_of_a_machine_that_is_given_up_are_thrown_away() {
    let rig = held_at_edge();
    let held = Held::on(&rig.edge, Limits::default());
    let mut sender = Sender::new(&rig);
    sender.send(5);
    eventually("they are held", || held.stats().frames == 5);
    rig.edge.set(key(), 1, Place::Drop, rig.hosts[0].this);
    eventually("they are gone", || held.stats().gone == 5);
    sender.send(1);
    eventually("so is what comes", || rig.edge.count(Event::MachineGone) == 1);
    // Whoever comes back from there starts anew.
    let b = rig.listen(1);
    release(&rig, 2);
    sender.send(1);
    assert_eq!(numbers(&b), [6]);
    eventually("nothing is left", || held.stats().machines == 0);
}

#[test]
fn a_hold_in_the_middle_of_giving_back_loses_nothing() {
    let rig = held_at_edge();
    let held = Held::on(&rig.edge, Limits { pace: 200, ..Limits::default() });
    let b = rig.listen(1);
    let mut sender = Sender::new(&rig);
    sender.send(200);
    eventually("all are held", || held.stats().frames == 200);
    release(&rig, 2);
    eventually("some are given back", || held.stats().given > 70);
    rig.edge.set(key(), 2, Place::Hold, rig.hosts[1].this);
    sender.send(10);
    eventually("they wait behind", || held.stats().taken == 210);
    let paused = held.stats().given;
    thread::sleep(Duration::from_millis(50));
    assert_eq!(held.stats().given, paused, "nothing leaves while it is held");
    release(&rig, 2);
    let heard = numbers(&b);
    assert!(heard.is_sorted());
    // A frame that was being written at that moment ends, under its name.
    let ended = rig.edge.count(Event::Loop) as usize;
    assert!(ended <= 1 && heard.len() + ended == 210, "{} heard, {ended} ended", heard.len());
}

#[test]
fn a_holder_that_is_killed_loses_what_it_had_taken_and_not_what_waits_in_the_tap() {
    let rig = held_at_edge();
    let held = Held::on(&rig.edge, Limits::default());
    let mut sender = Sender::new(&rig);
    sender.send(20);
    eventually("they are in its memory", || held.stats().frames == 20);
    held.signal(Signal::SIGSTOP);
    sender.send(15);
    eventually("more wait in the tap", || rig.edge.count(Event::Held) == 35);
    let first = held.keeper.pid();
    held.signal(Signal::SIGKILL);
    eventually("another one runs", || held.keeper.pid().is_some_and(|pid| Some(pid) != first));
    sender.send(5);
    let b = rig.listen(1);
    release(&rig, 2);
    assert_eq!(numbers(&b), (20..40).collect::<Vec<_>>());
    opens(&rig);
    assert_eq!(held.stats().lost, 20, "it says so");
}

#[test]
fn a_holder_is_replaced_with_all_that_it_holds() {
    let rig = held_at_edge();
    let held = Held::on(&rig.edge, Limits::default());
    let mut sender = Sender::new(&rig);
    sender.send(500);
    eventually("they are held", || held.stats().frames == 500);
    let first = held.keeper.pid().unwrap();
    let (socket, root) = (held.socket(), rig.edge.root().to_owned());
    let mut successor = rig.edge.space.run(|| {
        Command::new(CONDUIT)
            .args(["hold", "--take-over", "--socket"])
            .arg(&socket)
            .arg("--pins")
            .arg(&root)
            .spawn()
            .unwrap()
    });
    sender.send(100);
    eventually("the edge has the new one", || held.keeper.pid() == Some(successor.id()));
    eventually("all are there", || held.stats().frames == 600);
    assert_eq!(held.stats().handed_over, 1);
    eventually("the old one has ended", || !Path::new(&format!("/proc/{first}")).exists());
    let b = rig.listen(1);
    let heard = thread::spawn(move || numbers(&b));
    release(&rig, 2);
    assert_eq!(heard.join().unwrap(), (0..600).collect::<Vec<_>>());
    opens(&rig);
    assert_eq!(held.stats().lost, 0);
    held.keeper.stop().unwrap();
    successor.wait().unwrap();
}

#[test]
fn frames_that_the_hold_tap_had_no_room_for_do_not_keep_the_way_closed() {
    let rig = held_at_edge();
    let held = Held::on(&rig.edge, Limits::default());
    rig.edge.space.ip("link set cd-hold txqueuelen 16\n").unwrap();
    let b = rig.listen(1);
    let mut sender = Sender::new(&rig);
    held.signal(Signal::SIGSTOP);
    sender.send(40);
    eventually("all were put in", || rig.edge.count(Event::Held) == 40);
    held.signal(Signal::SIGCONT);
    release(&rig, 2);
    assert_eq!(numbers(&b), (0..16).collect::<Vec<_>>());
    opens(&rig);
    assert_eq!(held.stats().lost, 24);
}

#[test]
fn what_comes_while_a_machine_stops_waits_until_its_tap_is_empty_and_follows_in_order() {
    let rig = Rig::new();
    rig.place(0, 1);
    let held = Held::on(&rig.hosts[0], Limits::default());
    let (b, this) = (rig.listen(1), rig.hosts[1].this);
    rig.hosts[1].set(key(), 2, rig.local(1), this);
    rig.hosts[0].set(key(), 2, Place::Remote { leaving: true }, this);
    let mut sender = Sender::new(&rig);
    sender.send(30);
    eventually("they wait", || held.stats().frames == 30);
    assert_eq!(rig.hosts[0].count(Event::Forwarded), 0, "none goes before what is in the tap");
    rig.hosts[0].set(key(), 2, Place::Remote { leaving: false }, this);
    sender.send(10);
    assert_eq!(numbers(&b), (0..40).collect::<Vec<_>>());
    eventually("the way opens", || !rig.hosts[0].plane().is_draining(key()).unwrap());

    // A move that fails: they come back to the machine that goes on here.
    rig.hosts[0].set(key(), 3, Place::Remote { leaving: true }, this);
    sender.send(20);
    eventually("they wait again", || held.stats().frames == 20);
    let a = rig.listen(0);
    let own = rig.hosts[0].this;
    rig.hosts[0].set(key(), 4, rig.local(0), own);
    assert_eq!(numbers(&a), (40..60).collect::<Vec<_>>());
    assert_eq!(held.stats().lost, 0);
}

#[test]
fn a_host_gives_a_machine_what_it_held_for_it() {
    let rig = Rig::new();
    rig.place(0, 1);
    let held = Held::on(&rig.hosts[1], Limits::default());
    let (b, this) = (rig.listen(1), rig.hosts[1].this);
    rig.hosts[1].set(key(), 0, Place::Expected, this);
    rig.hosts[0].set(key(), 2, Place::Remote { leaving: false }, this);
    rig.edge.set(key(), 2, Place::Remote { leaving: false }, this);
    let mut sender = Sender::new(&rig);
    sender.send(800);
    eventually("they are held", || held.stats().frames == 800);
    let heard = thread::spawn(move || numbers(&b));
    rig.hosts[1].set(key(), 2, rig.local(1), this);
    assert_eq!(heard.join().unwrap(), (0..800).collect::<Vec<_>>());
    eventually("the way opens", || !rig.hosts[1].plane().is_draining(key()).unwrap());
}

/// The machine is on host a, as its edge has it and nobody is announced; it runs on host b already.
fn speaks_early() -> (Rig, Held, UdpSocket) {
    let rig = Rig::new();
    rig.place(0, 1);
    let held = Held::on(&rig.edge, Limits::default());
    let a = rig.hosts[0].this;
    let place = Place::Remote { leaving: false };
    let entry = Entry { epoch: 1, owner: a, candidate: Some(a), place, mac: MAC };
    rig.edge.plane().change(key(), &entry).unwrap();
    rig.hosts[1].set(key(), 2, rig.local(1), rig.hosts[1].this);
    let hears = rig.client.run(|| UdpSocket::bind((CLIENT, PORT)).unwrap());
    hears.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let says = rig.guests[1].run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    for number in 0..20_u64 {
        says.send_to(&number.to_be_bytes(), (CLIENT, PORT)).unwrap();
    }
    eventually("they wait at the edge", || rig.edge.count(Event::Early) == 20);
    assert_eq!(rig.edge.count(Event::NotOwner), 0);
    (rig, held, hears)
}

#[test]
fn what_a_machine_says_too_early_is_given_back_in_order_when_its_host_is_believed() {
    let (rig, held, hears) = speaks_early();
    rig.edge.set(key(), 2, Place::Remote { leaving: false }, rig.hosts[1].this);
    assert_eq!(numbers(&hears), (0..20).collect::<Vec<_>>());
    let stats = held.stats();
    assert_eq!((stats.frames, stats.given, stats.early_lost), (0, 20, 0));
}

#[test]
fn what_came_early_from_a_host_that_is_never_believed_is_thrown_away_and_counted() {
    let (rig, held, hears) = speaks_early();
    rig.edge.set(key(), 3, Place::Remote { leaving: false }, rig.hosts[0].this);
    eventually("another has the machine", || held.stats().early_lost == 20);
    // And where nothing is heard at all.
    let (_rig, silent, unheard) = speaks_early();
    eventually("nothing came in time", || silent.stats().early_lost == 20);
    assert!(numbers(&hears).is_empty() && numbers(&unheard).is_empty());
    assert_eq!((held.stats().frames, silent.stats().frames), (0, 0));
    assert_eq!(held.stats().given + silent.stats().given, 0);
}
