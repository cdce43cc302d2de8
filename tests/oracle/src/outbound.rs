//! A TCP connection that the guest has begun: numbers go out and must come back in order.

use crate::{args::Args, control, print};
use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How long one number may take before the connection counts as broken.
const ECHO_LIMIT: Duration = Duration::from_secs(60);

const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// What became of the connection.
#[derive(Clone, Debug, Default, serde::Serialize)]
struct Report {
    connected: bool,
    /// Numbers sent.
    sent: u64,
    /// Numbers that came back as sent.
    echoed: u64,
    /// Numbers that came back wrong: lost, doubled or changed bytes.
    wrong: u64,
    /// Times an established connection ended, by reset, end or timeout.
    resets: u64,
    /// Tries that did not connect.
    refused: u64,
    /// Longest time from sending a number to its return, in microseconds of the guest's clock.
    longest_gap_us: u64,
    last_error: Option<String>,
}

pub(crate) fn run(mut args: Args) -> Result<ExitCode, String> {
    let to: SocketAddr = args.required("to")?;
    let interval = Duration::from_millis(args.or("interval-ms", 10)?);
    let socket: PathBuf = args.or("socket", control::OUTBOUND_SOCKET.into())?;
    let background = args.flag("background");
    args.end()?;
    if background {
        return control::run_in_background(&socket);
    }
    let report = Arc::new(Mutex::new(Report::default()));
    let for_socket = Arc::clone(&report);
    control::serve(&socket, move |command| {
        if command == control::Command::Stop {
            std::process::exit(0);
        }
        let report = lock(&for_socket).clone();
        let ok = report.resets == 0 && report.wrong == 0 && report.echoed > 0;
        let mut json = serde_json::to_value(&report).unwrap_or_default();
        json["ok"] = ok.into();
        json
    })?;
    loop {
        let error = converse(to, interval, &report);
        let mut now = lock(&report);
        if std::mem::take(&mut now.connected) {
            now.resets += 1;
        } else {
            now.refused += 1;
        }
        now.last_error = Some(error.to_string());
        drop(now);
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn lock(report: &Mutex<Report>) -> MutexGuard<'_, Report> {
    // Counters are whole between statements, whoever panicked.
    report.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection to its end; returns why it ended.
fn converse(to: SocketAddr, interval: Duration, report: &Mutex<Report>) -> io::Error {
    let talk = || -> io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&to, CONNECT_LIMIT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ECHO_LIMIT))?;
        stream.set_write_timeout(Some(ECHO_LIMIT))?;
        lock(report).connected = true;
        loop {
            let number = {
                let mut report = lock(report);
                report.sent += 1;
                report.sent
            };
            let sent = Instant::now();
            stream.write_all(&number.to_be_bytes())?;
            let mut back = [0; 8];
            stream.read_exact(&mut back)?;
            let gap = sent.elapsed();
            let mut report = lock(report);
            if back == number.to_be_bytes() {
                report.echoed += 1;
            } else {
                report.wrong += 1;
            }
            report.longest_gap_us = report.longest_gap_us.max(gap.as_micros() as u64);
            drop(report);
            std::thread::sleep(interval.saturating_sub(gap));
        }
    };
    talk().err().unwrap_or_else(|| io::Error::other("ended"))
}

/// The other end: sends back what comes, on every connection.
pub(crate) fn echo(mut args: Args) -> Result<ExitCode, String> {
    let at: SocketAddr = args.required("listen")?;
    args.end()?;
    let listener = TcpListener::bind(at).map_err(|error| format!("{at}: {error}"))?;
    let address = listener.local_addr().map_err(|error| format!("{at}: {error}"))?;
    print(&format!("listening on {address}\n"));
    loop {
        let Ok((stream, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        let _ = std::thread::Builder::new().spawn(move || echo_one(stream));
    }
}

fn echo_one(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read) = stream.read(&mut buffer) {
        if read == 0 || stream.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = stream.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait_for(report: &Mutex<Report>, what: impl Fn(&Report) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !what(&lock(report)) {
            assert!(Instant::now() < deadline, "{:?}", lock(report));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn numbers_come_back_and_a_closed_connection_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let report = Mutex::new(Report::default());
        std::thread::scope(|scope| {
            let talk = scope.spawn(|| converse(to, Duration::from_millis(1), &report));
            let (stream, _) = listener.accept().unwrap();
            let closer = stream.try_clone().unwrap();
            scope.spawn(move || echo_one(stream));
            wait_for(&report, |report| report.echoed >= 20);
            closer.shutdown(Shutdown::Both).unwrap();
            talk.join().unwrap();
        });
        let report = lock(&report);
        assert!(report.connected && report.wrong == 0);
        assert!(report.sent - report.echoed <= 1, "{report:?}");
    }

    #[test]
    fn a_number_that_comes_back_changed_is_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let report = Mutex::new(Report::default());
        std::thread::scope(|scope| {
            scope.spawn(|| converse(to, Duration::from_millis(1), &report));
            let (mut stream, _) = listener.accept().unwrap();
            let mut number = [0; 8];
            stream.read_exact(&mut number).unwrap();
            stream.write_all(&(u64::from_be_bytes(number) - 1).to_be_bytes()).unwrap();
            wait_for(&report, |report| report.wrong == 1);
            assert_eq!(lock(&report).echoed, 0);
        });
    }
}
