//! Starts and watches the processes of a machine: its entry point, hooks, probes and `exec`.

use crate::{
    config::{DEFAULT_PATH, MachineConfig},
    protocol::{ExitStatus, MAX_OUTPUT, Stream},
    sys, users,
};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        signal::{Signal, killpg},
    },
    unistd::Pid,
};
use std::{
    collections::BTreeMap,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// How long a killed process may take to be gone; after that it is left to the init.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// Most bytes read from a pipe after its process has ended (children of it may write on).
const DRAIN_LIMIT: usize = 256 * 1024;

/// What to start.
pub(crate) struct Launch<'a> {
    pub(crate) argv: &'a [String],
    /// Later maps win.
    pub(crate) env: &'a [&'a BTreeMap<String, String>],
    pub(crate) working_dir: &'a str,
    pub(crate) user: &'a str,
}

impl<'a> Launch<'a> {
    /// A command of the package (hook, probe) in the entry point's surroundings.
    pub(crate) fn of_package(
        config: &'a MachineConfig,
        env: &'a [&'a BTreeMap<String, String>],
        argv: &'a [String],
    ) -> Self {
        Self { argv, env, working_dir: &config.working_dir, user: &config.user }
    }

    /// The command, with an empty standard input; the caller sets where output goes. The error is
    /// a sentence.
    pub(crate) fn command(&self) -> Result<Command, String> {
        let Some((program, arguments)) = self.argv.split_first().filter(|(p, _)| !p.is_empty())
        else {
            return Err("no program is named".to_owned());
        };
        let user = users::find(self.user)?;
        let mut command = Command::new(program);
        command.args(arguments).env_clear().stdin(Stdio::null());
        command.env("PATH", DEFAULT_PATH).env("HOME", &user.home).env("USER", &user.name);
        for variables in self.env {
            command.envs(*variables);
        }
        command.current_dir(self.working_dir);
        // Staying root needs no privilege; so an agent under test works without any.
        let same = user.ids.uid == nix::unistd::geteuid().as_raw();
        sys::prepare_child(&mut command, (!same).then_some(user.ids));
        Ok(command)
    }

    /// What went wrong when the command did not start, as a sentence.
    pub(crate) fn cannot_start(&self, error: &io::Error) -> String {
        let program = self.argv.first().map_or("", String::as_str);
        format!(
            "cannot start \"{program}\" in {}: {error}; check the path, the working directory and \
             that the file is executable",
            self.working_dir
        )
    }
}

/// Stops a command from another thread.
pub(crate) struct Cancel(EventFd);

impl Cancel {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// Kills the command soon. Idempotent.
    pub(crate) fn cancel(&self) {
        // Fails only when the counter is full, and then it is readable already.
        let _ = self.0.write(1);
    }
}

/// Runs a command to its end, its timeout or its cancellation (then its process group is
/// killed), and hands on what it writes. `on_output` returns false when nobody listens any more,
/// which cancels. Children that the command leaves behind at its own end stay.
pub(crate) fn run(
    launch: &Launch<'_>,
    timeout: Duration,
    cancel: &Cancel,
    mut on_output: impl FnMut(Stream, &[u8]) -> bool,
) -> Result<ExitStatus, String> {
    let mut command = launch.command()?;
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| launch.cannot_start(&error))?;
    // Dropped: the command holds no pipe ends of ours after spawn, but may hold memory.
    drop(command);
    let result = watch(&mut child, timeout, cancel, &mut on_output);
    match result {
        Ok(status) => Ok(status),
        Err(error) => {
            kill(&mut child);
            Err(format!("lost sight of \"{}\": {error}", launch.argv[0]))
        }
    }
}

