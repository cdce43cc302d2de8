//! Files as the journals and overlays see them: a folder of named files that are written, synced,
//! renamed. The real one calls the kernel; the simulated one (tests) keeps what was not synced
//! apart, and after a crash tears it and brings it out of order.

mod real;
#[cfg(test)]
pub(crate) mod sim;
mod sys;

pub(crate) use real::{RealFolder, lock, try_lock};
pub(crate) use sys::{extents_of, is_unsupported, read_cached};

use std::{io, path::Path, sync::Arc};

/// An open file. Methods may be called from several threads.
pub(crate) trait Stored: Send + Sync {
    /// Fills `buf` from `offset`.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// As [`Stored::read_at`], of what is in memory anyway; false if it is not.
    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        self.read_at(buf, offset).map(|()| true)
    }

    /// Writes all of `data`; the file grows if it must.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Cuts or grows the file.
    fn set_len(&self, bytes: u64) -> io::Result<()>;

    /// Makes content and length durable.
    fn sync(&self) -> io::Result<()>;

    /// Gives room back; the bytes read as zeros.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Zeros that hold room: a later write there does not fail for lack of it.
    fn allocate_zeros(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Room that the content takes, in bytes.
    fn allocated(&self) -> io::Result<u64>;
}

/// An open folder.
pub(crate) trait Folder: Send + Sync {
    /// Where it is, for messages.
    fn path(&self) -> &Path;

    /// Makes a file, or empties the one of that name.
    fn create(&self, name: &str) -> io::Result<Arc<dyn Stored>>;

    /// Opens a file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Arc<dyn Stored>>;

    /// Gives a file another name, replacing what has it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// The names of all files.
    fn names(&self) -> io::Result<Vec<String>>;

    /// Makes names durable.
    fn sync(&self) -> io::Result<()>;
}

/// The folder that a path is in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// The whole content of a file of at most `limit` bytes; `None` if there is no file.
pub(crate) fn read_whole(
    folder: &dyn Folder,
    name: &str,
    limit: u64,
) -> io::Result<Option<Vec<u8>>> {
    let file = match folder.open(name) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let length = file.len()?;
    if length > limit {
        let text = format!("{length} bytes, at most {limit} are expected");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    let mut bytes = vec![0; length as usize];
    file.read_at(&mut bytes, 0)?;
    Ok(Some(bytes))
}

/// Replaces a file as a whole or not at all; durable on return.
pub(crate) fn replace(folder: &dyn Folder, name: &str, bytes: &[u8]) -> io::Result<()> {
    let fresh = format!("{name}.new");
    let file = folder.create(&fresh)?;
    file.write_at(bytes, 0)?;
    file.sync()?;
    folder.rename(&fresh, name)?;
    folder.sync()
}
