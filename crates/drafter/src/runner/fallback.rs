//! Blocks that a machine which has arrived still lacks, and whose source is not reached: what has not changed
//! since the last generation that the source stored is in the store, too.
//!
//! ```text
//!   source ─Changed, History─▶ which generation, and where the machine differed from it when it left
//!   source is not reached ──▶ missing, and not changed since ──▶ what is waited for first, then the rest
//!                            missing, and changed since ──▶ only the source has it: waits
//! ```
//!
//! What must hold: a block is taken from the store only if the source has said, after the machine's last
//! write there, that it is as in that very generation, which has that number and that writer; only what is
//! missing is taken, whoever brings it first; and a store that gives nothing costs nothing.

use super::{Runner, backup::hex, config::StoreAt, protected_move::Arrived, restore};
use crate::{
    checkpoint::{MEMORY, fill::FillTarget},
    migrate::{
        destination::{Demands, HistoryTold},
        messages::BackupMark,
    },
};
use silo::{
    block::{BlockRange, BlockSet},
    device::Device,
    store::{Generation, RestoreOptions, Which},
};
use std::{
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
    time::{Duration, Instant},
};

/// How long the source may be out of reach before the store is asked.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is looked.
const LOOK: Duration = Duration::from_millis(50);
/// Pause after a store that gave nothing.
const AGAIN: Duration = Duration::from_secs(2);
/// For as long a machine whose source is lost is not given up because blocks are missing.
const WORKS: Duration = Duration::from_secs(30);
/// Blocks that are brought at a time; in between it is looked what is waited for.
const PIECE: u64 = 16_384;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// How far it is.
#[derive(Clone, Debug)]
enum Standing {
    /// The source is there.
    Idle,
    /// The store is being read, since then.
    Brings(Instant),
    /// The store has nothing more of what is missing.
    Done,
    /// Why the store gave nothing.
    Trouble(String),
}

/// See the module.
pub(super) struct Fallback {
    from: StoreAt,
    mark: BackupMark,
    /// What only the source has, of each device of the group.
    changed: Vec<BlockSet>,
    devices: Vec<Arc<dyn Device>>,
    demands: Arc<Demands>,
    standing: Mutex<Standing>,
}

/// An open generation, and what its devices are called that are ours.
struct Opened {
    generation: Arc<Generation>,
    names: Vec<String>,
    data: Vec<BlockSet>,
}

impl Fallback {
    fn standing(&self) -> Standing {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, standing: Standing) {
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner) = standing;
    }

    /// Whether it may still bring all of it.
    pub(super) fn works(&self) -> bool {
        matches!(self.standing(), Standing::Brings(since) if since.elapsed() < WORKS)
    }

    /// What people are told of it while blocks are missing.
    pub(super) fn words(&self) -> Option<String> {
        let line = &self.mark.line;
        match self.standing() {
            Standing::Idle => None,
            Standing::Brings(_) => Some(format!("what {line} has of them is being brought")),
            Standing::Done => Some(format!("{line} gave the others, only the source has these")),
            Standing::Trouble(why) => Some(format!("{line} gives none of them: {why}")),
        }
    }

    /// What the store has of what is missing.
    fn lacking(&self) -> Vec<BlockSet> {
        let lacking = self.devices.iter().zip(&self.changed).map(|(device, changed)| {
            let mut lacking = device.missing();
            lacking.subtract(changed);
            lacking
        });
        lacking.collect()
    }

    fn open(&self) -> Result<Opened, String> {
        let BackupMark { line, number, writer, .. } = &self.mark;
        let history = restore::History::at(&self.from.store, line, self.from.keys.as_deref())?;
        let generation = history.open(Which::Number(*number))?;
        if hex(&generation.writer()) != *writer {
            return Err(format!("generation {number} is not the source's"));
        }
        generation.pin_if_possible().map_err(text)?;
        let (saved, _) = restore::described(&generation)?;
        let name = |device: &Arc<dyn Device>| match device.name().as_str() {
            MEMORY => MEMORY.to_owned(),
            disk => saved.disk_device(disk),
        };
        let names: Vec<String> = self.devices.iter().map(name).collect();
        let mut data = Vec::new();
        for (name, device) in names.iter().zip(&self.devices) {
            let blocks = generation.data_blocks(name).map_err(text)?;
            if blocks.device_blocks() != device.blocks() {
                return Err(format!("its device \"{name}\" has another size than the machine's"));
            }
            data.push(blocks);
        }
        Ok(Opened { generation, names, data })
    }

    /// Puts these blocks in place, which are among what the store has.
    fn bring(&self, opened: &Opened, at: usize, only: &BlockSet) -> Result<(), String> {
        let device = &self.devices[at];
        let mut zeros = only.clone();
        zeros.subtract(&opened.data[at]);
        for range in zeros.ranges() {
            device.fill_zero(range).map_err(text)?;
        }
        let target = FillTarget(Arc::clone(device));
        let options = RestoreOptions { target_is_zero: true, ..RestoreOptions::default() };
        let (name, never) = (&opened.names[at], AtomicBool::new(false));
        opened.generation.restore_some(name, only, &target, options, &never).map_err(text)
    }

    /// Brings the next piece: what is waited for, if anything is. False if the store has no more.
    fn next_piece(&self, opened: &Opened) -> Result<bool, String> {
        let lacking = self.lacking();
        for (at, lacking) in lacking.iter().enumerate() {
            let mut waited = self.demands.waited_for(at);
            waited.intersect_with(lacking);
            if !waited.is_empty() {
                return self.bring(opened, at, &waited).map(|()| true);
            }
        }
        let Some(at) = lacking.iter().position(|lacking| !lacking.is_empty()) else {
            return Ok(false);
        };
        let (mut piece, mut left) = (BlockSet::new(lacking[at].device_blocks()), PIECE);
        for range in lacking[at].ranges() {
            let count = range.count.min(left);
            if count == 0 {
                break;
            }
            piece.insert_range(BlockRange::new(range.start.0, count));
            left -= count;
        }
        self.bring(opened, at, &piece).map(|()| true)
    }
}

