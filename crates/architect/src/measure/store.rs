//! A store in a folder for one run, and its keys.

use drafter::runner::api::{BackupRequest, Secret};
use std::{fs, io, os::unix::fs::PermissionsExt as _, path::PathBuf};

/// Secrets of nobody: the store goes with this run.
const KEYS: &str = "bench 5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a";

/// A store that goes when it is dropped.
pub(super) struct LocalStore(tempfile::TempDir);

impl LocalStore {
    pub(super) fn new() -> io::Result<Self> {
        let this = Self(tempfile::tempdir()?);
        fs::write(this.keys(), format!("{KEYS}\n"))?;
        fs::set_permissions(this.keys(), fs::Permissions::from_mode(0o600))?;
        Ok(this)
    }

    /// Its address.
    pub(super) fn url(&self) -> String {
        format!("file://{}", self.0.path().join("store").display())
    }

    /// The file with its keys.
    pub(super) fn keys(&self) -> PathBuf {
        self.0.path().join("keys")
    }

    /// One backup to it.
    pub(super) fn backup(&self, line: &str) -> BackupRequest {
        BackupRequest {
            store: self.url(),
            line: line.to_owned(),
            keys: Secret(KEYS.to_owned()),
            keys_from: "the benchmark".into(),
            environment: Vec::new(),
            every_ms: None,
            label: String::new(),
            keep: None,
        }
    }
}
