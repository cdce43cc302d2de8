//! What is exhausted, and what must be caught.

use super::{
    super::{ONE_PLACE, State, tests::whole},
    Broken, MoveRule, Scene, Start, TermRule,
    happen::Step,
    world::{DESTINATION, OWNER, TAKER, World},
};
use crate::{
    migrate::switchover::{DestinationState, SourceState},
    tenure::TakerState,
};
use stateright::{Checker, HasDiscoveries, Model, Path, Property};
use std::time::Instant;

/// Situations that must be among the states.
pub(super) fn reached(start: Start) -> Vec<Property<Scene>> {
    type Reached = State<World>;
    let sometimes = |name, condition| Property::sometimes(name, condition);
    let mut all = vec![
        sometimes("a term ends", |_, s: &Reached| s.world.copies[OWNER].term_frozen),
        sometimes("the third host fences", |_, s| {
            let taker = s.world.taker.as_ref().map(|taker| taker.state());
            taker == Some(TakerState::Fencing)
        }),
        sometimes("the third host takes the machine", |_, s| s.world.copies[TAKER].executes()),
    ];
    match start {
        Start::Protected => all.push(sometimes("a later life gets it back", |_, s| {
            let copy = &s.world.copies[OWNER];
            copy.executes() && copy.epoch > 1
        })),
        Start::Unprotected => all.push(sometimes("it is protected", |_, s| {
            s.world.lease.beat.is_some() && s.world.copies[OWNER].executes()
        })),
        Start::Moving | Start::MovingLate => {
            all.push(sometimes("it arrives", |_, s| {
                let copy = &s.world.copies[DESTINATION];
                copy.executes() && copy.output
            }));
            all.push(sometimes("the source takes it back", |_, s| {
                matches!(s.world.source_state(), Some(SourceState::Resumed(_)))
            }));
        }
        Start::MovingToTheDead => all.push(sometimes("the destination refuses", |_, s| {
            s.world.destination_state() == Some(DestinationState::Refused)
        })),
    }
    all
}

/// … where a runner stands still.
pub(super) fn given_up() -> Vec<Property<Scene>> {
    type Reached = State<World>;
    vec![
        Property::sometimes("it is given up", |_, s: &Reached| {
            s.world.lease.beat.as_ref().is_some_and(|life| life.name.machine().is_some())
        }),
        Property::sometimes("what was given up is got back", |_, s: &Reached| {
            s.world.neglect.given.is_some() && s.world.copies[OWNER].executes()
        }),
        Property::sometimes("what was given up is taken", |_, s: &Reached| {
            s.world.neglect.given.is_some() && s.world.copies[TAKER].executes()
        }),
    ]
}

fn told(path: &Path<State<World>, Step>) -> String {
    let mut lines: Vec<_> = (path.clone().into_vec().iter())
        .filter_map(|(state, step)| step.map(|step| state.world.tell(step)))
        .collect();
    lines.extend(path.last_state().world.wrong.as_ref().map(|wrong| format!("⇒ {wrong}")));
    lines.join("\n")
}

const fn scene(start: Start, renewals: [u8; 2], faults: u8) -> Scene {
    Scene { start, faults, renewals, watches: 1, hangs: 0, broken: None }
}

fn exhaust(scene: Scene) {
    let begun = Instant::now();
    let checker = scene.checker().spawn_bfs().join();
    let (states, steps, took) =
        (checker.unique_state_count(), checker.state_count(), begun.elapsed());
    println!(
        "{scene:?}: {states} states, {steps} steps, depth {}, {took:.1?}",
        checker.max_depth()
    );
    if let Some(path) = checker.discovery(ONE_PLACE) {
        panic!("not true: {ONE_PLACE}\n{}", told(&path));
    }
    checker.assert_properties();
}

