//! The manifest: everything about a package but its bytes.
//!
//! Written by the builder, read by whoever boots, verifies or moves a machine. It names its format
//! and version first; a foreign file and a newer version are told apart from a damaged one. The
//! *identity* of a package is the BLAKE3 of the manifest's canonical form (see [`PackageId`]); as
//! the manifest carries the hash of every file, it is the identity of all content.

use super::error::{PackageError, Result};
use drafter_guest::config::MachineConfig;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fmt, path::Path, str::FromStr};

/// The value of [`Manifest::format`].
pub const FORMAT: &str = "drafter-package";

/// The version this code writes, and the newest it reads.
pub const FORMAT_VERSION: u32 = 1;

/// File name of the manifest in a package.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Largest manifest that is read.
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;

/// Smallest and largest memory that a manifest may ask for by default.
const MEMORY_RANGE: std::ops::RangeInclusive<u64> = (32 << 20)..=(16 << 40);

const MAX_VCPUS: u32 = 1024;

/// Everything about a package but its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always [`FORMAT`].
    pub format: String,
    /// See [`FORMAT_VERSION`].
    pub version: u32,
    /// Name of the package: letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// Program and version that built it.
    pub created_by: String,
    /// Machine type, as in `microvm`.
    pub machine_type: String,
    /// What the guest's processor must be.
    pub cpu: CpuNeeds,
    /// Memory in bytes unless the user asks otherwise; a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// Virtual processors unless the user asks otherwise.
    pub vcpus: u32,
    /// Release of the kernel, as `uname -r` says inside.
    pub kernel_release: String,
    /// Kernel command line of the package; the driver and the instance add theirs.
    pub command_line: String,
    /// Entry point, environment, user, restart policy, hooks, probes: what the guest itself reads.
    pub guest: MachineConfig,
    /// What the machine listens on.
    pub ports: Vec<Port>,
    /// Disks in the order in which the guest sees them; the first holds the root.
    pub devices: Vec<Device>,
    /// The kernel (ELF).
    pub kernel: FileEntry,
    /// The initramfs (uncompressed cpio).
    pub initramfs: FileEntry,
    /// What went into it.
    pub sources: Vec<Source>,
}

/// What the guest's processor must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuNeeds {
    /// As in `x86_64`.
    pub architecture: String,
    /// Features by the names of `/proc/cpuinfo`, sorted. Empty: the baseline of the architecture.
    pub features: Vec<String>,
}

/// A port that the machine listens on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// What it is for.
    pub name: String,
    /// TCP or UDP.
    pub protocol: conduit::Protocol,
    /// The port; not 0.
    pub port: u16,
}

impl FromStr for Port {
    type Err = String;

    /// Reads `6379`, `6379/udp` or `redis=6379/tcp`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once('=').map_or((None, text), |(n, r)| (Some(n), r));
        let (number, protocol) = rest.split_once('/').unwrap_or((rest, "tcp"));
        let port = number
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| format!("{text:?} is not of the form [NAME=]PORT[/tcp|udp]"))?;
        let protocol = match protocol {
            "tcp" => conduit::Protocol::Tcp,
            "udp" => conduit::Protocol::Udp,
            other => return Err(format!("{other:?} is not a protocol: tcp or udp")),
        };
        let name = name.map_or_else(|| rest.replace('/', "-"), str::to_owned);
        Ok(Self { name, protocol, port })
    }
}

/// A file of the package.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// File name in the package's directory.
    pub file: String,
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3 of the content.
    pub blake3: Blake3,
}

/// The read-only base of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// The device's name, as in `root`.
    pub name: String,
    /// File name in the package's directory.
    pub file: String,
    /// Length in bytes; a multiple of the block size.
    pub bytes: u64,
    /// BLAKE3 of the content.
    pub blake3: Blake3,
}

/// Something that went into a package.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind", deny_unknown_fields)]
pub enum Source {
    /// A Debian package.
    Deb {
        /// Its name.
        name: String,
        /// Its version.
        version: String,
        /// SHA-256 of the file, in hex.
        sha256: String,
    },
    /// An OCI image.
    Oci {
        /// Digest of its manifest, as in `sha256:…`.
        digest: String,
    },
    /// A directory, or single files.
    Files {
        /// What they were for.
        name: String,
        /// BLAKE3 over names, modes and contents.
        blake3: Blake3,
    },
}

/// A BLAKE3 hash; in text, 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Blake3(pub [u8; 32]);

impl Blake3 {
    /// The hash of `data`.
    #[must_use]
    pub fn of(data: &[u8]) -> Self {
        Self(*blake3::hash(data).as_bytes())
    }
}

impl From<blake3::Hash> for Blake3 {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl fmt::Display for Blake3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Blake3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Blake3 {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = !text.bytes().any(|b| b.is_ascii_uppercase());
        match blake3::Hash::from_hex(text) {
            Ok(hash) if lower => Ok(hash.into()),
            _ => Err(format!("{text:?} is not a hash of 64 lower-case hex digits")),
        }
    }
}

impl Serialize for Blake3 {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Blake3 {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Identity of a package: BLAKE3 over the canonical form of its manifest, which is its JSON with
/// the keys of every object in byte order and no white space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PackageId(pub Blake3);

impl fmt::Display for PackageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for PackageId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self)
    }
}

