//! Writes a [`Tree`] as an ext4 image, without mounting and without root.
//!
//! `mke2fs` makes the empty file system and `debugfs` fills it by a script of commands in the order
//! of the tree. All times, identifiers and seeds are given, and the feature list is spelled out, so
//! that the same tree and the same e2fsprogs give the same bytes. (`mke2fs -d` would copy the
//! change times of the staging files, which nobody can set, and needs root or fakeroot for owners.)
//! Lazy initialisation is off: the guest's kernel must not write inode tables after the first mount.
//!
//! `debugfs` ends with status 0 whatever happens, so its error output must be empty, `e2fsck` must
//! find nothing, and the number of used inodes must be the one of the tree.

use super::{
    tool::Tool,
    tree::{Inode, Kind, Tree, show},
};
use crate::package::{
    error::{Attempt, PackageError, Result},
    files,
    manifest::Blake3,
};
use std::{
    collections::BTreeMap, fs, io::Write as _, path::Path, process::Command, time::Duration,
};

/// Time of everything that has none of its own: 2020-01-01.
const EPOCH: u64 = 1_577_836_800;

/// What the oldest kernel that we boot (5.10) and all later ones take.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,\
                        flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,\
                        metadata_csum";

const CONFIG: &str = "[defaults]\n\tblocksize = 4096\n[fs_types]\n\text4 = {\n\t}\n";

/// debugfs reads lines into a buffer of 8192 bytes.
const MAX_LINE: usize = 8000;

/// Inodes that a file system has before anything is put into it: ten reserved and `lost+found`.
const RESERVED_INODES: u64 = 11;

const LIMIT: Duration = Duration::from_secs(900);
const PACKAGE: &str = "e2fsprogs";

