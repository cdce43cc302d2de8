//! `stack.json`: what a stack is made of. Replaced as a whole; what it does not list is nothing.

use super::LayerError;
use crate::{
    files::{Folder, read_whole, replace},
    geometry::Geometry,
    hash::RootHash,
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

pub(super) const FILE_NAME: &str = "stack.json";
const VERSION: u32 = 1;
/// Longest manifest that is read.
const MAX_BYTES: u64 = 64 << 10;
/// The most layers.
pub(super) const MAX_LAYERS: usize = 64;

/// What is below the lowest layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BaseRecord {
    pub(super) bytes: u64,
    pub(super) root: Option<RootHash>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    version: u32,
    pub(super) bytes: u64,
    pub(super) block: u32,
    pub(super) base: Option<BaseRecord>,
    /// Lowest first; never empty.
    pub(super) layers: Vec<u64>,
    /// Number of the next layer; numbers are never used again.
    pub(super) next: u64,
    /// The newest layer of which a backup has everything, with all that is below it.
    pub(super) saved: Option<u64>,
}

impl Manifest {
    pub(super) fn new(geometry: Geometry, base: Option<BaseRecord>) -> Self {
        Self {
            version: VERSION,
            bytes: geometry.bytes(),
            block: geometry.block() as u32,
            base,
            layers: vec![1],
            next: 2,
            saved: None,
        }
    }

    pub(super) fn geometry(&self) -> Result<Geometry, LayerError> {
        Geometry::new(self.bytes, self.block).map_err(|error| LayerError::Size {
            bytes: self.bytes,
            block: self.block,
            detail: error.to_string(),
        })
    }

    fn decode(bytes: &[u8], path: &Path) -> Result<Self, LayerError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let corrupt = |detail: String| LayerError::Corrupt { path: path.to_owned(), at: 0, detail };
        let version: Version =
            serde_json::from_slice(bytes).map_err(|error| corrupt(error.to_string()))?;
        if version.version != VERSION {
            let (found, known) = (version.version, VERSION);
            return Err(LayerError::Version { path: path.to_owned(), found, known });
        }
        let manifest: Self =
            serde_json::from_slice(bytes).map_err(|error| corrupt(error.to_string()))?;
        if manifest.layers.is_empty() || manifest.layers.len() > MAX_LAYERS {
            return Err(corrupt(format!("{} layers", manifest.layers.len())));
        }
        let ascending = manifest.layers.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || manifest.layers.iter().any(|id| *id >= manifest.next) {
            return Err(corrupt("layers are out of order".to_owned()));
        }
        manifest.geometry()?;
        Ok(manifest)
    }

    /// Reads the manifest of a folder.
    pub(super) fn read(folder: &dyn Folder) -> Result<Self, LayerError> {
        let path = folder.path().join(FILE_NAME);
        let bytes =
            read_whole(folder, FILE_NAME, MAX_BYTES).map_err(LayerError::io("read", &path))?;
        let Some(bytes) = bytes else {
            return Err(LayerError::NotAStack { path: folder.path().to_owned() });
        };
        Self::decode(&bytes, &path)
    }

    /// Makes this the folder's manifest, durably, or changes nothing.
    pub(super) fn write(&self, folder: &dyn Folder) -> Result<(), LayerError> {
        let bytes = serde_json::to_vec_pretty(self).expect("plain fields have a JSON form");
        let path = folder.path().join(FILE_NAME);
        replace(folder, FILE_NAME, &bytes).map_err(LayerError::io("replace", &path))
    }
}

/// Reads any bytes as a manifest; for a fuzzer.
pub(crate) fn fuzz_manifest(bytes: &[u8]) {
    let _ = Manifest::decode(bytes, Path::new(FILE_NAME));
}

/// What a stack is, without opening it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StackInfo {
    /// The folder.
    pub path: PathBuf,
    /// Size of the device in bytes.
    pub bytes: u64,
    /// Size of a block in bytes.
    pub block: u32,
    /// Bytes of its base; none if it lies over nothing.
    pub base_bytes: Option<u64>,
    /// Root hash that the base must have.
    pub base_root: Option<RootHash>,
    /// How many layers.
    pub layers: usize,
}

impl StackInfo {
    pub(super) fn of(manifest: &Manifest, path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            bytes: manifest.bytes,
            block: manifest.block,
            base_bytes: manifest.base.map(|base| base.bytes),
            base_root: manifest.base.and_then(|base| base.root),
            layers: manifest.layers.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_has_these_bytes_and_nonsense_is_refused_by_name() {
        let geometry = Geometry::new(10_000, 512).unwrap();
        let manifest = Manifest::new(geometry, Some(BaseRecord { bytes: 77, root: None }));
        let text = serde_json::to_string(&manifest).unwrap();
        assert_eq!(
            text,
            r#"{"version":1,"bytes":10000,"block":512,"base":{"bytes":77,"root":null},"layers":[1],"next":2,"saved":null}"#
        );
        let read = |text: &str| Manifest::decode(text.as_bytes(), Path::new("stack.json"));
        assert_eq!(read(&text).unwrap(), manifest);
        let newer = text.replace("\"version\":1", "\"version\":2");
        assert!(matches!(read(&newer), Err(LayerError::Version { found: 2, .. })));
        for (from, to) in [("[1]", "[]"), ("[1]", "[2,1]"), ("[1]", "[1,1]"), ("[1]", "[5]")] {
            let error = read(&text.replace(from, to)).unwrap_err();
            assert!(matches!(error, LayerError::Corrupt { .. }), "{to}: {error}");
        }
        assert!(matches!(read(&text.replace("512", "513")), Err(LayerError::Size { .. })));
        assert!(read("{").is_err());
    }
}
