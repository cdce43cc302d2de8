//! A line between two runners that reads along (in plaintext) and keeps chosen frames back, so
//! that a message is late by exactly as much as a test wants.

use crate::Stage;
use drafter::migrate::protocol::{Frame, FrameReader, FrameWriter, Preamble, Role};
use std::{
    io::{self, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
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
    thread::spawn(move || {
        for _ in 0..2 {
            let Ok((source, _)) = listener.accept() else { return };
            let Ok(Ok(destination)) = host.namespace.run(|| TcpStream::connect(to)) else { return };
            let _ = join(source, destination, rule);
        }
    });
    address
}

fn join(mut source: TcpStream, mut destination: TcpStream, rule: Rule) -> io::Result<()> {
    source.set_nodelay(true)?;
    destination.set_nodelay(true)?;
    let preamble = Preamble::read(&mut source).map_err(io::Error::other)?;
    destination.write_all(&preamble.encode())?;
    let back = (destination.try_clone()?, source.try_clone()?);
    for (from, to) in [(source, destination), back] {
        let (watched, from_end, to_end) =
            (preamble.role == Role::Main, from.try_clone()?, to.try_clone()?);
        thread::spawn(move || {
            if watched {
                lead(from, to, rule);
            } else {
                let (mut from, mut to) = (from, to);
                let _ = io::copy(&mut from, &mut to);
            }
            let _ = from_end.shutdown(Shutdown::Both);
            let _ = to_end.shutdown(Shutdown::Both);
        });
    }
    Ok(())
}

fn lead(from: TcpStream, to: TcpStream, rule: Rule) {
    let (mut from, mut to) = (FrameReader::new(from, true), FrameWriter::new(to, true));
    while let Ok(frame) = from.read() {
        thread::sleep(rule(&frame));
        if to.write(&frame).and_then(|()| to.flush()).is_err() {
            return;
        }
    }
}
