//! The device `machine` of a generation: what the machine is, and its driver's state.
//!
//! ```text
//!   0   "drafter" 1          8 bytes
//!   8   length of the JSON   u64, little endian
//!  16   length of the state  u64, little endian
//!  24   JSON                 [`Description`]
//!   …   state                from the next multiple of 4096 on
//! ```
//!
//! The device has one size for all machines ([`DEVICE_BYTES`]), so that a group keeps its shape; what
//! is not used is zeros and costs nothing. Every length that is read is bounded by that size.

use super::fill::FirstTouches;
use crate::driver::{HostFacts, MachineShape};
use conduit::MachineNet;
use serde::{Deserialize, Serialize};
use silo::{
    block::{BLOCK_SIZE, BlockRange, BlockSet},
    io::BlockDevice,
    order::touch::Manifest,
};
use std::{collections::BTreeMap, fmt::Write as _, io};

/// Size of the device, in bytes.
pub const DEVICE_BYTES: u64 = 64 << 20;
const MAGIC: [u8; 8] = *b"drafter\x01";
const HEAD: u64 = 24;

/// What a machine is, wherever it is saved: all that is not memory, disks and device state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Description {
    /// The machine.
    pub shape: MachineShape,
    /// The host that it ran on.
    pub facts: HostFacts,
    /// Identity of its package.
    pub package: String,
    /// The package's name, for people.
    pub package_name: String,
    /// Its network.
    pub network: Option<MachineNet>,
    /// Its lease at that moment, as the store has it.
    pub lease: String,
    /// When it was, by its host's `CLOCK_BOOTTIME`, in nanoseconds; 0 if that is not known. Compared with
    /// nothing of another host.
    #[serde(default)]
    pub paused_at_ns: u64,
    /// The newest sign of life of its owner at that moment, if it is protected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beat: Option<LifeSign>,
    /// What its last start from a store touched first, by device of the generation: each a manifest of
    /// silo's, as hexadecimal digits. A hint, which older versions neither write nor read.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub first_touch: BTreeMap<String, String>,
    /// Of disks of which the generation has only what differs from the package: the blocks that it has,
    /// as (first, count). The others are whole in it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub overlays: BTreeMap<String, Vec<(u64, u64)>>,
    /// The machine was suspended as this: it runs nowhere for as long as `lease` is the newest record.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspended: bool,
}

/// Which renewal of which life of a beat, and how it stood with it. Times are of the owner's clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LifeSign {
    /// The life.
    pub life: u64,
    /// The renewal.
    pub serial: u64,
    /// Whose beat it is; a machine that moves has another's. Older versions do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<String>,
    /// How long it had been in the store then, microseconds, at least.
    #[serde(default)]
    pub age_us: u64,
    /// How often it is renewed, microseconds; 0 if that is not known.
    #[serde(default)]
    pub every_us: u64,
}

impl Description {
    /// The device of the generation that has a disk.
    #[must_use]
    pub fn disk_device(&self, disk: &str) -> String {
        match self.overlays.contains_key(disk) {
            true => super::overlay_device(disk),
            false => super::disk_device(disk),
        }
    }

    /// The blocks of a disk of `blocks` that the generation has; the others are the package's.
    ///
    /// # Errors
    /// If it lists blocks beyond the disk's end.
    pub fn held(&self, disk: &str, blocks: u64) -> Result<BlockSet, DescriptionError> {
        let Some(ranges) = self.overlays.get(disk) else { return Ok(BlockSet::full(blocks)) };
        let mut held = BlockSet::new(blocks);
        for (start, count) in ranges {
            let end = start.checked_add(*count).filter(|end| *end <= blocks);
            end.ok_or_else(|| {
                DescriptionError::Foreign(format!(
                    "it lists blocks beyond the end of disk \"{disk}\""
                ))
            })?;
            held.insert_range(BlockRange::new(*start, *count));
        }
        Ok(held)
    }

    /// Keeps what a start touched first.
    pub fn set_first_touches(&mut self, touches: &FirstTouches) {
        self.first_touch = first_touch_text(touches);
    }

    /// What is kept of that; what cannot be read is left out.
    #[must_use]
    pub fn first_touches(&self) -> FirstTouches {
        first_touches_of(&self.first_touch)
    }
}

