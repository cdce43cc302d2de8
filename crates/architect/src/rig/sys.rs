//! Starting a process in another network namespace.

use std::{fs::File, io, os::unix::process::CommandExt, process::Command};

/// Makes `command` run in the network namespace that `namespace` is an open descriptor of.
pub(super) fn enter(command: &mut Command, namespace: File) {
    // SAFETY: between fork and exec the closure makes only a system call (setns) on a value made
    // before; it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || {
            nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)
                .map_err(io::Error::from)
        });
    }
}
