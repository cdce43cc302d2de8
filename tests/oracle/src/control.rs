//! The socket by which a running oracle is asked: one word a line in, one JSON object a line out.

use crate::{args::Args, print};
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Command as Process, ExitCode, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

/// Where `oracle run` listens.
pub(crate) const RUN_SOCKET: &str = "/run/oracle.sock";

/// Where `oracle outbound` listens.
pub(crate) const OUTBOUND_SOCKET: &str = "/run/oracle-outbound.sock";

/// How long an answer may take; a complete pass over a machine that arrives by faults is slow.
const ANSWER_LIMIT: Duration = Duration::from_secs(310);

/// How long a start in the background may take.
const START_LIMIT: Duration = Duration::from_secs(60);

/// What a running oracle understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Status,
    Verify,
    PauseWrites,
    ResumeWrites,
    Stop,
}

impl Command {
    fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "status" => Self::Status,
            "verify" => Self::Verify,
            "pause-writes" => Self::PauseWrites,
            "resume-writes" => Self::ResumeWrites,
            "stop" => Self::Stop,
            _ => return None,
        })
    }
}

/// Listens at `path` in the background and answers with `answer`.
pub(crate) fn serve(
    path: &Path,
    answer: impl Fn(Command) -> serde_json::Value + Send + Sync + 'static,
) -> Result<(), String> {
    let context = |error: io::Error| format!("{}: {error}", path.display());
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(context(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(context)?;
    let answer = Arc::new(answer);
    let accept = move || {
        loop {
            let Ok((stream, _)) = listener.accept() else {
                // Out of descriptors, perhaps: better later than never.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            let answer = Arc::clone(&answer);
            let one = move || {
                // A client that goes away is its own business.
                let _ = answer_one(&stream, &*answer);
            };
            let _ = std::thread::Builder::new().spawn(one);
        }
    };
    std::thread::Builder::new().name("socket".into()).spawn(accept).map(drop).map_err(context)
}

fn answer_one(
    stream: &UnixStream,
    answer: &dyn Fn(Command) -> serde_json::Value,
) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    let mut word = String::new();
    BufReader::new(stream.take(64)).read_line(&mut word)?;
    let reply = match Command::parse(word.trim()) {
        Some(command) => answer(command),
        None => serde_json::json!({"ok": false, "problem": "no such command"}),
    };
    let mut stream = stream;
    stream.write_all(format!("{reply}\n").as_bytes())
}

fn request(socket: &Path, word: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    stream.write_all(format!("{word}\n").as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// The commands that ask a running oracle.
pub(crate) fn ask(word: &str, mut args: Args) -> Result<ExitCode, String> {
    let socket: PathBuf = args.or("socket", RUN_SOCKET.into())?;
    args.end()?;
    let text = request(&socket, word).map_err(|error| {
        format!("no oracle answers at {}: {error}; start one with oracle run", socket.display())
    })?;
    print(&text);
    if word == "stop" {
        return Ok(ExitCode::SUCCESS);
    }
    let json: serde_json::Value = serde_json::from_str(&text)
        .map_err(|error| format!("the oracle at {} said nonsense: {error}", socket.display()))?;
    Ok(if json["ok"] == true { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Starts this very command again without `--background`, and waits until it answers.
pub(crate) fn run_in_background(socket: &Path) -> Result<ExitCode, String> {
    use std::os::unix::process::CommandExt;
    let me = std::env::current_exe().map_err(|error| format!("no path to myself: {error}"))?;
    let words = std::env::args_os().skip(1).filter(|word| word != "--background");
    // An old oracle at this socket must not answer for the new one.
    let _ = std::fs::remove_file(socket);
    let mut child = Process::new(me)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|error| format!("cannot start in the background: {error}"))?;
    let deadline = Instant::now() + START_LIMIT;
    loop {
        if let Ok(text) = request(socket, "status") {
            print(&text);
            return Ok(ExitCode::SUCCESS);
        }
        match child.try_wait() {
            Ok(None) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(None) => {
                let _ = child.kill();
                return Err(format!("did not come up within {START_LIMIT:?}"));
            }
            Ok(Some(status)) => return Err(format!("ended while starting: {status}")),
            Err(error) => return Err(format!("lost sight of the child: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_reaches_the_oracle_and_nonsense_is_answered() {
        let path = std::env::temp_dir().join(format!("oracle-socket-{}", std::process::id()));
        serve(&path, |command| serde_json::json!({"ok": command == Command::Verify})).unwrap();
        assert_eq!(request(&path, "verify").unwrap(), "{\"ok\":true}\n");
        assert_eq!(request(&path, "status").unwrap(), "{\"ok\":false}\n");
        assert!(request(&path, "dance").unwrap().contains("no such command"));
        // Cut off at some length; whatever that client sees, the next one is served.
        let _ = request(&path, &"x".repeat(5000));
        assert_eq!(request(&path, "verify").unwrap(), "{\"ok\":true}\n");
        std::fs::remove_file(&path).unwrap();
    }
}
