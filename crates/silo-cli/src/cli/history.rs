//! Commands about what is in a store: `generations`, `fork`, `prune`, `collect`.

use super::{human, print, store::StoreArgs};
use crate::config::{RetentionConfig, Span};
use anyhow::{Context, Result};
use clap::Args;
use silo::store::{
    Access, Collected, Generation, LineName, LineWriter, Retention, Swept, Which, WriterOptions,
};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Memory for reading a generation's head.
const CACHE: usize = 16 << 20;

#[derive(Args)]
pub(super) struct GenerationsArgs {
    /// `tenant/line`; without it all lines of the store are listed
    line: Option<String>,
    /// Tell everything of this generation
    #[arg(long, value_name = "NUMBER", requires = "line")]
    show: Option<u64>,
    #[command(flatten)]
    store: StoreArgs,
}

/// A time of a generation as seconds since 1970, and for people.
fn when(made: SystemTime) -> (u64, String) {
    let seconds = made.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let ago = SystemTime::now().duration_since(made).unwrap_or_default();
    let ago = Duration::from_secs(ago.as_secs());
    let text = match ago.as_secs() {
        0..60 => format!("{} s ago", ago.as_secs()),
        60..3600 => format!("{} min ago", ago.as_secs() / 60),
        3600..172_800 => format!("{} h ago", ago.as_secs() / 3600),
        _ => format!("{} days ago", ago.as_secs() / 86_400),
    };
    (seconds, text)
}

pub(super) fn generations(args: &GenerationsArgs, json: bool) -> Result<()> {
    let store = args.store.place()?.open(Access::Read)?;
    let Some(line) = &args.line else {
        let lines: Vec<String> = store.lines(None)?.iter().map(ToString::to_string).collect();
        return print(json, &serde_json::json!({ "lines": lines }), &lines.join("\n"));
    };
    let line = LineName::parse(line)?;
    if let Some(number) = args.show {
        let keys = args.store.keys()?;
        let generation = Generation::open(&store, &keys, &line, Which::Number(number), CACHE)?;
        return show(&generation, json);
    }
    let all = store.generations(&line)?;
    let list: Vec<_> = all
        .iter()
        .map(|one| {
            serde_json::json!({
                "number": one.number, "epoch": one.epoch, "made": when(one.made).0,
                "packs": one.packs,
            })
        })
        .collect();
    let lines: Vec<String> = all
        .iter()
        .map(|one| {
            let made = when(one.made).1;
            format!("{:>8}  {made:<14}  epoch {:<4} {} packs", one.number, one.epoch, one.packs)
        })
        .collect();
    let text = if lines.is_empty() { "none".to_owned() } else { lines.join("\n") };
    print(json, &serde_json::json!({ "line": line.to_string(), "generations": list }), &text)
}

