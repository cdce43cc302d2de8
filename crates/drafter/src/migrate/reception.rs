//! Asking a host for a runner that takes a machine, to wake a machine that sleeps in a store, or what it has
//! to offer.
//!
//! ```text
//!   source's runner                              reception of the other host (`receive --any`)
//!   Ask { host, machine } ─────────────────────▶ may it? is one there? else: starts one
//!                          ◀──────────── Answer  where that runner listens, or why there is none
//!
//!   `drafter evacuate`                           the same (`receive --any --store`)
//!   Wake { Ask } ──────────────────────────────▶ may it? wakes it, from the store that it was given itself
//!                          ◀──────────── Answer  where its runner listens, once it runs; or why it does not
//!   Look { host } ─────────────────────────────▶ may it?
//!                          ◀──────────── Answer  how much room there is, and whether it was given a store
//! ```
//!
//! One line of JSON each way, over a connection as every other between hosts (mutual TLS, or plaintext
//! where that was asked for). The runner then decides about the machine as if somebody had started it by
//! hand: nothing that is asked here moves anything, and a machine is woken by its lease alone, once. No
//! store, key or path is named: each host has its own.

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
/// How long a host may take to say what it has.
const LOOK_LIMIT: Duration = Duration::from_secs(5);
/// What is wrong with an answer to another question.
const OTHER: &str = "it answered something else";
/// How long a host may take to wake a machine.
const WAKE_LIMIT: Duration = Duration::from_secs(90);
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

/// The other thing that is asked: that a machine runs again which that host put to sleep. (A host that
/// does not know it yet says that a field is missing, and starts nothing.)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wake {
    /// Who asks, and for which machine.
    pub wake: Ask,
}

/// The third thing that is asked, before anything is planned: what a host has to offer. (One that does not
/// know it yet says that a field is missing.)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// Who asks.
    pub look: LookFor,
}

/// See [`Look`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LookFor {
    /// The host that asks; with certificates, the one in its certificate.
    pub host: String,
}

/// What a host was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// For a runner that takes a machine.
    ToTake(Ask),
    /// To wake one.
    ToWake(Ask),
    /// What it has to offer, and by whom.
    ToLook(String),
}

impl Asked {
    /// Reads it, within `limit`.
    ///
    /// # Errors
    /// As [`hear`].
    pub fn hear(stream: &mut Stream, limit: Duration) -> Result<Self, String> {
        let said: serde_json::Value = hear(stream, limit)?;
        let asked = if said.get("wake").is_some() {
            serde_json::from_value::<Wake>(said).map(|asked| Self::ToWake(asked.wake))
        } else if said.get("look").is_some() {
            serde_json::from_value::<Look>(said).map(|asked| Self::ToLook(asked.look.host))
        } else {
            serde_json::from_value(said).map(Self::ToTake)
        };
        asked.map_err(|error| error.to_string())
    }
}

/// What the other host says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// A runner waits for the machine there; or the machine, which was to be woken, runs there.
    Runner(SocketAddr),
    /// There is none, and why.
    Refused(String),
    /// What it has to offer.
    Offers(Offers),
}

/// What a host has for machines that come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offers {
    /// Memory that is available there, bytes (MemAvailable of /proc/meminfo).
    pub memory_bytes: u64,
    /// It was given a store, and brings what is there of machines that come.
    pub store: bool,
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
    match answer((address, peer), security, ask, ANSWER_LIMIT).map_err(&wrong)? {
        Answer::Runner(found) => Ok(found),
        Answer::Refused(why) => Err(format!("host \"{peer}\" takes no machine: {why}")),
        Answer::Offers(_) => Err(wrong(OTHER.into())),
    }
}

/// Asks the host `peer` at `address` what it has to offer to `host`.
///
/// # Errors
/// A sentence for people: who cannot be reached, or why it does not say.
pub fn look(
    address: SocketAddr,
    peer: &HostName,
    security: &Security,
    host: String,
) -> Result<Offers, String> {
    let wrong = |error: String| format!("asking host \"{peer}\" at {address} what it has: {error}");
    let question = Look { look: LookFor { host } };
    match answer((address, peer), security, &question, LOOK_LIMIT).map_err(&wrong)? {
        Answer::Offers(offers) => Ok(offers),
        Answer::Refused(why) => Err(wrong(why)),
        Answer::Runner(_) => Err(wrong(OTHER.into())),
    }
}

/// Asks the host `peer` at `address` to wake a machine that sleeps in a store, and waits until it runs
/// there.
///
/// # Errors
/// A sentence for people: who cannot be reached, or why it does not run there.
pub fn wake(
    address: SocketAddr,
    peer: &HostName,
    security: &Security,
    ask: Ask,
) -> Result<(), String> {
    let wrong =
        |error: String| format!("asking host \"{peer}\" at {address} to wake the machine: {error}");
    match answer((address, peer), security, &Wake { wake: ask }, WAKE_LIMIT).map_err(&wrong)? {
        Answer::Runner(_) => Ok(()),
        Answer::Refused(why) => Err(format!("host \"{peer}\" does not wake it: {why}")),
        Answer::Offers(_) => Err(wrong(OTHER.into())),
    }
}

