//! Listens to a whole network of a rig, as somebody on the wire would: what frames cross it, and whether
//! a text that only its two ends should know can be read in one of them.

use super::Space;
use crate::exec::KernelError;
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket,
            sockopt,
        },
        time::TimeVal,
    },
};
use std::{
    collections::BTreeMap,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

/// Said by machines and clients of tests, in whose frames it is looked for.
pub const SECRET: &[u8] = b"nobody on the wire may read this";

/// What was heard.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// Frames of any kind. One that is forwarded is heard on each interface that it passes.
    pub frames: u64,
    /// Frames in which [`SECRET`] could be read.
    pub readable: u64,
    /// UDP over IPv4, by destination port.
    pub udp: BTreeMap<u16, u64>,
}

impl Heard {
    fn note(&mut self, frame: &[u8]) {
        self.frames += 1;
        self.readable += u64::from(frame.windows(SECRET.len()).any(|part| part == SECRET));
        // Ethernet, IPv4, UDP; fragments after the first have no ports.
        let at = |at: usize| frame.get(at..)?.first_chunk().map(|b| u16::from_be_bytes(*b));
        let Some(&lengths) = frame.get(14) else { return };
        let first = at(20).is_some_and(|offset| offset & 0x1fff == 0);
        if at(12) == Some(0x0800) && frame.get(23) == Some(&17) && first {
            let header = usize::from(lengths & 15) * 4;
            if let Some(port) = at(14 + header + 2) {
                *self.udp.entry(port).or_default() += 1;
            }
        }
    }
}

/// Listens until it is asked what it has heard.
pub struct Sniffer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Heard, Errno>>,
}

impl Sniffer {
    /// Listens on all interfaces of a namespace.
    pub fn start(space: &Space) -> Result<Self, KernelError> {
        let socket =
            space.run(open).map_err(|e| KernelError::new("listen to a whole network", e))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut heard, mut frame) = (Heard::default(), vec![0; 1 << 17]);
            loop {
                match recv(socket.as_raw_fd(), &mut frame, MsgFlags::empty()) {
                    Ok(size) => heard.note(&frame[..size]),
                    // What was there before the end is heard, too.
                    Err(Errno::EAGAIN) if stopping.load(Ordering::Relaxed) => return Ok(heard),
                    Err(Errno::EAGAIN | Errno::EINTR) => {}
                    Err(error) => return Err(error),
                }
            }
        });
        Ok(Self { stop, thread })
    }

    /// Ends, when the network is quiet for a moment.
    pub fn finish(self) -> Result<Heard, KernelError> {
        let fail = |e: &dyn std::fmt::Display| KernelError::new("listen to a whole network", e);
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| fail(&"its thread failed"))?.map_err(|e| fail(&e))
    }
}

fn open() -> nix::Result<OwnedFd> {
    let all = SockProtocol::EthAll;
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, all)?;
    setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20))?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 1000))?;
    Ok(socket)
}
