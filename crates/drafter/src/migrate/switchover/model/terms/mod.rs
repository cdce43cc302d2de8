//! Protected machines: when another host may take one, checked to the end.
//!
//! As the [model](super) of a move, with the state machines of `tenure`: each host keeps a [`Pulse`], its
//! copy is held by a [`Holder`], and a third host has a [`Taker`]; the store keeps leases and beats. Calls
//! and answers take any time, for ever too, which is how a host is cut off from the store. After every step
//! at most one copy runs, and whoever is heard owns the lease.
//!
//! The clocks are the worst: a term, as an offer, lasts three ticks for its owner, and the taker waits three.
//! A freeze comes first in its instant, and no time passes before it. Renewals and polls may come at any
//! time, and retries too; a renewal's serial, its life and its nonce count only as far as they differ from others.
//!
//! What it does not exhaust: how often a sign of life is renewed, and how often the third host begins to
//! watch, are bounded by the [`Scene`], since one history may have any number of them; after its last
//! renewal a host is as one that does not reach the store. A move is looked at from five beginnings that
//! real steps led to, and has one offer. The third host is always ready, and its own life holds. That
//! everything comes to rest is the simulator's to show. Of runners that stand still while their host lives, it
//! looks at those of machines that do not move.
//!
//! [`Pulse`]: crate::tenure::Pulse
//! [`Holder`]: crate::tenure::Holder
//! [`Taker`]: crate::tenure::Taker

mod happen;
mod neglect;
mod tests;
mod world;

use super::{DRIFT_PPM, FAST, GOOD_FOR, ONE_PLACE, SLOW, State};
use crate::{
    lease::{AttemptId, Drift, Nonce, Record},
    migrate::switchover::{Terms, terms::Rule as MoveRule},
    tenure::{Rule as TermRule, TakerEvent, TakerState, Times},
};
use happen::Step;
use stateright::{Model, Property};
use std::{sync::Arc, time::Duration};
use world::{DESTINATION, OWNER, Who, World, host};

/// Where it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// A protected machine runs at its owner.
    Protected,
    /// One that is not, and may become so.
    Unprotected,
    /// A protected machine is about to move.
    Moving,
    /// … by an owner whose term ends in a tick, with the taker watching since its last sign of life.
    MovingLate,
    /// … to a host whose life was ended by the taker, and which does not know it.
    MovingToTheDead,
}

/// One rule that a test breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Move(MoveRule),
    Term(TermRule),
}

/// What is explored.
#[derive(Clone, Copy, Debug)]
struct Scene {
    start: Start,
    faults: u8,
    /// How often the owner and the destination renew their signs of life.
    renewals: [u8; 2],
    /// How often the third host begins to watch.
    watches: u8,
    /// How often the owner's runner begins to stand still while its host lives.
    hangs: u8,
    broken: Option<Broken>,
}

impl Scene {
    fn times(&self) -> Times {
        Times {
            term: GOOD_FOR,
            renew_every: Duration::ZERO,
            poll: Duration::ZERO,
            stop_margin: Duration::ZERO,
            start_margin: Duration::from_nanos(1),
            longest_offer: GOOD_FOR,
            drift: Drift { ppm: DRIFT_PPM },
            store_retry: Duration::ZERO,
            broken: match self.broken {
                Some(Broken::Term(rule)) => Some(rule),
                _ => None,
            },
        }
    }

    fn terms(&self) -> Terms {
        let broken = match self.broken {
            Some(Broken::Move(rule)) => Some(rule),
            _ => None,
        };
        super::times_of_a_move(broken)
    }
}

/// By each host's clock: a term and an offer last as long as they may, and the taker waits as short.
const PASSES: [Duration; 3] = [SLOW, SLOW, FAST];

impl World {
    fn stage(&mut self, scene: &Scene) {
        match scene.start {
            Start::Unprotected => {
                self.keep(OWNER);
                self.run_at_owner();
            }
            Start::Protected => self.run_protected(),
            Start::Moving => {
                self.keep(DESTINATION);
                self.run_protected();
                self.move_away();
            }
            Start::MovingLate => {
                self.run_protected();
                self.watch();
                self.serve(Who::Taker);
                self.serve(Who::Taker);
                self.pass(2);
                self.keep(DESTINATION);
                self.move_away();
            }
            Start::MovingToTheDead => {
                self.end_life_of_destination();
                self.run_protected();
                // The taker learns that its fence has won, and that the machine is elsewhere now.
                self.answered(Who::Taker);
                self.serve(Who::Taker);
                self.move_away();
            }
        }
    }

    fn run_protected(&mut self) {
        self.keep(OWNER);
        let record = Record::clone(&self.lease);
        self.lease = Arc::new(self.bound(record, OWNER));
        self.run_at_owner();
    }

    fn pass(&mut self, ticks: u32) {
        for (now, passes) in self.now.iter_mut().zip(PASSES) {
            *now = *now + passes * ticks;
        }
    }

    /// The machine was the destination's once; the taker saw no sign of life and has fenced it, just
    /// after the machine had moved on.
    fn end_life_of_destination(&mut self) {
        self.keep(DESTINATION);
        let first = Record::clone(&self.lease);
        let theirs = Record { owner: host(DESTINATION), ..first.clone() };
        self.lease = Arc::new(self.bound(theirs, DESTINATION));
        self.watch();
        self.serve(Who::Taker);
        self.serve(Who::Taker);
        self.pass(3);
        self.taker_event(TakerEvent::Tick);
        self.serve(Who::Taker);
        self.serve(Who::Taker);
        let fencing = self.taker.as_ref().map(|taker| taker.state());
        assert_eq!(fencing, Some(TakerState::Fencing), "the scene is not what it says");
        self.applied(Who::Taker);
        self.lease = Arc::new(first.taken(host(OWNER), AttemptId(8), Nonce(2)));
    }
}

impl Model for Scene {
    type State = State<World>;
    type Action = Step;

    fn init_states(&self) -> Vec<Self::State> {
        vec![state(World::new(self))]
    }

    fn actions(&self, state: &Self::State, actions: &mut Vec<Step>) {
        if state.world.wrong.is_none() {
            state.world.steps(actions);
        }
    }

    fn next_state(&self, last: &Self::State, step: Step) -> Option<Self::State> {
        let next = state(last.world.after(step, PASSES));
        (next.digest != last.digest).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all =
            vec![Property::always(ONE_PLACE, |_, state: &Self::State| state.world.wrong.is_none())];
        if self.broken.is_none() {
            all.extend(tests::reached(self.start));
            all.extend((self.hangs > 0).then(tests::given_up).into_iter().flatten());
        }
        all
    }
}

fn state(world: World) -> State<World> {
    let digest = world.digest();
    State { world, digest }
}
