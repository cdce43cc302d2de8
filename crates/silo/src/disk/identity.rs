//! Whose disk this is: a small file beside the overlay, replaced as a whole.

use super::error::DiskError;
use crate::hash::RootHash;
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

const FILE_NAME: &str = "identity.json";
const VERSION: u32 = 1;

/// What a disk belongs to. Written by whoever runs the machine; silo only keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The machine's name.
    pub machine: String,
    /// The machine's epoch under which this disk was last written: after a crash, the lease's
    /// record with a higher epoch means that this copy is stale.
    pub epoch: u64,
    /// Root hash of the base, from the package's manifest.
    pub base: Option<RootHash>,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    #[serde(flatten)]
    identity: Identity,
}

/// Reads the identity of the disk in `dir`, if one was ever set.
pub(super) fn read(dir: &Path) -> Result<Option<Identity>, DiskError> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let path = dir.join(FILE_NAME);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(DiskError::io("read", &path)(error)),
    };
    let corrupt = |error: &serde_json::Error| DiskError::Corrupt {
        path: path.clone(),
        at: 0,
        detail: error.to_string(),
    };
    let version: Version = serde_json::from_slice(&bytes).map_err(|e| corrupt(&e))?;
    if version.version != VERSION {
        return Err(DiskError::Version { path, found: version.version, known: VERSION });
    }
    let stored: Stored = serde_json::from_slice(&bytes).map_err(|e| corrupt(&e))?;
    Ok(Some(stored.identity))
}

/// Replaces the identity of the disk in `dir`, as a whole or not at all; durable on return.
pub(super) fn write(dir: &Path, identity: &Identity) -> Result<(), DiskError> {
    let path = dir.join(FILE_NAME);
    let fresh = dir.join("identity.json.new");
    let stored = Stored { version: VERSION, identity: identity.clone() };
    let bytes = serde_json::to_vec_pretty(&stored).expect("plain fields have a JSON form");
    let replace = || -> io::Result<()> {
        let mut file = File::create(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        File::open(dir)?.sync_all()
    };
    replace().map_err(DiskError::io("write", &path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_back_and_another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), None);
        let base = Some(crate::hash::hash_reader(&b"base"[..]).unwrap());
        let mut identity = Identity { machine: "m1".into(), epoch: 3, base };
        write(dir.path(), &identity).unwrap();
        identity.epoch = 4;
        write(dir.path(), &identity).unwrap();
        assert_eq!(read(dir.path()).unwrap(), Some(identity));

        let path = dir.path().join(FILE_NAME);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("\"version\": 1", "\"version\": 2")).unwrap();
        assert!(matches!(read(dir.path()), Err(DiskError::Version { found: 2, .. })));
        fs::write(&path, "{").unwrap();
        assert!(matches!(read(dir.path()), Err(DiskError::Corrupt { .. })));
    }
}