fn watch(
    child: &mut Child,
    timeout: Duration,
    cancel: &Cancel,
    on_output: &mut dyn FnMut(Stream, &[u8]) -> bool,
) -> io::Result<ExitStatus> {
    let started = Instant::now();
    let ended = sys::pidfd(child.id())?;
    let mut pipes = [
        child.stdout.take().map(|pipe| Pipe::new(Stream::Stdout, pipe.into())).transpose()?,
        child.stderr.take().map(|pipe| Pipe::new(Stream::Stderr, pipe.into())).transpose()?,
    ];
    loop {
        let left = timeout.saturating_sub(started.elapsed());
        if left.is_zero() {
            kill(child);
            return Ok(ExitStatus::TimedOut);
        }
        let mut fds = vec![
            PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            PollFd::new(cancel.0.as_fd(), PollFlags::POLLIN),
        ];
        for pipe in pipes.iter().flatten() {
            fds.push(PollFd::new(pipe.file.as_fd(), PollFlags::POLLIN));
        }
        // Rounded up, so that the last wait does not spin.
        let wait =
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, wait) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let seen = |at: usize| fds.get(at).is_some_and(|fd| fd.any() == Some(true));
        let (has_ended, is_cancelled) = (seen(0), seen(1));
        if is_cancelled {
            kill(child);
            return Ok(ExitStatus::Cancelled);
        }
        for slot in &mut pipes {
            let limit = if has_ended { DRAIN_LIMIT } else { MAX_OUTPUT };
            let Some(pipe) = slot else { continue };
            match pipe.hand_on(limit, on_output)? {
                Flow::Open => {}
                Flow::Closed => *slot = None,
                Flow::Unwanted => {
                    kill(child);
                    return Ok(ExitStatus::Cancelled);
                }
            }
        }
        if has_ended {
            let status = child.wait()?;
            return Ok(status_of(status));
        }
    }
}

/// A status of the system in the protocol's words.
pub(crate) fn status_of(status: std::process::ExitStatus) -> ExitStatus {
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitStatus::Code(code),
        (None, Some(signal)) => ExitStatus::Signal(signal),
        (None, None) => ExitStatus::Code(-1),
    }
}

/// Kills the child's whole process group and collects the child.
fn kill(child: &mut Child) {
    // The child is not yet waited for, so its number still means it.
    let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    let _ = child.kill();
    let deadline = Instant::now() + KILL_LIMIT;
    while Instant::now() < deadline {
        match child.try_wait() {
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Ok(Some(_)) | Err(_) => return,
        }
    }
}

enum Flow {
    Open,
    Closed,
    Unwanted,
}

struct Pipe {
    stream: Stream,
    file: std::fs::File,
}