/// What a host says to one question.
fn answer(
    (address, peer): (SocketAddr, &HostName),
    security: &Security,
    question: &impl Serialize,
    limit: Duration,
) -> Result<Answer, String> {
    let mut stream = Stream::connect(address, peer, security, CONNECT_LIMIT)
        .map_err(|error| error.to_string())?;
    say(&mut stream, question).map_err(|error| error.to_string())?;
    Ok(match hear(&mut stream, limit)? {
        // One that listens everywhere is where it was asked for.
        Answer::Runner(found) if found.ip().is_unspecified() => {
            Answer::Runner(SocketAddr::new(address.ip(), found.port()))
        }
        other => other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{net::TcpListener, thread::JoinHandle};

    fn name(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    /// A host that answers so, and what it was asked.
    fn host(answer: &'static [u8]) -> (SocketAddr, JoinHandle<Result<Asked, String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let host = std::thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            let mut stream = Stream::server(socket, &Security::Plaintext, CONNECT_LIMIT).unwrap();
            let heard = Asked::hear(&mut stream, CONNECT_LIMIT);
            let _ = stream.write_all(answer).and_then(|()| stream.flush());
            heard
        });
        (address, host)
    }

    fn redis() -> Ask {
        Ask { host: "a".into(), machine: "redis".into() }
    }

    /// What a source makes of a host that answers so.
    fn answered(answer: &'static [u8]) -> Result<SocketAddr, String> {
        let (address, host) = host(answer);
        let found = ask(address, &name("b"), &Security::Plaintext, &redis());
        assert_eq!(host.join().unwrap().unwrap(), Asked::ToTake(redis()));
        found
    }

    #[test]
    fn a_host_knows_a_runner_from_a_waking_and_whoever_wakes_hears_why_it_does_not_run() {
        for (answer, why) in [
            (&b"{\"runner\":\"10.0.0.2:7500\"}\n"[..], ""),
            (b"{\"refused\":\"it has no store\"}\n", "\"b\" does not wake it: it has no store"),
            (b"{}\n", "asking host \"b\" at 127.0.0.1"),
        ] {
            let (address, host) = host(answer);
            let woken = wake(address, &name("b"), &Security::Plaintext, redis());
            assert_eq!(host.join().unwrap().unwrap(), Asked::ToWake(redis()));
            match woken {
                Ok(()) => assert_eq!(why, ""),
                Err(said) => assert!(!why.is_empty() && said.contains(why), "{said}"),
            }
        }
        for (bad, what) in [
            (&b"{\"wake\":1}\n"[..], "invalid type"),
            (b"{\"wake\":{\"host\":\"a\"}}\n", "missing field `machine`"),
            (b"[]\n", "invalid"),
        ] {
            let (address, host) = host(b"{}\n");
            let mut stream =
                Stream::connect(address, &name("b"), &Security::Plaintext, CONNECT_LIMIT).unwrap();
            stream.write_all(bad).and_then(|()| stream.flush()).unwrap();
            let why = host.join().unwrap().unwrap_err();
            assert!(why.contains(what), "{why}");
        }
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
    fn a_host_says_what_it_has_and_one_that_does_not_know_the_question_offers_nothing() {
        let looks = |said: &'static [u8]| {
            let (address, host) = host(said);
            let found = look(address, &name("b"), &Security::Plaintext, "a".into());
            assert_eq!(host.join().unwrap().unwrap(), Asked::ToLook("a".into()));
            found
        };
        let offers = looks(b"{\"offers\":{\"memory_bytes\":4096,\"store\":true}}\n").unwrap();
        assert_eq!(offers, Offers { memory_bytes: 4096, store: true });
        for (bad, what) in [
            (&b"{\"refused\":\"missing field `host`\"}\n"[..], "missing field"),
            (b"{\"runner\":\"10.0.0.2:7500\"}\n", OTHER),
            (b"{\"offers\":{}}\n", "missing field"),
        ] {
            let why = looks(bad).unwrap_err();
            assert!(why.contains(what) && why.contains("\"b\""), "{why}");
        }
        assert!(answered(b"{\"offers\":{\"memory_bytes\":1,\"store\":false}}\n").is_err());
    }

    #[test]
    fn a_host_that_is_not_there_is_named() {
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let why = ask(nobody, &name("b"), &Security::Plaintext, &redis()).unwrap_err();
        assert!(why.contains(&nobody.to_string()) && why.contains("\"b\""), "{why}");
    }
}