fn hex(root: [u8; 32]) -> String {
    root.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn show(generation: &Generation, json: bool) -> Result<()> {
    let devices: Vec<_> = generation
        .devices()
        .iter()
        .map(|device| {
            serde_json::json!({
                "name": device.name, "bytes": device.geometry.bytes(),
                "block_size": device.geometry.block(), "root": device.root.map(hex),
            })
        })
        .collect();
    let parent = generation.parent().map(|(line, number)| format!("{line} {number}"));
    let keys: Vec<&str> = generation.key_ids().collect();
    let (seconds, ago) = when(generation.made());
    let value = serde_json::json!({
        "line": generation.line().to_string(), "number": generation.number(), "made": seconds,
        "label": generation.label(), "parent": parent, "keys": keys, "devices": devices,
    });
    let mut text = format!("{} {}, made {ago}", generation.line(), generation.number());
    if !generation.label().is_empty() {
        text.push_str(&format!(", \"{}\"", generation.label()));
    }
    if let Some(parent) = parent {
        text.push_str(&format!("\nforked from {parent}"));
    }
    text.push_str(&format!("\nkeys       {}", keys.join(", ")));
    for device in generation.devices() {
        let (bytes, block) = (human(device.geometry.bytes()), human(device.geometry.block()));
        text.push_str(&format!("\ndevice     {} ({bytes} in blocks of {block})", device.name));
        let root = device.root.map_or_else(|| "not known".to_owned(), hex);
        text.push_str(&format!("\n  root     {root}"));
    }
    print(json, &value, &text)
}

#[derive(Args)]
pub(super) struct ForkArgs {
    /// The line to begin from, `tenant/line`
    from: String,
    /// The new line, `tenant/line`; it must not exist yet
    to: String,
    /// From this generation; the newest if not given
    #[arg(long, value_name = "NUMBER")]
    generation: Option<u64>,
    #[command(flatten)]
    store: StoreArgs,
}

pub(super) fn fork(args: &ForkArgs, json: bool) -> Result<()> {
    let (from, to) = (LineName::parse(&args.from)?, LineName::parse(&args.to)?);
    let store = args.store.place()?.open(Access::Write)?;
    let number = match args.generation {
        Some(number) => number,
        None => {
            let all = store.generations(&from)?;
            all.first().with_context(|| format!("line {from} has no generation"))?.number
        }
    };
    let keys = args.store.keys()?;
    let writer = LineWriter::fork(store, &keys, (&from, number), &to, WriterOptions::default())?;
    let value = serde_json::json!({
        "from": from.to_string(), "generation": number, "to": to.to_string(),
        "number": writer.newest(),
    });
    let text = format!("{to} begins with generation {number} of {from}; nothing was copied");
    print(json, &value, &text)
}

#[derive(Args)]
pub(super) struct CollectArgs {
    /// Only say what would be condemned
    #[arg(long)]
    dry_run: bool,
    /// Younger objects are left alone, and condemned ones deleted only after this time: longer than
    /// any backup takes to commit
    #[arg(long, default_value = "1h")]
    grace: Span,
    #[command(flatten)]
    store: StoreArgs,
}

pub(super) fn collect(args: &CollectArgs, json: bool) -> Result<()> {
    let access = if args.dry_run { Access::Read } else { Access::Write };
    let store = args.store.place()?.open(access)?;
    let grace = args.grace.0;
    let swept = if args.dry_run { Swept::Nothing } else { store.sweep(grace)? };
    let (deleted, wait) = match swept {
        Swept::Done(done) => (Some(done), None),
        Swept::Wait(left) => (None, Some(left)),
        Swept::Nothing => (None, None),
    };
    // One collection at a time: what waits is swept before more is condemned.
    let marked = if wait.is_some() { None } else { store.mark(grace, args.dry_run)? };
    let leftovers = store.tidy(grace, args.dry_run)?;
    let value = serde_json::json!({
        "dry_run": args.dry_run,
        "leftovers": leftovers,
        "deleted": deleted.as_ref().map(told),
        "condemned": marked.as_ref().map(told),
        "wait_seconds": wait.map(|wait| wait.as_secs()),
    });
    let mut lines = Vec::new();
    if let Some(done) = &deleted {
        lines.push(format!(
            "deleted {} objects ({}), {} are in use again",
            done.objects.len(),
            human(done.bytes),
            done.spared
        ));
    }
    if let Some(left) = wait {
        lines.push(format!(
            "what was condemned can be deleted in {} s; run it again then",
            left.as_secs()
        ));
    }
    match &marked {
        Some(found) if args.dry_run => {
            lines.push(format!(
                "would condemn {} objects ({}):",
                found.objects.len(),
                human(found.bytes)
            ));
            lines.extend(found.objects.iter().map(|object| format!("  {object}")));
        }
        Some(found) => lines.push(format!(
            "condemned {} objects ({}); run it again after {}",
            found.objects.len(),
            human(found.bytes),
            args.grace
        )),
        None if wait.is_none() => lines.push("nothing is to be collected".to_owned()),
        None => {}
    }
    if !leftovers.is_empty() {
        let word = if args.dry_run { "would delete" } else { "deleted" };
        lines.push(format!("{word} {} leftovers of commands that were killed:", leftovers.len()));
        lines.extend(leftovers.iter().map(|object| format!("  {object}")));
    }
    print(json, &value, &lines.join("\n"))
}

fn told(found: &Collected) -> serde_json::Value {
    serde_json::json!({
        "collection": found.number, "generations": found.generations, "objects": found.objects,
        "bytes": found.bytes, "spared": found.spared,
    })
}

#[derive(Args)]
pub(super) struct PruneArgs {
    /// `tenant/line`; that of --backup-config if not given
    line: Option<String>,
    /// Delete; without this only what would go is said
    #[arg(long)]
    delete: bool,
    #[command(flatten)]
    rules: RuleArgs,
    #[command(flatten)]
    store: StoreArgs,
}

/// Which generations stay: all that one of these names.
#[derive(Args)]
#[command(next_help_heading = "What stays: the union of")]
struct RuleArgs {
    /// The newest so many
    #[arg(long, value_name = "COUNT")]
    keep_last: Option<usize>,
    /// The newest of each of so many hours
    #[arg(long, value_name = "COUNT")]
    keep_hourly: Option<usize>,
    /// The newest of each of so many days
    #[arg(long, value_name = "COUNT")]
    keep_daily: Option<usize>,
    /// The newest of each of so many weeks
    #[arg(long, value_name = "COUNT")]
    keep_weekly: Option<usize>,
    /// The newest of each of so many months of 30 days
    #[arg(long, value_name = "COUNT")]
    keep_monthly: Option<usize>,
    /// All that are younger
    #[arg(long, value_name = "TIME")]
    keep_within: Option<Span>,
}

impl RuleArgs {
    fn rules(&self) -> Option<Retention> {
        RetentionConfig {
            last: self.keep_last,
            hourly: self.keep_hourly,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            within: self.keep_within,
        }
        .rules()
    }
}

pub(super) fn prune(args: &PruneArgs, json: bool) -> Result<()> {
    let (place, line) = args.store.place_and_line(args.line.as_deref())?;
    let of_config = || args.store.retention().ok().flatten();
    // Nothing is the one rule that nobody means.
    let rules = args.rules.rules().or_else(of_config).context(
        "no rule says what stays; add --keep-last 10 or the like, or a retention to the [backup]",
    )?;
    let access = if args.delete { Access::Write } else { Access::Read };
    let store = place.open(access)?;
    let pruned = store.prune(&line, &rules, SystemTime::now(), !args.delete)?;
    let numbers: Vec<u64> = pruned.deleted.iter().map(|one| one.number).collect();
    let value = serde_json::json!({
        "line": line.to_string(), "dry_run": !args.delete, "deleted": numbers, "kept": pruned.kept,
        "in_use": pruned.in_use,
    });
    let word = if args.delete { "deleted" } else { "would delete" };
    let mut lines =
        vec![format!("{word} {} generations of {line}, {} stay", numbers.len(), pruned.kept)];
    lines.extend(
        pruned.deleted.iter().map(|one| format!("{:>8}  {}", one.number, when(one.made).1)),
    );
    if pruned.in_use > 0 {
        let text = "of these only because somebody reads them: prune again later";
        lines.push(format!("{} {text}", pruned.in_use));
    }
    lines.push(if args.delete {
        "their room is given back by silo collect".to_owned()
    } else {
        "nothing was deleted; add --delete to do it".to_owned()
    });
    print(json, &value, &lines.join("\n"))
}
