//! What the machine wants from the host and from disks: on a thread of its own, in order.
//!
//! A disk may never answer. What is decided then: a device whose flush hangs is in the note as it was
//! before, and holds up neither the others nor what comes; the session is not durable, and the source
//! keeps everything, until it does answer. A note that hangs fails, and with it what needs it. When all
//! has come and that cannot be noted, the session ends with an error; flushes still make notes.

use super::Shared;
use crate::{
    bounded::is_late,
    lane::lock,
    ledger::{DeviceNote, Note, Standing},
};
use silo_block::{
    block::BlockRange,
    model::{Owner, Replica},
    session::{
        destination::Event,
        messages::{Custom, DeviceIndex, Reason},
    },
};
use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender},
    },
    time::Duration,
};

/// Between two tries to make a note that cannot be done without.
const AGAIN: Duration = Duration::from_secs(1);

/// Notes, one at a time; see [`Shared::note_all`].
#[derive(Default)]
pub(super) struct Notes {
    asked: AtomicU64,
    made: Mutex<Made>,
}

/// What the newest note says.
#[derive(Default)]
pub(super) struct Made {
    /// Everything that was asked for up to this number.
    upto: u64,
    /// No block is absent in it.
    whole: bool,
    /// Devices whose flush it could not wait for.
    late: Arc<[Late]>,
}

/// A device whose flush hangs.
pub(super) struct Late {
    pub(super) device: u16,
    /// What hangs, for people.
    pub(super) text: String,
}

impl Notes {
    /// Until this is dropped no note is under way.
    pub(super) fn hold(&self) -> MutexGuard<'_, Made> {
        lock(&self.made)
    }
}

/// One thing to do.
pub(super) enum Job {
    Run {
        attempt: u32,
        state: Vec<u8>,
        flushes: Vec<Vec<u64>>,
    },
    /// So many notes are one.
    Note(usize),
    MakeDurable,
    /// All has come: the note has to say so before the volumes are on their own.
    Settle,
    Custom(Custom),
    Trouble(String),
    Overdue(String),
    /// No more; everything before is done when this is answered: by why [`Job::Settle`] was not.
    Stop(Sender<Option<String>>),
}

impl Shared {
    pub(super) fn do_chores(self: &Arc<Self>, jobs: &Receiver<Job>) {
        let (mut told, mut unsettled) = (false, None);
        while let Ok(job) = jobs.recv() {
            match job {
                Job::Run { attempt, state, flushes } => match self.run(attempt, state, flushes) {
                    Ok(()) => self.tell(Event::Ran),
                    Err(why) => self.tell(Event::CannotRun(Reason::Cancelled(why))),
                },
                Job::Note(count) => {
                    let result = self.note_all();
                    self.noted(count, result.as_ref().err());
                    match result {
                        Ok(late) => {
                            if let (Some(late), false) = (late.first(), told) {
                                self.host.trouble(&late.text);
                            }
                            told = !late.is_empty();
                        }
                        Err(error) => {
                            let text = format!("cannot note what is missing here: {error}");
                            self.tell(Event::Cancel(text));
                        }
                    }
                }
                Job::MakeDurable => {
                    // Not answered before: the source keeps everything, and says that it waits.
                    if self.note_at_last("what came cannot be made durable").is_ok() {
                        self.tell(Event::MadeDurable);
                        self.host.durable();
                    }
                }
                Job::Settle => {
                    // Blocks that a store had promised have come since the last note. A flush of a
                    // volume on its own makes no note, and a restart would fetch them once more,
                    // over what was written here since.
                    if self.options.ledger.is_some() && !self.notes.hold().whole {
                        let noted = self.note_at_last("that all has come cannot be noted");
                        unsettled = noted.err().map(|error| error.to_string());
                    }
                }
                Job::Custom(custom) => {
                    self.host.custom(custom.kind, &custom.payload);
                    self.tell(Event::CustomHandled(custom.serial));
                }
                Job::Trouble(what) => self.host.trouble(&what),
                Job::Overdue(what) => {
                    let lacking = self.lacking();
                    let lacking = lacking.iter().map(|lacking| format!("; {lacking}"));
                    self.host.overdue(&(what + &lacking.collect::<String>()));
                }
                Job::Stop(done) => {
                    // Nobody waits for a thread that was too late.
                    let _ = done.send(unsettled);
                    return;
                }
            }
        }
    }

    /// Takes the devices over: from the note on, this host owns them whatever happens to it.
    fn run(&self, attempt: u32, state: Vec<u8>, flushes: Vec<Vec<u64>>) -> Result<(), String> {
        self.attempt.store(u64::from(attempt), Ordering::Release);
        let noted = self.note_all();
        if self.options.ledger.is_some() {
            self.noted(1, noted.as_ref().err());
        }
        if let Err(error) = noted {
            self.give_token_back();
            return Err(format!("cannot note that the devices are here: {error}"));
        }
        for (at, volume) in self.volumes.iter().enumerate() {
            self.with_machine(None, |machine, _| {
                if let Some(replica) = machine.replica(DeviceIndex(at as u16)) {
                    volume.open(replica.absent(), replica.rounds());
                }
            });
        }
        self.host.run(attempt, state, flushes).inspect_err(|_| {
            self.volumes.iter().for_each(|volume| volume.close());
            self.give_token_back();
        })
    }

