//! What a demonstration found: the JSON report, and the table a person reads.
//!
//! Filled by `architect demo` and the end-to-end tests. The verdict is strict: what was not
//! checked does not count as well ([`Report::problems`]).

mod render;

pub(crate) use render::text;
pub use render::{Style, bytes, count, milliseconds};

use crate::load::LoadReport;
use serde::{Deserialize, Serialize};

/// One move of the machine, as measured at the source, the destination and the client.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Move {
    /// Host that it left.
    pub from: String,
    /// Host that it went to.
    pub to: String,
    /// How its memory went, as in `hybrid`.
    pub mode: String,
    /// Pre-copy rounds.
    pub rounds: u32,
    /// Bytes that the source sent, framing included.
    pub bytes_sent: u64,
    /// Size of the machine's memory.
    pub memory_bytes: u64,
    /// From the request to the last block at the destination.
    pub total_ms: f64,
    /// From the source's last instruction to the destination's first.
    pub blackout_ms: f64,
    /// The longest time between two consecutive completed answers that overlaps the move.
    pub client_gap_ms: f64,
    /// Blocks that the guest waited for.
    pub faults: u64,
    /// Median time to serve one; `null` if there was none.
    pub fault_p50_us: Option<f64>,
    /// Its 99th percentile; `null` if there were too few to tell.
    pub fault_p99_us: Option<f64>,
}

/// What the program inside the guest found in its memory and its file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Oracle {
    /// Pages compared with what was written to them.
    pub pages_checked: u64,
    /// Pages that held something else.
    pub mismatches: u64,
    /// Blocks of its file that held something else.
    pub file_mismatches: u64,
}

/// What became of a connection that the machine began.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outbound {
    /// Numbers that came back as they were sent.
    pub echoed: u64,
    /// Numbers that came back changed.
    pub wrong: u64,
    /// Times that the established connection ended.
    pub resets: u64,
    /// Tries that did not connect.
    pub refused: u64,
    /// Longest time from sending a number to its return, by the guest's clock.
    pub longest_gap_ms: f64,
}

/// A demonstration's result; its JSON is an interface.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Every move, in order.
    pub moves: Vec<Move>,
    /// What the client saw.
    pub client: LoadReport,
    /// What the guest saw.
    pub oracle: Oracle,
    /// What the machine's own connection saw, if it had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outbound: Option<Outbound>,
    /// What else went wrong, as sentences of whoever made the report.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub further_problems: Vec<String>,
}

impl Report {
    /// Everything that speaks against "the client noticed nothing and nothing was lost", one
    /// sentence each.
    pub fn problems(&self) -> Vec<String> {
        let client = &self.client;
        let oracle = &self.oracle;
        let mut problems = Vec::new();
        let mut say = |wrong: bool, sentence: String| {
            if wrong {
                problems.push(sentence);
            }
        };
        say(self.moves.is_empty(), "the machine did not move".into());
        say(client.operations == 0, "the client completed no operation".into());
        say(!client.verified, "the client could not read all its keys at the end".into());
        say(client.errors > 0, format!("the client met {}", plural(client.errors, "error")));
        say(
            client.reconnects > 0,
            format!("the client had to connect again {}", plural(client.reconnects, "time")),
        );
        say(
            client.lost_writes > 0,
            format!("{} lost", plural(client.lost_writes, "acknowledged write")),
        );
        say(
            client.doubled_writes > 0,
            format!("{} applied twice", plural(client.doubled_writes, "write")),
        );
        say(
            client.wrong_answers > 0,
            format!("{} held what nobody wrote", plural(client.wrong_answers, "key")),
        );
        say(oracle.pages_checked == 0, "the guest checked no page".into());
        say(
            oracle.mismatches > 0,
            format!("{} of memory changed by themselves", plural(oracle.mismatches, "page")),
        );
        say(
            oracle.file_mismatches > 0,
            format!(
                "{} of the file changed by themselves",
                plural(oracle.file_mismatches, "block")
            ),
        );
        if let Some(outbound) = &self.outbound {
            say(outbound.echoed == 0, "the machine's own connection carried nothing".into());
            say(
                outbound.resets > 0,
                format!("the machine's own connection broke {}", plural(outbound.resets, "time")),
            );
            say(
                outbound.wrong > 0,
                format!("{} came back changed", plural(outbound.wrong, "number")),
            );
        }
        problems.extend(self.further_problems.iter().cloned());
        problems
    }

    /// Whether anything was lost, or not shown to be whole: the exit status of a demonstration.
    pub fn lost_anything(&self) -> bool {
        !self.problems().is_empty()
    }

    /// The table; ends with the verdict in one sentence.
    pub fn render(&self, style: Style) -> String {
        render::report(self, style)
    }
}

fn plural(number: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(number), if number == 1 { "" } else { "s" })
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
