//! Fills the tree of a machine's root: from its source, then with what every machine has.

use super::{
    OnProgress, Progress,
    accounts::Accounts,
    deb,
    debian::Deb,
    directory,
    layer::{Rules, Store, apply},
    oci,
    recipe::{Recipe, Root},
    tree::{Inode, Kind, Merge, Meta, Tree, show},
};
use crate::package::{
    cache::Cache,
    error::{PackageError, Result},
    files,
    manifest::Port,
};
use drafter_guest::config::{GUEST_BINARY_PATH, MACHINE_CONFIG_PATH, MachineConfig};
use std::{collections::BTreeMap, path::Path};

/// Directories that Debian has merged into `/usr`, as links that its packages expect.
const MERGED: &[&str] = &["bin", "lib", "lib32", "lib64", "libx32", "sbin"];

/// Directories of every root: the init mounts things there, and programs expect them.
const DIRECTORIES: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("etc", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
];

/// Files that installation would have made.
const CONFIG: &[(&str, &str)] = &[
    ("etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"),
    (
        "etc/nsswitch.conf",
        "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nnetworks: files\n\
         protocols: files\nservices: files\n",
    ),
];

/// Parts of Debian packages that no guest reads. Copyright files stay.
const UNREAD: &[&str] = &[
    "usr/share/bug/",
    "usr/share/doc-base/",
    "usr/share/info/",
    "usr/share/lintian/",
    "usr/share/locale/",
    "usr/share/man/",
];

/// What an image says about running it; empty for other sources.
#[derive(Clone, Debug, Default)]
pub(super) struct ImageDefaults {
    pub(super) argv: Vec<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) working_dir: Option<String>,
    pub(super) user: Option<String>,
    pub(super) ports: Vec<Port>,
}

/// Puts the root's source into the tree.
pub(super) fn fill(
    tree: &mut Tree,
    recipe: &Recipe,
    debs: &[Deb],
    cache: &Cache,
    store: &mut Store,
    progress: OnProgress<'_>,
) -> Result<ImageDefaults> {
    match &recipe.root {
        Root::Debian { .. } => {
            merge_usr(tree);
            for (index, one) in debs.iter().enumerate() {
                progress(Progress::Root { index, count: debs.len(), name: one.name.clone() });
                let path = one.path(cache)?;
                let rules = Rules {
                    name: &path,
                    merge: Merge::ThroughLinks,
                    whiteouts: false,
                    drop: &unread,
                };
                apply(tree, deb::data(&path)?, &rules, store)?;
            }
            Ok(ImageDefaults::default())
        }
        Root::Directory { path } => {
            directory::add(tree, path, store)?;
            Ok(ImageDefaults::default())
        }
        Root::Oci { layout, image } => {
            let image = oci::Image::open(layout, image.as_deref())?;
            let count = image.layers();
            image.apply(tree, store, &mut |index| {
                progress(Progress::Root { index, count, name: format!("layer {}", index + 1) });
            })?;
            let text = |field: &Option<String>| field.clone().filter(|text| !text.is_empty());
            Ok(ImageDefaults {
                argv: image.run.argv(),
                env: image.run.variables(),
                working_dir: text(&image.run.working_dir),
                user: text(&image.run.user),
                ports: image.run.ports(),
            })
        }
    }
}

fn merge_usr(tree: &mut Tree) {
    for name in MERGED {
        let target = format!("usr/{name}");
        let inode = |kind, mode| Inode { meta: Meta::root(mode), kind };
        let directory = inode(Kind::Directory, 0o755);
        let link = inode(Kind::Symlink { target: target.clone().into_bytes() }, 0o777);
        tree.insert(target.as_bytes(), directory, Merge::Replace).expect("the tree is empty");
        tree.insert(name.as_bytes(), link, Merge::Replace).expect("the tree is empty");
    }
}

fn unread(path: &[u8]) -> bool {
    let below =
        |dir: &&str| path.starts_with(dir.as_bytes()) || path == &dir.as_bytes()[..dir.len() - 1];
    if let Some(rest) = path.strip_prefix(b"usr/share/doc/") {
        return rest.contains(&b'/') && !rest.ends_with(b"/copyright");
    }
    UNREAD.iter().any(below)
}

