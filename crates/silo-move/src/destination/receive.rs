//! What comes over the connections of a link: messages, and runs of blocks, which are stored by the
//! thread that received them.

use super::{Shared, backlog::Waiting, farewell::LINGER, lines::Line};
use crate::{
    codec::{CodecError, Decoder, Naming, Piece, refers, xor},
    lane::{Lane, Track, Work, lock},
    peer::{Hangup, Incoming, Link},
    report::Phase,
    volume::Volume,
    wire::{self, Blocks, WireError},
};
use silo_block::{
    block::{BlockIndex, BlockRange},
    session::{
        LinkId,
        destination::{Action, Event},
        messages::{BlockHash, BlockHeader, DeviceIndex, ToDestination, ToSource},
    },
};
use std::{
    io,
    sync::{Arc, atomic::Ordering},
    thread::Builder,
    time::{Duration, Instant},
};
use twox_hash::XxHash3_64;

/// What a thread of a session does.
type Run<S> = Box<dyn FnOnce(&Arc<S>) + Send>;

/// Why a run was not stored.
#[derive(Debug, thiserror::Error)]
enum StoreError {
    #[error("{0}")]
    Codec(#[from] CodecError),
    #[error("{0}")]
    Device(#[from] io::Error),
}

/// What became of a block of a run that refers to bytes that should be here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// Its content is in the buffer.
    Content,
    /// It has to be sent again as it is.
    Again,
    /// It is being fetched elsewhere.
    Elsewhere(BlockHash),
}

impl Shared {
    /// Puts a link to use. `first` are messages that were read from it already.
    pub(super) fn attach(self: &Arc<Self>, link: Link, first: Vec<ToDestination>) {
        let id = LinkId(link.attempt);
        let hangup = link.hangup();
        lock(&self.peer).clone_from(&link.peer);
        let control = link.control.outgoing;
        if !self.lanes.put(Lane::new(id, control, hangup.clone(), Arc::new(Work::default()))) {
            return;
        }
        self.tell(Event::Connected(id));
        first.into_iter().for_each(|message| self.hear(id, message));
        if self.outcome().is_some() {
            // It has just ended, and nobody does what the machine says: on the next link the source
            // is told.
            self.hang_up(id, None);
            hangup.hang_up();
            return;
        }
        let spawn = |name: &str, run: Run<Self>| {
            let shared = self.clone();
            Builder::new().name(name.to_owned()).spawn(move || run(&shared)).map(drop)
        };
        let watched = hangup.clone();
        let (control, ended) = (link.control.incoming, hangup);
        let mut started =
            vec![spawn("silo-control", Box::new(move |shared| shared.listen(id, control, &ended)))];
        let connections = link.data.into_iter().map(|connection| (Track::Bulk, connection));
        let mut lines = Vec::new();
        for (track, connection) in connections.chain([(Track::Demand, link.demand)]) {
            // Nothing is said on these from here; a silent one is a source with nothing to send,
            // whose life shows on the control connection.
            connection.control.set_read_timeout(None);
            let incoming = connection.incoming;
            let run: Run<Self> = if self.volumes.len() > 1 {
                let line = Arc::new(Line::new(id, track));
                lines.push(line.clone());
                Box::new(move |shared| shared.receive_of_group(&line, 0, incoming))
            } else {
                Box::new(move |shared| shared.receive(id, track, incoming))
            };
            started.push(spawn("silo-receive", run));
        }
        if !lines.is_empty() {
            let run = move |shared: &Arc<Self>| shared.watch_lines(&lines, &watched);
            started.push(spawn("silo-relief", Box::new(run)));
        }
        if let Some(error) = started.into_iter().find_map(Result::err) {
            self.hang_up(id, Some(format!("no thread for a connection: {error}")));
            self.tell(Event::Cut(id));
        }
    }

    fn hear(&self, id: LinkId, message: ToDestination) {
        let group = matches!(message, ToDestination::Group(_));
        self.tell(Event::Received(id, message));
        if group {
            self.clock.enter(Phase::Filling);
        }
    }

