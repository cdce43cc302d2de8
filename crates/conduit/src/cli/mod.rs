//! The `conduit` command: the two daemons, and looking at them. Also reachable as a subcommand of
//! `architect` (see [`Command`] and [`run`]).

mod show;

use crate::{
    agent::{Agent, AgentConfig},
    announce::Announce,
    bench,
    edge::{self, BesideConfig, Edge, EdgeConfig, EdgeOptions},
    holder::{self, HoldSettings, LimitArgs},
    homes::EdgeAt,
    keys, look,
    plane::PathChoice,
    policy::Prefix,
    secure::{self, Encrypt, SecureConfig},
    wg,
    wire::Peer,
};
use anyhow::{Context, Result, bail};
use clap::{Args, CommandFactory, Parser, Subcommand};
use identity::{HostName, Identity, Security};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
};

/// Where a daemon and the commands meet unless told otherwise.
pub const RUN_DIR: &str = "/run/conduit";
/// The TCP port where an edge listens for agents unless told otherwise.
pub const EDGE_PORT: u16 = 7450;

/// Connections that follow: the network of machines that move.
#[derive(Debug, Parser)]
#[command(name = "conduit", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the network agent of this host (one per host).
    Agent(AgentArgs),
    /// Run an edge: the public address that clients use.
    Edge(Box<EdgeArgs>),
    /// Hand over what the edge here serves to another edge, with every connection.
    Drain(DrainArgs),
    /// Run the process that holds frames; agent and edge start it by themselves.
    Hold(holder::HoldArgs),
    /// Show what the holder of an agent or edge keeps, and what it did.
    Held(holder::ShowArgs),
    /// Show the machines, their addresses and where their frames go.
    Map(look::MapArgs),
    /// Show who talks to whom, and how much.
    Flows(look::FlowsArgs),
    /// Follow frames: which program saw them, and what it decided.
    Trace(look::TraceArgs),
    /// Show whether the agent or edge here is well, and whom it can reach.
    Status(LookArgs),
    /// The encrypted tunnel in user space: run it, look at it, change its keys.
    #[command(subcommand)]
    Tunnel(wg::Command),
    /// Change the keys of encrypted packets now: of the tunnel in user space the key pair, of the kernel's the
    /// preshared key with every other end.
    Rotate(keys::RotateArgs),
    /// Try what this kernel can do for the data path, and what the paths to peers carry (needs root).
    Check(CheckArgs),
    /// Measure the data path next to kernel vxlan and plain routing (needs root).
    Bench(bench::Args),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// How the connection between agents and edge is protected.
#[derive(Debug, Args)]
pub struct SecurityArgs {
    /// Folder with ca.crt, NAME.crt and NAME.key.
    #[arg(long, value_name = "DIR", required_unless_present = "plaintext")]
    pub identity: Option<PathBuf>,
    /// No TLS: only on a network that is trusted as a whole.
    #[arg(long, conflicts_with = "identity")]
    pub plaintext: bool,
}

impl SecurityArgs {
    fn load(&self, name: &HostName) -> Result<Security> {
        match &self.identity {
            Some(folder) => Ok(Security::Mutual(Identity::load(folder, name)?)),
            None if self.plaintext => Ok(Security::Plaintext),
            None => bail!("give --identity DIR, or --plaintext on a trusted network"),
        }
    }
}

/// How frames find their way; the same on all hosts and edges of a fleet.
#[derive(Debug, Args)]
pub struct PathArgs {
    /// By BPF programs, by routes, or by BPF where this kernel can.
    #[arg(long, value_enum, default_value = "auto", env = "CONDUIT_PATH")]
    pub path: PathChoice,
    /// Where what BPF needs outlives this process: a folder of a BPF file system.
    #[arg(long, value_name = "DIR", default_value = conduit_bpf::ROOT)]
    pub pins: PathBuf,
}

/// How frames wait for a machine that no host has at the moment.
#[derive(Debug, Args)]
pub struct HolderArgs {
    /// Hold no frames: no process beside this one, and they are lost while no host has their machine.
    #[arg(long)]
    pub no_hold: bool,
    /// Bounds.
    #[command(flatten)]
    pub limits: LimitArgs,
}

impl HolderArgs {
    fn settings(&self) -> Result<Option<HoldSettings>> {
        if self.no_hold {
            return Ok(None);
        }
        let settings = HoldSettings::of_this_program(self.limits.into());
        settings.map(Some).context("find this program, which is the holder's too")
    }
}

