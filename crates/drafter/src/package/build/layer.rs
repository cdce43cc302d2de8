//! Applies a tar stream to a [`Tree`]: the data of a Debian package, or a layer of an OCI image.

use super::tree::{Inode, Kind, Merge, Meta, Tree};
use crate::package::error::{Attempt, PackageError, Result};
use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

/// Longest block of long names or extended attributes.
const MAX_EXTENSION: u64 = 1 << 20;

/// Most names in a root.
const MAX_NAMES: u64 = 4_000_000;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Where contents go, and how much of it there may be.
pub(crate) struct Store {
    dir: PathBuf,
    next: u64,
    left: u64,
    limit: u64,
    names: u64,
}

impl Store {
    /// Contents go to files in `dir`, at most `limit` bytes altogether.
    pub(crate) fn new(dir: PathBuf, limit: u64) -> Self {
        Self { dir, next: 0, left: limit, limit, names: 0 }
    }

    /// Counts something against the limits before it is written.
    pub(crate) fn charge(&mut self, what: &str, bytes: u64) -> Result<()> {
        self.names += 1;
        let too_large = |found, limit| PackageError::TooLarge {
            what: format!("the root (noticed at {what})"),
            found,
            limit,
            hint: "ask for a larger disk (`--size`), or put less into it".to_owned(),
        };
        if self.names > MAX_NAMES {
            return Err(too_large(self.names, MAX_NAMES));
        }
        self.left = self
            .left
            .checked_sub(bytes)
            .ok_or_else(|| too_large((self.limit - self.left).saturating_add(bytes), self.limit))?;
        Ok(())
    }

    /// Keeps a content; `kind` of the file that has it.
    pub(crate) fn keep(&mut self, what: &str, bytes: u64, content: &mut dyn Read) -> Result<Kind> {
        self.charge(what, bytes)?;
        let blob = self.dir.join(format!("{:08}", self.next));
        self.next += 1;
        let mut file =
            File::create_new(&blob).attempt(|| format!("creating {}", blob.display()))?;
        let copied = io::copy(&mut content.take(bytes), &mut file)
            .attempt(|| format!("copying {what} to {}", blob.display()))?;
        if copied != bytes {
            return Err(PackageError::Damaged {
                archive: what.into(),
                detail: format!("it ends after {copied} of {bytes} bytes"),
            });
        }
        Ok(Kind::File { blob, bytes })
    }
}

/// How a stream is applied.
pub(crate) struct Rules<'a> {
    /// The stream's name for messages.
    pub(crate) name: &'a Path,
    pub(crate) merge: Merge,
    /// Whether names that begin with `.wh.` remove what lower layers have.
    pub(crate) whiteouts: bool,
    /// Paths (without leading slash) that are left out.
    pub(crate) drop: &'a dyn Fn(&[u8]) -> bool,
}

/// What the entries before it say about the next one.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    meta: Vec<(String, Vec<u8>)>,
}

/// Applies a tar stream.
///
/// # Errors
/// When the stream is damaged, or holds an entry that leads out of the root or that no root has.
pub(crate) fn apply(
    tree: &mut Tree,
    stream: impl Read,
    rules: &Rules<'_>,
    store: &mut Store,
) -> Result<()> {
    let mut archive = tar::Archive::new(stream);
    let damaged = |error: io::Error| PackageError::Damaged {
        archive: rules.name.to_owned(),
        detail: error.to_string(),
    };
    let mut extension = Extension::default();
    // Raw, with extensions read here: the reader's own reading of them has no limit of length.
    for entry in archive.entries().map_err(damaged)?.raw(true) {
        let mut entry = entry.map_err(damaged)?;
        match entry.header().entry_type() {
            tar::EntryType::GNULongName => {
                extension.path = Some(long_name(&mut entry, rules)?);
            }
            tar::EntryType::GNULongLink => {
                extension.target = Some(long_name(&mut entry, rules)?);
            }
            tar::EntryType::XHeader => read_pax(&mut entry, rules, &mut extension)?,
            // Says nothing that matters here, but costs time to read.
            tar::EntryType::XGlobalHeader => store.charge("a global header", entry.size())?,
            _ => {
                let extension = std::mem::take(&mut extension);
                take_entry(tree, &mut entry, extension, rules, store)?;
            }
        }
    }
    Ok(())
}

fn refused(rules: &Rules<'_>, path: &[u8], why: impl Into<String>) -> PackageError {
    PackageError::Entry {
        archive: rules.name.to_owned(),
        entry: String::from_utf8_lossy(path).into_owned(),
        why: why.into(),
    }
}

fn read_extension(entry: &mut tar::Entry<'_, impl Read>, rules: &Rules<'_>) -> Result<Vec<u8>> {
    if entry.size() > MAX_EXTENSION {
        return Err(PackageError::TooLarge {
            what: format!("a header in {}", rules.name.display()),
            found: entry.size(),
            limit: MAX_EXTENSION,
            hint: "this is not an image or package that any tool writes".to_owned(),
        });
    }
    let mut content = Vec::new();
    entry.read_to_end(&mut content).map_err(|error| PackageError::Damaged {
        archive: rules.name.to_owned(),
        detail: error.to_string(),
    })?;
    Ok(content)
}

fn long_name(entry: &mut tar::Entry<'_, impl Read>, rules: &Rules<'_>) -> Result<Vec<u8>> {
    let mut name = read_extension(entry, rules)?;
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    name.truncate(end);
    Ok(name)
}

