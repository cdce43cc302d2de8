//! A session's connections: one that breaks and is replaced by the source's next, and the last one.

use super::{
    DestinationMachine, Fate, HistoryTold, LOOK, SILENCE_LIMIT, Session, door::Visitor, faults,
    lock,
};
use crate::migrate::{
    link::{Channel, Incoming},
    messages::{ResumeAnswer, Standing},
    protocol::{DeviceNumber, Frame, WireError},
    switchover::{DestinationEvent, DestinationState},
};
use identity::Control;
use silo::block::{BlockRange, BlockSet};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// How long the source may take to close the connection after its release.
const GOODBYE_LIMIT: Duration = Duration::from_secs(5);
/// How long a source that connects again may take to say that it has the lists.
const READMIT_LIMIT: Duration = Duration::from_secs(5);

impl<M: DestinationMachine + 'static> Session<M> {
    /// The connection is lost. Waits for the source to connect again, if there is something to wait
    /// for: `None` if the session is over.
    pub(super) fn interrupted(&mut self, reason: &str) -> Option<Incoming> {
        // What has come counts, also if the connection ended right behind it.
        if let Err(error) = self.applier.settle() {
            tracing::warn!(%error, "the last blocks could not be put in place");
        }
        self.applier.renew();
        // Half of it would be taken for all of it.
        self.changed.clear();
        self.hang_up();
        self.door.lost(reason);
        self.desk.event(DestinationEvent::PeerLost);
        loop {
            self.tell_owner();
            let missing = self.applier.still_missing();
            match self.desk.state() {
                DestinationState::Owner(_) if missing == 0 => {
                    match self.complete() {
                        Ok(()) => self.desk.event(DestinationEvent::AllPresent),
                        Err(error) => {
                            tracing::error!(%error, "it is all here and not durable yet");
                            self.door.wait(LOOK);
                            continue;
                        }
                    };
                }
                DestinationState::Owner(_)
                | DestinationState::Unconfirmed
                | DestinationState::FrozenUnconfirmed => {}
                _ => return None,
            }
            if self.door.is_closed() {
                return None;
            }
            let Some(Visitor { main, fault }) = self.door.wait(LOOK) else { continue };
            let control = main.control.clone();
            *lock(&self.main) = main.outgoing;
            match self.greet(main.incoming, control.clone(), fault) {
                Ok(incoming) => return Some(incoming),
                Err(error) => {
                    tracing::info!(%error, "the source came back and went again");
                    control.shutdown();
                    self.hang_up();
                }
            }
        }
    }

    /// Tells a source that has come back what is missing, and goes on with its connections.
    pub(super) fn greet(
        &mut self,
        mut incoming: Incoming,
        control: Control,
        fault: Channel,
    ) -> Result<Incoming, WireError> {
        control.set_read_timeout(Some(READMIT_LIMIT));
        let nonce = getrandom::u64().map_err(|e| std::io::Error::other(e.to_string()))?;
        let answer = serde_json::to_vec(&ResumeAnswer::of(Standing::Missing, ""));
        {
            let mut main = lock(&self.main);
            main.write(&Frame::Resumed(answer.map_err(std::io::Error::from)?))?;
            for (number, device) in self.applier.devices().iter().enumerate() {
                main.missing(DeviceNumber(number as u8), &device.missing())?;
            }
            main.write(&Frame::RoundEnd(nonce))?;
            main.flush()?;
        }
        match incoming.read()? {
            Frame::RoundApplied(back) if back == nonce => {}
            _ => return Err(WireError::Invalid("it did not give the nonce back".into())),
        }
        control.set_read_timeout(Some(SILENCE_LIMIT));
        self.control = control.clone();
        if !self.door.opened(&[control, fault.control]) {
            return Err(WireError::Invalid("a newer connection is there".into()));
        }
        tracing::info!(missing = self.applier.still_missing(), "the source is back");
        self.demands.connect(fault.outgoing);
        self.filler = faults::fill(fault.incoming, &self.demands, &self.door);
        self.desk.event(DestinationEvent::PeerBack);
        Ok(incoming)
    }

    /// Ends the connections and the thread that reads one of them.
    pub(super) fn hang_up(&mut self) {
        // In this order: somebody may be writing to a line that takes nothing.
        self.control.shutdown();
        self.door.break_line();
        self.demands.hang_up();
        if let Some(thread) = self.filler.take() {
            let _ = thread.join();
        }
    }

    /// Everything that was to be said is said before the connection ends, and the source, which waits
    /// for the last word, ends it. One that did not hear it is told at the door.
    pub(super) fn close(&mut self, fate: &Fate, incoming: Option<Incoming>) {
        let answer = match fate {
            Fate::Settled(holding) => {
                let epoch = holding.record.epoch.0;
                Some(ResumeAnswer {
                    confirmation: Some(self.desk.confirmation(epoch)),
                    durable: Some(self.desk.durable(epoch)),
                    ..ResumeAnswer::of(Standing::Durable, "")
                })
            }
            Fate::Discard { reason, .. } => Some(ResumeAnswer::of(Standing::Refused, reason)),
            Fate::Incomplete { .. } | Fate::Undecided { .. } => None,
        };
        if let Some(answer) = answer {
            self.door.end(&answer);
        }
        self.desk.close();
        self.tell_owner();
        self.control.set_read_timeout(Some(GOODBYE_LIMIT));
        if let (Fate::Settled(_), Some(incoming)) = (fate, incoming) {
            self.last_words(incoming);
        }
        self.hears_history(None);
        self.hang_up();
    }

    /// What the source says of the machine's history before it closes the connection.
    fn last_words(&mut self, mut incoming: Incoming) {
        let deadline = Instant::now() + 2 * GOODBYE_LIMIT;
        while Instant::now() < deadline
            && let Ok(frame) = incoming.read()
        {
            match frame {
                Frame::Changed { device, ranges } => {
                    if let Err(why) = self.lacks(device, &ranges) {
                        return tracing::warn!(
                            why,
                            "what the source says of the history is not taken"
                        );
                    }
                }
                Frame::History(mark) => self.hears_history(Some(mark)),
                _ => {}
            }
        }
    }

    /// Blocks in which the machine differed from its last generation when it left.
    pub(super) fn lacks(
        &mut self,
        device: DeviceNumber,
        ranges: &[BlockRange],
    ) -> Result<(), String> {
        if self.changed.is_empty() {
            let devices = self.applier.devices().iter();
            self.changed = devices.map(|device| BlockSet::new(device.blocks())).collect();
        }
        let set = self.changed.get_mut(usize::from(device.0));
        let set = set.ok_or("blocks of a device that there is not have changed")?;
        for range in ranges {
            if range.end() > set.device_blocks() {
                return Err("blocks have changed behind the end of a device".into());
            }
            set.insert_range(*range);
        }
        Ok(())
    }

    /// That was all; or the session ends, and it may not have been told.
    pub(super) fn hears_history(&mut self, mark: Option<Vec<u8>>) {
        let mut changed = std::mem::take(&mut self.changed);
        if changed.is_empty() {
            let devices = self.applier.devices().iter();
            changed = devices.map(|device| BlockSet::new(device.blocks())).collect();
        }
        let demands = Arc::clone(&self.demands);
        let told = mark.map(|mark| HistoryTold { mark, changed, demands });
        // Said once more over another line, it is the same.
        if let Some(tell) = self.on_history.take() {
            tell(told);
        }
    }
}