    /// Hears all that the source says on a link, to its end, also when another thread has given the
    /// link up: the machine is told of the cut after the last word.
    fn listen(&self, id: LinkId, mut incoming: Incoming, ended: &Hangup) {
        let mut counted = 0;
        let mut given_up: Option<Instant> = None;
        let trouble = loop {
            let message = match incoming.read() {
                Ok(frame) => wire::read_to_destination(&frame),
                Err(error) => break error,
            };
            let received = incoming.received();
            self.lanes.wire.control_received.fetch_add(received - counted, Ordering::Relaxed);
            counted = received;
            match message {
                Ok(Some(message)) => self.hear(id, message),
                Ok(None) => {}
                Err(error) => break error,
            }
            if !self.lanes.uses(id) {
                // It was told so, and has as long to come to an end.
                if given_up.get_or_insert_with(Instant::now).elapsed() > LINGER {
                    break io::Error::from(io::ErrorKind::TimedOut).into();
                }
            }
        };
        self.hang_up(id, Some(format!("the control connection: {trouble}")));
        self.tell(Event::Cut(id));
        // Whoever ends the session waits for this.
        ended.hang_up();
    }

    /// Reads one connection for blocks until its link ends.
    fn receive(self: &Arc<Self>, id: LinkId, track: Track, mut incoming: Incoming) {
        let mut decoder = Decoder::default();
        let mut buffer = Vec::new();
        let mut counted = 0;
        let trouble = loop {
            let result = match incoming.read() {
                Ok(frame) => Blocks::read(&frame).and_then(|blocks| match blocks {
                    Some(blocks) => self.take(id, &blocks, &mut decoder, &mut buffer),
                    None => Ok(()),
                }),
                Err(error) => Err(error),
            };
            let received = incoming.received();
            self.lanes.wire.blocks(track).fetch_add(received - counted, Ordering::Relaxed);
            counted = received;
            if let Err(error) = result {
                break error;
            }
        };
        self.hang_up(id, Some(format!("a connection for blocks: {trouble}")));
    }

    /// One run of blocks.
    pub(super) fn take(
        self: &Arc<Self>,
        id: LinkId,
        blocks: &Blocks<'_>,
        decoder: &mut Decoder,
        buffer: &mut Vec<u8>,
    ) -> Result<(), WireError> {
        let header = blocks.header;
        let volume = self
            .device_of(header.device)
            .filter(|volume| header.range.end() <= volume.geometry().blocks())
            .ok_or_else(|| {
                let BlockHeader { device, range, .. } = header;
                WireError::Invalid(format!("{device}: blocks {range:?} are not in the group"))
            })?;
        let backlog = &self.backlogs[usize::from(header.device.0)];
        if backlog.is_slow() {
            backlog.push(Waiting { link: id, header, parcel: blocks.parcel.to_vec() });
            return Ok(());
        }
        let begin = Instant::now();
        let result = self.take_now(id, volume, blocks, decoder, buffer);
        self.took(header.device, begin.elapsed())?;
        result
    }

    /// A device has stored a run for so long.
    pub(super) fn took(self: &Arc<Self>, device: DeviceIndex, time: Duration) -> io::Result<()> {
        let slow = self.backlogs[usize::from(device.0)].took(time);
        if slow { self.start_backlog(device) } else { Ok(()) }
    }

    /// From here on a thread of its own stores what comes for a device.
    fn start_backlog(self: &Arc<Self>, device: DeviceIndex) -> io::Result<()> {
        let shared = self.clone();
        tracing::info!(session = %self.session, %device, "a device is slow");
        let run = move || {
            let (mut decoder, mut buffer) = (Decoder::default(), Vec::new());
            let (volume, backlog) =
                (&shared.volumes[usize::from(device.0)], &shared.backlogs[usize::from(device.0)]);
            while let Some(Waiting { link, header, parcel }) = backlog.pop() {
                let blocks = Blocks { header, parcel: &parcel };
                let begin = Instant::now();
                let result = shared.take_now(link, volume, &blocks, &mut decoder, &mut buffer);
                backlog.recovered(begin.elapsed());
                if let Err(error) = result {
                    shared.hang_up(link, Some(format!("a connection for blocks: {error}")));
                }
            }
        };
        let thread = Builder::new().name("silo-backlog".to_owned()).spawn(run);
        thread.inspect_err(|_| self.backlogs[usize::from(device.0)].give_up()).map(drop)
    }