#[test]
fn in_every_history_of_a_protected_machine_it_is_in_one_place() {
    exhaust(scene(Start::Protected, [2, 0], 0));
    exhaust(scene(Start::Protected, [1, 0], 1));
    exhaust(scene(Start::Unprotected, [1, 0], 1));
    exhaust(scene(Start::MovingLate, [0, 0], 1));
    exhaust(scene(Start::MovingToTheDead, [0, 0], 1));
    if whole() {
        exhaust(scene(Start::Protected, [2, 0], 1));
        exhaust(Scene { watches: 2, ..scene(Start::Protected, [1, 0], 0) });
        exhaust(scene(Start::Unprotected, [2, 0], 1));
        exhaust(scene(Start::MovingLate, [0, 0], 2));
        exhaust(scene(Start::MovingLate, [0, 1], 0));
        exhaust(scene(Start::MovingLate, [1, 0], 0));
        exhaust(scene(Start::MovingToTheDead, [0, 0], 2));
        exhaust(scene(Start::MovingToTheDead, [1, 0], 0));
        exhaust(scene(Start::Moving, [0, 0], 0));
    }
}

#[test]
fn a_machine_that_its_host_gives_up_while_its_runner_stands_still_is_in_one_place() {
    exhaust(Scene { hangs: 1, ..scene(Start::Protected, [1, 0], 0) });
    if whole() {
        exhaust(Scene { hangs: 1, ..scene(Start::Protected, [1, 0], 1) });
        exhaust(Scene { hangs: 1, ..scene(Start::Protected, [2, 0], 0) });
        exhaust(Scene { hangs: 2, ..scene(Start::Protected, [1, 0], 0) });
    }
}

#[test]
fn every_rule_of_surrenders_that_is_broken_is_caught() {
    for rule in [TermRule::GiveUpAfterTerm, TermRule::GivenUpIsGotBack] {
        let broken = Some(Broken::Term(rule));
        let scene = Scene { hangs: 1, broken, ..scene(Start::Protected, [1, 0], 0) };
        let checker = scene.checker().finish_when(HasDiscoveries::Any).spawn_bfs().join();
        let path = checker.discovery(ONE_PLACE);
        let path = path.unwrap_or_else(|| panic!("{rule:?} broken, and nothing came of it"));
        println!("{rule:?} broken:\n{}\n", told(&path));
    }
}

/// Each rule, and where it is missed without any fault.
fn rules() -> Vec<(Broken, Start, [u8; 2])> {
    let protected = [
        TermRule::CountFromSending,
        TermRule::FreezeAtTermEnd,
        TermRule::WaitTermOut,
        TermRule::WaitCoversDrift,
        TermRule::SeenWhenAnswered,
        TermRule::FenceBeforeTake,
        TermRule::FenceEndsLife,
        TermRule::ReclaimBeforeRun,
    ];
    let protected = protected.map(|rule| (Broken::Term(rule), Start::Protected, [2, 0]));
    let others = [
        (Broken::Term(TermRule::BoundFromSending), Start::Unprotected, [1, 0]),
        (Broken::Term(TermRule::WaitForOffers), Start::MovingLate, [0, 0]),
        (Broken::Move(MoveRule::NoTokenAfterTerm), Start::MovingLate, [0, 1]),
        (Broken::Term(TermRule::TermFromTheToken), Start::MovingToTheDead, [0, 0]),
        (Broken::Term(TermRule::NoReclaimWhileMoving), Start::MovingToTheDead, [1, 0]),
    ];
    protected.into_iter().chain(others).collect()
}

#[test]
fn every_rule_of_terms_that_is_broken_is_caught() {
    let mut missed = Vec::new();
    for (rule, start, renewals) in rules() {
        let scene = Scene { broken: Some(rule), ..scene(start, renewals, 0) };
        let checker = scene.checker().finish_when(HasDiscoveries::Any).spawn_bfs().join();
        match checker.discovery(ONE_PLACE) {
            Some(path) => println!("{rule:?} broken, {start:?}:\n{}\n", told(&path)),
            None => missed.push(rule),
        }
    }
    assert!(missed.is_empty(), "broken, and nothing came of it: {missed:?}");
}
