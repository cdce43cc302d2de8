//! What the machine wants from the host and from disks: on a thread of its own, in order.

use super::Shared;
use crate::{
    lane::lock,
    ledger::{Note, Standing},
};
use silo_block::{
    block::BlockRange,
    session::{
        destination::Event,
        messages::{Custom, DeviceIndex, Reason},
    },
};
use std::{
    io,
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, Sender},
    },
};

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
    Custom(Custom),
    Trouble(String),
    Overdue(String),
    /// No more; everything before is done when this is dropped.
    Stop(Sender<()>),
}

impl Shared {
    pub(super) fn do_chores(self: &Arc<Self>, jobs: &Receiver<Job>) {
        while let Ok(job) = jobs.recv() {
            match job {
                Job::Run { attempt, state, flushes } => match self.run(attempt, state, flushes) {
                    Ok(()) => self.tell(Event::Ran),
                    Err(why) => self.tell(Event::CannotRun(Reason::Cancelled(why))),
                },
                Job::Note(count) => {
                    let result = self.note_all();
                    self.noted(count, result.as_ref().err());
                    if let Err(error) = result {
                        let text = format!("cannot note what is missing here: {error}");
                        self.tell(Event::Cancel(text));
                    }
                }
                Job::MakeDurable => match self.note_all() {
                    Ok(()) => {
                        self.tell(Event::MadeDurable);
                        self.host.durable();
                    }
                    Err(error) => {
                        // Never answered: the source keeps everything, and says that it waits.
                        let text = format!("what came cannot be made durable: {error}");
                        tracing::error!(session = %self.session, text);
                        self.host.trouble(&text);
                    }
                },
                Job::Custom(custom) => {
                    self.host.custom(custom.kind, &custom.payload);
                    self.tell(Event::CustomHandled(custom.serial));
                }
                Job::Trouble(what) => self.host.trouble(&what),
                Job::Overdue(what) => self.host.overdue(&what),
                Job::Stop(done) => return drop(done),
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
        noted.map_err(|error| format!("cannot note that the devices are here: {error}"))?;
        for (at, volume) in self.volumes.iter().enumerate() {
            self.with_machine(None, |machine, _| {
                if let Some(replica) = machine.replica(DeviceIndex(at as u16)) {
                    volume.open(replica.absent(), replica.rounds());
                }
            });
        }
        self.host.run(attempt, state, flushes).inspect_err(|_| {
            self.volumes.iter().for_each(|volume| volume.close());
            self.attempt.store(0, Ordering::Release);
            if let Err(error) = self.note_all() {
                // The refusal goes out all the same: the source asks its lease, not this note.
                tracing::error!(session = %self.session, %error, "cannot note a refusal");
            }
        })
    }

    fn noted(&self, count: usize, error: Option<&io::Error>) {
        let mut core = lock(&self.core);
        core.notes = core.notes.saturating_sub(count);
        if let Some(error) = error {
            core.note_failed = Some(format!("what is here cannot be noted: {error}"));
        }
        drop(core);
        self.noted.notify_all();
    }

    /// Makes everything that is here durable, then notes that it is. A block that comes in between
    /// is absent in the note: the source has it until it hears that all is durable.
    pub(super) fn note_all(&self) -> io::Result<()> {
        let attempt = self.attempt.load(Ordering::Acquire) as u32;
        let devices = {
            let core = lock(&self.core);
            let machine = core.machine.as_ref();
            let note = |at: usize| {
                self.options.ledger.as_ref()?;
                let replica =
                    machine.and_then(|machine| machine.replica(DeviceIndex(at as u16)))?;
                Some(crate::ledger::DeviceNote::of(self.volumes[at].name().clone(), replica))
            };
            (0..self.volumes.len()).map(note).collect::<Option<Vec<_>>>()
        };
        for volume in &self.volumes {
            volume.raw().flush()?;
        }
        let (Some(ledger), Some(devices)) = (&self.options.ledger, devices) else { return Ok(()) };
        let standing = if attempt > 0 {
            Standing::Owner { session: self.session, attempt }
        } else {
            Standing::Receiving { session: self.session }
        };
        ledger.save(&Note { standing, devices })
    }

    /// Bytes of a range of a device.
    pub(super) fn bytes_of(&self, device: DeviceIndex, range: BlockRange) -> u64 {
        self.device_of(device).map_or(0, |volume| volume.geometry().bytes_of(range))
    }
}
