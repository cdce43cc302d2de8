//! The figures of a move at its two ends, and of the devices that may move.
//!
//! A process has at most one move at a time at each end. While one runs it is asked; when it is over
//! its last figures stay, until another begins.

use super::{Readings, Source, names, spread};
use silo::{
    moving::{
        Inbound, Outbound, Volume,
        codec::Tally,
        destination::DestinationReport,
        report::{Phase, Progress, SourceReport, Timings, WireBytes},
    },
    times::Histogram,
};
use silo_block::{
    order::Class,
    session::{destination, source},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Figures that both ends have.
#[derive(Clone)]
struct Course {
    phase: Phase,
    size: u64,
    remaining: u64,
    rate: f64,
    wire: WireBytes,
    timings: Timings,
}

impl Course {
    fn new(progress: &Progress, timings: Timings) -> Self {
        let Progress { phase, size, remaining, rate, wire, .. } = *progress;
        Self { phase, size, remaining, rate, wire, timings }
    }

    /// It has ended well.
    fn ended(&mut self, wire: WireBytes, timings: Timings) {
        (self.phase, self.remaining, self.rate) = (Phase::Durable, 0, 0.0);
        (self.wire, self.timings) = (wire, timings);
    }

    fn read(&self, end: &str, readings: &mut Readings) {
        let number = match self.phase {
            Phase::Connecting => 0,
            Phase::Filling => 1,
            Phase::Quiescing => 2,
            Phase::Switching => 3,
            Phase::Following => 4,
            Phase::Durable => 5,
        };
        readings.level(&names::MOVE_PHASE, &[end], f64::from(number));
        readings.level(&names::MOVE_SIZE, &[end], self.size as f64);
        readings.level(&names::MOVE_REMAINING, &[end], self.remaining as f64);
        readings.level(&names::MOVE_RATE, &[end], self.rate);
        for (connection, bytes) in [
            ("control-sent", self.wire.control_sent),
            ("control-received", self.wire.control_received),
            ("data", self.wire.data),
            ("demand", self.wire.demand),
        ] {
            readings.count(&names::MOVE_WIRE, &[end, connection], bytes);
        }
        for (phase, took) in [
            ("connect", self.timings.connect),
            ("pre-copy", self.timings.filling),
            ("pause", self.timings.quiesce),
            ("switch", self.timings.switch),
            ("post-copy", self.timings.following),
        ] {
            readings.level(&names::MOVE_PHASE_SECONDS, &[end, phase], took.as_secs_f64());
        }
        let blackout = self.timings.quiesce + self.timings.switch;
        readings.level(&names::MOVE_BLACKOUT, &[end], blackout.as_secs_f64());
    }
}

/// A source.
#[derive(Clone)]
struct Giving {
    course: Course,
    rounds: u32,
    paths: Tally,
    sent: [u64; Class::ALL.len()],
    spared: u64,
}

impl Giving {
    fn of(outbound: &Outbound) -> Self {
        let progress = outbound.progress();
        let source::Counters { sent, spared, .. } = outbound.counters();
        Self {
            course: Course::new(&progress, outbound.timings()),
            rounds: progress.rounds,
            paths: outbound.paths(),
            sent,
            spared,
        }
    }

    fn read(&self, readings: &mut Readings) {
        let end = "source";
        self.course.read(end, readings);
        readings.count(&names::MOVE_ROUNDS, &[], u64::from(self.rounds));
        let paths = &self.paths;
        for (path, blocks) in [
            ("zero", paths.zero),
            ("fill", paths.fill),
            ("same", paths.same),
            ("held", paths.held),
            ("plain", paths.plain),
            ("packed", paths.packed),
            ("delta", paths.delta),
            ("spared", self.spared),
        ] {
            readings.count(&names::MOVE_BLOCKS, &[end, path], blocks);
        }
        for (class, blocks) in Class::ALL.iter().zip(self.sent) {
            let class = match class {
                Class::Demand => "demand",
                Class::Prefetch => "prefetch",
                Class::Dirty => "dirty",
                Class::Bulk => "bulk",
            };
            readings.count(&names::MOVE_SENT, &[class], blocks);
        }
    }
}

/// A destination.
#[derive(Clone)]
struct Receiving {
    course: Course,
    counters: destination::Counters,
    waits: Histogram,
}

impl Receiving {
    fn of(inbound: &Inbound) -> Self {
        Self {
            course: Course::new(&inbound.progress(), inbound.timings()),
            counters: inbound.counters(),
            waits: inbound.wait_times(),
        }
    }

    fn read(&self, readings: &mut Readings) {
        let end = "destination";
        self.course.read(end, readings);
        let counters = &self.counters;
        for (path, blocks) in [
            ("peer", counters.from_peer),
            ("store", counters.from_store),
            ("written", counters.written),
            ("late", counters.late),
            ("again", counters.again),
        ] {
            readings.count(&names::MOVE_BLOCKS, &[end, path], blocks);
        }
        readings.spread(&names::MOVE_WAIT, &[], spread(&self.waits));
    }
}

/// One end: what runs, and what it said last.
struct Watched<T, F> {
    running: Weak<T>,
    last: Option<F>,
}

impl<T, F> Default for Watched<T, F> {
    fn default() -> Self {
        Self { running: Weak::new(), last: None }
    }
}

impl<T, F: Clone> Watched<T, F> {
    /// The figures of now, or the last ones.
    fn look(&mut self, over: impl Fn(&T) -> bool, figures: impl Fn(&T) -> F) -> Option<F> {
        // One that is over has given its counters to its report.
        if let Some(running) = self.running.upgrade().filter(|running| !over(running)) {
            self.last = Some(figures(&running));
        }
        self.last.clone()
    }
}

/// The figures of the moves of this process.
#[derive(Default)]
pub(crate) struct MoveFigures {
    source: Mutex<Watched<Outbound, Giving>>,
    destination: Mutex<Watched<Inbound, Receiving>>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MoveFigures {
    /// Devices begin to leave.
    pub(crate) fn gives(&self, outbound: &Arc<Outbound>) {
        let last = Some(Giving::of(outbound));
        *lock(&self.source) = Watched { running: Arc::downgrade(outbound), last };
    }

    /// They have left.
    pub(crate) fn gave(&self, report: &SourceReport) {
        let mut source = lock(&self.source);
        source.running = Weak::new();
        if let Some(giving) = &mut source.last {
            giving.course.ended(report.wire, report.timings);
            giving.rounds = report.rounds;
            (giving.paths, giving.sent, giving.spared) = (report.paths, report.sent, report.spared);
        }
    }

    /// Devices begin to come.
    pub(crate) fn receives(&self, inbound: &Arc<Inbound>) {
        let last = Some(Receiving::of(inbound));
        *lock(&self.destination) = Watched { running: Arc::downgrade(inbound), last };
    }

    /// They are here.
    pub(crate) fn received(&self, report: &DestinationReport, waits: Histogram) {
        let mut destination = lock(&self.destination);
        destination.running = Weak::new();
        if let Some(receiving) = &mut destination.last {
            receiving.course.ended(report.wire, report.timings);
            (receiving.counters, receiving.waits) = (report.counters, waits);
        }
    }
}

impl Source for MoveFigures {
    fn read(&self, readings: &mut Readings) {
        if let Some(giving) = lock(&self.source).look(Outbound::is_over, Giving::of) {
            giving.read(readings);
        }
        if let Some(receiving) = lock(&self.destination).look(Inbound::is_over, Receiving::of) {
            receiving.read(readings);
        }
    }
}

/// What is tracked of a device that may move.
pub(crate) struct Tracking(Arc<Volume>);

impl Tracking {
    /// Of `volume`.
    pub(crate) fn new(volume: Arc<Volume>) -> Arc<Self> {
        Arc::new(Self(volume))
    }
}

impl Source for Tracking {
    fn read(&self, readings: &mut Readings) {
        let (device, rounds) = ([self.0.name().as_str()], self.0.rounds());
        readings.level(&names::TRACKING_BLOCKS, &device, rounds.blocks() as f64);
        readings.level(&names::TRACKING_EPOCH, &device, f64::from(rounds.clock().0));
        readings.level(&names::TRACKING_ABSENT, &device, self.0.absent() as f64);
        readings.level(&names::TRACKING_MEMORY, &device, rounds.memory() as f64);
    }
}
