//! What is exhausted, and what must be caught.

use super::{FAST, ONE_PLACE, REST, SLOW, Size, State, calm::Rested, steps::Step, world::World};
use crate::migrate::switchover::{DestinationState as D, SourceState as S, terms::Rule};
use stateright::{Checker, HasDiscoveries, Model, Path, Property};
use std::time::{Duration, Instant};

/// Whether more is wanted than a change must pass: `make model`.
pub(super) fn whole() -> bool {
    std::env::var("MODEL").is_ok_and(|model| model == "whole")
}

/// Situations that must be among the states.
pub(super) fn reached() -> Vec<Property<Size>> {
    type Reached = State<World>;
    fn source(state: &Reached) -> Option<S> {
        state.world.source_state()
    }
    fn destination(state: &Reached) -> Option<D> {
        state.world.destination_state()
    }
    fn second(state: &Reached, from: usize) -> bool {
        state.world.attempts == 0 && state.world.from == from
    }
    let settled = |name, condition| Property::sometimes(name, condition);
    vec![
        settled("a retry arrives", |_, s: &Reached| {
            second(s, 0) && matches!(destination(s), Some(D::Settled(_)))
        }),
        settled("it moves there and back", |_, s| {
            second(s, 1) && matches!(destination(s), Some(D::Settled(_)))
        }),
        settled("the source may go", |_, s| source(s) == Some(S::Released)),
        settled("the source gives up", |_, s| source(s) == Some(S::Aborted)),
        settled("the source takes it back", |_, s| matches!(source(s), Some(S::Resumed(_)))),
        settled("the destination refuses", |_, s| destination(s) == Some(D::Refused)),
        settled("the destination drops it", |_, s| destination(s) == Some(D::Discarded)),
        settled("the destination loses", |_, s| destination(s) == Some(D::Lost)),
        settled("the offer ends before the answer", |_, s| {
            destination(s) == Some(D::FrozenUnconfirmed)
        }),
        settled("both ask the store, and the destination is first", |_, s| {
            source(s) == Some(S::TakingBack) && matches!(destination(s), Some(D::Owner(_)))
        }),
        settled("a write is late", |_, s| !s.world.late.is_empty()),
        settled("the guard freezes", |_, s| {
            let guarded = s.world.left.is_some_and(|left| left.until.is_some());
            let copy = &s.world.copies[s.world.to()];
            guarded && copy.frozen && copy.running
        }),
        settled("a destination's next runner reads the lease", |_, s| s.world.found.is_some()),
        settled("a source's next runner waits for the offer's end", |_, s| {
            s.world.doings.deaf && source(s) == Some(S::AwaitingVerdict)
        }),
    ]
}

fn told(path: &Path<State<World>, Step>) -> String {
    let last = path.last_state();
    let mut lines: Vec<_> = (path.clone().into_vec().iter())
        .filter_map(|(state, step)| step.map(|step| state.world.tell(step)))
        .collect();
    match (&last.world.wrong, Size::new(0, 0).rests(&last.world, &Rested::default())) {
        (Some(wrong), _) => lines.push(format!("⇒ {wrong}")),
        (None, Err(why)) => lines.push(format!("⇒ if nothing else fails: {why}")),
        (None, Ok(())) => {}
    }
    lines.join("\n")
}

fn exhaust(size: Size) {
    let name = format!(
        "{} attempts, {} faults, {} offers, {} wishes, ticks of {:?}",
        size.attempts, size.faults, size.offers, size.wants, size.clocks
    );
    let begun = Instant::now();
    let checker = size.checker().spawn_bfs().join();
    let (states, steps, took) =
        (checker.unique_state_count(), checker.state_count(), begun.elapsed());
    println!("{name}: {states} states, {steps} steps, depth {}, {took:.1?}", checker.max_depth());
    for property in [ONE_PLACE, REST] {
        if let Some(path) = checker.discovery(property) {
            panic!("not true: {property}\n{}", told(&path));
        }
    }
    checker.assert_properties();
}

#[test]
fn in_every_history_of_two_attempts_the_machine_is_in_one_place_and_comes_to_rest() {
    let faults = if whole() { 3 } else { 2 };
    exhaust(Size::new(2, faults));
    if whole() {
        exhaust(Size { offers: 3, wants: 2, ..Size::new(2, 3) });
        for clocks in [[FAST, FAST], [SLOW, SLOW], [SLOW, FAST]] {
            exhaust(Size { clocks, ..Size::new(2, 3) });
        }
        exhaust(Size::new(1, 4));
    }
}

/// The rules of a move of a machine without a term; for the rest see `terms`.
const RULES: [Rule; 18] = [
    Rule::HandOverBeforePause,
    Rule::RunOnlyInOffer,
    Rule::HoldOutput,
    Rule::HoldOutputForFlush,
    Rule::FreezeAtEnd,
    Rule::DiscardWhenLost,
    Rule::NoRefusalAfterTake,
    Rule::WaitForExpiry,
    Rule::WaitForNamedOffer,
    Rule::ExpiryCoversDrift,
    Rule::ClaimBeforeResume,
    Rule::SuccessorClaimsBack,
    Rule::NewEpoch,
    Rule::SettleByNonce,
    Rule::SilenceIsNoVerdict,
    Rule::GuardOutlivesRunner,
    Rule::SuccessorTakesWhatWasAsked,
    Rule::SuccessorAsksOn,
];

/// The shortest history with the fewest faults that breaks an invariant.
fn shortest(rule: Rule) -> Option<(u8, Path<State<World>, Step>)> {
    (0..=2).find_map(|faults| {
        let size = Size { broken: Some(rule), ..Size::new(1, faults) };
        let checker = size.checker().finish_when(HasDiscoveries::Any).spawn_bfs().join();
        let path = checker.discoveries().into_values().next();
        path.map(|path| (faults, path))
    })
}

#[test]
fn every_rule_of_a_move_that_is_broken_is_caught() {
    let missed: Vec<_> = (RULES.into_iter())
        .filter(|rule| match shortest(*rule) {
            None => true,
            Some((faults, path)) => {
                println!("{rule:?} broken, {faults} faults:\n{}\n", told(&path));
                false
            }
        })
        .collect();
    assert!(missed.is_empty(), "broken, and nothing came of it: {missed:?}");
}

/// What makes states one must not hide what happens: the same clocks, told from another time.
#[test]
fn a_state_is_the_same_at_another_time_and_under_other_names() {
    let clocks = [FAST, SLOW];
    let begun = World::new(&Size::new(2, 1));
    let later = (0..5).fold(begun.clone(), |world, _| world.after(Step::Time, clocks));
    assert_ne!(begun.now, later.now);
    assert_eq!(begun.digest(), later.digest());
    let offered = later.after(Step::Prepared, clocks);
    assert_ne!(offered.digest(), later.digest());
    let aged = offered.after(Step::Time, clocks);
    assert_ne!(aged.digest(), offered.digest());
    assert_eq!(aged.now[1].since(offered.now[1]), Duration::from_millis(800));
}
