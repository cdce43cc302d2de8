//! Content of this runner's machine that is here without it, so that it need not be sent once more: what it
//! left when it moved away, what came of an arrival that came to nothing, or what this host's store has.
//!
//! What must hold: only content of which the source knows what has changed since is taken as it is; all
//! other is compared with what the source has, block by block ([`names`](crate::migrate::names)). It is
//! compared for nobody but the machine's owner: whoever names a block learns whether it is here.

use super::{
    Runner, State,
    bring::{Brought, bring},
    config::StoreAt,
    hosted::{self, Content},
};
use crate::{
    migrate::messages::{PrepareRequest, StayId},
    package::Package,
};
use silo::{block::BLOCK_SIZE, device::Device as _, disk::DiskStatus};
use std::time::Instant;

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
        let stored = request.stored_as.clone().filter(|_| may_compare);
        let (Some(stored), Some(from)) = (stored, self.bring_from()) else {
            return Ok(Found { content, compares: false });
        };
        let began = Instant::now();
        let tell = |done| {
            let detail = format!("from {}; {} MiB from the store", request.host, done >> 20);
            self.set_state(State::Receiving, detail);
        };
        let Brought { any, came } = bring(from, &stored, request, &content, &tell);
        let line = stored.line;
        // It only saves something: without it the machine comes as any other.
        match came {
            Ok(number) => {
                tracing::info!(line, number, took = ?began.elapsed(), "brought a generation");
            }
            Err(why) if any => {
                tracing::warn!(line, "not all of a generation was brought from the store: {why}");
            }
            Err(why) => tracing::warn!(line, "nothing was brought from the store: {why}"),
        }
        // (What is not as new must be compared, or it would stay where the source has nothing to send.)
        Ok(Found { content, compares: any })
    }

    /// Whether the lease names that host. No answer says nothing, and then nothing is compared.
    fn is_owner(&self, host: &str) -> bool {
        let record = self.store.read(&self.name);
        record.is_ok_and(|record| record.is_some_and(|record| record.owner.as_str() == host))
    }

    /// The store that content may be brought from.
    pub(super) fn bring_from(&self) -> Option<StoreAt> {
        let (brings, protects) = (&self.config.bring_from, &self.config.protect);
        let protects = || {
            let protect = protects.as_ref()?;
            Some(StoreAt { store: protect.store.clone(), keys: protect.keys.clone() })
        };
        brings.clone().or_else(protects)
    }
}