/// Adds what every machine has, and the recipe's users, directories and files.
pub(super) fn finish(
    tree: &mut Tree,
    recipe: &Recipe,
    guest_program: &Path,
    config: &MachineConfig,
    store: &mut Store,
) -> Result<()> {
    let wrong = |problem: String| PackageError::Request { name: recipe.name.clone(), problem };
    for (path, mode) in DIRECTORIES {
        if tree.lookup(path.as_bytes()).is_none() {
            let inode = Inode { meta: Meta::root(*mode), kind: Kind::Directory };
            tree.insert(path.as_bytes(), inode, Merge::ThroughLinks).map_err(wrong)?;
        }
    }
    for (path, content) in CONFIG {
        if tree.lookup(path.as_bytes()).is_none() {
            put(tree, store, path, content.as_bytes(), 0o644)?;
        }
    }
    let accounts = write_accounts(tree, recipe, store)?;
    let owner = |path: &str, owner: &str| {
        accounts.owner(owner).map_err(|problem| wrong(format!("the owner of {path}: {problem}")))
    };
    for dir in &recipe.directories {
        let (uid, gid) = owner(&dir.path, &dir.owner)?;
        let meta = Meta { uid, gid, ..Meta::root(dir.mode.0) };
        let inode = Inode { meta, kind: Kind::Directory };
        let placed = tree.insert(dir.path.as_bytes(), inode, Merge::ThroughLinks);
        placed.map_err(|problem| wrong(format!("directory {}: {problem}", dir.path)))?;
        tree.own(dir.path.as_bytes(), uid, gid, Some(dir.mode.0));
    }
    for file in &recipe.files {
        let mut inode = directory::file(&file.from, file.mode.map(|mode| mode.0))?;
        (inode.meta.uid, inode.meta.gid) = owner(&file.to, &file.owner)?;
        charge(store, &inode, &file.to)?;
        let placed = tree.insert(file.to.as_bytes(), inode, Merge::ThroughLinks);
        placed.map_err(|problem| wrong(format!("file {}: {problem}", file.to)))?;
    }
    let guest = directory::file(guest_program, Some(0o755))?;
    charge(store, &guest, GUEST_BINARY_PATH)?;
    tree.insert(GUEST_BINARY_PATH.as_bytes(), guest, Merge::ThroughLinks).map_err(wrong)?;
    let text = config.to_json().map_err(|error| wrong(error.to_string()))?;
    put(tree, store, MACHINE_CONFIG_PATH, text.as_bytes(), 0o644)
}

fn charge(store: &mut Store, inode: &Inode, what: &str) -> Result<()> {
    match inode.kind {
        Kind::File { bytes, .. } => store.charge(what, bytes),
        _ => store.charge(what, 0),
    }
}

/// Makes `/etc/passwd` and `/etc/group`, or adds the recipe's users to those of the source.
fn write_accounts(tree: &mut Tree, recipe: &Recipe, store: &mut Store) -> Result<Accounts> {
    let wrong = |problem: String| PackageError::Request { name: recipe.name.clone(), problem };
    let passwd = read(tree, b"etc/passwd")?;
    let group = read(tree, b"etc/group")?.unwrap_or_default();
    let Some(passwd) = passwd else {
        let accounts = Accounts::new(&recipe.users).map_err(wrong)?;
        put(tree, store, "etc/passwd", accounts.passwd().as_bytes(), 0o644)?;
        put(tree, store, "etc/group", accounts.group().as_bytes(), 0o644)?;
        return Ok(accounts);
    };
    let accounts = Accounts::from_files(&passwd, &group, &recipe.users).map_err(wrong)?;
    if !recipe.users.is_empty() {
        let (more_passwd, more_group) = accounts.lines_of(&recipe.users);
        put(tree, store, "etc/passwd", joined(&passwd, &more_passwd).as_bytes(), 0o644)?;
        put(tree, store, "etc/group", joined(&group, &more_group).as_bytes(), 0o644)?;
    }
    Ok(accounts)
}

fn joined(old: &str, new: &str) -> String {
    let gap = if old.is_empty() || old.ends_with('\n') { "" } else { "\n" };
    let fresh: String = new
        .lines()
        .filter(|line| !old.lines().any(|known| known == *line))
        .fold(String::new(), |all, line| all + line + "\n");
    format!("{old}{gap}{fresh}")
}

/// A text file of the tree, if it is there.
fn read(tree: &Tree, path: &[u8]) -> Result<Option<String>> {
    match tree.lookup(path).map(|inode| &inode.kind) {
        Some(Kind::File { blob, .. }) => {
            Ok(Some(String::from_utf8_lossy(&files::read_bounded(blob, 4 << 20)?).into_owned()))
        }
        _ => Ok(None),
    }
}

fn put(tree: &mut Tree, store: &mut Store, path: &str, content: &[u8], mode: u32) -> Result<()> {
    let mut reader = content;
    let kind = store.keep(&show(path.as_bytes()), content.len() as u64, &mut reader)?;
    let inode = Inode { meta: Meta::root(mode), kind };
    tree.insert(path.as_bytes(), inode, Merge::ThroughLinks)
        .map_err(|problem| PackageError::Input { input: show(path.as_bytes()), problem })
}
