//! `run`, `resume`, `restore`, `stand-in`: the commands that become (or start) a runner.

use super::{
    StateArgs,
    backup::{HistoryArgs, SuspendHistory},
    output::say,
};
use crate::driver::DiskKind;
use crate::runner::{
    self,
    api::{Client, Request},
    config::{
        AcceleratorChoice, Address, Boot, CopyWanted, Launch, NetworkConfig, ProtectConfig,
        RestoreFrom, RunnerConfig, SecurityConfig, bills_requests,
    },
    state::{MachineDir, check_name},
};
use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Common to everything that starts a runner.
#[derive(Args, Debug)]
pub(super) struct HostArgs {
    /// This host's name, as in its certificate [default: the host name]
    #[arg(long, env = "DRAFTER_HOST")]
    host: Option<String>,
    /// Where other hosts' runners connect, to send or take this machine
    #[arg(long)]
    pub(super) listen: Option<SocketAddr>,
    /// Directory with ca.crt and this host's certificate and key [default: STATE/certs]
    #[arg(long, env = "DRAFTER_CERTS")]
    certs: Option<PathBuf>,
    /// Protect nothing between hosts: only on a network that is trusted as a whole
    #[arg(long, conflicts_with = "certs")]
    plaintext: bool,
    /// Take the machine from these hosts only [default: every host of the same authority]
    #[arg(long, value_delimiter = ',', conflicts_with = "plaintext")]
    accept_from: Vec<String>,
    /// Where leases are kept, for all hosts that may run the machine: a directory, `sqlite:/FILE`,
    /// `postgres://USER@HOST/DATABASE`, `etcd://HOST:PORT/PREFIX`, `s3://BUCKET/FOLDER` (gs:, az:), or
    /// `kubernetes://NAMESPACE` [default: STATE/leases]
    #[arg(long, env = "DRAFTER_LEASE")]
    lease: Option<PathBuf>,
    /// The machine's network on this host
    #[arg(long, value_enum, default_value = "none")]
    network: Network,
    /// Socket of this host's conduit agent
    #[arg(long, env = "CONDUIT_AGENT", default_value = "/run/conduit/agent.sock")]
    agent: PathBuf,
    /// What the guest's processor runs on
    #[arg(long, value_enum, default_value = "auto")]
    accelerator: AcceleratorChoice,
    /// Memory to keep of a machine that moved away, so that it comes back quickly, in MiB; 0 keeps none
    #[arg(long, default_value_t = 16384)]
    keep_stay_mib: u64,
    /// Track no writes to memory, as on Linux before 6.7: every move away is post-copy
    #[arg(long)]
    no_tracking: bool,
    #[command(flatten)]
    protect: ProtectFlags,
    /// Return when the machine runs; it goes on in the background
    #[arg(long)]
    pub(super) detach: bool,
}

/// That the machine is to survive the loss of this host.
#[derive(Args, Debug)]
struct ProtectFlags {
    /// Protect the machine as soon as it runs here, however it came: store a generation in this store
    /// again and again, and hold a lease that ends, so that a stand-in may run it when this host is lost
    #[arg(long, value_name = "URL")]
    protect: Option<String>,
    /// The file with the keys to that store; without it the variable SILO_KEYS holds them
    #[arg(long, value_name = "FILE", env = "SILO_KEY_FILE", requires = "protect")]
    protect_keys: Option<PathBuf>,
    /// The history in that store, TENANT/LINE [default: machines/NAME]
    #[arg(long, value_name = "TENANT/LINE", requires = "protect")]
    protect_line: Option<String>,
    #[command(flatten)]
    how: super::protect::How,
}

/// Kinds of network.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Network {
    /// No network.
    None,
    /// A tap and a route on this host.
    Local,
    /// Through the conduit agent and its edge.
    Agent,
}

