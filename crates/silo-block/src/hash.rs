//! BLAKE3 root hashes of devices: the name of a base in a package's manifest, and the check that
//! two hosts hold the same bytes. The hash is plain BLAKE3 over the content, as `b3sum` prints it.

use crate::{
    block::{BLOCK_SIZE, BlockIndex},
    device::{self, Device},
};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{
    fmt,
    io::{self, Read},
    path::Path,
    str::FromStr,
};

/// The BLAKE3 hash of a device's whole content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootHash([u8; 32]);

impl RootHash {
    /// The raw bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for RootHash {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for RootHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RootHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RootHash({self})")
    }
}

/// A text that is not a root hash.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a root hash is 64 hexadecimal digits")]
pub struct NotAHash;

impl FromStr for RootHash {
    type Err = NotAHash;

    fn from_str(text: &str) -> Result<Self, NotAHash> {
        let hash = blake3::Hash::from_hex(text).map_err(|_| NotAHash)?;
        Ok(Self(*hash.as_bytes()))
    }
}

impl Serialize for RootHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RootHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The hash of a file, on all processors. The file is mapped: it must not be cut while this runs.
///
/// # Errors
/// Those of opening, mapping and reading the file.
pub fn hash_file(path: &Path) -> io::Result<RootHash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_mmap_rayon(path)?;
    Ok(RootHash(*hasher.finalize().as_bytes()))
}

/// The hash of everything that `reader` yields.
///
/// # Errors
/// Those of the reader.
pub fn hash_reader(reader: impl Read) -> io::Result<RootHash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(reader)?;
    Ok(RootHash(*hasher.finalize().as_bytes()))
}

/// The hash of a device's content as it is now, to its size in blocks.
///
/// # Errors
/// If a block cannot be read, for example because it has not arrived here yet.
pub fn hash_device(device: &dyn Device) -> device::Result<RootHash> {
    const CHUNK: u64 = 256;
    let mut hasher = blake3::Hasher::new();
    let mut buf = vec![0; CHUNK as usize * BLOCK_SIZE];
    let mut at = 0;
    while at < device.blocks() {
        let count = CHUNK.min(device.blocks() - at);
        let part = &mut buf[..count as usize * BLOCK_SIZE];
        device.read(BlockIndex(at), part)?;
        hasher.update(part);
        at += count;
    }
    Ok(RootHash(*hasher.finalize().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_and_a_reader_with_the_same_bytes_have_the_hash_that_blake3_publishes() {
        // Test vector of BLAKE3 for 3 bytes 0, 1, 2.
        let known = "e1be4d7a8ab5560aa4199eea339849ba8e293d55ca0a81006726d184519e647f";
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0, 1, 2]).unwrap();
        let hash = hash_file(file.path()).unwrap();
        assert_eq!(hash.to_string(), known);
        assert_eq!(hash_reader(&[0u8, 1, 2][..]).unwrap(), hash);
    }

    #[test]
    fn a_hash_survives_text_and_json_and_nothing_else_parses() {
        let hash = hash_reader(&b"x"[..]).unwrap();
        let json = serde_json::to_string(&hash).unwrap();
        assert_eq!(json, format!("\"{hash}\""));
        assert_eq!(serde_json::from_str::<RootHash>(&json).unwrap(), hash);
        for bad in ["", "12", &"g".repeat(64), &"0".repeat(65)] {
            assert!(bad.parse::<RootHash>().is_err(), "{bad}");
        }
    }
}
