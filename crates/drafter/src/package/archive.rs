//! A package as one file: tar within zstd.
//!
//! The manifest comes first and rules the rest: every further entry must be a regular file that the
//! manifest names, of the length that it says, once. So nothing in an archive can name a path, make
//! a link, or write more than was announced; the limit is checked before anything is written. The
//! content is hashed while it is written. The same package always packs to the same bytes.

use super::{
    Package,
    cache::Cache,
    error::{Attempt, PackageError, Result},
    files::{self, CopyError},
    manifest::{FileEntry, MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest},
    verify,
};
use std::{
    fs::{self, File},
    io::{self, BufReader, Read, Write},
    path::{Path, PathBuf},
};

/// The end of an archive's name.
pub const SUFFIX: &str = ".tar.zst";

/// Largest package that is unpacked unless the caller says otherwise: the sum of all its files.
pub const DEFAULT_LIMIT: u64 = 256 << 30;

/// Zstandard's magic number.
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Padding that may follow the last entry.
const MAX_TRAILER: u64 = 1 << 20;

const LEVEL: i32 = 6;

/// The output does not depend on the number of workers, as long as it is not 0.
const WORKERS: u32 = 2;

/// Writes a package as an archive. An existing file is replaced when the new one is complete.
///
/// # Errors
/// When the package is not what its manifest says, or the file cannot be written.
pub fn pack(package: &Package, to: &Path, cache: &Cache) -> Result<()> {
    package.verify(cache)?;
    let attempt = || format!("writing {}", to.display());
    let dir = to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::NamedTempFile::new_in(dir).attempt(attempt)?;
    let mut encoder = zstd::Encoder::new(&file, LEVEL).attempt(attempt)?;
    encoder.multithread(WORKERS).attempt(attempt)?;
    encoder.include_checksum(true).attempt(attempt)?;
    let mut builder = tar::Builder::new(encoder);
    append(&mut builder, MANIFEST_FILE, package.dir()).attempt(attempt)?;
    for entry in package.manifest().files() {
        append(&mut builder, &entry.file, package.dir()).attempt(attempt)?;
    }
    let encoder = builder.into_inner().attempt(attempt)?;
    encoder.finish().and_then(|mut file| file.flush()).attempt(attempt)?;
    file.as_file().sync_all().attempt(attempt)?;
    let written = file.persist(to).map_err(|error| error.error).attempt(attempt)?;
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    written.set_permissions(readable).attempt(attempt)
}

fn append<W: Write>(builder: &mut tar::Builder<W>, name: &str, dir: &Path) -> io::Result<()> {
    let file = File::open(dir.join(name))?;
    let mut header = tar::Header::new_gnu();
    header.set_size(file.metadata()?.len());
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_entry_type(tar::EntryType::Regular);
    builder.append_data(&mut header, name, file)
}

/// Unpacks an archive into a directory that does not exist yet, or is empty, and opens it. All
/// content has been checked against the manifest by then.
///
/// # Errors
/// Says whether the archive is foreign, newer, truncated, tampered with, or holds what an archive
/// never holds; nothing is left behind then.
pub fn unpack(archive: &Path, to: &Path, limit: u64) -> Result<Package> {
    let parent = to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    files::make_dir(parent)?;
    let scratch = tempfile::TempDir::new_in(parent)
        .attempt(|| format!("creating a directory in {}", parent.display()))?;
    let work = scratch.path().join("package");
    files::make_dir(&work)?;
    unpack_into(archive, &work, limit)?;
    // A rename replaces an empty directory and nothing else.
    fs::rename(&work, to).attempt(|| {
        format!("moving the unpacked package to {} (it must not exist, or be empty)", to.display())
    })?;
    Package::open_dir(to)
}

/// Opens an archive by way of the cache.
pub(super) fn open_cached(archive: &Path, cache: &Cache) -> Result<Package> {
    check_magic(archive)?;
    let (hash, _) = verify::hash_remembered(archive, cache)?;
    let (dir, _) = cache
        .folder("unpacked", &hash.to_string(), |work| unpack_into(archive, work, DEFAULT_LIMIT))?;
    Package::open_dir(&dir)
}

fn check_magic(archive: &Path) -> Result<()> {
    let mut magic = [0; 4];
    let count = files::read_full(&mut files::open(archive)?, &mut magic)
        .attempt(|| format!("reading {}", archive.display()))?;
    if magic[..count] != MAGIC {
        return Err(PackageError::Foreign {
            path: archive.to_owned(),
            why: format!("a packed package is a {SUFFIX}, and this is not Zstandard data"),
        });
    }
    Ok(())
}

/// An archive being read: what its errors need to name.
struct Unpacking<'a> {
    archive: &'a Path,
    to: &'a Path,
}

