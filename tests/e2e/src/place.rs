//! A store in a folder, and the keys to it.

use silo::store::KeyRing;
use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

/// See the module. Gone with its last holder.
pub struct Place {
    folder: tempfile::TempDir,
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

impl Place {
    /// An empty store, and new keys.
    #[must_use]
    pub fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        place.new_keys();
        place
    }

    /// Puts other keys in the place of those that were there; the line that says them.
    pub fn new_keys(&self) -> String {
        let line = KeyRing::generate_line("test").unwrap();
        fs::write(self.keys(), &line).unwrap();
        fs::set_permissions(self.keys(), fs::Permissions::from_mode(0o600)).unwrap();
        line
    }

    /// Where it lies, with room beside the store.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// The file with the keys.
    #[must_use]
    pub fn keys(&self) -> PathBuf {
        self.folder.path().join("keys")
    }

    /// The store's folder; made by whoever writes first.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// The store's address.
    #[must_use]
    pub fn url(&self) -> String {
        format!("file://{}", self.store().display())
    }

    /// `--store … --keys …`.
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        vec!["--store".into(), self.url(), "--keys".into(), self.keys().display().to_string()]
    }

    /// All packs of the store.
    #[must_use]
    pub fn packs(&self) -> Vec<PathBuf> {
        let mut all = Vec::new();
        for folder in fs::read_dir(self.store().join("packs")).unwrap() {
            let files = fs::read_dir(folder.unwrap().path()).unwrap();
            all.extend(files.map(|file| file.unwrap().path()));
        }
        all
    }
}
