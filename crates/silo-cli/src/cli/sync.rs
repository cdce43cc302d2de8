//! `silo sync`: devices backed up to a store, continuously or once, and served meanwhile.

use super::{
    device::{DeviceArgs, FrontArgs, MetricsArgs, TlsArgs},
    human, print,
    progress::Progress,
    serve,
    stop::Stop,
    store::StoreArgs,
};
use crate::{
    backup::{Running, Target},
    config::{ByteSize, Config, Span},
    service::Service,
    stack::Role,
};
use anyhow::{Context, Result};
use clap::Args;
use silo::store::{
    Access, LineName, LineWriter, Stored, WriterOptions,
    capture::{Capture, DeviceInfo, Frozen, Want},
};
use silo_block::block::{BlockRange, BlockSet};
use std::{
    io,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

#[derive(Args)]
pub(super) struct SyncArgs {
    /// `tenant/line` to back up to; that of the config if not given
    #[arg(long)]
    line: Option<String>,
    /// Make one generation and end
    #[arg(long)]
    once: bool,
    /// What the generation is called, with --once
    #[arg(long, requires = "once", default_value = "")]
    label: String,
    /// What is written is in the store at most this much later
    #[arg(long, default_value = "60s", conflicts_with = "config")]
    max_age: Span,
    /// Most bytes a second to the store
    #[arg(long, value_name = "SIZE", conflicts_with = "config")]
    bandwidth: Option<ByteSize>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    fronts: FrontArgs,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
    /// The store; with --config that of its [backup]
    #[command(flatten)]
    store: OptionalStoreArgs,
}

/// As [`StoreArgs`], where a config may say it.
#[derive(Args)]
#[command(next_help_heading = "The store")]
struct OptionalStoreArgs {
    /// s3://bucket/folder?endpoint=…&region=…, gs://…, az://… or file:///folder
    #[arg(long, value_name = "URL", env = "SILO_STORE", conflicts_with = "config")]
    store: Option<String>,
    /// The file with the tenant's keys; without it the variable SILO_KEYS holds them
    #[arg(long, value_name = "FILE", env = "SILO_KEY_FILE", conflicts_with = "config")]
    keys: Option<PathBuf>,
}

pub(super) fn run(args: &SyncArgs, json: bool) -> Result<()> {
    let stop = Stop::on_signals()?;
    let config = args.config()?;
    let (target, max_age, rate) = args.target(&config)?;
    let mut service = Service::open(&config, &Role::Use)?;
    let capture = service.capture().context("no device is backed up")?;
    if args.once {
        let stored = once(&target, &*capture, rate, args, &stop, json)?;
        service.stop()?;
        return say(&target, &stored, json);
    }
    service.set_backup(Running::start(&target, capture, max_age, rate)?);
    service.serve(&config)?;
    serve::announce(&service, args.fronts.socket.as_deref(), json)?;
    let ran = service.run(&stop);
    ran.and(service.stop())
}

/// A frozen round, and how much of it was read.
struct Counted {
    inner: Box<dyn Frozen>,
    total: u64,
    done: AtomicU64,
}

impl Counted {
    fn of(inner: Box<dyn Frozen>, devices: &[DeviceInfo]) -> Self {
        let bytes = |(at, device): (usize, &DeviceInfo)| -> u64 {
            inner.changed(at).ranges().map(|range| device.geometry.bytes_of(range)).sum()
        };
        let total = devices.iter().enumerate().map(bytes).sum();
        Self { inner, total, done: AtomicU64::new(0) }
    }
}

impl Frozen for Counted {
    fn changed(&self, device: usize) -> &BlockSet {
        self.inner.changed(device)
    }

    fn read(&self, device: usize, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read(device, range, buf)?;
        self.done.fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn held(&self) -> Duration {
        self.inner.held()
    }

    fn release(self: Box<Self>) {
        self.inner.release();
    }

    fn put_back(self: Box<Self>) {
        self.inner.put_back();
    }
}

/// Makes one generation of everything.
fn once(
    target: &Target,
    capture: &dyn Capture,
    rate: Option<u64>,
    args: &SyncArgs,
    stop: &Stop,
    json: bool,
) -> Result<Stored> {
    let store = target.place.open(Access::Write)?;
    let options = WriterOptions { rate, ..WriterOptions::default() };
    let mut writer = LineWriter::open(store, &target.keys, &target.line, options)?;
    let devices = capture.devices();
    let frozen = Counted::of(capture.freeze(Want::Everything)?, &devices);
    let progress = Progress::bytes("storing", frozen.total, json);
    let halt = AtomicBool::new(false);
    let stored = thread::scope(|scope| {
        let work = scope.spawn(|| writer.store(&devices, &frozen, true, &args.label, &halt));
        while !work.is_finished() {
            if stop.wait(Duration::from_millis(20)) {
                halt.store(true, Ordering::Relaxed);
                break;
            }
            progress.set(frozen.done.load(Ordering::Relaxed), frozen.total);
        }
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    progress.end();
    match stored {
        Ok(stored) => {
            frozen.inner.release();
            Ok(stored)
        }
        Err(error) => {
            frozen.inner.put_back();
            Err(error).context("the generation was not stored; the line is as it was")
        }
    }
}

fn say(target: &Target, stored: &Stored, json: bool) -> Result<()> {
    let value = serde_json::json!({
        "line": target.line.to_string(),
        "number": stored.number,
        "blocks": stored.blocks,
        "zero_blocks": stored.zeros,
        "known_blocks": stored.known,
        "content_bytes": stored.content,
        "bytes": stored.bytes(),
        "requests": stored.requests.total(),
        "held_seconds": stored.held.as_secs_f64(),
        "seconds": stored.took.as_secs_f64(),
    });
    let text = format!(
        "generation {} of {}: {} blocks ({} zero, {} in the store already), {} in {} requests, \
         {:.1} s",
        stored.number,
        target.line,
        stored.blocks,
        stored.zeros,
        stored.known,
        human(stored.bytes()),
        stored.requests.total(),
        stored.took.as_secs_f64(),
    );
    print(json, &value, &text)
}

impl SyncArgs {
    fn config(&self) -> Result<Config> {
        let mut config = self.device.config()?;
        if self.device.config.is_some() {
            config.backup.as_ref().context("the config has no [backup]")?;
            return Ok(config);
        }
        for device in config.device.values_mut() {
            device.expose = self.fronts.expose(self.tls.plaintext);
        }
        config.identity = self.tls.identity();
        config.metrics = self.metrics.config();
        // What is backed up, and where copies wait; the rest is given by the flags.
        config.backup = Some(crate::config::BackupConfig::by_flags(
            self.store.store.as_deref().context("no store is named; add --store URL")?,
            &self.line_name()?,
            self.store_args().key_source(),
        ));
        config.check()?;
        Ok(config)
    }

    fn line_name(&self) -> Result<LineName> {
        let line = self.line.as_deref();
        Ok(LineName::parse(line.context("which line? add --line tenant/line")?)?)
    }

    fn store_args(&self) -> StoreArgs {
        StoreArgs::given(self.store.store.clone(), self.store.keys.clone())
    }

    fn target(&self, config: &Config) -> Result<(Target, Duration, Option<u64>)> {
        let backup = config.backup.as_ref().context("the config has no [backup]")?;
        if self.device.config.is_none() {
            let target = self.store_args().target(self.line.as_deref())?;
            return Ok((target, self.max_age.0, self.bandwidth.map(|rate| rate.0)));
        }
        let group = config.members(backup.group.as_deref()).context("the group to back up")?.0;
        let mut target = Target::by_config(backup, &group)?;
        if let Some(line) = &self.line {
            target.line = LineName::parse(line)?;
        }
        Ok((target, backup.max_age.0, backup.bandwidth.map(|rate| rate.0)))
    }
}