/// What a start touched first, as [`Description::first_touch`] has it.
#[must_use]
pub fn first_touch_text(touches: &FirstTouches) -> BTreeMap<String, String> {
    let hex = |bytes: Vec<u8>| {
        bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
            // It never fails for a string.
            let _ = write!(text, "{byte:02x}");
            text
        })
    };
    touches.iter().map(|(name, manifest)| (name.clone(), hex(manifest.encode()))).collect()
}

/// The reverse; what cannot be read is left out.
#[must_use]
pub fn first_touches_of(text: &BTreeMap<String, String>) -> FirstTouches {
    let bytes = |text: &str| -> Option<Vec<u8>> {
        let pairs = text.as_bytes().chunks(2);
        pairs.map(|pair| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok()).collect()
    };
    let manifest = |text: &str| Manifest::decode(&bytes(text)?).ok();
    text.iter().filter_map(|(name, text)| Some((name.clone(), manifest(text)?))).collect()
}

/// A device that does not describe a machine.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    /// It cannot be read.
    #[error("what the machine is could not be read from its generation: {0}")]
    Read(#[from] io::Error),
    /// It is no machine's.
    #[error("this is no generation of a machine: {0}")]
    Foreign(String),
    /// Too much of it.
    #[error(
        "the machine's device state and description take {bytes} bytes; a generation has room for \
         {DEVICE_BYTES}"
    )]
    TooLarge {
        /// What they take.
        bytes: u64,
    },
}

fn state_offset(json: u64) -> u64 {
    (HEAD + json).next_multiple_of(BLOCK_SIZE as u64)
}

/// The beginning of the device, in whole blocks; the rest of it is zeros.
///
/// # Errors
/// If it does not fit.
pub fn encode(description: &Description, state: &[u8]) -> Result<Vec<u8>, DescriptionError> {
    let json = serde_json::to_vec(description).map_err(io::Error::from)?;
    let offset = state_offset(json.len() as u64);
    let bytes = (offset + state.len() as u64).next_multiple_of(BLOCK_SIZE as u64);
    if bytes > DEVICE_BYTES {
        return Err(DescriptionError::TooLarge { bytes });
    }
    let mut device = vec![0; bytes as usize];
    device[..8].copy_from_slice(&MAGIC);
    device[8..16].copy_from_slice(&(json.len() as u64).to_le_bytes());
    device[16..24].copy_from_slice(&(state.len() as u64).to_le_bytes());
    device[HEAD as usize..HEAD as usize + json.len()].copy_from_slice(&json);
    device[offset as usize..offset as usize + state.len()].copy_from_slice(state);
    Ok(device)
}

