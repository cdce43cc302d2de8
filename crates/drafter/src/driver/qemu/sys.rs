//! System calls without a safe wrapper in the crates at hand: pidfds, the time stamp counter, and
//! what a child does between fork and exec.

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use std::{
    io::{self, IoSliceMut},
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
};

/// The processor's time stamp counter.
pub(super) fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC; it has no effect on memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A descriptor for a process: it never comes to mean another one.
pub(super) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes two numbers, touches no memory of ours.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A copy of a descriptor of another process, which we must be allowed to trace.
pub(super) fn pidfd_getfd(process: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes three numbers, touches no memory of ours.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

/// Sends a signal to a process.
pub(super) fn pidfd_signal(process: BorrowedFd<'_>, signal: libc::c_int) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed and means what kill() means.
    let done = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal, no_info, 0)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}

/// Takes one message, and the descriptor that came with it; does not wait.
pub(super) fn receive_with_descriptor(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut iov = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel has just put these descriptors into our table for this message.
            descriptors.extend(numbers.iter().map(|n| unsafe { OwnedFd::from_raw_fd(*n) }));
        }
    }
    Ok((message.bytes, descriptors.pop()))
}

/// What a monitor's process does before it becomes the monitor.
#[derive(Default)]
pub(super) struct BeforeExec {
    /// `cgroup.procs` files, open for writing, of the groups to join.
    pub(super) join: Vec<OwnedFd>,
    /// Descriptors that survive the exec, under the same numbers.
    pub(super) inherit: Vec<OwnedFd>,
    /// User and group to become, with these other groups and no more.
    pub(super) user: Option<(u32, Vec<u32>)>,
    /// Most bytes of a file that it may write (logs that a guest can fill).
    pub(super) file_limit: u64,
    /// It was started by a thread with walls (see [`confine`](super::confine)).
    pub(super) confined: bool,
}

/// Arranges for `setup` in the child: groups of control, a session of its own (a terminal's
/// interrupt is for the runner), limits, user, and no way back to more rights.
pub(super) fn before_exec(command: &mut Command, setup: BeforeExec) {
    let in_child = move || setup.apply();
    // SAFETY: `apply` makes system calls on numbers and slices prepared before the fork; it does
    // not allocate, lock or panic.
    unsafe {
        command.pre_exec(in_child);
    }
}

impl BeforeExec {
    fn apply(&self) -> io::Result<()> {
        for group in &self.join {
            // "0" is whoever writes.
            nix::unistd::write(group, b"0")?;
        }
        nix::unistd::setsid()?;
        limit(libc::RLIMIT_FSIZE, self.file_limit)?;
        limit(libc::RLIMIT_CORE, 0)?;
        limit(libc::RLIMIT_MSGQUEUE, 0)?;
        // SAFETY: ignoring a signal installs no handler. A write beyond the limit then fails
        // instead of ending the monitor.
        if unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
        // What the runner was itself started with (a lock, a log, a socket of its parent) is not
        // the monitor's, which outlives it and would hold it open.
        // SAFETY: marks descriptors by number; closes none before the exec.
        check(unsafe {
            libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
                as i32
        })?;
        for descriptor in &self.inherit {
            // SAFETY: sets the flags of a descriptor that `self` owns; clears close-on-exec.
            check(unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_SETFD, 0) })?;
        }
        if self.confined {
            Self::furnish()?;
        }
        if let Some((user, groups)) = &self.user {
            drop_capabilities()?;
            // SAFETY: the slice is valid for its length. Raw calls: the C library's versions
            // would look for other threads, which a child has not.
            check(unsafe {
                libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) as i32
            })?;
            // SAFETY: takes numbers only.
            check(unsafe { libc::syscall(libc::SYS_setresgid, *user, *user, *user) as i32 })?;
            // SAFETY: takes numbers only.
            check(unsafe { libc::syscall(libc::SYS_setresuid, *user, *user, *user) as i32 })?;
        }
        // SAFETY: takes numbers only.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
    }
}

impl BeforeExec {
    /// What a thread cannot do for its children: let the control groups that this process has just joined
    /// be all that it sees of them, and mount `/proc` as its process namespace has it.
    fn furnish() -> io::Result<()> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWCGROUP)?;
        let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        let (proc, at) = (c"proc".as_ptr(), c"/proc".as_ptr());
        // SAFETY: all pointers are to constant strings that end with a zero byte.
        check(unsafe { libc::mount(proc, at, proc, flags, c"subset=pid".as_ptr().cast()) })
    }
}

/// No program that this process becomes can get one back. They are numbered, and how many there are is
/// the kernel's to say.
fn drop_capabilities() -> io::Result<()> {
    for capability in 0..64 {
        // SAFETY: takes numbers only.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } == -1 {
            let error = io::Error::last_os_error();
            // One that this kernel does not have; or a container's root that has no right to drop any,
            // for which no-new-privileges has to do.
            let known = [Some(libc::EINVAL), Some(libc::EPERM)].contains(&error.raw_os_error());
            return if known { Ok(()) } else { Err(error) };
        }
    }
    Ok(())
}

fn limit(resource: libc::__rlimit_resource_t, bytes: u64) -> io::Result<()> {
    let value = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: the pointer is to a valid rlimit on this frame.
    check(unsafe { libc::setrlimit(resource, &raw const value) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The virtual machine for [`super::probe`]: see `probe_guest.s`.
pub(super) mod probe_guest {
    std::arch::global_asm!(include_str!("probe_guest.s"), options(att_syntax));

    unsafe extern "C" {
        static drafter_probe_guest_start: [u8; 0];
        static drafter_probe_guest_end: [u8; 0];
    }

    /// The bytes of the guest, to be loaded and entered at 1 MiB.
    pub(in super::super) fn code() -> &'static [u8] {
        let (start, end) =
            (&raw const drafter_probe_guest_start, &raw const drafter_probe_guest_end);
        // SAFETY: both symbols bound one run of read-only bytes of this program.
        unsafe {
            std::slice::from_raw_parts(start.cast::<u8>(), end.byte_offset_from(start) as usize)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_child_gets_its_user_its_limit_and_no_way_to_more() {
        let directory = tempfile::tempdir().unwrap();
        let file = fs::File::create(directory.path().join("log")).unwrap();
        let number = file.as_raw_fd();
        let mut command = Command::new("sh");
        // More than the limit: the write fails, the shell lives and tells.
        command.args([
            "-c",
            &format!(
                "head -c 100000 /dev/zero >&{number}; echo after; id -u; id -G; \
                 grep -E 'NoNewPrivs|CapBnd' /proc/self/status"
            ),
        ]);
        let setup = BeforeExec {
            join: vec![],
            inherit: vec![file.into()],
            user: Some((64_321, vec![64_321, 64_322])),
            file_limit: 50_000,
            confined: false,
        };
        before_exec(&mut command, setup);
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            ["after", "64321", "64321 64322", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"]
        );
        assert!(String::from_utf8_lossy(&output.stderr).contains("File too large"));
        assert_eq!(fs::metadata(directory.path().join("log")).unwrap().len(), 50_000);
    }

    #[test]
    fn a_descriptor_is_fetched_from_another_process() {
        let mut child =
            Command::new("sleep").arg("60").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let process = pidfd_open(child.id()).unwrap();
        let fetched = pidfd_getfd(std::os::fd::AsFd::as_fd(&process), 0).unwrap();
        let theirs = fs::read_link(format!("/proc/{}/fd/0", child.id())).unwrap();
        let ours = fs::read_link(format!("/proc/self/fd/{}", fetched.as_raw_fd())).unwrap();
        assert_eq!(theirs, ours);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