/// Version of the tools, part of a build's key: another version may write other bytes.
pub(crate) fn version() -> Result<String> {
    let tool = Tool {
        operation: "asking mke2fs for its version".to_owned(),
        package: PACKAGE,
        hint: "see whether e2fsprogs is installed as it should be",
        limit: Duration::from_secs(30),
    };
    let output = tool.run(&mut command("mke2fs", ["-V"]))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// A size that holds the tree with room to work in.
pub(crate) fn default_bytes(tree: &Tree) -> u64 {
    let (_, bytes) = tree.size();
    (bytes.saturating_mul(2)).next_multiple_of(64 << 20).max(512 << 20)
}

/// Writes `tree` to the new file `image` of `bytes` bytes, with holes. `seed` becomes the UUID and
/// the directories' hash seed. Returns the image's hash.
pub(crate) fn write(tree: &Tree, image: &Path, bytes: u64, seed: &Blake3) -> Result<Blake3> {
    let scratch = tempfile::TempDir::new_in(image.parent().unwrap_or(Path::new(".")))
        .attempt(|| format!("creating a directory beside {}", image.display()))?;
    let config = scratch.path().join("mke2fs.conf");
    fs::write(&config, CONFIG).attempt(|| format!("writing {}", config.display()))?;
    files::create(image)?.set_len(bytes).attempt(|| format!("sizing {}", image.display()))?;

    let (nodes, _) = tree.size();
    let inodes = (bytes / 16384).max(nodes + nodes / 2 + 1024);
    let uuid = uuid(seed);
    let format = Tool {
        operation: format!("making an ext4 file system of {bytes} bytes in {}", image.display()),
        package: PACKAGE,
        hint: "ask for another disk size (`--size`)",
        limit: LIMIT,
    };
    let extended = format!("hash_seed={uuid},lazy_itable_init=0,lazy_journal_init=0,nodiscard");
    let mut mke2fs = command("mke2fs", ["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256"]);
    mke2fs
        .args(["-m", "0", "-L", "root", "-O", FEATURES, "-U", &uuid, "-E", &extended])
        .args(["-N", &inodes.to_string()])
        .arg(image)
        .env("MKE2FS_CONFIG", &config);
    format.run(&mut mke2fs)?;

    let script = scratch.path().join("script");
    fs::write(&script, script_of(tree, scratch.path())?)
        .attempt(|| format!("writing {}", script.display()))?;
    fill(image, &script, nodes, bytes)?;
    check(image, nodes)?;
    files::dig_holes(image)
}

fn command<const N: usize>(program: &str, arguments: [&str; N]) -> Command {
    let mut command = Command::new(program);
    // Debian keeps these out of the path of users who are not root.
    let path = std::env::var("PATH").unwrap_or_default();
    command.args(arguments);
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command.env("E2FSPROGS_FAKE_TIME", EPOCH.to_string());
    command
}

fn fill(image: &Path, script: &Path, nodes: u64, bytes: u64) -> Result<()> {
    let tool = Tool {
        operation: format!("filling {} with {nodes} files and directories", image.display()),
        package: PACKAGE,
        hint: "see its message",
        limit: LIMIT,
    };
    let output = tool.run(command("debugfs", ["-w", "-f"]).arg(script).arg(image))?;
    let text = String::from_utf8_lossy(&output.stderr);
    let mut complaints = text.lines().filter(|line| !line.starts_with("debugfs ")).peekable();
    if complaints.peek().is_none() {
        return Ok(());
    }
    let first: Vec<&str> = complaints.take(3).collect();
    let full = text.contains("Could not allocate") || text.contains("No free space");
    if full {
        return Err(PackageError::TooLarge {
            what: format!("the root of {nodes} files and directories"),
            found: bytes,
            limit: bytes,
            hint: format!("it does not fit into its disk: ask for more (`--size`); {}", first[0]),
        });
    }
    Err(PackageError::Input {
        input: tool.operation,
        problem: format!("debugfs said: {}", first.join("; ")),
    })
}

/// Lets e2fsck look at the image and compares the number of inodes.
fn check(image: &Path, nodes: u64) -> Result<()> {
    let tool = Tool {
        operation: format!("checking the new file system {}", image.display()),
        package: PACKAGE,
        hint: "this is a defect of the package builder or of e2fsprogs; please report it",
        limit: LIMIT,
    };
    let output = tool.run(command("e2fsck", ["-f", "-n"]).arg(image))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // root: 38/32768 files (0.0% non-contiguous), …
    let used = text
        .lines()
        .find_map(|line| line.strip_prefix("root: ")?.split_once('/'))
        .and_then(|(used, _)| used.parse::<u64>().ok());
    // The tree's root directory is one of the reserved inodes.
    let expected = RESERVED_INODES + nodes - 1;
    if used != Some(expected) {
        return Err(PackageError::Input {
            input: tool.operation,
            problem: format!("expected {expected} inodes in use, e2fsck says: {}", text.trim()),
        });
    }
    Ok(())
}

fn uuid(seed: &Blake3) -> String {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&seed.0[..16]);
    // Version 8 (made as its maker likes) of the RFC's variant.
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// The commands that put a tree into an empty file system; the same for the same tree. Values of extended attributes go to
/// files in `scratch`.
pub(crate) fn script_of(tree: &Tree, scratch: &Path) -> Result<Vec<u8>> {
    let mut script = Script { out: Vec::new(), scratch, values: 0 };
    let mut first_names: BTreeMap<usize, (&[u8], u32)> = BTreeMap::new();
    let mut here: &[u8] = b"";
    script.attributes(b"/", tree.inode(0))?;
    for (path, number) in tree.names().skip(1) {
        let split = path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
        let (dir, name) = path.split_at(split);
        if dir != here {
            script.line(&[b"cd", &quote(&[b"/", dir].concat())])?;
            here = dir;
        }
        // With `./`, a name like `<12>` is a name and not the number of an inode.
        let place = quote(&[b"./", name].concat());
        let inode = tree.inode(number);
        if let Some((first, links)) = first_names.get_mut(&number) {
            *links += 1;
            let first = quote(&[b"/", *first].concat());
            script.line(&[b"ln", &first, &quote(name)])?;
            script.line(&[b"sif", &place, b"links_count", links.to_string().as_bytes()])?;
            continue;
        }
        first_names.insert(number, (path, 1));
        script.make(&quote(name), &inode.kind)?;
        script.attributes(&place, inode)?;
    }
    Ok(script.out)
}

struct Script<'a> {
    out: Vec<u8>,
    scratch: &'a Path,
    values: usize,
}

