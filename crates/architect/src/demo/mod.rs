//! `architect demo`, what `make demo` runs: a busy Redis machine moves between two hosts on this
//! computer, again and again, and at the end a table shows what its client and its own memory
//! noticed of it.
//!
//! [`run`] looks at the host, builds the package and a rig, and hands both to `story`, which boots
//! the machine, puts it to work, moves it, and asks everybody what was lost. Everything that a run
//! makes hangs on values that remove it when dropped: an error, Ctrl-C and SIGTERM end a run by
//! dropping them in order. What a run that was killed has left is removed by the next one
//! (`rig`, `fleet`).

mod echo;
mod guest;
mod moving;
mod package;
mod screen;
mod stop;
mod story;
mod tidy;

pub use stop::Stopped;

use crate::{
    doctor::{self, Diagnosis, State},
    fleet::Fleet,
    rig::{Rig, RigConfig},
    table::{Report, Style},
};
use anyhow::{Context as _, bail};
use drafter::migrate::{messages::Mode, timings::MoveReport};
use screen::Screen;
use serde::Serialize;
use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use stop::Stop;
use story::Story;

/// How memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum HowToMove {
    /// Some of it before the switchover, the rest after.
    Hybrid,
    /// All of it before the switchover.
    PreCopy,
    /// All of it after the switchover.
    PostCopy,
    /// Each of these in turn.
    Mixed,
}

impl HowToMove {
    /// The mode of move `number`, from 0.
    fn mode(self, number: u32) -> Mode {
        match (self, number % 3) {
            (Self::Hybrid, _) | (Self::Mixed, 0) => Mode::Hybrid,
            (Self::PreCopy, _) | (Self::Mixed, 1) => Mode::PreCopy,
            (Self::PostCopy, _) | (Self::Mixed, _) => Mode::PostCopy,
        }
    }
}

/// What `architect demo` is asked.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// How often the machine moves
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub moves: u32,
    /// The machine's memory
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(128..=65_536))]
    pub memory: u64,
    /// How fast the machine writes to its memory, besides serving its client
    #[arg(long, value_name = "MB/S", default_value_t = 100, value_parser = clap::value_parser!(u64).range(0..=10_000))]
    pub dirty_rate: u64,
    /// How to move [default: hybrid, or post-copy where the kernel cannot track writes]
    #[arg(long, value_enum)]
    pub mode: Option<HowToMove>,
    /// Round-trip time of the link between the hosts [default: that of this computer]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(0..=2_000))]
    pub round_trip: Option<u64>,
    /// Bandwidth of that link, each way [default: that of this computer]
    #[arg(long, value_name = "MBIT/S", value_parser = clap::value_parser!(u64).range(1..=400_000))]
    pub bandwidth: Option<u64>,
    /// Protect nothing between the hosts, instead of mutual TLS
    #[arg(long)]
    pub plaintext: bool,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Leave everything running at the end, to look around, until Ctrl-C
    #[arg(long)]
    pub keep: bool,
    /// How names of namespaces begin: two demonstrations at a time need two
    #[arg(long, value_name = "NAME", default_value = "demo", hide_short_help = true)]
    pub prefix: String,
}

/// The file of `--json`.
#[derive(Serialize)]
struct Results<'a> {
    #[serde(flatten)]
    report: &'a Report,
    /// Each move with its phases, as its source stored it.
    details: &'a [MoveReport],
}

