//! What must survive the death of a process: who owns the devices, and what is here of them.
//!
//! A note is small next to its device (runs of blocks of one epoch), and replaces the one before as
//! a whole. What must hold: after [`Ledger::save`] returned, [`Ledger::load`] gives that note or a
//! later one, whatever was torn; a note never says that a block is here that was not made durable
//! before; nobody's note makes this host the owner again once authority leaves, but that of the
//! session by which it leaves ([`Standing::may_follow`]).

use crate::wire::{Put, Take, WireError};
use silo_block::{
    block::{BlockIndex, BlockRange},
    device::DeviceName,
    geometry::Geometry,
    model::{History, Owner, Record, Replica},
    rounds::Epoch,
    session::messages::{BlockHash, MAX_DEVICES, MAX_TERMS, SessionId, Term},
};
use std::{
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};
use twox_hash::XxHash3_64;

const MAGIC: [u8; 8] = *b"silonote";
/// Version 1 had no promises, and is read.
const VERSION: u32 = 2;
/// How long a save waits for one of somebody else to end, and how often it looks: the kernel's file
/// locks know no deadline.
const OTHERS: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(2);
/// Bytes of a note that are enough to know where its host stands.
const START: u64 = 64;

/// Where this host stands towards a group of devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It owns them.
    Here,
    /// They are coming, and are not this host's.
    Receiving {
        /// By this session.
        session: SessionId,
    },
    /// It owns them by the token of this session; some blocks may still be coming.
    Owner {
        /// The session.
        session: SessionId,
        /// The try.
        attempt: u32,
    },
    /// Authority leaves, or has left: nobody may run here unless the other end has refused, or a
    /// lease proves that it never will.
    Leaving {
        /// By this session.
        session: SessionId,
        /// The try.
        attempt: u32,
    },
    /// Another host has them, and needs this one no more.
    Away {
        /// By this session.
        session: SessionId,
    },
}

impl Standing {
    /// Whether a note that says this may replace one that says `before`. Once authority leaves,
    /// only the session by which it leaves can say that it came back, or is gone for good; devices
    /// that left come back by a new session, whose first note is [`Standing::Receiving`]. A session
    /// by which they came once, and that goes on saying so, would make two owners of one.
    #[must_use]
    pub fn may_follow(&self, before: &Self) -> bool {
        use Standing::{Away, Here, Leaving, Owner, Receiving};
        match (before, self) {
            (
                Leaving { session: before, .. },
                Leaving { session: now, .. } | Away { session: now },
            )
            | (Away { session: before }, Away { session: now })
            | (
                Receiving { session: before } | Owner { session: before, .. },
                Owner { session: now, .. },
            )
            // Who owns them gives them away before they come again; a token may be refused.
            | (Owner { session: before, .. }, Receiving { session: now }) => before == now,
            // Of the last: authority is noted to leave before it has left.
            (Leaving { .. }, Owner { .. })
            | (Away { .. }, Here | Owner { .. } | Leaving { .. })
            | (Here | Receiving { .. } | Owner { .. }, Away { .. }) => false,
            _ => true,
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here => write!(f, "the devices are here"),
            Self::Receiving { session } => write!(f, "the devices are coming by session {session}"),
            Self::Owner { session, .. } => write!(f, "the devices came by session {session}"),
            Self::Leaving { session, .. } => write!(f, "the devices leave by session {session}"),
            Self::Away { session } => write!(f, "the devices left by session {session}"),
        }
    }
}

/// A device in a note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceNote {
    /// Its name.
    pub name: DeviceName,
    /// Size and blocks.
    pub geometry: Geometry,
    /// What is known of its blocks.
    pub record: Record,
    /// Absent blocks that a store has, once the source may have gone on the strength of that.
    pub promised: Vec<(BlockIndex, BlockHash)>,
}

/// Everything that is noted of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Where this host stands.
    pub standing: Standing,
    /// The devices, in the order of the group.
    pub devices: Vec<DeviceNote>,
}

