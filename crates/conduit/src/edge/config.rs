//! How an edge is started, and what of it can be refused before anything is done.

use super::{
    authority::Authority,
    fronts::{BesideConfig, Fronts},
    names::Zone,
    pool::{Pool, Range},
};
use crate::{
    exec::KernelError, holder::HoldSettings, homes::HomeWord, plane::PathChoice, policy::Prefix,
    secure::SecureConfig, wire::Peer,
};
use identity::Security;
use lease::Cells;
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// How an edge is started.
#[derive(Clone, Debug)]
pub struct EdgeConfig {
    /// The address that clients use; one of this host's own.
    pub public: Ipv4Addr,
    /// Where the edge is in the overlay, and the underlay address that hosts reach it by.
    pub this: Peer,
    /// Where agents connect.
    pub listen: SocketAddr,
    /// Machines have addresses in this network.
    pub machines: (Ipv4Addr, u8),
    /// What not every edge has.
    pub options: EdgeOptions,
    /// How connections of agents are protected.
    pub security: Security,
    /// The unix socket for status.
    pub socket: PathBuf,
    /// The state folder.
    pub state: PathBuf,
    /// How frames find their way.
    pub path: PathChoice,
    /// Where what BPF needs is pinned, on a BPF file system.
    pub pins: PathBuf,
    /// How frames are held while no host has their machine (needs BPF); `None`: they are not.
    pub hold: Option<HoldSettings>,
    /// How packets to hosts are protected.
    pub secure: SecureConfig,
}

/// What not every edge has.
#[derive(Clone, Debug)]
pub struct EdgeOptions {
    /// Machines have IPv6 addresses in this network.
    pub machines_v6: Option<Prefix>,
    /// The IPv6 address that clients use, one of this host's own. Without it machines' addresses are seen
    /// as they are: the network outside leads their prefix to this edge.
    pub public_v6: Option<Ipv6Addr>,
    /// Addresses of this host that a machine may have whole.
    pub spare: Vec<IpAddr>,
    /// Tracked connections that the machines of one network may have.
    pub flows_per_network: u32,
    /// The store of leases, by its folder or address: where it is given, only a machine's lease says who leads its frames.
    pub lease: Option<PathBuf>,
    /// Addresses for machines that come without; all that machines can have, if none are given.
    pub pools: Vec<Range>,
    /// How long an address rests before another machine may have it.
    pub quarantine: Duration,
    /// Machines' names end with this.
    pub domain: String,
    /// Whom to ask for other names; they are refused if nobody is given.
    pub name_servers: Vec<SocketAddr>,
    /// Other edges of the fleet; needs leases, and BPF.
    pub beside: Option<BesideConfig>,
}

impl Default for EdgeOptions {
    fn default() -> Self {
        Self {
            machines_v6: None,
            public_v6: None,
            spare: Vec::new(),
            flows_per_network: 16_384,
            lease: None,
            pools: Vec::new(),
            quarantine: Duration::from_secs(600),
            domain: "machine.internal".into(),
            name_servers: Vec::new(),
            beside: None,
        }
    }
}

/// How long a lease's lock or store may be waited for.
const LEASE_LIMIT: Duration = Duration::from_millis(500);

pub(super) fn open_pool(config: &EdgeConfig) -> Result<Pool, KernelError> {
    let (network, bits) = config.machines;
    let all = Prefix::new(network.into(), bits);
    let mut ranges = config.options.pools.clone();
    for range in &ranges {
        let inside = |end| all.is_some_and(|all| all.contains(IpAddr::V4(end)));
        if !range.ends().into_iter().all(inside) {
            let detail = format!("it is not in this edge's {network}/{bits} (--machines)");
            return Err(KernelError::new(format!("give addresses of {range}"), detail));
        }
    }
    if ranges.is_empty() {
        ranges.extend(all.and_then(|all| Range::new(None, all)));
    }
    Ok(Pool::new(ranges, config.options.machines_v6, config.options.quarantine))
}

pub(super) fn open_zone(config: &EdgeConfig) -> Result<Zone, KernelError> {
    let EdgeOptions { domain, name_servers, .. } = &config.options;
    Zone::new(domain, !name_servers.is_empty())
        .map_err(|e| KernelError::new(format!("answer names in \"{domain}\""), e))
}

/// The store of leases, by what `--lease` says: a folder, or any other address of one.
pub(super) fn open_leases(place: &Path) -> Result<Arc<dyn Cells>, KernelError> {
    let what = || format!("use leases in {}", place.display());
    let address = place.to_str().ok_or_else(|| KernelError::new(what(), "it is no text"))?;
    lease::open_cells(address, LEASE_LIMIT).map_err(|e| KernelError::new("use leases", e))
}

pub(super) fn open_authority(config: &EdgeConfig) -> Result<Authority, KernelError> {
    if let Some(place) = &config.options.lease {
        return Ok(Authority::Lease(Box::new(open_leases(place)?)));
    }
    tracing::warn!("no leases to read (--lease): any host of the fleet may take any machine");
    Ok(Authority::Fleet)
}

/// What there is to know of other edges, if there are any.
pub(super) fn open_fronts(config: &EdgeConfig, bpf: bool) -> Result<Option<Fronts>, KernelError> {
    let Some(beside) = &config.options.beside else { return Ok(None) };
    let fail = |detail: &str| Err(KernelError::new("be one of several edges", detail));
    let Some(leases) = &config.options.lease else {
        return fail("a lease says which edge serves what; give the folder of leases (--lease)");
    };
    if !bpf {
        return fail("routes know one edge only; use BPF (--path bpf)");
    }
    if config.options.machines_v6.is_some() && config.options.public_v6.is_none() {
        return fail("a network leads machines' own addresses to one edge; give --public-v6");
    }
    let own = HomeWord {
        home: config.this.overlay,
        name: beside.name.to_string(),
        public: config.public,
        public_v6: config.options.public_v6,
        spare: config.options.spare.clone(),
        by: config.this,
        epoch: 0,
    };
    Fronts::open(beside, leases, &config.state, config.this, own).map(Some)
}
