//! A fleet on one computer: hosts, an edge and a client as network namespaces, joined by real
//! links, with the real daemons in them. The demo, the end-to-end tests and the benchmarks share
//! it, so that what they show is the same thing.
//!
//! ```text
//!   client ─ 203.0.113.0/24 ─ edge ─ bridge 10.88.0.0/24 ─┬─ a ─┐ 10.89.0.0/24: what moves
//!                              (NAT, vxlan, `conduit edge`) └─ b ─┘ machines; shaped if asked
//!                                                     (vxlan, `conduit agent`)
//! ```
//!
//! Needs root. Everything it makes carries its prefix, and a rig whose owner was killed is removed
//! by the next one of the same prefix, or by [`Rig::sweep`]. Two live rigs need two prefixes.
//!
//! The underlay (edge to hosts) is plain veth: what a client feels of it is the same before and
//! after a move. Only the link between hosts is shaped, packet by packet ([`shaper`]), because
//! that is what a move has to get through.

mod daemon;
pub mod line;
mod namespace;
pub mod shaper;
mod sys;

use conduit::{AgentDataPath, KernelError, PathChoice};
use daemon::Daemon;
use identity::{Authority, HostName};
use nix::fcntl::{Flock, FlockArg};
use shaper::{Shape, Shaper};
use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

pub use namespace::Namespace;

/// The address that clients use.
pub const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// The client's own address.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// The edge's public IPv6 address.
pub const PUBLIC_V6: Ipv6Addr = Ipv6Addr::new(0xfd03, 0, 0, 0, 0, 0, 0, 1);
/// The client's.
pub const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd03, 0, 0, 0, 0, 0, 0, 2);
/// Machines have IPv6 addresses in this network.
const MACHINES_V6: &str = "fd77::/64";
/// Machines have addresses in `10.77.0.0/16`; the first is a good choice.
pub const MACHINE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

const EDGE_UNDERLAY: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
const EDGE_PORT: u16 = 7450;
/// How long a daemon may take to be ready.
const READY: Duration = Duration::from_secs(15);

