//! A plain directory as the root of a machine.
//!
//! Everything belongs to root in the machine, whoever owns it here, and times are not kept: the
//! same names, modes and contents give the same image on every host.

use super::{
    layer::Store,
    tree::{Inode, Kind, Merge, Meta, Tree},
};
use crate::package::{
    error::{Attempt, PackageError, Result},
    files,
    manifest::Blake3,
};
use std::{
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

/// Longest chain of directories.
const MAX_DEPTH: usize = 256;

/// Adds what `dir` holds to the tree. Contents stay where they are.
pub(crate) fn add(tree: &mut Tree, dir: &Path, store: &mut Store) -> Result<()> {
    walk(dir, &mut |path, real, inode| {
        let bytes = if let Kind::File { bytes, .. } = inode.kind { bytes } else { 0 };
        store.charge(&real.display().to_string(), bytes)?;
        tree.insert(path, inode, Merge::ThroughLinks)
            .map_err(|problem| PackageError::Input { input: real.display().to_string(), problem })
    })
}

/// Hash over names, modes, link targets and contents.
pub(crate) fn hash(dir: &Path) -> Result<Blake3> {
    let mut hasher = blake3::Hasher::new();
    walk(dir, &mut |path, real, inode| {
        let (kind, content) = match &inode.kind {
            Kind::File { .. } => (b'f', files::hash_file(real)?.0.0.to_vec()),
            Kind::Symlink { target } => (b'l', target.clone()),
            Kind::Fifo => (b'p', Vec::new()),
            _ => (b'd', Vec::new()),
        };
        for field in [path, &[kind], inode.meta.mode.to_string().as_bytes(), &content] {
            hasher.update(&(field.len() as u64).to_le_bytes());
            hasher.update(field);
        }
        Ok(())
    })?;
    Ok(hasher.finalize().into())
}

type Visit<'a> = &'a mut dyn FnMut(&[u8], &Path, Inode) -> Result<()>;

fn walk(dir: &Path, visit: Visit<'_>) -> Result<()> {
    let facts = fs::metadata(dir).attempt(|| format!("looking at {}", dir.display()))?;
    if !facts.is_dir() {
        return Err(PackageError::Input {
            input: dir.display().to_string(),
            problem: "is not a directory".to_owned(),
        });
    }
    walk_below(dir, &mut Vec::new(), 0, visit)
}

fn walk_below(dir: &Path, name: &mut Vec<u8>, depth: usize, visit: Visit<'_>) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(PackageError::Input {
            input: dir.display().to_string(),
            problem: format!("directories lie more than {MAX_DEPTH} deep"),
        });
    }
    let attempt = || format!("reading directory {}", dir.display());
    let mut children: Vec<PathBuf> = fs::read_dir(dir)
        .attempt(attempt)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<_>>()
        .attempt(attempt)?;
    children.sort();
    for child in children {
        let length = name.len();
        name.push(b'/');
        name.extend(child.file_name().unwrap_or_default().as_bytes());
        if let Some(inode) = look(&child)? {
            let directory = inode.kind == Kind::Directory;
            visit(name, &child, inode)?;
            if directory {
                walk_below(&child, name, depth + 1, visit)?;
            }
        }
        name.truncate(length);
    }
    Ok(())
}

/// What lies at `path`; None for a socket, which means nothing without its process.
fn look(path: &Path) -> Result<Option<Inode>> {
    let attempt = || format!("looking at {}", path.display());
    let facts = fs::symlink_metadata(path).attempt(attempt)?;
    let kind = facts.file_type();
    let kind = if kind.is_dir() {
        Kind::Directory
    } else if kind.is_symlink() {
        let target = fs::read_link(path).attempt(attempt)?;
        Kind::Symlink { target: target.as_os_str().as_bytes().to_vec() }
    } else if kind.is_file() {
        Kind::File { blob: absolute(path)?, bytes: facts.size() }
    } else if kind.is_fifo() {
        Kind::Fifo
    } else if kind.is_socket() {
        return Ok(None);
    } else {
        return Err(PackageError::Input {
            input: path.display().to_string(),
            problem: "is a device node; leave it out, the machine makes its own in /dev".to_owned(),
        });
    };
    Ok(Some(Inode { meta: Meta::root(facts.mode() & 0o7777), kind }))
}

/// A single file, as it comes into a root.
pub(crate) fn file(path: &Path, mode: Option<u32>) -> Result<Inode> {
    let facts = fs::metadata(path).attempt(|| format!("looking at {}", path.display()))?;
    if !facts.is_file() {
        return Err(PackageError::Input {
            input: path.display().to_string(),
            problem: "is not a regular file; give a directory as the root instead".to_owned(),
        });
    }
    let kind = Kind::File { blob: absolute(path)?, bytes: facts.size() };
    Ok(Inode { meta: Meta::root(mode.unwrap_or(facts.mode() & 0o7777)), kind })
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).attempt(|| format!("looking at {}", path.display()))
}
