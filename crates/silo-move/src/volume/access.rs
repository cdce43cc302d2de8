//! Reads and writes of a volume: inside their round, and only of what is here.

use super::{Mode, PAUSE, Turn, Volume};
use crate::lane::lock;
use silo_block::{
    block::BlockRange,
    io::{Allocation, BlockDevice, Extent},
};
use std::{io, sync::PoisonError, time::Instant};

impl Volume {
    /// Waits while the volume is paused. An error if it is not this host's.
    fn admit(&self) -> io::Result<()> {
        let deadline = Instant::now() + PAUSE;
        let mut guard = lock(&self.waiting);
        loop {
            let text = match self.mode() {
                Mode::Open => return Ok(()),
                Mode::Paused if Instant::now() < deadline => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    guard = self
                        .changed
                        .wait_timeout(guard, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                    continue;
                }
                Mode::Paused => "has been paused for too long by a move",
                Mode::Idle | Mode::Arriving => "has not been handed over to this host",
                Mode::Away => "was handed over to another host",
            };
            let text = format!("device \"{}\" {text}", self.name);
            return Err(io::Error::new(io::ErrorKind::NotConnected, text));
        }
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length);
        if end.is_some_and(|end| end <= self.geometry.bytes()) {
            return Ok(());
        }
        let size = self.geometry.bytes();
        let text = format!("{length} bytes at {offset} of a device of {size} bytes");
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    }

    /// Does a write inside its round, whatever is here.
    fn change_bytes(
        &self,
        offset: u64,
        length: u64,
        write: impl Fn() -> io::Result<()>,
    ) -> io::Result<()> {
        self.check(offset, length)?;
        let touched = self.geometry.touched(offset, length);
        self.touched(touched);
        if let Some(blank) = &self.blank {
            blank.remove(touched);
        }
        loop {
            if self.mode() != Mode::Open {
                self.admit()?;
                continue;
            }
            let rounds = self.rounds();
            if self.here.has(touched) {
                // Looked at again inside the round: whoever pauses the volume and then closes the
                // round waits for this write, or this write sees that it is paused, and leaves no
                // mark: the last list would leave a block out that is newer than its round.
                let open = || self.mode() == Mode::Open;
                if let Some(guard) = rounds.write_if(touched, open) {
                    let result = write();
                    drop(guard);
                    return result;
                }
                continue;
            }
            if let Some(result) = self.change_absent(offset, length, touched, &write)? {
                return result;
            }
        }
    }

    /// A write to blocks of which some are not here. None if it is to be tried again.
    fn change_absent(
        &self,
        offset: u64,
        length: u64,
        touched: BlockRange,
        write: &impl Fn() -> io::Result<()>,
    ) -> io::Result<Option<io::Result<()>>> {
        let Some((hub, device)) = self.hub() else {
            let text = format!("blocks of device \"{}\" are not here", self.name);
            return Err(io::Error::other(text));
        };
        let claimed = match hub.write(device, offset, length) {
            Turn::Go(range) => range,
            Turn::Fail(error) => return Err(error),
        };
        // An absent block must not get an epoch without a write: what comes for it would be late.
        // So the mode does not change between the look at it and the guard.
        let entering = self.entering.read().unwrap_or_else(PoisonError::into_inner);
        if self.mode() != Mode::Open {
            drop(entering);
            hub.wrote(device, claimed, false);
            return Ok(None);
        }
        let rounds = self.rounds();
        let guard = rounds.write(touched);
        drop(entering);
        let result = write();
        hub.wrote(device, claimed, result.is_ok());
        drop(guard);
        Ok(Some(result))
    }
}

impl BlockDevice for Volume {
    fn size(&self) -> u64 {
        self.geometry.bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        if !matches!(self.mode(), Mode::Open | Mode::Paused) {
            self.admit()?;
        }
        let touched = self.geometry.touched(offset, buf.len() as u64);
        self.touched(touched);
        if !self.here.has(touched)
            && let Some((hub, device)) = self.hub()
            && let Turn::Fail(error) = hub.read(device, touched)
        {
            return Err(error);
        }
        self.device.read_at(offset, buf)
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.check(offset, buf.len() as u64)?;
        if !matches!(self.mode(), Mode::Open | Mode::Paused) {
            self.admit()?;
        }
        let touched = self.geometry.touched(offset, buf.len() as u64);
        if !self.here.has(touched) {
            return Ok(false);
        }
        self.touched(touched);
        self.device.try_read_at(offset, buf)
    }

    fn may_wait(&self, offset: u64, length: u64) -> bool {
        !self.here.has(self.geometry.touched(offset, length))
            || self.device.may_wait(offset, length)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change_bytes(offset, data.len() as u64, || self.device.write_at(offset, data))
    }

    fn flush(&self) -> io::Result<()> {
        loop {
            let rounds = self.rounds();
            // Nothing is stamped; the round does not end before the flush does.
            let guard = rounds.write(BlockRange::new(0, 0));
            if self.mode() != Mode::Open {
                drop(guard);
                self.admit()?;
                continue;
            }
            match self.hub() {
                // Notes what is here after it was made durable, and what is not.
                Some((hub, device)) => hub.note(device)?,
                None => self.device.flush()?,
            }
            drop(guard);
            return Ok(());
        }
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change_bytes(offset, length, || self.device.trim(offset, length))
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.change_bytes(offset, length, || self.device.zero(offset, length, allocate))
    }

    fn interrupt(&self) {
        self.device.interrupt();
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        self.check(offset, length)?;
        if length > 0 && !self.here.has(self.geometry.touched(offset, length)) {
            // What is not here may be anything.
            return Ok(vec![Extent { length, allocation: Allocation::Data }]);
        }
        self.device.extents(offset, length)
    }

    fn is_read_only(&self) -> bool {
        self.device.is_read_only()
    }
}
