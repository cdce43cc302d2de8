//! Putting blocks in place at the destination: before the token by overwriting, after it by
//! filling what is missing.
//!
//! Taking blocks off the line and putting them into memory cost about the same, so long runs of
//! blocks are put in place by a [`Helper`] while the next are taken off the line. Short runs (a
//! last round, the flight) are put in place at once: handing over costs more than it saves. Blocks
//! keep their order either way, and every other frame waits until all blocks before it are in place.

use super::helper::Helper;
use crate::migrate::protocol::{DeviceNumber, Frame};
use silo::{
    block::{BLOCK_SIZE, BlockIndex, BlockRange, BlockSet},
    device::{Demand, Device, DeviceError},
};
use std::sync::Arc;

/// Why a frame could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The device refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The thread that puts blocks in place.
    #[error("the thread that puts blocks in place ended by a fault of its own; its log says more")]
    Helper,
    /// The peer broke the rules.
    #[error("the source sent something that does not fit: {0}")]
    Peer(String),
}

/// Bytes of blocks without another frame between them from which on the helper takes over.
const LONG_RUN: u64 = 4 << 20;

/// The group at the destination, and how far it is.
pub(super) struct Applier {
    devices: Vec<Arc<dyn Device>>,
    missing: Vec<BlockSet>,
    armed: bool,
    spare: Vec<u8>,
    /// Bytes of blocks since the last other frame.
    run: u64,
    helper: Option<Helper>,
}

/// Blocks for a device that are known to fit into it.
pub(super) enum Content {
    Data(BlockIndex, Vec<u8>),
    Zero(BlockRange),
}

impl Content {
    fn bytes(&self) -> u64 {
        match self {
            Self::Data(_, data) => data.len() as u64,
            Self::Zero(_) => BLOCK_SIZE as u64,
        }
    }

    /// Puts it in place; gives back the memory that carried it.
    pub(super) fn put(self, device: &dyn Device, armed: bool) -> Result<Vec<u8>, DeviceError> {
        match (self, armed) {
            (Self::Data(start, data), false) => {
                device.store(start, &data)?;
                Ok(data)
            }
            (Self::Data(start, data), true) => {
                device.fill(start, &data)?;
                Ok(data)
            }
            (Self::Zero(range), false) => device.store_zero(range).map(|()| Vec::new()),
            (Self::Zero(range), true) => device.fill_zero(range).map(|_| Vec::new()),
        }
    }
}

impl Applier {
    /// Nothing has arrived.
    pub(super) fn new(devices: Vec<Arc<dyn Device>>) -> Self {
        let missing = devices.iter().map(|d| BlockSet::new(d.blocks())).collect();
        Self { devices, missing, armed: false, spare: Vec::new(), run: 0, helper: None }
    }

    fn device(
        &self,
        number: DeviceNumber,
        range: BlockRange,
    ) -> Result<&Arc<dyn Device>, ApplyError> {
        let device = self
            .devices
            .get(usize::from(number.0))
            .ok_or_else(|| ApplyError::Peer(format!("device number {}", number.0)))?;
        let fits = range.end() <= device.blocks();
        fits.then_some(device).ok_or_else(|| {
            let text = format!(
                "blocks {}..{} of device \"{}\", which has {}",
                range.start.0,
                range.end(),
                device.name(),
                device.blocks()
            );
            ApplyError::Peer(text)
        })
    }

    /// Applies a frame that carries blocks or a list; gives any other frame back.
    pub(super) fn apply(&mut self, frame: Frame) -> Result<Option<Frame>, ApplyError> {
        match frame {
            Frame::Blocks { device: number, start, data } => {
                let range = BlockRange::new(start.0, (data.len() / BLOCK_SIZE) as u64);
                let device = Arc::clone(self.device(number, range)?);
                self.not_missing(number, range);
                self.put(device, Content::Data(start, data))?;
                return Ok(None);
            }
            Frame::Zero { device: number, range } => {
                let device = Arc::clone(self.device(number, range)?);
                self.not_missing(number, range);
                self.put(device, Content::Zero(range))?;
                return Ok(None);
            }
            _ => self.settle()?,
        }
        match frame {
            Frame::Missing { device: number, ranges } => {
                if self.armed {
                    return Err(ApplyError::Peer(
                        "a list of missing blocks after the token".into(),
                    ));
                }
                for range in ranges {
                    self.device(number, range)?.discard(range)?;
                    self.missing[usize::from(number.0)].insert_range(range);
                }
            }
            other => return Ok(Some(other)),
        }
        Ok(None)
    }

    /// What was listed as stale has come before the token after all.
    fn not_missing(&mut self, number: DeviceNumber, range: BlockRange) {
        let listed = &mut self.missing[usize::from(number.0)];
        if !self.armed && !listed.is_empty() {
            listed.remove_range(range);
        }
    }

    fn put(&mut self, device: Arc<dyn Device>, content: Content) -> Result<(), ApplyError> {
        self.run += content.bytes();
        if self.run > LONG_RUN && self.helper.is_none() {
            self.helper = Helper::start()
                .inspect_err(|error| tracing::warn!(%error, "no second thread for blocks"))
                .ok();
        }
        match &mut self.helper {
            Some(helper) if self.run > LONG_RUN => helper.put(device, content, self.armed)?,
            _ => self.spare = content.put(device.as_ref(), self.armed)?,
        }
        Ok(())
    }

    /// Waits until all blocks so far are in place.
    pub(super) fn settle(&mut self) -> Result<(), ApplyError> {
        self.run = 0;
        self.helper.as_mut().map_or(Ok(()), Helper::settle)
    }

    /// After a failure or a lost connection: what comes over the next one is put in place anew.
    pub(super) fn renew(&mut self) {
        self.run = 0;
        self.helper = None;
    }

    /// The memory of a block frame that is in place, to be used again.
    pub(super) fn take_spare(&mut self) -> Vec<u8> {
        let helpers = self.helper.as_mut().and_then(Helper::spare);
        helpers.unwrap_or_else(|| std::mem::take(&mut self.spare))
    }

    /// All lists of all devices are in: from now on blocks fill (design, I4).
    pub(super) fn arm(
        &mut self,
        demand: impl Fn(DeviceNumber, BlockRange) + Send + Sync + Clone + 'static,
    ) -> Result<(), ApplyError> {
        for (number, device) in self.devices.iter().enumerate() {
            let number = DeviceNumber(number as u8);
            let demand = demand.clone();
            let demand: Demand = Box::new(move |range| demand(number, range));
            device.arm(&self.missing[usize::from(number.0)], demand)?;
        }
        self.armed = true;
        Ok(())
    }

    /// What is missing of a group whose lists came over an earlier connection, or to an earlier runner.
    pub(super) fn armed(devices: Vec<Arc<dyn Device>>) -> Self {
        Self { armed: true, ..Self::new(devices) }
    }

    /// The devices.
    pub(super) fn devices(&self) -> &[Arc<dyn Device>] {
        &self.devices
    }

    /// Blocks still missing, over all devices.
    pub(super) fn still_missing(&self) -> u64 {
        self.devices.iter().map(|d| d.missing_blocks()).sum()
    }

    /// Everything is here: makes it durable.
    pub(super) fn complete(&self) -> Result<(), ApplyError> {
        for device in &self.devices {
            device.complete()?;
        }
        Ok(())
    }
}