/// How packets between hosts and edges are protected; the same in all of a fleet.
#[derive(Debug, Args)]
pub struct EncryptArgs {
    /// By the kernel's WireGuard, by a tunnel in user space, by the kernel where it can, or not at
    /// all (only on a network that is trusted as a whole).
    #[arg(long, value_enum, default_value = "auto", env = "CONDUIT_ENCRYPT")]
    pub encrypt: Encrypt,
    /// The UDP port of encrypted packets.
    #[arg(long, value_name = "PORT", default_value_t = secure::PORT)]
    pub encrypt_port: u16,
    /// How long keys are used, as in 12h or 7d: the key pair in user space, the preshared key of each pair of
    /// ends in the kernel.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = wg::duration)]
    pub rotate_every: std::time::Duration,
}

impl EncryptArgs {
    fn config(&self, state: &Path) -> Result<SecureConfig> {
        let program = std::env::current_exe().context("find this program")?;
        // `architect conduit …` is the same program.
        let within = program.file_name().is_some_and(|name| name == "architect");
        let mut program = vec![program.into_os_string()];
        program.extend(within.then(|| "conduit".into()));
        Ok(SecureConfig {
            encrypt: self.encrypt,
            port: self.encrypt_port,
            state: state.join("encrypt"),
            program,
            rotate_every: Some(self.rotate_every),
        })
    }
}

/// Settings of `conduit agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Name of this host.
    #[arg(long)]
    pub host: HostName,
    /// This host's address in the overlay; unique in the fleet.
    #[arg(long, value_name = "ADDRESS")]
    pub overlay: Ipv4Addr,
    /// The address of this host that other hosts reach it by.
    #[arg(long, value_name = "ADDRESS")]
    pub underlay: Ipv4Addr,
    /// Where an edge listens for agents, and its name in its certificate, as in west=10.0.0.1:7450. Once
    /// for each edge of the fleet.
    #[arg(long, value_name = "[NAME=]ADDRESS:PORT", required = true)]
    pub edge: Vec<EdgeAt>,
    /// Name of edges that are given without one.
    #[arg(long, default_value = "edge")]
    pub edge_name: HostName,
    /// The socket that runners use.
    #[arg(long, default_value_os_t = Path::new(RUN_DIR).join("agent.sock"))]
    pub socket: PathBuf,
    /// The state folder; must not outlive a reboot.
    #[arg(long, default_value_os_t = Path::new(RUN_DIR).join("agent"))]
    pub state: PathBuf,
    /// At the end, remove taps, routes and rules: traffic of the machines here ends.
    #[arg(long)]
    pub remove_on_exit: bool,
    /// Tell the network around which machines run here, in place of leading their frames through the edge:
    /// on the link of an interface that clients share, or by routes that a routing daemon takes further.
    #[arg(long, value_name = "link:INTERFACE|routes")]
    pub announce: Option<Announce>,
    /// Answer Prometheus on http://ADDRESS:PORT/metrics; without protection, so not on a public one.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics: Option<SocketAddr>,
    /// How frames find their way.
    #[command(flatten)]
    pub path: PathArgs,
    /// Holding.
    #[command(flatten)]
    pub hold: HolderArgs,
    /// How packets are protected.
    #[command(flatten)]
    pub encrypt: EncryptArgs,
    /// Protection.
    #[command(flatten)]
    pub security: SecurityArgs,
}