    fn take_now(
        &self,
        id: LinkId,
        volume: &Volume,
        blocks: &Blocks<'_>,
        decoder: &mut Decoder,
        buffer: &mut Vec<u8>,
    ) -> Result<(), WireError> {
        let header = blocks.header;
        let geometry = volume.geometry();
        let (length, block) = (geometry.bytes_of(header.range) as usize, geometry.block() as usize);
        if !refers(blocks.parcel) {
            // Nothing but content: it is stored from the connection's buffer.
            return self.offer(id, header, |parts| {
                let base = geometry.offset(header.range.start);
                decoder.decode(blocks.parcel, length, block, |piece| {
                    let (offset, length, content) = match piece {
                        Piece::Zero { offset, length } => (offset, length, None),
                        Piece::Data { offset, content } => (offset, content.len(), Some(content)),
                        // `refers` has looked.
                        _ => return Err(CodecError::Kind(u8::MAX).into()),
                    };
                    store(volume, parts, base + offset as u64, length as u64, content)
                })
            });
        }
        if length as u64 > crate::codec::MAX_CONTENT {
            return Err(WireError::Invalid("a run of references that is too long".to_owned()));
        }
        buffer.clear();
        buffer.resize(length, 0);
        let mut found = vec![Found::Content; header.range.count as usize];
        self.resolve(volume, blocks, decoder, buffer, &mut found)?;
        let mut at = 0;
        while at < found.len() {
            let end = at + found[at..].iter().take_while(|other| **other == found[at]).count();
            let range = BlockRange::new(header.range.start.0 + at as u64, (end - at) as u64);
            let part = BlockHeader { range, ..header };
            match found[at] {
                Found::Content => {
                    let from = at * block;
                    let content = &buffer[from..(end * block).min(length)];
                    self.offer(id, part, |parts| {
                        let offset = geometry.offset(range.start);
                        store(volume, parts, offset, content.len() as u64, Some(content))
                    })?;
                }
                Found::Again => self.ask_again(id, part),
                Found::Elsewhere(hash) => self.fetch_held(id, part, hash),
            }
            at = end;
        }
        Ok(())
    }

    /// Offers a run to the machine and has `write` store the parts that it takes.
    fn offer(
        &self,
        id: LinkId,
        header: BlockHeader,
        write: impl FnOnce(&[BlockRange]) -> Result<(), StoreError>,
    ) -> Result<(), WireError> {
        let slot = self.slots.fetch_add(1, Ordering::Relaxed);
        let Some(Action::Store { parts, .. }) =
            self.feed(Event::Blocks(id, header, slot), Some(slot))
        else {
            return Ok(());
        };
        let noted = self.wait_for_notes().map_err(io::Error::other);
        let result = noted.map_err(StoreError::from).and_then(|()| write(&parts));
        if result.is_ok() {
            let bytes: u64 = parts.iter().map(|part| self.bytes_of(header.device, *part)).sum();
            self.stored.fetch_add(bytes, Ordering::Relaxed);
        }
        let result = result.map_err(|error| error.to_string());
        self.tell(Event::Stored { slot, result });
        Ok(())
    }

    /// Stores what a thread has that got it elsewhere.
    pub(super) fn offer_content(&self, id: LinkId, header: BlockHeader, content: &[u8]) {
        let Some(volume) = self.device_of(header.device) else { return };
        let offset = volume.geometry().offset(header.range.start);
        let write = |parts: &[BlockRange]| {
            store(volume, parts, offset, content.len() as u64, Some(content))
        };
        // Only bytes from the connection can be invalid.
        let _ = self.offer(id, header, write);
    }

