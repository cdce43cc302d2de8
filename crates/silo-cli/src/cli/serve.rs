//! `silo serve`: devices for others to use, until SIGTERM or SIGINT.

use super::{human, print, stop::Stop};
use crate::{
    config::{ByteSize, Config, DeviceConfig, ExposeConfig, NbdConfig, SourceConfig},
    service::Service,
};
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;

#[derive(Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["config", "overlay"]))]
pub(super) struct ServeArgs {
    /// Serve what this file describes; see docs/silo-config.md
    #[arg(long, conflicts_with_all = ["base", "overlay", "socket", "create", "export"])]
    config: Option<PathBuf>,
    /// The disk's folder
    #[arg(long, requires = "socket")]
    overlay: Option<PathBuf>,
    /// The read-only file below the disk, the one it was created over
    #[arg(long, requires = "overlay")]
    base: Option<PathBuf>,
    /// The unix socket to listen on
    #[arg(long)]
    socket: Option<PathBuf>,
    /// Create the disk if the folder holds none
    #[arg(long)]
    create: bool,
    /// Size of a disk that is created; without it that of the base
    #[arg(long, requires = "create")]
    size: Option<ByteSize>,
    /// The export's name; clients that ask for "" get the disk too
    #[arg(long, default_value = "")]
    export: String,
}

impl ServeArgs {
    /// The config, or what the flags say in its place.
    fn config(&self) -> Result<Config> {
        if let Some(path) = &self.config {
            return Ok(Config::load(path)?);
        }
        let Some(dir) = self.overlay.clone() else { unreachable!("clap wants one of the two") };
        let source = SourceConfig::Disk { dir, base: self.base.clone(), create: self.create };
        let nbd = NbdConfig {
            unix: self.socket.clone(),
            export: Some(self.export.clone()),
            ..NbdConfig::default()
        };
        let expose = ExposeConfig { nbd: Some(nbd), ..ExposeConfig::default() };
        let device = DeviceConfig { expose, ..DeviceConfig::of(source, self.size) };
        Ok(Config { device: [("disk".to_owned(), device)].into(), ..Config::default() })
    }
}

pub(super) fn run(args: &ServeArgs, json: bool) -> Result<()> {
    // Before anything is served, so that a signal that comes early is not lost.
    let stop = Stop::on_signals()?;
    let service = Service::start(&args.config()?)?;
    announce(args, &service, json)?;
    service.run(&stop);
    service.stop()
}

/// Says where things are, once all of them answer.
fn announce(args: &ServeArgs, service: &Service, json: bool) -> Result<()> {
    let addresses = service.addresses();
    let mut value = match (&args.config, addresses) {
        (None, [one]) => serde_json::json!({ "socket": one.at, "bytes": one.bytes }),
        _ => serde_json::json!({ "devices": addresses }),
    };
    let mut lines: Vec<String> = addresses
        .iter()
        .map(|one| {
            format!(
                "serving {} ({}) by {} on {}",
                one.device,
                human(one.bytes),
                one.protocol,
                one.at
            )
        })
        .collect();
    if let Some(metrics) = service.metrics() {
        value["metrics"] = metrics.to_string().into();
        lines.push(format!("metrics on http://{metrics}/metrics"));
    }
    print(json, &value, &lines.join("\n"))
}
