//! Putting blocks in place at the destination: before the token by overwriting, after it by
//! filling what is missing.

use crate::migrate::protocol::{DeviceNumber, Frame};
use silo::{
    block::{BlockRange, BlockSet},
    device::{Demand, Device, DeviceError},
};
use std::sync::Arc;

/// Why a frame could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The device refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The peer broke the rules.
    #[error("the source sent something that does not fit: {0}")]
    Peer(String),
}

/// The group at the destination, and how far it is.
pub(super) struct Applier {
    devices: Vec<Arc<dyn Device>>,
    missing: Vec<BlockSet>,
    armed: bool,
    spare: Vec<u8>,
}

impl Applier {
    /// Nothing has arrived.
    pub(super) fn new(devices: Vec<Arc<dyn Device>>) -> Self {
        let missing = devices.iter().map(|d| BlockSet::new(d.blocks())).collect();
        Self { devices, missing, armed: false, spare: Vec::new() }
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
                let range = BlockRange::new(start.0, (data.len() / silo::block::BLOCK_SIZE) as u64);
                let device = self.device(number, range)?;
                if self.armed {
                    device.fill(start, &data)?;
                } else {
                    device.store(start, &data)?;
                }
                self.spare = data;
            }
            Frame::Zero { device: number, range } => {
                let device = self.device(number, range)?;
                if self.armed {
                    device.fill_zero(range)?;
                } else {
                    device.store_zero(range)?;
                }
            }
            Frame::Missing { device: number, ranges } => {
                if self.armed {
                    return Err(ApplyError::Peer(
                        "a list of missing blocks after the token".into(),
                    ));
                }
                for range in ranges {
                    self.device(number, range)?;
                    self.missing[usize::from(number.0)].insert_range(range);
                }
            }
            other => return Ok(Some(other)),
        }
        Ok(None)
    }

    /// The memory of the last block frame, to be used again.
    pub(super) fn take_spare(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.spare)
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