/// Settings of `conduit edge`.
#[derive(Debug, Args)]
pub struct EdgeArgs {
    /// The address that clients use; one of this computer's own.
    #[arg(long, value_name = "ADDRESS")]
    pub public: Ipv4Addr,
    /// The edge's address in the overlay.
    #[arg(long, value_name = "ADDRESS", default_value = "100.64.0.1")]
    pub overlay: Ipv4Addr,
    /// The address of this computer that hosts reach it by.
    #[arg(long, value_name = "ADDRESS")]
    pub underlay: Ipv4Addr,
    /// Where to listen for agents; port 7450 of the underlay address if not given.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// Machines have addresses in this network.
    #[arg(long, value_name = "NETWORK/BITS", default_value = "10.77.0.0/16", value_parser = network)]
    pub machines: (Ipv4Addr, u8),
    /// Machines have IPv6 addresses in this network.
    #[arg(long, value_name = "NETWORK/BITS")]
    pub machines_v6: Option<Prefix>,
    /// The IPv6 address that clients use; one of this computer's own. Without it machines' addresses are
    /// seen as they are, and the network outside must lead them here.
    #[arg(long, value_name = "ADDRESS", requires = "machines_v6")]
    pub public_v6: Option<Ipv6Addr>,
    /// An address of this computer that a machine may have whole; may be given several times.
    #[arg(long, value_name = "ADDRESS")]
    pub spare: Vec<IpAddr>,
    /// Tracked connections that the machines of one tenant may have.
    #[arg(long, value_name = "COUNT", default_value_t = EdgeOptions::default().flows_per_network)]
    pub flows_per_network: u32,
    /// The store of leases that the runners have, a folder or another address: only a machine's lease
    /// says who leads its frames. Without it, any host of the fleet may take any machine with a newer
    /// epoch.
    #[arg(long, value_name = "STORE")]
    pub lease: Option<PathBuf>,
    /// Addresses for machines that come without: NETWORK/BITS, or ID=NETWORK/BITS for those of one
    /// tenant; may be given several times [default: all of --machines].
    #[arg(long, value_name = "[ID=]NETWORK/BITS")]
    pub pool: Vec<edge::Range>,
    /// How long the address of a machine that is gone rests before another one may have it.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = wg::duration)]
    pub quarantine: std::time::Duration,
    /// Machines find each other by NAME.DOMAIN.
    #[arg(long, default_value = "machine.internal")]
    pub domain: String,
    /// Whom to ask for other names, at port 53 if none is given; may be given several times. Without,
    /// they are refused.
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = name_server)]
    pub name_server: Vec<SocketAddr>,
    /// Name of the edge in its certificate, and among several.
    #[arg(long, default_value = "edge")]
    pub name: HostName,
    /// Another edge of the fleet, as in west=10.0.0.1:7450; once for each. Machines are spread over all of
    /// them, and what one served that is dead, or drained, another serves.
    #[arg(long, value_name = "NAME=ADDRESS:PORT", requires_all = ["lease", "public_interface"])]
    pub beside: Vec<EdgeAt>,
    /// With --beside: the interface of public addresses, on which this edge adds those that it serves.
    #[arg(long, value_name = "INTERFACE")]
    pub public_interface: Option<String>,
    /// The socket for `conduit map` and `conduit status`.
    #[arg(long, default_value_os_t = Path::new(RUN_DIR).join("edge.sock"))]
    pub socket: PathBuf,
    /// The state folder; should outlive a reboot.
    #[arg(long, default_value = "/var/lib/conduit/edge")]
    pub state: PathBuf,
    /// At the end, remove translation and routes: connections through this edge end.
    #[arg(long)]
    pub remove_on_exit: bool,
    /// Answer Prometheus on http://ADDRESS:PORT/metrics; without protection, so not on a public one.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics: Option<SocketAddr>,
    /// How frames find their way.
    #[command(flatten)]
    pub path: PathArgs,
    /// Holding.
    #[command(flatten)]
    pub hold: HolderArgs,
    /// How packets are protected.
    #[command(flatten)]
    pub encrypt: EncryptArgs,
    /// Protection.
    #[command(flatten)]
    pub security: SecurityArgs,
}

/// What to drain.
#[derive(Debug, Args)]
pub struct DrainArgs {
    /// Name of the other edge.
    pub to: HostName,
    /// Only this home: the name, or the overlay address, of the edge whose public addresses they are. All
    /// that are served here, if not given.
    #[arg(long)]
    pub home: Option<String>,
    /// The socket of the edge.
    #[arg(long, default_value_os_t = Path::new(RUN_DIR).join("edge.sock"))]
    pub socket: PathBuf,
    /// How long it may take, as in 30s; what is not done by then is undone.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = wg::duration)]
    pub limit: std::time::Duration,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// What to look at.
#[derive(Debug, Args)]
pub struct LookArgs {
    /// The socket of an agent or edge; the agent here, else the edge here, if not given.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// How to check.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// A folder of a BPF file system to pin in.
    #[arg(long, value_name = "DIR", default_value = conduit_bpf::ROOT)]
    pub pins: PathBuf,
    /// Underlay address of a host or edge to probe the path to; all that the agent or edge here knows,
    /// if not given.
    #[arg(long, value_name = "ADDRESS")]
    pub peer: Vec<IpAddr>,
    /// The socket of that agent or edge.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Try the kernel only.
    #[arg(long, conflicts_with = "peer")]
    pub no_paths: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Parses `10.77.0.0/16`.
fn network(text: &str) -> Result<(Ipv4Addr, u8), String> {
    let parse = || {
        let (address, bits) = text.split_once('/')?;
        let bits: u8 = bits.parse().ok()?;
        (1..=32).contains(&bits).then_some((address.parse().ok()?, bits))
    };
    parse().ok_or_else(|| "not a network like 10.77.0.0/16".to_owned())
}

fn name_server(text: &str) -> Result<SocketAddr, String> {
    let bare = || text.parse::<IpAddr>().map(|address| (address, 53).into());
    text.parse()
        .or_else(|_| bare())
        .map_err(|_| "not an address like 9.9.9.9 or [2620:fe::9]:53".into())
}

/// Runs a parsed command to its end.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Agent(args) => agent(args),
        Command::Edge(args) => run_edge(*args),
        Command::Drain(args) => show::drain(&args),
        Command::Hold(args) => holder::run(args),
        Command::Held(args) => holder::show(&args),
        Command::Map(args) => look::map(&args),
        Command::Flows(args) => look::flows(&args),
        Command::Trace(args) => look::trace(&args),
        Command::Status(args) => show::show_status(&args),
        Command::Tunnel(command) => wg::run(command),
        Command::Rotate(args) => keys::rotate(&args),
        Command::Check(args) => show::try_kernel(&args),
        // Exit code 3: all was measured, and a promise was not kept.
        Command::Bench(args) if !bench::run(&args)? => std::process::exit(3),
        Command::Bench(_) => Ok(()),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "conduit", &mut std::io::stdout());
            Ok(())
        }
    }
}

