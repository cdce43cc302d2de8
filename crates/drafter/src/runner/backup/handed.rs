//! The history of a machine that moves: where the source's generations ended, and where the destination's
//! go on.
//!
//! What must hold: a destination that looks at less than everything has been told of every block in which
//! the store's newest generation differs from the machine as it left its source, and has seen every write
//! since. One that began as a generation differs from that in nothing but what was written since, and from
//! no other.

use super::{Backups, LOOK, Runner, lock};
use crate::{
    checkpoint::description, migrate::messages::BackupMark, runner::protected_move::Arrived,
};
use silo::{block::BlockSet, store::LineWriter};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::Arc,
    time::{Duration, Instant},
};

/// How long a generation that is being stored when the machine has left may take.
const STORED: Duration = Duration::from_secs(1);

impl Runner {
    /// The generation of which it is known how a machine that came here differs from it: its source has
    /// said so, or it began as that. Said once.
    pub(super) fn arrived_with(&self, backups: &Backups, writer: &LineWriter) -> Option<u64> {
        let (mark, changed, is_newest) = {
            let mut inner = self.lock();
            match inner.arrived.take()? {
                Arrived::Expected => return None,
                // Also one that the source stored and never heard of: what it has told is then more than
                // the truth.
                Arrived::Known(mark, changed) => {
                    let within = mark.number <= writer.newest();
                    (mark, changed, within)
                }
                // Of a later one nobody here knows how it differs.
                Arrived::Began(mark) => {
                    let none = inner.devices.iter().map(|device| BlockSet::new(device.blocks()));
                    let same = mark.number == writer.newest();
                    (mark, none.collect(), same)
                }
            }
        };
        let same = mark.line == writer.line().to_string()
            && mark.writer == hex(&writer.newest_by())
            && is_newest;
        if !same || writer.needs_everything() {
            tracing::info!("the history is not where the machine left it: all is compared");
            return None;
        }
        match backups.capture.know(&changed) {
            Ok(()) => Some(writer.newest()),
            Err(error) => {
                tracing::warn!(%error, "all of the machine is compared with its history");
                None
            }
        }
    }

    /// What the machine's last start from a store touched first, as text.
    pub(in crate::runner) fn first_touch_text(&self) -> BTreeMap<String, String> {
        let inner = self.lock();
        description::first_touch_text(&match &inner.filling {
            Some(filling) => filling.first_touches(),
            None => inner.first_touches.clone(),
        })
    }
}

/// As a writer is named in a [`BackupMark`].
pub(in crate::runner) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // It never fails for a string.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Ends the generations of a machine that stands still for good. Gives the last of them, and in which
/// blocks of each device of the group the machine differs from it; `None` if somebody works on them, or
/// there are none.
pub(in crate::runner) fn hand_on(backups: &Backups) -> Option<(BackupMark, Vec<BlockSet>)> {
    let _turn = backups.turn.try_lock().ok()?;
    // One that is being stored is worth waiting for: whoever goes on with it has lost less.
    let deadline = Instant::now() + STORED;
    while backups.continuous()?.engine.status().storing && Instant::now() < deadline {
        std::thread::park_timeout(LOOK);
    }
    let continuous = lock(&backups.continuous).take()?;
    let line = continuous.target.line.to_string();
    // What is still being stored is put back.
    let last = Arc::try_unwrap(continuous).ok()?.engine.stop().last?;
    let mark = BackupMark {
        line,
        number: last.number,
        writer: hex(&last.writer),
        first_touch: BTreeMap::new(),
    };
    match backups.capture.changed() {
        Ok(changed) => Some((mark, changed)),
        Err(error) => {
            tracing::warn!(%error, "the destination compares all with the history");
            None
        }
    }
}
