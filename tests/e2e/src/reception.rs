//! A host that takes whatever machine comes, as a process of its own; and machines whose runners a
//! command has started, so that only commands reach them.

use crate::{
    Stage,
    command::{Said, say},
};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Stdio},
    time::Duration,
};

/// How long a command may take.
pub const LIMIT: Duration = Duration::from_secs(120);
const PORT: u16 = 7400;

/// The process that takes machines on a host. Killed with this.
pub struct Reception {
    child: Child,
    /// Its name.
    pub host: String,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Drop for Reception {
    fn drop(&mut self) {
        let _ = self.child.kill().and_then(|()| self.child.wait().map(drop));
    }
}

impl Reception {
    /// Starts one, with further flags; returns when it listens.
    #[track_caller]
    #[must_use]
    pub fn open<S: AsRef<str>>(stage: &Stage, host: usize, more: &[S]) -> Self {
        let place = &stage.fleet.rig().hosts()[host];
        let address = SocketAddr::from((place.migration, PORT));
        let mut command = stage.drafter(host);
        command.args(["receive", "--any", "--package"]).arg(stage.package());
        command.args(["--host", &place.name, "--listen", &address.to_string(), "--lease"]);
        command.arg(stage.leases()).arg("--certs").arg(stage.fleet.rig().identity().unwrap());
        command.args(["--network", "agent", "--agent"]).arg(&place.agent_socket);
        command.args(more.iter().map(AsRef::as_ref));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("takes machines at"), "{line}");
        Self { child, host: place.name.clone(), address }
    }

    /// As `--to-host` takes it.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}={}", self.host, self.address)
    }
}

/// What a command says on a host, as JSON.
#[track_caller]
pub fn on<S: AsRef<str>>(stage: &Stage, host: usize, words: &[S]) -> Said {
    let words = words.iter().map(AsRef::as_ref);
    say(stage.drafter(host).arg("--json").args(words), LIMIT)
}

/// The status of a machine on a host; null if no runner of it answers there.
#[track_caller]
#[must_use]
pub fn state(stage: &Stage, host: usize, machine: &str) -> Value {
    let said = on(stage, host, &["status", machine]);
    if said.code == Some(0) { said.json() } else { Value::Null }
}

/// What a script says in a machine.
#[track_caller]
pub fn inside(stage: &Stage, host: usize, machine: &str, script: &str) -> String {
    let said = on(stage, host, &["exec", machine, "--", "/bin/dash", "-c", script]);
    said.json()["stdout"].as_str().unwrap_or_default().trim().to_owned()
}
