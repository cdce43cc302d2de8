//! The fault connection at the destination: demands go out, their answers are put in place.
//!
//! Demands outlive a connection: the devices ask once, so what was asked and has not come is asked
//! again over the next one.

use super::{Door, lock};
use crate::{
    driver::Urgent,
    migrate::{
        link::{Incoming, Outgoing},
        protocol::{DeviceNumber, Frame},
    },
};
use silo::{
    block::{BLOCK_SIZE, BlockRange, BlockSet},
    device::{Demand, Device},
};
use std::{
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

/// What is waited for, and where it is asked for.
pub struct Demands {
    devices: Vec<Arc<dyn Device>>,
    place: Mutex<Place>,
}

struct Place {
    to: Option<Outgoing>,
    asked: Vec<BlockSet>,
}

impl Demands {
    /// For a group of devices, over a connection if there is one.
    #[must_use]
    pub fn new(devices: &[Arc<dyn Device>], to: Option<Outgoing>) -> Arc<Self> {
        let asked = devices.iter().map(|device| BlockSet::new(device.blocks())).collect();
        Arc::new(Self { devices: devices.to_vec(), place: Mutex::new(Place { to, asked }) })
    }

    /// What device number `device` calls for a block.
    #[must_use]
    pub fn of(self: &Arc<Self>, device: DeviceNumber) -> Demand {
        let demands = Arc::clone(self);
        Box::new(move |range| demands.ask(device, range))
    }

    pub(crate) fn ask(&self, device: DeviceNumber, range: BlockRange) {
        let mut place = lock(&self.place);
        if let Some(asked) = place.asked.get_mut(usize::from(device.0)) {
            asked.insert_range(range);
        }
        place.send(&[Frame::Demand { device, range }]);
    }

    /// There is a connection again: asks once more for what has not come.
    pub(super) fn connect(&self, to: Outgoing) {
        let mut place = lock(&self.place);
        place.to = Some(to);
        let mut frames = Vec::new();
        for (number, device) in self.devices.iter().enumerate() {
            let number = DeviceNumber(number as u8);
            let asked = &mut place.asked[usize::from(number.0)];
            asked.intersect_with(&device.missing());
            frames.extend(asked.ranges().map(|range| Frame::Demand { device: number, range }));
        }
        place.send(&frames);
    }

    /// Blocks of a device that somebody waits for.
    #[must_use]
    pub fn waited_for(&self, device: usize) -> BlockSet {
        let place = lock(&self.place);
        let mut waited = place.asked[device].clone();
        waited.intersect_with(&self.devices[device].missing());
        waited
    }

    pub(super) fn hang_up(&self) {
        lock(&self.place).to = None;
    }

    pub(super) fn is_connected(&self) -> bool {
        lock(&self.place).to.is_some()
    }

    fn pong(&self, nonce: u64) {
        lock(&self.place).send(&[Frame::Pong(nonce)]);
    }
}

impl Place {
    fn send(&mut self, frames: &[Frame]) {
        let Some(to) = &mut self.to else { return };
        let sent = frames.iter().try_for_each(|frame| to.write(frame)).and_then(|()| to.flush());
        if let Err(error) = sent {
            tracing::warn!(%error, "a demand could not be sent; it is asked again");
            self.to = None;
        }
    }
}

/// Answers to demands come on the fault connection; its thread ends with it.
pub(super) fn fill(
    mut from: Incoming,
    demands: &Arc<Demands>,
    door: &Arc<Door>,
) -> Option<JoinHandle<()>> {
    let (demands, door) = (Arc::clone(demands), Arc::clone(door));
    let thread = std::thread::Builder::new().name("fault-fill".into()).spawn(move || {
        // The guest waits for these blocks (design, I5).
        let _urgent = Urgent::this_thread();
        let fits = |device: DeviceNumber, range: BlockRange| {
            demands.devices.get(usize::from(device.0)).filter(|d| range.end() <= d.blocks())
        };
        while let Ok(frame) = from.read() {
            door.heard();
            let filled = match frame {
                Frame::Blocks { device, start, data } => {
                    let count = (data.len() / BLOCK_SIZE) as u64;
                    fits(device, BlockRange::new(start.0, count)).map(|d| d.fill(start, &data))
                }
                Frame::Zero { device, range } => fits(device, range).map(|d| d.fill_zero(range)),
                Frame::Ping(nonce) => {
                    demands.pong(nonce);
                    continue;
                }
                _ => continue,
            };
            match filled {
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    tracing::error!(%error, "a demanded block could not be put in place");
                    break;
                }
                None => {
                    tracing::error!("the source answered a demand with blocks that do not fit");
                    break;
                }
            }
        }
        // Without it nothing that is waited for comes: the source shall connect again.
        demands.hang_up();
        door.break_line();
    });
    thread.inspect_err(|error| tracing::error!(%error, "no thread for demanded blocks")).ok()
}