/// Keeps the note of one group.
pub trait Ledger: Send + Sync {
    /// Replaces the note. Durable when this returns.
    ///
    /// # Errors
    /// If it could not be made durable; then the old note or the new one is there. If it may not
    /// follow the old one ([`Standing::may_follow`]); then that is there.
    fn save(&self, note: &Note) -> io::Result<()>;

    /// The note, if there is one.
    ///
    /// # Errors
    /// If it cannot be read, or is not a note.
    fn load(&self) -> io::Result<Option<Note>>;
}

impl DeviceNote {
    /// What a replica knows now.
    #[must_use]
    pub fn of(name: DeviceName, replica: &Replica) -> Self {
        let (geometry, record) = (replica.geometry(), replica.record());
        Self { name, geometry, record, promised: Vec::new() }
    }

    /// The replica that goes on from this note.
    ///
    /// # Errors
    /// If its rounds are used up.
    pub fn replica(&self) -> io::Result<Replica> {
        Replica::restored(self.geometry, &self.record)
            .map_err(|error| io::Error::other(error.to_string()))
    }
}

impl Note {
    /// As bytes, with a check at the end.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut put = Put::default();
        put.raw(&MAGIC);
        put.u32(VERSION);
        match &self.standing {
            Standing::Here => put.u8(0),
            Standing::Receiving { session } => {
                put.u8(1);
                put.raw(&session.0);
            }
            Standing::Owner { session, attempt } => {
                put.u8(2);
                put.raw(&session.0);
                put.u32(*attempt);
            }
            Standing::Leaving { session, attempt } => {
                put.u8(3);
                put.raw(&session.0);
                put.u32(*attempt);
            }
            Standing::Away { session } => {
                put.u8(4);
                put.raw(&session.0);
            }
        }
        put.list(&self.devices, put_device);
        let check = XxHash3_64::oneshot(&put.0);
        put.u64(check);
        put.0
    }

    /// Reads what [`Note::encode`] made.
    ///
    /// # Errors
    /// Anything else.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let invalid = |text: &str| WireError::Invalid(text.to_owned());
        let (body, check) =
            bytes.split_last_chunk::<8>().ok_or_else(|| invalid("a note that is cut short"))?;
        if XxHash3_64::oneshot(body) != u64::from_le_bytes(*check) {
            return Err(WireError::Damaged);
        }
        let mut take = Take(body);
        let (version, standing) = take_head(&mut take)?;
        let devices = take.list(MAX_DEVICES, 29, |take| take_device(take, version))?;
        take.end()?;
        Ok(Self { standing, devices })
    }
}

/// The beginning of a note, up to what it says of the group as a whole.
fn take_head(take: &mut Take<'_>) -> Result<(u32, Standing), WireError> {
    if take.raw(MAGIC.len())? != MAGIC {
        return Err(WireError::Invalid("a file that is no note".to_owned()));
    }
    let version = take.u32()?;
    if !(1..=VERSION).contains(&version) {
        let text = format!("a note of version {version}; this release reads up to {VERSION}");
        return Err(WireError::Invalid(text));
    }
    let standing = match take.u8()? {
        0 => Standing::Here,
        1 => Standing::Receiving { session: SessionId(take.id()?) },
        2 => Standing::Owner { session: SessionId(take.id()?), attempt: take.u32()? },
        3 => Standing::Leaving { session: SessionId(take.id()?), attempt: take.u32()? },
        4 => Standing::Away { session: SessionId(take.id()?) },
        other => return Err(WireError::Invalid(format!("standing {other}"))),
    };
    Ok((version, standing))
}

fn put_device(put: &mut Put, device: &DeviceNote) {
    put.text(device.name.as_str(), 64);
    put.u64(device.geometry.bytes());
    put.u32(device.geometry.block() as u32);
    let record = &device.record;
    put.u8(u8::from(record.owner == Owner::Here));
    put.list(record.history.terms(), |put, term| {
        put.raw(&term.id.0);
        put.u32(term.first.0);
    });
    put.u32(record.clock.0);
    put.u32(record.open.0);
    put.list(&record.epochs, |put, (range, epoch)| {
        put_range(put, *range);
        put.u32(epoch.0);
    });
    put.list(&record.absent, |put, range| put_range(put, *range));
    put.list(&device.promised, |put, (block, hash)| {
        put.u32(block.0 as u32);
        put.raw(&hash.0);
    });
}

