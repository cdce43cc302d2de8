//! Readers and writers of volumes whose blocks are still coming.

use super::Shared;
use crate::{
    lane::lock,
    volume::{Hub, Turn},
};
use silo_block::{
    block::BlockRange,
    model::Replica,
    order::Class,
    session::{
        destination::{Access, Event, WaiterId},
        messages::DeviceIndex,
    },
};
use std::{
    io,
    sync::{Arc, Condvar, Mutex, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

/// Where one access waits.
#[derive(Default)]
pub(super) struct Parker {
    answer: Mutex<Option<Result<(), String>>>,
    answered: Condvar,
}

impl Parker {
    fn answer(&self, answer: Result<(), String>) {
        *lock(&self.answer) = Some(answer);
        self.answered.notify_all();
    }

    /// Waits. The session's own deadline comes first; this one is for a session that has died.
    fn wait(&self, limit: Duration) -> Result<(), String> {
        let answer = lock(&self.answer);
        let (mut answer, _) = self
            .answered
            .wait_timeout_while(answer, limit, |answer| answer.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        answer.take().unwrap_or_else(|| Err(format!("waited {limit:?} for a block, in vain")))
    }
}

impl Shared {
    pub(super) fn wake(&self, waiters: &[WaiterId], answer: &Result<(), String>) {
        let mut all = lock(&self.waiters);
        let parkers: Vec<Arc<Parker>> = waiters.iter().filter_map(|id| all.remove(id)).collect();
        drop(all);
        parkers.iter().for_each(|parker| parker.answer(answer.clone()));
    }

    fn not_had(&self, device: u16, range: BlockRange, why: &str) -> io::Error {
        let (name, last) =
            (self.volumes[usize::from(device)].name(), range.end().saturating_sub(1));
        let (first, count) = (range.start.0, range.count);
        io::Error::other(format!(
            "device \"{name}\": {count} blocks, {first} to {last}, are not here: {why}"
        ))
    }

    /// Asks until there is an answer.
    fn access(
        &self,
        (device, range): (u16, BlockRange),
        mut ask: impl FnMut(
            &mut silo_block::session::destination::Destination,
            Duration,
            WaiterId,
        ) -> Access,
    ) -> Turn {
        let begin = Instant::now();
        let mut waited = false;
        let limit = self.options.session.patience.answer * 2;
        loop {
            let id = WaiterId(self.next_waiter.fetch_add(1, Ordering::Relaxed));
            let parker = Arc::new(Parker::default());
            // Before the machine knows it: the answer may come at once.
            lock(&self.waiters).insert(id, parker.clone());
            let answer = self.with_machine(None, |machine, now| ask(machine, now, id)).0;
            let turn = match answer {
                Some(Access::Wait) => match parker.wait(limit) {
                    Ok(()) => {
                        waited = true;
                        continue;
                    }
                    Err(text) => Turn::Fail(self.not_had(device, range, &text)),
                },
                Some(Access::Go(range)) => Turn::Go(range),
                Some(Access::Refused(reason)) => {
                    Turn::Fail(self.not_had(device, range, &self.describe(&reason)))
                }
                // The session is over, and the volume has what there is.
                None => Turn::Go(BlockRange::new(0, 0)),
            };
            lock(&self.waiters).remove(&id);
            if waited {
                self.waits.add(begin.elapsed());
            }
            return turn;
        }
    }
}

impl Hub for Shared {
    fn read(&self, device: u16, range: BlockRange) -> Turn {
        self.urge_fetches(device, range);
        self.access((device, range), |machine, now, id| {
            machine.read(now, DeviceIndex(device), range, id)
        })
    }

    fn write(&self, device: u16, offset: u64, length: u64) -> Turn {
        let range = self.volumes[usize::from(device)].geometry().touched(offset, length);
        self.access((device, range), |machine, now, id| {
            machine.write(now, DeviceIndex(device), offset, length, id)
        })
    }

    fn wrote(&self, device: u16, range: BlockRange, well: bool) {
        self.with_machine(None, |machine, now| {
            machine.wrote(now, DeviceIndex(device), range, well);
        });
    }

    fn want(&self, device: u16, range: BlockRange, class: Class) {
        self.tell(Event::Want(DeviceIndex(device), range, class));
    }

    fn note(&self, device: u16) -> io::Result<()> {
        let late = self.note_all()?;
        match late.iter().find(|late| late.device == device) {
            Some(late) => Err(io::Error::new(io::ErrorKind::TimedOut, late.text.clone())),
            None => Ok(()),
        }
    }

    fn with_replica(&self, device: u16, look: &mut dyn FnMut(&mut Replica)) {
        let mut core = lock(&self.core);
        let found =
            core.machine.as_mut().and_then(|machine| machine.replica_mut(DeviceIndex(device)));
        if let Some(replica) = found {
            look(replica);
            return;
        }
        drop(core);
        // The session has just ended: the volume has it, or will have it at once.
        self.volumes[usize::from(device)].with_own_replica(look);
    }
}
