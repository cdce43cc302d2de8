//! Content of this runner's machine that is here without it, so that it need not be sent once more: what it
//! left when it moved away, what came of an arrival that came to nothing, or what this host's store has.
//!
//! What must hold: only content of which the source knows what has changed since is taken as it is; all
//! other is compared with what the source has, block by block ([`names`](crate::migrate::names)). It is
//! compared for nobody but the machine's owner: whoever names a block learns whether it is here.

use super::{
    Runner, State,
    hosted::{self, Content},
    restore::{History, described, restore_device},
};
use crate::{
    checkpoint::{
        MEMORY,
        restore::{DiskTarget, MemoryTarget},
    },
    migrate::messages::{PrepareRequest, StayId},
    package::Package,
};
use silo::{
    block::BLOCK_SIZE, device::Device as _, disk::DiskStatus, io::BlockDevice, store::Which,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// How long it is brought from a store what may still be the same, while the source waits for the verdict.
const BRING_LIMIT: Duration = Duration::from_secs(40);
/// How often it is told how far this is.
const TELL: Duration = Duration::from_millis(500);

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// See the module.
pub(super) struct Stay {
    /// What it is, if it is what the machine left here, untouched.
    pub(super) id: Option<StayId>,
    content: Content,
    package: String,
}

impl Stay {
    pub(super) fn bytes(&self) -> u64 {
        self.content.memory.resident_bytes()
    }

    /// The machine that comes has memory and disks like these.
    fn fits(&self, request: &PrepareRequest) -> bool {
        self.package == request.package
            && self.content.memory.blocks() * BLOCK_SIZE as u64 == request.shape.memory_bytes
    }
}

/// Content for a machine that arrives.
pub(super) struct Found {
    pub(super) content: Content,
    /// It may be the machine's, in part.
    pub(super) compares: bool,
}

impl Runner {
    /// Keeps content of a machine that is not here any more, within the limit.
    pub(super) fn keep_stay(&self, content: &Content, package: &Package, id: Option<StayId>) {
        // A copy's memory was its monitor's, in part; what an arrival was armed with may have run.
        let armed = content.disks.iter().any(|disk| disk.status() == DiskStatus::Armed);
        let keep = !content.memory.is_copy()
            && !armed
            && content.devices().iter().all(|device| device.missing_blocks() == 0)
            && content.memory.resident_bytes() <= self.config.keep_stay_bytes
            && self.config.listen.is_some();
        let package = package.id().to_string();
        let stay = keep.then(|| Stay { id, content: content.clone(), package });
        self.lock().stay = stay;
    }

    /// Whether it has exactly what the machine left here then.
    pub(super) fn holds_stay(&self, request: &PrepareRequest) -> bool {
        let inner = self.lock();
        inner.stay.as_ref().is_some_and(|stay| {
            request.since.is_some() && stay.id == request.since && stay.fits(request)
        })
    }

    /// Memory and disks for a machine that arrives: what is here of it, or else new ones, with what this
    /// host's store has.
    pub(super) fn content_for(
        &self,
        request: &PrepareRequest,
        package: &Package,
        holds_stay: bool,
    ) -> Result<Found, String> {
        let may_compare = !holds_stay && request.names && self.is_owner(&request.host);
        let stay = self.lock().stay.take();
        let stay = stay.filter(|stay| holds_stay || (may_compare && stay.fits(request)));
        if let Some(stay) = stay {
            return Ok(Found { content: stay.content, compares: !holds_stay });
        }
        let disks = self.site().disks;
        let content = hosted::new_content(&request.shape, package, &disks, false).map_err(text)?;
        let mut compares = false;
        if let Some(line) = request.stored_as.as_deref().filter(|_| may_compare) {
            // It only saves something: without it the machine comes as any other.
            match self.bring(request, line, &content) {
                Ok(()) => compares = true,
                Err(why) => {
                    tracing::warn!(line, "nothing was brought from this host's store: {why}");
                }
            }
        }
        Ok(Found { content, compares })
    }

    /// Whether the lease names that host. No answer says nothing, and then nothing is compared.
    fn is_owner(&self, host: &str) -> bool {
        let record = self.store.read(&self.name);
        record.is_ok_and(|record| record.is_some_and(|record| record.owner.as_str() == host))
    }

    /// Brings the newest generation of a history into new memory and disks, as far as it comes in time.
    fn bring(&self, request: &PrepareRequest, line: &str, content: &Content) -> Result<(), String> {
        let (store, keys) = match (&self.config.bring_from, &self.config.protect) {
            (Some(from), _) => (&from.store, from.keys.as_deref()),
            (None, Some(protect)) => (&protect.store, protect.keys.as_deref()),
            (None, None) => return Err("this runner was given none (--store)".into()),
        };
        let (began, deadline) = (Instant::now(), Instant::now() + BRING_LIMIT);
        let generation = History::at(store, line, keys)?.open(Which::Newest)?;
        let (saved, _) = described(&generation)?;
        let fits = saved.package == request.package
            && saved.shape.name == request.shape.name
            && saved.shape.memory_bytes == request.shape.memory_bytes;
        if !fits {
            return Err(format!(
                "generation {} of {line} is of another machine, package or size",
                generation.number()
            ));
        }
        generation.pin_if_possible().map_err(text)?;
        let mut targets: Vec<(String, Box<dyn BlockDevice>)> = Vec::new();
        for disk in &content.disks {
            let name = saved.disk_device(disk.name().as_str());
            targets.push((name, Box::new(DiskTarget(Arc::clone(disk)))));
        }
        targets.push((MEMORY.to_owned(), Box::new(MemoryTarget(Arc::clone(&content.memory)))));
        let mut told = Instant::now();
        for (name, target) in &targets {
            let size = target.size();
            restore_device(&generation, name, &**target, &mut |done| {
                if told.elapsed() >= TELL {
                    told = Instant::now();
                    let from = &request.host;
                    let (done, size) = (done >> 20, size >> 20);
                    let detail =
                        format!("from {from}; {name}: {done} of {size} MiB from the store");
                    self.set_state(State::Receiving, detail);
                }
                Instant::now() < deadline
            })?;
            if Instant::now() >= deadline {
                break;
            }
        }
        let whole = Instant::now() < deadline;
        tracing::info!(line, number = generation.number(), whole, took = ?began.elapsed(),
            "brought from the store what may still be the same");
        Ok(())
    }
}
