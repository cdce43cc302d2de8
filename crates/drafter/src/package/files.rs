//! Files with holes: hashing, copying and writing them without filling the holes.

use super::error::{Attempt, PackageError, Result};
use super::manifest::Blake3;
use nix::fcntl::{FallocateFlags, fallocate};
use silo::block::{BLOCK_SIZE, is_zero};
use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::Path,
};

const CHUNK: usize = 1 << 20;

/// Opens a file for reading.
pub(crate) fn open(path: &Path) -> Result<File> {
    File::open(path).attempt(|| format!("opening {}", path.display()))
}

/// Makes a file that must not exist yet.
pub(crate) fn create(path: &Path) -> Result<File> {
    File::create_new(path).attempt(|| format!("creating {}", path.display()))
}

/// Makes a directory and its parents.
pub(crate) fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).attempt(|| format!("creating directory {}", path.display()))
}

/// Reads a whole file of at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    open(path)?
        .take(limit + 1)
        .read_to_end(&mut content)
        .attempt(|| format!("reading {}", path.display()))?;
    if content.len() as u64 > limit {
        return Err(PackageError::TooLarge {
            what: path.display().to_string(),
            found: fs::metadata(path).map_or(limit + 1, |facts| facts.size()),
            limit,
            hint: "this is not the file it should be".to_owned(),
        });
    }
    Ok(content)
}

/// Writes a file by way of a temporary one beside it, so that a reader sees the old or the new
/// content and never a part.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let attempt = || format!("writing {}", path.display());
    let mut file = tempfile::NamedTempFile::new_in(dir).attempt(attempt)?;
    file.write_all(content).attempt(attempt)?;
    file.persist(path).map_err(|error| error.error).attempt(attempt)?;
    Ok(())
}

/// BLAKE3 and length of a file.
pub(crate) fn hash_file(path: &Path) -> Result<(Blake3, u64)> {
    let mut file = open(path)?;
    hash_reader(&mut file).attempt(|| format!("reading {}", path.display()))
}

/// BLAKE3 and length of what a reader yields.
pub(crate) fn hash_reader(reader: &mut dyn Read) -> io::Result<(Blake3, u64)> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        let count = read_full(reader, &mut buffer)?;
        if count == 0 {
            return Ok((hasher.finalize().into(), bytes));
        }
        hasher.update_rayon(&buffer[..count]);
        bytes += count as u64;
    }
}

/// Reads until the buffer is full or the reader ends.
pub(crate) fn read_full(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut count = 0;
    while count < buffer.len() {
        match reader.read(&mut buffer[count..]) {
            Ok(0) => break,
            Ok(read) => count += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

/// Which side of a copy failed.
pub(crate) enum CopyError {
    /// The source, which may be damaged.
    Read(io::Error),
    /// The target.
    Write(io::Error),
}

/// Copies what a reader yields into an empty file, leaving holes where it is zero, and returns
/// hash and length. Reads at most `limit` bytes.
pub(crate) fn write_sparse(
    reader: &mut dyn Read,
    target: &mut File,
    limit: u64,
) -> Result<(Blake3, u64), CopyError> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    let mut at = 0u64;
    while at < limit {
        let want = CHUNK.min(usize::try_from(limit - at).unwrap_or(CHUNK));
        let count = read_full(reader, &mut buffer[..want]).map_err(CopyError::Read)?;
        if count == 0 {
            break;
        }
        hasher.update_rayon(&buffer[..count]);
        for block in buffer[..count].chunks(BLOCK_SIZE) {
            if !is_zero(block) {
                target
                    .seek(SeekFrom::Start(at))
                    .and_then(|_| target.write_all(block))
                    .map_err(CopyError::Write)?;
            }
            at += block.len() as u64;
        }
    }
    target.set_len(at).map_err(CopyError::Write)?;
    Ok((hasher.finalize().into(), at))
}

/// Copies a file, holes included.
pub(crate) fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let attempt = || format!("copying {} to {}", from.display(), to.display());
    let source = open(from)?;
    let mut target = create(to)?;
    let length = source.metadata().attempt(attempt)?.len();
    target.set_len(length).attempt(attempt)?;
    for (start, end) in data_ranges(&source, length).attempt(attempt)? {
        let mut reader = &source;
        reader.seek(SeekFrom::Start(start)).attempt(attempt)?;
        target.seek(SeekFrom::Start(start)).attempt(attempt)?;
        io::copy(&mut reader.take(end - start), &mut target).attempt(attempt)?;
    }
    Ok(())
}

/// Gives the zero blocks of a file back to the file system and hashes it in the same pass.
pub(crate) fn dig_holes(path: &Path) -> Result<Blake3> {
    let attempt = || format!("digging holes into {}", path.display());
    let mut file = File::options().read(true).write(true).open(path).attempt(attempt)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    let mut at = 0u64;
    loop {
        let count = read_full(&mut file, &mut buffer).attempt(attempt)?;
        if count == 0 {
            return Ok(hasher.finalize().into());
        }
        hasher.update_rayon(&buffer[..count]);
        let mut zeros = 0u64;
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let dig = |end: u64, length: u64| match length {
            0 => Ok(()),
            _ => fallocate(&file, punch, (end - length) as i64, length as i64),
        };
        for block in buffer[..count].chunks(BLOCK_SIZE) {
            if is_zero(block) {
                zeros += block.len() as u64;
            } else {
                dig(at, zeros).attempt(attempt)?;
                zeros = 0;
            }
            at += block.len() as u64;
        }
        dig(at, zeros).attempt(attempt)?;
    }
}

/// The parts of a file that are not holes.
fn data_ranges(file: &File, length: u64) -> io::Result<Vec<(u64, u64)>> {
    use nix::{
        errno::Errno,
        unistd::{Whence, lseek},
    };
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < length {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => break,
            // A file system without holes.
            Err(Errno::EINVAL) => return Ok(vec![(0, length)]),
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek(file, start as i64, Whence::SeekHole)? as u64;
        ranges.push((start, end.min(length)));
        at = end;
    }
    Ok(ranges)
}

/// Bytes that a file really takes.
pub(crate) fn allocated(path: &Path) -> Result<u64> {
    let facts = fs::metadata(path).attempt(|| format!("looking at {}", path.display()))?;
    Ok(facts.blocks() * 512)
}