/// `drafter run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// The machine's name
    name: String,
    /// A package: directory or .tar.zst
    #[arg(long)]
    package: PathBuf,
    /// Memory in MiB [default: as the package says]
    #[arg(long)]
    memory_mib: Option<u64>,
    /// Virtual processors [default: as the package says]
    #[arg(long)]
    vcpus: Option<u32>,
    /// The machine's address, for life; auto: the edge gives it one, and an IPv6 address where it has some
    #[arg(long, value_name = "ADDRESS|auto")]
    address: Option<Address>,
    /// Its IPv6 address, for life
    #[arg(long, requires = "address")]
    address_v6: Option<std::net::Ipv6Addr>,
    /// The tenant's network that the addresses are of, 1 to 65535 [default: the common one]
    #[arg(long, requires = "address", value_parser = clap::value_parser!(u16).range(1..))]
    network_id: Option<u16>,
    /// A public address of the edge that the machine has whole; may be given for IPv4 and IPv6
    #[arg(long, requires = "address")]
    public: Vec<std::net::IpAddr>,
    /// Who may open flows from outside: NETWORK, or PORT[/udp]=NETWORK for one public port
    #[arg(long, requires = "address", value_parser = parse_allow)]
    allow: Vec<conduit::policy::Allow>,
    /// Bytes a second from outside, at most
    #[arg(long, requires = "address")]
    bytes_in: Option<u64>,
    /// Bytes a second to the outside, at most
    #[arg(long, requires = "address")]
    bytes_out: Option<u64>,
    /// New connections a second from outside, at most
    #[arg(long, requires = "address")]
    connections_in: Option<u32>,
    /// MTU inside the guest; 1380 fits an encrypted overlay on a network of 1500
    #[arg(long, default_value_t = 1380)]
    mtu: u16,
    /// Port at the edge that leads to a port of the machine: PUBLIC:MACHINE[/udp]
    #[arg(long = "publish", value_parser = parse_port)]
    publish: Vec<conduit::PortMapping>,
    /// Start from the disks that this host has of the machine, as after a crash of the host
    #[arg(long)]
    keep_disks: bool,
    /// How the machine reaches its disks, for life: nbd through QEMU's block layer, vhost-user-blk
    /// without it
    #[arg(
        long,
        value_enum,
        env = "DRAFTER_DISK_KIND",
        default_value_t = DiskKind::VhostUserBlk
    )]
    disk_kind: DiskKind,
    /// Take over the running monitor of a runner that is gone
    #[arg(long, conflicts_with = "keep_disks")]
    take_over: bool,
    #[command(flatten)]
    on: HostArgs,
}

/// `drafter resume`.
#[derive(Args, Debug)]
pub struct ResumeArgs {
    /// The machine's name
    name: String,
    /// The directory that `suspend` wrote, rather than a store
    #[arg(long, required_unless_present = "store")]
    from: Option<PathBuf>,
    #[command(flatten)]
    history: SuspendHistory,
    /// Go back to this generation, and forget what the machine did since [default: what it was suspended
    /// as, if it has not run since]
    #[arg(long, value_name = "NUMBER", requires = "store")]
    generation: Option<u64>,
    /// The host that owned the machine: it was stopped there, or that host will never come back. Said
    /// wrongly, the machine runs twice
    #[arg(long, value_name = "HOST", requires = "generation")]
    take_from: Option<String>,
    /// Packages, or directories of packages, that the machine may need
    #[arg(long, required = true)]
    package: Vec<PathBuf>,
    #[command(flatten)]
    on: HostArgs,
}

/// `drafter stand-in`.
#[derive(Args, Debug)]
pub struct StandInArgs {
    /// The machine's name
    name: String,
    /// Packages, or directories of packages, that the machine may need
    #[arg(long, required = true)]
    package: Vec<PathBuf>,
    #[command(flatten)]
    on: HostArgs,
}

