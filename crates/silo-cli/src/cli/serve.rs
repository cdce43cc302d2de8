//! `silo serve`: one disk on one socket, until it is told to stop.

use super::{human, options, print};
use crate::config::ByteSize;
use anyhow::{Context, Result};
use clap::Args;
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};
use silo::{
    disk::{Disk, DiskError},
    nbd::{NbdOptions, NbdServer},
};
use std::{path::PathBuf, sync::Arc, time::Duration};

/// How long requests in hand may take after a signal.
const STOP_LIMIT: Duration = Duration::from_secs(10);

#[derive(Args)]
pub(super) struct ServeArgs {
    /// The read-only file below the disk, the one it was created over
    #[arg(long)]
    base: Option<PathBuf>,
    /// The disk's folder
    #[arg(long)]
    overlay: PathBuf,
    /// The unix socket to listen on
    #[arg(long)]
    socket: PathBuf,
    /// Create the disk if the folder holds none
    #[arg(long)]
    create: bool,
    /// Size of a disk that is created; without it that of the base
    #[arg(long, default_value = "0", requires = "create")]
    size: ByteSize,
    /// The export's name; clients that ask for "" get the disk too
    #[arg(long, default_value = "")]
    export: String,
}

pub(super) fn run(args: &ServeArgs, json: bool) -> Result<()> {
    // Before anything is served, so that a signal that comes early is not lost.
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("could not watch for signals")?;
    let base = args.base.as_deref();
    let disk = match Disk::open(&args.overlay, base, &options()) {
        Err(DiskError::NotADisk { .. }) if args.create => {
            Disk::create(&args.overlay, base, args.size.0, &options())?
        }
        other => other?,
    };
    let disk = Arc::new(disk);
    let nbd = NbdOptions { export: args.export.clone(), ..NbdOptions::default() };
    let server = NbdServer::start(&args.socket, disk.clone(), nbd)?;
    let value = serde_json::json!({ "socket": args.socket, "bytes": disk.size() });
    let text = format!("serving {} on {}", human(disk.size()), args.socket.display());
    print(json, &value, &text)?;
    let signal = signals.forever().next();
    tracing::info!(?signal, "stopping");
    let stopped = server.stop(STOP_LIMIT);
    disk.sync()?;
    Ok(stopped?)
}
