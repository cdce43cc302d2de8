//! The runner's half of `drafter-shim`, the preload hook that makes a userfaultfd inside QEMU: see
//! that crate for the message.

use super::{files, process, sys};
use crate::driver::DriverError;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use std::{
    env,
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const FILE: &str = "libdrafter_shim.so";
const VARIABLE: &str = "DRAFTER_SHIM";
const DEVICE: &str = "/dev/userfaultfd";
const MAGIC: &[u8; 4] = b"DUF1";
const GO_LIMIT: Duration = Duration::from_secs(60);

/// Where the shim is: `configured`, else `$DRAFTER_SHIM`, else beside the program or in the
/// folder above it (tests live in `target/debug/deps`), else in a library folder beside `bin`.
pub(super) fn find(configured: Option<&Path>) -> Result<PathBuf, DriverError> {
    let asked = configured.map(Path::to_owned).or_else(|| env::var_os(VARIABLE).map(Into::into));
    if let Some(path) = asked {
        return if path.is_file() { Ok(path) } else { Err(missing(&[path])) };
    }
    let program = env::current_exe().unwrap_or_default();
    let beside = program.parent().unwrap_or(Path::new("."));
    let candidates = [
        beside.join(FILE),
        beside.join("..").join(FILE),
        beside.join("../lib/drafter").join(FILE),
        Path::new("/usr/lib/drafter").join(FILE),
    ];
    candidates.iter().find(|path| path.is_file()).cloned().ok_or_else(|| missing(&candidates))
}

fn missing(tried: &[PathBuf]) -> DriverError {
    let tried: Vec<_> = tried.iter().map(|path| path.display().to_string()).collect();
    DriverError::Unusable {
        what: format!("QEMU's preload hook {FILE} is not at {}", tried.join(", ")),
        hint: format!("build it (cargo build -p drafter-shim) or set {VARIABLE} to its path"),
    }
}

/// What QEMU is started with so that the shim inside it does its work.
pub(super) struct Handshake {
    /// Environment for QEMU.
    pub(super) environment: Vec<(&'static str, String)>,
    /// Descriptors for QEMU, under the same numbers.
    pub(super) inherit: Vec<OwnedFd>,
    ours: UnixStream,
}

/// Prepares a handshake with the shim at `path`.
pub(super) fn prepare(path: &Path) -> Result<Handshake, DriverError> {
    let device = File::options().read(true).write(true).open(DEVICE).map_err(|error| {
        DriverError::Unusable {
            what: format!("{DEVICE} cannot be opened: {error}"),
            hint: "the runner needs Linux 6.7 with userfaultfd, and root or rights on that device"
                .into(),
        }
    })?;
    let (ours, theirs) = UnixStream::pair().map_err(|source| DriverError::Host {
        operation: "making a socket pair for QEMU's preload hook".into(),
        source,
    })?;
    // How long the shim waits for `go`.
    theirs.set_read_timeout(Some(GO_LIMIT)).map_err(|source| DriverError::Host {
        operation: "setting up a socket for QEMU's preload hook".into(),
        source,
    })?;
    let library = files::readable_by_all(path)?;
    let environment = vec![
        ("LD_PRELOAD", files::path_of(&library)),
        ("DRAFTER_SHIM_UFFD_FD", device.as_raw_fd().to_string()),
        ("DRAFTER_SHIM_SOCKET_FD", theirs.as_raw_fd().to_string()),
    ];
    Ok(Handshake { environment, inherit: vec![library, device.into(), theirs.into()], ours })
}

/// Why no userfaultfd came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The shim's own words: an errno.
    Refused(i32),
    /// QEMU ended, or closed its end without a word.
    Silent,
    /// The dynamic loader could not load the shim.
    NotLoaded(String),
    TimedOut,
    Io(String),
}

impl Failure {
    /// As an error about a machine.
    pub(super) fn into_error(self, machine: &str, limit: Duration, stderr: &Path) -> DriverError {
        const OPERATION: &str = "getting a userfaultfd from QEMU's preload hook";
        let detail = match self {
            Self::Refused(errno) => format!(
                "making it failed inside QEMU: {}; it needs Linux 6.1 and {DEVICE}",
                io::Error::from_raw_os_error(errno)
            ),
            Self::Silent => {
                format!("QEMU said nothing; its errors: {}", process::tail(stderr, 1000))
            }
            Self::NotLoaded(line) => format!("the hook could not be loaded: {line}"),
            Self::Io(error) => error,
            Self::TimedOut => {
                return DriverError::Timeout {
                    machine: machine.into(),
                    operation: OPERATION,
                    limit,
                };
            }
        };
        DriverError::Refused { machine: machine.into(), operation: OPERATION, detail }
    }
}

/// The variable by which the shim maps `memory`, a descriptor that QEMU inherits, privately.
pub(super) fn private(memory: &impl AsRawFd) -> (&'static str, String) {
    ("DRAFTER_SHIM_PRIVATE_FD", memory.as_raw_fd().to_string())
}

impl Handshake {
    /// Waits for the userfaultfd. `stderr` is where the dynamic loader complains: it goes on
    /// without a library that it cannot load, and nobody would ever send anything.
    pub(super) fn receive(
        ours: &UnixStream,
        limit: Duration,
        stderr: &Path,
    ) -> Result<OwnedFd, Failure> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let rest = left.min(Duration::from_millis(100));
            let mut wanted = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
            match nix::poll::poll(
                &mut wanted,
                PollTimeout::try_from(rest).unwrap_or(PollTimeout::MAX),
            ) {
                Ok(1..) => return receive_message(ours),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(Failure::Io(errno.desc().into())),
            }
            let complaint = process::tail(stderr, 1000);
            if complaint.contains("LD_PRELOAD") && complaint.contains("ignored") {
                return Err(Failure::NotLoaded(complaint));
            }
            if left.is_zero() {
                return Err(Failure::TimedOut);
            }
        }
    }

    /// Lets QEMU begin: whoever finds its record can find it from now on.
    pub(super) fn go(mut ours: UnixStream) -> io::Result<()> {
        ours.write_all(b"G")
    }

    /// Takes the runner's end; what was for QEMU goes with the rest.
    pub(super) fn split(self) -> (Vec<(&'static str, String)>, Vec<OwnedFd>, UnixStream) {
        (self.environment, self.inherit, self.ours)
    }
}