/// What went wrong, with what to do.
#[derive(Debug, thiserror::Error)]
pub enum RigError {
    /// A setting cannot be.
    #[error("rig \"{prefix}\": {detail}")]
    Settings {
        /// The rig.
        prefix: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The kernel, `ip` or `nft` refused.
    #[error("rig: {0}")]
    Kernel(#[from] KernelError),
    /// A file or a process could not be made.
    #[error("rig: {operation}: {source}")]
    Io {
        /// What was attempted.
        operation: String,
        /// The cause.
        source: io::Error,
    },
    /// A daemon ended, or was not ready in time.
    #[error("rig: {daemon} {problem}; the end of {log}:\n{tail}")]
    Daemon {
        /// Which.
        daemon: String,
        /// What it did.
        problem: String,
        /// Its log file.
        log: String,
        /// The last lines of it.
        tail: String,
    },
    /// Certificates could not be made.
    #[error("rig: {0}")]
    Identity(#[from] identity::Error),
}

pub(crate) fn io_failed(operation: impl Into<String>) -> impl FnOnce(io::Error) -> RigError {
    let operation = operation.into();
    move |source| RigError::Io { operation, source }
}

/// What a rig is made of.
#[derive(Clone, Debug)]
pub struct RigConfig {
    /// Names of namespaces start with this and a hyphen: 1 to 8 of `[a-z0-9]`.
    pub prefix: String,
    /// How many hosts: 1 to 8, named `a`, `b`, …
    pub hosts: usize,
    /// Round-trip time between hosts; that of a veth (some 20 µs) if `None`.
    pub delay: Option<Duration>,
    /// Bits per second between hosts, each way; what the computer can do if `None`.
    pub bandwidth: Option<u64>,
    /// Mutual TLS between agents and edge (certificates are made), or plaintext.
    pub tls: bool,
    /// The edge reads the leases of the runners in this rig's folder, and believes only those. Without
    /// it, tests that have no runners flip as they like.
    pub leases: bool,
    /// The `conduit` program; looked for beside the running program if `None`.
    pub conduit: Option<PathBuf>,
    /// Further arguments of `conduit edge`.
    pub edge_args: Vec<String>,
    /// How frames find their way; `Auto` leaves it to the daemons (and to `CONDUIT_PATH`).
    pub path: PathChoice,
    /// Where state and logs go; a folder named by the prefix in the temporary folder if `None`.
    pub folder: Option<PathBuf>,
}

impl Default for RigConfig {
    fn default() -> Self {
        Self {
            prefix: "rig".into(),
            hosts: 2,
            delay: None,
            bandwidth: None,
            tls: true,
            leases: false,
            conduit: None,
            edge_args: Vec::new(),
            path: PathChoice::Auto,
            folder: None,
        }
    }
}

/// One host of a rig.
#[derive(Clone, Debug)]
pub struct Host {
    /// `a`, `b`, …: also the name in its certificate.
    pub name: String,
    /// Where it lives.
    pub namespace: Namespace,
    /// Its address in the overlay; what [`conduit::HostEndpoint`] holds.
    pub overlay: Ipv4Addr,
    /// Its address towards the edge.
    pub underlay: Ipv4Addr,
    /// Its address on the link between hosts: where its runners listen for machines that move.
    pub migration: Ipv4Addr,
    /// The agent's socket.
    pub agent_socket: PathBuf,
}

/// A fleet on one computer. Dropping it removes it.
pub struct Rig {
    config: RigConfig,
    folder: PathBuf,
    conduit: PathBuf,
    /// Held for life: a second rig of this prefix is refused instead of swept.
    _lock: Flock<File>,
    client: Namespace,
    edge: Namespace,
    hosts: Vec<Host>,
    edge_daemon: Option<Daemon>,
    agents: Vec<Option<Daemon>>,
    shapers: Vec<Shaper>,
}

impl Rig {
    /// Builds a rig and starts its edge and agents; returns when all agents have their edge.
    pub fn new(config: RigConfig) -> Result<Self, RigError> {
        let mut rig = Self::without_daemons(config)?;
        rig.start_edge()?;
        for index in 0..rig.hosts.len() {
            rig.start_agent(index)?;
        }
        Ok(rig)
    }

    /// Builds the namespaces and links only.
    pub fn without_daemons(config: RigConfig) -> Result<Self, RigError> {
        check(&config)?;
        let conduit = find_conduit(&config)?;
        let folder = folder_of(&config.prefix, config.folder.as_deref());
        let lock = lock(&folder, &config.prefix)?;
        sweep_locked(&config.prefix, &folder)?;
        let namespace = |part: &str| Namespace::new(&config.prefix, part);
        let hosts = (0..config.hosts as u8).map(|i| {
            let name = char::from(b'a' + i).to_string();
            Host {
                namespace: namespace(&name),
                overlay: Ipv4Addr::new(100, 64, 0, 2 + i),
                underlay: Ipv4Addr::new(10, 88, 0, 2 + i),
                migration: Ipv4Addr::new(10, 89, 0, 2 + i),
                agent_socket: folder.join(format!("agent-{name}.sock")),
                name,
            }
        });
        let mut rig = Self {
            conduit,
            _lock: lock,
            client: namespace("client"),
            edge: namespace("edge"),
            hosts: hosts.collect(),
            edge_daemon: None,
            agents: (0..config.hosts).map(|_| None).collect(),
            shapers: Vec::new(),
            folder,
            config,
        };
        // From here on, dropping what is half built removes it.
        rig.build()?;
        Ok(rig)
    }

    fn build(&mut self) -> Result<(), RigError> {
        if self.config.tls {
            let folder = self.folder.join("identity");
            let authority = Authority::create(&folder)?;
            let names = self.hosts.iter().map(|h| h.name.as_str()).chain(["edge"]);
            for name in names {
                authority.issue(&HostName::new(name)?, Duration::from_secs(24 * 3600))?;
            }
        }
        for namespace in self.namespaces() {
            namespace.create()?;
        }
        let (client, edge) = (self.client.clone(), self.edge.clone());
        edge.ip(&format!(
            "link add pub0 type veth peer name eth0 netns {client}
address add {PUBLIC}/24 dev pub0
address add {PUBLIC_V6}/64 dev pub0 nodad
link set pub0 up
link add under0 type bridge
address add {EDGE_UNDERLAY}/24 dev under0
link set under0 up
"
        ))?;
        client.ip(&format!(
            "address add {CLIENT}/24 dev eth0\naddress add {CLIENT_V6}/64 dev eth0 nodad
link set eth0 up
"
        ))?;
        for host in &self.hosts {
            let (name, namespace) = (&host.name, &host.namespace);
            edge.ip(&format!(
                "link add to-{name} type veth peer name eth0 netns {namespace}
link set to-{name} master under0 up
"
            ))?;
            namespace
                .ip(&format!("address add {}/24 dev eth0\nlink set eth0 up\n", host.underlay))?;
        }
        for (i, a) in self.hosts.iter().enumerate() {
            for b in &self.hosts[i + 1..] {
                if let Some(shaper) = join(a, b, self.config.delay, self.config.bandwidth)? {
                    self.shapers.push(shaper);
                }
            }
        }
        Ok(())
    }

    fn namespaces(&self) -> Vec<Namespace> {
        let hosts = self.hosts.iter().map(|h| h.namespace.clone());
        [self.client.clone(), self.edge.clone()].into_iter().chain(hosts).collect()
    }

    /// Where clients are.
    #[must_use]
    pub fn client(&self) -> &Namespace {
        &self.client
    }

    /// Where the edge is.
    #[must_use]
    pub fn edge(&self) -> &Namespace {
        &self.edge
    }

    /// The hosts, in order of their names.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The rig's folder: `logs/`, sockets, state, `identity/` (an authority, and a certificate for
    /// each host and `edge`) if TLS was asked for.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder with certificates, if TLS was asked for.
    #[must_use]
    pub fn identity(&self) -> Option<PathBuf> {
        self.config.tls.then(|| self.folder.join("identity"))
    }

    /// The edge's socket for status.
    #[must_use]
    pub fn edge_socket(&self) -> PathBuf {
        self.folder.join("edge.sock")
    }

    /// The state folder of the edge; removing it while the edge is down makes an edge that has
    /// forgotten everything.
    #[must_use]
    pub fn edge_state(&self) -> PathBuf {
        self.folder.join("edge")
    }

    fn daemon(
        &self,
        name: &str,
        namespace: &Namespace,
        args: &[&OsStr],
    ) -> Result<Daemon, RigError> {
        let mut command = namespace.command(&self.conduit);
        command.args(args);
        match self.config.path {
            PathChoice::Auto => {}
            PathChoice::Bpf => drop(command.args(["--path", "bpf"])),
            PathChoice::Routes => drop(command.args(["--path", "routes"])),
        }
        match self.identity() {
            Some(folder) => command.arg("--identity").arg(folder),
            None => command.arg("--plaintext"),
        };
        // One computer's own namespaces; what encryption costs is measured by itself.
        command.args(["--encrypt", "off"]);
        Daemon::start(&self.folder, name, command)
    }

    /// Starts the edge (again), and returns when it answers.
    pub fn start_edge(&mut self) -> Result<(), RigError> {
        let (public, underlay) = (PUBLIC.to_string(), EDGE_UNDERLAY.to_string());
        let (socket, state) = (self.edge_socket(), self.edge_state());
        let (public_v6, leases) = (PUBLIC_V6.to_string(), self.folder.join(crate::fleet::LEASES));
        let mut args: Vec<&OsStr> = vec![
            "edge".as_ref(),
            "--public".as_ref(),
            public.as_ref(),
            "--underlay".as_ref(),
            underlay.as_ref(),
            "--socket".as_ref(),
            socket.as_ref(),
            "--state".as_ref(),
            state.as_ref(),
            "--machines-v6".as_ref(),
            MACHINES_V6.as_ref(),
            "--public-v6".as_ref(),
            public_v6.as_ref(),
        ];
        if self.config.leases {
            args.extend(["--lease".as_ref(), leases.as_os_str()]);
        }
        args.extend(self.config.edge_args.iter().map(OsStr::new));
        let mut daemon = self.daemon("edge", &self.edge, &args)?;
        daemon.wait_until("answer", READY, || conduit::status(&socket).is_ok())?;
        self.edge_daemon = Some(daemon);
        Ok(())
    }

    /// Starts the agent of a host (again), and returns when it has its edge.
    pub fn start_agent(&mut self, host: usize) -> Result<(), RigError> {
        self.start_agent_alone(host)?;
        let socket = self.hosts[host].agent_socket.clone();
        let daemon = self.agents[host].as_mut().expect("just started");
        daemon.wait_until("reach the edge", READY, || {
            conduit::status(&socket).is_ok_and(|s| s.link.starts_with("connected"))
        })
    }

    /// Starts the agent of a host, and returns when it answers, with or without an edge.
    pub fn start_agent_alone(&mut self, host: usize) -> Result<(), RigError> {
        let Host { name, namespace, overlay, underlay, agent_socket, .. } = &self.hosts[host];
        let (overlay, underlay) = (overlay.to_string(), underlay.to_string());
        let edge = format!("{EDGE_UNDERLAY}:{EDGE_PORT}");
        let state = self.folder.join(format!("agent-{name}"));
        let args: [&OsStr; 13] = [
            "agent".as_ref(),
            "--host".as_ref(),
            name.as_ref(),
            "--overlay".as_ref(),
            overlay.as_ref(),
            "--underlay".as_ref(),
            underlay.as_ref(),
            "--edge".as_ref(),
            edge.as_ref(),
            "--socket".as_ref(),
            agent_socket.as_ref(),
            "--state".as_ref(),
            state.as_ref(),
        ];
        let mut daemon = self.daemon(&format!("agent-{name}"), namespace, &args)?;
        daemon.wait_until("answer", READY, || conduit::status(agent_socket).is_ok())?;
        self.agents[host] = Some(daemon);
        Ok(())
    }

    /// Kills the edge's process (SIGKILL); what it set up in the kernel stays.
    pub fn kill_edge(&mut self) {
        self.edge_daemon = None;
    }

    /// Kills the agent of a host (SIGKILL); what it set up in the kernel stays.
    pub fn kill_agent(&mut self, host: usize) {
        self.agents[host] = None;
    }

    /// The data path as a runner on that host has it. Its taps must be opened in the host's
    /// namespace: call [`conduit::DataPath::prepare`] in [`Namespace::run`], or in a process
    /// started by [`Namespace::command`].
    pub fn data_path(&self, host: usize) -> Result<AgentDataPath, RigError> {
        let socket = &self.hosts[host].agent_socket;
        AgentDataPath::connect(socket).map_err(io_failed(format!("reach {}", socket.display())))
    }

    /// Cuts a host off: every link of it goes down, as if its power had failed.
    pub fn cut(&self, host: usize) -> Result<(), RigError> {
        let host = &self.hosts[host];
        let mut script = String::from("link set dev eth0 down\n");
        for other in self.hosts.iter().filter(|o| o.name != host.name) {
            script += &format!("link set dev mig-{} down\n", other.name);
        }
        host.namespace.ip(&script)
    }

    /// Undoes [`Rig::cut`].
    pub fn reconnect(&self, host: usize) -> Result<(), RigError> {
        let host = &self.hosts[host];
        let mut script = String::from("link set dev eth0 up\n");
        for other in self.hosts.iter().filter(|o| o.name != host.name) {
            let name = &other.name;
            script += &format!("link set dev mig-{name} up\n");
            script += &format!("route replace {} dev mig-{name}\n", other.migration);
        }
        host.namespace.ip(&script)
    }

    /// Removes everything now and says what failed; dropping does the same and cannot say it.
    pub fn remove(mut self) -> Result<(), RigError> {
        self.tear_down()
    }

    fn tear_down(&mut self) -> Result<(), RigError> {
        self.agents.clear();
        self.edge_daemon = None;
        self.shapers.clear();
        for namespace in self.namespaces() {
            namespace.remove()?;
        }
        // Keys and state go, logs stay.
        empty(&self.folder, |name| name != "logs")
    }

    /// Removes what a rig whose owner was killed has left: namespaces of the prefix, and the
    /// processes in its pid files that are still the ones that it started. Refused while a rig of
    /// this prefix lives.
    pub fn sweep(prefix: &str, folder: Option<&Path>) -> Result<(), RigError> {
        check(&RigConfig { prefix: prefix.to_owned(), ..RigConfig::default() })?;
        let folder = folder_of(prefix, folder);
        let _lock = lock(&folder, prefix)?;
        sweep_locked(prefix, &folder)
    }
}

#[cfg(test)]
impl Rig {
    /// Leaves everything behind as a killed process would, except that its daemons, being our
    /// children, can still be waited for.
    fn abandon(mut self) -> Vec<Daemon> {
        let daemons = self.edge_daemon.take().into_iter();
        let left = daemons.chain(self.agents.iter_mut().filter_map(Option::take)).collect();
        self.hosts.clear();
        self.folder = PathBuf::from("/nonexistent");
        (self.client, self.edge) = (Namespace::new("", "none"), Namespace::new("", "none"));
        left
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Err(error) = self.tear_down() {
            tracing::warn!(prefix = self.config.prefix, %error, "the rig was not removed whole");
        }
    }
}

/// Joins two hosts by a link of their own.
fn join(
    a: &Host,
    b: &Host,
    delay: Option<Duration>,
    bandwidth: Option<u64>,
) -> Result<Option<Shaper>, RigError> {
    let shaped = delay.is_some() || bandwidth.is_some();
    let shaper = if shaped {
        let shape = Shape { delay: delay.unwrap_or_default() / 2, bits_per_second: bandwidth };
        Some(Shaper::start(a, b, shape)?)
    } else {
        let (to_b, to_a) = (link_name(b), link_name(a));
        a.namespace
            .ip(&format!("link add {to_b} type veth peer name {to_a} netns {}\n", b.namespace))?;
        None
    };
    for (this, other) in [(a, b), (b, a)] {
        let link = link_name(other);
        this.namespace.ip(&format!(
            "address add {} dev {link}
link set dev {link} up
route add {} dev {link}
",
            this.migration, other.migration
        ))?;
        if shaped {
            // A long fat link needs windows of its size; the defaults end at 4 to 6 MB.
            for key in ["tcp_rmem", "tcp_wmem"] {
                this.namespace.run(|| {
                    fs::write(format!("/proc/sys/net/ipv4/{key}"), "4096 131072 67108864")
                        .map_err(io_failed(format!("set {key}")))
                })??;
            }
        }
    }
    Ok(shaper)
}

/// The interface that leads to a host.
pub(crate) fn link_name(to: &Host) -> String {
    format!("mig-{}", to.name)
}

fn check(config: &RigConfig) -> Result<(), RigError> {
    let prefix = &config.prefix;
    let fail = |detail: &str| {
        Err(RigError::Settings { prefix: prefix.clone(), detail: detail.to_owned() })
    };
    let clean = prefix.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if !(1..=8).contains(&prefix.len()) || !clean {
        return fail("a prefix has 1 to 8 lowercase letters or digits");
    }
    if !(1..=8).contains(&config.hosts) {
        return fail("a rig has 1 to 8 hosts");
    }
    if config.bandwidth.is_some_and(|b| b < 100_000) {
        return fail("a link has at least 100 kbit/s");
    }
    if !nix::unistd::geteuid().is_root() {
        return fail("namespaces and taps need root; run it with sudo");
    }
    Ok(())
}

fn folder_of(prefix: &str, folder: Option<&Path>) -> PathBuf {
    let default = || std::env::temp_dir().join(format!("architect-rig-{prefix}"));
    folder.map_or_else(default, Path::to_owned)
}

fn lock(folder: &Path, prefix: &str) -> Result<Flock<File>, RigError> {
    fs::create_dir_all(folder).map_err(io_failed(format!("make {}", folder.display())))?;
    let path = folder.join("lock");
    let file = File::create(&path).map_err(io_failed(format!("make {}", path.display())))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| RigError::Settings {
        prefix: prefix.to_owned(),
        detail: format!("a rig of this prefix is alive ({} is locked)", path.display()),
    })
}

/// Removes all that the folder and the kernel know of a rig.
fn sweep_locked(prefix: &str, folder: &Path) -> Result<(), RigError> {
    daemon::sweep(folder)?;
    for namespace in Namespace::existing(prefix)? {
        namespace.remove()?;
    }
    empty(folder, |_| true)
}

/// Removes from a rig's folder what a rig makes (and nothing else, whatever folder was named), of
/// it what `which` says.
fn empty(folder: &Path, which: impl Fn(&str) -> bool) -> Result<(), RigError> {
    let ours = |name: &str| {
        ["logs", "pids", "identity", "edge", "edge.sock"].contains(&name)
            || name.starts_with("agent-")
    };
    let list = || io_failed(format!("list {}", folder.display()));
    for entry in fs::read_dir(folder).map_err(list())? {
        let path = entry.map_err(list())?.path();
        if !path.file_name().and_then(OsStr::to_str).is_some_and(|n| ours(n) && which(n)) {
            continue;
        }
        let removed =
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(io_failed(format!("remove {}", path.display())))?;
    }
    Ok(())
}

/// The `conduit` program: as told, by the environment, or beside this program (also one folder up,
/// because tests are in `deps`).
fn find_conduit(config: &RigConfig) -> Result<PathBuf, RigError> {
    if let Some(path) = &config.conduit {
        return Ok(path.clone());
    }
    if let Some(path) = std::env::var_os("CONDUIT_PROGRAM") {
        return Ok(path.into());
    }
    crate::programs::command("conduit").ok_or_else(|| RigError::Settings {
        prefix: config.prefix.clone(),
        detail: "no `conduit` program beside this one; build it (cargo build -p conduit) or set \
                 CONDUIT_PROGRAM"
            .into(),
    })
}

/// Waits until `done` says so; false at the deadline.
pub(crate) fn wait_for(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests;
