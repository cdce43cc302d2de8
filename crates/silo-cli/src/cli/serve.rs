//! `silo serve`: devices for others to use, until SIGTERM or SIGINT.

use super::{
    device::{DeviceArgs, FrontArgs, MetricsArgs, TlsArgs},
    give::{self, Giver},
    human, print,
    stop::Stop,
};
use crate::{
    config::{Config, DeviceConfig, MigrateConfig},
    service::Service,
};
use anyhow::{Result, bail};
use clap::Args;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

#[derive(Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    fronts: FrontArgs,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
    /// Wait here for a destination (`silo connect`) and give the device to it
    #[arg(long, value_name = "ADDRESS", conflicts_with = "config")]
    move_listen: Option<SocketAddr>,
    /// The destination's name in its certificate
    #[arg(long, value_name = "NAME", requires = "move_listen")]
    destination: Option<String>,
    /// Note in this file who owns the device; without it in DEVICE.silo-note beside it
    #[arg(long, value_name = "FILE", requires = "move_listen")]
    note: Option<PathBuf>,
}

impl ServeArgs {
    /// The config file, or what the flags say in its place.
    fn config(&self) -> Result<Config> {
        let mut config = self.device.config()?;
        if self.device.config.is_some() {
            return Ok(config);
        }
        if self.fronts.is_empty() {
            bail!("nobody could reach it; add --socket, --tcp, --vhost-user-blk or --fuse");
        }
        for device in config.device.values_mut() {
            device.expose = self.fronts.expose(self.tls.plaintext);
        }
        config.identity = self.tls.identity();
        config.metrics = self.metrics.config();
        if self.move_listen.is_some() {
            let mut migrate = MigrateConfig::new(self.tls.plaintext, self.destination.clone());
            migrate.listen = self.move_listen;
            let own = || config.device.values().find_map(DeviceConfig::own_note);
            migrate.note = self.note.clone().or_else(own);
            config.migrate = Some(migrate);
        }
        config.check()?;
        Ok(config)
    }
}

pub(super) fn run(args: &ServeArgs, json: bool) -> Result<()> {
    // Before anything is served, so that a signal that comes early is not lost.
    let stop = Stop::on_signals()?;
    let config = args.config()?;
    let service = Service::start(&config)?;
    let giver = match &config.migrate {
        Some(migrate) => Giver::start(migrate, &service, stop.clone(), json)?,
        None => None,
    };
    let socket = args.fronts.socket.as_deref().filter(|_| args.device.config.is_none());
    announce(&service, socket, json)?;
    if let Some(giver) = &giver
        && !json
    {
        println!("waiting on {} for a destination", giver.address());
    }
    let ran = service.run(&stop);
    if ran.is_err() {
        stop.ask();
    }
    match giver.and_then(Giver::end) {
        None => ran.and(service.stop()),
        Some(report) => {
            give::say(&report, json)?;
            // There is nothing left here to store or to flush.
            ran.and(service.without_backup().stop())
        }
    }
}

/// Says where things are, once all of them answer. `socket`: of the one device that flags describe.
pub(super) fn announce(service: &Service, socket: Option<&Path>, json: bool) -> Result<()> {
    let addresses = service.addresses();
    let mut value = serde_json::json!({ "devices": addresses });
    if let (Some(socket), Some(first)) = (socket, addresses.first()) {
        value["bytes"] = first.bytes.into();
        value["socket"] = serde_json::json!(socket);
    }
    let mut lines: Vec<String> = addresses
        .iter()
        .map(|one| {
            let size = human(one.bytes);
            format!("serving {} ({size}) by {} on {}", one.device, one.protocol, one.at)
        })
        .collect();
    if let Some(metrics) = service.metrics() {
        value["metrics"] = metrics.to_string().into();
        lines.push(format!("metrics on http://{metrics}/metrics"));
    }
    print(json, &value, &lines.join("\n"))
}
