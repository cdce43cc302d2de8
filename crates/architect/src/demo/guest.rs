//! The oracle inside the machine: what it is told, and what it answers.

use super::package::ORACLE;
use crate::{
    fleet::Runner,
    table::{Oracle, Outbound},
};
use anyhow::{Context as _, bail};
use serde::{Deserialize, de::DeserializeOwned};
use std::{net::SocketAddr, time::Duration};

/// How long it may take to fill its memory for the first time, on a translated guest.
const START_LIMIT: Duration = Duration::from_secs(120);
/// How long one pass over everything may take.
const VERIFY_LIMIT: Duration = Duration::from_secs(300);
const ASK_LIMIT: Duration = Duration::from_secs(30);
const OUTBOUND_SOCKET: &str = "/run/oracle-outbound.sock";
const FILE: &str = "/var/lib/oracle.dat";
const FILE_MIB: u64 = 8;
/// Blocks of the file written and synced a second.
const FILE_WRITES: u64 = 20;

/// How much the oracle does in a machine with so much memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Work {
    /// Memory that it watches.
    pub(super) memory_mib: u64,
    /// Of that, what it writes to.
    pub(super) hot_mib: u64,
    /// How fast, MB/s.
    pub(super) rate: u64,
}

impl Work {
    /// Half of a small machine (Linux and Redis need the rest), three quarters of a large one.
    pub(super) fn new(machine_mib: u64, rate: u64) -> Self {
        let memory_mib = if machine_mib < 512 { machine_mib / 2 } else { machine_mib / 4 * 3 };
        Self { memory_mib, hot_mib: memory_mib.min(32), rate }
    }
}

/// What `oracle status` and `oracle verify` answer, as far as it is of interest here.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Answer {
    pages_checked: u64,
    mismatches: u64,
    first_mismatch: Option<String>,
    file_checks: u64,
    file_mismatches: u64,
    file_errors: u64,
    last_file_error: Option<String>,
    pub(super) dirtied_mb: u64,
    pub(super) running_ms: u64,
    verified: bool,
    problem: Option<String>,
}

impl Answer {
    /// For the report.
    pub(super) fn result(&self) -> Oracle {
        Oracle {
            pages_checked: self.pages_checked,
            mismatches: self.mismatches,
            file_mismatches: self.file_mismatches,
        }
    }

    /// What speaks against the machine besides the numbers of [`Answer::result`].
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.file_checks == 0 {
            problems.push("the guest checked no block of its file".to_owned());
        }
        if self.file_errors > 0 {
            let last = self.last_file_error.as_deref().unwrap_or("no reason given");
            problems.push(format!("the guest could not use its file: {last}"));
        }
        if let Some(first) = &self.first_mismatch {
            problems.push(format!("the first that was wrong in the guest: {first}"));
        }
        problems
    }

    /// MB/s written to memory since `earlier`.
    pub(super) fn rate_since(&self, earlier: &Self) -> f64 {
        let seconds = self.running_ms.saturating_sub(earlier.running_ms) as f64 / 1e3;
        self.dirtied_mb.saturating_sub(earlier.dirtied_mb) as f64 / seconds.max(1e-3)
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct OutboundAnswer {
    echoed: u64,
    wrong: u64,
    resets: u64,
    refused: u64,
    longest_gap_us: u64,
    last_error: Option<String>,
}

fn ask<T: DeserializeOwned>(runner: &Runner, words: &[&str], limit: Duration) -> anyhow::Result<T> {
    let line = format!("{ORACLE} {}", words.join(" "));
    let argv: Vec<&str> = [ORACLE].into_iter().chain(words.iter().copied()).collect();
    let (code, text) =
        runner.exec(&argv, limit).with_context(|| format!("running \"{line}\" in the machine"))?;
    // 1 is "something is wrong", with an answer that says what; others are failures.
    if code > 1 || text.trim().is_empty() {
        bail!("\"{line}\" in the machine failed with status {code}: {}", text.trim());
    }
    serde_json::from_str(&text).with_context(|| format!("reading what \"{line}\" answered"))
}

/// Starts writing and checking; returns when all pages are written once.
pub(super) fn start(runner: &Runner, work: Work) -> anyhow::Result<Answer> {
    let [memory, hot, rate, file, writes] =
        [work.memory_mib, work.hot_mib, work.rate, FILE_MIB, FILE_WRITES].map(|n| n.to_string());
    let words = [
        "run",
        "--memory-mib",
        &memory,
        "--hot-mib",
        &hot,
        "--rate-mb-s",
        &rate,
        "--check-mb-s",
        "8",
        "--file",
        FILE,
        "--file-mib",
        &file,
        "--file-writes-s",
        &writes,
        "--background",
    ];
    ask(runner, &words, START_LIMIT)
}

/// How it goes.
pub(super) fn status(runner: &Runner) -> anyhow::Result<Answer> {
    ask(runner, &["status"], ASK_LIMIT)
}

/// Reads every page and every block of the file once more.
pub(super) fn verify(runner: &Runner) -> anyhow::Result<Answer> {
    let answer: Answer = ask(runner, &["verify"], VERIFY_LIMIT)?;
    if !answer.verified {
        bail!(
            "the check inside the machine did not finish: {}",
            answer.problem.as_deref().unwrap_or("no reason given")
        );
    }
    Ok(answer)
}

/// Begins the connection from inside.
pub(super) fn start_outbound(runner: &Runner, to: SocketAddr) -> anyhow::Result<()> {
    let to = to.to_string();
    let words = ["outbound", "--to", &to, "--interval-ms", "10", "--background"];
    ask::<serde_json::Value>(runner, &words, START_LIMIT).map(drop)
}

/// What became of it; with the last error in a sentence, if there was one.
pub(super) fn outbound(runner: &Runner) -> anyhow::Result<(Outbound, Option<String>)> {
    let words = ["status", "--socket", OUTBOUND_SOCKET];
    let answer: OutboundAnswer = ask(runner, &words, ASK_LIMIT)?;
    let outbound = Outbound {
        echoed: answer.echoed,
        wrong: answer.wrong,
        resets: answer.resets,
        refused: answer.refused,
        longest_gap_ms: answer.longest_gap_us as f64 / 1e3,
    };
    Ok((outbound, answer.last_error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oracle_leaves_room_for_the_rest_of_the_machine() {
        assert_eq!(Work::new(256, 100), Work { memory_mib: 128, hot_mib: 32, rate: 100 });
        assert_eq!(Work::new(4096, 0), Work { memory_mib: 3072, hot_mib: 32, rate: 0 });
        assert_eq!(Work::new(128, 9).memory_mib, 64);
    }

    #[test]
    fn an_answer_is_read_with_fields_that_it_does_not_know() {
        let text = r#"{"pages":9,"pages_checked":7,"mismatches":1,"first_mismatch":"page 3",
            "file_checks":2,"file_mismatches":0,"file_errors":0,"dirtied_mb":300,
            "running_ms":3000,"verified":true,"new":[]}"#;
        let answer: Answer = serde_json::from_str(text).unwrap();
        assert_eq!((answer.result().pages_checked, answer.result().mismatches), (7, 1));
        assert_eq!(answer.problems(), ["the first that was wrong in the guest: page 3"]);
        let idle = Answer { file_errors: 1, ..Answer::default() };
        assert_eq!(idle.problems().len(), 2, "no block checked, and an error");
        let earlier = Answer { dirtied_mb: 100, running_ms: 1000, ..Answer::default() };
        assert!((answer.rate_since(&earlier) - 100.0).abs() < 1e-9);
    }
}
