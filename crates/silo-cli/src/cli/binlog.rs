//! `silo binlog`: what was written to a device, recorded and played again.

use super::{
    device::{DeviceArgs, FrontArgs, TlsArgs},
    human, print, serve,
    stop::Stop,
};
use crate::{
    config::{BinlogConfig, ByteSize, Config},
    service::Service,
    stack::{DeviceStack, Host},
};
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use silo::{
    filter::binlog::{self, BinlogError, Kind, Pace, Reader, ReplayReport},
    io::BlockDevice,
    source::{FileDevice, FileMode},
};
use std::{
    fs::{File, OpenOptions},
    io::{BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

#[derive(Subcommand)]
pub(super) enum BinlogCommand {
    /// Serve a device and record what its clients write, until SIGTERM or SIGINT
    Record(Box<RecordArgs>),
    /// Do to a device what a log says
    Replay(Box<ReplayArgs>),
    /// Make a log that writes what an image holds
    Create(CreateArgs),
    /// Tell what a log holds
    Show(ShowArgs),
}

#[derive(Args)]
pub(super) struct RecordArgs {
    /// The log; it must not exist yet
    log: PathBuf,
    /// Record where and when was read, too
    #[arg(long)]
    reads: bool,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    fronts: FrontArgs,
    #[command(flatten)]
    tls: TlsArgs,
}

#[derive(Args)]
pub(super) struct ReplayArgs {
    /// The log
    log: PathBuf,
    /// 1: with the pauses that were recorded; 10: ten times as fast; 0: without pauses
    #[arg(long, default_value = "1")]
    speed: f64,
    /// Which device of --config
    #[arg(long, requires = "config")]
    device_name: Option<String>,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Args)]
pub(super) struct CreateArgs {
    /// The image
    image: PathBuf,
    /// The log; it must not exist yet
    log: PathBuf,
    /// Bytes of a block; blocks of zeros are left out
    #[arg(long, default_value = "64K")]
    block_size: ByteSize,
}

#[derive(Args)]
pub(super) struct ShowArgs {
    /// The log
    log: PathBuf,
    /// List the operations
    #[arg(long)]
    operations: bool,
}

pub(super) fn run(command: &BinlogCommand, json: bool) -> Result<()> {
    match command {
        BinlogCommand::Record(args) => record(args, json),
        BinlogCommand::Replay(args) => replay(args, json),
        BinlogCommand::Create(args) => create(args, json),
        BinlogCommand::Show(args) => show(args, json),
    }
}

fn record(args: &RecordArgs, json: bool) -> Result<()> {
    let stop = Stop::on_signals()?;
    let mut config = args.device.config()?;
    let [device] = &mut config.device.values_mut().collect::<Vec<_>>()[..] else {
        bail!("the config has several devices; write `binlog` into it and use `silo serve`");
    };
    device.binlog = Some(BinlogConfig { path: args.log.clone(), reads: args.reads });
    if args.device.config.is_none() {
        ensure!(!args.fronts.is_empty(), "nobody could write to it; add --socket or the like");
        device.expose = args.fronts.expose(args.tls.plaintext);
        config.identity = args.tls.identity();
    }
    config.check()?;
    let service = Service::start(&config)?;
    serve::announce(&service, None, json)?;
    let ran = service.run(&stop);
    ran.and(service.stop())
}

fn open(log: &Path) -> Result<Reader<BufReader<File>>> {
    let file = File::open(log).with_context(|| format!("could not open {}", log.display()))?;
    Reader::new(BufReader::with_capacity(1 << 20, file))
        .with_context(|| format!("{}", log.display()))
}

fn replay(args: &ReplayArgs, json: bool) -> Result<()> {
    let pace = match args.speed {
        0.0 => Pace::AsFastAsPossible,
        speed if speed > 0.0 && speed.is_finite() => Pace::Times(speed),
        speed => bail!("{speed} is not a speed; write 1, 10 or 0 for no pauses"),
    };
    let reader = open(&args.log)?;
    let config = args.device.config()?;
    config.check()?;
    crate::note::check_use(&config)?;
    let (name, device) = one_device(&config, args.device_name.as_deref())?;
    let stack = DeviceStack::open(name, device, &Host::new(&config)?)?;
    let device = stack.device();
    let began = Instant::now();
    let played =
        binlog::replay(reader, &*device, pace, &mut Instant::now, &mut |left| thread::sleep(left));
    // What was played is kept also when the log ends too early.
    stack.close()?;
    let report = played.with_context(|| format!("{}", args.log.display()))?;
    say_replayed(&report, began.elapsed(), json)
}

fn say_replayed(report: &ReplayReport, took: Duration, json: bool) -> Result<()> {
    let value = serde_json::json!({
        "operations": report.operations,
        "written_bytes": report.written,
        "read_bytes": report.read,
        "recorded_seconds": report.recorded.as_secs_f64(),
        "seconds": took.as_secs_f64(),
        "latest_seconds": report.late.as_secs_f64(),
    });
    let text = format!(
        "replayed {} operations in {:.1} s (recorded in {:.1} s): {} written, {} read; at most {:.1} \
         ms behind",
        report.operations,
        took.as_secs_f64(),
        report.recorded.as_secs_f64(),
        human(report.written),
        human(report.read),
        report.late.as_secs_f64() * 1e3,
    );
    print(json, &value, &text)
}

/// The device of that name, or the only one.
pub(super) fn one_device<'a>(
    config: &'a Config,
    name: Option<&str>,
) -> Result<(&'a str, &'a crate::config::DeviceConfig)> {
    let names = || config.device.keys().cloned().collect::<Vec<_>>().join(", ");
    match name {
        Some(name) => config
            .device
            .get_key_value(name)
            .map(|(name, device)| (name.as_str(), device))
            .with_context(|| format!("there is no device \"{name}\"; there are {}", names())),
        None => {
            let mut all = config.device.iter();
            let first = all.next().context("the config has no device")?;
            ensure!(all.next().is_none(), "say which of these devices: {}", names());
            Ok((first.0.as_str(), first.1))
        }
    }
}