impl Runner {
    /// What the source of a machine that arrived told of its history, or that it told nothing.
    pub(super) fn history_told(self: &Arc<Self>, told: Option<HistoryTold>) {
        let known = told.and_then(|told| {
            let mark: BackupMark = serde_json::from_slice(&told.mark).ok()?;
            Some((mark, told))
        });
        if let Some((mark, told)) = &known {
            self.fall_back(mark, told);
        }
        let mut inner = self.lock();
        if inner.arrived.is_none() {
            return;
        }
        if let Some((mark, _)) = &known {
            inner.first_touches =
                crate::checkpoint::description::first_touches_of(&mark.first_touch);
        }
        inner.arrived = known.map(|(mark, told)| Arrived::Known(mark, told.changed));
    }

    /// From now on the store stands in for the source where it can.
    fn fall_back(self: &Arc<Self>, mark: &BackupMark, told: &HistoryTold) {
        let devices = self.lock().devices.clone();
        let Some(from) = self.bring_from().filter(|_| devices.len() == told.changed.len()) else {
            return;
        };
        if devices.iter().all(|device| device.missing_blocks() == 0) {
            return;
        }
        let fallback = Arc::new(Fallback {
            from,
            mark: mark.clone(),
            changed: told.changed.clone(),
            devices,
            demands: Arc::clone(&told.demands),
            standing: Mutex::new(Standing::Idle),
        });
        self.lock().fallback = Some(Arc::clone(&fallback));
        let runner = Arc::clone(self);
        let begun = std::thread::Builder::new().name("fallback".into()).spawn(move || {
            runner.stand_in_for_source(&fallback);
            if let Standing::Brings(since) = fallback.standing() {
                tracing::info!(took = ?since.elapsed(), "the store has given the rest of it");
            }
            runner.lock().fallback = None;
        });
        if let Err(error) = begun {
            tracing::error!(%error, "no thread to bring blocks from the store");
        }
    }

    /// Until all of the machine is here, or it is not here any more.
    fn stand_in_for_source(&self, fallback: &Fallback) {
        let (mut opened, mut not_before) = (None, Instant::now());
        while self.still_has(&fallback.devices)
            && fallback.devices.iter().any(|device| device.missing_blocks() > 0)
        {
            let away = self.source_away().is_some_and(|since| since >= PATIENCE);
            if !away {
                fallback.set(Standing::Idle);
            }
            if !away || Instant::now() < not_before {
                std::thread::park_timeout(LOOK);
                continue;
            }
            if !matches!(fallback.standing(), Standing::Brings(_) | Standing::Done) {
                fallback.set(Standing::Brings(Instant::now()));
            }
            match Self::step(fallback, &mut opened) {
                Ok(true) => {}
                Ok(false) => {
                    if let Standing::Brings(since) = fallback.standing() {
                        tracing::info!(took = ?since.elapsed(), "the store has no more of it");
                        fallback.set(Standing::Done);
                    }
                    std::thread::park_timeout(LOOK);
                }
                Err(why) => {
                    tracing::warn!(why, "the store does not stand in for the source");
                    fallback.set(Standing::Trouble(why));
                    not_before = Instant::now() + AGAIN;
                }
            }
        }
    }

    fn step(fallback: &Fallback, opened: &mut Option<Opened>) -> Result<bool, String> {
        let opened = match opened {
            Some(opened) => opened,
            None => opened.insert(fallback.open()?),
        };
        fallback.next_piece(opened)
    }

    /// Whether these are the devices of the machine that is here.
    fn still_has(&self, devices: &[Arc<dyn Device>]) -> bool {
        let inner = self.lock();
        let same = inner.devices.iter().zip(devices).all(|(a, b)| Arc::ptr_eq(a, b));
        same && inner.devices.len() == devices.len() && !inner.state.over()
    }

    /// For how long the source of what is missing has not been reached.
    fn source_away(&self) -> Option<Duration> {
        let (since, _) = self.lock().doors.last()?.outage()?;
        Some(since)
    }
}