fn read_pax(
    entry: &mut tar::Entry<'_, impl Read>,
    rules: &Rules<'_>,
    extension: &mut Extension,
) -> Result<()> {
    let content = read_extension(entry, rules)?;
    for record in tar::PaxExtensions::new(&content) {
        let record = record.map_err(|error| PackageError::Damaged {
            archive: rules.name.to_owned(),
            detail: format!("an extended header: {error}"),
        })?;
        let value = record.value_bytes().to_vec();
        match record.key_bytes() {
            b"path" => extension.path = Some(value),
            b"linkpath" => extension.target = Some(value),
            key => extension.meta.push((String::from_utf8_lossy(key).into_owned(), value)),
        }
    }
    Ok(())
}

fn take_entry(
    tree: &mut Tree,
    entry: &mut tar::Entry<'_, impl Read>,
    extension: Extension,
    rules: &Rules<'_>,
    store: &mut Store,
) -> Result<()> {
    let header = entry.header().clone();
    let path = extension.path.unwrap_or_else(|| entry.path_bytes().into_owned());
    let plain: &[u8] = path.strip_prefix(b"./").unwrap_or(&path);
    let plain = plain.strip_prefix(b"/").unwrap_or(plain);
    if (rules.drop)(plain.strip_suffix(b"/").unwrap_or(plain)) {
        return Ok(());
    }
    let refuse = |why: String| refused(rules, &path, why);
    if rules.whiteouts && whiteout(tree, plain).map_err(refuse)? {
        return Ok(());
    }
    let meta = meta(&header, &extension.meta).map_err(refuse)?;
    let target = || {
        extension
            .target
            .clone()
            .or_else(|| entry.link_name_bytes().map(std::borrow::Cow::into_owned))
            .unwrap_or_default()
    };
    let device = || {
        let number = |part: io::Result<Option<u32>>| part.ok().flatten();
        number(header.device_major())
            .zip(number(header.device_minor()))
            .ok_or_else(|| refuse("it is a device node without a number".to_owned()))
    };
    let what = || format!("{} in {}", String::from_utf8_lossy(plain), rules.name.display());
    let kind = match header.entry_type() {
        tar::EntryType::Regular | tar::EntryType::Continuous => {
            let bytes = entry.size();
            store.keep(&what(), bytes, entry)?
        }
        tar::EntryType::Link => {
            store.charge(&what(), 0)?;
            return tree.link(&path, &target()).map_err(refuse);
        }
        tar::EntryType::Directory => Kind::Directory,
        tar::EntryType::Symlink => Kind::Symlink { target: target() },
        tar::EntryType::Char => device().map(|(major, minor)| Kind::Character { major, minor })?,
        tar::EntryType::Block => device().map(|(major, minor)| Kind::Block { major, minor })?,
        tar::EntryType::Fifo => Kind::Fifo,
        tar::EntryType::GNUSparse => {
            return Err(refuse("it is a sparse file, which images do not use".to_owned()));
        }
        other => {
            return Err(refuse(format!("it is of the unknown kind {:?}", other.as_byte() as char)));
        }
    };
    store.charge(&what(), 0)?;
    tree.insert(&path, Inode { meta, kind }, rules.merge).map_err(refuse)
}

/// Removes what a whiteout names; false if it is none.
fn whiteout(tree: &mut Tree, path: &[u8]) -> Result<bool, String> {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let split = path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    let (dir, name) = path.split_at(split);
    if name == OPAQUE {
        tree.clear(dir)?;
        return Ok(true);
    }
    let Some(hidden) = name.strip_prefix(WHITEOUT) else { return Ok(false) };
    if hidden.is_empty() || hidden == b"." || hidden == b".." {
        return Err("it is a whiteout of nothing".to_owned());
    }
    tree.remove(&[dir, hidden].concat())?;
    Ok(true)
}

fn meta(header: &tar::Header, extension: &[(String, Vec<u8>)]) -> Result<Meta, String> {
    let number = |field: io::Result<u64>, name: &str| {
        field.map_err(|_| format!("its {name} is not a number"))
    };
    let id = |value: u64, name: &str| {
        u32::try_from(value).map_err(|_| format!("its {name} {value} is out of range"))
    };
    let mode = header.mode().map_err(|_| "its mode is not a number".to_owned())?;
    let mut meta = Meta {
        mode: mode & 0o7777,
        uid: id(number(header.uid(), "owner")?, "owner")?,
        gid: id(number(header.gid(), "group")?, "group")?,
        // A time before 1970 comes as a huge number; the image writer bounds it.
        mtime: i64::try_from(number(header.mtime(), "time")?).unwrap_or(0),
        xattrs: Vec::new(),
    };
    for (key, value) in extension {
        let text = || String::from_utf8_lossy(value);
        let value_of = |name: &str| {
            text().parse::<u64>().map_err(|_| format!("its {name} {:?} is not a number", text()))
        };
        match key.as_str() {
            "uid" => meta.uid = id(value_of("owner")?, "owner")?,
            "gid" => meta.gid = id(value_of("group")?, "group")?,
            "mtime" => {
                // A decimal fraction, of which ext4 as it is written here keeps the seconds.
                let seconds = text().split('.').next().and_then(|s| s.parse().ok());
                meta.mtime = seconds.ok_or("its time is not a number")?;
            }
            "size" if value_of("size")? > 0o77_777_777_777 => {
                return Err("it is larger than 8 GiB, which is not supported yet".to_owned());
            }
            key if key.starts_with("GNU.sparse.") => {
                return Err("it is a sparse file, which images do not use".to_owned());
            }
            key => {
                if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
                    meta.xattrs.push((name.as_bytes().to_vec(), value.clone()));
                }
            }
        }
    }
    meta.xattrs.sort();
    Ok(meta)
}

#[cfg(test)]
pub(crate) mod tests;
