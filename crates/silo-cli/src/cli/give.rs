//! The source of a move, beside `silo serve`: waits for a destination, gives the group away.

use super::{human, print, progress::Progress, stop::Stop};
use crate::{
    assist,
    config::{Config, MigrateConfig},
    first_touch::Orders,
    metrics::MoveFigures,
    moving::{Waiting, peer_name, security},
    note,
    service::Service,
};
use anyhow::{Context, Result};
use identity::{HostName, Security};
use silo::moving::SessionId;
use silo::moving::{
    Outbound, Volume,
    ledger::Note,
    peer::{Dial, Limits},
    report::SourceReport,
    source::{Handover, Options, SourceHost},
};
use std::{
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

/// How often a move is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(500);

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

/// What is needed for each attempt to give the devices away.
pub(super) struct Terms {
    waiting: Waiting,
    volumes: Vec<Arc<Volume>>,
    peer: HostName,
    security: Security,
    limits: Limits,
    options: Options,
    orders: Option<Orders>,
    moves: Arc<MoveFigures>,
}

impl Terms {
    /// Listens for a destination, if the config says where.
    ///
    /// # Errors
    /// If it cannot listen, or has no certificate.
    pub(super) fn new(
        whole: &Config,
        config: &MigrateConfig,
        service: &Service,
    ) -> Result<Option<Self>> {
        let Some(address) = config.listen else { return Ok(None) };
        let (security, limits) = security(config, service.host())?;
        let mut options = Options::default();
        options.session.window = config.in_flight.0;
        options.session.policy.blackout = config.blackout.0;
        options.session.policy.max_time = config.pre_copy.0;
        options.ledger = note::ledger(config.note.as_ref());
        assist::at_source(whole, config, service.volumes(), &mut options)?;
        let folder = config.first_touch.as_deref();
        let orders = folder.map(|folder| Orders::open(folder, service.volumes())).transpose()?;
        let waiting = Waiting::start(address)?;
        let (volumes, peer) = (service.volumes().to_vec(), peer_name(config)?);
        let moves = service.host().moves.clone();
        Ok(Some(Self { waiting, volumes, peer, security, limits, options, orders, moves }))
    }

    /// Where it waits.
    pub(super) fn address(&self) -> std::net::SocketAddr {
        self.waiting.address()
    }

    fn dial(&self) -> Dial {
        self.waiting.dial(self.peer.clone(), self.security.clone(), self.limits.clone())
    }

    /// One attempt to give the devices away.
    #[tracing::instrument(name = "move", skip_all)]
    fn give(&self, stop: &Stop, json: bool) -> Result<SourceReport> {
        let options = self.options.clone();
        let outbound = Outbound::start(self.volumes.clone(), self.dial(), Arc::new(Quiet), options)
            .context("the move could not begin")?;
        if let Some(orders) = &self.orders {
            (0..self.volumes.len()).for_each(|at| outbound.expect(at, orders.of(at)));
        }
        self.see_through(outbound, stop, json)
    }

    /// Goes on with a session whose process died when authority was leaving: serves the destination
    /// if it runs, and has the devices back if it never will.
    ///
    /// # Errors
    /// If they are back, or it cannot be gone on.
    pub(super) fn go_on(
        &self,
        (note, session, attempt): &(Arc<Note>, SessionId, u32),
        stop: &Stop,
        json: bool,
    ) -> Result<SourceReport> {
        let volumes = note::in_order(note, &self.volumes)?;
        // Hashes of known files are by the device's number in the config's order.
        let options = Options { attempt: *attempt, advertised: None, ..self.options.clone() };
        let outbound = Outbound::restored(*session, volumes, self.dial(), Arc::new(Quiet), options)
            .context("the move could not be gone on with")?;
        self.see_through(outbound, stop, json)
    }

    /// Whether the devices are this host's.
    pub(super) fn are_here(&self) -> bool {
        self.volumes.iter().all(|volume| volume.is_owned())
    }

    /// Until the end of a move.
    fn see_through(&self, outbound: Outbound, stop: &Stop, json: bool) -> Result<SourceReport> {
        let mut outbound = Arc::new(outbound);
        self.moves.gives(&outbound);
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
                    self.moves.gave(&report);
                    return Ok(report);
                }
                // A scrape is looking at it.
                Err(shared) => outbound = shared,
            }
            thread::yield_now();
        }
    }
}

/// A source that waits for its destination.
pub(super) struct Giver {
    address: std::net::SocketAddr,
    outcome: Arc<Mutex<Option<SourceReport>>>,
    thread: JoinHandle<()>,
}

impl Giver {
    /// Waits for a destination; ends `stop` once the devices have left.
    ///
    /// # Errors
    /// If there is no thread.
    pub(super) fn start(terms: Terms, stop: Stop, json: bool) -> Result<Self> {
        let address = terms.address();
        let outcome = Arc::new(Mutex::default());
        let told = outcome.clone();
        let thread = thread::Builder::new().name("silo-give".to_owned()).spawn(move || {
            while !stop.wait(LOOK) {
                if !terms.waiting.has_caller() {
                    continue;
                }
                match terms.give(&stop, json) {
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
            if let Some(Err(error)) = terms.orders.as_ref().map(Orders::keep) {
                eprintln!("silo: {error:#}");
            }
        })?;
        Ok(Self { address, outcome, thread })
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
        "sent": {
            "demand": report.sent[0], "prefetch": report.sent[1],
            "dirty": report.sent[2], "bulk": report.sent[3],
        },
        "spared": report.spared,
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
