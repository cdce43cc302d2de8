//! The root of a machine while it is put together: names, owners, modes and links in memory,
//! contents in files beside it.
//!
//! Nothing is ever extracted to where a path of an input says. Symbolic links are followed inside
//! the tree, so a link or a name in a package or layer leads nowhere else; owners and device nodes
//! need no root. Filled by the sources ([`super::layer`], [`super::directory`]), written out by
//! [`super::ext4`].

use std::{collections::BTreeMap, path::PathBuf};

/// As many symbolic links as Linux follows.
const MAX_LINKS: usize = 40;

/// Longest name of a directory entry in ext4.
const MAX_NAME: usize = 255;

/// Longest path or link target that Linux takes.
const MAX_PATH: usize = 4095;

/// Owner, mode and times of an inode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits with set-user-id, set-group-id and sticky.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970.
    pub(crate) mtime: i64,
    /// Extended attributes, sorted by name.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Meta {
    /// Owned by root, of no particular time.
    pub(crate) fn root(mode: u32) -> Self {
        Self { mode, ..Self::default() }
    }
}

/// What an inode is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    /// Its content lies in `blob`.
    File {
        blob: PathBuf,
        bytes: u64,
    },
    Symlink {
        target: Vec<u8>,
    },
    Character {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// A file, directory or other thing; may have several names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inode {
    pub(crate) meta: Meta,
    pub(crate) kind: Kind,
}

/// What happens to a directory that meets a link to a directory of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Merge {
    /// The link stays, what the directory holds goes where it leads: as dpkg does, for which
    /// `/lib` is a link.
    ThroughLinks,
    /// The directory replaces the link: as image layers mean it.
    Replace,
}

/// The root of a machine.
#[derive(Debug)]
pub(crate) struct Tree {
    inodes: Vec<Inode>,
    /// Path without leading slash to inode; the root is the empty path. Ordered, so that a
    /// directory comes before what it holds.
    names: BTreeMap<Vec<u8>, usize>,
}

impl Tree {
    pub(crate) fn new() -> Self {
        let root = Inode { meta: Meta::root(0o755), kind: Kind::Directory };
        Self { inodes: vec![root], names: BTreeMap::from([(Vec::new(), 0)]) }
    }

    /// All names with the number of their inode, parents first.
    pub(crate) fn names(&self) -> impl Iterator<Item = (&[u8], usize)> {
        self.names.iter().map(|(path, inode)| (path.as_slice(), *inode))
    }

    pub(crate) fn inode(&self, number: usize) -> &Inode {
        &self.inodes[number]
    }

    /// Follows `path` from the root, the last link included.
    pub(crate) fn lookup(&self, path: &[u8]) -> Option<&Inode> {
        let path = self.resolve(path, true).ok()?;
        self.names.get(&path).map(|number| &self.inodes[*number])
    }

    /// Puts an inode at `path`; missing parents are made. Says what is wrong with the path
    /// otherwise.
    pub(crate) fn insert(&mut self, path: &[u8], inode: Inode, merge: Merge) -> Result<(), String> {
        if let Kind::Symlink { target } = &inode.kind
            && (target.is_empty() || target.len() > MAX_PATH || target.contains(&0))
        {
            return Err("it is a link to nothing, or its target is too long".to_owned());
        }
        let mut place = self.place(path)?;
        if place.is_empty() && inode.kind != Kind::Directory {
            return Err("it would replace the root directory".to_owned());
        }
        let directory = inode.kind == Kind::Directory;
        if let Some(old) = self.names.get(&place).copied() {
            let through = match &self.inodes[old].kind {
                Kind::Directory if directory => Some(place.clone()),
                Kind::Symlink { .. } if directory && merge == Merge::ThroughLinks => {
                    let end = self.resolve(&place, true)?;
                    // A link to what is not there yet is one to a directory soon.
                    match self.names.get(&end) {
                        Some(number) if self.inodes[*number].kind == Kind::Directory => Some(end),
                        Some(_) => None,
                        None => Some(end),
                    }
                }
                _ => None,
            };
            match through {
                // An existing directory: the newer owner and mode count, unless it was reached
                // by a link, whose target has its own.
                Some(end) if self.names.contains_key(&end) => {
                    if end == place {
                        self.inodes[old].meta = inode.meta;
                    }
                    return Ok(());
                }
                Some(end) => {
                    self.make_parents(&end)?;
                    place = end;
                }
                None => self.remove_at(&place),
            }
        }
        self.inodes.push(inode);
        self.names.insert(place, self.inodes.len() - 1);
        Ok(())
    }

