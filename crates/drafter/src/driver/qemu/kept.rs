//! What was found out about this host and is kept for later runners, each in a file of the driver's state
//! directory. A file that is not there or broken is no answer, and is made anew.

use serde::{Serialize, de::DeserializeOwned};
use std::{
    fs,
    io::{self, Write as _},
    path::Path,
};

/// What the file says, if it says something of this kind.
pub(super) fn read<T: DeserializeOwned>(place: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(place).ok()?).ok()
}

/// Puts a whole new file there, with its folder.
pub(super) fn write(place: &Path, value: &impl Serialize) -> io::Result<()> {
    let folder = place.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&serde_json::to_vec_pretty(value)?)?;
    file.persist(place).map_err(|error| error.error)?;
    Ok(())
}
