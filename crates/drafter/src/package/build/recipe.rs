//! Recipes: what goes into a package, as a JSON file or put together from flags.

use super::debian::DEFAULT_EXCLUDE;
use crate::package::{
    error::{PackageError, Result},
    files,
    manifest::{Port, check_name},
};
use drafter_guest::config::{AtEnd, Hooks, Probes, Restart};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// The version of recipes that this code reads.
pub const RECIPE_VERSION: u32 = 1;

/// Largest disk that is made.
const MAX_DISK_MIB: u64 = 16 << 20;

/// What goes into a package.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// See [`RECIPE_VERSION`].
    pub recipe: u32,
    /// Name of the package.
    pub name: String,
    /// Where the root comes from.
    pub root: Root,
    /// Where the kernel comes from.
    #[serde(default)]
    pub kernel: Kernel,
    /// Kernel modules that the initramfs loads besides those that every machine needs.
    #[serde(default)]
    pub modules: Vec<String>,
    /// Kernel command line of the package.
    #[serde(default = "command_line")]
    pub command_line: String,
    /// Memory in MiB unless the user asks otherwise.
    #[serde(default = "memory_mib")]
    pub memory_mib: u64,
    /// Virtual processors unless the user asks otherwise.
    #[serde(default = "vcpus")]
    pub vcpus: u32,
    /// CPU features that the guest must have, by their names in `/proc/cpuinfo`.
    #[serde(default)]
    pub cpu_features: Vec<String>,
    /// Size of the first disk in MiB; without it, twice what is in it, and at least 512.
    #[serde(default)]
    pub disk_mib: Option<u64>,
    /// Users to add, each with a group of its own name.
    #[serde(default)]
    pub users: Vec<User>,
    /// Directories to make, or to give to someone.
    #[serde(default)]
    pub directories: Vec<Directory>,
    /// Files to add.
    #[serde(default)]
    pub files: Vec<AddedFile>,
    /// What runs in the machine.
    #[serde(default)]
    pub entry: Entry,
    /// What it listens on. Empty: what the image says, if the root is one.
    #[serde(default)]
    pub ports: Vec<Port>,
}

/// Where the root comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Root {
    /// Debian packages with all they need. Their installation scripts are not run.
    Debian {
        /// Names, as in `redis-server` or `redis-server=5:7.0.15-1`.
        packages: Vec<String>,
        /// Packages to keep out, besides [`DEFAULT_EXCLUDE`].
        #[serde(default)]
        exclude: Vec<String>,
        /// Packages of [`DEFAULT_EXCLUDE`] that stay in.
        #[serde(default)]
        include: Vec<String>,
    },
    /// A directory; all in it will belong to root.
    Directory {
        /// Which.
        path: PathBuf,
    },
    /// An OCI image layout on disk.
    Oci {
        /// Its directory.
        layout: PathBuf,
        /// Name or digest of the image, where the layout has several.
        #[serde(default)]
        image: Option<String>,
    },
}

impl Root {
    /// What is kept out of a root of Debian packages.
    pub(crate) fn excluded(exclude: &[String], include: &[String]) -> Vec<String> {
        let default = DEFAULT_EXCLUDE.iter().map(|name| (*name).to_owned());
        let mut all: Vec<String> =
            default.filter(|name| !include.contains(name)).chain(exclude.iter().cloned()).collect();
        all.sort();
        all.dedup();
        all
    }
}

/// Where the kernel comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Kernel {
    /// A Debian package, or one that depends on the current kernel package.
    Debian(String),
    /// Files on this host.
    Files {
        /// bzImage or ELF.
        image: PathBuf,
        /// As in `/lib/modules/RELEASE`; its last part is the release.
        modules: PathBuf,
    },
}

impl Default for Kernel {
    fn default() -> Self {
        Self::Debian("linux-image-cloud-amd64".to_owned())
    }
}

/// A user to add.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Name of the user and of its group.
    pub name: String,
    /// Number; without it, the first free one from 100.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Number of the group; without it, that of the user.
    #[serde(default)]
    pub gid: Option<u32>,
    /// Home directory.
    #[serde(default = "home")]
    pub home: String,
}

/// A directory to make, or to give to someone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Directory {
    /// Where.
    pub path: String,
    /// `user`, `user:group`, or numbers.
    #[serde(default = "root_user")]
    pub owner: String,
    /// Permissions in octal, as in `"0750"`.
    #[serde(default = "directory_mode")]
    pub mode: Mode,
}

/// A file to add.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddedFile {
    /// The file here; a relative path begins at the recipe.
    pub from: PathBuf,
    /// Where it goes in the machine.
    pub to: String,
    /// `user`, `user:group`, or numbers.
    #[serde(default = "root_user")]
    pub owner: String,
    /// Permissions in octal; without them, those of the file here.
    #[serde(default)]
    pub mode: Option<Mode>,
}

