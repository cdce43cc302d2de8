//! The encrypted tunnel in user space: real processes, real TCP, in network namespaces. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod fleet;
mod life;
mod packets;
mod relay;

use conduit::lab::{
    Space,
    traffic::{Datagrams, Echoes, Received, serve_echo},
    tunnel::{Outer, Pair, inner},
};
use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    thread,
    time::Duration,
};

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_conduit"))
}

fn pair() -> Pair {
    Pair::new(program(), Outer::V4).unwrap()
}

/// Sends `size` bytes from one namespace to an address in the other; all must arrive as they are.
fn transfer(from: &Space, to: &Space, address: IpAddr, size: usize) {
    let listener = to.run(|| TcpListener::bind((address, 0)).unwrap());
    let at = listener.local_addr().unwrap();
    let data: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
    let expected = data.clone();
    let receiver = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert!(got == expected, "{} bytes of {}, or other ones", got.len(), expected.len());
        stream.write_all(b"got").unwrap();
    });
    let limit = Duration::from_secs(10);
    let mut stream = from.run(|| TcpStream::connect_timeout(&at, limit).unwrap());
    stream.set_read_timeout(Some(limit)).unwrap();
    stream.set_write_timeout(Some(limit)).unwrap();
    stream.write_all(&data).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = [0; 3];
    stream.read_exact(&mut answer).unwrap();
    receiver.join().unwrap();
}

/// A thousand datagrams a second each way and a TCP echo every millisecond, until they are looked
/// at.
struct Traffic {
    echoes: Echoes,
    there: (Datagrams, Received),
    back: (Datagrams, Received),
}

impl Traffic {
    fn start(pair: &Pair) -> Self {
        let (a, b) = (inner(1).0, inner(2).0);
        serve_echo(pair.b.space.run(|| TcpListener::bind((b, 7)).unwrap()));
        let listen = |space: &Space, at: Ipv4Addr| {
            let socket = space.run(|| UdpSocket::bind((at, 9)).unwrap());
            Received::collect(socket)
        };
        let to = |ip: Ipv4Addr, port| SocketAddr::from((ip, port));
        let (at_a, at_b) = (listen(&pair.a.space, a), listen(&pair.b.space, b));
        let traffic = Self {
            echoes: pair.a.space.run(|| Echoes::start(to(b, 7))),
            there: (pair.a.space.run(|| Datagrams::start(to(b, 9))), at_b),
            back: (pair.b.space.run(|| Datagrams::start(to(a, 9))), at_a),
        };
        traffic.echoes.wait(50);
        traffic
    }

    /// Ends; says how many datagrams were lost there and back, and the longest silence of TCP.
    fn finish(self) -> (u64, u64, Duration) {
        self.echoes.wait(50);
        self.there.0.wait(50);
        let seen = self.echoes.finish();
        assert_eq!(seen.sent, seen.answered, "no echo is lost");
        let (_, lost_there) = self.there.0.finish(&self.there.1);
        let (_, lost_back) = self.back.0.finish(&self.back.1);
        (lost_there, lost_back, seen.gap)
    }
}
