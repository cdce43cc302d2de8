//! `conduit rotate`, and the part of `conduit status` that is about preshared keys ([`crate::secure`]).

use crate::{cli::RUN_DIR, client, wire::PairStatus};
use clap::Args;
use std::{
    io::Write,
    path::{Path, PathBuf},
};

/// Settings of `conduit rotate`.
#[derive(Debug, Args)]
pub struct RotateArgs {
    /// The socket of the agent or edge.
    #[arg(long, value_name = "PATH", default_value_os_t = Path::new(RUN_DIR).join("agent.sock"))]
    socket: PathBuf,
}

/// Runs `conduit rotate`.
pub(crate) fn rotate(args: &RotateArgs) -> anyhow::Result<()> {
    Ok(client::rotate(&args.socket)?)
}

/// A line for each pair.
pub(crate) fn print(pairs: &[PairStatus], out: &mut dyn Write) -> std::io::Result<()> {
    for pair in pairs {
        let PairStatus { peer, generation, age, changing, handshake } = pair;
        let key = match age {
            Some(age) => format!("preshared key {generation}, in use for {age} s"),
            None => "no preshared key yet".to_owned(),
        };
        let changing = if *changing { ", being changed" } else { "" };
        let handshake =
            handshake.map_or("no handshake yet".to_owned(), |s| format!("handshake {s} s ago"));
        writeln!(out, "  tunnel to {peer}: {handshake}; {key}{changing}")?;
    }
    Ok(())
}
