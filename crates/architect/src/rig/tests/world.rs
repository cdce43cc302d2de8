//! A machine on a rig, its clients, and its moves.

use super::{
    super::{CLIENT, PUBLIC, Rig, RigConfig},
    ms,
};
use conduit::{
    AgentDataPath, DataPath, MachineNet, PortMapping, Protocol, Tap,
    lab::{
        machine::{Guest, Vmm},
        traffic::{Datagrams, Echoes, Received, Seen, serve_echo},
    },
};
use std::{
    net::{TcpListener, UdpSocket},
    thread,
    time::{Duration, Instant},
};

pub(super) const SETTLE: Duration = Duration::from_secs(20);

/// What the network may add to a blackout.
pub(super) const SLACK: Duration = Duration::from_millis(10);

pub(super) fn config(prefix: &str) -> RigConfig {
    RigConfig { prefix: prefix.into(), ..RigConfig::default() }
}

/// What the network is told of the test's machine.
pub(super) fn machine_net() -> MachineNet {
    let port = |protocol, public, machine| PortMapping { protocol, public, machine };
    MachineNet {
        ports: vec![port(Protocol::Tcp, 7000, 7), port(Protocol::Udp, 7001, 9)],
        ..MachineNet::new("echo", super::super::MACHINE, [0x02, 0, 0, 0x77, 0, 1], 1400)
    }
}

/// How a move went.
#[derive(Debug)]
pub(super) struct Moved {
    pub(super) divert: Duration,
    pub(super) pause: Duration,
    pub(super) drained: u64,
    /// What it really was: this computer may be busy.
    pub(super) blackout: Duration,
}

impl Moved {
    /// What the network added to the time in which the machine did not run.
    pub(super) fn added(&self, seen: &Seen) -> Duration {
        assert_eq!(seen.sent, seen.answered, "{seen:?}");
        assert!(seen.gap + ms(5) >= self.blackout, "the machine did stop: {seen:?} {self:?}");
        seen.gap.saturating_sub(self.blackout)
    }

    /// Nothing was lost that TCP had to wait for: its shortest timeout is 200 ms. `stall` is how
    /// long streams waited anyway on this computer, which may be busy.
    pub(super) fn assert_no_timeout(&self, seen: &Seen, stall: Duration) {
        let added = self.added(seen);
        assert!(added <= ms(150) + stall, "{seen:?} {self:?}, stall {stall:?}");
    }
}

/// A machine that runs on host 0 of a rig, with clients.
pub(super) struct World {
    pub(super) rig: Rig,
    pub(super) net: MachineNet,
    pub(super) paths: Vec<AgentDataPath>,
    pub(super) guest: Guest,
    pub(super) received: Received,
    pub(super) taps: Vec<Option<Tap>>,
    pub(super) vmm: Option<Vmm>,
    pub(super) epoch: u64,
    pub(super) at: usize,
    pub(super) control: Option<Echoes>,
}

impl World {
    pub(super) fn new(prefix: &str) -> Self {
        Self::with(config(prefix))
    }

    pub(super) fn with(config: RigConfig) -> Self {
        let rig = Rig::new(config).unwrap();
        let net = machine_net();
        let guest = Guest::new(&net).unwrap();
        guest.run(|| serve_echo(TcpListener::bind("0.0.0.0:7").unwrap()));
        let received = guest.run(|| Received::collect(UdpSocket::bind("0.0.0.0:9").unwrap()));
        let paths: Vec<_> = (0..2).map(|h| rig.data_path(h).unwrap()).collect();
        let taps = vec![None, None];
        let (vmm, epoch, at) = (None, 1, 0);
        let mut world =
            Self { rig, net, paths, guest, received, taps, vmm, epoch, at, control: None };
        let listener = world.rig.edge().run(|| TcpListener::bind((PUBLIC, 7999)).unwrap()).unwrap();
        serve_echo(listener);
        world.stall();
        world.prepare(0);
        world.paths[0].resume(&world.net, 1).unwrap();
        world.paths[0].settled(&world.net, 1, SETTLE).unwrap();
        world.start_vmm(0);
        world
    }

    /// How long this computer let a stream wait that no move touches (between client and edge),
    /// three times over, because the machine's frames pass more programs. Counts anew from here.
    pub(super) fn stall(&mut self) -> Duration {
        let next = self.rig.client().run(|| Echoes::start((PUBLIC, 7999).into())).unwrap();
        self.control.replace(next).map_or(Duration::ZERO, |last| last.finish().gap * 3)
    }

    pub(super) fn prepare(&mut self, host: usize) {
        let tap = self.rig.hosts()[host]
            .namespace
            .run(|| self.paths[host].prepare(&self.net))
            .unwrap()
            .unwrap();
        self.taps[host] = Some(tap);
    }

    pub(super) fn start_vmm(&mut self, host: usize) {
        self.vmm = Some(Vmm::run(&self.guest, self.taps[host].as_ref().unwrap()));
    }

    pub(super) fn echoes(&self) -> Echoes {
        self.rig.client().run(|| Echoes::start((PUBLIC, 7000).into())).unwrap()
    }

    pub(super) fn datagrams(&self) -> Datagrams {
        self.rig.client().run(|| Datagrams::start((PUBLIC, 7001).into())).unwrap()
    }

    /// Echoes over a connection that the guest opened, to a server beside the client.
    pub(super) fn outbound(&self) -> Echoes {
        let listener = self.rig.client().run(|| TcpListener::bind((CLIENT, 0)).unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        serve_echo(listener);
        self.guest.run(move || Echoes::start(address))
    }

    /// Moves the machine to the other host, as drafter does: its frames are diverted, it stops,
    /// what is left is drained, and `blackout` after it stopped it runs there.
    pub(super) fn move_machine(&mut self, blackout: Duration) -> Moved {
        let target = self.paths[1 - self.at].endpoint();
        self.prepare(1 - self.at);
        self.epoch += 1;
        let start = Instant::now();
        self.paths[self.at].divert(&self.net, &target, self.epoch).unwrap();
        let divert = start.elapsed();
        let stopped = Instant::now();
        self.vmm.take().unwrap().pause();
        let moved = self.hand_over(stopped, blackout);
        Moved { divert, ..moved }
    }

    /// The same without the early step, and with a slow monitor: while it `lingers`, frames collect
    /// in the tap that nobody reads any more.
    pub(super) fn move_late(&mut self, blackout: Duration, lingers: impl FnOnce()) -> Moved {
        self.prepare(1 - self.at);
        self.epoch += 1;
        let stopped = Instant::now();
        self.vmm.take().unwrap().pause();
        lingers();
        self.hand_over(stopped, blackout)
    }

    pub(super) fn hand_over(&mut self, stopped: Instant, blackout: Duration) -> Moved {
        let (from, to) = (self.at, 1 - self.at);
        let start = Instant::now();
        let target = self.paths[to].endpoint();
        let tap = self.taps[from].as_ref().unwrap();
        let drained = self.paths[from].pause(&self.net, tap, &target, self.epoch).unwrap();
        let pause = start.elapsed();
        thread::sleep(blackout.saturating_sub(stopped.elapsed()));
        self.paths[to].resume(&self.net, self.epoch).unwrap();
        self.start_vmm(to);
        self.at = to;
        Moved { divert: Duration::ZERO, pause, drained, blackout: stopped.elapsed() }
    }

    /// The old host is not needed any more.
    pub(super) fn release(&mut self, host: usize) {
        self.paths[host].settled(&self.net, self.epoch, SETTLE).unwrap();
        self.taps[host] = None;
        self.paths[host].forget(&self.net, self.epoch).unwrap();
    }
}