fn create(args: &CreateArgs, json: bool) -> Result<()> {
    let block = u32::try_from(args.block_size.0)
        .ok()
        .filter(|block| block.is_power_of_two() && *block >= 512)
        .context("a block size is a power of two from 512")?;
    let image = FileDevice::open(&args.image, FileMode::ReadOnly)?;
    let file =
        OpenOptions::new().write(true).create_new(true).open(&args.log).with_context(|| {
            format!("could not make {}; it must not exist yet", args.log.display())
        })?;
    let mut sink = BufWriter::with_capacity(1 << 20, file);
    let blocks = binlog::create(&image, block, &mut sink)?;
    sink.flush().with_context(|| format!("could not write {}", args.log.display()))?;
    let value = serde_json::json!({
        "log": args.log,
        "device_bytes": image.size(),
        "blocks": blocks,
        "block_size": block,
    });
    let text = format!(
        "{}: {blocks} blocks of {} that are not zero, of a device of {}",
        args.log.display(),
        human(u64::from(block)),
        human(image.size())
    );
    print(json, &value, &text)
}

/// What a log holds.
#[derive(Default, serde::Serialize)]
struct Summary {
    device_bytes: u64,
    operations: u64,
    writes: u64,
    written_bytes: u64,
    reads: u64,
    read_bytes: u64,
    flushes: u64,
    trims: u64,
    zeros: u64,
    seconds: f64,
    /// Why it ends where it does, if not orderly.
    damage: Option<String>,
}

fn show(args: &ShowArgs, json: bool) -> Result<()> {
    let mut reader = open(&args.log)?;
    let mut summary = Summary { device_bytes: reader.device_bytes(), ..Summary::default() };
    loop {
        let entry = match reader.read() {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            Err(error @ (BinlogError::Truncated { .. } | BinlogError::Damaged { .. })) => {
                summary.damage = Some(error.to_string());
                break;
            }
            Err(error) => return Err(error).with_context(|| format!("{}", args.log.display())),
        };
        summary.operations += 1;
        summary.seconds = entry.at.as_secs_f64();
        match entry.kind {
            Kind::Write => {
                summary.writes += 1;
                summary.written_bytes += entry.length;
            }
            Kind::Read => {
                summary.reads += 1;
                summary.read_bytes += entry.length;
            }
            Kind::Flush => summary.flushes += 1,
            Kind::Trim => summary.trims += 1,
            Kind::Zero | Kind::ZeroAllocate => summary.zeros += 1,
        }
        if args.operations {
            let (at, kind) = (entry.at.as_secs_f64(), format!("{:?}", entry.kind).to_lowercase());
            let value = serde_json::json!({
                "at": at, "kind": kind, "offset": entry.offset, "length": entry.length,
            });
            let text = format!("{at:>12.6} {kind:<12} {:>14} {:>10}", entry.offset, entry.length);
            print(json, &value, &text)?;
        }
    }
    let mut text = format!(
        "{} operations in {:.1} s on a device of {}: {} writes ({}), {} reads ({}), {} flushes, {} \
         trims, {} zeros",
        summary.operations,
        summary.seconds,
        human(summary.device_bytes),
        summary.writes,
        human(summary.written_bytes),
        summary.reads,
        human(summary.read_bytes),
        summary.flushes,
        summary.trims,
        summary.zeros,
    );
    if let Some(damage) = &summary.damage {
        text.push_str(&format!("\n{damage}"));
    }
    print(json, &summary, &text)
}
