//! Somebody between the ends, who repeats, damages, invents and moves what passes.

use super::{program, transfer};
use conduit::lab::{
    tunnel::{Outer, Pair, inner, outer},
    wait_for,
};
use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// What is done to a datagram.
type Meddle = fn(&[u8], &mut dyn FnMut(&[u8]));

/// Forwards between a (which talks to it in a's namespace) and b.
struct Relay {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// The socket towards b, to be exchanged.
    towards_b: Arc<Mutex<Arc<UdpSocket>>>,
}

const NEAR: &str = "127.0.0.1:9000";

impl Relay {
    fn start(pair: &Pair, meddle: Meddle) -> Self {
        let near = Arc::new(pair.a.space.run(|| UdpSocket::bind(NEAR).unwrap()));
        let far = Arc::new(Self::far(pair));
        let towards_b = Arc::new(Mutex::new(far));
        let stop = Arc::new(AtomicBool::new(false));
        near.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let a: SocketAddr = "127.0.0.1:7451".parse().unwrap();
        let b = Outer::V4.of(2);
        let mut threads = Vec::new();
        {
            let (stop, near, far) = (stop.clone(), near.clone(), towards_b.clone());
            threads.push(thread::spawn(move || {
                let mut buffer = vec![0; 65_536];
                while !stop.load(Ordering::Relaxed) {
                    let Ok(size) = near.recv(&mut buffer) else { continue };
                    let far = far.lock().unwrap().clone();
                    meddle(&buffer[..size], &mut |d| drop(far.send_to(d, b)));
                }
            }));
        }
        {
            let (stop, far) = (stop.clone(), towards_b.clone());
            threads.push(thread::spawn(move || {
                let mut buffer = vec![0; 65_536];
                while !stop.load(Ordering::Relaxed) {
                    let from = far.lock().unwrap().clone();
                    let Ok(size) = from.recv(&mut buffer) else { continue };
                    meddle(&buffer[..size], &mut |d| drop(near.send_to(d, a)));
                }
            }));
        }
        Self { stop, threads, towards_b }
    }

    fn far(pair: &Pair) -> UdpSocket {
        let socket = pair.a.space.run(|| UdpSocket::bind((outer(1).0, 0)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        socket
    }

    /// From now on, b hears a from another port.
    fn roam(&self, pair: &Pair) -> SocketAddr {
        let new = Self::far(pair);
        let address = new.local_addr().unwrap();
        *self.towards_b.lock().unwrap() = Arc::new(new);
        address
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn through(meddle: Meddle) -> (Pair, Relay) {
    let mut pair = Pair::apart(program()).unwrap();
    pair.a.start(&[]).unwrap();
    pair.b.start(&[]).unwrap();
    let relay = Relay::start(&pair, meddle);
    pair.introduce(None, Some(NEAR.parse().unwrap())).unwrap();
    pair.wait_for_session().unwrap();
    (pair, relay)
}

#[test]
fn what_is_received_twice_is_taken_once() {
    let (pair, _relay) = through(|datagram, send| {
        send(datagram);
        send(datagram);
    });
    transfer(&pair.a.space, &pair.b.space, inner(2).0.into(), 1_000_000);
    // The second of the last one may be on its way still.
    let taken = pair.b.count("packets_received").unwrap();
    let repeated = || pair.b.count("dropped_replayed").is_ok_and(|replayed| replayed >= taken);
    assert!(
        wait_for(Duration::from_secs(30), repeated),
        "not all of {taken} packets were repeated"
    );
}

#[test]
fn what_is_damaged_or_invented_is_dropped_and_counted_and_moves_nobody() {
    let (pair, relay) = through(|datagram, send| {
        let mut other = datagram.to_vec();
        if let Some(last) = other.last_mut() {
            *last ^= 1;
        }
        send(&other);
        send(&other[..other.len() / 2]);
        send(&[7; 100]);
        send(&[]);
        send(datagram);
    });
    transfer(&pair.a.space, &pair.b.space, inner(2).0.into(), 300_000);
    for name in ["dropped_not_authentic", "dropped_malformed"] {
        assert!(pair.b.count(name).unwrap() > 10, "{name}");
    }
    let here = relay.towards_b.lock().unwrap().local_addr().unwrap();
    assert_eq!(pair.b.status().unwrap().peers[0].at, Some(here));
    // From another place, what was sent before says nothing about where a is.
    let stranger = pair.a.space.run(|| UdpSocket::bind((outer(1).0, 0)).unwrap());
    let mut forged = vec![0; 200];
    forged[0] = 4;
    stranger.send_to(&forged, Outer::V4.of(2)).unwrap();
    transfer(&pair.a.space, &pair.b.space, inner(2).0.into(), 10_000);
    assert_eq!(pair.b.status().unwrap().peers[0].at, Some(here));
}

#[test]
fn a_peer_that_moves_is_followed_and_its_streams_go_on() {
    let (pair, relay) = through(|datagram, send| send(datagram));
    for _ in 0..3 {
        let transferring = thread::scope(|scope| {
            let run = scope
                .spawn(|| transfer(&pair.a.space, &pair.b.space, inner(2).0.into(), 3_000_000));
            let moved = relay.roam(&pair);
            run.join().unwrap();
            moved
        });
        let at = || pair.b.status().is_ok_and(|s| s.peers[0].at == Some(transferring));
        assert!(wait_for(Duration::from_secs(30), at), "b follows a to {transferring}");
    }
}
