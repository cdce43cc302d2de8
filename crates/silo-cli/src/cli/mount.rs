//! `silo mount`: a device that is elsewhere as memory here, fetched when it is touched and before.
//!
//! The mapping lives in this process. Others reach it as a file (`--fuse`), as a block device
//! (`--socket` and its like), or map the memfd that `/proc/PID/fd/N` names; a page that is touched
//! there before its content has come is served too, because all mappings share the file.

use super::{
    device::{DeviceArgs, FrontArgs, MetricsArgs, NAME, TlsArgs},
    human, print,
    progress::Progress,
    stop::Stop,
};
use crate::{
    config::{ByteSize, Config, Span},
    metrics::{Readings, Source, names, spread},
    service::Service,
    stack::Role,
};
use anyhow::{Context, Result, ensure};
use clap::Args;
use silo::{
    device::DeviceName,
    io::BlockDevice,
    mapped::mount::{Mount, Options, PullFirst},
};
use std::{ops::Range, sync::Arc, time::Duration};

/// How often the progress is looked at.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Args)]
pub(super) struct MountArgs {
    /// Fetch only what is touched, and what a walker will touch next
    #[arg(long, conflicts_with = "order")]
    direct: bool,
    /// Fetch so much before it opens
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pull_first: ByteSize,
    /// Fetch these parts before the rest, the first one first: OFFSET+LENGTH, as in 512M+16M
    #[arg(long, value_name = "PART", value_delimiter = ',', value_parser = part)]
    order: Vec<Range<u64>>,
    /// What is written goes back at least so often
    #[arg(long, value_name = "TIME", default_value = "5s")]
    write_back: Span,
    /// Fetch so far ahead of a walker; 0 for not at all
    #[arg(long, value_name = "SIZE", default_value = "32M")]
    read_ahead: ByteSize,
    /// Most bytes on the way in the background
    #[arg(long, value_name = "SIZE", default_value = "64M")]
    in_flight: ByteSize,
    /// How long an access waits for its content before it fails
    #[arg(long, value_name = "TIME", default_value = "30s")]
    deadline: Span,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    fronts: FrontArgs,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

fn part(text: &str) -> Result<Range<u64>, String> {
    let wrong = || format!("\"{text}\" is not a part; write OFFSET+LENGTH, as in 512M+16M");
    let (offset, length) = text.split_once('+').ok_or_else(wrong)?;
    let (offset, length): (ByteSize, ByteSize) = (offset.parse()?, length.parse()?);
    let end = offset.0.checked_add(length.0).ok_or_else(wrong)?;
    Ok(offset.0..end)
}

/// The figures of a mount.
struct MountFigures(Arc<Mount>);

impl Source for MountFigures {
    fn read(&self, readings: &mut Readings) {
        let status = self.0.status();
        readings.level(&names::MOUNT_SIZE, &[], status.bytes as f64);
        readings.level(&names::MOUNT_HERE, &[], status.here_bytes as f64);
        readings.level(&names::MOUNT_DIRTY, &[], status.dirty_bytes as f64);
        for (why, bytes) in [
            ("demand", status.demanded_bytes),
            ("first", status.first_bytes),
            ("ahead", status.ahead_bytes),
            ("bulk", status.bulk_bytes),
        ] {
            readings.count(&names::MOUNT_FETCHED, &[why], bytes);
        }
        readings.count(&names::MOUNT_WRITTEN, &[], status.written_bytes);
        readings.count(&names::MOUNT_FAULTS, &[], status.faults);
        readings.count(&names::MOUNT_ERRORS, &[], status.errors);
        readings.spread(&names::MOUNT_WAIT, &[], spread(&self.0.waits()));
        readings.level(&names::MOUNT_ROUND_TRIP, &[], status.round_trip_us as f64 / 1e6);
        readings.level(&names::MOUNT_RATE, &[], status.rate as f64);
    }
}

impl MountArgs {
    fn config(&self) -> Result<Config> {
        let mut config = self.device.config()?;
        if self.device.config.is_none() {
            config.identity = self.tls.identity();
            config.metrics = self.metrics.config();
        }
        config.check()?;
        ensure!(
            config.device.len() == 1,
            "a mount is of one device, the config has {}",
            config.device.len()
        );
        Ok(config)
    }

    fn options(&self, name: &str, size: u64) -> Result<Options> {
        let mut options = Options::new(DeviceName::new(name).context("the device's name")?);
        options.pull_first = PullFirst::Bytes(self.pull_first.0.min(size));
        if !self.order.is_empty() {
            let parts = self.order.clone();
            let count = i64::try_from(parts.len())?;
            options.order = Some(Arc::new(move |offset| {
                // A piece counts by the first part that reaches into its MiB.
                let piece = offset..offset + (1 << 20);
                let hit =
                    parts.iter().position(|part| part.start < piece.end && piece.start < part.end);
                hit.map_or(0, |at| count - at as i64)
            }));
        }
        options.write_back = Some(self.write_back.0);
        options.read_ahead = self.read_ahead.0;
        options.budget = self.in_flight.0;
        options.deadline = self.deadline.0;
        Ok(options)
    }
}

pub(super) fn run(args: &MountArgs, json: bool) -> Result<()> {
    let stop = Stop::on_signals()?;
    let mut config = args.config()?;
    // Front ends stand on the mount, not on the device behind it.
    let mut expose = Default::default();
    for device in config.device.values_mut() {
        expose = std::mem::take(&mut device.expose);
    }
    if args.device.config.is_none() {
        expose = args.fronts.expose(args.tls.plaintext);
    }
    let mut service = Service::open(&config, &Role::Use)?;
    let (name, far) = service.first_device().context("no device is named")?;
    let shown = if args.device.config.is_some() { name.as_str() } else { NAME };
    let options = args.options(shown, far.size())?;
    let mount =
        if args.direct { Mount::direct(far, options) } else { Mount::managed(far, options) };
    let mount = Arc::new(mount?);
    service.host().metrics.add(Arc::new(MountFigures(mount.clone())));
    let device: Arc<dyn BlockDevice> = mount.clone();
    service.expose(shown, &device, &expose)?;
    service.serve(&config)?;
    announce(&service, &mount, json)?;
    let progress = Progress::bytes("fetching", 0, json);
    while !stop.wait(LOOK) {
        service.retry();
        let status = mount.status();
        progress.set(status.here_bytes, status.bytes);
        if status.is_complete() {
            progress.end();
        }
    }
    progress.end();
    let fronts = service.stop_fronts();
    let closed = mount.close().map_err(anyhow::Error::from);
    fronts.and(closed).and(service.stop())
}

fn announce(service: &Service, mount: &Mount, json: bool) -> Result<()> {
    use std::os::fd::AsRawFd;
    let memory = format!("/proc/{}/fd/{}", std::process::id(), mount.file().as_raw_fd());
    let status = mount.status();
    let mut value = serde_json::json!({
        "bytes": status.bytes,
        "here_bytes": status.here_bytes,
        "memory": memory,
        "devices": service.addresses(),
    });
    let mut lines = vec![format!("mounted {} as {memory}", human(status.bytes))];
    lines
        .extend(service.addresses().iter().map(|one| format!("by {} on {}", one.protocol, one.at)));
    if let Some(metrics) = service.metrics() {
        value["metrics"] = metrics.to_string().into();
        lines.push(format!("metrics on http://{metrics}/metrics"));
    }
    print(json, &value, &lines.join("\n"))
}