impl Pipe {
    fn new(stream: Stream, fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self { stream, file: fd.into() })
    }

    /// Hands on what is there, up to about `limit` bytes.
    fn hand_on(
        &mut self,
        limit: usize,
        on_output: &mut dyn FnMut(Stream, &[u8]) -> bool,
    ) -> io::Result<Flow> {
        let mut buffer = vec![0; MAX_OUTPUT];
        let mut total = 0;
        while total < limit {
            match self.file.read(&mut buffer) {
                Ok(0) => return Ok(Flow::Closed),
                Ok(read) => {
                    if !on_output(self.stream, &buffer[..read]) {
                        return Ok(Flow::Unwanted);
                    }
                    total += read;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Flow::Open)
    }
}

/// The last part of what a command wrote, for messages.
#[derive(Default)]
pub(crate) struct Tail(Vec<u8>);

impl Tail {
    const LENGTH: usize = 1024;

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        let surplus = self.0.len().saturating_sub(Self::LENGTH);
        self.0.drain(..surplus);
    }

    /// As text on one line; empty if nothing was written.
    pub(crate) fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Vec<String> {
        vec!["sh".into(), "-c".into(), script.into()]
    }

    fn me() -> String {
        nix::unistd::geteuid().to_string()
    }

    fn run_shell(script: &str, timeout: Duration) -> (Result<ExitStatus, String>, String, String) {
        let (argv, me) = (shell(script), me());
        let launch = Launch { argv: &argv, env: &[], working_dir: "/", user: &me };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let status = run(&launch, timeout, &Cancel::new().unwrap(), |stream, data| {
            match stream {
                Stream::Stdout => out.extend_from_slice(data),
                Stream::Stderr => err.extend_from_slice(data),
            }
            true
        });
        (status, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    #[test]
    fn output_streams_and_status_are_kept_apart() {
        let (status, out, err) = run_shell("echo a; echo b >&2; exit 3", Duration::from_secs(10));
        assert_eq!(
            (status.unwrap(), out.as_str(), err.as_str()),
            (ExitStatus::Code(3), "a\n", "b\n")
        );
    }

    #[test]
    fn more_output_than_a_pipe_holds_arrives_whole() {
        let (status, out, _) = run_shell(
            "i=0; while [ $i -lt 20000 ]; do echo line$i; i=$((i+1)); done",
            Duration::from_secs(20),
        );
        assert!(status.unwrap().success());
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines.len(), 20_000);
        assert_eq!(lines.last(), Some(&"line19999"));
    }

    #[test]
    fn a_timeout_kills_the_command_and_its_children() {
        let started = Instant::now();
        let marker = format!("{}.5", 1000 + std::process::id());
        let (status, ..) = run_shell(&format!("sleep {marker} & wait"), Duration::from_millis(200));
        assert_eq!(status.unwrap(), ExitStatus::TimedOut);
        assert!(started.elapsed() < Duration::from_secs(60));
        let gone = || {
            std::fs::read_dir("/proc").unwrap().flatten().all(|entry| {
                let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                !String::from_utf8_lossy(&line).contains(&format!("sleep\0{marker}"))
            })
        };
        assert!((0..1000).any(|_| gone() || {
            std::thread::sleep(Duration::from_millis(20));
            false
        }));
    }

    #[test]
    fn a_background_child_does_not_keep_the_command_from_ending() {
        let started = Instant::now();
        let (status, out, _) = run_shell("sleep 200 & echo started $!", Duration::from_secs(90));
        assert!(status.unwrap().success());
        assert!(started.elapsed() < Duration::from_secs(60));
        let pid: i32 = out.trim().strip_prefix("started ").unwrap().parse().unwrap();
        nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it was left alive");
    }

    #[test]
    fn a_cancelled_command_is_gone_at_once() {
        let (argv, me) = (shell("echo ready; sleep 30"), me());
        let launch = Launch { argv: &argv, env: &[], working_dir: "/", user: &me };
        let cancel = Cancel::new().unwrap();
        let started = Instant::now();
        let status = run(&launch, Duration::from_secs(30), &cancel, |_, _| {
            cancel.cancel();
            true
        });
        assert_eq!(status.unwrap(), ExitStatus::Cancelled);
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn what_cannot_start_says_what_and_why() {
        let (argv, me) = (vec!["/no/such/program".to_owned()], me());
        let launch = Launch { argv: &argv, env: &[], working_dir: "/", user: &me };
        let error = run(&launch, Duration::from_secs(1), &Cancel::new().unwrap(), |_, _| true);
        let text = error.unwrap_err();
        assert!(text.contains("/no/such/program") && text.contains("No such file"), "{text}");
    }

    #[test]
    fn the_environment_is_the_given_one_alone_and_later_maps_win() {
        let (argv, me) = (shell("echo $A-$B-$CARGO_MANIFEST_DIR-$PATH"), me());
        let first =
            BTreeMap::from([("A".to_owned(), "1".to_owned()), ("B".to_owned(), "1".to_owned())]);
        let second = BTreeMap::from([("B".to_owned(), "2".to_owned())]);
        let env = [&first, &second];
        let launch = Launch { argv: &argv, env: &env, working_dir: "/", user: &me };
        let mut out = Vec::new();
        run(&launch, Duration::from_secs(10), &Cancel::new().unwrap(), |_, data| {
            out.extend_from_slice(data);
            true
        })
        .unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), format!("1-2--{DEFAULT_PATH}\n"));
    }

    #[test]
    fn a_tail_keeps_the_end() {
        let mut tail = Tail::default();
        tail.push(&vec![b'x'; 5000]);
        tail.push(b"\nthe  end\n");
        assert!(tail.text().ends_with("x the end"));
        assert!(tail.text().len() <= Tail::LENGTH);
    }
}