/// `drafter restore`.
#[derive(Args, Debug)]
pub struct RestoreArgs {
    /// The machine's name
    name: String,
    #[command(flatten)]
    history: HistoryArgs,
    /// Which generation [default: the newest]
    #[arg(long, value_name = "NUMBER")]
    generation: Option<u64>,
    /// The host that owned the machine: it was stopped there, or that host will never come back. Said
    /// wrongly, the machine runs twice
    #[arg(long, value_name = "HOST")]
    take_from: Option<String>,
    /// Begin a copy of this machine, as its history has it, with a name, a lease and addresses of its own.
    /// The machine itself is not touched, wherever it runs
    #[arg(long, value_name = "MACHINE", conflicts_with = "take_from")]
    copy_of: Option<String>,
    /// The copy's address; auto: the edge gives it one
    #[arg(long, value_name = "ADDRESS|auto", requires = "copy_of")]
    address: Option<Address>,
    /// The copy's IPv6 address
    #[arg(long, requires = "address")]
    address_v6: Option<std::net::Ipv6Addr>,
    /// Run at once; what the guest touches is fetched first, and then the rest. Until all is here the
    /// store must stay, and the machine cannot move or be suspended
    #[arg(long)]
    lazy: bool,
    /// Packages, or directories of packages, that the machine may need
    #[arg(long, required = true)]
    package: Vec<PathBuf>,
    #[command(flatten)]
    on: HostArgs,
}

fn parse_port(text: &str) -> Result<conduit::PortMapping, String> {
    let (ports, protocol) = match text.split_once('/') {
        None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), conduit::Protocol::Tcp),
        Some((ports, "udp")) => (ports, conduit::Protocol::Udp),
        Some((_, other)) => return Err(format!("protocol \"{other}\" is neither tcp nor udp")),
    };
    let parsed = ports.split_once(':').and_then(|(public, machine)| {
        Some(conduit::PortMapping {
            protocol,
            public: public.parse().ok()?,
            machine: machine.parse().ok()?,
        })
    });
    parsed.ok_or_else(|| format!("\"{text}\" is not PUBLIC:MACHINE[/udp], as in 6379:6379"))
}

fn parse_allow(text: &str) -> Result<conduit::policy::Allow, String> {
    use conduit::policy::{Allow, PublicPort};
    let (port, network) = match text.split_once('=') {
        Some((port, network)) => (Some(port), network),
        None => (None, text),
    };
    let to = port.map(|port| {
        let mapping =
            parse_port(&port.replacen('/', ":1/", 1)).or_else(|_| parse_port(&format!("{port}:1")));
        mapping
            .map(|p| PublicPort { protocol: p.protocol, port: p.public })
            .map_err(|_| format!("\"{port}\" is not PORT or PORT/udp"))
    });
    let from = network.parse().map_err(|e: conduit::policy::BadPrefix| e.to_string())?;
    Ok(Allow { to: to.transpose()?, from: vec![from] })
}

pub(super) fn config(
    name: &str,
    on: &HostArgs,
    packages: Vec<PathBuf>,
    state: &StateArgs,
) -> anyhow::Result<RunnerConfig> {
    check_name(name).map_err(anyhow::Error::msg)?;
    let host = match &on.host {
        Some(host) => host.clone(),
        None => nix::unistd::gethostname()
            .context("reading the host name")?
            .to_string_lossy()
            .into_owned(),
    };
    let security = if on.plaintext {
        SecurityConfig::Plaintext
    } else {
        SecurityConfig::Mutual(on.certs.clone().unwrap_or_else(|| state.state.join("certs")))
    };
    for from in &on.accept_from {
        identity::HostName::new(from).context("--accept-from")?;
    }
    let lease = on.lease.clone().unwrap_or_else(|| state.state.join("leases"));
    let protect = on.protect.config(name, &lease)?;
    Ok(RunnerConfig {
        machine: name.to_owned(),
        host,
        state: state.state.clone(),
        listen: on.listen,
        security,
        accept_from: on.accept_from.clone(),
        lease,
        network: match on.network {
            Network::None => NetworkConfig::None,
            Network::Local => NetworkConfig::Local,
            Network::Agent => NetworkConfig::Agent(on.agent.clone()),
        },
        accelerator: on.accelerator,
        keep_stay_bytes: on.keep_stay_mib << 20,
        track: !on.no_tracking,
        packages,
        protect,
        wait_ms: None,
        bring_from: None,
    })
}

