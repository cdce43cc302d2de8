//! Runs the few programs that a build needs, each with a deadline.

use crate::package::error::{PackageError, Result};
use std::{
    io::{ErrorKind, Read},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Lines of a failed program's error output that are shown.
const SHOWN_LINES: usize = 6;

/// Most output that is kept of a program.
const MAX_OUTPUT: u64 = 256 << 20;

/// A program and what to say when it fails.
pub(crate) struct Tool {
    /// What it is used for, as in `asking apt for redis-server`.
    pub(crate) operation: String,
    /// The Debian package that has it.
    pub(crate) package: &'static str,
    /// How to go on when it fails.
    pub(crate) hint: &'static str,
    /// How long it may take.
    pub(crate) limit: Duration,
}

/// What a program wrote.
pub(crate) struct Output {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

impl Tool {
    /// Runs `command` to a successful end.
    ///
    /// # Errors
    /// When it is not installed, fails, or takes too long (it is killed then).
    pub(crate) fn run(&self, command: &mut Command) -> Result<Output> {
        let program = command.get_program().to_string_lossy().into_owned();
        let failed = |status: String, detail: String| PackageError::Tool {
            operation: self.operation.clone(),
            program: program.clone(),
            status,
            detail,
            hint: self.hint,
        };
        command
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                PackageError::ToolMissing { program: program.clone(), package: self.package }
            }
            _ => failed("did not start".to_owned(), error.to_string()),
        })?;
        let stdout = collect(child.stdout.take());
        let stderr = collect(child.stderr.take());
        let status = self.wait(&mut child)?;
        let output = Output {
            stdout: stdout.join().unwrap_or_default(),
            stderr: stderr.join().unwrap_or_default(),
        };
        if status.success() {
            return Ok(output);
        }
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let lines: Vec<&str> = text.lines().collect();
        let detail = lines[lines.len().saturating_sub(SHOWN_LINES)..].join("; ");
        Err(failed(
            status.to_string(),
            if detail.is_empty() { "no message".into() } else { detail },
        ))
    }

    fn wait(&self, child: &mut Child) -> Result<std::process::ExitStatus> {
        let begin = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            let wait = child.try_wait().map_err(|source| PackageError::Io {
                operation: format!("{}: waiting for its end", self.operation),
                source,
            });
            if let Some(status) = wait? {
                return Ok(status);
            }
            if begin.elapsed() > self.limit {
                // It may have ended just now; then there is nothing to kill.
                let _ = child.kill();
                let _ = child.wait();
                return Err(PackageError::Timeout {
                    operation: self.operation.clone(),
                    limit: self.limit,
                    hint: self.hint.to_owned(),
                });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
}

fn collect(stream: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut content = Vec::new();
        if let Some(stream) = stream {
            // What was read before an error is still worth showing.
            let _ = stream.take(MAX_OUTPUT).read_to_end(&mut content);
        }
        content
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(limit: Duration) -> Tool {
        Tool { operation: "trying a tool".into(), package: "dash", hint: "try again", limit }
    }

    #[test]
    fn a_program_that_hangs_is_ended_at_its_deadline() {
        let begin = Instant::now();
        let error =
            tool(Duration::from_millis(100)).run(Command::new("sleep").arg("60")).err().unwrap();
        assert!(matches!(error, PackageError::Timeout { .. }), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_failure_says_what_was_attempted_and_what_the_program_said() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo no room >&2; exit 3"]);
        let text = tool(Duration::from_secs(20)).run(&mut command).err().unwrap().to_string();
        for part in ["trying a tool", "no room", "3", "try again"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_missing_program_is_named_with_the_package_that_has_it() {
        let error = tool(Duration::from_secs(20))
            .run(&mut Command::new("drafter-no-such-program"))
            .err()
            .unwrap();
        assert!(error.to_string().contains("apt-get install dash"), "{error}");
    }
}
