//! What runners ask for: a machine's frames are prepared for, led away, taken back, settled, forgotten.
//!
//! Called by the server of the agent's socket. Each is made once however often it is asked, by its epoch.

use super::{Core, FOLLOW_LIMIT, FOLLOW_LOOK, KEYS_PATIENCE, PREPARE_PATIENCE, SAY_LIMIT, Shared};
use crate::{
    book::{Book, EdgeView, Forgotten, Place, Record, Wait},
    datapath::{LONG_BLACKOUT, MachineKey, MachineNet, NetError, NetworkId},
    exec::KernelError,
    plane::PathKind,
    wire::{self, EdgeSays, HostSays},
};
use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::MutexGuard,
    time::{Duration, Instant},
};

impl Shared {
    pub(super) fn prepare(
        &self,
        net: &MachineNet,
        blackout: Option<Duration>,
    ) -> Result<String, NetError> {
        wire::check_machine(net)?;
        let operation = "prepare its network";
        if u32::from(net.mtu) > self.host.mtu() {
            return Err(NetError::failed(
                net,
                operation,
                format!(
                    "its MTU of {} does not fit this host's overlay ({}); give machines the \
                     smallest MTU of the fleet when they are created",
                    net.mtu,
                    self.host.mtu()
                ),
            ));
        }
        let _one_at_a_time = self.taps();
        let last = self.core().book.get(net.key()).map_or(0, |r| r.epoch);
        self.drained(net.key(), last);
        let moving_on = |core: &Core| {
            core.book
                .get(net.key())
                .is_some_and(|r| matches!(r.place, Place::Away { .. }) && r.edge_is_open())
        };
        let deadline = Instant::now() + PREPARE_PATIENCE;
        let ready = |core: &Core| core.edge.is_some() && !moving_on(core);
        let mut core = self.wait(self.core(), deadline, ready);
        if core.edge.is_none() {
            let detail = format!("this host has not reached its edge yet ({})", core.link());
            return Err(NetError::failed(net, operation, detail));
        }
        let long = blackout.is_some_and(|b| b > LONG_BLACKOUT);
        let wait = if long && self.host.holds() { Wait::Hold } else { Wait::Tap };
        // A rehearsal: is it refused? Then nothing is made.
        let before = core.book.get(net.key()).cloned();
        core.book.prepare(net, wait)?;
        core.book.undo(net.key(), before);
        drop(core);

        let fail = |e: KernelError| NetError::failed(net, operation, e);
        let name = self.host.ensure_tap(net).map_err(fail)?;
        self.change(net, operation, |book| book.prepare(net, wait).cloned())?;
        Ok(name)
    }

    /// The addresses of a machine that comes without any: the edge gives them.
    pub(super) fn address(
        &self,
        machine: &str,
        network: NetworkId,
    ) -> Result<(Ipv4Addr, Option<Ipv6Addr>), NetError> {
        let fail = |detail: String| NetError::failed_for(machine, "get it an address", detail);
        wire::check_name(machine).map_err(fail)?;
        let deadline = Instant::now() + PREPARE_PATIENCE;
        let core = self.wait(self.core(), deadline, Core::is_connected);
        let link = core.link();
        drop(core);
        let name = machine.to_owned();
        let ask = move |id| HostSays::Address { id, machine: name, network };
        match self.ask_edge(ask, PREPARE_PATIENCE) {
            Some(EdgeSays::Given { address, address_v6, .. }) => Ok((address, address_v6)),
            Some(EdgeSays::Refused { error, .. }) => Err(error),
            _ => Err(fail(format!("the edge gave no answer ({link}); try again"))),
        }
    }

