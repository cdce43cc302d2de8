//! What a runner is started with.

use super::{api::KeepPolicy, tenure::Pace};
use crate::driver::{
    DiskKind, HostFacts,
    qemu::{self, QemuConfig},
};
use identity::{HostName, Identity, Security};
use serde::{Deserialize, Serialize};
use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

/// One runner on one host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunnerConfig {
    /// The machine that it runs or waits for.
    pub machine: String,
    /// This host's name, as in its certificate and in the lease.
    pub host: String,
    /// The host's state directory.
    pub state: PathBuf,
    /// Where peers connect.
    pub listen: Option<SocketAddr>,
    /// How connections between hosts are protected.
    pub security: SecurityConfig,
    /// Hosts whose machines are taken; empty: those of every host that proves its name.
    #[serde(default)]
    pub accept_from: Vec<String>,
    /// Where leases are kept, for all hosts that may run the machine: a directory, or an address as
    /// [`lease::open`](crate::lease::open) takes it.
    pub lease: PathBuf,
    /// The machine's network on this host.
    pub network: NetworkConfig,
    /// What the guest's processor runs on.
    pub accelerator: AcceleratorChoice,
    /// Bytes of an earlier stay's memory that this host keeps at most; 0 keeps none.
    pub keep_stay_bytes: u64,
    /// Whether writes to memory are tracked where the kernel can; without, every move away is
    /// post-copy, as on a kernel before 6.7.
    pub track: bool,
    /// Packages, or directories of packages, that a machine may arrive with.
    pub packages: Vec<PathBuf>,
    /// Whether the machine is to survive the loss of this host, as soon as it runs here, and whatever way
    /// it came.
    #[serde(default)]
    pub protect: Option<ProtectConfig>,
    /// How long it waits for its first machine before it ends, milliseconds; for ever if absent.
    #[serde(default)]
    pub wait_ms: Option<u64>,
    /// Of a machine that arrives, what this host may bring from there need not be sent.
    #[serde(default)]
    pub bring_from: Option<StoreAt>,
}

/// A store, as this host reaches it. Credentials are in its environment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoreAt {
    /// Its address, as silo takes it.
    pub store: String,
    /// The file with the tenant's keys; without it the variable SILO_KEYS holds them.
    pub keys: Option<PathBuf>,
}

/// How a machine is protected. Keys and credentials are this host's own: they never travel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProtectConfig {
    /// The store's address, as silo takes it.
    pub store: String,
    /// The history in it, `tenant/line`.
    pub line: String,
    /// The file with the tenant's keys; without it the variable SILO_KEYS holds them.
    pub keys: Option<PathBuf>,
    /// A generation this often, milliseconds.
    pub every_ms: u64,
    /// T: how long a lease that is not renewed holds, milliseconds.
    pub term_ms: u64,
    /// What the guest sends waits until the generation that it is of is durable.
    pub output_commit: bool,
    /// Its lease refers to the one sign of life that all machines of the host share.
    #[serde(default)]
    pub host_beat: bool,
    /// What stays of the history; all of it if absent.
    pub keep: Option<KeepPolicy>,
}

impl ProtectConfig {
    /// How long its lease holds, and how often that is renewed.
    pub(super) fn pace(&self) -> Pace {
        let (term, every) = (self.term_ms, self.every_ms);
        Pace::of(Duration::from_millis(term), Duration::from_millis(every), self.host_beat)
    }
}

/// Whether the lease store bills requests: then one sign of life serves all machines of a host, unless
/// something else is said.
pub(crate) fn bills_requests(leases: &Path) -> bool {
    leases.to_str().is_some_and(lease::bills_requests)
}

impl RunnerConfig {
    /// The driver's settings.
    pub(super) fn qemu(&self) -> QemuConfig {
        let accelerator = match self.accelerator {
            AcceleratorChoice::Auto => qemu::AcceleratorChoice::Auto,
            AcceleratorChoice::Tcg => qemu::AcceleratorChoice::Tcg,
            AcceleratorChoice::Kvm => qemu::AcceleratorChoice::Kvm,
        };
        QemuConfig { accelerator, ..QemuConfig::new(self.state.join("qemu")) }
    }

    /// Whether a machine is taken from `host`.
    ///
    /// # Errors
    /// A sentence for people at that host.
    pub fn accepts(&self, host: &HostName) -> Result<(), String> {
        if self.accept_from.is_empty() || self.accept_from.iter().any(|one| one == host.as_str()) {
            return Ok(());
        }
        Err(format!(
            "host \"{}\" takes this machine from {} only, not from \"{host}\" (--accept-from)",
            self.host,
            self.accept_from.join(", ")
        ))
    }
}

/// See [`RunnerConfig::security`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecurityConfig {
    /// Mutual TLS with the certificate of this host from a directory.
    Mutual(PathBuf),
    /// Nothing is protected.
    Plaintext,
}

impl SecurityConfig {
    /// Loads the certificate, if there is one to load.
    pub fn load(&self, host: &HostName) -> identity::Result<Security> {
        Ok(match self {
            Self::Mutual(dir) => Security::Mutual(Identity::load(dir, host)?),
            Self::Plaintext => Security::Plaintext,
        })
    }
}

