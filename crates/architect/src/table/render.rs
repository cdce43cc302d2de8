//! Tables for people: borders and colours on a terminal, aligned columns anywhere else.

use super::{Move, Report};
use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use std::io::IsTerminal;

/// How a table looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Borders, colours, fitted to the width of the window.
    Terminal,
    /// Aligned columns of plain text, for files and pipes.
    Plain,
}

impl Style {
    /// What standard output is; `NO_COLOR` asks for plain.
    pub fn detect() -> Style {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        if wanted && std::io::stdout().is_terminal() { Style::Terminal } else { Style::Plain }
    }

    /// An empty table with these column heads; numbers go to the right.
    pub(crate) fn table(self, heads: &[(&str, CellAlignment)]) -> Table {
        let mut table = Table::new();
        match self {
            Style::Terminal => {
                table
                    .load_preset(presets::UTF8_FULL_CONDENSED)
                    .set_content_arrangement(ContentArrangement::Dynamic)
                    .enforce_styling();
            }
            Style::Plain => {
                table.load_preset(presets::NOTHING).force_no_tty();
            }
        }
        table.set_header(heads.iter().map(|(head, _)| self.strong(*head)));
        for (index, (_, alignment)) in heads.iter().enumerate() {
            if let Some(column) = table.column_mut(index) {
                column.set_cell_alignment(*alignment);
                if self == Style::Plain {
                    column.set_padding((0, 2));
                }
            }
        }
        table
    }

    /// A cell in bold, where there is bold.
    pub(crate) fn strong(self, text: impl ToString) -> Cell {
        match self {
            Style::Terminal => Cell::new(text).add_attribute(Attribute::Bold),
            Style::Plain => Cell::new(text),
        }
    }

    /// A cell in a colour, where there are colours.
    pub(crate) fn coloured(self, text: impl ToString, colour: Color) -> Cell {
        match self {
            Style::Terminal => Cell::new(text).fg(colour),
            Style::Plain => Cell::new(text),
        }
    }

    /// A sentence in a colour, outside of a table.
    pub(crate) fn sentence(self, text: &str, good: bool) -> String {
        match self {
            Style::Terminal => format!("\x1b[1;{}m{text}\x1b[0m", if good { 32 } else { 31 }),
            Style::Plain => text.to_owned(),
        }
    }
}

/// A table as text without spaces at the ends of lines.
pub(crate) fn text(table: &Table) -> String {
    let lines = table.lines().map(|line| format!("{}\n", line.trim_end()));
    lines.collect()
}

/// A number with its thousands apart: `1 234 567`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

/// A size in its unit: `96.0 MiB`.
pub fn bytes(number: u64) -> String {
    let mut value = number as f64;
    let mut unit = "B";
    for larger in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, larger);
    }
    if unit == "B" { format!("{number} B") } else { format!("{value:.1} {unit}") }
}

/// A time in its unit: `4.2 ms`, `1.35 s`.
pub fn milliseconds(value: f64) -> String {
    if value >= 1000.0 {
        format!("{:.2} s", value / 1e3)
    } else if value >= 100.0 {
        format!("{value:.0} ms")
    } else {
        format!("{value:.1} ms")
    }
}

/// A zero that must be one: green if it is, red if not.
fn zero(style: Style, number: u64) -> Cell {
    style.coloured(count(number), if number == 0 { Color::Green } else { Color::Red })
}

pub(super) fn report(report: &Report, style: Style) -> String {
    use CellAlignment::{Left, Right};
    let mut moves = style.table(&[
        ("move", Left),
        ("mode", Left),
        ("rounds", Right),
        ("sent", Right),
        ("memory", Right),
        ("total", Right),
        ("blackout", Right),
        ("client gap", Right),
        ("faults", Right),
        ("fault p50 / p99", Right),
    ]);
    for step in &report.moves {
        moves.add_row(move_row(step, style));
    }

    let client = &report.client;
    let mut clients = style.table(&[
        ("client", Left),
        ("operations", Right),
        ("per second", Right),
        ("errors", Right),
        ("reconnects", Right),
        ("lost writes", Right),
        ("doubled", Right),
        ("retransmits", Right),
        ("time-outs", Right),
        ("latency p50 / p99", Right),
    ]);
    clients.add_row(vec![
        Cell::new(if client.verified { "all keys read again" } else { "not verified" }),
        Cell::new(count(client.operations)),
        Cell::new(count(client.operations_per_second.round() as u64)),
        zero(style, client.errors),
        zero(style, client.reconnects),
        zero(style, client.lost_writes),
        zero(style, client.doubled_writes + client.wrong_answers),
        Cell::new(count(client.tcp.retransmits)),
        client.tcp.rto.map_or_else(|| Cell::new("–"), |rto| zero(style, rto)),
        Cell::new(format!("{} / {} µs", client.latency_p50_us, client.latency_p99_us)),
    ]);

    let oracle = &report.oracle;
    let mut memory = style.table(&[
        ("memory", Left),
        ("pages checked", Right),
        ("mismatches", Right),
        ("file mismatches", Right),
    ]);
    memory.add_row(vec![
        Cell::new("checked inside the guest"),
        Cell::new(count(oracle.pages_checked)),
        zero(style, oracle.mismatches),
        zero(style, oracle.file_mismatches),
    ]);

    let mut tables = vec![text(&moves), text(&clients)];
    if let Some(outbound) = &report.outbound {
        let mut table = style.table(&[
            ("the machine's own connection", Left),
            ("round trips", Right),
            ("resets", Right),
            ("wrong", Right),
            ("longest gap", Right),
        ]);
        table.add_row(vec![
            Cell::new("begun inside the guest"),
            Cell::new(count(outbound.echoed)),
            zero(style, outbound.resets),
            zero(style, outbound.wrong),
            Cell::new(milliseconds(outbound.longest_gap_ms)),
        ]);
        tables.push(text(&table));
    }
    tables.push(text(&memory));
    let mut out = tables.join("\n");
    out.push('\n');
    let problems = report.problems();
    if problems.is_empty() {
        let moves = super::plural(report.moves.len() as u64, "move");
        let sentence = format!(
            "{moves}, one connection, {} operations: nothing was lost.",
            count(client.operations)
        );
        out.push_str(&style.sentence(&sentence, true));
        out.push('\n');
    }
    for problem in problems {
        out.push_str(&style.sentence(&format!("FAILED: {problem}"), false));
        out.push('\n');
    }
    for detail in &client.problems {
        out.push_str(&format!("  {detail}\n"));
    }
    out
}

fn move_row(step: &Move, style: Style) -> Vec<Cell> {
    let time = |value: Option<f64>| value.map_or("–".into(), |value| format!("{value:.0}"));
    vec![
        Cell::new(format!("{} → {}", step.from, step.to)),
        Cell::new(&step.mode),
        Cell::new(step.rounds),
        Cell::new(bytes(step.bytes_sent)),
        Cell::new(bytes(step.memory_bytes)),
        Cell::new(milliseconds(step.total_ms)),
        style.strong(milliseconds(step.blackout_ms)),
        style.strong(milliseconds(step.client_gap_ms)),
        Cell::new(count(step.faults)),
        match step.faults {
            0 => Cell::new("–"),
            _ => Cell::new(format!("{} / {} µs", time(step.fault_p50_us), time(step.fault_p99_us))),
        },
    ]
}