fn put_range(put: &mut Put, range: BlockRange) {
    put.u32(range.start.0 as u32);
    put.u32(range.count as u32);
}

fn take_device(take: &mut Take<'_>, version: u32) -> Result<DeviceNote, WireError> {
    let invalid = |text: String| WireError::Invalid(text);
    let name = DeviceName::new(&take.text(64)?);
    let name = name.ok_or_else(|| invalid("a device with an invalid name".to_owned()))?;
    let (bytes, block) = (take.u64()?, take.u32()?);
    let geometry = Geometry::new(bytes, block).map_err(|error| invalid(error.to_string()))?;
    let owner = if take.flag()? { Owner::Here } else { Owner::Elsewhere };
    let terms = take.list(MAX_TERMS, 20, |take| {
        Ok(Term { id: SessionId(take.id()?), first: Epoch(take.u32()?) })
    })?;
    let history = History::new(terms);
    let history = history.ok_or_else(|| invalid("a history that makes no sense".to_owned()))?;
    let (clock, open) = (Epoch(take.u32()?), Epoch(take.u32()?));
    let blocks = geometry.blocks();
    let range = |take: &mut Take<'_>| -> Result<BlockRange, WireError> {
        let range = BlockRange::new(u64::from(take.u32()?), u64::from(take.u32()?));
        if range.count == 0 || range.end() > blocks {
            return Err(WireError::Invalid(format!("{range:?} of {blocks} blocks")));
        }
        Ok(range)
    };
    let epochs = take.list(blocks as usize, 12, |take| Ok((range(take)?, Epoch(take.u32()?))))?;
    let absent = take.list(blocks as usize, 8, range)?;
    let promised = if version < 2 {
        Vec::new()
    } else {
        take.list(blocks as usize, 36, |take| {
            let block = BlockIndex(u64::from(take.u32()?));
            if block.0 >= blocks {
                return Err(WireError::Invalid(format!("a promise of {block:?} of {blocks}")));
            }
            Ok((block, BlockHash(take.hash()?)))
        })?
    };
    let record = Record { owner, history, clock, open, epochs, absent };
    Ok(DeviceNote { name, geometry, record, promised })
}

/// For fuzzing: a note, with a right check so that the rest is reached.
pub fn fuzz_note(bytes: &[u8]) {
    let mut whole = bytes.to_vec();
    whole.extend_from_slice(&XxHash3_64::oneshot(bytes).to_le_bytes());
    if whole.len() < 1 << 20
        && let Ok(note) = Note::decode(&whole)
    {
        assert!(Note::decode(&note.encode()).is_ok_and(|again| again == note));
    }
}

/// A note in a file, replaced as a whole. One process at a time.
#[derive(Debug)]
pub struct FileLedger {
    path: PathBuf,
    /// One save at a time, or two would write the same temporary file.
    saving: Mutex<()>,
}

