//! Whether anybody has touched devices since a process ended in order that had them.
//!
//! Beside the note stands what their files looked like then: inode, length, times. What must hold: it
//! is believed once, by the next process that opens them, and not at all if anything differs.

use crate::config::Config;
use anyhow::{Context, Result};
use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

fn file(note: &Path) -> PathBuf {
    let mut name = note.as_os_str().to_owned();
    name.push(".rest");
    name.into()
}

/// What the files of all devices that move look like; none if one is kept elsewhere.
fn look(config: &Config) -> Option<String> {
    let group = config.migrate.as_ref()?.group.as_deref();
    let (_, mut names) = config.members(group)?;
    names.sort();
    let mut hasher = blake3::Hasher::new();
    for name in names {
        hasher.update(name.as_bytes());
        add(&mut hasher, config.device.get(&name)?.place()?).ok()?;
    }
    Some(hasher.finalize().to_hex().to_string())
}

fn add(hasher: &mut blake3::Hasher, path: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(path)?;
    hasher.update(path.as_os_str().as_encoded_bytes());
    let times = [found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()];
    for number in [found.ino() as i64, found.size() as i64].into_iter().chain(times) {
        hasher.update(&number.to_le_bytes());
    }
    if found.is_dir() {
        let mut inside: Vec<PathBuf> =
            fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
        inside.sort();
        inside.iter().try_for_each(|path| add(hasher, path))?;
    }
    Ok(())
}

/// Keeps what the files look like now, for the next process.
pub(super) fn keep(config: &Config, note: &Path) -> Result<()> {
    let (Some(look), path) = (look(config), file(note)) else { return Ok(()) };
    fs::write(&path, look).with_context(|| format!("could not write {}", path.display()))
}

/// Whether the files look as they did then. Asked once: whoever asks may change them.
pub(super) fn holds(config: &Config, note: &Path) -> bool {
    let path = file(note);
    let then = fs::read_to_string(&path).ok();
    let gone = fs::remove_file(&path).is_ok();
    gone && then.is_some() && then == look(config)
}