    /// Gives an inode a second name.
    pub(crate) fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), String> {
        let from = self.resolve(target, false)?;
        let number = match self.names.get(&from) {
            Some(number) if self.inodes[*number].kind != Kind::Directory => *number,
            _ => return Err(format!("it is a hard link to {}, which is no file", show(target))),
        };
        let place = self.place(path)?;
        if place.is_empty() {
            return Err("it would replace the root directory".to_owned());
        }
        if place != from {
            self.remove_at(&place);
            self.names.insert(place, number);
        }
        Ok(())
    }

    /// Removes a name and, if it is a directory, all that it holds. The last part is not followed.
    pub(crate) fn remove(&mut self, path: &[u8]) -> Result<(), String> {
        let place = self.resolve(path, false)?;
        if place.is_empty() {
            return Err("it would remove the root directory".to_owned());
        }
        self.remove_at(&place);
        Ok(())
    }

    /// Removes what a directory holds.
    pub(crate) fn clear(&mut self, path: &[u8]) -> Result<(), String> {
        let place = self.resolve(path, true)?;
        for name in self.below(&place) {
            self.names.remove(&name);
        }
        Ok(())
    }

    /// Changes owner and mode of what is at `path`; false if nothing is there.
    pub(crate) fn own(&mut self, path: &[u8], uid: u32, gid: u32, mode: Option<u32>) -> bool {
        let found = self.resolve(path, true).ok().and_then(|place| self.names.get(&place));
        let Some(number) = found else { return false };
        let meta = &mut self.inodes[*number].meta;
        (meta.uid, meta.gid) = (uid, gid);
        meta.mode = mode.unwrap_or(meta.mode);
        true
    }

    /// Number of inodes that have a name, and the bytes that their contents take in whole blocks.
    pub(crate) fn size(&self) -> (u64, u64) {
        let mut seen = vec![false; self.inodes.len()];
        let (mut count, mut bytes) = (0, 0u64);
        for (_, number) in self.names() {
            if std::mem::replace(&mut seen[number], true) {
                continue;
            }
            count += 1;
            bytes = bytes.saturating_add(match &self.inodes[number].kind {
                Kind::File { bytes, .. } => bytes.next_multiple_of(4096),
                Kind::Directory => 4096,
                _ => 0,
            });
        }
        (count, bytes)
    }

    /// The real place of a new name: its parent followed and made where missing.
    fn place(&mut self, path: &[u8]) -> Result<Vec<u8>, String> {
        let parts = split(path)?;
        let Some((last, parents)) = parts.split_last() else { return Ok(Vec::new()) };
        let mut parent = self.resolve(&parents.join(&b'/'), true)?;
        self.make_parents(&join(&parent, b"x"))?;
        if !parent.is_empty() {
            parent.push(b'/');
        }
        parent.extend_from_slice(last);
        Ok(parent)
    }

    /// Makes the directories above a resolved path.
    fn make_parents(&mut self, path: &[u8]) -> Result<(), String> {
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        for end in ends {
            let parent = &path[..end];
            match self.names.get(parent) {
                Some(number) if self.inodes[*number].kind == Kind::Directory => {}
                Some(_) => return Err(format!("{} is not a directory", show(parent))),
                None => {
                    self.inodes.push(Inode { meta: Meta::root(0o755), kind: Kind::Directory });
                    self.names.insert(parent.to_vec(), self.inodes.len() - 1);
                }
            }
        }
        Ok(())
    }

    /// Follows the links in a path, those of the last part only if `last`. Parts that do not exist
    /// stay as they are. `..` in a link's target stops at the root, as in a chroot.
    fn resolve(&self, path: &[u8], last: bool) -> Result<Vec<u8>, String> {
        let mut ahead: Vec<Vec<u8>> = split(path)?.iter().rev().map(|p| p.to_vec()).collect();
        let mut here: Vec<u8> = Vec::new();
        let mut links = 0;
        while let Some(part) = ahead.pop() {
            if part == b".." {
                let end = here.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                here.truncate(end);
                continue;
            }
            let next = join(&here, &part);
            let inode = self.names.get(&next).map(|number| &self.inodes[*number]);
            match inode.map(|inode| &inode.kind) {
                Some(Kind::Symlink { target }) if last || !ahead.is_empty() => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(format!("too many symbolic links at {}", show(&next)));
                    }
                    if target.starts_with(b"/") {
                        here.clear();
                    }
                    let parts = target.split(|byte| *byte == b'/');
                    let parts = parts.filter(|part| !part.is_empty() && *part != b".");
                    ahead.extend(parts.rev().map(<[u8]>::to_vec));
                }
                Some(Kind::Directory | Kind::Symlink { .. }) | None => here = next,
                Some(_) if ahead.is_empty() => here = next,
                Some(_) => return Err(format!("{} is not a directory", show(&next))),
            }
        }
        Ok(here)
    }

    fn remove_at(&mut self, place: &[u8]) {
        for name in self.below(place) {
            self.names.remove(&name);
        }
        self.names.remove(place);
    }

    fn below(&self, dir: &[u8]) -> Vec<Vec<u8>> {
        let begin = if dir.is_empty() { Vec::new() } else { join(dir, b"") };
        self.names
            .range(begin.clone()..)
            .map(|(name, _)| name)
            .take_while(|name| name.starts_with(&begin))
            .filter(|name| !name.is_empty())
            .cloned()
            .collect()
    }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    match dir {
        [] => name.to_vec(),
        _ => [dir, b"/", name].concat(),
    }
}

