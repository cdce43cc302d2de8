//! For tests and benchmarks of the data path: network namespaces without names, which go with the
//! process that made them, whatever ends it; machines without a processor; and traffic.

pub mod edges;
pub mod fleet;
pub mod line;
pub mod machine;
pub mod sniff;
pub mod traffic;
pub mod tunnel;

use crate::exec::{self, KernelError};
use nix::sched::{CloneFlags, setns, unshare};
use std::{
    fs::File,
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

/// A network namespace that nobody else has.
#[derive(Debug)]
pub struct Space {
    file: File,
}

impl Space {
    /// Makes one, with its loopback up. Needs root.
    pub fn new() -> Result<Self, KernelError> {
        let fail = |e: &dyn std::fmt::Display| {
            KernelError::new("make a network namespace", format!("{e} (it needs root)"))
        };
        let made = thread::scope(|scope| {
            let thread = scope.spawn(|| -> Result<File, KernelError> {
                unshare(CloneFlags::CLONE_NEWNET).map_err(|e| fail(&e))?;
                exec::run("ip", &["link", "set", "dev", "lo", "up"], "")?;
                File::open("/proc/thread-self/ns/net").map_err(|e| fail(&e))
            });
            thread.join().map_err(|_| fail(&"its thread failed"))
        });
        Ok(Self { file: made?? })
    }

    /// Runs something in it, on a thread of its own; sockets that it opens stay there. A panic
    /// goes on in the caller.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)
                    .expect("a namespace whose descriptor is open can be entered by root");
                work()
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Starts something in it, on a thread of its own.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let file = self.file.try_clone().expect("a descriptor can be duplicated");
        thread::spawn(move || {
            setns(&file, CloneFlags::CLONE_NEWNET)
                .expect("a namespace whose descriptor is open can be entered by root");
            work()
        })
    }

    /// Runs lines of `ip` in it.
    pub fn ip(&self, script: &str) -> Result<(), KernelError> {
        self.run(|| exec::run("ip", &["-batch", "-"], script)).map(drop)
    }

    /// Writes a setting below `/proc/sys` of it.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<(), KernelError> {
        self.run(|| exec::sysctl(key, value))
    }

    /// Joins two of them by a veth pair; both ends are up.
    pub fn join(&self, interface: &str, other: &Self, its: &str) -> Result<(), KernelError> {
        // `ip` is another process, so the descriptor is named by ours.
        let path = format!("/proc/{}/fd/{}", std::process::id(), other.file.as_raw_fd());
        self.ip(&format!(
            "link add {interface} type veth peer name {its} netns {path}\nlink set {interface} up\n"
        ))?;
        other.ip(&format!("link set {its} up\n"))
    }
}

/// Waits until `done` says so; false at the deadline.
pub fn wait_for(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !done() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}