    /// Nobody runs here by the token. The refusal goes out when this returns: when no restart finds a
    /// note, not even one whose save hangs and is done late, that the token was taken. Until then
    /// the source asks its lease.
    fn give_token_back(&self) {
        self.attempt.store(0, Ordering::Release);
        let Some(ledger) = &self.options.ledger else { return };
        let mut told = false;
        while let Err(error) = self.note_all() {
            let taken = |note: &Note| matches!(note.standing, Standing::Owner { session, .. } if session == self.session);
            let safe = || ledger.load().is_ok_and(|note| !note.as_ref().is_some_and(taken));
            if !is_late(&error) && safe() {
                return;
            }
            if !told {
                let text =
                    format!("that a token is refused cannot be noted, it is tried again: {error}");
                tracing::error!(session = %self.session, text);
                self.host.trouble(&text);
            }
            told = true;
            if self.ending.load(Ordering::Acquire) {
                return;
            }
            std::thread::sleep(AGAIN);
        }
    }

    fn noted(&self, count: usize, error: Option<&io::Error>) {
        let mut core = lock(&self.core);
        core.notes = core.notes.saturating_sub(count);
        // A note says all that those before it would have said.
        core.note_failed = error.map(|error| format!("what is here cannot be noted: {error}"));
        drop(core);
        self.noted.notify_all();
    }

    /// Makes a note without which the session cannot go on, and by which all is durable, however
    /// often that takes; once the session is ending, tries once.
    ///
    /// # Errors
    /// Why the last try failed.
    fn note_at_last(&self, what: &str) -> io::Result<()> {
        let mut told = false;
        loop {
            let error = match self.note_all() {
                Ok(late) => match late.first() {
                    None => return Ok(()),
                    Some(late) => io::Error::new(io::ErrorKind::TimedOut, late.text.clone()),
                },
                Err(error) => error,
            };
            if !told {
                let text = format!("{what}, it is tried again: {error}");
                tracing::error!(session = %self.session, text);
                self.host.trouble(&text);
            }
            told = true;
            if self.ending.load(Ordering::Acquire) {
                return Err(error);
            }
            std::thread::sleep(AGAIN);
        }
    }

    /// Makes everything that is here durable, then notes that it is. A block that comes in between
    /// is absent in the note: the source has it until it hears that all is durable.
    ///
    /// One note at a time, or an older one could replace a newer one. Whoever waits here for a note
    /// that began after he asked has what he wants.
    ///
    /// Gives the devices whose flush hangs: of those the note says what was durable before.
    pub(super) fn note_all(&self) -> io::Result<Arc<[Late]>> {
        let mine = self.notes.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut made = self.notes.hold();
        if made.upto >= mine {
            return Ok(made.late.clone());
        }
        let upto = self.notes.asked.load(Ordering::Acquire);
        let (whole, late) = self.note_now()?;
        *made = Made { upto, whole, late: late.clone() };
        Ok(late)
    }

    /// Gives whether the note says that nothing is absent, and whose flush hangs.
    fn note_now(&self) -> io::Result<(bool, Arc<[Late]>)> {
        let numbers = || (0..self.volumes.len()).map(|at| DeviceIndex(at as u16));
        if let Some(machine) = &mut lock(&self.core).machine {
            numbers().filter_map(|at| machine.replica_mut(at).map(Replica::sync_begins)).count();
        }
        let flushed = self.disks.flush(&self.volumes, |volume| volume.raw().flush());
        let well: Vec<bool> = flushed.iter().map(Result::is_ok).collect();
        let late: Arc<[Late]> = (0u16..)
            .zip(&flushed)
            .filter_map(|(device, flushed)| {
                let error = flushed.as_ref().err().filter(|error| is_late(error))?;
                Some(Late { device, text: error.to_string() })
            })
            .collect();
        let failed = flushed.into_iter().find_map(|flushed| flushed.err().filter(|e| !is_late(e)));
        let (attempt, devices) = {
            let mut core = lock(&self.core);
            // Volumes whose session is over know for themselves what is here.
            let Some(machine) = &mut core.machine else {
                return failed.map_or(Ok((false, late)), Err);
            };
            let mut devices = Vec::with_capacity(self.volumes.len());
            let relies = machine.relies_on_stores();
            for ((at, volume), well) in numbers().zip(&self.volumes).zip(well) {
                let Some(replica) = machine.replica_mut(at) else { continue };
                replica.sync_ends(well);
                if self.options.ledger.is_some() {
                    let mut note = DeviceNote::of(volume.name().clone(), replica);
                    if relies {
                        note.promised = machine.promised(at);
                    }
                    devices.push(note);
                }
            }
            (self.attempt.load(Ordering::Acquire) as u32, devices)
        };
        if let Some(error) = failed {
            return Err(error);
        }
        let Some(ledger) = &self.options.ledger else { return Ok((false, late)) };
        let mut devices = devices;
        if attempt == 0 {
            // A token that was taken counts from the note that says so, and no more once it is
            // refused: until then a restart must find that the devices are the source's.
            devices.iter_mut().for_each(|device| device.record.owner = Owner::Elsewhere);
        }
        let whole = devices.iter().all(|device| device.record.absent.is_empty());
        let standing = if attempt > 0 {
            Standing::Owner { session: self.session, attempt }
        } else {
            Standing::Receiving { session: self.session }
        };
        self.disks.save(ledger, Note { standing, devices })?;
        Ok((whole, late))
    }

    /// Bytes of a range of a device.
    pub(super) fn bytes_of(&self, device: DeviceIndex, range: BlockRange) -> u64 {
        self.device_of(device).map_or(0, |volume| volume.geometry().bytes_of(range))
    }
}