/// A path as people read it.
pub(crate) fn show(path: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(path).trim_start_matches('/'))
}

/// The parts of a path from the root; a leading `/` or `./` is the root. Refuses `..` and what no
/// file system takes.
fn split(path: &[u8]) -> Result<Vec<&[u8]>, String> {
    if path.len() > MAX_PATH {
        return Err("its path is too long".to_owned());
    }
    let parts: Vec<&[u8]> =
        path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    for part in &parts {
        if *part == b".." {
            return Err("its path climbs out with \"..\"".to_owned());
        }
        if part.len() > MAX_NAME || part.contains(&0) {
            return Err("a part of its path is too long or holds a NUL".to_owned());
        }
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> Inode {
        Inode { meta: Meta::root(0o755), kind: Kind::Directory }
    }

    fn fifo(mode: u32) -> Inode {
        Inode { meta: Meta::root(mode), kind: Kind::Fifo }
    }

    fn symlink(target: &str) -> Inode {
        Inode { meta: Meta::root(0o777), kind: Kind::Symlink { target: target.into() } }
    }

    fn listing(tree: &Tree) -> Vec<String> {
        tree.names().map(|(path, _)| String::from_utf8_lossy(path).into_owned()).collect()
    }

    #[test]
    fn parents_are_made_and_come_before_what_they_hold() {
        let mut tree = Tree::new();
        tree.insert(b"./usr/lib/a", fifo(0o600), Merge::Replace).unwrap();
        tree.insert(b"/usr/lib-x", fifo(0o600), Merge::Replace).unwrap();
        assert_eq!(listing(&tree), ["", "usr", "usr/lib", "usr/lib-x", "usr/lib/a"]);
        assert_eq!(tree.size(), (5, 3 * 4096));
    }

    #[test]
    fn links_are_followed_inside_the_tree_and_never_out_of_it() {
        let mut tree = Tree::new();
        tree.insert(b"lib", symlink("usr/lib"), Merge::Replace).unwrap();
        tree.insert(b"etc/out", symlink("../../../../root/home"), Merge::Replace).unwrap();
        tree.insert(b"lib/x", fifo(0o600), Merge::Replace).unwrap();
        tree.insert(b"etc/out/passwd", fifo(0o600), Merge::Replace).unwrap();
        let names = listing(&tree);
        assert!(names.contains(&"usr/lib/x".to_owned()), "{names:?}");
        assert!(names.contains(&"root/home/passwd".to_owned()), "{names:?}");
        assert!(tree.insert(b"a/../../b", fifo(0), Merge::Replace).unwrap_err().contains(".."));
    }

    #[test]
    fn a_loop_of_links_is_an_error_and_not_a_hang() {
        let mut tree = Tree::new();
        tree.insert(b"a", symlink("b"), Merge::Replace).unwrap();
        tree.insert(b"b", symlink("a"), Merge::Replace).unwrap();
        let error = tree.insert(b"a/x", fifo(0), Merge::Replace).unwrap_err();
        assert!(error.contains("too many symbolic links"), "{error}");
        assert!(tree.lookup(b"a").is_none());
    }

    #[test]
    fn a_directory_meets_a_link_as_dpkg_or_as_a_layer_means_it() {
        for (merge, kept) in [(Merge::ThroughLinks, true), (Merge::Replace, false)] {
            let mut tree = Tree::new();
            tree.insert(b"usr/bin", dir(), merge).unwrap();
            tree.insert(b"bin", symlink("usr/bin"), merge).unwrap();
            tree.insert(b"bin", dir(), merge).unwrap();
            tree.insert(b"bin/sh", fifo(0o755), merge).unwrap();
            assert_eq!(listing(&tree).contains(&"usr/bin/sh".to_owned()), kept);
            assert_eq!(listing(&tree).contains(&"bin/sh".to_owned()), !kept);
        }
    }

    #[test]
    fn what_is_below_a_file_is_refused() {
        let mut tree = Tree::new();
        tree.insert(b"a", fifo(0), Merge::Replace).unwrap();
        assert!(tree.insert(b"a/b", fifo(0), Merge::Replace).unwrap_err().contains("/a is not"));
    }

    #[test]
    fn hard_links_share_an_inode_and_outlive_their_first_name() {
        let mut tree = Tree::new();
        tree.insert(b"a", fifo(0o600), Merge::Replace).unwrap();
        tree.link(b"d/b", b"a").unwrap();
        assert!(tree.own(b"d/b", 7, 8, Some(0o640)));
        assert_eq!(tree.lookup(b"a").unwrap().meta.uid, 7);
        tree.remove(b"a").unwrap();
        assert_eq!(tree.lookup(b"d/b").unwrap().meta.mode, 0o640);
        assert_eq!(tree.size(), (3, 2 * 4096));
        assert!(tree.link(b"c", b"d").is_err());
        assert!(tree.link(b"c", b"nothing").is_err());
    }

    #[test]
    fn removal_takes_what_is_below_and_nothing_beside() {
        let mut tree = Tree::new();
        for path in ["d/a", "d/b/c", "d-e", "d0"] {
            tree.insert(path.as_bytes(), fifo(0), Merge::Replace).unwrap();
        }
        tree.clear(b"d/b").unwrap();
        assert_eq!(listing(&tree), ["", "d", "d-e", "d/a", "d/b", "d0"]);
        tree.insert(b"d", fifo(0), Merge::Replace).unwrap();
        assert_eq!(listing(&tree), ["", "d", "d-e", "d0"]);
        tree.clear(b"").unwrap();
        assert_eq!(listing(&tree), [""]);
    }
}
