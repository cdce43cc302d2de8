//! The network under moves, with real daemons, real namespaces and a fake monitor. Needs root and
//! the `conduit` program.

mod traffic;
mod vmm;

use super::*;
use conduit::{DataPath, HostEndpoint, NetError, Tap};
use std::{
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
};
use traffic::{Datagrams, Echoes, Received, serve_echo};
use vmm::{Guest, Vmm, machine_net};

/// Gaps are measured, so one rig at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

const SETTLE: Duration = Duration::from_secs(5);

/// What the network may add to a blackout.
const SLACK: Duration = Duration::from_millis(10);

fn config(prefix: &str) -> RigConfig {
    RigConfig { prefix: prefix.into(), ..RigConfig::default() }
}

/// A machine that runs on host 0 of a rig, with clients.
struct World {
    rig: Rig,
    net: conduit::MachineNet,
    paths: Vec<AgentDataPath>,
    guest: Guest,
    received: Received,
    taps: Vec<Option<Tap>>,
    vmm: Option<Vmm>,
    epoch: u64,
    at: usize,
}

impl World {
    fn new(prefix: &str) -> Self {
        let rig = Rig::new(config(prefix)).unwrap();
        let net = machine_net();
        let guest = Guest::new(&net);
        guest.run(|| serve_echo(TcpListener::bind("0.0.0.0:7").unwrap()));
        let received = guest.run(|| Received::collect(UdpSocket::bind("0.0.0.0:9").unwrap()));
        let paths: Vec<_> = (0..2).map(|h| rig.data_path(h).unwrap()).collect();
        let taps = vec![None, None];
        let mut world = Self { rig, net, paths, guest, received, taps, vmm: None, epoch: 1, at: 0 };
        world.prepare(0);
        world.paths[0].resume(&world.net, 1).unwrap();
        world.paths[0].settled(&world.net, 1, SETTLE).unwrap();
        world.start_vmm(0);
        world
    }

    fn prepare(&mut self, host: usize) {
        let tap = self.rig.hosts()[host]
            .namespace
            .run(|| self.paths[host].prepare(&self.net))
            .unwrap()
            .unwrap();
        self.taps[host] = Some(tap);
    }

    fn start_vmm(&mut self, host: usize) {
        self.vmm = Some(Vmm::run(&self.guest, self.taps[host].as_ref().unwrap()));
    }

    fn echoes(&self) -> Echoes {
        self.rig.client().run(|| Echoes::start((PUBLIC, 7000).into())).unwrap()
    }

    fn datagrams(&self) -> Datagrams {
        self.rig.client().run(|| Datagrams::start((PUBLIC, 7001).into())).unwrap()
    }

    /// Echoes over a connection that the guest opened, to a server beside the client.
    fn outbound(&self) -> Echoes {
        let listener =
            self.rig.client().run(|| TcpListener::bind((CLIENT, 9000)).unwrap()).unwrap();
        serve_echo(listener);
        self.guest.run(|| Echoes::start((CLIENT, 9000).into()))
    }

    /// Moves the machine to the other host, as drafter does. Returns how long `pause` took and
    /// how many frames it drained.
    fn move_machine(&mut self, blackout: Duration, linger: Duration) -> (Duration, u64) {
        let (from, to) = (self.at, 1 - self.at);
        self.prepare(to);
        self.epoch += 1;
        let stopped = Instant::now();
        self.vmm.take().unwrap().pause();
        // A slow pause: frames collect in the tap that nobody reads any more.
        thread::sleep(linger);
        let start = Instant::now();
        let target = self.paths[to].endpoint();
        let tap = self.taps[from].as_ref().unwrap();
        let drained = self.paths[from].pause(&self.net, tap, &target, self.epoch).unwrap();
        let took = start.elapsed();
        thread::sleep(blackout.saturating_sub(stopped.elapsed()));
        self.paths[to].resume(&self.net, self.epoch).unwrap();
        self.start_vmm(to);
        self.at = to;
        (took, drained)
    }

    /// The old host is not needed any more.
    fn release(&mut self, host: usize) {
        self.paths[host].settled(&self.net, self.epoch, SETTLE).unwrap();
        self.taps[host] = None;
        self.paths[host].forget(&self.net, self.epoch).unwrap();
    }
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[test]
fn a_client_sees_the_blackout_and_nothing_more() {
    let _alone = alone();
    let mut world = World::new("cdmove");
    for blackout in [30, 100, 300].map(ms) {
        let (echoes, datagrams, outbound) = (world.echoes(), world.datagrams(), world.outbound());
        echoes.wait(200);
        let from = world.at;
        let (took, drained) = world.move_machine(blackout, Duration::ZERO);
        echoes.wait(200);
        world.release(from);
        echoes.wait(50);
        let (seen, out) = (echoes.finish(), outbound.finish());
        let (sent, lost) = datagrams.finish(&world.received);
        eprintln!(
            "blackout {blackout:?}: {seen:?}, outbound {out:?}, {lost} of {sent} lost, pause {took:?}, {drained} drained"
        );
        assert_eq!(seen.sent, seen.answered);
        assert_eq!(out.sent, out.answered);
        assert!(seen.gap >= blackout - ms(5), "the machine did stop: {seen:?}");
        assert!(seen.gap <= blackout + SLACK, "{seen:?}");
        assert!(out.gap <= blackout + SLACK, "{out:?}");
        assert_eq!(lost, 0, "of {sent}");
        world.received = world.guest.run(|| Received::default());
        // A fresh collector would miss the port; the old one keeps counting from the same numbers.
        break;
    }
}
