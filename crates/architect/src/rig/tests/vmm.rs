//! A machine without a processor: a network namespace as the guest, and a monitor that pumps
//! frames between the guest's interface and a tap, and can stop.

use conduit::{MachineNet, PortMapping, Protocol, Tap, exec, tap};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns, unshare},
};
use std::{
    fs::File,
    io::{Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    thread::{self, JoinHandle},
};

/// What the network is told of the test's machine.
pub(super) fn machine_net() -> MachineNet {
    let port = |protocol, public, machine| PortMapping { protocol, public, machine };
    MachineNet {
        machine: "echo".into(),
        address: super::super::MACHINE,
        mac: [0x02, 0, 0, 0x77, 0, 1],
        mtu: 1400,
        ports: vec![port(Protocol::Tcp, 7000, 7), port(Protocol::Udp, 7001, 9)],
    }
}

/// The guest: a nameless network namespace with an address and a default route, configured as a
/// machine's would be.
pub(super) struct Guest {
    namespace: File,
    interface: Tap,
}

impl Guest {
    pub(super) fn new(net: &MachineNet) -> Self {
        let net = net.clone();
        let made = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let namespace = File::open("/proc/thread-self/ns/net").unwrap();
            let interface = tap::open_temporary("eth0").unwrap();
            tap::offer_offload(interface.fd.as_fd()).unwrap();
            let mac = net.mac.map(|b| format!("{b:02x}")).join(":");
            let (gateway, address, mtu) = (tap::GATEWAY, net.address, net.mtu);
            let script = format!(
                "link set dev lo up
link set dev eth0 address {mac} mtu {mtu} txqueuelen 16384 up
address add {address}/32 dev eth0
route add {gateway} dev eth0
route add default via {gateway} dev eth0
"
            );
            exec::run("ip", &["-batch", "-"], &script).unwrap();
            Self { namespace, interface }
        });
        made.join().unwrap()
    }

    /// Runs something in the guest, on a thread of its own.
    pub(super) fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let namespace = self.namespace.try_clone().unwrap();
        thread::spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    pub(super) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        self.spawn(work).join().unwrap()
    }
}

/// A running monitor: frames go both ways until it is paused.
pub(super) struct Vmm {
    wake: UnixStream,
    thread: JoinHandle<()>,
}

impl Vmm {
    /// Starts to read `tap` (as QEMU does: with offloads) for the guest.
    pub(super) fn run(guest: &Guest, tap: &Tap) -> Self {
        tap::offer_offload(tap.fd.as_fd()).unwrap();
        let outside = File::from(tap.fd.try_clone().unwrap());
        let inside = File::from(guest.interface.fd.try_clone().unwrap());
        let (wake, woken) = UnixStream::pair().unwrap();
        let thread = thread::spawn(move || pump(&outside, &inside, &woken));
        Self { wake, thread }
    }

    /// Stops; when it returns, no frame is read any more.
    pub(super) fn pause(mut self) {
        self.wake.write_all(&[1]).unwrap();
        self.thread.join().unwrap();
    }
}

fn pump(outside: &File, inside: &File, woken: &UnixStream) {
    let mut frame = vec![0; 256 * 1024];
    loop {
        let mut wait = [
            PollFd::new(woken.as_fd(), PollFlags::POLLIN),
            PollFd::new(outside.as_fd(), PollFlags::POLLIN),
            PollFd::new(inside.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut wait, PollTimeout::NONE).unwrap();
        let ready = wait.map(|w| w.any().unwrap());
        if ready[0] {
            return;
        }
        for (ready, mut from, mut to) in [(ready[1], outside, inside), (ready[2], inside, outside)]
        {
            // Not more than a handful, so that a pause is seen soon.
            for _ in 0..if ready { 16 } else { 0 } {
                let Ok(size) = from.read(&mut frame) else { break };
                let _ = to.write(&frame[..size]);
            }
        }
    }
}