impl FileLedger {
    /// The folder must exist.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, saving: Mutex::new(()) }
    }

    /// What the file says now, without the devices: whoever wrote it may have used another
    /// [`FileLedger`] for it.
    fn standing(&self) -> io::Result<Option<Standing>> {
        let mut start = Vec::with_capacity(START as usize);
        match File::open(&self.path) {
            Ok(file) => file.take(START).read_to_end(&mut start)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let head = take_head(&mut Take(&start));
        head.map(|(_, standing)| Some(standing)).map_err(|error| self.unreadable(&error))
    }

    fn unreadable(&self, error: &WireError) -> io::Error {
        let text = format!("the note {} cannot be read: {error}", self.path.display());
        io::Error::new(io::ErrorKind::InvalidData, text)
    }

    /// The file that is to replace the note, locked. A save of somebody else that has not ended has it
    /// locked, and would otherwise replace what comes after it.
    fn fresh(&self) -> io::Result<(PathBuf, File)> {
        let path = self.path.with_extension("new");
        let hangs = || {
            let text = format!(
                "an earlier save of the note {} has not ended; its disk does not answer",
                self.path.display()
            );
            io::Error::new(io::ErrorKind::TimedOut, text)
        };
        let deadline = Instant::now() + OTHERS;
        loop {
            let mut options = fs::OpenOptions::new();
            let options = options.write(true).create(true).truncate(false).mode(0o600);
            let file = options.open(&path)?;
            match file.try_lock() {
                // Whoever had it may have made it the note before it was locked here.
                Ok(()) => match fs::metadata(&path) {
                    Ok(there) if there.ino() == file.metadata()?.ino() => return Ok((path, file)),
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                },
                Err(fs::TryLockError::WouldBlock) => thread::sleep(LOOK),
                Err(fs::TryLockError::Error(error)) => return Err(error),
            }
            if Instant::now() >= deadline {
                return Err(hangs());
            }
        }
    }

    fn folder(&self) -> &Path {
        self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }
}