fn agent(args: AgentArgs) -> Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    let security = args.security.load(&args.host)?;
    let hold = args.hold.settings()?;
    let secure = args.encrypt.config(&args.state)?;
    let mut edges = args.edge.into_iter();
    let first = edges.next().context("give at least one edge (--edge)")?;
    let agent = Agent::start(AgentConfig {
        secure,
        announce: args.announce,
        host: args.host,
        this: Peer { overlay: args.overlay, underlay: args.underlay },
        edge: first.address,
        edge_name: first.name.unwrap_or_else(|| args.edge_name.clone()),
        more_edges: edges
            .map(|at| EdgeAt {
                name: Some(at.name.unwrap_or_else(|| args.edge_name.clone())),
                ..at
            })
            .collect(),
        security,
        socket: args.socket,
        state: args.state,
        path: args.path.path,
        pins: args.path.pins,
        hold,
    })
    .context("the agent did not start")?;
    let _endpoint = args.metrics.map(|address| agent.serve_metrics(address)).transpose()?;
    tracing::info!(overlay = %args.overlay, "agent ready");
    signals.forever().next();
    if args.remove_on_exit {
        agent.remove_everything().context("the agent did not clean up")?;
    }
    Ok(())
}

fn run_edge(args: EdgeArgs) -> Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    let security = args.security.load(&args.name)?;
    let hold = args.hold.settings()?;
    let secure = args.encrypt.config(&args.state)?;
    let beside = args.public_interface.filter(|_| !args.beside.is_empty());
    let beside = beside.map(|interface| BesideConfig {
        name: args.name.clone(),
        edges: args.beside,
        interface,
    });
    let edge = Edge::start(EdgeConfig {
        secure,
        public: args.public,
        this: Peer { overlay: args.overlay, underlay: args.underlay },
        listen: args.listen.unwrap_or_else(|| (args.underlay, EDGE_PORT).into()),
        machines: args.machines,
        options: EdgeOptions {
            machines_v6: args.machines_v6,
            public_v6: args.public_v6,
            spare: args.spare,
            flows_per_network: args.flows_per_network,
            lease: args.lease,
            pools: args.pool,
            quarantine: args.quarantine,
            domain: args.domain,
            name_servers: args.name_server,
            beside,
        },
        security,
        socket: args.socket,
        state: args.state,
        path: args.path.path,
        pins: args.path.pins,
        hold,
    })
    .context("the edge did not start")?;
    let _endpoint = args.metrics.map(|address| edge.serve_metrics(address)).transpose()?;
    tracing::info!(listen = %edge.listens_on(), public = %args.public, "edge ready");
    signals.forever().next();
    if args.remove_on_exit {
        edge.remove_everything().context("the edge did not clean up")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn protection_is_chosen_and_never_left_out() {
        let base = ["conduit", "edge", "--public", "192.0.2.1", "--underlay", "192.0.2.1"];
        let parse = |more: &[&str]| Cli::try_parse_from(base.iter().chain(more)).is_ok();
        assert!(!parse(&[]), "neither");
        assert!(parse(&["--plaintext"]));
        assert!(parse(&["--identity", "x"]));
        assert!(!parse(&["--identity", "x", "--plaintext"]), "both");
    }

    #[test]
    fn networks_are_read_or_refused() {
        assert_eq!(network("10.77.0.0/16").unwrap(), (Ipv4Addr::new(10, 77, 0, 0), 16));
        for bad in ["10.77.0.0", "10.77.0.0/33", "10.77.0.0/0", "x/8", "10.77.0.0/-1"] {
            assert!(network(bad).is_err(), "{bad}");
        }
    }
}
