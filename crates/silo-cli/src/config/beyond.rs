//! The parts of a config that go beyond this host: who it is, stores, backup, moving, metrics.

use super::{ByteSize, Secret, Span};
use schemars::JsonSchema;
use serde::Deserialize;
use silo::store::{LineName, Retention};
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

/// Certificates of this host, as `silo tls` makes them.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct IdentityConfig {
    /// The folder with ca.crt, NAME.crt and NAME.key
    pub(crate) dir: PathBuf,
    /// This host's name
    pub(crate) name: String,
}

/// An object store.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct StoreConfig {
    /// `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, `file:///folder`
    pub(crate) url: String,
    /// The service's address, where it is not the provider's own; http:// is not encrypted
    /// (content that is backed up is, by itself)
    pub(crate) endpoint: Option<String>,
    /// The region, where the provider has them
    pub(crate) region: Option<String>,
    /// Where the access key is; else the provider's usual environment variables count
    pub(crate) access_key: Option<Secret>,
    /// Where the secret key is
    pub(crate) secret_key: Option<Secret>,
}

impl StoreConfig {
    /// With credentials from the usual variables.
    pub(crate) fn at(url: &str) -> Self {
        let (url, endpoint, region) = (url.to_owned(), None, None);
        Self { url, endpoint, region, access_key: None, secret_key: None }
    }
}

/// Continuous backup.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct BackupConfig {
    /// The group; may be left out where there is one
    pub(crate) group: Option<String>,
    /// Where to
    pub(crate) store: StoreConfig,
    /// The name of whoever owns these backups; blocks are shared inside a tenant only
    pub(crate) tenant: String,
    /// The name of the history in the store; that of the group if not given
    pub(crate) line: Option<String>,
    /// Where blocks wait that are written while they are backed up; /var/tmp if not given
    pub(crate) scratch: Option<PathBuf>,
    /// Where the tenant's keys are: the ring that `silo keys create` made
    pub(crate) keys: Secret,
    /// A write is in a generation at most this long after it was made
    #[serde(default = "BackupConfig::default_max_age")]
    pub(crate) max_age: Span,
    /// Most bytes a second to the store
    pub(crate) bandwidth: Option<ByteSize>,
    /// Which generations `silo prune` keeps
    #[serde(default)]
    pub(crate) retention: RetentionConfig,
}

impl BackupConfig {
    /// Of flags; the rest is as usual.
    pub(crate) fn by_flags(url: &str, line: &LineName, keys: Secret) -> Self {
        Self {
            group: None,
            store: StoreConfig::at(url),
            tenant: line.tenant().to_owned(),
            line: Some(line.line().to_owned()),
            scratch: None,
            keys,
            max_age: Self::default_max_age(),
            bandwidth: None,
            retention: RetentionConfig::default(),
        }
    }

    fn default_max_age() -> Span {
        Span(std::time::Duration::from_secs(60))
    }
}

/// Which generations are kept: the union of these.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct RetentionConfig {
    /// The newest ones
    pub(crate) last: Option<usize>,
    /// The newest of each of so many hours
    pub(crate) hourly: Option<usize>,
    /// The newest of each of so many days
    pub(crate) daily: Option<usize>,
    /// The newest of each of so many weeks
    pub(crate) weekly: Option<usize>,
    /// The newest of each of so many months of 30 days
    pub(crate) monthly: Option<usize>,
    /// All that are younger
    pub(crate) within: Option<Span>,
}

impl RetentionConfig {
    /// As the store takes it; none if no rule is given.
    pub(crate) fn rules(&self) -> Option<Retention> {
        let rules = Retention {
            last: self.last.unwrap_or(0),
            hourly: self.hourly.unwrap_or(0),
            daily: self.daily.unwrap_or(0),
            weekly: self.weekly.unwrap_or(0),
            monthly: self.monthly.unwrap_or(0),
            within: self.within.map_or(std::time::Duration::ZERO, |within| within.0),
        };
        (rules != Retention::default()).then_some(rules)
    }
}