impl ProtectFlags {
    fn config(&self, machine: &str, lease: &Path) -> anyhow::Result<Option<ProtectConfig>> {
        let Some(store) = self.protect.clone() else { return Ok(None) };
        store.parse::<silo::store::StoreUrl>()?;
        let line = self.protect_line.clone().unwrap_or_else(|| format!("machines/{machine}"));
        silo::store::LineName::parse(&line)?;
        let keys = self.protect_keys.as_ref().map(std::path::absolute).transpose()?;
        Ok(Some(ProtectConfig {
            store,
            line,
            keys,
            every_ms: self.how.every().as_millis() as u64,
            term_ms: self.how.term().as_millis() as u64,
            output_commit: self.how.output_commit,
            host_beat: self.how.host_beat.unwrap_or_else(|| bills_requests(lease)),
            keep: Some(self.how.keep()),
        }))
    }
}

/// The addresses that the edge gives a machine; the same ones whenever it is asked for that name.
fn given_address(
    machine: &str,
    on: &HostArgs,
    network: conduit::NetworkId,
) -> anyhow::Result<(Ipv4Addr, Option<std::net::Ipv6Addr>)> {
    if !matches!(on.network, Network::Agent) {
        bail!("--address auto needs an edge: use --network agent, or give an address");
    }
    let agent = conduit::AgentDataPath::connect(&on.agent)
        .with_context(|| format!("ask the network agent at {}", on.agent.display()))?;
    Ok(agent.address(machine, network)?)
}

pub(super) fn run(args: RunArgs, state: &StateArgs) -> anyhow::Result<()> {
    let config = config(&args.name, &args.on, vec![args.package.clone()], state)?;
    let network = args.network_id.map_or_else(Default::default, conduit::NetworkId);
    let (address, given_v6) = match args.address {
        None => (None, None),
        Some(Address::Own(address)) => (Some(address), None),
        Some(Address::Auto) => {
            let (address, v6) = given_address(&args.name, &args.on, network)?;
            (Some(address), v6)
        }
    };
    // There the edge answers for machines' names, by the gateway of each.
    let asks_gateway = address.is_some() && matches!(args.on.network, Network::Agent);
    let boot = Boot {
        package: args.package,
        name_servers: asks_gateway.then_some(conduit::tap::GATEWAY).into_iter().collect(),
        memory_bytes: args.memory_mib.map(|mib| mib << 20),
        vcpus: args.vcpus,
        address,
        address_v6: args.address_v6.or(given_v6),
        network,
        policy: conduit::policy::Policy {
            public: args.public,
            allow: args.allow,
            limits: conduit::policy::Limits {
                bytes_in: args.bytes_in,
                bytes_out: args.bytes_out,
                flows_in: args.connections_in,
            },
        },
        mtu: args.mtu,
        ports: args.publish,
        keep_disks: args.keep_disks,
        disk_kind: args.disk_kind,
    };
    let launch = if args.take_over { Launch::TakeOver(boot) } else { Launch::Boot(boot) };
    start(config, launch, args.on.detach)
}

pub(super) fn stand_in(args: StandInArgs, state: &StateArgs) -> anyhow::Result<()> {
    if args.on.protect.protect.is_none() {
        bail!("a stand-in needs to know where the machine's generations are: --protect URL");
    }
    let config = config(&args.name, &args.on, args.package, state)?;
    start(config, Launch::StandIn, args.on.detach)
}

pub(super) fn resume(args: ResumeArgs, state: &StateArgs) -> anyhow::Result<()> {
    let config = config(&args.name, &args.on, args.package, state)?;
    let Some(from) = args.from else {
        let history = args.history.of(&args.name);
        let from = RestoreFrom {
            line: history.line(&args.name),
            store: history.store()?,
            suspended: args.generation.is_none(),
            generation: args.generation,
            keys: history.keys,
            take_from: args.take_from,
            lazy: true,
            slept_at: None,
            copy: None,
        };
        return start(config, Launch::Restore(from), args.on.detach);
    };
    start(config, Launch::Resume(from), args.on.detach)
}

