//! `silo serve`: devices for others to use, until SIGTERM or SIGINT.

use super::{
    assist::{AssistArgs, GiveArgs},
    device::{DeviceArgs, FrontArgs, MetricsArgs, TlsArgs},
    give::{self, Giver, Terms},
    human, print,
    stop::Stop,
};
use crate::{
    assist,
    config::{Config, DeviceConfig, MigrateConfig},
    note,
    service::Service,
    stack::Role,
};
use anyhow::{Context, Result, bail};
use clap::Args;
use silo::moving::{SessionId, ledger::Note};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
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
    #[command(flatten)]
    assist: AssistArgs,
    #[command(flatten)]
    gives: GiveArgs,
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
        if self.move_listen.is_some() || self.gives.shares() {
            let mut migrate = MigrateConfig::new(self.tls.plaintext, self.destination.clone());
            migrate.listen = self.move_listen;
            let own = || config.device.values().find_map(DeviceConfig::own_note);
            migrate.note = self.note.clone().or_else(own);
            if let Some(device) = config.device.keys().next() {
                self.assist.apply(device, false, &mut migrate)?;
            }
            self.gives.apply(&mut migrate);
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
    let migrate = config.migrate.as_ref();
    let leaving = note::leaving(migrate.and_then(|migrate| migrate.note.as_deref()))?;
    let (service, terms) = match (migrate, leaving) {
        (Some(migrate), Some(leaving)) if migrate.listen.is_some() => {
            match go_on(&config, migrate, &leaving, &stop, json)? {
                Some(back) => back,
                None => return Ok(()),
            }
        }
        (migrate, _) => {
            let service = start(&config, migrate)?;
            let terms =
                migrate.map(|migrate| Terms::new(&config, migrate, &service)).transpose()?;
            (service, terms.flatten())
        }
    };
    let _sharing = match migrate {
        Some(migrate) => assist::share(&config, migrate, service.host())?,
        None => None,
    };
    let giver = terms.map(|terms| Giver::start(terms, stop.clone(), json)).transpose()?;
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
    let volumes = service.volumes().to_vec();
    let ended = match giver.and_then(Giver::end) {
        None => ran.and(service.stop()),
        Some(report) => {
            give::say(&report, json)?;
            // There is nothing left here to store or to flush.
            ran.and(service.without_backup().stop())
        }
    };
    let note = migrate.filter(|migrate| migrate.listen.is_some());
    ended.and(note::leave(&config, note.and_then(|migrate| migrate.note.as_deref()), volumes))
}

/// Opens and serves. Devices that nobody has touched since a move, or since they were served last,
/// are known block by block: a move to whoever had them sends the difference.
fn start(config: &Config, migrate: Option<&MigrateConfig>) -> Result<Service> {
    note::check_use(config)?;
    let path = migrate.and_then(|migrate| migrate.note.as_deref());
    let Some(rested) = note::rested(config, path)? else { return Service::start(config) };
    let mut service = Service::open(config, &Role::GoOn(rested))?;
    service.back_up(config)?;
    service.serve(config)?;
    Ok(service)
}

/// Goes on with a move that a process had begun which is no more: nobody uses the devices here, and
/// the destination gets what it lacks. Gives them back if it never ran; none if they have left.
fn go_on(
    config: &Config,
    migrate: &MigrateConfig,
    leaving: &(Arc<Note>, SessionId, u32),
    stop: &Stop,
    json: bool,
) -> Result<Option<(Service, Option<Terms>)>> {
    let mut service = Service::open(config, &Role::GoOn(leaving.0.clone()))?;
    let terms =
        Terms::new(config, migrate, &service)?.context("nobody listens for the destination")?;
    let (session, address) = (leaving.1.to_string(), terms.address().to_string());
    let value = serde_json::json!({ "leaving": session, "listening": address });
    let text = format!("the devices are leaving by session {session}; waiting on {address}");
    print(json, &value, &text)?;
    match terms.go_on(leaving, stop, json) {
        Ok(report) => {
            give::say(&report, json)?;
            let volumes = service.volumes().to_vec();
            drop(terms);
            service.without_backup().stop()?;
            note::leave(config, migrate.note.as_deref(), volumes)?;
            Ok(None)
        }
        Err(error) if terms.are_here() => {
            eprintln!("silo: {error:#}");
            service.back_up(config)?;
            service.serve(config)?;
            Ok(Some((service, Some(terms))))
        }
        Err(error) => Err(error),
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
