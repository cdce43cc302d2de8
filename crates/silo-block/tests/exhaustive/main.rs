//! Every order of events in a small move, by `stateright`: two blocks, two writes, one fault, a store
//! that has one block. The machines are the real ones: a state is the list of steps that leads to
//! it, and is rebuilt by taking them again; two states are the same if all that the machines, the
//! hosts and the lines hold is the same.
//!
//! Checked in every state: a block that is here for whoever runs has the newest write (after a crash
//! none older than the last flush); one side at most runs; who can do nothing more has finished.
#![allow(clippy::unwrap_used, reason = "a test")]

mod world;

use silo_block::session::messages::{DeviceIndex, SessionId};
use stateright::{Checker, Model, Property};
use std::hash::{Hash, Hasher};
use std::time::Duration;
use world::World;

const BLOCKS: u64 = 2;
const DEVICE: DeviceIndex = DeviceIndex(0);
const NOW: Duration = Duration::ZERO;
const SESSION: SessionId = SessionId([9; 16]);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Write(u64),
    Flush,
    ToDestination,
    ToSource,
    Data(usize),
    Stored(u64),
    Promise,
    Fetched { right: bool },
    Cut,
    CrashSource,
    CrashDestination,
}

/// What may happen in a model, so that several small ones cover more than one large one.
#[derive(Clone, Copy, Debug)]
struct Small {
    writes: usize,
    store: bool,
    cut: bool,
    crashes: bool,
}

#[derive(Clone, Debug)]
struct State {
    path: Vec<Step>,
    steps: Vec<Step>,
    digest: u128,
    wrong: Option<String>,
    seen: Seen,
}

/// What has happened on the way, to show that it can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    handed_over: bool,
    released: bool,
    late: bool,
    early_write: bool,
    from_store: bool,
    wrong_answer: bool,
    taken_back: bool,
    resumed_after_fault: bool,
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

impl Model for Small {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![state(self, Vec::new())]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        actions.extend(&state.steps);
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut path = last.path.clone();
        path.push(step);
        Some(state(self, path))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing is lost, and one side runs", |_, state: &State| {
                state.wrong.is_none()
            }),
            Property::always("who stands still has finished", |_, state: &State| {
                !state.steps.is_empty() || state.wrong.is_none()
            }),
            Property::sometimes("the token arrives", |_, state: &State| state.seen.handed_over),
            Property::sometimes("the source may go", |_, state: &State| state.seen.released),
            Property::sometimes("content comes late", |small: &Small, state: &State| {
                state.seen.late || small.writes == 0
            }),
            Property::sometimes(
                "a block is written before it comes",
                |small: &Small, state: &State| state.seen.early_write || small.writes < 2,
            ),
            Property::sometimes("the store is faster", |small: &Small, state: &State| {
                state.seen.from_store || !small.store
            }),
            Property::sometimes("the store is wrong", |small: &Small, state: &State| {
                state.seen.wrong_answer || !small.store
            }),
            Property::sometimes("authority is taken back", |small: &Small, state: &State| {
                state.seen.taken_back || !small.crashes
            }),
            Property::sometimes("a fault is survived", |small: &Small, state: &State| {
                state.seen.resumed_after_fault || !(small.cut || small.crashes)
            }),
        ]
    }
}

fn state(small: &Small, path: Vec<Step>) -> State {
    let mut world = World::new();
    for step in &path {
        world.step(*step);
    }
    let steps = if world.wrong.is_some() { Vec::new() } else { world.steps(small) };
    if steps.is_empty() && world.wrong.is_none() && !world.finished() {
        world.wrong = Some(format!("stands still: {:?}", world.phases()));
    }
    State { steps, digest: world.digest(), wrong: world.wrong, seen: world.seen, path }
}

fn explore(small: Small) {
    let checker = small.checker().threads(2).target_state_count(LIMIT).spawn_bfs().join();
    let states = checker.unique_state_count();
    println!("{small:?}: {states} states, depth {}", checker.max_depth());
    for (name, path) in checker.discoveries() {
        let last = path.last_state();
        if let Some(wrong) = &last.wrong {
            panic!("{name}: {wrong}\n{:#?}", last.path);
        }
    }
    checker.assert_properties();
    assert!(states < LIMIT, "not all states were seen");
}

const LIMIT: usize = 1_000_000;

#[test]
fn check_21_every_order_of_a_move_with_two_writes_and_a_cut() {
    explore(Small { writes: 2, store: false, cut: true, crashes: false });
}

#[test]
fn check_21_every_order_of_a_move_with_two_writes_a_flush_and_a_crash() {
    explore(Small { writes: 2, store: false, cut: false, crashes: true });
}

#[test]
fn every_order_of_a_move_with_two_writes_and_a_store_that_may_lie() {
    explore(Small { writes: 2, store: true, cut: false, crashes: false });
}

#[test]
fn every_order_of_a_move_with_a_write_a_store_and_a_cut() {
    explore(Small { writes: 1, store: true, cut: true, crashes: false });
}
