//! `silo restore`: devices of a generation, written out as a whole or read when they are touched.

use super::{
    device::{FrontArgs, TlsArgs},
    human, print,
    progress::Progress,
    serve,
    stop::Stop,
    store::StoreArgs,
};
use crate::{
    config::{Config, DeviceConfig, SourceConfig, StoreConfig},
    service::Service,
};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use silo::{
    source::{FileDevice, FileMode},
    store::{Access, Generation, RestoreOptions, Which},
};
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Memory for what is read of a generation.
const CACHE: usize = 64 << 20;

#[derive(Args)]
#[command(group = clap::ArgGroup::new("where").required(true).args(["to", "to_dir", "lazy"]))]
pub(super) struct RestoreArgs {
    /// `tenant/line`
    line: String,
    /// Which generation; the newest if not given
    #[arg(long, value_name = "NUMBER")]
    generation: Option<u64>,
    /// Which device; may be left out where there is one
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Write it to this file, which must not exist yet (but see --overwrite)
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    /// Write all devices to NAME.raw in this folder
    #[arg(long, value_name = "DIR", conflicts_with = "device")]
    to_dir: Option<PathBuf>,
    /// Overwrite a file or block device that is there
    #[arg(long, requires = "to")]
    overwrite: bool,
    /// Serve it at once and fetch what is touched; with --layer it can be written
    #[arg(long)]
    lazy: bool,
    /// Writes go to this folder, made if there is none
    #[arg(long, value_name = "DIR", requires = "lazy")]
    layer: Option<PathBuf>,
    #[command(flatten)]
    fronts: FrontArgs,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    store: StoreArgs,
    /// Never given: front ends ask whether there is a config
    #[arg(long, hide = true)]
    config: Option<PathBuf>,
}

pub(super) fn run(args: &RestoreArgs, json: bool) -> Result<()> {
    let stop = Stop::on_signals()?;
    if args.lazy {
        return lazily(args, &stop, json);
    }
    let target = args.store.target(Some(&args.line))?;
    let store = target.place.open(Access::Read)?;
    let which = args.generation.map_or(Which::Newest, Which::Number);
    let generation = Generation::open(&store, &target.keys, &target.line, which, CACHE)?;
    generation.pin_if_possible()?;
    let mut done = Vec::new();
    if let Some(dir) = &args.to_dir {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("could not make {}", dir.display()))?;
        for device in generation.devices() {
            let path = dir.join(format!("{}.raw", device.name));
            done.push(whole(&generation, &device.name, &path, false, &stop, json)?);
        }
    } else if let Some(path) = &args.to {
        let name = one_device(&generation, args.device.as_deref())?;
        done.push(whole(&generation, &name, path, args.overwrite, &stop, json)?);
    }
    let value = serde_json::json!({
        "line": args.line, "number": generation.number(), "devices": done,
        "requests": store.requests().total(),
    });
    let lines: Vec<String> = done
        .iter()
        .map(|one| {
            format!(
                "restored {} of generation {} to {}: {} ({} zeros) in {:.1} s",
                one.device,
                generation.number(),
                one.path.display(),
                human(one.bytes),
                human(one.zeros),
                one.seconds
            )
        })
        .collect();
    print(json, &value, &lines.join("\n"))
}

/// A device that was written out.
#[derive(serde::Serialize)]
struct Written {
    device: String,
    path: PathBuf,
    bytes: u64,
    zeros: u64,
    seconds: f64,
}

fn one_device(generation: &Generation, name: Option<&str>) -> Result<String> {
    match (name, &generation.devices()[..]) {
        (Some(name), _) => {
            generation.find(name)?;
            Ok(name.to_owned())
        }
        (None, [only]) => Ok(only.name.clone()),
        (None, several) => {
            let names: Vec<&str> = several.iter().map(|device| device.name.as_str()).collect();
            bail!("which device? --device one of {}, or all with --to-dir", names.join(", "))
        }
    }
}

/// Writes a device out. A new file that is not complete is removed again.
#[tracing::instrument(skip_all, fields(device = name))]
fn whole(
    generation: &Arc<Generation>,
    name: &str,
    path: &Path,
    overwrite: bool,
    stop: &Stop,
    json: bool,
) -> Result<Written> {
    let at = generation.find(name)?;
    let bytes = generation.devices()[at].geometry.bytes();
    let fresh = !overwrite || !path.exists();
    let target = if fresh {
        FileDevice::create(path, bytes)?
    } else {
        FileDevice::open(path, FileMode::ReadWrite)?
    };
    let began = Instant::now();
    let progress = Progress::bytes("restoring", bytes, json);
    let (done, halt) = (AtomicU64::new(0), AtomicBool::new(false));
    let options = RestoreOptions { target_is_zero: fresh, ..RestoreOptions::default() };
    let restored = thread::scope(|scope| {
        let work = scope.spawn(|| generation.restore(name, &target, options, &done, &halt));
        while !work.is_finished() {
            if stop.wait(Duration::from_millis(50)) {
                halt.store(true, Ordering::Relaxed);
            }
            progress.set(done.load(Ordering::Relaxed), bytes);
            if halt.load(Ordering::Relaxed) {
                break;
            }
        }
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    progress.end();
    match restored {
        Ok(restored) => Ok(Written {
            device: name.to_owned(),
            path: path.to_owned(),
            bytes: restored.bytes,
            zeros: restored.zeros,
            seconds: began.elapsed().as_secs_f64(),
        }),
        Err(error) if fresh => {
            drop(target);
            let removed = std::fs::remove_file(path);
            let left = if removed.is_ok() { "; the unfinished file was removed" } else { "" };
            Err(error).with_context(|| format!("could not restore {name}{left}"))
        }
        Err(error) => Err(error).with_context(|| {
            format!("could not restore {name}; {} holds a part of it", path.display())
        }),
    }
}

/// Serves a device of the generation, and fetches what is touched.
fn lazily(args: &RestoreArgs, stop: &Stop, json: bool) -> Result<()> {
    ensure!(!args.fronts.is_empty(), "nobody could reach it; add --socket, --tcp or --fuse");
    let url = args.store.url().context("--lazy needs --store URL")?;
    let name = match &args.device {
        Some(name) => name.clone(),
        None => {
            let target = args.store.target(Some(&args.line))?;
            let store = target.place.open(Access::Read)?;
            let which = args.generation.map_or(Which::Newest, Which::Number);
            let generation = Generation::open(&store, &target.keys, &target.line, which, CACHE)?;
            one_device(&generation, None)?
        }
    };
    let source = SourceConfig::Generation {
        store: StoreConfig::at(url),
        line: args.line.clone(),
        keys: args.store.key_source(),
        number: args.generation,
        device: Some(name.clone()),
    };
    let device = DeviceConfig {
        overlays: args.layer.iter().cloned().collect(),
        create_overlays: true,
        read_only: args.layer.is_none(),
        expose: args.fronts.expose(args.tls.plaintext),
        ..DeviceConfig::of(source, None)
    };
    let config = Config {
        device: [(name, device)].into(),
        identity: args.tls.identity(),
        ..Config::default()
    };
    config.check()?;
    let service = Service::start(&config)?;
    serve::announce(&service, args.fronts.socket.as_deref(), json)?;
    let ran = service.run(stop);
    ran.and(service.stop())
}
