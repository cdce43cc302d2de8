//! The switchover, checked to the end: every state that can be reached, not a sample of histories.
//!
//! A model for `stateright`. A state holds the state machines that run ([`SourceAuthority`] and
//! [`DestinationAuthority`], and in [`terms`] the three of `tenure`), two hosts, one lease store and
//! what is on its way between them. A step is one thing that happens. The checker takes every step in
//! every state, and proves of all that can be reached:
//!
//! * the machine is in one place: two copies never run, nobody is heard who does not own the lease, no
//!   epoch is used twice, a token never goes out before the lease says so or while the source runs, an
//!   attempt that was refused never runs, no output leaves before the flushes of the source are durable;
//! * everything comes to rest: from every state, if no more faults come, the owner's copy runs and is
//!   heard, and both ends know it (`calm`). Exempt are an owner whose host is lost, and output that
//!   waits for a flush that died with the source's host: those ask for a person.
//!
//! `make test` exhausts two attempts with two faults, `make model` two attempts with three faults and
//! more. Each rule, broken on purpose, must be caught, and the shortest history that shows it is told.
//!
//! # What is modelled
//!
//! Two attempts: a move and its retry, or there and back. In each: *messages* that come at once, late, never,
//! in any order, any number of times (a message that was sent may arrive at every later moment; this is
//! free, and covers loss, doubling and reordering without bound). *The store*: a call may take any time
//! to be done, and its answer any time to come; this is free too. Faults, of which a history has as many
//! as its size says: the caller of a call hears that nobody answers, and what it asked for has
//! happened, happens later or never; the store is down for any time; the line is cut, each end notices
//! when it does, and the ends may find each other again; either host dies; either end's runner dies, and
//! another comes; pausing fails, loading fails, either end is called off. What dies stays as it was left,
//! and what it sent stays sent. The guard is there when a destination's runner dies.
//!
//! # Why what is left out does not matter
//!
//! * *Time* moves in ticks. An offer lasts three of them by the slowest clock, and the source, with the
//!   fastest, waits three. All that two events of different hosts have to do with each other in time is
//!   one inequality: the end of an offer comes before the end of the source's wait. Everything may
//!   happen within a tick, in any order, and every timer of the source may be as late as it likes, so
//!   each order of "sent, received, named, token received, ended, waited for" that satisfies the inequality is one of the
//!   model's. ρ is 1/5 so that it shows in whole ticks; the rules do not depend on it.
//!   `make model` tries the other clocks too: they only make the source wait for longer.
//! * *Margins* are nearly zero. `stop_margin` says that a freeze takes effect before the end of the
//!   offer: here it is the first thing that happens at that instant, and no time passes before it. `start_margin` and
//!   `store_retry` only ever make things happen later; a retry is due at once, and taken up at any time.
//!   `patience` is one tick: time enough for retries, and the source may give up.
//! * *Two offers* in an attempt: the source keeps one, and the token names one; the second is the newer.
//! * *Actions are done at once.* Whatever fails between two of them is a message, a call or a job of
//!   the host that never comes to anything, which may happen to each. The end of a copy is a step of its
//!   own, because a runner may die between its refusal and that.
//! * *States are one if they cannot be told apart* from now on: times count from now, as far as anything
//!   waits for them; nonces and epochs are compared and not read, so names are given by first
//!   appearance; calls that nobody awaits, writes that expect a record which is gone (none is ever
//!   written twice), messages whose receiver is past them, are dropped (`World::normalise`).
//! * *The next attempt* drops what the last has left at its destination, as the runner does. Its writes
//!   stay on their way.

mod calm;
mod digest;
mod happen;
mod steps;
mod terms;
mod tests;
mod world;

pub(crate) use digest::{Digest, left};

use super::{DestinationEvent, SourceEvent, Terms, terms::Rule};
use calm::Rested;
use stateright::{Model, Property};
use std::{
    hash::{Hash, Hasher},
    time::Duration,
};
use steps::Step;
use world::World;

/// Any time at which no clock began.
const LONG_AGO: Duration = Duration::from_secs(1000);
/// ρ, so large that it shows in whole ticks.
const DRIFT_PPM: u32 = 200_000;
/// One tick by the slowest and by the fastest clock.
const SLOW: Duration = Duration::from_millis(800);
const FAST: Duration = Duration::from_millis(1200);
/// G: three ticks by the slowest clock. The fastest waits as long.
const GOOD_FOR: Duration = Duration::from_millis(2400);
/// One tick by the fastest clock.
const FRESH: Duration = Duration::from_millis(1200);
/// What the fastest clock shows when T, as long as G here, is over by the slowest.
const PATIENCE_OF_TAKERS: Duration = Duration::from_millis(3600);

/// A message between the ends.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Message {
    ToSource(SourceEvent),
    ToDestination(DestinationEvent),
}

/// What is explored.
struct Size {
    attempts: u8,
    faults: u8,
    /// For each attempt: how many offers are made, and how often pre-copy is said to be done.
    offers: u8,
    wants: u8,
    /// A tick by the source's clock, by the destination's.
    clocks: [Duration; 2],
    broken: Option<Rule>,
    rested: Rested,
}

impl Size {
    fn new(attempts: u8, faults: u8) -> Self {
        Self {
            attempts,
            faults,
            offers: 2,
            wants: 1,
            clocks: [FAST, SLOW],
            broken: None,
            rested: Rested::default(),
        }
    }
}

fn times_of_a_move(broken: Option<Rule>) -> Terms {
    Terms {
        good_for: GOOD_FOR,
        drift_ppm: DRIFT_PPM,
        stop_margin: Duration::ZERO,
        start_margin: Duration::from_nanos(1),
        fresh_for: FRESH,
        longest_offer: GOOD_FOR,
        patience: FRESH,
        store_retry: Duration::ZERO,
        broken,
    }
}

/// A world by what counts of it.
#[derive(Clone)]
struct State<W> {
    world: W,
    digest: u64,
}

impl<W> std::fmt::Debug for State<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.digest)
    }
}

impl<W> PartialEq for State<W> {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl<W> Hash for State<W> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

impl State<World> {
    fn of(world: World) -> Self {
        let digest = world.digest();
        Self { world, digest }
    }
}

const ONE_PLACE: &str = "the machine is in one place";
const REST: &str = "everything comes to rest";

impl Model for Size {
    type State = State<World>;
    type Action = Step;

    fn init_states(&self) -> Vec<Self::State> {
        vec![State::of(World::new(self))]
    }

    fn actions(&self, state: &Self::State, actions: &mut Vec<Step>) {
        let world = &state.world;
        if world.wrong.is_none() {
            world.steps(actions);
            world.wishes(actions);
            world.possible_faults(actions);
        }
    }

    fn next_state(&self, last: &Self::State, step: Step) -> Option<Self::State> {
        let next = State::of(last.world.after(step, self.clocks));
        (next.digest != last.digest).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = vec![
            Property::always(ONE_PLACE, |_, state: &Self::State| state.world.wrong.is_none()),
            Property::always(REST, |size: &Self, state: &Self::State| {
                size.rests(&state.world, &size.rested).is_ok()
            }),
        ];
        // A model that never reaches a state proves nothing about it.
        if self.broken.is_none() && self.attempts > 1 && self.faults > 0 {
            all.extend(tests::reached());
        }
        all
    }
}
