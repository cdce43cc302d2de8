//! Asking a host for a runner that takes a machine.
//!
//! ```text
//!   source's runner                              reception of the other host (`receive --any`)
//!   Ask { host, machine } ─────────────────────▶ may it? is one there? else: starts one
//!                          ◀──────────── Answer  where that runner listens, or why there is none
//! ```
//!
//! One line of JSON each way, over a connection as every other between hosts (mutual TLS, or plaintext
//! where that was asked for). The runner then decides about the machine as if somebody had started it by
//! hand: nothing that is asked here moves anything.

use super::link::CONNECT_LIMIT;
use identity::{HostName, Security, Stream};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    io::{Read, Write},
    net::SocketAddr,
    time::{Duration, Instant},
};

/// How long a host may take to start a runner.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// How long all of [`ask`] may take.
pub const ASK_LIMIT: Duration =
    Duration::from_secs(CONNECT_LIMIT.as_secs() + ANSWER_LIMIT.as_secs());
/// A longer line is nobody's.
const MAX_LINE: usize = 4096;

/// What a source asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The host that asks; with certificates, the one in its certificate.
    pub host: String,
    /// The machine that is to move.
    pub machine: String,
}

/// What the other host says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// A runner waits for the machine there.
    Runner(SocketAddr),
    /// There is none, and why.
    Refused(String),
}

/// Writes one line.
///
/// # Errors
/// If the peer does not take it.
pub fn say(stream: &mut Stream, message: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    stream.flush()
}

/// Reads one line, all of it within `limit`. Nothing follows it.
///
/// # Errors
/// A sentence for people: nothing came in time, or something else than a line of ours.
pub fn hear<T: DeserializeOwned>(stream: &mut Stream, limit: Duration) -> Result<T, String> {
    let deadline = Instant::now() + limit;
    let mut heard = Vec::new();
    let mut piece = [0; 512];
    while !heard.contains(&b'\n') && heard.len() < MAX_LINE {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("it has not finished its line within {limit:?}"));
        }
        stream.control().set_read_timeout(Some(left));
        match stream.read(&mut piece).map_err(|error| error.to_string())? {
            0 => break,
            read => heard.extend_from_slice(&piece[..read]),
        }
    }
    match heard.split(|&byte| byte == b'\n').next() {
        Some(line) if line.len() < heard.len() => {
            serde_json::from_slice(line).map_err(|error| error.to_string())
        }
        _ if heard.is_empty() => Err("it hung up without a word".into()),
        _ => Err(format!("a line that does not end within {MAX_LINE} bytes")),
    }
}

/// Asks the host `peer` at `address` for a runner that takes `machine`; where that listens.
///
/// # Errors
/// A sentence for people: who cannot be reached, or why there is none.
pub fn ask(
    address: SocketAddr,
    peer: &HostName,
    security: &Security,
    ask: &Ask,
) -> Result<SocketAddr, String> {
    let wrong =
        |error: String| format!("asking host \"{peer}\" at {address} for a runner: {error}");
    let mut stream = Stream::connect(address, peer, security, CONNECT_LIMIT)
        .map_err(|error| wrong(error.to_string()))?;
    say(&mut stream, ask).map_err(|error| wrong(error.to_string()))?;
    match hear(&mut stream, ANSWER_LIMIT).map_err(wrong)? {
        // One that listens everywhere is where it was asked for.
        Answer::Runner(found) if found.ip().is_unspecified() => {
            Ok(SocketAddr::new(address.ip(), found.port()))
        }
        Answer::Runner(found) => Ok(found),
        Answer::Refused(why) => Err(format!("host \"{peer}\" takes no machine: {why}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn name(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    /// What a source makes of a host that answers so.
    fn answered(answer: &'static [u8]) -> Result<SocketAddr, String> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let host = std::thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            let mut stream = Stream::server(socket, &Security::Plaintext, CONNECT_LIMIT).unwrap();
            let heard: Ask = hear(&mut stream, CONNECT_LIMIT).unwrap();
            let _ = stream.write_all(answer).and_then(|()| stream.flush());
            heard
        });
        let asked = Ask { host: "a".into(), machine: "redis".into() };
        let found = ask(address, &name("b"), &Security::Plaintext, &asked);
        assert_eq!(host.join().unwrap(), asked);
        found
    }

    #[test]
    fn a_source_hears_where_a_runner_is_or_why_there_is_none_and_believes_nothing_else() {
        assert_eq!(
            answered(b"{\"runner\":\"10.0.0.2:7500\"}\n").unwrap(),
            "10.0.0.2:7500".parse().unwrap()
        );
        // One that listens everywhere.
        assert_eq!(
            answered(b"{\"runner\":\"0.0.0.0:7500\"}\n").unwrap(),
            "127.0.0.1:7500".parse().unwrap()
        );
        let refused = answered(b"{\"refused\":\"it is full\"}\n").unwrap_err();
        assert!(refused.contains("\"b\" takes no machine: it is full"), "{refused}");
        let too_long: &[u8] = Box::leak(vec![b'x'; 10_000].into_boxed_slice());
        for (bad, what) in [
            (&b"{\"runner\":\"10.0.0.2\"}\n"[..], "invalid socket address"),
            (b"{}\n", "expected value"),
            (b"", "without a word"),
            (b"{\"runner\":", "does not end"),
            (too_long, "does not end within 4096 bytes"),
        ] {
            let why = answered(bad).unwrap_err();
            assert!(why.contains(what), "{}: {why}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn a_host_that_is_not_there_is_named() {
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let asked = Ask { host: "a".into(), machine: "redis".into() };
        let why = ask(nobody, &name("b"), &Security::Plaintext, &asked).unwrap_err();
        assert!(why.contains(&nobody.to_string()) && why.contains("\"b\""), "{why}");
    }
}
