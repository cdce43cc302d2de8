//! What takes time: hooks, probes and commands.

use super::{Agent, Conversation, fail};
use crate::{
    config::{Check, Hook},
    process::{Cancel, Launch, Tail, run},
    protocol::{EntryState, ExecRequest, FailureCode, GuestMessage, NewIdentity, ProbeKind},
};
use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

/// What the quick part of `after_resume` came to: the clock's step, or what failed.
pub(super) struct Refreshed {
    clock_step_ns: i64,
    problems: Vec<String>,
}

impl Agent {
    pub(super) fn before_suspend(&self, to: &Conversation, id: u64, sync: bool) {
        let hook = self.hook("before_suspend", self.config.hooks.before_suspend.as_ref());
        if let Err(problem) = hook {
            return fail(to, id, FailureCode::Hook, problem);
        }
        if sync {
            self.platform.sync();
        }
        to.send(&GuestMessage::Done { id });
    }

    /// Sets entropy, clock and name. Each is tried, whatever becomes of the others.
    pub(super) fn refresh(
        &self,
        wall_clock_ns: u64,
        entropy: &[u8],
        host_name: Option<&str>,
    ) -> Refreshed {
        let mut problems = Vec::new();
        if let Err(error) = self.platform.add_entropy(entropy) {
            problems.push(format!("the random generator took no entropy: {error}"));
        }
        let clock_step_ns =
            self.platform.set_clock(Duration::from_nanos(wall_clock_ns)).unwrap_or_else(|error| {
                problems.push(format!("the clock could not be set: {error}"));
                0
            });
        if let Some(Err(error)) = host_name.map(|name| self.platform.set_host_name(name)) {
            problems.push(format!("the host name could not be set: {error}"));
        }
        Refreshed { clock_step_ns, problems }
    }

    /// As [`Agent::refresh`], and who the machine is. The random numbers first: nothing that is made of
    /// them afterwards is the same in two copies.
    pub(super) fn become_another(
        &self,
        wall_clock_ns: u64,
        entropy: &[u8],
        identity: &NewIdentity,
    ) -> Refreshed {
        let mut refreshed = self.refresh(wall_clock_ns, entropy, Some(&identity.host_name));
        refreshed.problems.extend(self.platform.become_another(identity));
        refreshed
    }

    /// The rest of it: the package's own hook for copies, then the one for any resume.
    pub(super) fn after_fork(&self, to: &Conversation, id: u64, mut became: Refreshed) {
        if !became.problems.is_empty() {
            // Whatever the package would do now, it would do under a wrong name.
            return fail(to, id, FailureCode::System, became.problems.join("; "));
        }
        let hook = self.hook("after_fork", self.config.hooks.after_fork.as_ref());
        if let Err(problem) = hook {
            became.problems.push(problem);
            return fail(to, id, FailureCode::Hook, became.problems.join("; "));
        }
        self.after_resume(to, id, became);
    }

    pub(super) fn after_resume(&self, to: &Conversation, id: u64, refreshed: Refreshed) {
        let Refreshed { clock_step_ns, mut problems } = refreshed;
        let system = !problems.is_empty();
        let hook = self.hook("after_resume", self.config.hooks.after_resume.as_ref());
        problems.extend(hook.err());
        if problems.is_empty() {
            to.send(&GuestMessage::Resumed { id, clock_step_ns });
        } else {
            let code = if system { FailureCode::System } else { FailureCode::Hook };
            fail(to, id, code, problems.join("; "));
        }
    }

    /// Runs a hook of the package to its end, whatever becomes of the conversation.
    fn hook(&self, name: &str, hook: Option<&Hook>) -> Result<(), String> {
        let Some(hook) = hook else { return Ok(()) };
        self.command_of_package(&hook.argv, hook.timeout)
            .map_err(|problem| format!("the package's {name} hook {problem}"))
    }

    /// Runs a command of the package; the error says how it ended and what it wrote last.
    fn command_of_package(&self, argv: &[String], timeout: Duration) -> Result<(), String> {
        let env = [&self.config.env];
        let launch = Launch::of_package(&self.config, &env, argv);
        let cancel = Cancel::new().map_err(|error| format!("got no descriptor: {error}"))?;
        let mut tail = Tail::default();
        let status = run(&launch, timeout, &cancel, |_, data| {
            tail.push(data);
            true
        })
        .map_err(|error| format!("did not start: {error}"))?;
        match (status.success(), tail.text()) {
            (true, _) => Ok(()),
            (false, text) if text.is_empty() => Err(format!("{status} and wrote nothing")),
            (false, text) => Err(format!("{status}: {text}")),
        }
    }

    pub(super) fn probe(&self, to: &Conversation, id: u64, kind: ProbeKind) {
        let probe = match kind {
            ProbeKind::Liveness => self.config.probes.liveness.as_ref(),
            ProbeKind::Readiness => self.config.probes.readiness.as_ref(),
        };
        let Some(probe) = probe else {
            let entry = self.platform.entry();
            let (ok, detail) = match entry.state {
                EntryState::None => (true, "the package has no entry point".to_owned()),
                EntryState::Running { pid } => (true, format!("the entry point runs ({pid})")),
                EntryState::Waiting => (false, "the entry point waits for its restart".to_owned()),
                EntryState::Ended => (false, "the entry point has ended".to_owned()),
            };
            let detail = entry.last_end.map_or(detail.clone(), |end| format!("{detail}; it {end}"));
            to.send(&GuestMessage::Probed { id, ok, detail, interval_ms: 1000 });
            return;
        };
        let result = match &probe.check {
            Check::Tcp { port } => self.tcp_probe(*port, probe.timeout),
            Check::Exec { argv } => self
                .command_of_package(argv, probe.timeout)
                .map(|()| format!("{} succeeded", argv[0]))
                .map_err(|problem| format!("{} {problem}", argv[0])),
        };
        let interval_ms = probe.interval.as_millis() as u64;
        let ok = result.is_ok();
        let detail = result.unwrap_or_else(|problem| problem);
        to.send(&GuestMessage::Probed { id, ok, detail, interval_ms });
    }

    fn tcp_probe(&self, port: u16, timeout: Duration) -> Result<String, String> {
        let deadline = Instant::now() + timeout;
        let mut problem = "the machine has no address to try".to_owned();
        for address in self.platform.probe_addresses() {
            let to = SocketAddr::from((address, port));
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            match TcpStream::connect_timeout(&to, left) {
                Ok(_) => return Ok(format!("{to} accepts connections")),
                Err(error) => problem = format!("{to}: {error}"),
            }
        }
        Err(problem)
    }

    pub(super) fn exec(&self, to: &Conversation, id: u64, exec: &ExecRequest, cancel: &Cancel) {
        let env: [&BTreeMap<String, String>; 2] = [&self.config.env, &exec.env];
        let launch = Launch {
            argv: &exec.argv,
            env: &env,
            working_dir: exec.working_dir.as_deref().unwrap_or("/"),
            user: exec.user.as_deref().unwrap_or_default(),
        };
        let status = run(&launch, exec.timeout, cancel, |stream, data| {
            to.send(&GuestMessage::Output { id, stream, data: data.to_vec() })
        });
        match status {
            Ok(status) => {
                to.send(&GuestMessage::Exited { id, status });
            }
            Err(problem) => fail(to, id, FailureCode::Start, problem),
        }
    }
}