fn unpack_into(archive: &Path, to: &Path, limit: u64) -> Result<()> {
    check_magic(archive)?;
    let unpacking = Unpacking { archive, to };
    let decoder = zstd::Decoder::new(files::open(archive)?)
        .attempt(|| format!("reading {}", archive.display()))?;
    let mut tar = tar::Archive::new(BufReader::new(decoder));
    // Raw: extension entries (long names, attributes) are seen as what they are, and refused,
    // instead of being read into memory whatever their length.
    let mut entries = tar.entries().map_err(|error| unpacking.damaged(&error))?.raw(true);
    let manifest = match entries.next() {
        Some(entry) => unpacking.manifest(entry.map_err(|error| unpacking.damaged(&error))?)?,
        None => return Err(unpacking.foreign("it is empty")),
    };
    let mut left = manifest.files();
    let bytes = left.iter().fold(0u64, |sum, entry| sum.saturating_add(entry.bytes));
    if bytes > limit {
        return Err(PackageError::TooLarge {
            what: format!("the package in {}", archive.display()),
            found: bytes,
            limit,
            hint: "nothing was written; unpack it with a higher limit if you trust it".to_owned(),
        });
    }
    for entry in entries {
        let mut entry = entry.map_err(|error| unpacking.damaged(&error))?;
        let name = unpacking.plain_name(&entry)?;
        let Some(index) = left.iter().position(|expected| expected.file == name) else {
            let why = "the manifest does not name it, or it comes twice";
            return Err(unpacking.refused(&name, why));
        };
        unpacking.file(&mut entry, &left.swap_remove(index))?;
    }
    if let Some(missing) = left.first() {
        return Err(unpacking.damaged_because(format!("{} is missing", missing.file)));
    }
    // The end of the tar is not the end of the stream: read on, so that its checksum is checked.
    let mut rest = tar.into_inner().take(MAX_TRAILER + 1);
    let rest = io::copy(&mut rest, &mut io::sink()).map_err(|error| unpacking.damaged(&error))?;
    if rest > MAX_TRAILER {
        return Err(unpacking.damaged_because("something follows its end".to_owned()));
    }
    Ok(())
}

impl Unpacking<'_> {
    /// Reads, checks and writes the manifest, which is the first entry.
    fn manifest(&self, mut entry: tar::Entry<'_, impl Read>) -> Result<Manifest> {
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if name != MANIFEST_FILE {
            return Err(self.foreign(&format!("its first entry is {name:?}, not {MANIFEST_FILE}")));
        }
        self.plain_name(&entry)?;
        let bytes = entry.size();
        if bytes > MAX_MANIFEST_BYTES {
            return Err(PackageError::TooLarge {
                what: format!("the manifest in {}", self.archive.display()),
                found: bytes,
                limit: MAX_MANIFEST_BYTES,
                hint: "nothing was written; this is not a package".to_owned(),
            });
        }
        let mut text = Vec::new();
        entry.read_to_end(&mut text).map_err(|error| self.damaged(&error))?;
        if text.len() as u64 != bytes {
            return Err(self.damaged_because(format!("{MANIFEST_FILE} ends early")));
        }
        let (manifest, _) = Manifest::from_json(&text, self.archive)?;
        let path = self.to.join(MANIFEST_FILE);
        fs::write(&path, &text).attempt(|| format!("writing {}", path.display()))?;
        Ok(manifest)
    }

    /// Writes one file; its name is one that the manifest gave, so it is a plain name.
    fn file(&self, entry: &mut tar::Entry<'_, impl Read>, expected: &FileEntry) -> Result<()> {
        if entry.size() != expected.bytes {
            return Err(PackageError::WrongSize {
                package: self.archive.to_owned(),
                file: expected.file.clone(),
                expected: expected.bytes,
                found: entry.size(),
            });
        }
        let path = self.to.join(&expected.file);
        let mut target = files::create(&path)?;
        let (found, bytes) = files::write_sparse(entry, &mut target, expected.bytes).map_err(
            |error| match error {
                CopyError::Read(error) => self.damaged(&error),
                CopyError::Write(source) => PackageError::Io {
                    operation: format!("writing {} ({} bytes)", path.display(), expected.bytes),
                    source,
                },
            },
        )?;
        if bytes != expected.bytes {
            return Err(self.damaged_because(format!("{} ends early", expected.file)));
        }
        if found != expected.blake3 {
            return Err(PackageError::Tampered {
                package: self.archive.to_owned(),
                file: expected.file.clone(),
                expected: expected.blake3.to_string(),
                found: found.to_string(),
            });
        }
        Ok(())
    }

    /// The entry's name, if it is a regular file with a plain name.
    fn plain_name(&self, entry: &tar::Entry<'_, impl Read>) -> Result<String> {
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let kind = entry.header().entry_type();
        if !kind.is_file() {
            let why = match kind {
                tar::EntryType::Symlink | tar::EntryType::Link => "it is a link",
                tar::EntryType::Directory => "it is a directory",
                tar::EntryType::Char | tar::EntryType::Block => "it is a device node",
                _ => "it is not a regular file",
            };
            return Err(self.refused(&name, why));
        }
        if name.starts_with('/') {
            return Err(self.refused(&name, "its name is an absolute path"));
        }
        if name.split('/').any(|part| part == "..") {
            return Err(self.refused(&name, "its name leaves the package's directory"));
        }
        if name.contains('/') {
            return Err(self.refused(&name, "its name is a path; a package is one flat directory"));
        }
        Ok(name)
    }

    fn refused(&self, entry: &str, why: &str) -> PackageError {
        PackageError::Entry {
            archive: self.archive.to_owned(),
            entry: entry.to_owned(),
            why: why.to_owned(),
        }
    }

    fn foreign(&self, why: &str) -> PackageError {
        PackageError::Foreign { path: self.archive.to_owned(), why: why.to_owned() }
    }

    fn damaged(&self, error: &io::Error) -> PackageError {
        self.damaged_because(error.to_string())
    }

    fn damaged_because(&self, detail: String) -> PackageError {
        PackageError::Damaged { archive: self.archive.to_owned(), detail }
    }
}

/// Where an archive of the package `name` goes in `dir`.
#[must_use]
pub fn default_name(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}{SUFFIX}"))
}
