//! Flows whose other end is outside: a server of datagrams, a sink of a stream, a download that the
//! guest begins. What a move does to a flow is judged outside, by a clock that does not stand still with
//! the guest; here it is counted and hashed.

use crate::{args::Args, control};
use nix::sys::socket::{setsockopt, sockopt};
use std::{
    hash::Hasher,
    io::{self, Read},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use twox_hash::XxHash3_64;

/// Where each listens for questions, unless told otherwise.
const ANSWER_SOCKET: &str = "/run/oracle-answer.sock";
const SINK_SOCKET: &str = "/run/oracle-sink.sock";
const DOWNLOAD_SOCKET: &str = "/run/oracle-download.sock";
/// Bytes that may wait for the server of datagrams.
const BUFFER: usize = 4 << 20;
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// What became of a flow.
#[derive(Clone, Debug, Default, serde::Serialize)]
struct Report {
    /// Datagrams answered.
    answered: u64,
    /// Bytes of streams that came.
    bytes: u64,
    /// XXH3-64 of the last stream, once it has ended.
    hash: Option<String>,
    /// What ended a stream before its end.
    error: Option<String>,
}

type Shared = Arc<Mutex<Report>>;

fn lock(report: &Mutex<Report>) -> MutexGuard<'_, Report> {
    // Counters are whole between statements, whoever panicked.
    report.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers questions about the report on the socket.
fn serve(socket: &std::path::Path) -> Result<Shared, String> {
    let report = Shared::default();
    let told = Arc::clone(&report);
    control::serve(socket, move |command| {
        if command == control::Command::Stop {
            std::process::exit(0);
        }
        let report = lock(&told).clone();
        let ok = report.error.is_none();
        let mut json = serde_json::to_value(&report).unwrap_or_default();
        json["ok"] = ok.into();
        json
    })?;
    Ok(report)
}

/// Sends every datagram back to where it came from.
pub(crate) fn answer(mut args: Args) -> Result<ExitCode, String> {
    let at: SocketAddr = args.required("listen")?;
    let path: PathBuf = args.or("socket", ANSWER_SOCKET.into())?;
    let background = args.flag("background");
    args.end()?;
    if background {
        return control::run_in_background(&path);
    }
    let socket = UdpSocket::bind(at).map_err(|error| format!("{at}: {error}"))?;
    // What is asked about is the network: a translated guest that is kept from its processor for a while
    // must not lose by its own socket's size what the network has brought.
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)
        .map_err(|error| format!("{at}: a larger buffer: {error}"))?;
    let report = serve(&path)?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        // An error is an earlier answer's (its port is closed), not this question's.
        let Ok((size, from)) = socket.recv_from(&mut buffer) else { continue };
        if socket.send_to(&buffer[..size], from).is_ok() {
            lock(&report).answered += 1;
        }
    }
}

/// Takes whatever comes, on every connection.
pub(crate) fn sink(mut args: Args) -> Result<ExitCode, String> {
    let at: SocketAddr = args.required("listen")?;
    let path: PathBuf = args.or("socket", SINK_SOCKET.into())?;
    let background = args.flag("background");
    args.end()?;
    if background {
        return control::run_in_background(&path);
    }
    let listener = TcpListener::bind(at).map_err(|error| format!("{at}: {error}"))?;
    let report = serve(&path)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                let report = Arc::clone(&report);
                let _ = std::thread::Builder::new().spawn(move || swallow(stream, &report));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// Connects, and takes what comes to its end.
pub(crate) fn download(mut args: Args) -> Result<ExitCode, String> {
    let from: SocketAddr = args.required("from")?;
    let path: PathBuf = args.or("socket", DOWNLOAD_SOCKET.into())?;
    let background = args.flag("background");
    args.end()?;
    if background {
        return control::run_in_background(&path);
    }
    let stream = TcpStream::connect_timeout(&from, CONNECT_LIMIT)
        .map_err(|error| format!("{from}: {error}"))?;
    let report = serve(&path)?;
    swallow(stream, &report);
    // Whoever began it asks for the result.
    loop {
        std::thread::park();
    }
}

fn swallow(mut stream: TcpStream, report: &Mutex<Report>) {
    match hash_to_the_end(&mut stream, report) {
        Ok(hash) => lock(report).hash = Some(format!("{hash:016x}")),
        Err(error) => lock(report).error = Some(error.to_string()),
    }
}

fn hash_to_the_end(from: &mut impl Read, report: &Mutex<Report>) -> io::Result<u64> {
    let mut hash = XxHash3_64::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(hash.finish()),
            Ok(size) => {
                hash.write(&buffer[..size]);
                lock(report).bytes += size as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_stream_is_counted_and_hashed_to_its_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let sent = vec![7; 100_000];
        let report = Mutex::new(Report::default());
        std::thread::scope(|scope| {
            scope.spawn(|| TcpStream::connect(to).unwrap().write_all(&sent).unwrap());
            swallow(listener.accept().unwrap().0, &report);
        });
        let expected = format!("{:016x}", XxHash3_64::oneshot(&sent));
        let report = lock(&report);
        assert_eq!((report.bytes, report.hash.clone()), (100_000, Some(expected)));
    }

    #[test]
    fn a_stream_that_is_reset_has_no_hash_and_says_why() {
        struct Reset;
        impl Read for Reset {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::ConnectionReset.into())
            }
        }
        assert!(hash_to_the_end(&mut Reset, &Mutex::default()).is_err());
    }
}
