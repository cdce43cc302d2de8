//! A move whose destination runs while almost nothing has come.

use super::{content::noise, memory::Memory, rig::*, tap::Tap};
use silo_block::session::source::Config;
use silo_move::{
    Outbound, Server, Volume, destination,
    peer::{Dial, Limits},
};
use std::sync::Arc;

/// A session that runs at the destination while almost nothing has come: bulk may not be sent.
pub struct Early {
    pub device: Arc<Memory>,
    pub there: Arc<Volume>,
    pub receiver: Arc<Receiver>,
    pub outbound: Option<Outbound>,
    pub host: Arc<Host>,
    pub tap: Tap,
    _server: Server,
}

/// One byte a second for bulk: no more than a run for each connection leaves by itself.
pub fn early(size: u64, options: destination::Options, patience: u64) -> Early {
    let device = noise(size, 3);
    let volume = owned("memory", device.clone(), 4096);
    let there = empty("memory", Arc::new(Memory::new(size)), 4096);
    let mut options = options;
    options.session.patience = self::patience(patience);
    let receiver = Receiver::new(vec![there.clone()], options);
    let server = serve(&receiver);
    let tap = Tap::new(Some(server.address()));
    let host = Arc::new(Host::default());
    let config = Config { patience: self::patience(patience), ..Config::default() };
    let limits = Limits { bandwidth: Some(1), ..limits() };
    let dial = Dial::new(
        tap.address,
        identity::HostName::new("b").unwrap(),
        identity::Security::Plaintext,
        limits,
    );
    let outbound =
        Outbound::start(vec![volume.clone()], dial, host.clone(), source_options(config)).unwrap();
    outbound.switch();
    receiver.host.wait_for(|seen| matches!(seen, Seen::Run(..)));
    Early { device, there, receiver, outbound: Some(outbound), host, tap, _server: server }
}