/// Reads a device: the machine, and its driver's state.
///
/// # Errors
/// If it cannot be read or is no machine's.
pub fn decode(device: &dyn BlockDevice) -> Result<(Description, Vec<u8>), DescriptionError> {
    let foreign = |what: &str| DescriptionError::Foreign(what.to_owned());
    let size = device.size().min(DEVICE_BYTES);
    let mut head = [0; HEAD as usize];
    if size < HEAD {
        return Err(foreign("its description is cut off"));
    }
    device.read_at(0, &mut head)?;
    if head[..7] != MAGIC[..7] {
        return Err(foreign("its description does not begin as one of drafter's"));
    }
    if head[7] != MAGIC[7] {
        return Err(DescriptionError::Foreign(format!(
            "its description has version {}, this drafter reads version {}",
            head[7], MAGIC[7]
        )));
    }
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&head[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let (json, state) = (word(8), word(16));
    let fits = json <= size && state <= size && state_offset(json) + state <= size;
    if !fits {
        return Err(foreign("its description says that it is longer than there is room"));
    }
    let mut text = vec![0; json as usize];
    device.read_at(HEAD, &mut text)?;
    let description = serde_json::from_slice(&text)
        .map_err(|error| DescriptionError::Foreign(format!("its description: {error}")))?;
    let mut bytes = vec![0; state as usize];
    device.read_at(state_offset(json), &mut bytes)?;
    Ok((description, bytes))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::driver::{Accelerator, DiskKind};
    use proptest::prelude::*;
    use silo::source::MemoryDevice;

    pub(crate) fn description() -> Description {
        Description {
            shape: MachineShape {
                name: "m".into(),
                machine_type: "microvm".into(),
                vcpus: 2,
                memory_bytes: 64 << 20,
                command_line: "console=ttyS0".into(),
                network: None,
                disks: vec!["root".into()],
                disk_kind: DiskKind::VhostUserBlk,
                tsc_khz: 2_000_000,
            },
            facts: HostFacts {
                driver: "qemu 7.2.0".into(),
                accelerator: Accelerator::Tcg,
                tsc_khz: 2_000_000,
                cpu_features: vec![],
            },
            package: "0".repeat(64),
            package_name: "redis".into(),
            network: None,
            lease: "a lease".into(),
            paused_at_ns: 5,
            beat: Some(LifeSign {
                life: 2,
                serial: 7,
                of: Some("a/m".to_owned()),
                age_us: 5,
                every_us: 250_000,
            }),
            first_touch: BTreeMap::new(),
            overlays: BTreeMap::new(),
            suspended: false,
        }
    }

    #[test]
    fn a_disk_is_whole_or_what_differs_and_blocks_beyond_its_end_are_refused() {
        let mut kept = description();
        kept.overlays.insert("root".into(), vec![(3, 2), (9, 1)]);
        kept.suspended = true;
        let (read, _) = decode(&device(&encode(&kept, b"state").unwrap())).unwrap();
        assert!(read.suspended);
        assert_eq!(read.disk_device("root"), "overlay-root");
        let held: Vec<_> = read.held("root", 10).unwrap().ranges().map(|r| r.start.0).collect();
        assert_eq!(held, [3, 9]);
        assert!(read.held("root", 9).is_err());
        assert_eq!(read.disk_device("data"), "disk-data");
        assert_eq!(read.held("data", 9).unwrap(), BlockSet::full(9));
        for bad in [(u64::MAX, 2), (11, 0)] {
            kept.overlays.insert("root".into(), vec![bad]);
            assert!(kept.held("root", 10).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_was_touched_first_is_kept_and_what_is_no_order_is_left_out() {
        let order = vec![BlockRange::new(9, 2), BlockRange::new(1, 1)];
        let touches = BTreeMap::from([("memory".to_owned(), Manifest { blocks: 4096, order })]);
        let mut kept = description();
        kept.set_first_touches(&touches);
        let (mut read, _) = decode(&device(&encode(&kept, b"state").unwrap())).unwrap();
        assert_eq!(read.first_touches(), touches);
        for bad in ["", "0", "zz", "53", "é", "534c465401ff"] {
            read.first_touch.insert("disk-root".into(), bad.into());
            assert_eq!(read.first_touches(), touches, "{bad}");
        }
        // As older versions wrote it.
        let (old, _) = decode(&device(&encode(&description(), b"state").unwrap())).unwrap();
        assert_eq!(old.first_touches(), FirstTouches::new());
    }

    fn device(content: &[u8]) -> MemoryDevice {
        let device = MemoryDevice::new("machine", DEVICE_BYTES).unwrap();
        device.write_at(0, content).unwrap();
        device
    }

    #[test]
    fn a_machine_is_read_as_it_was_written_whatever_the_length_of_its_state() {
        for length in [0, 1, 4095, 4096, 4097, 193_000] {
            let state: Vec<u8> = (0..length).map(|at| at as u8 | 1).collect();
            let bytes = encode(&description(), &state).unwrap();
            assert_eq!(bytes.len() % 4096, 0);
            let (read, state_read) = decode(&device(&bytes)).unwrap();
            assert_eq!(state_read, state);
            assert_eq!(read.shape, description().shape);
            assert_eq!(read.lease, "a lease");
        }
        let most = vec![1; DEVICE_BYTES as usize];
        let refused = encode(&description(), &most).unwrap_err();
        assert!(matches!(refused, DescriptionError::TooLarge { .. }), "{refused}");
    }

    #[test]
    fn another_version_is_refused_by_its_number_and_what_is_none_by_what_is_wrong() {
        let good = encode(&description(), b"state").unwrap();
        let refusal = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            decode(&device(&bytes)).unwrap_err().to_string()
        };
        assert!(refusal(&|bytes| bytes[7] = 2).contains("version 2"));
        assert!(refusal(&|bytes| bytes[0] = b'x').contains("does not begin"));
        let long = DEVICE_BYTES.to_le_bytes();
        assert!(refusal(&|b| b[16..24].copy_from_slice(&long)).contains("longer than"));
        assert!(refusal(&|b| b[8..16].copy_from_slice(&[0xff; 8])).contains("longer than"));
        assert!(refusal(&|bytes| bytes[30] = b'}').contains("its description:"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read_without_a_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..2000),
            begins_well: bool,
        ) {
            if begins_well && bytes.len() > 8 {
                bytes[..8].copy_from_slice(&MAGIC);
            }
            let _ = decode(&device(&bytes));
        }
    }
}
