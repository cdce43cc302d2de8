//! Machines on a [`Rig`]: starts runners in its hosts and talks to them, as a person would with
//! the `drafter` command, so that the demo, the end-to-end tests and the benchmarks run the real
//! programs and share one way of doing it.

mod sweep;

pub(crate) use sweep::LEASES;

use crate::rig::{Rig, RigError};
use conduit::{PortMapping, Protocol};
use drafter::{
    migrate::{messages::Mode, planner::Budgets, timings::MoveReport},
    runner::{
        api::{
            Client, ClientError, MigrateRequest, OutputStream, Progress, Reply, Request, Status,
        },
        state::MachineDir,
    },
};
use std::{
    collections::BTreeMap,
    fs::File,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

/// Where runners listen for machines, on the link between hosts; one port per runner of a host.
const FIRST_PORT: u16 = 7500;
/// How long a runner may take to answer.
const READY: Duration = Duration::from_secs(60);

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// The rig.
    #[error(transparent)]
    Rig(#[from] RigError),
    /// A runner.
    #[error("machine \"{machine}\" on host \"{host}\": {what}")]
    Runner {
        /// Which machine.
        machine: String,
        /// On which host.
        host: String,
        /// What happened, with the end of its log.
        what: String,
    },
    /// A request failed.
    #[error(transparent)]
    Api(#[from] ClientError),
    /// What an earlier fleet left cannot be ended or removed.
    #[error("clearing up after an earlier run: {0}")]
    Leftover(String),
    /// A program is missing.
    #[error("{0}")]
    Missing(String),
}

/// What a machine is started with.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// Its name.
    pub name: String,
    /// Its package.
    pub package: PathBuf,
    /// Memory, MiB; the package's default if absent.
    pub memory_mib: Option<u64>,
    /// Processors.
    pub vcpus: Option<u32>,
    /// Its address; none means no network, unless it is `on_agent`.
    pub address: Option<Ipv4Addr>,
    /// It is on the network of its host's agent, which may give it its address (`--address auto`).
    pub on_agent: bool,
    /// Its IPv6 address.
    pub address_v6: Option<Ipv6Addr>,
    /// Ports at the edge: (public, machine), TCP.
    pub ports: Vec<(u16, u16)>,
    /// Where its lease is, if not in the rig's folder.
    pub lease: Option<String>,
    /// Mutual TLS between runners (the rig must have certificates), or plaintext.
    pub tls: bool,
    /// Further arguments of `drafter run` alone: what a machine is made with.
    pub extra_boot: Vec<String>,
    /// Further arguments of `drafter run` and `drafter receive`.
    pub extra: Vec<String>,
    /// What their environment has besides: credentials of a store.
    pub environment: Vec<(String, String)>,
}

impl MachineSpec {
    /// A machine without network, over TLS.
    #[must_use]
    pub fn new(name: &str, package: &Path) -> Self {
        Self {
            name: name.to_owned(),
            package: package.to_owned(),
            memory_mib: None,
            vcpus: None,
            address: None,
            on_agent: false,
            address_v6: None,
            ports: Vec::new(),
            lease: None,
            tls: true,
            extra_boot: Vec::new(),
            extra: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// The ports as conduit has them.
    #[must_use]
    pub fn mappings(&self) -> Vec<PortMapping> {
        let mapping = |(public, machine): &(u16, u16)| PortMapping {
            protocol: Protocol::Tcp,
            public: *public,
            machine: *machine,
        };
        self.ports.iter().map(mapping).collect()
    }
}

/// Runners on a rig. Dropping it ends them, then the rig.
pub struct Fleet {
    runners: Vec<Runner>,
    /// Where hosts find their leases, if not where all do.
    leases: BTreeMap<usize, PathBuf>,
    rig: Rig,
    drafter: PathBuf,
}

/// One runner process.
pub struct Runner {
    child: Child,
    log: PathBuf,
    /// The machine.
    pub machine: String,
    /// Name of its host.
    pub host: String,
    /// Where it takes machines from peers.
    pub address: SocketAddr,
    state: PathBuf,
}

/// A runner's number in its fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunnerId(pub usize);

impl Fleet {
    /// A fleet on `rig`; runners are the `drafter` program beside the running one. What a fleet
    /// in the same folder left behind when it was killed is ended and removed first.
    pub fn new(rig: Rig) -> Result<Self, FleetError> {
        let drafter = crate::programs::command("drafter").ok_or_else(|| {
            FleetError::Missing("the drafter program is not beside this one; build it first".into())
        })?;
        sweep::sweep(rig.folder())?;
        Ok(Self { runners: Vec::new(), leases: BTreeMap::new(), rig, drafter })
    }

    /// The rig.
    #[must_use]
    pub fn rig(&self) -> &Rig {
        &self.rig
    }

    /// The rig, to break things.
    pub fn rig_mut(&mut self) -> &mut Rig {
        &mut self.rig
    }

    /// A runner.
    #[must_use]
    pub fn runner(&self, id: RunnerId) -> &Runner {
        &self.runners[id.0]
    }

    /// A runner, to kill it.
    pub fn runner_mut(&mut self, id: RunnerId) -> &mut Runner {
        &mut self.runners[id.0]
    }

    /// The state directory of a host.
    #[must_use]
    pub fn state_of(&self, host: usize) -> PathBuf {
        self.rig.folder().join(format!("{}{}", sweep::STATE, self.rig.hosts()[host].name))
    }

    /// The directory of leases that all hosts share.
    #[must_use]
    pub fn leases(&self) -> PathBuf {
        self.rig.folder().join(LEASES)
    }

    /// Runners that start on this host from now on find the leases there.
    pub fn set_leases(&mut self, host: usize, folder: PathBuf) {
        self.leases.insert(host, folder);
    }

    /// Boots a machine on a host; returns when its runner answers, before the guest is up.
    pub fn run(&mut self, host: usize, spec: &MachineSpec) -> Result<RunnerId, FleetError> {
        let mut words: Vec<String> = vec!["run".into(), spec.name.clone()];
        words.extend(["--package".into(), spec.package.display().to_string()]);
        if let Some(mib) = spec.memory_mib {
            words.extend(["--memory-mib".into(), mib.to_string()]);
        }
        if let Some(vcpus) = spec.vcpus {
            words.extend(["--vcpus".into(), vcpus.to_string()]);
        }
        if let Some(address) = spec.address {
            words.extend(["--address".into(), address.to_string()]);
        }
        if let Some(address) = spec.address_v6 {
            words.extend(["--address-v6".into(), address.to_string()]);
        }
        for (public, machine) in &spec.ports {
            words.extend(["--publish".into(), format!("{public}:{machine}")]);
        }
        words.extend(spec.extra_boot.iter().cloned());
        self.start(host, spec, words)
    }

    /// Starts a runner that waits for a machine.
    pub fn receive(&mut self, host: usize, spec: &MachineSpec) -> Result<RunnerId, FleetError> {
        let package = spec.package.display().to_string();
        let words = vec!["receive".into(), spec.name.clone(), "--package".into(), package];
        self.start(host, spec, words)
    }

    /// Starts `drafter` on a host with these words and the host's own settings.
    pub fn start(
        &mut self,
        host: usize,
        spec: &MachineSpec,
        words: Vec<String>,
    ) -> Result<RunnerId, FleetError> {
        let state = self.state_of(host);
        let port = FIRST_PORT + self.runners.len() as u16;
        let place = &self.rig.hosts()[host];
        let address = SocketAddr::from((place.migration, port));
        let failed = |what: String| FleetError::Runner {
            machine: spec.name.clone(),
            host: place.name.clone(),
            what,
        };
        let log = self.rig.folder().join(format!("logs/runner-{}-{port}.log", place.name));
        let open = || File::options().create(true).append(true).open(&log);
        let output = open().map_err(|e| failed(format!("{}: {e}", log.display())))?;
        let errors = open().map_err(|e| failed(format!("{}: {e}", log.display())))?;
        let mut command = place.namespace.command(&self.drafter);
        command
            .arg("--state")
            .arg(&state)
            .args(words)
            .args(["--host", &place.name, "--listen", &address.to_string()])
            .arg("--lease")
            .arg(match &spec.lease {
                Some(address) => PathBuf::from(address),
                None => self.leases.get(&host).cloned().unwrap_or_else(|| self.leases()),
            })
            .args(&spec.extra)
            .envs(spec.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        match self.rig.identity().filter(|_| spec.tls) {
            Some(identity) => command.arg("--certs").arg(identity),
            None => command.arg("--plaintext"),
        };
        if spec.on_agent || spec.address.is_some() {
            command.args(["--network", "agent", "--agent"]).arg(&place.agent_socket);
        }
        // Ctrl-C at the terminal is the fleet's owner's business, who ends runners in order.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command.spawn().map_err(|e| failed(e.to_string()))?;
        let mut runner = Runner {
            child,
            log,
            machine: spec.name.clone(),
            host: place.name.clone(),
            address,
            state,
        };
        runner.wait_answers()?;
        self.runners.push(runner);
        Ok(RunnerId(self.runners.len() - 1))
    }

    /// Starts a runner again that was killed, as a supervisor would: from its state directory alone.
    pub fn recover(&mut self, id: RunnerId) -> Result<(), FleetError> {
        let drafter = self.drafter.clone();
        let runner = &mut self.runners[id.0];
        let place = self.rig.hosts().iter().find(|host| host.name == runner.host);
        let failed = |what: String| FleetError::Runner {
            machine: runner.machine.clone(),
            host: runner.host.clone(),
            what,
        };
        let place = place.ok_or_else(|| failed("its host is gone".into()))?;
        let open = || File::options().create(true).append(true).open(&runner.log);
        let output = open().map_err(|e| failed(e.to_string()))?;
        let errors = open().map_err(|e| failed(e.to_string()))?;
        let mut command = place.namespace.command(drafter);
        command
            .arg("--state")
            .arg(&runner.state)
            .args(["recover", &runner.machine])
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command.spawn().map_err(|e| failed(e.to_string()))?;
        runner.child = child;
        runner.wait_answers()
    }

    /// Moves a machine between two runners; blocks until the move has ended.
    pub fn migrate(
        &self,
        from: RunnerId,
        to: RunnerId,
        mode: Mode,
        budgets: Budgets,
        mut progress: impl FnMut(&Progress),
    ) -> Result<MoveReport, FleetError> {
        let job = self.start_move(from, to, mode, budgets, false)?;
        let mut client = self.runner(from).client()?;
        let value = client.call(&Request::Follow { job }, |reply| {
            if let Reply::Progress(p) = reply {
                progress(p);
            }
        })?;
        serde_json::from_value(value).map_err(|e| ClientError::Foreign(e.to_string()).into())
    }

    /// Starts a move and returns its job.
    pub fn start_move(
        &self,
        from: RunnerId,
        to: RunnerId,
        mode: Mode,
        budgets: Budgets,
        dry_run: bool,
    ) -> Result<u64, FleetError> {
        let destination = self.runner(to);
        let request = MigrateRequest {
            to: destination.address,
            peer: destination.host.clone(),
            mode,
            budgets,
            dry_run,
            stored_as: None,
        };
        Ok(self.runner(from).client()?.get(&Request::Migrate(request))?)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for runner in &mut self.runners {
            runner.end();
        }
    }
}

impl Runner {
    /// A connection to its API.
    pub fn client(&self) -> Result<Client, ClientError> {
        Client::connect(&MachineDir::at(&self.state, &self.machine).socket())
    }

    /// Its status.
    pub fn status(&self) -> Result<Status, ClientError> {
        let mut client = self.client()?;
        client.set_deadline(Some(Duration::from_secs(20)))?;
        client.get(&Request::Status)
    }

    /// Where the monitor and the runner keep their files of this machine.
    #[must_use]
    pub fn dir(&self) -> MachineDir {
        MachineDir::at(&self.state, &self.machine)
    }

    /// Waits until the machine's readiness probe succeeds.
    pub fn wait_ready(&self, limit: Duration) -> Result<(), ClientError> {
        let mut client = self.client()?;
        client.set_deadline(Some(limit + Duration::from_secs(10)))?;
        client.call(&Request::WaitReady { timeout_s: limit.as_secs() }, |_| {}).map(drop)
    }

    /// Runs a command in the guest; its exit code and standard output.
    pub fn exec(&self, argv: &[&str], limit: Duration) -> Result<(i64, String), ClientError> {
        let mut client = self.client()?;
        client.set_deadline(Some(limit + Duration::from_secs(10)))?;
        let request = Request::Exec {
            argv: argv.iter().map(|&a| a.to_owned()).collect(),
            env: BTreeMap::new(),
            timeout_s: limit.as_secs().max(1),
        };
        let mut out = String::new();
        let value = client.call(&request, |reply| {
            if let Reply::Output { stream: OutputStream::Stdout, text } = reply {
                out.push_str(text);
            }
        })?;
        match value.get("exit_code").and_then(serde_json::Value::as_i64) {
            Some(code) => Ok((code, out)),
            None => Err(ClientError::Failed(format!("\"{}\" ended: {value}", argv.join(" ")))),
        }
    }

    /// The runner's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it, and runners before it in its place, have said.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The end of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = self.log();
        let lines: Vec<&str> = text.lines().rev().take(12).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Kills the runner's process (SIGKILL) and waits for its end; its monitor lives on.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn wait_answers(&mut self) -> Result<(), FleetError> {
        let deadline = Instant::now() + READY;
        loop {
            let ended = self.child.try_wait().ok().flatten();
            let what = match ended {
                Some(status) => format!("its runner ended ({status})"),
                None if Instant::now() > deadline => "its runner did not answer in time".into(),
                None => {
                    if let Ok(status) = self.status()
                        && status.runner_pid == self.child.id()
                        && status.state != "booting"
                    {
                        return Ok(());
                    }
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                }
            };
            let what = format!("{what}; the end of its log:\n{}", self.log_tail());
            return Err(FleetError::Runner {
                machine: self.machine.clone(),
                host: self.host.clone(),
                what,
            });
        }
    }

    /// Ends the machine and its runner, whatever state they are in.
    fn end(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let asked = self.client().and_then(|mut client| {
                client.set_deadline(Some(Duration::from_secs(10)))?;
                client.call(&Request::Stop { grace_s: 0 }, |_| {})
            });
            let deadline = Instant::now() + Duration::from_secs(10);
            while asked.is_ok() && Instant::now() < deadline {
                if !matches!(self.child.try_wait(), Ok(None)) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            self.kill();
        }
        // What a runner that was killed, or was busy, left behind.
        let run_dir = self.dir().run();
        if let Err(error) = drafter::driver::qemu::stop_without_runner(&run_dir) {
            tracing::warn!(machine = self.machine, %error, "a monitor may be left");
        }
    }
}
