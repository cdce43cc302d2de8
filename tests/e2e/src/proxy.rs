//! A line between two runners that reads along (in plaintext) and keeps chosen frames back, so
//! that a message is late by exactly as much as a test wants.

use crate::Stage;
use drafter::migrate::{
    link::{CONNECT_LIMIT, Channel, Incoming, Outgoing},
    protocol::Frame,
};
use identity::{Control, HostName, Security, Stream};
use std::{
    net::{SocketAddr, TcpListener},
    thread,
    time::Duration,
};

/// How long a frame is kept back; everything behind it waits too.
pub type Rule = fn(&Frame) -> Duration;

/// Listens on host b and leads one session on to `to`. Returns where it listens.
#[must_use]
pub fn between(stage: &Stage, to: SocketAddr, rule: Rule) -> SocketAddr {
    let host = stage.fleet.rig().hosts()[1].clone();
    let listener = host.namespace.run(|| TcpListener::bind((host.migration, 0))).unwrap().unwrap();
    let address = listener.local_addr().unwrap();
    let peer = HostName::new(&host.name).unwrap();
    let plain = Security::Plaintext;
    thread::spawn(move || {
        // The two connections of one session; a test that fails here shows as a move that does.
        for _ in 0..2 {
            let (socket, _) = listener.accept().unwrap();
            let stream = Stream::server(socket, &plain, CONNECT_LIMIT).unwrap();
            let (source, preamble) = Channel::accept(stream, &plain).unwrap();
            let dial = || Channel::connect(to, &peer, &plain, preamble).unwrap();
            let destination = host.namespace.run(dial).unwrap();
            let ends = [source.control.clone(), destination.control.clone()];
            lead(source.incoming, destination.outgoing, ends.clone(), rule);
            lead(destination.incoming, source.outgoing, ends, rule);
        }
    });
    address
}

/// Leads frames one way until an end is gone; then the other goes too.
fn lead(mut from: Incoming, mut to: Outgoing, ends: [Control; 2], rule: Rule) {
    thread::spawn(move || {
        while let Ok(frame) = from.read() {
            thread::sleep(rule(&frame));
            if to.write(&frame).and_then(|()| to.flush()).is_err() {
                break;
            }
        }
        ends.iter().for_each(Control::shutdown);
    });
}