/// Moving.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct MigrateConfig {
    /// The group; may be left out where there is one
    pub(crate) group: Option<String>,
    /// Where a source waits for its destination (`silo serve`)
    pub(crate) listen: Option<SocketAddr>,
    /// Where a destination finds its source (`silo connect`), as in host-a:5170
    pub(crate) peer: Option<String>,
    /// The other host's name in its certificate; no other is accepted
    pub(crate) peer_name: Option<String>,
    /// A file in which is noted who owns the devices, so that after a restart nobody uses what has
    /// left or has not come whole; may be left out where all of them are memory
    pub(crate) note: Option<PathBuf>,
    /// Move without TLS; only on a network that is trusted as a whole
    #[serde(default)]
    pub(crate) plaintext: bool,
    /// Connections for bulk data
    #[serde(default = "MigrateConfig::default_connections")]
    pub(crate) connections: usize,
    /// Most bytes on the way
    #[serde(default = "MigrateConfig::default_in_flight")]
    pub(crate) in_flight: ByteSize,
    /// Most bytes a second
    pub(crate) bandwidth: Option<ByteSize>,
    /// Hand over when the rest can be sent in this time
    #[serde(default = "MigrateConfig::default_blackout")]
    pub(crate) blackout: Span,
    /// Hand over after so long at the latest; 0s hands over at once, and all blocks follow
    #[serde(default = "MigrateConfig::default_pre_copy")]
    pub(crate) pre_copy: Span,
    /// A line of backups that both hosts read: what it has need not go over the line
    pub(crate) assist: Option<AssistConfig>,
    /// Hosts that a destination asks by hash for blocks that the source names so, in this order
    #[serde(default)]
    pub(crate) peers: Vec<PeerConfig>,
    /// Files of this host, by device, with content that other hosts have too: a source names blocks
    /// that are as there by hash, a destination looks there first
    #[serde(default)]
    pub(crate) known: BTreeMap<String, PathBuf>,
    /// Answer hosts that ask by hash for content of the files in `known`
    pub(crate) share: Option<ShareConfig>,
    /// A folder in which a source keeps the order in which blocks are first used, and from which it
    /// ships that: the destination gets them first
    pub(crate) first_touch: Option<PathBuf>,
}

/// A store beside a move.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct AssistConfig {
    /// The store; that of [backup] if not given
    pub(crate) store: Option<StoreConfig>,
    /// `tenant/line` of the devices' backups; that of [backup] if not given
    pub(crate) line: Option<String>,
    /// Where the tenant's keys are; those of [backup] if not given
    pub(crate) keys: Option<Secret>,
    /// At a destination: the source may go as soon as what is missing is in the store
    #[serde(default)]
    pub(crate) early_release: bool,
    /// After so long without an answer the next place is asked too
    #[serde(default = "AssistConfig::default_hedge")]
    pub(crate) hedge: Span,
}

impl AssistConfig {
    /// By flags: the line, and where its store and keys are.
    pub(crate) fn by_flags(url: &str, line: &str, keys: Secret, early_release: bool) -> Self {
        Self {
            store: Some(StoreConfig::at(url)),
            line: Some(line.to_owned()),
            keys: Some(keys),
            early_release,
            hedge: Self::default_hedge(),
        }
    }

    fn default_hedge() -> Span {
        Span(std::time::Duration::from_millis(250))
    }
}

/// Another host that has content.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct PeerConfig {
    /// Where it answers, as in host-c:5171
    pub(crate) address: String,
    /// Its name in its certificate
    pub(crate) name: Option<String>,
}

/// Answers by hash.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct ShareConfig {
    /// Where, as in 0.0.0.0:5171
    pub(crate) listen: SocketAddr,
    /// Names in certificates that may ask; all of the same authority if not given
    #[serde(default)]
    pub(crate) hosts: Vec<String>,
}

impl MigrateConfig {
    /// Of all devices, as usual.
    pub(crate) fn new(plaintext: bool, peer_name: Option<String>) -> Self {
        Self {
            group: None,
            listen: None,
            peer: None,
            peer_name,
            note: None,
            plaintext,
            connections: Self::default_connections(),
            in_flight: Self::default_in_flight(),
            bandwidth: None,
            blackout: Self::default_blackout(),
            pre_copy: Self::default_pre_copy(),
            assist: None,
            peers: Vec::new(),
            known: BTreeMap::new(),
            share: None,
            first_touch: None,
        }
    }

    fn default_connections() -> usize {
        4
    }

    fn default_in_flight() -> ByteSize {
        ByteSize(64 << 20)
    }

    fn default_pre_copy() -> Span {
        Span(std::time::Duration::from_secs(3600))
    }

    fn default_blackout() -> Span {
        Span(std::time::Duration::from_millis(50))
    }
}

/// Where metrics are served.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct MetricsConfig {
    /// The address, as in 127.0.0.1:9618; /metrics and /health are answered
    pub(crate) listen: SocketAddr,
}