impl Manifest {
    /// Reads a manifest's text. `path` is for messages.
    ///
    /// # Errors
    /// Tells a foreign file, a newer format, and a manifest that breaks a rule apart.
    pub fn from_json(text: &[u8], path: &Path) -> Result<(Self, PackageId)> {
        let foreign = |why: String| PackageError::Foreign { path: path.to_owned(), why };
        let value: serde_json::Value = serde_json::from_slice(text)
            .map_err(|error| foreign(format!("its {MANIFEST_FILE} is not JSON ({error})")))?;
        // Format and version by themselves first: a later layout need not have today's fields.
        if value.get("format").and_then(serde_json::Value::as_str) != Some(FORMAT) {
            return Err(foreign(format!("its {MANIFEST_FILE} does not say format \"{FORMAT}\"")));
        }
        let invalid = |field: &str, problem: String| PackageError::Manifest {
            path: path.to_owned(),
            field: field.to_owned(),
            problem,
        };
        let version = value
            .get("version")
            .and_then(serde_json::Value::as_u64)
            .ok_or_else(|| invalid("version", "is not a number".to_owned()))?;
        if version > u64::from(FORMAT_VERSION) {
            return Err(PackageError::NewerFormat {
                path: path.to_owned(),
                found: version,
                known: FORMAT_VERSION,
            });
        }
        let id = identity(&value);
        let manifest: Self = serde_json::from_value(value)
            .map_err(|error| invalid("content", format!("cannot be read: {error}")))?;
        manifest.check().map_err(|(field, problem)| invalid(&field, problem))?;
        Ok((manifest, id))
    }

    /// The manifest's text: indented, with a final newline.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a manifest has only string keys") + "\n"
    }

    /// The package's identity.
    #[must_use]
    pub fn id(&self) -> PackageId {
        identity(&serde_json::to_value(self).expect("a manifest has only string keys"))
    }

    /// All files of the package but the manifest: kernel, initramfs, devices.
    #[must_use]
    pub fn files(&self) -> Vec<FileEntry> {
        let devices = self.devices.iter().map(|device| FileEntry {
            file: device.file.clone(),
            bytes: device.bytes,
            blake3: device.blake3,
        });
        [self.kernel.clone(), self.initramfs.clone()].into_iter().chain(devices).collect()
    }

    /// Checks what the types cannot say; names the field and the problem.
    fn check(&self) -> Result<(), (String, String)> {
        let fail = |field: &str, problem: &str| Err((field.to_owned(), problem.to_owned()));
        if self.version == 0 {
            return fail("version", "is 0");
        }
        check_name(&self.name).map_err(|problem| ("name".to_owned(), problem))?;
        if self.machine_type.is_empty() || self.cpu.architecture.is_empty() {
            return fail("machine_type or cpu.architecture", "is empty");
        }
        if !MEMORY_RANGE.contains(&self.memory_bytes) || !self.memory_bytes.is_multiple_of(1 << 20)
        {
            return fail("memory_bytes", "is not a number of MiB between 32 MiB and 16 TiB");
        }
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return fail("vcpus", "is not between 1 and 1024");
        }
        if self.command_line.contains(|c: char| c.is_control()) || self.command_line.len() > 1500 {
            return fail("command_line", "is not one line of at most 1500 characters");
        }
        self.guest.check().map_err(|error| ("guest".to_owned(), error.to_string()))?;
        if self.ports.iter().any(|port| port.port == 0 || port.name.is_empty()) {
            return fail("ports", "has a port without number or name");
        }
        if self.devices.is_empty() {
            return fail("devices", "is empty: a machine boots from its first device");
        }
        for device in &self.devices {
            check_name(&device.name).map_err(|problem| ("devices.name".to_owned(), problem))?;
            if device.bytes == 0 || !device.bytes.is_multiple_of(silo::block::BLOCK_SIZE as u64) {
                return fail("devices.bytes", "is not a positive multiple of 4096");
            }
        }
        let names: BTreeSet<&str> = self.devices.iter().map(|device| &*device.name).collect();
        if names.len() != self.devices.len() {
            return fail("devices", "has two devices of one name");
        }
        let files = self.files();
        for entry in &files {
            check_name(&entry.file).map_err(|problem| ("file".to_owned(), problem))?;
        }
        let names: BTreeSet<&str> = files.iter().map(|entry| &*entry.file).collect();
        if names.len() != files.len() || names.contains(MANIFEST_FILE) {
            return fail("file", "names are not all different");
        }
        Ok(())
    }
}

/// A name that is safe as a file name on every host: no path, nothing hidden.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if name.is_empty()
        || name.len() > 128
        || name.starts_with(['.', '-'])
        || !name.bytes().all(good)
    {
        return Err(format!(
            "{name:?} is not a plain name (1 to 128 letters, digits, '.', '_' and '-', not \
             beginning with '.' or '-')"
        ));
    }
    Ok(())
}

fn identity(value: &serde_json::Value) -> PackageId {
    let mut text = String::new();
    canonical(value, &mut text);
    PackageId(Blake3::of(text.as_bytes()))
}

/// Appends the canonical form. Sorts by itself, because whether `serde_json` keeps keys sorted
/// depends on the features that other crates ask of it.
fn canonical(value: &serde_json::Value, out: &mut String) {
    match value {
        serde_json::Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by(|a, b| a.0.as_bytes().cmp(b.0.as_bytes()));
            out.push('{');
            for (index, (key, value)) in entries.into_iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                out.push_str(&serde_json::Value::from(key.as_str()).to_string());
                out.push(':');
                canonical(value, out);
            }
            out.push('}');
        }
        serde_json::Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                canonical(item, out);
            }
            out.push(']');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

#[cfg(test)]
pub(crate) mod tests;
