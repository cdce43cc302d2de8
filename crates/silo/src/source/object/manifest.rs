//! Manifests as bytes: which generation of which block is part of the device.

use crate::{geometry::Geometry, source::SourceError};
use bytes::{BufMut, Bytes, BytesMut};
use std::path::Path;
use twox_hash::XxHash3_64;

const MANIFEST_MAGIC: &[u8; 8] = b"SILOOBJ\0";
const VERSION: u32 = 1;
/// Magic, version, block size, size, nonce, number of entries.
const MANIFEST_HEAD: usize = 8 + 4 + 4 + 8 + 16 + 8;
/// Where the nonce of the writer is.
const NONCE_AT: usize = 24;
const ENTRY: usize = 12;
/// The most blocks: an index of them is written at each flush.
pub(super) const MAX_BLOCKS: u64 = 1 << 22;
/// Length of the longest manifest.
pub(super) const MANIFEST_BYTES: u64 = MANIFEST_HEAD as u64 + MAX_BLOCKS * ENTRY as u64 + 8;

/// What a manifest says.
pub(super) struct Manifest {
    pub(super) geometry: Geometry,
    /// Per block that was ever written.
    pub(super) generations: Vec<(u32, u64)>,
}

impl Manifest {
    pub(super) fn encode(&self, nonce: &[u8; 16]) -> Bytes {
        let mut bytes = BytesMut::with_capacity(MANIFEST_HEAD + self.generations.len() * ENTRY + 8);
        bytes.put_slice(MANIFEST_MAGIC);
        bytes.put_u32_le(VERSION);
        bytes.put_u32_le(self.geometry.block() as u32);
        bytes.put_u64_le(self.geometry.bytes());
        bytes.put_slice(nonce);
        bytes.put_u64_le(self.generations.len() as u64);
        for (block, generation) in &self.generations {
            bytes.put_u32_le(*block);
            bytes.put_u64_le(*generation);
        }
        let sum = XxHash3_64::oneshot(&bytes);
        bytes.put_u64_le(sum);
        bytes.freeze()
    }

    /// The nonce in the bytes of a manifest: whose it is.
    pub(super) fn nonce_of(bytes: &[u8]) -> Option<&[u8]> {
        bytes.get(NONCE_AT..NONCE_AT + 16)
    }

    pub(super) fn decode(bytes: &[u8], path: &Path) -> Result<Self, SourceError> {
        let corrupt = |detail: &str| SourceError::Corrupt {
            path: path.to_owned(),
            at: 0,
            detail: detail.to_owned(),
        };
        let u64_at = |at: usize| {
            u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes were sliced"))
        };
        let u32_at = |at: usize| {
            u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes were sliced"))
        };
        if bytes.len() < MANIFEST_HEAD + 8 || bytes[..8] != *MANIFEST_MAGIC {
            return Err(corrupt("this is not the manifest of a device"));
        }
        if u32_at(8) != VERSION {
            let (found, known) = (u32_at(8), VERSION);
            return Err(SourceError::Version { path: path.to_owned(), found, known });
        }
        let body = &bytes[..bytes.len() - 8];
        if XxHash3_64::oneshot(body) != u64_at(body.len()) {
            return Err(corrupt("its checksum does not match"));
        }
        let geometry = Geometry::new(u64_at(16), u32_at(12))?;
        let entries = &body[MANIFEST_HEAD..];
        if geometry.blocks() > MAX_BLOCKS
            || u64_at(40).checked_mul(ENTRY as u64) != Some(entries.len() as u64)
        {
            return Err(corrupt("it is not as long as it says"));
        }
        let mut generations = Vec::with_capacity(entries.len() / ENTRY);
        for at in (MANIFEST_HEAD..body.len()).step_by(ENTRY) {
            let (block, generation) = (u32_at(at), u64_at(at + 4));
            if u64::from(block) >= geometry.blocks() || generation == 0 {
                return Err(corrupt("it lists a block that is not there"));
            }
            generations.push((block, generation));
        }
        Ok(Self { geometry, generations })
    }
}

/// Reads any bytes as a manifest; for a fuzzer.
pub(crate) fn fuzz_manifest(bytes: &[u8]) {
    let _ = Manifest::decode(bytes, Path::new("fuzz"));
}
