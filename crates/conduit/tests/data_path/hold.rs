//! Frames of a machine that nobody has: into the hold tap, and from there to where it comes.

use crate::rig::{MACHINE, Node, Rig, eventually, heard, key, key_v6};
use conduit::{Tap, netlink::interface_index, tap};
use conduit_bpf::{Event, Key, Place, Program};
use std::{
    fs::File,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsFd,
    thread,
    time::Duration,
};

/// A hold tap of a node: frames that nobody takes wait in its queue.
struct Hold {
    tap: Tap,
    file: File,
}

impl Hold {
    fn on(node: &Node) -> Self {
        let (tap, index) = node.space.run(|| {
            let tap = tap::open_temporary("cd-hold").unwrap();
            tap::offer_offload(tap.fd.as_fd()).unwrap();
            (tap, interface_index("cd-hold").unwrap())
        });
        node.space.sysctl("net/ipv6/conf/cd-hold/disable_ipv6", "1").unwrap();
        node.space.ip("link set cd-hold txqueuelen 64 up\n").unwrap();
        node.space.run(|| node.plane().attach(index, Program::Replay).unwrap());
        let edge = node.plane().config().unwrap().unwrap().edge;
        node.configure(edge, Some(index));
        // The kernel drops what comes until it has noticed the carrier.
        eventually("the hold tap runs", || {
            let shown = node
                .space
                .run(|| conduit::exec::run("ip", &["link", "show", "dev", "cd-hold"], ""))
                .unwrap();
            shown.contains("LOWER_UP") && !shown.contains("state DOWN")
        });
        let file = File::from(tap.fd.try_clone().unwrap());
        Self { tap, file }
    }

    /// The frames that wait, with the header before each.
    fn take(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 70_000];
        while let Ok(size) = self.file.read(&mut buffer) {
            frames.push(buffer[..size].to_vec());
        }
        let header = tap::header_size(self.tap.fd.as_fd()).unwrap();
        assert!(frames.iter().all(|f| f[header + 6..header + 9] == [0x02, 0x63, 0x64]));
        frames
    }

    fn give(&mut self, frame: &[u8]) {
        self.file.write_all(frame).unwrap();
    }
}

fn away(rig: &Rig, key: Key, epoch: u64, place: Place) {
    rig.edge.set(key, epoch, place, rig.hosts[0].this);
}

#[test]
fn an_edge_holds_frames_and_gives_them_to_the_next_host_in_order() {
    let rig = Rig::new();
    rig.place(0, 1);
    let mut hold = Hold::on(&rig.edge);
    let b = rig.listen(1);
    away(&rig, key(), 1, Place::Hold);
    for n in 0..20 {
        rig.say(&format!("held {n}"));
    }
    eventually("all are held", || rig.edge.count(Event::Held) == 20);
    let frames = hold.take();
    assert_eq!(frames.len(), 20);
    // Given back too early they end, and do not go round.
    hold.give(&frames[0]);
    eventually("too early", || rig.edge.count(Event::Loop) == 1);
    rig.hosts[1].set(key(), 2, rig.local(1), rig.hosts[1].this);
    rig.edge.set(key(), 2, Place::Remote { leaving: false }, rig.hosts[1].this);
    for frame in &frames {
        hold.give(frame);
    }
    for n in 0..20 {
        assert_eq!(heard(&b).unwrap().0, format!("held {n}"));
    }
    assert_eq!(rig.edge.count(Event::Replayed), 20);
}

#[test]
fn a_full_hold_tap_keeps_the_oldest_and_the_kernel_counts_the_rest() {
    let rig = Rig::new();
    rig.place(0, 1);
    let mut hold = Hold::on(&rig.edge);
    away(&rig, key(), 1, Place::Hold);
    for n in 0..200 {
        rig.say(&format!("held {n}"));
    }
    eventually("all were sent", || rig.edge.count(Event::Held) == 200);
    let frames = hold.take();
    assert_eq!(frames.len(), 64, "its queue is its bound");
    let text = |frame: &Vec<u8>| String::from_utf8_lossy(frame).into_owned();
    assert!(text(&frames[0]).ends_with("held 0") && text(&frames[63]).ends_with("held 63"));
    let shown = ["-s", "-json", "link", "show", "dev", "cd-hold"];
    let shown = rig.edge.space.run(|| conduit::exec::run("ip", &shown, "")).unwrap();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert!(shown[0]["stats64"]["tx"]["dropped"].as_u64().unwrap() >= 136, "{shown}");
}

#[test]
fn without_a_hold_tap_such_frames_are_dropped_by_name() {
    let rig = Rig::new();
    rig.place(0, 1);
    away(&rig, key(), 1, Place::Hold);
    rig.say("to nobody");
    eventually("it is counted", || rig.edge.count(Event::NoHold) == 1);
}

#[test]
fn a_host_holds_what_comes_for_a_machine_that_it_will_have() {
    let rig = Rig::new();
    rig.place(1, 1);
    let mut hold = Hold::on(&rig.hosts[1]);
    let b = rig.listen(1);
    rig.hosts[1].set(key(), 1, Place::Hold, rig.hosts[1].this);
    rig.say("wait");
    eventually("it is held", || rig.hosts[1].count(Event::Held) == 1);
    assert!(b.set_nonblocking(true).is_ok() && heard(&b).is_none());
    b.set_nonblocking(false).unwrap();
    let frames = hold.take();
    rig.hosts[1].set(key(), 1, rig.local(1), rig.hosts[1].this);
    hold.give(&frames[0]);
    assert_eq!(heard(&b).unwrap().0, "wait");
}

#[test]
fn a_connection_is_opened_across_a_hold() {
    let rig = Rig::new();
    rig.place(0, 1);
    let mut hold = Hold::on(&rig.edge);
    for key in [key(), key_v6()] {
        away(&rig, key, 1, Place::Hold);
    }
    let listener = rig.guests[1].run(|| TcpListener::bind("0.0.0.0:7").unwrap());
    let client = &rig.client;
    thread::scope(|scope| {
        let dialling = scope.spawn(|| {
            client.run(|| {
                TcpStream::connect_timeout(&(MACHINE, 7).into(), Duration::from_secs(5)).unwrap()
            })
        });
        eventually("its first packet is held", || rig.edge.count(Event::Held) >= 1);
        rig.hosts[1].set(key(), 2, rig.local(1), rig.hosts[1].this);
        rig.edge.set(key(), 2, Place::Remote { leaving: false }, rig.hosts[1].this);
        for frame in hold.take() {
            hold.give(&frame);
        }
        let mut stream = dialling.join().unwrap();
        stream.write_all(b"hello").unwrap();
        let mut said = [0; 5];
        listener.accept().unwrap().0.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"hello");
    });
}
