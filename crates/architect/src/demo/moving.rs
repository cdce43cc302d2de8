//! One move, followed with an eye on the clock and on whoever wants to stop.

use super::{Args, screen::Screen, stop::Stop};
use crate::{
    fleet::{Fleet, RunnerId},
    table::{self, bytes},
};
use anyhow::{Context as _, bail};
use drafter::{
    migrate::{messages::Mode, planner::Budgets, timings::MoveReport},
    runner::api::{Client, ClientError, Phase, Progress, Reply, Request},
};
use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

/// How often to look whether somebody wants to stop.
const TICK: Duration = Duration::from_millis(50);
/// A runner that follows a move says something ten times a second.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);
/// How long a move may take to be cancelled.
const CANCEL_LIMIT: Duration = Duration::from_secs(15);
/// Fewer faults than this have no 99th percentile.
const FAULTS_FOR_P99: u64 = 100;

/// How long one move may take: a minute and a half, and four times the memory over the link.
pub(super) fn limit(args: &Args) -> Duration {
    let bits = (args.memory << 20) * 8 * 4;
    let link = args.bandwidth.map_or(10_000, |megabits| megabits).max(1) * 1_000_000;
    Duration::from_secs(90 + bits / link)
}

enum Event {
    Progress(Progress),
    Ended(Result<serde_json::Value, ClientError>),
}

/// Moves the machine and returns what its source reported.
pub(super) fn one(
    fleet: &Fleet,
    (from, to): (RunnerId, RunnerId),
    mode: Mode,
    limit: Duration,
    stop: &Stop,
    mut show: impl FnMut(&Progress),
) -> anyhow::Result<MoveReport> {
    let job = fleet.start_move(from, to, mode, Budgets::default(), false)?;
    let events = follow(fleet.runner(from).client()?, job)?;
    let mut deadline = Instant::now() + limit;
    let mut cancelled = None;
    loop {
        match events.recv_timeout(TICK) {
            Ok(Event::Progress(progress)) => show(&progress),
            Ok(Event::Ended(result)) => {
                if let Some(why) = cancelled {
                    return Err(why);
                }
                let value = result?;
                return serde_json::from_value(value).context("reading the report of the move");
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => bail!("whoever followed the move panicked"),
        }
        if let Some(why) = cancelled.take() {
            if Instant::now() > deadline {
                return Err(why);
            }
            cancelled = Some(why);
            continue;
        }
        let why = match stop.check() {
            Err(stopped) => stopped.into(),
            Ok(()) if Instant::now() > deadline => {
                anyhow::anyhow!("the move took longer than {} s and was cancelled", limit.as_secs())
            }
            Ok(()) => continue,
        };
        deadline = Instant::now() + CANCEL_LIMIT;
        cancelled = Some(why);
        let mut client = fleet.runner(from).client()?;
        client.set_deadline(Some(CANCEL_LIMIT))?;
        // It may have ended just now: then the next event says so.
        let _ = client.call(&Request::Cancel { job }, |_| {});
    }
}

/// Follows a job on a thread, so that whoever waits can do other things. The thread ends with the
/// job, with the runner, or when nobody listens and the runner falls silent.
fn follow(mut client: Client, job: u64) -> anyhow::Result<Receiver<Event>> {
    client.set_deadline(Some(SILENCE_LIMIT))?;
    let (sender, events) = channel();
    std::thread::Builder::new()
        .name("follow".into())
        .spawn(move || {
            let result = client.call(&Request::Follow { job }, |reply| {
                if let Reply::Progress(progress) = reply {
                    let _ = sender.send(Event::Progress(progress.clone()));
                }
            });
            let _ = sender.send(Event::Ended(result));
        })
        .context("starting a thread to follow the move")?;
    Ok(events)
}

/// How far a move is.
pub(super) fn sentence(progress: &Progress) -> String {
    let sent = bytes(progress.sent_bytes);
    let left = bytes(progress.left_bytes);
    match progress.phase {
        Phase::Prepare => "preparing the destination".into(),
        Phase::PreCopy => {
            format!("pre-copy round {}, {sent} sent, {left} left", progress.round + 1)
        }
        Phase::Switchover => "switching over".into(),
        Phase::PostCopy => format!("runs there; {sent} sent, {left} to fill"),
        Phase::Ended => "done".into(),
    }
}

/// A move for the report.
pub(super) fn row(report: &MoveReport, gap: Duration) -> table::Move {
    let faults = &report.faults;
    table::Move {
        from: report.from.clone(),
        to: report.to.clone(),
        mode: report.mode.to_string(),
        rounds: report.rounds.len() as u32,
        bytes_sent: report.bytes_sent,
        memory_bytes: report.memory_bytes,
        total_ms: report.total_ms,
        blackout_ms: report.blackout_ms,
        client_gap_ms: gap.as_secs_f64() * 1e3,
        faults: faults.demanded,
        fault_p50_us: (faults.demanded > 0).then_some(faults.p50_us as f64),
        fault_p99_us: (faults.demanded >= FAULTS_FOR_P99).then_some(faults.p99_us as f64),
    }
}

/// The line of a move that has ended.
pub(super) fn show(screen: &Screen, number: u32, of: u32, row: &table::Move) {
    let detail = format!(
        "{:<9} {:>2} rounds {:>10} sent   blackout {:>7}   client gap {:>7}",
        row.mode,
        row.rounds,
        bytes(row.bytes_sent),
        table::milliseconds(row.blackout_ms),
        table::milliseconds(row.client_gap_ms),
    );
    let width = of.to_string().len();
    screen.done(&format!("move {number:>width$}  {} → {}", row.from, row.to), &detail);
}
