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

use crate::driver::{HostFacts, MachineShape};
use conduit::MachineNet;
use serde::{Deserialize, Serialize};
use silo::{block::BLOCK_SIZE, io::BlockDevice};
use std::io;

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
mod tests {
    use super::*;
    use crate::driver::{Accelerator, DiskKind};
    use proptest::prelude::*;
    use silo::source::MemoryDevice;

    fn description() -> Description {
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
        }
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