    /// Has the source send blocks again, as they are.
    pub(super) fn ask_again(&self, id: LinkId, header: BlockHeader) {
        self.confirm(id, header, vec![header.range]);
    }

    /// Says what became of blocks that the machine was not asked about.
    pub(super) fn confirm(&self, id: LinkId, header: BlockHeader, retry: Vec<BlockRange>) {
        let BlockHeader { device, range, epoch, .. } = header;
        let message = ToSource::Receipt { device, range, epoch, retry };
        lock(&self.core).pending.push_back(Action::Send(id, message));
        self.changed.notify_all();
    }

    /// Turns references into content, where that is possible now.
    fn resolve(
        &self,
        volume: &Volume,
        blocks: &Blocks<'_>,
        decoder: &mut Decoder,
        buffer: &mut [u8],
        found: &mut [Found],
    ) -> Result<(), CodecError> {
        let geometry = volume.geometry();
        let (length, block) = (buffer.len(), geometry.block() as usize);
        let base = geometry.offset(blocks.header.range.start);
        let naming = self.options.naming;
        decoder.decode(blocks.parcel, length, block, |piece| {
            match piece {
                Piece::Zero { .. } => {}
                Piece::Data { offset, content } => {
                    buffer[offset..offset + content.len()].copy_from_slice(content);
                }
                Piece::Same { offset, length, earlier, hash } => {
                    let target = &mut buffer[offset..offset + length];
                    if !read_same(volume, earlier, &hash, target) {
                        found[offset / block] = Found::Again;
                    }
                }
                Piece::Held { offset, length, hash } => {
                    let target = &mut buffer[offset..offset + length];
                    found[offset / block] = self.look_up(naming, &hash, target);
                }
                Piece::Delta { offset, difference, check } => {
                    let target = &mut buffer[offset..offset + difference.len()];
                    let read = volume.raw().read_at(base + offset as u64, target);
                    xor(target, difference);
                    if read.is_err() || XxHash3_64::oneshot(target) != check {
                        let blocks = difference.len().div_ceil(block);
                        found[offset / block..][..blocks].fill(Found::Again);
                    }
                }
            }
            Ok(())
        })
    }

    /// Content of this host by hash; else it is to be fetched, if there is a place to ask.
    fn look_up(&self, naming: Naming, hash: &BlockHash, target: &mut [u8]) -> Found {
        if let Some(local) = &self.options.local {
            match local.find(hash, target) {
                Ok(true) if naming.name(target) == *hash => return Found::Content,
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "content of this host cannot be read"),
            }
        }
        let places = lock(&self.assist).as_ref().is_some_and(|assist| !assist.is_empty());
        if places { Found::Elsewhere(*hash) } else { Found::Again }
    }
}

/// Whether an earlier block of the device has this content now.
fn read_same(volume: &Volume, earlier: BlockIndex, hash: &BlockHash, target: &mut [u8]) -> bool {
    let geometry = volume.geometry();
    geometry.length(earlier) == target.len() as u64
        && volume.raw().read_at(geometry.offset(earlier), target).is_ok()
        && Naming::Plain.name(target) == *hash
}

/// Stores the parts of some content that were taken. No content means zeros.
fn store(
    volume: &Volume,
    parts: &[BlockRange],
    offset: u64,
    length: u64,
    content: Option<&[u8]>,
) -> Result<(), StoreError> {
    let geometry = volume.geometry();
    let end = offset + length;
    // Parts are in order; the first that can meet this content is found by halving.
    let first = parts
        .partition_point(|part| geometry.offset(part.start) + geometry.bytes_of(*part) <= offset);
    for part in &parts[first..] {
        let from = geometry.offset(part.start).max(offset);
        let to = (geometry.offset(part.start) + geometry.bytes_of(*part)).min(end);
        if from >= to {
            break;
        }
        match content {
            None => volume.store_zeros(from, to - from)?,
            Some(content) => {
                volume.store(from, &content[(from - offset) as usize..(to - offset) as usize])?;
            }
        }
    }
    Ok(())
}
