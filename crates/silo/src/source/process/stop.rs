//! Stopping a process and letting it go on.

use super::{ProcessDevice, SourceError};
use std::{
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

/// A process that stands still; dropping it lets the process go on.
pub struct Stopped<'a> {
    device: &'a ProcessDevice,
    /// It ran before.
    resume: bool,
}

/// A descriptor that means this process for ever.
pub(super) fn open_handle(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed; the result is checked before it is used.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn send(handle: &OwnedFd, signal: i32) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null pointer asks for the usual information; no other memory is passed.
    let sent = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, handle.as_raw_fd(), signal, no_info, 0)
    };
    if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether all threads of a process stand still.
fn all_stopped(pid: i32) -> io::Result<bool> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = match fs::read(task?.path().join("stat")) {
            Ok(stat) => stat,
            // The thread has just ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        // The name, in parentheses, may hold anything; the state follows the last of them.
        let name_end = stat.iter().rposition(|byte| *byte == b')').map_or(0, |at| at + 2);
        match stat.get(name_end) {
            Some(b'T' | b't' | b'Z' | b'X') => {}
            _ => return Ok(false),
        }
    }
    Ok(true)
}

impl ProcessDevice {
    /// Stops the process (SIGSTOP) and returns when all of its threads stand still.
    ///
    /// # Errors
    /// If that takes longer than `limit` (a thread may hang in the kernel); then the process goes
    /// on. Or if it has ended.
    pub fn stop(&self, limit: Duration) -> Result<Stopped<'_>, SourceError> {
        let pid = self.pid;
        let error = |detail: String| SourceError::Process { pid, detail };
        let failed = |source: io::Error| error(format!("could not be stopped: {source}"));
        let deadline = Instant::now() + limit;
        let resume = !all_stopped(pid).map_err(failed)?;
        send(&self.handle, libc::SIGSTOP).map_err(failed)?;
        // From here on it goes on when this is dropped.
        let stopped = Stopped { device: self, resume };
        let mut pause = Duration::from_micros(20);
        loop {
            if all_stopped(pid).map_err(failed)? {
                return Ok(stopped);
            }
            if Instant::now() >= deadline {
                let text = format!("did not stand still within {limit:?}; it goes on");
                return Err(error(text));
            }
            // The kernel tells nobody but the parent; this looks, at first very often.
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        }
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        if self.resume
            && let Err(error) = send(&self.device.handle, libc::SIGCONT)
        {
            tracing::warn!(%error, pid = self.device.pid, "a stopped process cannot be continued");
        }
    }
}
