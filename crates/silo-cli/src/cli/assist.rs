//! Flags for where blocks of a move may come from beside its source. A config says the same in
//! `[migrate]`.

use crate::config::{AssistConfig, MigrateConfig, PeerConfig, Secret, ShareConfig};
use anyhow::{Context, Result};
use clap::Args;
use std::{net::SocketAddr, path::PathBuf};

/// The environment variable with the keys themselves.
const KEYS: &str = "SILO_KEYS";

/// At both ends of a move.
#[derive(Args)]
#[command(next_help_heading = "A store and other hosts beside a move")]
pub(super) struct AssistArgs {
    /// `tenant/line` of the device's backups in a store that both hosts read: what it has need not
    /// go over the line
    #[arg(long, value_name = "LINE", conflicts_with = "config")]
    assist: Option<String>,
    /// The store, for --assist
    #[arg(long, value_name = "URL", env = "SILO_STORE")]
    assist_store: Option<String>,
    /// The file with the tenant's keys, for --assist; without it SILO_KEYS holds them
    #[arg(long, value_name = "FILE", env = "SILO_KEY_FILE")]
    assist_keys: Option<PathBuf>,
    /// A file with content that other hosts have too: blocks that are as there go by hash
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    known: Option<PathBuf>,
}

impl AssistArgs {
    /// What they say, in the config of a move of `device`.
    pub(super) fn apply(
        &self,
        device: &str,
        early_release: bool,
        migrate: &mut MigrateConfig,
    ) -> Result<()> {
        if let Some(line) = &self.assist {
            let url = self.assist_store.as_deref();
            let url = url.context("which store is beside the move? add --assist-store URL")?;
            let keys = match &self.assist_keys {
                Some(path) => Secret::File(path.clone()),
                None => Secret::Env(KEYS.to_owned()),
            };
            migrate.assist = Some(AssistConfig::by_flags(url, line, keys, early_release));
        }
        if let Some(known) = &self.known {
            migrate.known.insert(device.to_owned(), known.clone());
        }
        Ok(())
    }
}

/// At a source.
#[derive(Args)]
#[command(next_help_heading = "A store and other hosts beside a move")]
pub(super) struct GiveArgs {
    /// Answer hosts that ask by hash for content of the file --known here
    #[arg(long, value_name = "ADDRESS", requires = "known")]
    share: Option<SocketAddr>,
    /// Keep in this folder in which order blocks are first used, and ship that with the move
    #[arg(long, value_name = "DIR", requires = "move_listen")]
    first_touch: Option<PathBuf>,
}

impl GiveArgs {
    /// Whether something is to be shared although nothing moves.
    pub(super) fn shares(&self) -> bool {
        self.share.is_some()
    }

    /// What they say, in the config of a move.
    pub(super) fn apply(&self, migrate: &mut MigrateConfig) {
        migrate.share = self.share.map(|listen| ShareConfig { listen, hosts: Vec::new() });
        migrate.first_touch.clone_from(&self.first_touch);
    }
}

/// At a destination.
#[derive(Args)]
#[command(next_help_heading = "A store and other hosts beside a move")]
pub(super) struct TakeArgs {
    /// Let the source go as soon as the store has what is missing
    #[arg(long, requires = "assist")]
    early_release: bool,
    /// A host to ask by hash, as in host-c:5171, or host-c:5171=NAME with the name in its
    /// certificate; can be given several times
    #[arg(long, value_name = "ADDRESS[=NAME]", conflicts_with = "config")]
    by_hash: Vec<String>,
}

impl TakeArgs {
    /// Whether the source may go early.
    pub(super) fn early_release(&self) -> bool {
        self.early_release
    }

    /// What they say, in the config of a move.
    pub(super) fn apply(&self, migrate: &mut MigrateConfig) {
        let peer = |text: &String| {
            let (address, name) =
                text.split_once('=').map_or((text.as_str(), None), |(a, n)| (a, Some(n)));
            PeerConfig { address: address.to_owned(), name: name.map(str::to_owned) }
        };
        migrate.peers = self.by_hash.iter().map(peer).collect();
    }
}
