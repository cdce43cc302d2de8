//! Connections for blocks of a group of devices. Each is read by one thread at a time, and no device
//! can keep one: a thread that stores a run for too long is relieved, another goes on with its
//! connection, and from then on the device's runs wait elsewhere (see [`backlog`](super::backlog)).
//!
//! What must hold: frames of a connection are read in their order, by whoever holds it; a thread
//! that was relieved ends with the run that it has. So there are at most as many threads that are
//! stuck as there are devices times connections.

use super::{
    Shared,
    backlog::{Backlog, SLOW},
};
use crate::{
    codec::Decoder,
    lane::{Track, lock},
    peer::{Hangup, Incoming},
    wire::{Blocks, WireError},
};
use silo_block::session::{LinkId, messages::DeviceIndex};
use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    thread::Builder,
    time::Instant,
};

/// A connection for blocks.
pub(super) struct Line {
    link: LinkId,
    track: Track,
    desk: Mutex<Desk>,
}

/// Who reads a connection.
#[derive(Default)]
struct Desk {
    /// Counts up with every thread that takes over.
    holder: u64,
    /// The connection, while its holder stores a run.
    parked: Option<Parked>,
}

struct Parked {
    incoming: Incoming,
    device: DeviceIndex,
    since: Instant,
}

impl Line {
    pub(super) fn new(link: LinkId, track: Track) -> Self {
        Self { link, track, desk: Mutex::default() }
    }

    /// The holder has a run to store, and leaves the connection meanwhile.
    fn park(&self, incoming: Incoming, device: DeviceIndex) {
        lock(&self.desk).parked = Some(Parked { incoming, device, since: Instant::now() });
    }

    /// The holder is back. None if it was relieved, or the link is gone.
    fn resume(&self, holder: u64) -> Option<Incoming> {
        let mut desk = lock(&self.desk);
        if desk.holder != holder {
            return None;
        }
        desk.parked.take().map(|parked| parked.incoming)
    }

    /// Takes the connection from a holder that has been away for too long.
    fn relieve(&self) -> Option<(u64, Parked)> {
        let mut desk = lock(&self.desk);
        let parked = desk.parked.take_if(|parked| parked.since.elapsed() >= SLOW)?;
        desk.holder += 1;
        Some((desk.holder, parked))
    }
}

impl Shared {
    /// Reads a connection until its link ends or somebody else takes over.
    pub(super) fn receive_of_group(
        self: &Arc<Self>,
        line: &Arc<Line>,
        holder: u64,
        incoming: Incoming,
    ) {
        let (mut decoder, mut buffer, mut spare) = (Decoder::default(), Vec::new(), Vec::new());
        let mut held = Some(incoming);
        let trouble = loop {
            // Relieved: there is nothing left to do here.
            let Some(mut incoming) = held.take() else { return };
            let before = incoming.received();
            let read = incoming.read_whole(spare);
            let count = incoming.received() - before;
            self.lanes.wire.blocks(line.track).fetch_add(count, Ordering::Relaxed);
            let whole = match read {
                Ok(whole) => whole,
                Err(error) => break error,
            };
            let frame = whole.frame();
            match Blocks::read(&frame) {
                Ok(None) => held = Some(incoming),
                Ok(Some(blocks)) => {
                    let device = blocks.header.device;
                    let backlog = self.backlogs.get(usize::from(device.0));
                    // One that waits for room among the runs of a slow device has a peer that keeps
                    // to no window: it is not relieved, or there would be ever more of them.
                    let waits = backlog.is_some_and(Backlog::is_slow);
                    if waits {
                        held = Some(incoming);
                    } else {
                        line.park(incoming, device);
                    }
                    let taken = self.take(line.link, &blocks, &mut decoder, &mut buffer);
                    if !waits {
                        held = line.resume(holder);
                    }
                    if let Err(error) = taken {
                        break error;
                    }
                }
                Err(error) => break error,
            }
            spare = whole.into_buffer();
        };
        self.lost(line, &trouble);
    }

    fn lost(&self, line: &Line, trouble: &WireError) {
        self.hang_up(line.link, Some(format!("a connection for blocks: {trouble}")));
    }

    /// Relieves threads that do not come back, until the link ends.
    pub(super) fn watch_lines(self: &Arc<Self>, lines: &[Arc<Line>], ended: &Hangup) {
        while !ended.is_done() && !self.lanes.is_over() {
            self.lanes.rest(SLOW / 2);
            for line in lines {
                let Some((holder, parked)) = line.relieve() else { continue };
                let Parked { incoming, device, since } = parked;
                tracing::info!(session = %self.session, %device, "a device is stuck");
                let (shared, next) = (self.clone(), line.clone());
                let run = move || shared.receive_of_group(&next, holder, incoming);
                let started = Builder::new().name("silo-receive".to_owned()).spawn(run).map(drop);
                // What comes next for it does not go the same way.
                let kept = self.took(device, since.elapsed());
                if let Err(error) = started.and(kept) {
                    self.lost(line, &error.into());
                }
            }
        }
        // Nobody reads them any more, also where a thread has not come back.
        lines.iter().for_each(|line| drop(lock(&line.desk).parked.take()));
    }
}
