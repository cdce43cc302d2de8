//! The source of a move, beside `silo serve`: waits for a destination, gives the group away.

use super::{human, print, progress::Progress, stop::Stop};
use crate::{
    config::{Config, DeviceConfig, MigrateConfig},
    metrics::MoveFigures,
    moving::{Waiting, peer_name, security},
    service::Service,
};
use anyhow::{Context, Result};
use identity::{HostName, Security};
use silo::moving::SessionId;
use silo::moving::{
    Outbound, Volume,
    ledger::{DeviceNote, FileLedger, Ledger, Note, Standing},
    peer::Limits,
    report::SourceReport,
    source::{Handover, Options, SourceHost},
};
use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

/// How often a move is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(500);

/// What a note says of the devices.
enum Noted {
    /// Nothing: they never moved.
    Nothing,
    /// They are this host's.
    Here,
    /// They came by a move and are this host's; so many blocks have not come.
    Came(u64),
    /// They were coming, and are not this host's.
    Coming(SessionId),
    /// They went, or are about to.
    Gone(SessionId),
}

fn noted(note: Option<&Path>) -> Result<Noted> {
    let Some(path) = note else { return Ok(Noted::Nothing) };
    let read = || format!("the note {}", path.display());
    let Some(note) = FileLedger::new(path.to_owned()).load().with_context(read)? else {
        return Ok(Noted::Nothing);
    };
    Ok(match note.standing {
        Standing::Here => Noted::Here,
        Standing::Receiving { session } => Noted::Coming(session),
        Standing::Leaving { session, .. } | Standing::Away { session } => Noted::Gone(session),
        Standing::Owner { .. } => {
            let mut missing = 0;
            for device in &note.devices {
                missing += device.replica().with_context(read)?.absent().len();
            }
            Noted::Came(missing)
        }
    })
}

/// Refuses to use devices that are not this host's any more, not yet, or not whole.
///
/// # Errors
/// If the note says so, or cannot be read.
pub(crate) fn check_use(config: &Config) -> Result<()> {
    let note = config.migrate.iter().filter_map(|migrate| migrate.note.clone());
    // Whoever moved a device by flags has it noted beside the device.
    let own = config.device.values().filter_map(DeviceConfig::own_note);
    note.chain(own).try_for_each(|note| check_note(&note))
}

fn check_note(note: &Path) -> Result<()> {
    let note = Some(note);
    let why = match noted(note)? {
        Noted::Nothing | Noted::Here | Noted::Came(0) => return Ok(()),
        Noted::Came(blocks) => format!("{blocks} blocks of them never came"),
        Noted::Coming(session) => {
            format!("session {session}, by which they were coming, did not end; run silo connect")
        }
        Noted::Gone(session) => {
            format!("they were given away by session {session}; they run elsewhere")
        }
    };
    refuse(note, &why)
}

/// Refuses to receive devices that are this host's by a move.
///
/// # Errors
/// If the note says so, or cannot be read.
pub(super) fn check_receive(note: Option<&Path>) -> Result<()> {
    match noted(note)? {
        Noted::Nothing | Noted::Coming(_) | Noted::Gone(_) => Ok(()),
        Noted::Here | Noted::Came(0) => {
            refuse(note, "they are this host's already; run silo serve")
        }
        Noted::Came(blocks) => {
            refuse(note, &format!("they are this host's, and {blocks} blocks of them never came"))
        }
    }
}

/// Notes that the devices are this host's and whole. Their content is durable already.
///
/// # Errors
/// If the note cannot be made.
pub(super) fn note_whole(note: Option<&Path>, volumes: &[Arc<Volume>]) -> Result<()> {
    let Some(path) = note else { return Ok(()) };
    let devices = volumes
        .iter()
        .map(|volume| volume.with_replica(|replica| DeviceNote::of(volume.name().clone(), replica)))
        .collect();
    FileLedger::new(path.to_owned())
        .save(&Note { standing: Standing::Here, devices })
        .with_context(|| format!("could not note in {} that all is here", path.display()))
}

fn refuse(note: Option<&Path>, why: &str) -> Result<()> {
    let note = note.map_or_else(String::new, |note| note.display().to_string());
    anyhow::bail!(
        "the devices are not usable like that: {why} (if you know better, remove the note {note})"
    )
}

/// Writers need no telling: their requests wait, and fail once the devices have left.
struct Quiet;

impl SourceHost for Quiet {
    fn quiesce(&self, _: SessionId, _: u32) -> Result<Handover, String> {
        Ok(Handover::default())
    }

    fn resume(&self) {
        tracing::warn!("the move failed; the devices are used here again");
    }

    fn handed_over(&self) {
        tracing::info!("the destination runs; what it lacks follows");
    }

    fn overdue(&self, what: &str) {
        tracing::warn!(what, "the move takes longer than it should");
    }
}

