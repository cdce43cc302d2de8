//! The preload hook that makes a userfaultfd inside QEMU and hands it to drafter.
//!
//! A userfaultfd serves the address space of the process that made it, and QEMU, which runs as an
//! unprivileged user, may not make one. So the runner opens `/dev/userfaultfd`, starts QEMU with
//! this library in `LD_PRELOAD` and passes two descriptors by number:
//!
//! | variable | descriptor |
//! |---|---|
//! | `DRAFTER_SHIM_UFFD_FD` | `/dev/userfaultfd`, opened by the runner |
//! | `DRAFTER_SHIM_SOCKET_FD` | QEMU's end of a unix stream socket pair |
//!
//! Before QEMU's `main`, still outside its seccomp sandbox, the constructor makes the userfaultfd
//! and sends one message of 8 bytes: `DUF1`, then an errno (0: it worked) as a little-endian
//! 32-bit number. On success the descriptor travels with the message (`SCM_RIGHTS`). Then it waits
//! for one byte from the runner, who writes down first that this QEMU exists; without it (the
//! runner died, or the time it set for the socket is over) the process ends, so that no QEMU runs
//! that nobody knows of. Drafter's half is in `drafter::driver::qemu::shim`; a change of the
//! message is a change of its magic.
//!
//! A third variable, `DRAFTER_SHIM_PRIVATE_FD`, is for a copy of a running machine: it names the
//! machine's memory file by descriptor, and from then on that file is mapped privately in this
//! process where a shared mapping is asked for ([`sys`] has the `mmap` that does it). QEMU still
//! believes that its memory is shared, so its state stream has no memory in it; what the guest
//! writes becomes pages of this process, and what it only reads stays one page for all copies.
//!
//! What must hold: one copy of the userfaultfd stays open in QEMU for life, because protection and
//! tracking end when the last one closes; the runner may come and go. Everything else that was
//! passed for the shim is closed (the memory file is QEMU's and stays), and its variables are
//! removed. Without the first two variables, or with nonsense in them, the library does nothing; with
//! nonsense in the third the process ends, because a shared mapping would write into a file that
//! other machines read.
//!
//! Beside that it has QEMU look for the servers of its disks more often ([`reconnect`]).
//!
//! No dependencies: what is preloaded into another program should be small enough to read.

mod reconnect;
mod sys;

use std::{env, os::fd::RawFd};

const UFFD_FD: &str = "DRAFTER_SHIM_UFFD_FD";
const SOCKET_FD: &str = "DRAFTER_SHIM_SOCKET_FD";
const PRIVATE_FD: &str = "DRAFTER_SHIM_PRIVATE_FD";
const PRELOAD: &str = "LD_PRELOAD";

/// Magic of the message; the last byte is its version.
const MAGIC: &[u8; 4] = b"DUF1";

/// The message for a result: 0 or an errno.
fn message(errno: i32) -> [u8; 8] {
    let [a, b, c, d] = *MAGIC;
    let [e, f, g, h] = errno.to_le_bytes();
    [a, b, c, d, e, f, g, h]
}

fn descriptor(variable: &str) -> Option<RawFd> {
    let number: RawFd = env::var(variable).ok()?.parse().ok()?;
    (number > 2).then_some(number)
}

/// The descriptor in `LD_PRELOAD=/proc/self/fd/N`: drafter passes this library that way when its
/// path is out of QEMU's reach.
fn own_descriptor() -> Option<RawFd> {
    env::var(PRELOAD).ok()?.strip_prefix("/proc/self/fd/")?.parse().ok()
}

/// Runs once, before QEMU's `main`.
fn start() {
    let (Some(device), Some(socket)) = (descriptor(UFFD_FD), descriptor(SOCKET_FD)) else { return };
    let own = own_descriptor();
    if env::var_os(PRIVATE_FD).is_some() && !descriptor(PRIVATE_FD).is_some_and(sys::map_privately)
    {
        sys::end();
    }
    sys::remove_variables([UFFD_FD, SOCKET_FD, PRIVATE_FD, PRELOAD]);

    match sys::new_userfaultfd(device) {
        // The userfaultfd stays open on purpose, also when nobody took its copy.
        Ok(userfaultfd) => sys::send(socket, &message(0), Some(userfaultfd)),
        Err(errno) => sys::send(socket, &message(errno), None),
    }
    if !sys::receives_a_byte(socket) {
        sys::end();
    }
    for descriptor in [Some(device), Some(socket), own].into_iter().flatten() {
        sys::close(descriptor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_is_these_bytes() {
        assert_eq!(message(0), *b"DUF1\0\0\0\0");
        assert_eq!(message(13), *b"DUF1\x0d\0\0\0");
    }
}
