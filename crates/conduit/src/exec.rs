//! Runs `ip` and `nft`, for set-up that happens once per host or machine; never on the way of a
//! move. Each run has a deadline, and a failure carries the command's own words.

use std::{
    io::{Read, Write},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How long one command may take. They take milliseconds, except when the kernel is busy taking
/// down other namespaces (10 s were seen on an overloaded computer).
const LIMIT: Duration = Duration::from_secs(30);

/// A kernel operation that failed: what was attempted on what, and why.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{operation}: {detail}")]
pub struct KernelError {
    /// What was attempted, with the interface, address or table.
    pub operation: String,
    /// The cause.
    pub detail: String,
}

impl KernelError {
    /// An error with its cause in words.
    #[allow(clippy::needless_pass_by_value, reason = "callers hand over text or an error")]
    pub fn new(operation: impl Into<String>, detail: impl ToString) -> Self {
        Self { operation: operation.into(), detail: detail.to_string() }
    }
}

/// Runs `program` with `args` in the calling thread's network namespace, gives it `input`, and
/// returns what it printed.
pub fn run(program: &str, args: &[&str], input: &str) -> Result<String, KernelError> {
    let operation = || format!("run `{program} {}`", args.join(" "));
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => KernelError::new(
                operation(),
                format!("{program} is not installed (Debian: apt install iproute2 nftables wireguard-tools)"),
            ),
            _ => KernelError::new(operation(), e),
        })?;
    let mut stdin = child.stdin.take().expect("stdin was asked to be a pipe");
    let input = input.to_owned();
    // A child that does not read ends at the deadline, which closes the pipe and ends the thread.
    let writer = thread::spawn(move || stdin.write_all(input.as_bytes()));
    let out = collect(child.stdout.take().expect("stdout was asked to be a pipe"));
    let err = collect(child.stderr.take().expect("stderr was asked to be a pipe"));

    let deadline = Instant::now() + LIMIT;
    let mut pause = Duration::from_micros(200);
    let status = loop {
        match child.try_wait().map_err(|e| KernelError::new(operation(), e))? {
            Some(status) => break status,
            None if Instant::now() >= deadline => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(KernelError::new(operation(), format!("no end within {LIMIT:?}")));
            }
            None => {
                thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(5));
            }
        }
    };
    let _ = writer.join();
    let (out, err) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
    if status.success() {
        return Ok(out);
    }
    Err(KernelError::new(operation(), format!("{status}: {}", err.trim())))
}

fn collect(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Writes one of the kernel's settings below `/proc/sys` (of this thread's network namespace).
pub(crate) fn sysctl(key: &str, value: &str) -> Result<(), KernelError> {
    std::fs::write(format!("/proc/sys/{key}"), value)
        .map_err(|e| KernelError::new(format!("set {key} to {value}"), e))
}

/// Reads a setting; `None` if this kernel does not have it.
pub(crate) fn read_sysctl(key: &str) -> Option<String> {
    std::fs::read_to_string(format!("/proc/sys/{key}")).ok().map(|s| s.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_reported_in_its_own_words() {
        let error = run("sh", &["-c", "echo no such table >&2; exit 3"], "").unwrap_err();
        assert!(error.to_string().contains("no such table"), "{error}");
        assert!(error.to_string().contains("sh -c"), "{error}");
    }

    #[test]
    fn a_missing_program_says_what_to_install() {
        let error = run("no-such-program-here", &[], "").unwrap_err();
        assert!(error.to_string().contains("not installed"), "{error}");
    }

    #[test]
    fn input_reaches_the_command_and_output_comes_back() {
        assert_eq!(run("cat", &[], "a\nb\n").unwrap(), "a\nb\n");
    }
}
