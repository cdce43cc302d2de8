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
//! write there, that it is as in that very generation, which has that number and that writer, and which is of
//! this machine (the source names a history, this host has the keys to it); only what is missing is taken,
//! whoever brings it first; and a store that gives nothing costs nothing.

use super::{Runner, backup::hex, config::StoreAt, protected_move::Arrived, restore};
use crate::{
    checkpoint::{MEMORY, disk_device, fill::FillTarget},
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

    /// Opens the generation, which must be of `machine`: the source has named it, and the keys are this
    /// host's.
    fn open(&self, machine: &str) -> Result<Opened, String> {
        let BackupMark { line, number, writer, .. } = &self.mark;
        let history = restore::History::at(&self.from.store, line, self.from.keys.as_deref())?;
        let generation = history.open(Which::Number(*number))?;
        if hex(&generation.writer()) != *writer {
            return Err(format!("generation {number} is not the source's"));
        }
        let (saved, _) = restore::described(&generation)?;
        if saved.shape.name != machine {
            return Err(format!("it is of another machine, \"{}\"", saved.shape.name));
        }
        generation.pin_if_possible().map_err(text)?;
        let name = |device: &Arc<dyn Device>| match device.name().as_str() {
            MEMORY => MEMORY.to_owned(),
            disk => disk_device(disk),
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
            // Another move may have brought the machine here again meanwhile.
            let own = |kept: &mut Arc<Fallback>| Arc::ptr_eq(kept, &fallback);
            drop(runner.lock().fallback.take_if(own));
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
            match self.step(fallback, &mut opened) {
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

    fn step(&self, fallback: &Fallback, opened: &mut Option<Opened>) -> Result<bool, String> {
        let opened = match opened {
            Some(opened) => opened,
            None => opened.insert(fallback.open(&self.config.machine)?),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::description;
    use silo::{
        block::{BLOCK_SIZE, BlockIndex},
        device::DeviceName,
        disk::{Disk, DiskOptions},
        io::BlockDevice,
        source::MemoryDevice,
        store::{
            Access, CopyGroup, Environment, KeyRing, Limits, LineName, LineWriter, ScratchOptions,
            Store, WriterOptions,
            capture::{Capture, Want},
        },
    };
    use std::{fs, os::unix::fs::PermissionsExt, path::Path};

    const BLOCKS: u64 = 2000;
    const BYTES: u64 = BLOCKS * BLOCK_SIZE as u64;

    /// What block `at` held in the generation; every seventh is zeros.
    fn content(at: u64) -> Vec<u8> {
        vec![if at.is_multiple_of(7) { 0 } else { (at % 251) as u8 + 1 }; BLOCK_SIZE]
    }

    fn set(ranges: &[(u64, u64)]) -> BlockSet {
        let mut set = BlockSet::new(BLOCKS);
        ranges.iter().for_each(|(start, count)| set.insert_range(BlockRange::new(*start, *count)));
        set
    }

    /// Stores a generation with a disk "root"; where, and which that is.
    fn generation(folder: &Path) -> (StoreAt, BackupMark) {
        let device = Arc::new(MemoryDevice::new("root", BYTES).unwrap());
        for at in 0..BLOCKS {
            device.write_at(at * BLOCK_SIZE as u64, &content(at)).unwrap();
        }
        let saved = description::encode(&description::tests::description(), b"state").unwrap();
        let machine = Arc::new(MemoryDevice::new("machine", saved.len() as u64).unwrap());
        machine.write_at(0, &saved).unwrap();
        let parts = vec![
            ("disk-root".to_owned(), 4096, device as Arc<dyn BlockDevice>),
            ("machine".to_owned(), 4096, machine),
        ];
        let group = CopyGroup::new(parts, ScratchOptions::in_folder(folder)).unwrap();
        let keys = folder.join("keys");
        fs::write(&keys, KeyRing::generate_line("test").unwrap()).unwrap();
        fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
        let from = StoreAt {
            store: format!("file://{}/store", folder.display()),
            keys: Some(keys.clone()),
        };
        let url = from.store.parse().unwrap();
        let environment = Environment::of_process();
        let store = Store::open(&url, Access::Write, &environment, Limits::default()).unwrap();
        let line = LineName::new("machines", "m").unwrap();
        let keys = KeyRing::from_file(&keys).unwrap();
        let mut writer = LineWriter::open(store, &keys, &line, WriterOptions::default()).unwrap();
        let frozen = group.freeze(Want::Everything).unwrap();
        let never = AtomicBool::new(false);
        let stored = writer.store(&group.devices(), frozen.as_ref(), true, "", &never).unwrap();
        frozen.release();
        let mark = BackupMark {
            line: line.to_string(),
            number: stored.number,
            writer: hex(&stored.writer),
            first_touch: std::collections::BTreeMap::new(),
        };
        (from, mark)
    }

    #[test]
    fn what_has_not_changed_is_taken_from_that_very_generation_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let (from, mark) = generation(folder.path());
        let options = DiskOptions::new(DeviceName::new("root").unwrap());
        let disk = Disk::create(&folder.path().join("disk"), None, BYTES, &options).unwrap();
        let disk = Arc::new(disk);
        let devices: Vec<Arc<dyn Device>> = vec![disk.clone()];
        let demands = Demands::new(&devices, None);
        disk.begin().unwrap();
        // The first ten have come, with what was written since.
        let newest = [0xee; BLOCK_SIZE];
        (0..10).for_each(|at| disk.store(BlockIndex(at), &newest).unwrap());
        let missing = set(&[(10, BLOCKS - 10)]);
        let asked = Arc::clone(&demands);
        let demand = demands.of(crate::migrate::protocol::DeviceNumber(0));
        disk.arm(&missing, demand).unwrap();
        let changed = set(&[(0, 10), (100, 50), (BLOCKS - 1, 1)]);
        let fallback = |mark: &BackupMark| Fallback {
            from: from.clone(),
            mark: mark.clone(),
            changed: vec![changed.clone()],
            devices: devices.clone(),
            demands: Arc::clone(&demands),
            standing: Mutex::new(Standing::Idle),
        };

        // Another writer's generation of that number, or another number, gives nothing.
        let other = BackupMark { writer: "00".repeat(16), ..mark.clone() };
        let name = description::tests::description().shape.name;
        let why = fallback(&other).open(&name).err().unwrap();
        assert!(why.contains("is not the source's"), "{why}");
        let later = BackupMark { number: mark.number + 1, ..mark.clone() };
        assert!(fallback(&later).open(&name).is_err());
        // Nor does the history of another machine, to which this host has the keys, too.
        let why = fallback(&mark).open("another").err().unwrap();
        assert!(why.contains(&format!("of another machine, \"{name}\"")), "{why}");
        assert_eq!(disk.missing(), missing);

        let fallback = fallback(&mark);
        let opened = fallback.open(&name).unwrap();
        // What is waited for comes first and alone; nobody waits for long for what only the source has.
        asked.ask(crate::migrate::protocol::DeviceNumber(0), BlockRange::new(1500, 4));
        asked.ask(crate::migrate::protocol::DeviceNumber(0), BlockRange::new(120, 1));
        assert!(fallback.next_piece(&opened).unwrap());
        let mut left = missing.clone();
        left.remove_range(BlockRange::new(1500, 4));
        assert_eq!(disk.missing(), left);
        while fallback.next_piece(&opened).unwrap() {}
        let mut left = changed.clone();
        left.remove_range(BlockRange::new(0, 10));
        assert_eq!(disk.missing(), left, "only what has changed is missing");

        // It comes from the source after all.
        for range in left.ranges() {
            for at in range.start.0..range.end() {
                disk.fill(BlockIndex(at), &newest).unwrap();
            }
        }
        for at in 0..BLOCKS {
            let mut found = vec![0; BLOCK_SIZE];
            disk.read(BlockIndex(at), &mut found).unwrap();
            let expected =
                if changed.contains(BlockIndex(at)) { newest.to_vec() } else { content(at) };
            assert!(found == expected, "block {at}");
        }
    }
}