pub(super) fn restore(args: RestoreArgs, state: &StateArgs) -> anyhow::Result<()> {
    let config = config(&args.name, &args.on, args.package, state)?;
    if let Some(of) = &args.copy_of {
        check_name(of).map_err(anyhow::Error::msg)?;
        if *of == args.name {
            bail!("a copy of \"{of}\" needs a name of its own");
        }
    }
    let from = RestoreFrom {
        line: args.history.line(args.copy_of.as_ref().unwrap_or(&args.name)),
        store: args.history.store()?,
        generation: args.generation,
        keys: args.history.keys,
        take_from: args.take_from,
        lazy: args.lazy,
        suspended: false,
        slept_at: None,
        copy: args.copy_of.map(|of| CopyWanted {
            of,
            address: args.address,
            address_v6: args.address_v6,
        }),
    };
    start(config, Launch::Restore(from), args.on.detach)
}

/// How long a runner in the background may take until its machine is more than being started.
fn patience(launch: &Launch) -> Duration {
    match launch {
        // As long as the store takes for everything; it ends by itself if the store does not answer.
        Launch::Restore(_) => Duration::from_secs(24 * 3600),
        _ => Duration::from_secs(120),
    }
}

/// Becomes the runner, or starts one in the background and waits until it answers.
pub(super) fn start(config: RunnerConfig, launch: Launch, detach: bool) -> anyhow::Result<()> {
    if !detach {
        return runner::serve(config, launch).map_err(Into::into);
    }
    let dir = MachineDir::create(&config.state, &config.machine)?;
    let log_path = dir.root().join("runner.log");
    let log = std::fs::File::options().create(true).append(true).open(&log_path)?;
    let arguments = std::env::args_os().skip(1).filter(|a| a != "--detach");
    let mut child = {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // A process group of its own: Ctrl-C at the terminal is not for the machine.
        command.process_group(0).spawn().context("starting the runner")?
    };
    let patience = patience(&launch);
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait()? {
            let log = std::fs::read_to_string(&log_path).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(5).collect();
            bail!(
                "the runner ended ({status}):\n  {}",
                tail.into_iter().rev().collect::<Vec<_>>().join("\n  ")
            );
        }
        if let Ok(mut client) = Client::connect(&dir.socket())
            && client.set_deadline(Some(Duration::from_secs(5))).is_ok()
            && let Ok(status) = client.get::<runner::api::Status>(&Request::Status)
            && status.runner_pid == child.id()
            && status.state != "booting"
        {
            say(&format!(
                "machine \"{}\" is {} (runner {})",
                config.machine,
                status.state,
                child.id()
            ));
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!(
                "the machine is not there within {patience:?}; its log is {}",
                log_path.display()
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_with_and_without_protocol() {
        let port = parse_port("6379:6380").unwrap();
        assert_eq!(
            (port.public, port.machine, port.protocol),
            (6379, 6380, conduit::Protocol::Tcp)
        );
        let allow = |text: &str| parse_allow(text).map(|a| (a.to.map(|p| p.port), a.from.len()));
        assert_eq!(allow("198.51.100.0/24"), Ok((None, 1)));
        assert_eq!(allow("53/udp=2001:db8::/32"), Ok((Some(53), 1)));
        assert_eq!(allow("80=198.51.100.7"), Ok((Some(80), 1)));
        assert!(allow("80=all").is_err() && allow("x=1.2.3.4").is_err());
        assert_eq!(parse_port("53:53/udp").unwrap().protocol, conduit::Protocol::Udp);
        for bad in ["6379", "a:b", "1:2/sctp", "70000:1", ""] {
            assert!(parse_port(bad).is_err(), "{bad}");
        }
    }
}