/// Runs the demonstration; false if anything was lost, or if it cannot run here.
///
/// # Errors
/// [`Stopped`] if a signal ended it; else in sentences for people.
pub fn run(args: &Args) -> anyhow::Result<bool> {
    let stop = Stop::on_signals().context("watching for Ctrl-C")?;
    let screen = Screen::new(Style::detect());
    let begun = Instant::now();
    screen.line("A busy Redis machine moves between two hosts, and its client notices nothing.\n");

    screen.begin("looking at what this host can do");
    let diagnosis = doctor::diagnose(&std::env::temp_dir());
    if !diagnosis.can_run_demo {
        screen.end();
        screen.line(&lacking(&diagnosis));
        return Ok(false);
    }
    let how = choose(args.mode, &diagnosis, &screen)?;
    screen.done("host", &capabilities(&diagnosis));
    stop.check()?;

    // Opened now: an hour of moves must not end in a path that cannot be written.
    let mut json = args.json.as_deref().map(create).transpose()?;

    screen.begin("building the package");
    let built = package::build(&screen)?;
    screen.done("package", &package::describe(&built));
    stop.check()?;

    screen.begin("making two hosts, an edge and a client");
    let mut rig = RigConfig {
        prefix: args.prefix.clone(),
        hosts: 2,
        delay: args.round_trip.filter(|&ms| ms > 0).map(Duration::from_millis),
        bandwidth: args.bandwidth.map(|megabits| megabits * 1_000_000),
        tls: !args.plaintext,
        leases: true,
        ..RigConfig::default()
    };
    rig.folder = Some(tidy::folder(&args.prefix));
    let rig = Rig::new(rig)?;
    let names: Vec<&str> = rig.hosts().iter().map(|host| host.namespace.name()).collect();
    screen
        .done("two hosts", &format!("{}, an edge and a client; {}", names.join(", "), link(args)));
    let fleet = Fleet::new(rig)?;

    let mut story = Story::new(fleet, &stop, &screen, args, how);
    let told = story.tell(built.package.dir());
    let (report, details) = match told {
        Ok(told) => told,
        Err(error) => {
            screen.end();
            let help = story.last_words();
            let folder = story.folder().to_owned();
            drop(story);
            // A failure leaves its logs, and nothing else.
            if error.is::<Stopped>() {
                tidy::remove(&folder, tidy::What::Everything);
                return Err(error);
            }
            tidy::remove(&folder, tidy::What::AllButLogs);
            let logs = folder.join("logs");
            return Err(error.context(format!(
                "the demonstration failed; its logs are in {} until the next run\n{help}",
                logs.display()
            )));
        }
    };
    screen.end();
    if let Some((file, path)) = &mut json {
        let results = Results { report: &report, details: &details };
        serde_json::to_writer_pretty(&mut *file, &results)
            .map_err(std::io::Error::from)
            .and_then(|()| file.write_all(b"\n"))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    screen.line("");
    screen.line(report.render(screen.style()).trim_end());
    screen.line(&story::in_short(&report, begun.elapsed()));
    let lost = report.lost_anything();
    if args.keep {
        screen.line(&story.how_to_look_around());
        screen.line(&format!("{}: removing everything", stop.wait_for_signal()));
    }
    let folder = story.folder().to_owned();
    drop(story);
    let what = if lost { tidy::What::AllButLogs } else { tidy::What::Everything };
    tidy::remove(&folder, what);
    if lost {
        screen.line(&format!("The logs are in {}.", folder.join("logs").display()));
    }
    Ok(!lost)
}

fn create(path: &Path) -> anyhow::Result<(File, PathBuf)> {
    let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
    Ok((file, path.to_owned()))
}

fn check_of<'a>(diagnosis: &'a Diagnosis, name: &str) -> Option<&'a doctor::Check> {
    diagnosis.checks.iter().find(|check| check.name == name)
}

/// Whether writes to a machine's memory can be tracked exactly.
fn tracks(diagnosis: &Diagnosis) -> bool {
    check_of(diagnosis, "dirty tracking").is_some_and(|check| check.state == State::Ok)
}

fn choose(
    asked: Option<HowToMove>,
    diagnosis: &Diagnosis,
    screen: &Screen,
) -> anyhow::Result<HowToMove> {
    match asked {
        None if tracks(diagnosis) => Ok(HowToMove::Hybrid),
        None => {
            screen.note(
                "This kernel cannot track a machine's writes exactly (Linux 6.7 can: WP_ASYNC and \
                 PAGEMAP_SCAN), so every move is post-copy.",
            );
            Ok(HowToMove::PostCopy)
        }
        Some(how) if how == HowToMove::PostCopy || tracks(diagnosis) => Ok(how),
        Some(_) => bail!(
            "this kernel cannot track a machine's writes exactly, which pre-copy needs: use \
             --mode post-copy, or Linux 6.7 or newer"
        ),
    }
}

