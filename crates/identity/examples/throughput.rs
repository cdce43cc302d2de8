//! Loopback throughput of a stream, plaintext and TLS, one way and both ways:
//! `cargo run --release -p identity --example throughput [MiB]`.

use identity::{Authority, HostName, Identity, Security, Stream};
use std::{
    io::{Read, Write},
    net::TcpListener,
    thread,
    time::{Duration, Instant},
};

const LIMIT: Duration = Duration::from_secs(10);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mib: u64 = std::env::args().nth(1).map_or(Ok(2048), |n| n.parse())?;
    let dir = tempfile::tempdir()?;
    let authority = Authority::create(dir.path())?;
    let (a, b) = (HostName::new("a")?, HostName::new("b")?);
    for host in [&a, &b] {
        authority.issue(host, Duration::from_secs(3600))?;
    }
    let tls = [
        Security::Mutual(Identity::load(dir.path(), &a)?),
        Security::Mutual(Identity::load(dir.path(), &b)?),
    ];
    let plain = [Security::Plaintext, Security::Plaintext];
    for (label, [client, server]) in [("plaintext", plain), ("tls", tls)] {
        for both_ways in [false, true] {
            let rate = measure(&b, &client, &server, mib << 20, both_ways)?;
            let ways = if both_ways { "both ways" } else { "one way" };
            println!("{label:9} {ways:9} {rate:.2} GB/s");
        }
    }
    Ok(())
}

/// Bytes per nanosecond, both directions together.
fn measure(
    peer: &HostName,
    client: &Security,
    server: &Security,
    total: u64,
    both_ways: bool,
) -> Result<f64, Box<dyn std::error::Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let (ours, theirs) = thread::scope(|scope| {
        let accepting = scope.spawn(|| {
            let (socket, _) = listener.accept().expect("the client connects");
            Stream::server(socket, server, LIMIT)
        });
        let ours = Stream::connect(address, peer, client, LIMIT);
        (ours, accepting.join().expect("the accepting thread does not panic"))
    });
    let (ours, theirs) = (ours?.split(), theirs?.split());
    let started = Instant::now();
    let mut ways = vec![(ours.1, theirs.0)];
    if both_ways {
        ways.push((theirs.1, ours.0));
    }
    let count = ways.len() as u64;
    thread::scope(|scope| {
        for (mut writer, mut reader) in ways {
            scope.spawn(move || {
                let block = vec![0x5a; 256 * 1024];
                for _ in 0..total / block.len() as u64 {
                    writer.write_all(&block).expect("the reader is there");
                }
                writer.finish().expect("the reader is there");
            });
            scope.spawn(move || {
                let mut block = vec![0; 256 * 1024];
                while reader.read(&mut block).expect("the writer is there") > 0 {}
            });
        }
    });
    Ok((total * count) as f64 / started.elapsed().as_nanos() as f64)
}