/// See [`RunnerConfig::network`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkConfig {
    /// The machine has no network.
    None,
    /// A tap and a route on this host, no edge.
    Local,
    /// Through the conduit agent at this socket.
    Agent(PathBuf),
}

impl NetworkConfig {
    /// The agent's socket.
    #[must_use]
    pub fn agent(&self) -> Option<&Path> {
        match self {
            Self::Agent(socket) => Some(socket),
            Self::None | Self::Local => None,
        }
    }
}

/// Which accelerator to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorChoice {
    /// KVM where a real probe succeeds, else TCG.
    #[default]
    Auto,
    /// Translation.
    Tcg,
    /// Hardware.
    Kvm,
}

/// How a runner begins.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Launch {
    /// Boots a package; its disks start from the package, or from the overlays that are here if
    /// `keep_disks`.
    Boot(Boot),
    /// Waits for the machine to arrive.
    Receive,
    /// Waits for the machine's host to fall silent, and runs it then.
    StandIn,
    /// Continues from a directory that `suspend` wrote.
    Resume(PathBuf),
    /// Continues from a generation in a store.
    Restore(RestoreFrom),
    /// Begins as a copy of a machine that runs on this host.
    Forked(Forked),
    /// Takes a running monitor over from a runner that is gone.
    TakeOver(Boot),
    /// The same, with a package among those that the runner was given.
    Recover,
}

/// Who a copy is, in place of the machine that it is a copy of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CopyOf {
    /// That machine's name.
    pub copy_of: String,
    /// The copy's address, if the machine has a network.
    pub address: Option<Ipv4Addr>,
    /// The same for IPv6.
    #[serde(default)]
    pub address_v6: Option<std::net::Ipv6Addr>,
}

/// Which address a machine is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Address {
    /// One that the edge gives it, and an IPv6 address where it has some.
    Auto,
    /// This one.
    Own(Ipv4Addr),
}

impl std::str::FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => text.parse().map(Self::Own).map_err(|_| "neither an IPv4 address nor auto"),
        }
    }
}

/// A machine on this host of which this one is a copy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Forked {
    /// Of which, and who the copy is.
    #[serde(flatten)]
    pub identity: CopyOf,
    /// Where its runner has put what it was.
    pub folder: PathBuf,
    /// Its memory, by a descriptor of its runner, which keeps it until the copies have it.
    pub memory: PathBuf,
    /// Its package.
    pub package: PathBuf,
    /// What this host offers; true when the image was taken.
    pub facts: HostFacts,
}

/// A copy that begins as a generation of another machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CopyWanted {
    /// Which machine.
    pub of: String,
    /// The copy's address, if the machine has a network.
    pub address: Option<Address>,
    /// Its IPv6 address.
    #[serde(default)]
    pub address_v6: Option<std::net::Ipv6Addr>,
}

/// A generation of a machine, and the right to run it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RestoreFrom {
    /// The store's address, as silo takes it.
    pub store: String,
    /// The history in it, `tenant/line`.
    pub line: String,
    /// Which generation; the newest if absent.
    pub generation: Option<u64>,
    /// The file with the tenant's keys; without it the variable SILO_KEYS holds them.
    pub keys: Option<PathBuf>,
    /// The host that owned the machine, which will not run it again.
    pub take_from: Option<String>,
    /// Runs at once, and brings what is touched first and the rest after it.
    pub lazy: bool,
    /// It must be what the machine was suspended as, and the machine must not have run since.
    #[serde(default)]
    pub suspended: bool,
    /// And it must have been suspended at this host, which asks for it.
    #[serde(default)]
    pub slept_at: Option<String>,
    /// It is another machine's, which stays what and where it is: this one begins as a copy of it.
    #[serde(default)]
    pub copy: Option<CopyWanted>,
}

/// Facts of a new machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Boot {
    /// The package.
    pub package: PathBuf,
    /// Memory in bytes; the package's default if absent.
    pub memory_bytes: Option<u64>,
    /// Virtual processors; the package's default if absent.
    pub vcpus: Option<u32>,
    /// The machine's address.
    pub address: Option<Ipv4Addr>,
    /// Whom it asks for names.
    #[serde(default)]
    pub name_servers: Vec<Ipv4Addr>,
    /// Its IPv6 address.
    #[serde(default)]
    pub address_v6: Option<std::net::Ipv6Addr>,
    /// The tenant's network that these addresses are of.
    #[serde(default)]
    pub network: conduit::NetworkId,
    /// What the edge lets through to it.
    #[serde(default)]
    pub policy: conduit::policy::Policy,
    /// MTU in the guest.
    pub mtu: u16,
    /// Ports at the edge: public port, machine port, protocol.
    pub ports: Vec<conduit::PortMapping>,
    /// Start from the overlays that are here (after a host crash), not from the package.
    pub keep_disks: bool,
    /// How the machine reaches its disks, for life.
    #[serde(default)]
    pub disk_kind: DiskKind,
}
