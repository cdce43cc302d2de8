//! Reading and writing certificate files.

use crate::{Error, Result};
use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

/// Certificates and keys are a few hundred bytes; more is not one.
const MAX_BYTES: u64 = 64 * 1024;

pub(crate) fn failed<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::File { operation, path: path.to_owned(), source }
}

/// Reads a small text file; a missing one is named with a hint.
pub(crate) fn read(path: &Path, what: &'static str, hint: &'static str) -> Result<String> {
    let size = match fs::metadata(path) {
        Ok(found) => found.len(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(Error::MissingFile { what, path: path.to_owned(), hint });
        }
        Err(e) => return Err(failed("look at", path)(e)),
    };
    if size > MAX_BYTES {
        let detail = format!("it has {size} bytes");
        return Err(Error::BadFile { path: path.to_owned(), expected: what, detail });
    }
    fs::read_to_string(path).map_err(failed("read", path))
}

/// Reads a text file of at most `limit` bytes; None if there is none.
pub(crate) fn read_if_there(path: &Path, limit: u64) -> Result<Option<String>> {
    match fs::metadata(path) {
        Ok(found) if found.len() > limit => {
            let detail = format!("it has {} bytes", found.len());
            Err(Error::BadFile { path: path.to_owned(), expected: "a list", detail })
        }
        Ok(_) => fs::read_to_string(path).map(Some).map_err(failed("read", path)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("look at", path)(e)),
    }
}

/// What tells that a file is another than before: its place, size and time. None: there is none.
pub(crate) type Stamp = Option<(u64, u64, i64, i64)>;

/// The stamp of a file.
pub(crate) fn stamp(path: &Path) -> Stamp {
    let found = fs::metadata(path).ok()?;
    Some((found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
}

/// Reads a private key, and refuses one that every user of the host can read.
pub(crate) fn read_key(path: &Path, hint: &'static str) -> Result<String> {
    let text = read(path, "private key", hint)?;
    let mode = fs::metadata(path).map_err(failed("look at", path))?.permissions().mode() & 0o7777;
    if mode & 0o007 != 0 {
        return Err(Error::ExposedKey { path: path.to_owned(), mode });
    }
    Ok(text)
}

/// Writes a file so that it is either the old or the new one, never a part; durable on return.
pub(crate) fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".tmp.{}", std::process::id()));
    let part = path.with_file_name(name);
    // A leftover of a crash must not lend its mode or owner to the new file.
    match fs::remove_file(&part) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &part)(e)),
        _ => {}
    }
    let result = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&part)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&part, path)?;
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        fs::File::open(dir.unwrap_or(Path::new(".")))?.sync_all()
    })();
    result.map_err(|e| {
        let _ = fs::remove_file(&part);
        failed("write", path)(e)
    })
}

/// Makes a directory that only its owner can enter; an existing one is left as it is.
pub(crate) fn make_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed("make directory", path))
}
