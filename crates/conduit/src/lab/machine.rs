//! A machine without a processor: a network namespace as the guest, and a monitor that pumps
//! frames between the guest's interface and a tap, and can stop. What goes wrong here is a panic.

use super::Space;
use crate::{
    MachineNet, Tap,
    exec::{self, KernelError},
    tap,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    fs::File,
    io::{Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    thread::{self, JoinHandle},
};

/// The guest: a network namespace with an address and a default route, configured as a machine's
/// would be.
pub struct Guest {
    space: Space,
    interface: Tap,
}

impl Guest {
    /// A guest with this machine's MAC, and told nothing else.
    pub fn bare(net: &MachineNet) -> Result<Self, KernelError> {
        let space = Space::new()?;
        let interface = space.run(|| {
            let fail = |e| KernelError::new("make a guest's interface", e);
            let interface = tap::open_temporary("eth0").map_err(fail)?;
            tap::offer_offload(interface.fd.as_fd()).map_err(fail)?;
            let mac = net.mac.map(|b| format!("{b:02x}")).join(":");
            let script = format!("link set dev eth0 address {mac} txqueuelen 16384 up\n");
            exec::run("ip", &["-batch", "-"], &script)?;
            Ok(interface)
        })?;
        Ok(Self { space, interface })
    }

    /// A guest with this machine's address.
    pub fn new(net: &MachineNet) -> Result<Self, KernelError> {
        let guest = Self::bare(net)?;
        guest.run(|| {
            let (gateway, address, mtu) = (tap::GATEWAY, net.address, net.mtu);
            let script = format!(
                "link set dev eth0 mtu {mtu}
address add {address}/32 dev eth0
route add {gateway} dev eth0
route add default via {gateway} dev eth0
"
            );
            exec::run("ip", &["-batch", "-"], &script)?;
            if let Some(v6) = net.address_v6 {
                let gateway = tap::GATEWAY_V6;
                exec::sysctl("net/ipv6/conf/eth0/accept_ra", "0")?;
                let script = format!(
                    "address add {v6}/128 dev eth0 nodad
route add ::/0 via {gateway} dev eth0
"
                );
                exec::run("ip", &["-6", "-batch", "-"], &script)?;
            }
            Ok::<_, KernelError>(())
        })?;
        Ok(guest)
    }

    /// The guest's network namespace.
    #[must_use]
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Runs something in the guest, on a thread of its own.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.space.run(work)
    }

    /// Starts something in the guest, on a thread of its own.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        self.space.spawn(work)
    }
}

/// A running monitor: frames go both ways until it is paused.
pub struct Vmm {
    wake: UnixStream,
    thread: JoinHandle<()>,
}

impl Vmm {
    /// Starts to read `tap` (as QEMU does: with offloads) for the guest.
    pub fn run(guest: &Guest, tap: &Tap) -> Self {
        tap::offer_offload(tap.fd.as_fd()).expect("a tap of ours is open");
        let outside = File::from(tap.fd.try_clone().expect("a tap of ours is open"));
        let inside = File::from(guest.interface.fd.try_clone().expect("a tap of ours is open"));
        let (wake, woken) = UnixStream::pair().expect("a tap of ours is open");
        let thread = thread::spawn(move || pump(&outside, &inside, &woken));
        Self { wake, thread }
    }

    /// Stops; when it returns, no frame is read any more.
    pub fn pause(mut self) {
        self.wake.write_all(&[1]).expect("a tap of ours is open");
        self.thread.join().expect("its thread ended well");
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
        poll(&mut wait, PollTimeout::NONE).expect("three open descriptors can be waited for");
        let ready = wait.map(|w| w.any().unwrap_or(false));
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