/// What was found, in a few words.
fn capabilities(diagnosis: &Diagnosis) -> String {
    let detail = |name| check_of(diagnosis, name).map_or("", |check| check.detail.as_str());
    let accelerator = match check_of(diagnosis, "kvm") {
        Some(check) if check.state == State::Ok => "KVM",
        _ => "TCG (no usable KVM)",
    };
    format!("{}, QEMU {}, {accelerator}", detail("kernel"), detail("qemu"))
}

/// What is missing, and how to get it.
fn lacking(diagnosis: &Diagnosis) -> String {
    let mut text = String::from("The demonstration cannot run here:\n");
    let lacking = diagnosis.checks.iter().filter(|c| c.required && c.state == State::Missing);
    for check in lacking {
        text += &format!("  {} is missing ({}): {}\n", check.name, check.needed_for, check.detail);
        if let Some(hint) = &check.hint {
            text += &format!("    {hint}\n");
        }
    }
    text + "`architect doctor` shows everything that was tried."
}

fn link(args: &Args) -> String {
    let mut parts = Vec::new();
    if let Some(ms) = args.round_trip {
        parts.push(format!("{ms} ms round trip"));
    }
    if let Some(megabits) = args.bandwidth {
        parts.push(format!("{megabits} Mbit/s"));
    }
    parts.push(if args.plaintext { "plaintext" } else { "mutual TLS" }.to_owned());
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use doctor::{Check, Feature};

    fn diagnosis(tracking: State) -> Diagnosis {
        let check = |name: &str, state, hint: Option<&str>| Check {
            name: name.into(),
            needed_for: "moves".into(),
            required: name != "dirty tracking",
            state,
            detail: format!("detail of {name}"),
            hint: hint.map(str::to_owned),
        };
        Diagnosis {
            can_run_demo: true,
            features: Vec::<Feature>::new(),
            checks: vec![
                check("dirty tracking", tracking, None),
                check("qemu", State::Missing, Some("apt-get install qemu-system-x86")),
            ],
        }
    }

    #[test]
    fn a_kernel_that_cannot_track_gets_post_copy_and_a_wish_for_pre_copy_is_refused() {
        let screen = Screen::new(Style::Plain);
        let (old, new) = (diagnosis(State::Missing), diagnosis(State::Ok));
        assert_eq!(choose(None, &new, &screen).unwrap(), HowToMove::Hybrid);
        assert_eq!(choose(None, &old, &screen).unwrap(), HowToMove::PostCopy);
        let post_copy = Some(HowToMove::PostCopy);
        assert_eq!(choose(post_copy, &old, &screen).unwrap(), HowToMove::PostCopy);
        let error = choose(Some(HowToMove::Mixed), &old, &screen).unwrap_err().to_string();
        assert!(error.contains("6.7"), "{error}");
    }

    #[test]
    fn what_is_missing_is_told_with_how_to_get_it() {
        let text = lacking(&diagnosis(State::Missing));
        assert!(text.contains("qemu is missing (moves): detail of qemu"), "{text}");
        assert!(text.contains("apt-get install qemu-system-x86"), "{text}");
        assert!(!text.contains("dirty tracking"), "not required: {text}");
    }

    #[test]
    fn mixed_takes_every_mode_in_turn() {
        let modes = [0, 1, 2, 3].map(|number| HowToMove::Mixed.mode(number));
        assert_eq!(modes, [Mode::Hybrid, Mode::PreCopy, Mode::PostCopy, Mode::Hybrid]);
        assert_eq!(HowToMove::PreCopy.mode(5), Mode::PreCopy);
    }
}
