//! Reaching into another process, as only root may: for what cannot be broken from outside.

use nix::sys::socket::{
    Shutdown, UnixAddr, getpeername, getsockname, getsockopt, shutdown, sockopt::PeerCredentials,
};
use std::{
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// A copy of a descriptor of another process.
fn descriptor_of(pid: u32, number: i32) -> io::Result<OwnedFd> {
    let owned = |made: libc::c_long| match made {
        // SAFETY: the kernel has just made this descriptor for us.
        0.. => Ok(unsafe { OwnedFd::from_raw_fd(made as i32) }),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: takes numbers only.
    let process = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

/// Breaks the socket into which a machine's monitor will write its state at the next pause: the end of a
/// pair without names that somebody else has made, its runner. How many were broken.
#[must_use]
pub fn break_state_channel(monitor: u32) -> usize {
    let mut broken = 0;
    for entry in fs::read_dir(format!("/proc/{monitor}/fd")).unwrap().flatten() {
        let is_socket = fs::read_link(entry.path())
            .is_ok_and(|target| target.to_string_lossy().starts_with("socket:"));
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let (true, Some(number)) = (is_socket, number) else { continue };
        // One that was closed meanwhile is not the one.
        let Ok(socket) = descriptor_of(monitor, number) else { continue };
        let nameless = |address: nix::Result<UnixAddr>| address.is_ok_and(|a| a.path().is_none());
        let is_given =
            || getsockopt(&socket, PeerCredentials).is_ok_and(|c| c.pid() as u32 != monitor);
        let (here, there) = (getsockname(socket.as_raw_fd()), getpeername(socket.as_raw_fd()));
        if nameless(here) && nameless(there) && is_given() {
            shutdown(socket.as_raw_fd(), Shutdown::Both).unwrap();
            broken += 1;
        }
    }
    broken
}
