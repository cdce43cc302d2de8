//! `architect doctor`: what this host can do, tried and not guessed.
//!
//! Every check is data ([`Check`]), made by doing the thing in small: a page is tracked, a fault
//! served, a tap made, a tunnel built, a process frozen, the latter three in namespaces and groups
//! that are gone afterwards. From the checks follow the [`Feature`]s that will work and whether
//! the demonstration can run, which is the command's exit status.

mod command;
mod host;
mod kernel;
pub mod missing;
mod monitor;
mod network;
mod sys;

use crate::table::Style;
use comfy_table::{CellAlignment::Left, Color};
use serde::{Deserialize, Serialize};
use std::{fmt::Write, path::Path};

/// How a check ended, from bad to good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is not there or does not work.
    Missing,
    /// It works in part; the detail says which.
    Limited,
    /// It works.
    Ok,
}

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Its name, unique.
    pub name: String,
    /// What depends on it.
    pub needed_for: String,
    /// Whether the demonstration cannot do without it.
    pub required: bool,
    /// How it ended.
    pub state: State,
    /// What was found.
    pub detail: String,
    /// What to do, if it is not [`State::Ok`] and something can be done.
    pub hint: Option<String>,
}

/// Something that a user would call a feature, and whether it will work here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Feature {
    /// Its name.
    pub name: String,
    /// The worst state of what it needs.
    pub state: State,
    /// The checks that hold it back, by name.
    pub held_back_by: Vec<String>,
}

/// Everything that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Whether the demonstration can run.
    pub can_run_demo: bool,
    /// What follows from the checks.
    pub features: Vec<Feature>,
    /// All checks.
    pub checks: Vec<Check>,
}

/// A check in the making: what is known before it is tried.
struct Subject {
    name: &'static str,
    needed_for: &'static str,
    required: bool,
}

/// What trying gave.
struct Finding {
    state: State,
    detail: String,
    hint: Option<String>,
}

impl Finding {
    fn ok(detail: impl Into<String>) -> Finding {
        Finding { state: State::Ok, detail: detail.into(), hint: None }
    }

    fn limited(detail: impl Into<String>, hint: &str) -> Finding {
        Finding { state: State::Limited, detail: detail.into(), hint: Some(hint.into()) }
    }

    fn missing(detail: impl Into<String>, hint: &str) -> Finding {
        Finding { state: State::Missing, detail: detail.into(), hint: Some(hint.into()) }
    }
}

type Trial = fn(&Path) -> Finding;

const fn subject(name: &'static str, needed_for: &'static str, required: bool) -> Subject {
    Subject { name, needed_for, required }
}

/// All checks in the order of the table. A trial is told the folder that will hold data.
const SUBJECTS: [(Subject, Trial); 20] = [
    (subject("root", "namespaces, taps, tracking another process", true), host::root),
    (subject("kernel", "everything; 6.7 for exact tracking", true), kernel::version),
    (subject("userfaultfd", "moves of memory", true), kernel::userfaultfd),
    (subject("dirty tracking", "pre-copy and hybrid moves", false), kernel::tracking),
    (subject("fault service", "post-copy and hybrid moves", true), kernel::faults),
    (subject("soft-dirty", "tracking on kernels before 6.7", false), kernel::soft_dirty),
    (subject("memfd", "the machine's memory", true), kernel::memfd),
    (subject("network namespaces", "several hosts on one computer", true), network::namespaces),
    (subject("tap", "the machine's network", true), network::tap),
    (subject("vxlan", "the way between hosts", true), network::vxlan),
    (subject("nftables", "public ports of the edge", true), network::nftables),
    (subject("qemu", "running machines", true), monitor::qemu),
    (subject("kvm", "machines at full speed", false), monitor::kvm),
    (subject("tsc", "the clock of machines", true), monitor::tsc),
    (subject("freezer", "stopping a machine without asking it", false), host::freezer),
    (subject("package tools", "building packages from Debian's", true), host::package_tools),
    (subject("ext4 tools", "building disks", true), host::ext4_tools),
    (subject("processors", "two machines at a time", false), host::processors),
    (subject("memory", "two machines at a time", true), host::memory),
    (subject("disk space", "packages and disks", true), host::disk_space),
];

/// Which checks a feature needs.
const FEATURES: [(&str, &[&str]); 7] = [
    ("machines", &["root", "memfd", "qemu", "tsc", "memory"]),
    ("pre-copy and hybrid moves", &["userfaultfd", "dirty tracking", "fault service"]),
    ("post-copy moves", &["userfaultfd", "fault service"]),
    ("connections that follow", &["root", "network namespaces", "tap", "vxlan", "nftables"]),
    ("machines at full speed", &["kvm"]),
    ("stopping by authority", &["freezer"]),
    ("packages from Debian", &["package tools", "ext4 tools", "disk space"]),
];

