//! `silo expose`: one device in one way, until SIGTERM or SIGINT. `silo serve` does several at once.

use super::{
    device::{DeviceArgs, FrontArgs, MetricsArgs, TlsArgs},
    serve,
    stop::Stop,
};
use crate::service::Service;
use anyhow::{Result, ensure};
use clap::{Args, Subcommand};
use std::{net::SocketAddr, path::PathBuf};

#[derive(Subcommand)]
pub(super) enum ExposeCommand {
    /// As an NBD export
    Nbd(Box<NbdArgs>),
    /// For a virtual machine, on a vhost-user-blk socket
    VhostUserBlk(Box<PlaceArgs>),
    /// As a file in an empty folder, by FUSE
    Fuse(Box<PlaceArgs>),
    /// As a block device of this kernel, as in /dev/nbd0, by nbd-client
    Attach(Box<AttachArgs>),
    /// As a block device of this kernel, /dev/ublkbN, by its ublk driver
    Ublk(Box<UblkArgs>),
}

#[derive(Args)]
pub(super) struct NbdArgs {
    /// Listen on this unix socket
    #[arg(long, value_name = "PATH", required_unless_present = "tcp")]
    socket: Option<PathBuf>,
    /// Listen on this address; with TLS unless --plaintext
    #[arg(long, value_name = "ADDRESS")]
    tcp: Option<SocketAddr>,
    /// The export's name; clients that ask for "" get it too
    #[arg(long, value_name = "NAME", default_value = "")]
    export: String,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

#[derive(Args)]
pub(super) struct PlaceArgs {
    /// Where
    place: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

#[derive(Args)]
pub(super) struct AttachArgs {
    /// The block device
    node: PathBuf,
    /// The unix socket between the kernel and this process
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

#[derive(Args)]
pub(super) struct UblkArgs {
    /// The N; the first free one if not given
    #[arg(long, value_name = "N")]
    id: Option<u32>,
    /// Keep the device when this process dies: its users wait, and the same command goes on
    #[arg(long, requires = "id")]
    recover: bool,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

pub(super) fn run(command: &ExposeCommand, json: bool) -> Result<()> {
    let none = TlsArgs::default();
    let (device, metrics, tls, fronts) = match command {
        ExposeCommand::Nbd(args) => (
            &args.device,
            &args.metrics,
            &args.tls,
            FrontArgs::nbd(args.socket.clone(), args.tcp, &args.export),
        ),
        ExposeCommand::VhostUserBlk(args) => {
            let vhost_user_blk = Some(args.place.clone());
            let fronts = FrontArgs { vhost_user_blk, ..FrontArgs::default() };
            (&args.device, &args.metrics, &none, fronts)
        }
        ExposeCommand::Fuse(args) => {
            let fronts = FrontArgs { fuse: Some(args.place.clone()), ..FrontArgs::default() };
            (&args.device, &args.metrics, &none, fronts)
        }
        ExposeCommand::Attach(args) => {
            let socket = FrontArgs::nbd(Some(args.socket.clone()), None, "");
            let fronts = FrontArgs { attach: Some(args.node.clone()), ..socket };
            (&args.device, &args.metrics, &none, fronts)
        }
        ExposeCommand::Ublk(args) => {
            let (ublk_id, ublk_recover) = (args.id, args.recover);
            let fronts = FrontArgs { ublk: true, ublk_id, ublk_recover, ..FrontArgs::default() };
            (&args.device, &args.metrics, &none, fronts)
        }
    };
    let stop = Stop::on_signals()?;
    let mut config = device.config()?;
    ensure!(config.device.len() == 1, "one device is exposed, the config has several; use serve");
    for device in config.device.values_mut() {
        device.expose = fronts.expose(tls.plaintext);
    }
    config.identity = tls.identity().or(config.identity);
    config.metrics = metrics.config().or(config.metrics);
    config.check()?;
    let service = Service::start(&config)?;
    serve::announce(&service, fronts.socket.as_deref(), json)?;
    let ran = service.run(&stop);
    ran.and(service.stop())
}
