//! Stacks as a device group that is backed up: a round freezes all of them by a push, and what the
//! pushed layers hold is what changed.

use super::{
    Stack, View,
    freeze::{Held, written},
};
use crate::{
    block::{BlockRange, BlockSet},
    io::BlockDevice,
    store::capture::{Capture, CaptureError, Changes, DeviceInfo, Frozen, Want},
    times::{Histogram, Times},
};
use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

struct Member {
    name: String,
    stack: Arc<Stack>,
    /// Blocks below the top that no backup has; `None`: no backup has anything.
    debt: Mutex<Option<BlockSet>>,
}

impl Member {
    fn debt(&self) -> MutexGuard<'_, Option<BlockSet>> {
        self.debt.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Shared {
    members: Vec<Member>,
    /// Longest time that writers are held for one device.
    limit: Duration,
    frozen: AtomicBool,
    stop: Arc<AtomicBool>,
    merger: Mutex<Option<JoinHandle<()>>>,
    holds: Times,
}

/// Several stacks, frozen and backed up together. Layers that are backed up are merged down in the
/// background; dropping the group ends that.
pub struct StackGroup {
    shared: Arc<Shared>,
}

impl StackGroup {
    /// A group of stacks, with their names. `limit`: how long writers may be held at most before a
    /// round is given up; they are held only until the writes under way have ended.
    #[must_use]
    pub fn new(stacks: Vec<(String, Arc<Stack>)>, limit: Duration) -> Self {
        let member = |(name, stack): (String, Arc<Stack>)| {
            // What is in the top now is seen by the next round anyway.
            let debt = Mutex::new(stack.unsaved());
            Member { name, stack, debt }
        };
        let members = stacks.into_iter().map(member).collect();
        let (frozen, stop) = (AtomicBool::new(false), Arc::new(AtomicBool::new(false)));
        let merger = Mutex::new(None);
        let holds = Times::default();
        Self { shared: Arc::new(Shared { members, limit, frozen, stop, merger, holds }) }
    }
}

impl Drop for StackGroup {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let merger = self.shared.merger.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(merger) = merger {
            // A panic there was reported when it happened.
            let _ = merger.join();
        }
    }
}

impl Shared {
    /// Starts merging in the background, unless that goes on already.
    fn merge(&self) {
        let mut merger = self.merger.lock().unwrap_or_else(PoisonError::into_inner);
        if merger.as_ref().is_some_and(|running| !running.is_finished())
            || self.stop.load(Ordering::Relaxed)
        {
            return;
        }
        let stacks: Vec<_> = self.members.iter().map(|member| member.stack.clone()).collect();
        let stop = self.stop.clone();
        let work = move || {
            for stack in stacks {
                if let Err(error) = stack.merge(&stop) {
                    tracing::warn!(%error, stack = %stack.path().display(), "a layer was not merged");
                }
            }
        };
        match thread::Builder::new().name("silo-merge".to_owned()).spawn(work) {
            Ok(running) => *merger = Some(running),
            Err(error) => tracing::warn!(%error, "no thread to merge layers; the next round tries"),
        }
    }
}

impl Capture for StackGroup {
    fn devices(&self) -> Vec<DeviceInfo> {
        let info = |member: &Member| DeviceInfo {
            name: member.name.clone(),
            geometry: member.stack.geometry(),
        };
        self.shared.members.iter().map(info).collect()
    }

    fn changes(&self, group_shift: u32) -> Changes {
        let mut changes = Changes::default();
        for member in &self.shared.members {
            let set = match &*member.debt() {
                Some(debt) => {
                    let mut set = written(member.stack.content().top());
                    set.union_with(debt);
                    set
                }
                None => BlockSet::full(member.stack.geometry().blocks()),
            };
            changes.blocks += set.len();
            changes.fullest = changes.fullest.max(fullest(&set, group_shift.min(63)));
        }
        changes
    }