impl Script<'_> {
    fn line(&mut self, words: &[&[u8]]) -> Result<()> {
        let line = words.join(&b' ');
        if line.len() > MAX_LINE || line.contains(&b'\n') {
            return Err(PackageError::Input {
                input: show(&line),
                problem: "a name with a line break, or a longer one than the file system's tools \
                          take, cannot be put into an image; rename it"
                    .to_owned(),
            });
        }
        self.out.extend(line);
        self.out.push(b'\n');
        Ok(())
    }

    fn make(&mut self, name: &[u8], kind: &Kind) -> Result<()> {
        let path = |path: &Path| quote(path.as_os_str().as_encoded_bytes());
        match kind {
            Kind::Directory => self.line(&[b"mkdir", name]),
            Kind::File { blob, .. } => self.line(&[b"write", &path(blob), name]),
            Kind::Symlink { target } => self.line(&[b"symlink", name, &quote(target)]),
            Kind::Fifo => self.line(&[b"mknod", name, b"p"]),
            Kind::Character { major, minor } => self.node(name, b"c", *major, *minor),
            Kind::Block { major, minor } => self.node(name, b"b", *major, *minor),
        }
    }

    fn node(&mut self, name: &[u8], kind: &[u8], major: u32, minor: u32) -> Result<()> {
        let (major, minor) = (major.to_string(), minor.to_string());
        self.line(&[b"mknod", name, kind, major.as_bytes(), minor.as_bytes()])
    }

    fn attributes(&mut self, place: &[u8], inode: &Inode) -> Result<()> {
        let kind = match inode.kind {
            Kind::Directory => 0o040_000,
            Kind::File { .. } => 0o100_000,
            Kind::Symlink { .. } => 0o120_000,
            Kind::Character { .. } => 0o020_000,
            Kind::Block { .. } => 0o060_000,
            Kind::Fifo => 0o010_000,
        };
        let meta = &inode.meta;
        self.field(place, "mode", &format!("0{:o}", kind | meta.mode))?;
        if meta.uid != 0 {
            self.field(place, "uid", &meta.uid.to_string())?;
        }
        if meta.gid != 0 {
            self.field(place, "gid", &meta.gid.to_string())?;
        }
        if meta.mtime > 0 {
            // Seconds that need no extra bits.
            let seconds = meta.mtime.min(i64::from(i32::MAX));
            self.field(place, "mtime", &format!("@{seconds}"))?;
        }
        for (name, value) in &meta.xattrs {
            let file = self.scratch.join(format!("value{}", self.values));
            self.values += 1;
            let attempt = || format!("writing {}", file.display());
            files::create(&file)?.write_all(value).attempt(attempt)?;
            let file = quote(file.as_os_str().as_encoded_bytes());
            self.line(&[b"ea_set", b"-f", &file, place, &quote(name)])?;
        }
        Ok(())
    }

    fn field(&mut self, place: &[u8], field: &str, value: &str) -> Result<()> {
        self.line(&[b"sif", place, field.as_bytes(), value.as_bytes()])
    }
}

/// A word for debugfs: in quotes, inside which a quote is doubled.
fn quote(word: &[u8]) -> Vec<u8> {
    let mut quoted = vec![b'"'];
    for byte in word {
        if *byte == b'"' {
            quoted.push(b'"');
        }
        quoted.push(*byte);
    }
    quoted.push(b'"');
    quoted
}

#[cfg(test)]
mod tests;
