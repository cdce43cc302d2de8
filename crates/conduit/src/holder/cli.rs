//! `conduit hold` and `conduit held`.

use super::{Bound, Limits, keeper::stats, process::Holder, take_over};
use anyhow::{Context, Result};
use std::{
    ffi::OsString,
    io::Write,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

const MIB: u64 = 1 << 20;

/// Settings of `conduit hold`, which an agent or edge starts by itself.
#[derive(Debug, clap::Args)]
pub struct HoldArgs {
    /// Where agent or edge find it.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Where the data path is pinned.
    #[arg(long, value_name = "DIR", default_value = conduit_bpf::ROOT)]
    pub pins: PathBuf,
    /// Take tap and frames over from the holder at the socket, which then ends.
    #[arg(long)]
    pub take_over: bool,
    /// Standard input is the hold tap, kept open by an agent or edge.
    #[arg(long, conflicts_with = "take_over")]
    pub tap_on_stdin: bool,
    /// Bounds.
    #[command(flatten)]
    pub limits: LimitArgs,
}

/// What a holder keeps at most.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct LimitArgs {
    /// Memory for the frames of one machine.
    #[arg(long, value_name = "MIB", default_value_t = Limits::default().machine.bytes / MIB)]
    pub hold_machine_mib: u64,
    /// Frames of one machine.
    #[arg(long, value_name = "COUNT", default_value_t = Limits::default().machine.frames)]
    pub hold_machine_frames: u64,
    /// Memory for the frames of one network (tenant).
    #[arg(long, value_name = "MIB", default_value_t = Limits::default().network.bytes / MIB)]
    pub hold_network_mib: u64,
    /// Frames of one network.
    #[arg(long, value_name = "COUNT", default_value_t = Limits::default().network.frames)]
    pub hold_network_frames: u64,
    /// Memory for all frames.
    #[arg(long, value_name = "MIB", default_value_t = Limits::default().total.bytes / MIB)]
    pub hold_mib: u64,
    /// All frames.
    #[arg(long, value_name = "COUNT", default_value_t = Limits::default().total.frames)]
    pub hold_frames: u64,
    /// How long a frame may wait.
    #[arg(long, value_name = "SECONDS", default_value_t = Limits::default().age.as_secs())]
    pub hold_seconds: u64,
    /// Datagrams a second that are given back to one machine; four times as many as come, if that is
    /// more.
    #[arg(long, value_name = "RATE", default_value_t = Limits::default().pace,
        value_parser = clap::value_parser!(u32).range(1..))]
    pub hold_pace: u32,
}

impl From<LimitArgs> for Limits {
    fn from(args: LimitArgs) -> Self {
        let bound = |frames, mib: u64| Bound { frames, bytes: mib.saturating_mul(MIB) };
        Self {
            machine: bound(args.hold_machine_frames, args.hold_machine_mib),
            network: bound(args.hold_network_frames, args.hold_network_mib),
            total: bound(args.hold_frames, args.hold_mib),
            age: Duration::from_secs(args.hold_seconds),
            pace: args.hold_pace,
        }
    }
}

/// The arguments that say these limits.
pub(super) fn limit_args(limits: &Limits) -> Vec<OsString> {
    let Limits { machine, network, total, age, pace } = limits;
    let pairs = [
        ("--hold-machine-mib", machine.bytes / MIB),
        ("--hold-machine-frames", machine.frames),
        ("--hold-network-mib", network.bytes / MIB),
        ("--hold-network-frames", network.frames),
        ("--hold-mib", total.bytes / MIB),
        ("--hold-frames", total.frames),
        ("--hold-seconds", age.as_secs()),
        ("--hold-pace", u64::from(*pace)),
    ];
    pairs.iter().flat_map(|(name, value)| [(*name).into(), value.to_string().into()]).collect()
}

/// Settings of `conduit held`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// The holder's socket.
    #[arg(long, value_name = "PATH", default_value_os_t = Path::new(crate::cli::RUN_DIR).join("agent/hold.sock"))]
    pub socket: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Runs a holder to its end.
pub fn run(args: HoldArgs) -> Result<()> {
    let limits = args.limits.into();
    let holder = if args.take_over {
        let (luggage, old) = take_over::take(&args.socket)?;
        let holder = Holder::with(args.pins, args.socket, limits, luggage)?;
        take_over::taken(&old).context("the old holder ended too early")?;
        holder
    } else {
        let tap = args
            .tap_on_stdin
            .then(|| std::io::stdin().as_fd().try_clone_to_owned())
            .transpose()
            .context("use the tap on standard input")?;
        Holder::start(args.pins, args.socket, limits, tap)?
    };
    tracing::info!("holder ready");
    holder.run().context("the holder failed")
}

/// Shows what a holder did.
pub fn show(args: &ShowArgs) -> Result<()> {
    let (stats, limits) = stats(&args.socket)
        .with_context(|| format!("no holder answers at {}", args.socket.display()))?;
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &stats)?;
        writeln!(out)?;
        return Ok(());
    }
    for (name, value) in stats.named() {
        writeln!(out, "{value:>12} {name}")?;
    }
    let Limits { machine, total, age, pace, .. } = limits;
    writeln!(
        out,
        "at most {} MiB a machine, {} MiB over all, {} s; {pace} datagrams a second back",
        machine.bytes / MIB,
        total.bytes / MIB,
        age.as_secs()
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        limits: LimitArgs,
    }

    #[test]
    fn limits_are_the_same_after_the_way_through_a_command_line() {
        let bound = |n: u64| Bound { frames: n, bytes: n * MIB };
        let limits = Limits {
            machine: bound(1),
            network: bound(2),
            total: bound(3),
            age: Duration::from_secs(4),
            pace: 5,
        };
        let args = std::iter::once(OsString::from("hold")).chain(limit_args(&limits));
        assert_eq!(Limits::from(Line::parse_from(args).limits), limits);
        assert_eq!(Limits::from(Line::parse_from(["hold"]).limits), Limits::default());
    }
}
