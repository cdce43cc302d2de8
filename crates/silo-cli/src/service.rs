//! What a config describes, running: devices open, front ends listening, metrics answered.
//!
//! Callers: `silo serve`, `silo expose`, `silo connect`. What must hold: everything is started or
//! nothing is; an orderly stop ends the front ends first, then flushes every device, also when one
//! of them fails.

use crate::{
    cli::stop::Stop,
    config::{Config, NbdConfig, VhostConfig},
    metrics::{Endpoint, Metrics},
    stack::DeviceStack,
};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use silo::{
    expose::vhost::{VhostOptions, VhostServer},
    nbd::{NbdOptions, NbdServer},
};
use std::time::Duration;

/// How long requests in hand may take after a signal.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// How often operations that wait for room try again.
const RETRY: Duration = Duration::from_secs(5);

/// One way to reach a device, for people and for `--json`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Address {
    /// The device.
    pub(crate) device: String,
    /// Its size.
    pub(crate) bytes: u64,
    /// By what.
    pub(crate) protocol: &'static str,
    /// Where.
    pub(crate) at: String,
}

/// A front end that runs.
enum Front {
    Nbd(NbdServer),
    Vhost(VhostServer),
}

/// Everything that runs.
pub(crate) struct Service {
    // Before the devices that they serve.
    fronts: Vec<Front>,
    stacks: Vec<DeviceStack>,
    addresses: Vec<Address>,
    endpoint: Option<Endpoint>,
}

impl Service {
    /// Opens all devices and serves them.
    ///
    /// # Errors
    /// If anything cannot be opened or listened on; then nothing is left running.
    pub(crate) fn start(config: &Config) -> Result<Self> {
        let metrics = Metrics::default();
        let mut service =
            Self { fronts: Vec::new(), stacks: Vec::new(), addresses: Vec::new(), endpoint: None };
        for (name, device) in &config.device {
            service.stacks.push(DeviceStack::open(name, device, &metrics)?);
        }
        for at in 0..service.stacks.len() {
            let expose = &config.device[service.stacks[at].name()].expose;
            if let Some(nbd) = &expose.nbd {
                service.serve_nbd(at, nbd)?;
            }
            if let Some(vhost) = &expose.vhost_user_blk {
                service.serve_vhost(at, vhost)?;
            }
            if expose.fuse.is_some() || expose.attach.is_some() {
                bail!("not built yet");
            }
        }
        if let Some(wanted) = &config.metrics {
            let endpoint = Endpoint::start(wanted.listen, metrics)?;
            service.endpoint = Some(endpoint);
        }
        Ok(service)
    }

    fn serve_nbd(&mut self, at: usize, nbd: &NbdConfig) -> Result<()> {
        let stack = &self.stacks[at];
        let export = nbd.export.clone().unwrap_or_else(|| stack.name().to_owned());
        let options =
            NbdOptions { export, max_connections: nbd.max_connections, ..NbdOptions::default() };
        if let Some(path) = &nbd.unix {
            let server = NbdServer::start(path, stack.device(), options)
                .with_context(|| format!("device \"{}\"", stack.name()))?;
            self.fronts.push(Front::Nbd(server));
            self.listening(at, "nbd", path.display().to_string());
        }
        Ok(())
    }

    fn serve_vhost(&mut self, at: usize, vhost: &VhostConfig) -> Result<()> {
        let stack = &self.stacks[at];
        let options = VhostOptions {
            serial: stack.name().to_owned(),
            queues: u16::try_from(vhost.queues)?,
            ..VhostOptions::default()
        };
        let server = VhostServer::start(&vhost.socket, stack.device(), options)
            .with_context(|| format!("device \"{}\"", stack.name()))?;
        self.fronts.push(Front::Vhost(server));
        self.listening(at, "vhost-user-blk", vhost.socket.display().to_string());
        Ok(())
    }

    fn listening(&mut self, at: usize, protocol: &'static str, place: String) {
        let stack = &self.stacks[at];
        self.addresses.push(Address {
            device: stack.name().to_owned(),
            bytes: stack.device().size(),
            protocol,
            at: place,
        });
    }

    /// How the devices are reached.
    pub(crate) fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Where metrics are answered.
    pub(crate) fn metrics(&self) -> Option<std::net::SocketAddr> {
        self.endpoint.as_ref().map(Endpoint::address)
    }

    /// Serves until the end is asked for.
    pub(crate) fn run(&self, stop: &Stop) {
        while !stop.wait(RETRY) {
            self.stacks.iter().for_each(DeviceStack::retry);
        }
    }

    /// Ends the front ends, then makes everything durable.
    ///
    /// # Errors
    /// The first thing that failed; the rest was done all the same.
    pub(crate) fn stop(self) -> Result<()> {
        let mut outcome = Ok(());
        for front in self.fronts {
            let stopped = match front {
                Front::Nbd(server) => server.stop(STOP_LIMIT).map_err(anyhow::Error::from),
                Front::Vhost(server) => server.stop(STOP_LIMIT).map_err(anyhow::Error::from),
            };
            outcome = outcome.and(stopped);
        }
        for stack in self.stacks {
            outcome = outcome.and(stack.close());
        }
        outcome
    }
}