    pub(super) fn divert(
        &self,
        net: &MachineNet,
        to: Ipv4Addr,
        epoch: u64,
    ) -> Result<(), NetError> {
        let operation = format!("send its frames to {to}");
        if to == self.this.overlay {
            return Err(NetError::failed(net, operation, "that is this host itself"));
        }
        if !self.core().peers.contains_key(&to) {
            let detail = "no such host is known here; is its agent connected to the same edge?";
            return Err(NetError::failed(net, operation, detail));
        }
        // A host that has just come: its keys are told a moment after it is. The machine still runs here.
        if let Some(secure) = &self.secure
            && !secure.await_end(to, KEYS_PATIENCE)
        {
            let detail = "its keys are not known here: nothing could be sent there. Is its tunnel running \
                          (conduit tunnel status), and its agent connected to the same edge?";
            return Err(NetError::failed(net, operation, detail));
        }
        self.change(net, &operation, |book| book.divert(net, to, epoch).cloned())
    }

    /// What a machine has left in its tap has been sent on. What came since follows, before the edge is
    /// told and its frames take a shorter way.
    pub(super) fn follow(&self, key: MachineKey, epoch: u64) {
        let core = self.core();
        let leaving = |r: &&Record| r.epoch == epoch && r.edge == EdgeView::Held;
        let Some(record) = core.book.get(key).filter(leaving) else { return };
        let record = Record { edge: EdgeView::Pending, ..record.clone() };
        // Under the lock, as every change. If it is refused, `drained` says so.
        let done = self.host.apply(&record).is_ok();
        drop(core);
        let deadline = Instant::now() + FOLLOW_LIMIT;
        while done && self.host.is_draining(&record.net) && Instant::now() < deadline {
            std::thread::sleep(FOLLOW_LOOK);
        }
    }

    /// The edge may be told of a divert.
    pub(super) fn drained(&self, key: MachineKey, epoch: u64) {
        let mut core = self.core();
        // Not written down: a restart says it by itself.
        let Some(record) = core.book.drained(key, epoch).cloned() else { return };
        core.note(key);
        let applied = self.host.apply(&record);
        drop(core);
        self.changed.notify_all();
        if let Err(error) = applied {
            tracing::warn!(machine = record.net.machine, %error, "its last frames may still leave");
        }
    }

    /// Waits a moment until the edge has been told what is pending: this host may be gone soon.
    pub(super) fn say(&self, key: MachineKey, epoch: u64) {
        let said = |core: &Core| {
            core.is_said(key, epoch)
                || core.book.get(key).is_none_or(|r| r.edge != EdgeView::Pending)
        };
        drop(self.wait(self.core(), Instant::now() + SAY_LIMIT, said));
    }

    pub(super) fn resume(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        let home = self.home_of_new(net, epoch);
        self.change(net, "take its frames", |book| {
            let record = book.resume(net, epoch)?.clone();
            let home = home.filter(|_| record.home.is_none());
            Ok(home.and_then(|home| book.at_home(net.key(), home).cloned()).unwrap_or(record))
        })
    }

    /// One change: decided by the book, written down, made in the kernel. A repeated call makes the
    /// kernel follow again. Whoever asked is answered next, and the others are told then
    /// ([`Shared::tell`]).
    pub(super) fn change(
        &self,
        net: &MachineNet,
        operation: &str,
        decide: impl FnOnce(&mut Book) -> Result<Record, NetError>,
    ) -> Result<(), NetError> {
        let mut core = self.core();
        let before = core.book.get(net.key()).cloned();
        let record = decide(&mut core.book)?;
        let news = before.as_ref() != Some(&record);
        // What the entry in the kernel says need not be in the file yet.
        let entry_says_it = self.host.path() == PathKind::Bpf
            && before.as_ref().is_some_and(|b| b.net == record.net);
        if news
            && !entry_says_it
            && let Err(error) = self.machines.save(net.key(), &record)
        {
            core.book.undo(net.key(), before);
            return Err(NetError::failed(net, operation, error));
        }
        core.note(net.key());
        if news {
            core.answers.remove(&net.key());
        }
        let done = self.host.apply(&record);
        if news && entry_says_it {
            self.machines.note(net.key(), record);
        }
        done.map_err(|e| NetError::failed(net, operation, e))
    }

    /// After a change and its answer: wakes the threads that wait for one, that which tells the edge
    /// among them, and that which writes files.
    pub(super) fn tell(&self, net: &MachineNet, done: bool) {
        self.changed.notify_all();
        self.machines.wake();
        if done && let Some(record) = self.core().book.get(net.key()) {
            let (place, epoch) = (record.place, record.epoch);
            tracing::info!(machine = net.machine, ?place, epoch, "way set");
        }
    }