    fn freeze(&self, want: Want) -> Result<Box<dyn Frozen>, CaptureError> {
        let shared = &self.shared;
        if shared.frozen.swap(true, Ordering::AcqRel) {
            return Err(CaptureError::Frozen);
        }
        let views = freeze_all(shared).inspect_err(|_| {
            shared.frozen.store(false, Ordering::Release);
        })?;
        let held = views.iter().map(|(_, held)| *held).max().unwrap_or_default();
        shared.holds.add(held);
        let mut devices = Vec::new();
        for (member, (view, _)) in shared.members.iter().zip(views) {
            let mut debt = member.debt();
            if let Some(debt) = &mut *debt {
                debt.union_with(&view.changed());
            }
            let changed = match (&*debt, want) {
                (Some(debt), Want::Changed) => debt.clone(),
                _ => BlockSet::full(member.stack.geometry().blocks()),
            };
            devices.push(FrozenStack { view, changed });
        }
        Ok(Box::new(FrozenGroup { shared: shared.clone(), devices, held, stored: false }))
    }

    fn holds(&self) -> Histogram {
        self.shared.holds.read()
    }
}

/// All stacks hold their writers, then all go on: one instant.
fn freeze_all(shared: &Shared) -> Result<Vec<(View, Duration)>, CaptureError> {
    let error = |member: &Member, operation| {
        let device = member.name.clone();
        move |error: super::LayerError| CaptureError::Device {
            device,
            operation,
            source: error.into(),
        }
    };
    // What takes time comes before anybody is held.
    for member in &shared.members {
        member.stack.prepare().map_err(error(member, "make a layer for"))?;
    }
    let mut held: Vec<Held<'_>> = Vec::new();
    for member in &shared.members {
        held.push(member.stack.hold(shared.limit).map_err(error(member, "hold the writers of"))?);
    }
    Ok(held.into_iter().map(Held::swap).collect())
}

/// The most blocks of a set in one group of `1 << shift` neighbours.
pub(crate) fn fullest(set: &BlockSet, shift: u32) -> u64 {
    let (mut most, mut group, mut count) = (0, u64::MAX, 0);
    for range in set.ranges() {
        let mut at = range.start.0;
        while at < range.end() {
            let stop = (((at >> shift) + 1) << shift).min(range.end());
            if at >> shift != group {
                (group, count) = (at >> shift, 0);
            }
            count += stop - at;
            most = most.max(count);
            at = stop;
        }
    }
    most
}

struct FrozenStack {
    view: View,
    changed: BlockSet,
}

struct FrozenGroup {
    shared: Arc<Shared>,
    devices: Vec<FrozenStack>,
    held: Duration,
    stored: bool,
}

impl Frozen for FrozenGroup {
    fn changed(&self, device: usize) -> &BlockSet {
        &self.devices[device].changed
    }

    fn read(&self, device: usize, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        let frozen = &self.devices[device];
        let offset = self.shared.members[device].stack.geometry().offset(range.start);
        frozen.view.read_at(offset, buf)
    }

    fn held(&self) -> Duration {
        self.held
    }

    fn release(mut self: Box<Self>) {
        self.stored = true;
    }

    fn put_back(self: Box<Self>) {}
}

impl Drop for FrozenGroup {
    fn drop(&mut self) {
        if self.stored {
            for (member, frozen) in self.shared.members.iter().zip(&self.devices) {
                // What was written since is in the new top.
                *member.debt() = Some(BlockSet::new(member.stack.geometry().blocks()));
                if let Err(error) = member.stack.note_saved(frozen.view.top_id()) {
                    // After the next start everything is backed up once more.
                    tracing::warn!(%error, device = member.name, "cannot note what is backed up");
                }
            }
        }
        // The views go before the merge starts, which they would be in the way of.
        self.devices.clear();
        self.shared.frozen.store(false, Ordering::Release);
        self.shared.merge();
    }
}
