//! What a runner writes down about a running QEMU, so that another runner can find it: the file
//! `qemu.json` in the machine's run directory.

use super::{cgroup::Cgroup, memory_map::FileId, process::Identity, users::UserLease};
use crate::driver::{DriverError, MachineShape};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

const FILE: &str = "qemu.json";
const VERSION: u32 = 2;
/// Version 1 knew machines with NBD disks only, and did not say so.
const OLDEST: u32 = 1;
/// Longest path of a unix socket, without the final zero (`sun_path` in unix(7)).
const LONGEST_SOCKET: usize = 107;

/// The record. Nothing in it goes to another host.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Record {
    pub(super) version: u32,
    pub(super) process: Identity,
    /// The user that QEMU runs as, if it has one of its own.
    pub(super) user: Option<UserLease>,
    pub(super) cgroup: Cgroup,
    pub(super) memory: FileId,
    /// It is mapped privately: the machine is a copy. Older runners did not say so, and had none.
    #[serde(default)]
    pub(super) memory_is_shared: bool,
    pub(super) disk_sockets: Vec<PathBuf>,
    pub(super) shape: MachineShape,
    /// Why it has no namespaces and no root of its own; `None`: it has.
    #[serde(default = "started_before")]
    pub(super) unconfined: Option<String>,
}

fn started_before() -> Option<String> {
    Some("it was started by an earlier version".into())
}

impl Record {
    pub(super) const VERSION: u32 = VERSION;

    /// What it runs without that keeps others from its host, each with its cause.
    pub(super) fn without(&self) -> Vec<String> {
        let walls =
            self.unconfined.iter().map(|why| format!("namespaces and a root of its own: {why}"));
        walls.chain(self.cgroup.without().iter().cloned()).collect()
    }

    /// Writes the record, whole or not at all.
    pub(super) fn save(&self, run_dir: &Path) -> Result<(), DriverError> {
        let path = run_dir.join(FILE);
        let new = run_dir.join("qemu.json.new");
        let host =
            |source| DriverError::Host { operation: format!("writing {}", path.display()), source };
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::from).map_err(host)?;
        fs::write(&new, text).and_then(|()| fs::rename(&new, &path)).map_err(host)
    }

    /// Reads the record of a run directory; `None` if there is none.
    pub(super) fn load(run_dir: &Path) -> Result<Option<Self>, DriverError> {
        let path = run_dir.join(FILE);
        let host =
            |source| DriverError::Host { operation: format!("reading {}", path.display()), source };
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(host(error)),
        };
        // The version first: another version's fields need not parse.
        #[derive(serde::Deserialize)]
        struct Versioned {
            version: u32,
        }
        let parse = |error: serde_json::Error| host(error.into());
        let found: Versioned = serde_json::from_slice(&text).map_err(parse)?;
        if !(OLDEST..=VERSION).contains(&found.version) {
            return Err(host(io::Error::new(
                io::ErrorKind::Unsupported,
                format!(
                    "it has version {}, this program reads {OLDEST} to {VERSION}",
                    found.version
                ),
            )));
        }
        serde_json::from_slice(&text).map(Some).map_err(parse)
    }

    pub(super) fn remove(run_dir: &Path) {
        let _ = fs::remove_file(run_dir.join(FILE));
    }
}

/// The files of a machine in its run directory.
#[derive(Clone, Debug)]
pub(super) struct Files {
    pub(super) run_dir: PathBuf,
    pub(super) qmp: PathBuf,
    pub(super) guest: PathBuf,
    pub(super) console: PathBuf,
    pub(super) console_log: PathBuf,
    pub(super) stderr: PathBuf,
}

impl Files {
    pub(super) fn of(run_dir: &Path) -> Self {
        let file = |name| run_dir.join(name);
        Self {
            run_dir: run_dir.to_owned(),
            qmp: file("qmp.sock"),
            guest: file("guest.sock"),
            console: file("console.sock"),
            console_log: file("console.log"),
            stderr: file("qemu.log"),
        }
    }

    pub(super) fn sockets(&self) -> [&Path; 3] {
        [&self.qmp, &self.guest, &self.console]
    }

    /// Fails if a socket's path is longer than the kernel takes.
    pub(super) fn check(&self, machine: &str) -> Result<(), DriverError> {
        for path in self.sockets() {
            let length = path.as_os_str().len();
            if length > LONGEST_SOCKET {
                return Err(DriverError::Invalid {
                    machine: machine.into(),
                    detail: format!(
                        "the path {} has {length} bytes and a unix socket's may have \
                         {LONGEST_SOCKET}; use a run directory with a shorter path",
                        path.display()
                    ),
                });
            }
        }
        Ok(())
    }

    /// Removes what a monitor that is gone left behind, except the logs.
    pub(super) fn remove(&self) {
        for path in self.sockets() {
            let _ = fs::remove_file(path);
        }
        Record::remove(&self.run_dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_another_version_is_refused_by_its_number_and_none_is_none() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Record::load(directory.path()).unwrap(), None);
        fs::write(directory.path().join(FILE), r#"{"version": 7, "pid": "x"}"#).unwrap();
        let error = std::error::Error::source(&Record::load(directory.path()).unwrap_err())
            .unwrap()
            .to_string();
        assert!(error.contains("version 7"), "{error}");
        fs::write(directory.path().join(FILE), "{").unwrap();
        Record::load(directory.path()).unwrap_err();
    }

    #[test]
    fn a_run_directory_too_long_for_sockets_is_refused_with_its_length() {
        let long = Path::new("/tmp").join("x".repeat(100));
        let error = Files::of(&long).check("m").unwrap_err().to_string();
        assert!(error.contains("107") && error.contains("shorter"), "{error}");
        Files::of(Path::new("/run/m")).check("m").unwrap();
    }
}
