//! The data path of a host by itself: a tap and a route per machine, no edge and no overlay, so
//! that one machine on one computer needs no daemon. The host reaches the machine by its address;
//! ports are not mapped, and the guest reaches what the host's own rules let it.

use crate::{
    book::{Book, Forgotten, Wait},
    datapath::{DataPath, HostEndpoint, MachineNet, NetError, Tap},
    exec::KernelError,
    host::HostNet,
    plane::PathChoice,
    tap, wire,
};
use std::{
    net::Ipv4Addr,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// See the module.
pub struct LocalDataPath {
    host: HostNet,
    book: Mutex<Book>,
}

impl LocalDataPath {
    /// Sets this host up (idempotent). Must be called in the host's network namespace.
    pub fn open() -> Result<Self, KernelError> {
        Ok(Self {
            host: HostNet::open(None, PathChoice::Routes, Path::new(conduit_bpf::ROOT))?,
            book: Mutex::default(),
        })
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DataPath for LocalDataPath {
    fn endpoint(&self) -> HostEndpoint {
        HostEndpoint(Ipv4Addr::UNSPECIFIED)
    }

    fn prepare(&self, net: &MachineNet) -> Result<Tap, NetError> {
        wire::check_machine(net)?;
        let record = self.book().prepare(net, Wait::Tap)?.clone();
        let fail = |e: KernelError| NetError::failed(net, "prepare its network", e);
        let name = self.host.ensure_tap(net).map_err(fail)?;
        self.host.apply(&record).map_err(fail)?;
        tap::open(&name).map_err(|e| NetError::failed(net, format!("open tap {name}"), e))
    }

    fn pause(
        &self,
        net: &MachineNet,
        _tap: &Tap,
        to: &HostEndpoint,
        _epoch: u64,
    ) -> Result<u64, NetError> {
        Err(NetError::failed(
            net,
            format!("send its frames to {}", to.0),
            "this host has no network agent; start `conduit agent` to move machines that have a \
             network",
        ))
    }

    fn resume(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        let record = self.book().resume(net, epoch)?.clone();
        self.host
            .apply(&record)
            .map_err(|e| NetError::failed(net, "route its frames to its tap", e))
    }

    fn forget(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        if self.book().forget(net, epoch)? == Forgotten::Nothing {
            return Ok(());
        }
        let fail = |e: KernelError| NetError::failed(net, "remove its tap", e);
        self.host.unroute(net).map_err(fail)?;
        self.host.remove_tap(net).map_err(fail)?;
        // There is no edge to wait for.
        self.book().edge_answered(net.key(), epoch, Ok(()));
        Ok(())
    }
}