/// Permissions; in text, octal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode(pub u32);

impl Serialize for Mode {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:04o}", self.0))
    }
}

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        u32::from_str_radix(&text, 8).ok().filter(|mode| *mode <= 0o7777).map(Self).ok_or_else(
            || serde::de::Error::custom(format!("{text:?} is not a mode, as in \"0750\"")),
        )
    }
}

/// What runs in the machine. What is not said comes from the image, if the root is one, else from
/// the defaults of [`drafter_guest::config::MachineConfig`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Program and arguments.
    #[serde(default)]
    pub argv: Option<Vec<String>>,
    /// Environment; added to that of the image.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Where it starts.
    #[serde(default)]
    pub working_dir: Option<String>,
    /// Who it runs as.
    #[serde(default)]
    pub user: Option<String>,
    /// When it starts again.
    #[serde(default)]
    pub restart: Restart,
    /// What follows its last end.
    #[serde(default)]
    pub at_end: AtEnd,
    /// Milliseconds between SIGTERM and SIGKILL.
    #[serde(default)]
    pub stop_timeout_ms: Option<u64>,
    /// Commands around a move.
    #[serde(default)]
    pub hooks: Hooks,
    /// How to see from inside whether the machine does its work.
    #[serde(default)]
    pub probes: Probes,
}

impl Recipe {
    /// A recipe with all defaults.
    #[must_use]
    pub fn new(name: impl Into<String>, root: Root) -> Self {
        Self {
            recipe: RECIPE_VERSION,
            name: name.into(),
            root,
            kernel: Kernel::default(),
            modules: Vec::new(),
            command_line: command_line(),
            memory_mib: memory_mib(),
            vcpus: vcpus(),
            cpu_features: Vec::new(),
            disk_mib: None,
            users: Vec::new(),
            directories: Vec::new(),
            files: Vec::new(),
            entry: Entry::default(),
            ports: Vec::new(),
        }
    }

    /// Reads a recipe file. Relative paths in it begin at its directory.
    ///
    /// # Errors
    /// When it cannot be read, is of a newer version, or has a field that is not known.
    pub fn read(path: &Path) -> Result<Self> {
        let text = files::read_bounded(path, 1 << 20)?;
        let wrong = |problem: String| PackageError::Input {
            input: format!("recipe {}", path.display()),
            problem,
        };
        let value: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|error| wrong(format!("is not JSON: {error}")))?;
        match value.get("recipe").and_then(serde_json::Value::as_u64) {
            Some(version) if version == u64::from(RECIPE_VERSION) => {}
            Some(version) => {
                return Err(wrong(format!(
                    "has version {version}, this drafter reads {RECIPE_VERSION}"
                )));
            }
            None => return Err(wrong(format!("does not say \"recipe\": {RECIPE_VERSION}"))),
        }
        let mut recipe: Self = serde_json::from_value(value)
            .map_err(|error| wrong(format!("cannot be read: {error}")))?;
        recipe.relative_to(path.parent().unwrap_or(Path::new("")));
        Ok(recipe)
    }

    /// Makes the paths of this host begin at `dir` where they are relative.
    fn relative_to(&mut self, dir: &Path) {
        let move_to = |path: &mut PathBuf| *path = dir.join(&*path);
        match &mut self.root {
            Root::Debian { .. } => {}
            Root::Directory { path } | Root::Oci { layout: path, .. } => move_to(path),
        }
        if let Kernel::Files { image, modules } = &mut self.kernel {
            move_to(image);
            move_to(modules);
        }
        self.files.iter_mut().for_each(|file| move_to(&mut file.from));
    }

    /// Checks what the types cannot say and what the manifest would refuse only at the end.
    pub(crate) fn check(&self) -> Result<()> {
        let wrong =
            |problem: String| Err(PackageError::Request { name: self.name.clone(), problem });
        if let Err(problem) = check_name(&self.name) {
            return wrong(format!("its name {problem}"));
        }
        if let Root::Debian { packages, .. } = &self.root
            && packages.is_empty()
        {
            return wrong("it names no Debian package".to_owned());
        }
        if self.disk_mib.is_some_and(|mib| !(16..=MAX_DISK_MIB).contains(&mib)) {
            return wrong(format!("the disk's size is not between 16 MiB and {MAX_DISK_MIB} MiB"));
        }
        if !(32..=16 << 20).contains(&self.memory_mib) || self.vcpus == 0 {
            return wrong("it needs at least 32 MiB of memory and one processor".to_owned());
        }
        Ok(())
    }
}

fn command_line() -> String {
    "quiet".to_owned()
}

const fn memory_mib() -> u64 {
    256
}

const fn vcpus() -> u32 {
    1
}

fn home() -> String {
    "/nonexistent".to_owned()
}

fn root_user() -> String {
    "root".to_owned()
}

const fn directory_mode() -> Mode {
    Mode(0o755)
}
