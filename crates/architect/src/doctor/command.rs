//! Runs a short command with a deadline.

use std::{
    fs::File,
    io::{self, Read, Seek},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// What a command said, on both outputs, when it succeeded. The error is its complaint, or why
/// there is none.
pub(super) fn run(program: &str, arguments: &[&str], limit: Duration) -> Result<String, String> {
    let fail = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => format!("{program} is not installed"),
        _ => format!("{program}: {error}"),
    };
    // A file and not a pipe: nothing to drain, no size at which the command would block.
    let mut output = tempfile::tempfile().map_err(fail)?;
    let copy = |file: &File| file.try_clone().map(Stdio::from).map_err(fail);
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(copy(&output)?)
        .stderr(copy(&output)?)
        .spawn()
        .map_err(fail)?;
    let deadline = Instant::now() + limit;
    let status = loop {
        match child.try_wait().map_err(fail)? {
            Some(status) => break status,
            None if Instant::now() >= deadline => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{program} did not end within {limit:?}"));
            }
            None => sleep(Duration::from_millis(2)),
        }
    };
    let mut bytes = Vec::new();
    output.rewind().and_then(|()| output.read_to_end(&mut bytes)).map_err(fail)?;
    let text = String::from_utf8_lossy(&bytes).trim().to_owned();
    if status.success() {
        return Ok(text);
    }
    let last = text.lines().last().unwrap_or("no message");
    Err(format!("{program} {}: {last} ({status})", arguments.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_hangs_is_ended_at_its_deadline() {
        let started = Instant::now();
        let error = run("sleep", &["60"], Duration::from_millis(50)).unwrap_err();
        assert!(error.contains("did not end within 50ms"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_failure_is_told_by_its_last_line_and_an_absent_program_by_name() {
        let error =
            run("sh", &["-c", "echo a; echo no such thing >&2; exit 3"], Duration::from_secs(5));
        assert!(error.unwrap_err().contains("no such thing (exit status: 3)"));
        let error = run("no-such-program", &[], Duration::from_secs(5)).unwrap_err();
        assert_eq!(error, "no-such-program is not installed");
    }
}
