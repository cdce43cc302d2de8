//! A named network namespace, and running things in it.

use super::{RigError, io_failed, sys};
use conduit::exec;
use nix::sched::{CloneFlags, setns};
use std::{
    ffi::OsStr,
    fmt,
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

/// Where `ip netns` keeps them.
const FOLDER: &str = "/run/netns";

/// A network namespace of a rig.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    name: String,
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Namespace {
    pub(super) fn new(prefix: &str, part: &str) -> Self {
        Self { name: format!("{prefix}-{part}") }
    }

    /// The namespaces of a rig with this prefix that exist, and no others: `zz-a` and `zz-edge`
    /// are of the rig `zz`, `zz-other` is not.
    pub(super) fn existing(prefix: &str) -> Result<Vec<Self>, RigError> {
        let hosts = (b'a'..=b'h').map(|c| char::from(c).to_string());
        let parts = ["client".to_owned(), "edge".to_owned()].into_iter().chain(hosts);
        let all = parts.map(|part| Self::new(prefix, &part));
        Ok(all.filter(|n| n.path().exists()).collect())
    }

    /// Its name, as `ip netns` shows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn path(&self) -> PathBuf {
        Path::new(FOLDER).join(&self.name)
    }

    pub(super) fn create(&self) -> Result<(), RigError> {
        exec::run("ip", &["netns", "add", &self.name], "")?;
        self.ip("link set dev lo up\n")
    }

    pub(super) fn remove(&self) -> Result<(), RigError> {
        if self.path().exists() {
            // Pins of BPF objects know no namespaces: they would stay.
            match self.run(|| conduit::sweep_pins(Path::new(conduit::PINS))) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(namespace = self.name, %error, "pins may stay"),
                Err(error) => tracing::warn!(namespace = self.name, %error, "pins may stay"),
            }
            exec::run("ip", &["netns", "del", &self.name], "")?;
        }
        Ok(())
    }

    fn open(&self) -> Result<File, RigError> {
        File::open(self.path()).map_err(io_failed(format!("open namespace {}", self.name)))
    }

    /// Runs lines of `ip` in it.
    pub fn ip(&self, script: &str) -> Result<(), RigError> {
        exec::run("ip", &["-n", &self.name, "-batch", "-"], script)?;
        Ok(())
    }

    /// Runs `work` on a thread inside the namespace and returns its result. Sockets and taps that
    /// it opens stay in the namespace, whoever uses them later; processes that it starts are in it.
    ///
    /// A panic of `work` goes on in the caller.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, RigError> {
        let file = self.open()?;
        thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(&file, CloneFlags::CLONE_NEWNET)
                    .map_err(|e| io_failed(format!("enter namespace {}", self.name))(e.into()))?;
                Ok(work())
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A command that will run in the namespace. Unlike `ip netns exec` it changes nothing else
    /// (no mounts), so `/sys` still shows the interfaces of the caller.
    ///
    /// # Panics
    /// If the namespace does not exist (the rig was removed).
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let file = self.open().expect("a rig's namespaces exist for as long as the rig");
        sys::enter(&mut command, file);
        command
    }
}
