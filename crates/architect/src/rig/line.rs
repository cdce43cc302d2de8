//! What a link itself reaches: measured, and reported beside every number that a benchmark gets
//! over it.

use super::{Host, RigError, io_failed};
use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

/// A measured link.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Line {
    /// Shortest round trip of one byte over TCP.
    pub round_trip_min: Duration,
    /// Median round trip.
    pub round_trip_median: Duration,
    /// Bits per second of one TCP stream over the whole time, slow start included.
    pub bits_per_second: f64,
    /// Bits per second of the same stream in the second half of the time.
    pub bits_per_second_late: f64,
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "round trip {:.2} ms (median {:.2}), one TCP stream {:.0} Mbit/s ({:.0} once open)",
            self.round_trip_min.as_secs_f64() * 1e3,
            self.round_trip_median.as_secs_f64() * 1e3,
            self.bits_per_second / 1e6,
            self.bits_per_second_late / 1e6,
        )
    }
}

const PINGS: usize = 21;
const WAIT: Duration = Duration::from_secs(10);

/// Measures the link from `from` to `to`, sending for about `length`.
pub fn measure(from: &Host, to: &Host, length: Duration) -> Result<Line, RigError> {
    let fail = || io_failed(format!("measure the link from {} to {}", from.name, to.name));
    let listener = to.namespace.run(|| TcpListener::bind((to.migration, 0)))?.map_err(fail())?;
    let address = listener.local_addr().map_err(fail())?;
    thread::scope(|scope| {
        let server = scope.spawn(move || serve(&listener, length));
        let sent = from.namespace.run(|| send(address, length))?.map_err(fail())?;
        let received = server.join().expect("the server returns its errors").map_err(fail())?;
        let (mut round_trips, total) = (sent, received);
        round_trips.sort();
        Ok(Line {
            round_trip_min: round_trips[0],
            round_trip_median: round_trips[PINGS / 2],
            bits_per_second: total.0,
            bits_per_second_late: total.1,
        })
    })
}

fn send(address: SocketAddr, length: Duration) -> io::Result<Vec<Duration>> {
    let mut stream = TcpStream::connect_timeout(&address, WAIT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(WAIT))?;
    stream.set_write_timeout(Some(WAIT))?;
    let mut round_trips = Vec::new();
    for _ in 0..PINGS {
        let start = Instant::now();
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        round_trips.push(start.elapsed());
    }
    let data = vec![0x5a; 256 * 1024];
    let start = Instant::now();
    while start.elapsed() < length {
        stream.write_all(&data)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // Until the other end has all of it.
    let _ = stream.read(&mut [0])?;
    Ok(round_trips)
}

/// Answers the pings, then counts. Returns bits per second of the whole, and of the second half.
fn serve(listener: &TcpListener, length: Duration) -> io::Result<(f64, f64)> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + WAIT;
    let mut stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(e) if e.kind() != io::ErrorKind::WouldBlock || Instant::now() > deadline => {
                return Err(e);
            }
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    };
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(WAIT))?;
    for _ in 0..PINGS {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)?;
    }
    let mut buffer = vec![0; 1 << 20];
    let (start, mut half) = (Instant::now(), None);
    let mut total = 0_u64;
    loop {
        let size = stream.read(&mut buffer)?;
        if size == 0 {
            break;
        }
        total += size as u64;
        if half.is_none() && start.elapsed() > length / 2 {
            half = Some((Instant::now(), total));
        }
    }
    let rate = |bytes: u64, since: Instant| bytes as f64 * 8.0 / since.elapsed().as_secs_f64();
    let whole = rate(total, start);
    Ok((whole, half.map_or(whole, |(since, before)| rate(total - before, since))))
}