fn receive_message(ours: &UnixStream) -> Result<OwnedFd, Failure> {
    let mut bytes = [0; 8];
    let (length, descriptor) = sys::receive_with_descriptor(ours.as_fd(), &mut bytes)
        .map_err(|error| Failure::Io(error.to_string()))?;
    match (length, bytes.split_at(4)) {
        (0, _) => Err(Failure::Silent),
        (8, (magic, errno)) if magic == MAGIC => {
            let errno = i32::from_le_bytes([errno[0], errno[1], errno[2], errno[3]]);
            match descriptor {
                Some(descriptor) if errno == 0 => Ok(descriptor),
                _ => Err(Failure::Refused(errno)),
            }
        }
        _ => Err(Failure::Io(format!("it is of another version: {}", bytes.escape_ascii()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::{
        io::IoSlice,
        process::{Child, Command},
    };

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn golden_bytes_with_a_descriptor_are_a_success() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let sent = File::open("/dev/null").unwrap();
        let numbers = [sent.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&numbers)];
        let iov = [IoSlice::new(b"DUF1\0\0\0\0")];
        sendmsg::<()>(theirs.as_raw_fd(), &iov, &control, MsgFlags::empty(), None).unwrap();
        let got = Handshake::receive(&ours, SOON, Path::new("/nonexistent")).unwrap();
        let target = std::fs::read_link(format!("/proc/self/fd/{}", got.as_raw_fd())).unwrap();
        assert_eq!(target, Path::new("/dev/null"));
    }

    #[test]
    fn an_errno_silence_and_another_version_are_told_apart() {
        let receive = |bytes: &[u8]| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(bytes).unwrap();
            drop(theirs);
            Handshake::receive(&ours, SOON, Path::new("/nonexistent")).unwrap_err()
        };
        assert_eq!(receive(b"DUF1\x0d\0\0\0"), Failure::Refused(13));
        assert_eq!(receive(b"DUF1\0\0\0\0"), Failure::Refused(0), "success without a descriptor");
        assert_eq!(receive(b""), Failure::Silent);
        assert!(matches!(receive(b"DUF2\0\0\0\0"), Failure::Io(words) if words.contains("DUF2")));
        assert!(matches!(receive(b"DUF"), Failure::Io(_)));
    }

    #[test]
    fn nobody_sending_is_a_timeout_and_the_loaders_complaint_is_found_before_that() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let short = Duration::from_millis(30);
        let failure = Handshake::receive(&ours, short, Path::new("/nonexistent")).unwrap_err();
        assert_eq!(failure, Failure::TimedOut);

        let mut stderr = tempfile::NamedTempFile::new().unwrap();
        writeln!(stderr, "ERROR: ld.so: object 'x' from LD_PRELOAD cannot be preloaded: ignored.")
            .unwrap();
        let failure = Handshake::receive(&ours, SOON, stderr.path()).unwrap_err();
        assert!(matches!(&failure, Failure::NotLoaded(line) if line.contains("object 'x'")));
        let error = failure.into_error("m", SOON, stderr.path()).to_string();
        assert!(
            error.contains("machine \"m\"") && error.contains("could not be loaded"),
            "{error}"
        );
    }

    /// A program with the shim in it, and the runner's end of the handshake.
    fn preloaded(change: impl FnOnce(&mut Vec<(&'static str, String)>)) -> (Child, UnixStream) {
        let (mut environment, inherit, ours) = prepare(&find(None).unwrap()).unwrap().split();
        change(&mut environment);
        let mut command = Command::new("sleep");
        command.arg("60").envs(environment);
        let setup = sys::BeforeExec { inherit, file_limit: 1, ..sys::BeforeExec::default() };
        sys::before_exec(&mut command, setup);
        (command.spawn().unwrap(), ours)
    }

    fn targets(pid: u32) -> Vec<String> {
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let links = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        links.map(|link| link.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn the_real_shim_sends_a_userfaultfd_keeps_one_and_closes_the_rest() {
        let (mut child, ours) = preloaded(|_| ());
        let got = Handshake::receive(&ours, SOON, Path::new("/nonexistent")).unwrap();
        let link = std::fs::read_link(format!("/proc/self/fd/{}", got.as_raw_fd())).unwrap();
        assert_eq!(link, Path::new("anon_inode:[userfaultfd]"));
        Handshake::go(ours).unwrap();
        let end = Instant::now() + SOON;
        let clean = |all: &[String]| {
            let left = |part: &str| all.iter().filter(|t| t.contains(part)).count();
            left("anon_inode:[userfaultfd]") == 1
                && left("/dev/userfaultfd") + left("socket:") + left("shim") == 0
        };
        while !clean(&targets(child.id())) {
            assert!(Instant::now() < end, "{:?}", targets(child.id()));
            std::thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn without_a_word_from_the_runner_the_program_never_begins() {
        let (mut child, ours) = preloaded(|_| ());
        Handshake::receive(&ours, SOON, Path::new("/nonexistent")).unwrap();
        drop(ours);
        assert_eq!(child.wait().unwrap().code(), Some(1));
    }

    #[test]
    fn the_real_shim_sends_the_errno_when_the_device_is_not_one() {
        // The socket, which the program does inherit, is no userfaultfd device.
        let (mut child, ours) = preloaded(|environment| {
            let value_of = |wanted: &str| environment.iter().position(|(name, _)| *name == wanted);
            let (socket, device) =
                (value_of("DRAFTER_SHIM_SOCKET_FD"), value_of("DRAFTER_SHIM_UFFD_FD"));
            environment[device.unwrap()].1 = environment[socket.unwrap()].1.clone();
        });
        let failure = Handshake::receive(&ours, SOON, Path::new("/nonexistent")).unwrap_err();
        assert_eq!(failure, Failure::Refused(libc::ENOTTY));
        let error = failure.into_error("m", SOON, Path::new("/nonexistent")).to_string();
        assert!(error.contains("Inappropriate ioctl") && error.contains(DEVICE), "{error}");
        drop(ours);
        child.wait().unwrap();
    }

    #[test]
    fn a_shim_that_is_not_there_is_named_with_the_way_to_build_it() {
        let error = find(Some(Path::new("/nonexistent/shim.so"))).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/shim.so") && error.contains("cargo build"), "{error}");
    }
}