impl Ledger for FileLedger {
    fn save(&self, note: &Note) -> io::Result<()> {
        let _one = crate::lane::lock(&self.saving);
        // Locked before the note is looked at: the save of somebody else that ends meanwhile counts.
        let (fresh, mut file) = self.fresh()?;
        if let Some(before) = self.standing()?
            && !note.standing.may_follow(&before)
        {
            let text = format!(
                "the note {} says that {before}, and stays: \"{}\" is of a session that is over, or \
                 shares this file; give each session a note of its own",
                self.path.display(),
                note.standing
            );
            fs::remove_file(&fresh)?;
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        file.set_len(0)?;
        file.write_all(&note.encode())?;
        file.sync_all()?;
        fs::rename(&fresh, &self.path)?;
        File::open(self.folder())?.sync_all()
    }

    fn load(&self) -> io::Result<Option<Note>> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        Note::decode(&bytes).map(Some).map_err(|error| self.unreadable(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn note() -> Note {
        let geometry = Geometry::new(40_000, 4096).unwrap();
        let term = Term { id: SessionId([3; 16]), first: Epoch(1) };
        let replica = Replica::owned(geometry, term);
        drop(replica.rounds().write(BlockRange::new(2, 3)));
        replica.rounds().advance(Duration::ZERO).unwrap();
        drop(replica.rounds().write(BlockRange::new(4, 1)));
        let mut device = DeviceNote::of(DeviceName::new("root").unwrap(), &replica);
        device.record.absent.push(BlockRange::new(7, 2));
        device.promised.push((BlockIndex(8), BlockHash([5; 32])));
        let standing = Standing::Leaving { session: SessionId([4; 16]), attempt: 2 };
        Note { standing, devices: vec![device] }
    }

    #[test]
    fn a_note_survives_its_file_and_a_torn_or_foreign_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = FileLedger::new(dir.path().join("note"));
        assert_eq!(ledger.load().unwrap(), None);
        ledger.save(&note()).unwrap();
        assert_eq!(ledger.load().unwrap(), Some(note()));
        let bytes = fs::read(&ledger.path).unwrap();
        for cut in [0, 7, 40, bytes.len() - 1] {
            fs::write(&ledger.path, &bytes[..cut]).unwrap();
            let error = ledger.load().unwrap_err();
            assert!(error.to_string().contains("cannot be read"), "{error}");
        }
        // A crash in the middle of a save leaves the old note.
        fs::write(&ledger.path, &bytes).unwrap();
        fs::write(ledger.path.with_extension("new"), &bytes[..20]).unwrap();
        assert_eq!(ledger.load().unwrap(), Some(note()));
    }

    #[test]
    fn a_note_that_devices_leave_is_not_replaced_by_one_of_a_session_that_brought_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("note");
        let (came, goes, back) = (SessionId([1; 16]), SessionId([2; 16]), SessionId([3; 16]));
        // Two sessions, each with its own way to the file.
        let ledgers = [FileLedger::new(path.clone()), FileLedger::new(path)];
        let save = |by: usize, standing: Standing| {
            let result = ledgers[by].save(&Note { standing: standing.clone(), ..note() });
            let now = ledgers[0].load().unwrap().unwrap().standing;
            assert_eq!(result.is_ok(), now == standing, "{now}");
            result.map_err(|error| error.to_string())
        };
        save(0, Standing::Receiving { session: came }).unwrap();
        save(0, Standing::Owner { session: came, attempt: 1 }).unwrap();
        save(1, Standing::Receiving { session: back }).unwrap_err();
        save(0, Standing::Receiving { session: came }).unwrap();
        save(0, Standing::Owner { session: came, attempt: 1 }).unwrap();
        save(1, Standing::Away { session: goes }).unwrap_err();
        save(1, Standing::Leaving { session: goes, attempt: 1 }).unwrap();
        let error = save(0, Standing::Owner { session: came, attempt: 1 }).unwrap_err();
        assert!(error.contains(&goes.to_string()) && error.contains("of its own"), "{error}");
        save(0, Standing::Leaving { session: back, attempt: 1 }).unwrap_err();
        save(0, Standing::Away { session: came }).unwrap_err();
        save(1, Standing::Here).unwrap();
        save(1, Standing::Leaving { session: goes, attempt: 2 }).unwrap();
        save(1, Standing::Away { session: goes }).unwrap();
        save(0, Standing::Owner { session: came, attempt: 1 }).unwrap_err();
        save(0, Standing::Here).unwrap_err();
        // They come back.
        save(0, Standing::Owner { session: back, attempt: 1 }).unwrap_err();
        save(0, Standing::Receiving { session: back }).unwrap();
        save(1, Standing::Away { session: goes }).unwrap_err();
        save(0, Standing::Owner { session: came, attempt: 1 }).unwrap_err();
        save(0, Standing::Owner { session: back, attempt: 1 }).unwrap();
    }

    #[test]
    fn a_save_that_hangs_keeps_others_from_being_replaced_by_it_when_it_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = FileLedger::new(dir.path().join("note"));
        ledger.save(&note()).unwrap();
        // Another process or session that is about to replace the note, and does not get on.
        let (fresh, mut hanging) = FileLedger::new(ledger.path.clone()).fresh().unwrap();
        let error = ledger.save(&note()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("has not ended"), "{error}");
        let mut late = note();
        late.devices[0].promised.clear();
        hanging.write_all(&late.encode()).unwrap();
        fs::rename(&fresh, &ledger.path).unwrap();
        drop(hanging);
        assert_eq!(ledger.load().unwrap(), Some(late));
        ledger.save(&note()).unwrap();
        assert_eq!(ledger.load().unwrap(), Some(note()));
    }

    #[test]
    fn a_replica_from_a_note_knows_epochs_and_what_is_absent() {
        let replica = note().devices[0].replica().unwrap();
        let epochs: Vec<u32> = (0..10).map(|b| replica.rounds().epoch(BlockIndex(b)).0).collect();
        assert_eq!(epochs, [0, 0, 1, 1, 2, 0, 0, 0, 0, 0]);
        assert_eq!(replica.rounds().clock(), Epoch(2), "a round that was open is open again");
        assert_eq!(replica.absent().len(), 2);
        assert_eq!(replica.owner(), Owner::Here);
    }

    proptest! {
        #[test]
        fn check_30_no_bytes_make_the_reader_of_notes_panic(
            at in 0usize..400, value in any::<u8>(), cut in 0usize..400,
        ) {
            let mut bytes = note().encode();
            bytes.truncate(bytes.len() - 8);
            let place = at % bytes.len();
            bytes[place] = value;
            bytes.truncate(bytes.len() - cut % bytes.len() / 8);
            fuzz_note(&bytes);
        }
    }
}