/// What a giver needs for each attempt.
struct Terms {
    waiting: Waiting,
    volumes: Vec<Arc<Volume>>,
    peer: HostName,
    security: Security,
    limits: Limits,
    options: Options,
}

/// A source that waits for its destination.
pub(super) struct Giver {
    address: std::net::SocketAddr,
    outcome: Arc<Mutex<Option<SourceReport>>>,
    thread: JoinHandle<()>,
}

impl Giver {
    /// Listens; ends `stop` once the devices have left.
    ///
    /// # Errors
    /// If it cannot listen, or has no certificate.
    pub(super) fn start(
        config: &MigrateConfig,
        service: &Service,
        stop: Stop,
        json: bool,
    ) -> Result<Option<Self>> {
        let Some(address) = config.listen else { return Ok(None) };
        let (security, limits) = security(config, service.host())?;
        let mut options = Options::default();
        options.session.window = config.in_flight.0;
        options.session.policy.blackout = config.blackout.0;
        options.ledger = config
            .note
            .as_ref()
            .map(|path| Arc::new(FileLedger::new(path.clone())) as Arc<dyn Ledger>);
        let waiting = Waiting::start(address)?;
        let address = waiting.address();
        let (volumes, peer) = (service.volumes().to_vec(), peer_name(config)?);
        let terms = Terms { waiting, volumes, peer, security, limits, options };
        let outcome = Arc::new(Mutex::default());
        let (told, moves) = (outcome.clone(), service.host().moves.clone());
        let thread = thread::Builder::new().name("silo-give".to_owned()).spawn(move || {
            while !stop.wait(LOOK) {
                if !terms.waiting.has_caller() {
                    continue;
                }
                match give(&terms, &stop, &moves, json) {
                    Ok(report) => {
                        *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
                        stop.ask();
                    }
                    // The devices are here, and whoever uses them goes on; another try may come.
                    Err(error) => {
                        eprintln!("silo: {error:#}");
                        stop.wait(AGAIN);
                    }
                }
            }
        })?;
        Ok(Some(Self { address, outcome, thread }))
    }

    /// Where it waits.
    pub(super) fn address(&self) -> std::net::SocketAddr {
        self.address
    }

    /// Waits for its end; tells of a move that went well.
    pub(super) fn end(self) -> Option<SourceReport> {
        // A panic there was reported there.
        let _ = self.thread.join();
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// One attempt to give the devices away.
#[tracing::instrument(name = "move", skip_all)]
fn give(terms: &Terms, stop: &Stop, moves: &MoveFigures, json: bool) -> Result<SourceReport> {
    let dial = terms.waiting.dial(terms.peer.clone(), terms.security.clone(), terms.limits.clone());
    let options = terms.options.clone();
    let outbound = Outbound::start(terms.volumes.clone(), dial, Arc::new(Quiet), options)
        .context("the move could not begin")?;
    let mut outbound = Arc::new(outbound);
    moves.gives(&outbound);
    let progress = Progress::bytes("moving", 0, json);
    let mut cancelled = false;
    while !outbound.is_over() {
        let now = outbound.progress();
        progress.set(now.size.saturating_sub(now.remaining), now.size);
        if cancelled {
            thread::park_timeout(LOOK);
        } else if stop.wait(LOOK) {
            // Once the token is out this changes nothing, and the move ends by itself.
            outbound.cancel("the source is being stopped");
            cancelled = true;
        }
    }
    progress.end();
    loop {
        match Arc::try_unwrap(outbound) {
            Ok(alone) => {
                let report = alone.wait()?;
                moves.gave(&report);
                return Ok(report);
            }
            // A scrape is looking at it.
            Err(shared) => outbound = shared,
        }
        thread::yield_now();
    }
}

/// Tells of a move, for people or as JSON.
pub(super) fn say(report: &SourceReport, json: bool) -> Result<()> {
    let paths = &report.paths;
    let value = serde_json::json!({
        "moved": true,
        "session": report.session.to_string(),
        "peer": report.peer,
        "bytes": report.size,
        "rounds": report.rounds,
        "links": report.links,
        "wire_bytes": report.wire.total(),
        "blocks": {
            "zero": paths.zero, "fill": paths.fill, "same": paths.same, "held": paths.held,
            "plain": paths.plain, "packed": paths.packed, "delta": paths.delta,
        },
        "seconds": {
            "connect": report.timings.connect.as_secs_f64(),
            "pre_copy": report.timings.filling.as_secs_f64(),
            "pause": report.timings.quiesce.as_secs_f64(),
            "switch": report.timings.switch.as_secs_f64(),
            "post_copy": report.timings.following.as_secs_f64(),
            "total": report.timings.total.as_secs_f64(),
        },
    });
    let text = format!(
        "moved {} to {}: {} on the line, {} rounds, {}",
        human(report.size),
        report.peer,
        human(report.wire.total()),
        report.rounds,
        report.timings
    );
    print(json, &value, &text)
}
