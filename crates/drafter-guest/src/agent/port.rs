//! The guest's end of the channel as a descriptor: a virtio-serial port, or a stream in tests.
//!
//! A port stays open for the agent's life. While no host is connected, `poll` reports a hang-up
//! without end and reads give 0 bytes; the kernel tells of a host that comes by SIGIO, which a
//! signalfd turns into something to poll. A slow timer is the safety net.

use crate::{protocol::PORT_NAME, sys};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};
use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How often the port is looked at when no host is connected and no signal came.
const RECHECK: Duration = Duration::from_secs(1);

/// A hang-up that is over within this time was none; see [`Port::hang_up_lasts`].
const HANG_UP_GRACE: Duration = Duration::from_millis(100);

/// The guest's end of the channel.
pub struct Port {
    fd: OwnedFd,
    /// Readable when the host comes or goes; none for a stream, whose hang-up is final.
    changes: Option<SignalFd>,
}

/// What a wait found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ready {
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) hung_up: bool,
}

impl Port {
    /// Finds the port named [`PORT_NAME`] and opens it. Call it before the process has other
    /// threads: it blocks SIGIO for all that come later.
    ///
    /// # Errors
    /// When there is no such port (the machine was started without one, or the kernel without the
    /// `virtio_console` module), or another process has it open.
    pub fn open_virtio() -> io::Result<Self> {
        let path = find(Path::new("/sys/class/virtio-ports"), PORT_NAME)?;
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGIO);
        mask.thread_block()?;
        let changes = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            })?;
        sys::signal_changes(&file)?;
        Ok(Self { fd: file.into(), changes: Some(changes) })
    }

    /// A stream in place of the port, for tests: when the peer hangs up the agent ends.
    ///
    /// # Errors
    /// When the stream cannot be made non-blocking.
    pub fn from_stream(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { fd: stream.into(), changes: None })
    }

    /// Waits until something can be read, or written if `write`, or the host is gone.
    pub(crate) fn wait(&self, write: bool, limit: Duration) -> io::Result<Ready> {
        let events = if write { PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let mut fds = [PollFd::new(self.fd.as_fd(), events)];
        match poll(&mut fds, PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let seen = fds[0].revents().unwrap_or(PollFlags::empty());
        Ok(Ready {
            readable: seen.contains(PollFlags::POLLIN),
            writable: seen.contains(PollFlags::POLLOUT),
            hung_up: seen.intersects(PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL),
        })
    }

    /// Reads what is there: `None` if nothing is, `Some(0)` if no host is connected.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match nix::unistd::read(&self.fd, buffer) {
            Ok(read) => Ok(Some(read)),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(Errno::EPIPE | Errno::ECONNRESET) => Ok(Some(0)),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes some of `bytes`: `None` if the port takes nothing now.
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<Option<usize>> {
        match nix::unistd::write(&self.fd, bytes) {
            Ok(written) => Ok(Some(written)),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether a hang-up that was just seen lasts. The kernel learns of a host that came later than
    /// the host's first bytes (another queue, a work item), so for a moment a present host can
    /// look absent. `ends_with_bytes`: bytes to read count as a host too.
    pub(crate) fn hang_up_lasts(&self, ends_with_bytes: bool) -> io::Result<bool> {
        if self.changes.is_none() {
            return Ok(true);
        }
        let deadline = Instant::now() + HANG_UP_GRACE;
        while Instant::now() < deadline {
            let ready = self.wait(false, Duration::ZERO)?;
            if !ready.hung_up || (ready.readable && ends_with_bytes) {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(true)
    }

    /// Waits until a host is connected, without end; false if none can come any more.
    pub(crate) fn wait_for_host(&self) -> io::Result<bool> {
        let Some(changes) = &self.changes else { return Ok(false) };
        loop {
            // First empty the signals, then look, then sleep: a change in between wakes us.
            while changes.read_signal()?.is_some() {}
            if !self.wait(false, Duration::ZERO)?.hung_up {
                return Ok(true);
            }
            let mut fds = [PollFd::new(changes.as_fd(), PollFlags::POLLIN)];
            let limit = PollTimeout::try_from(RECHECK).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, limit) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The device of the virtio-serial port with this name.
fn find(class: &Path, name: &str) -> io::Result<PathBuf> {
    let missing = |why: &str| {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!(
                "no virtio-serial port \"{name}\" ({why}): the machine was started without the \
                 guest channel, or the initramfs lacks virtio_console"
            ),
        )
    };
    let entries = class.read_dir().map_err(|_| missing("the kernel knows no such class"))?;
    for entry in entries.flatten() {
        let found = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if found.trim_end() == name {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(missing("other ports at most"))
}

/// Waits for the port to appear, up to `limit`.
pub(crate) fn open_within(limit: Duration) -> io::Result<Port> {
    let deadline = Instant::now() + limit;
    loop {
        match Port::open_virtio() {
            Ok(port) => return Ok(port),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_found_by_its_name_among_others() {
        let class = std::env::temp_dir().join(format!("drafter-ports-{}", std::process::id()));
        for (device, name) in [("vport1p1", "org.other"), ("vport2p3", "drafter.agent")] {
            std::fs::create_dir_all(class.join(device)).unwrap();
            std::fs::write(class.join(device).join("name"), format!("{name}\n")).unwrap();
        }
        assert_eq!(find(&class, PORT_NAME).unwrap(), Path::new("/dev/vport2p3"));
        let error = find(&class, "drafter.other").unwrap_err().to_string();
        assert!(error.contains("virtio_console"), "{error}");
        std::fs::remove_dir_all(&class).unwrap();
        assert!(find(&class, PORT_NAME).is_err());
    }
}