/// Tries everything; takes about a second. `data` is the folder whose disk will hold packages and
/// machines.
pub fn diagnose(data: &Path) -> Diagnosis {
    let checks = SUBJECTS.iter().map(|(subject, trial)| {
        let Finding { state, detail, hint } = trial(data);
        Check {
            name: subject.name.into(),
            needed_for: subject.needed_for.into(),
            required: subject.required,
            state,
            detail,
            hint,
        }
    });
    Diagnosis::from_checks(checks.collect())
}

impl Diagnosis {
    fn from_checks(checks: Vec<Check>) -> Diagnosis {
        let can_run_demo =
            checks.iter().all(|check| !check.required || check.state != State::Missing);
        let features = FEATURES.iter().map(|(name, needs)| {
            let needed = || checks.iter().filter(|check| needs.contains(&check.name.as_str()));
            Feature {
                name: (*name).into(),
                state: needed().map(|check| check.state).min().unwrap_or(State::Missing),
                held_back_by: needed()
                    .filter(|check| check.state != State::Ok)
                    .map(|check| check.name.clone())
                    .collect(),
            }
        });
        Diagnosis { can_run_demo, features: features.collect(), checks }
    }

    /// The table, the features, and the verdict.
    pub fn render(&self, style: Style) -> String {
        let colour = |state| match state {
            State::Ok => Color::Green,
            State::Limited => Color::Yellow,
            State::Missing => Color::Red,
        };
        let word = |state| match state {
            State::Ok => "ok",
            State::Limited => "limited",
            State::Missing => "missing",
        };
        let mut table =
            style.table(&[("check", Left), ("state", Left), ("found", Left), ("needed for", Left)]);
        for check in &self.checks {
            table.add_row(vec![
                style.strong(&check.name),
                style.coloured(word(check.state), colour(check.state)),
                comfy_table::Cell::new(&check.detail),
                comfy_table::Cell::new(&check.needed_for),
            ]);
        }
        let mut features = style.table(&[("feature", Left), ("here", Left), ("because of", Left)]);
        for feature in &self.features {
            features.add_row(vec![
                style.strong(&feature.name),
                style.coloured(
                    match feature.state {
                        State::Ok => "works",
                        State::Limited => "works in part",
                        State::Missing => "does not work",
                    },
                    colour(feature.state),
                ),
                comfy_table::Cell::new(feature.held_back_by.join(", ")),
            ]);
        }
        let mut out = crate::table::text(&table) + "\n" + &crate::table::text(&features) + "\n";
        for check in &self.checks {
            if let Some(hint) = &check.hint {
                // Writing to a string cannot fail.
                let _ = writeln!(out, "{}: {hint}", check.name);
            }
        }
        let verdict = match self.can_run_demo {
            true => "The demonstration can run here.".to_owned(),
            false => {
                let lacking =
                    self.checks.iter().filter(|c| c.required && c.state == State::Missing);
                let names: Vec<_> = lacking.map(|check| check.name.as_str()).collect();
                format!("The demonstration cannot run here: {} missing.", names.join(", "))
            }
        };
        out + &style.sentence(&verdict, self.can_run_demo) + "\n"
    }

    /// One line for each check that is missing, for the end of a test run.
    pub fn missing(&self) -> Vec<String> {
        let missing = self.checks.iter().filter(|check| check.state == State::Missing);
        missing.map(|check| format!("{}: {}", check.name, check.detail)).collect()
    }
}

/// What `architect doctor` is asked.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Print JSON instead of tables.
    #[arg(long)]
    pub json: bool,
    /// Print only what is missing, one line each.
    #[arg(long, conflicts_with = "json")]
    pub missing: bool,
    /// Folder whose disk will hold packages and machines.
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    pub data: std::path::PathBuf,
}

/// Runs the command; false if the demonstration cannot run here.
pub fn run(args: &Args) -> anyhow::Result<bool> {
    let diagnosis = diagnose(&args.data);
    let text = if args.json {
        serde_json::to_string_pretty(&diagnosis)? + "\n"
    } else if args.missing {
        diagnosis.missing().iter().map(|line| format!("{line}\n")).collect()
    } else {
        diagnosis.render(Style::detect())
    };
    std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes())?;
    Ok(diagnosis.can_run_demo)
}

#[cfg(test)]
mod tests;