    pub(super) fn settled(
        &self,
        net: &MachineNet,
        epoch: u64,
        limit: Duration,
    ) -> Result<(), NetError> {
        let operation = format!("wait for the edge to confirm epoch {epoch}");
        let answer = |core: &Core| -> Option<Result<(), NetError>> {
            let floor = core.book.floor(net.key());
            let Some(record) = core.book.get(net.key()).filter(|r| r.epoch <= epoch) else {
                // Confirmed and forgotten, or overtaken.
                let last = floor == epoch || floor == epoch.saturating_add(1);
                let gone = core.book.get(net.key()).is_none() && floor > 0 && last;
                return Some(if gone {
                    Ok(())
                } else {
                    let (machine, asked) = (net.machine.clone(), epoch);
                    Err(NetError::StaleEpoch { machine, asked, current: floor })
                });
            };
            if record.epoch < epoch || record.edge == EdgeView::Unasked {
                let detail = "nothing was said with that epoch here";
                return Some(Err(NetError::failed(net, &operation, detail)));
            }
            match &record.edge {
                EdgeView::Confirmed => Some(Ok(())),
                EdgeView::Refused { error } => Some(Err(error.clone())),
                EdgeView::Held | EdgeView::Pending | EdgeView::Unasked => None,
            }
        };
        // A runner that was interrupted before it could say so says it now.
        self.drained(net.key(), epoch);
        let deadline = Instant::now() + limit;
        let core = self.wait(self.core(), deadline, |c| answer(c).is_some());
        answer(&core).unwrap_or_else(|| {
            let detail = format!(
                "no answer within {limit:?} ({}); frames are forwarded until it answers, so keep \
                 both hosts up",
                core.link()
            );
            Err(NetError::failed(net, operation, detail))
        })
    }

    pub(super) fn forget(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        let operation = "forget it";
        let fail = |e: KernelError| NetError::failed(net, operation, e);
        let _one_at_a_time = self.taps();
        let mut core = self.core();
        let floor = core.book.get(net.key()).map_or(0, Record::floor_after);
        let forgotten = core.book.forget(net, epoch)?;
        core.answers.remove(&net.key());
        core.note(net.key());
        match forgotten {
            Forgotten::Nothing => return Ok(()),
            Forgotten::Remove => {
                self.drop_files(net.key(), floor.max(epoch)).map_err(fail)?;
                self.host.unroute(net).map_err(fail)?;
            }
            Forgotten::KeepForwarding | Forgotten::RemoveAndRelease => {
                let record = core.book.get(net.key()).cloned();
                if let Some(record) = record {
                    self.machines.save(net.key(), &record).map_err(fail)?;
                    self.host.apply(&record).map_err(fail)?;
                }
            }
        }
        drop(core);
        self.changed.notify_all();
        tracing::info!(machine = net.machine, epoch, "machine forgotten");
        self.host.remove_tap(net).map_err(fail)
    }

    /// All edges that can be reached have answered about a machine.
    pub(super) fn edge_answered(
        &self,
        mut core: MutexGuard<'_, Core>,
        key: MachineKey,
        epoch: u64,
        answer: Result<(), NetError>,
    ) {
        let Some(record) = core.book.edge_answered(key, epoch, answer) else { return };
        core.note(key);
        let saved = if record.retiring {
            self.drop_files(key, record.floor_after()).and_then(|()| self.host.unroute(&record.net))
        } else {
            self.machines.note(key, record.clone());
            Ok(())
        };
        drop(core);
        self.changed.notify_all();
        self.machines.wake();
        if let EdgeView::Refused { error } = &record.edge {
            tracing::warn!(machine = record.net.machine, epoch, %error, "the edge refused");
        }
        if let Err(error) = saved {
            // The edge is asked again after a restart, and answers the same.
            tracing::warn!(machine = record.net.machine, %error, "the edge's answer was not saved");
        }
    }
}
