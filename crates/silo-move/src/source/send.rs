//! Reads, encodes and sends runs of blocks: one thread for each data connection and one for the
//! demand connection. Each has one run in memory.

use super::{Advertised, Shared};
use crate::{
    codec::{Encoder, Known, Versions},
    lane::{Track, Work, lock},
    peer::Outgoing,
    volume::Volume,
    wire::Blocks,
};
use silo_block::{
    block::{BlockIndex, BlockSet},
    order::Class,
    session::{
        LinkId,
        messages::{BlockHash, BlockHeader, Reason},
        source::Event,
    },
};
use std::{
    cell::RefCell,
    io,
    sync::{Mutex, atomic::Ordering},
    time::Instant,
};

impl Shared {
    /// Until the link is closed.
    pub(super) fn send_blocks(&self, id: LinkId, track: Track, outgoing: Outgoing, work: &Work) {
        let mut sender = Sender {
            encoder: Encoder::new(self.options.method).with_naming(self.options.naming),
            outgoing,
            buffer: Vec::new(),
            counted: 0,
        };
        loop {
            if track == Track::Bulk {
                self.throttle.wait();
            }
            let mut flushed = Ok(());
            let next = work.pop(track, || flushed = sender.flush(self, track));
            let result = match (next, flushed) {
                (None, _) => break,
                (_, Err(error)) => Err(error),
                (Some(header), Ok(())) => self.send_run(&mut sender, track, &header),
            };
            if let Err(error) = result {
                self.hang_up(id, Some(format!("a connection for blocks: {error}")));
                break;
            }
        }
        // Whatever is left belongs to a link that is gone, or says goodbye.
        let _ = sender.flush(self, track);
    }

    fn send_run(&self, sender: &mut Sender, track: Track, header: &BlockHeader) -> io::Result<()> {
        let at = usize::from(header.device.0);
        let volume = &self.volumes[at];
        let geometry = volume.geometry();
        let (offset, length) =
            (geometry.offset(header.range.start), geometry.bytes_of(header.range));
        sender.buffer.resize(length as usize, 0);
        if let Err(error) = volume.read_raw(offset, &mut sender.buffer) {
            self.tell(Event::Unable(Reason::Read {
                device: header.device,
                range: header.range,
                what: error.to_string(),
            }));
            return Ok(());
        }
        let block = geometry.block() as usize;
        let versions = &self.versions[at];
        let known = KnownHere {
            volume,
            versions,
            refused: &self.refused[at],
            advertised: self.options.advertised.as_deref().map(|all| (all, at)),
            scratch: RefCell::default(),
        };
        if let Some(limit) = self.throttle.rate() {
            sender.encoder.chooser().limit(limit);
        }
        let begin = Instant::now();
        let parcel = sender.encoder.encode(
            header.device.0,
            header.range.start,
            block,
            &sender.buffer,
            &known,
        );
        let mut tally = parcel.tally;
        tally.content = length;
        if track == Track::Bulk {
            self.throttle.charge(tally.bytes);
        }
        let encoded = begin.elapsed();
        Blocks::write(&mut sender.outgoing, header, &parcel)?;
        let writing = begin.elapsed().saturating_sub(encoded);
        sender.encoder.chooser().wrote(tally.bytes, writing);
        if header.class == Class::Dirty {
            // Sent before, and again: hot blocks, whose next version is worth comparing.
            for (index, content) in sender.buffer.chunks(block).enumerate() {
                let block = BlockIndex(header.range.start.0 + index as u64);
                versions.remember(block, header.epoch, content);
            }
        }
        *lock(&self.paths) += tally;
        sender.count(self, track);
        Ok(())
    }
}

struct Sender {
    encoder: Encoder,
    outgoing: Outgoing,
    buffer: Vec<u8>,
    counted: u64,
}

impl Sender {
    fn flush(&mut self, shared: &Shared, track: Track) -> io::Result<()> {
        self.outgoing.flush()?;
        self.count(shared, track);
        Ok(())
    }

    fn count(&mut self, shared: &Shared, track: Track) {
        let sent = self.outgoing.sent();
        shared.lanes.wire.blocks(track).fetch_add(sent - self.counted, Ordering::Relaxed);
        self.counted = sent;
    }
}

/// What this side knows of the blocks of a device.
struct KnownHere<'a> {
    volume: &'a Volume,
    versions: &'a Versions,
    refused: &'a Mutex<BlockSet>,
    advertised: Option<(&'a dyn Advertised, usize)>,
    scratch: RefCell<Vec<u8>>,
}

impl Known for KnownHere<'_> {
    fn advertised(&self, block: BlockIndex) -> Option<BlockHash> {
        let (all, device) = self.advertised?;
        let hash = all.hash(device, block)?;
        (!lock(self.refused).contains(block)).then_some(hash)
    }

    fn is_same(&self, earlier: BlockIndex, content: &[u8]) -> bool {
        let geometry = self.volume.geometry();
        if geometry.length(earlier) != content.len() as u64 {
            return false;
        }
        let mut scratch = self.scratch.borrow_mut();
        scratch.resize(content.len(), 0);
        // A guess that cannot be checked is no guess.
        self.volume.read_raw(geometry.offset(earlier), &mut scratch).is_ok() && *scratch == content
    }

    fn last_version(&self, block: BlockIndex, into: &mut [u8]) -> bool {
        self.versions.find(block, into)
    }
}
