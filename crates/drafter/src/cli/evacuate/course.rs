//! The evacuation itself: so many machines at a time, as the plan says.
//!
//! ```text
//!   planned, in its order ─▶ those whose move came to nothing, to sleep ─▶ those it did not expect to leave
//!                                         │
//!   asleep, and a host was named ─────────┴──▶ woken there, beside all this
//! ```
//!
//! What must hold: every machine of the plan has one outcome; nobody's outcome waits for a machine that is
//! being woken; a machine is safe when its move has ended or its sleep is durable, and not before.

use super::{
    super::moves::HostAt,
    deeds::{Asleep, Deeds, Moved},
    destinations::{Destination, Place},
    report::Outcome,
};
use evacuation::{Load, Plan, StoreUse, Terms, Way};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

/// What an evacuation is done with.
pub(super) struct Course<'a> {
    pub(super) loads: &'a [Load],
    pub(super) to: &'a BTreeMap<String, Destination>,
    /// Hosts that may wake machines which the file of destinations names no hosts for.
    pub(super) hosts: &'a [HostAt],
    /// As it was planned with.
    pub(super) terms: &'a Terms,
    /// Since the command began.
    pub(super) began: Instant,
    /// From then until the host is gone.
    pub(super) deadline: Duration,
    pub(super) deeds: &'a dyn Deeds,
}

/// One machine, and what is tried.
struct Todo {
    machine: usize,
    way: Option<Way>,
    expected: bool,
    /// Why its move came to nothing.
    not_moved: Option<String>,
}

#[derive(Default)]
struct Queue {
    planned: VecDeque<Todo>,
    again: VecDeque<Todo>,
    left: VecDeque<Todo>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    fn of(plan: &Plan) -> Self {
        let todo = |(machine, way, expected)| Todo { machine, way, expected, not_moved: None };
        let planned = plan.steps.iter().map(|step| todo((step.machine, Some(step.way), true)));
        let left = plan.left.iter().map(|left| todo((left.machine, left.way, false)));
        Self { planned: planned.collect(), again: VecDeque::new(), left: left.collect() }
    }

    fn next(&mut self) -> Option<Todo> {
        let first = self.planned.pop_front().or_else(|| self.again.pop_front());
        first.or_else(|| self.left.pop_front())
    }
}

/// What was done.
enum Done {
    Moved(Moved),
    Asleep(Asleep),
}

/// What became of a try.
enum Came {
    To(Box<Outcome>),
    /// It did not move, and may sleep.
    Again(Todo),
}

impl Course<'_> {
    /// Does a plan; what became of each of its machines, in the order in which that was known.
    pub(super) fn run(&self, plan: &Plan) -> Vec<Outcome> {
        let queue = Mutex::new(Queue::of(plan));
        let outcomes = Mutex::new(Vec::new());
        let (to_wake, sleeping) = mpsc::channel::<Box<Outcome>>();
        let sleeping = Mutex::new(sleeping);
        let work = |to_wake: &mpsc::Sender<Box<Outcome>>| {
            loop {
                let todo = lock(&queue).next();
                let Some(todo) = todo else { return };
                match self.attempt(&todo) {
                    Came::Again(todo) => lock(&queue).again.push_back(todo),
                    Came::To(outcome) if self.is_to_be_woken(&outcome) => {
                        // Those who wake are there for as long as somebody may send.
                        if let Err(mpsc::SendError(outcome)) = to_wake.send(outcome) {
                            lock(&outcomes).push(*outcome);
                        }
                    }
                    Came::To(outcome) => lock(&outcomes).push(*outcome),
                }
            }
        };
        let wake = || {
            loop {
                let next = lock(&sleeping).recv();
                let Ok(mut outcome) = next else { return };
                self.wake(&mut outcome);
                lock(&outcomes).push(*outcome);
            }
        };
        thread::scope(|scope| {
            for _ in 0..self.terms.parallel.max(1) {
                let to_wake = to_wake.clone();
                scope.spawn(move || work(&to_wake));
                scope.spawn(wake);
            }
            drop(to_wake);
        });
        outcomes.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tries one machine, to the end.
    fn attempt(&self, todo: &Todo) -> Came {
        let load = &self.loads[todo.machine];
        let mut outcome = Outcome {
            machine: load.name.clone(),
            way: todo.way,
            expected: todo.expected,
            not_moved: todo.not_moved.clone(),
            ..Outcome::default()
        };
        let done = match (todo.way, self.to.get(&load.name)) {
            (Some(Way::Suspend), _) if todo.not_moved.is_some() && !self.is_time_to_sleep(load) => {
                Err("there is no time left for that".to_owned())
            }
            (Some(Way::Suspend), _) => self.deeds.sleep(load).map(Done::Asleep),
            (Some(way), Some(to)) => match self.deeds.go(load, to, way, self.left()) {
                Err(why) if Way::Suspend.is_open(load, self.terms) => {
                    let Todo { machine, expected, .. } = *todo;
                    let (way, not_moved) = (Some(Way::Suspend), Some(why));
                    return Came::Again(Todo { machine, way, expected, not_moved });
                }
                moved => moved.map(Done::Moved),
            },
            (None, _) | (_, None) if self.terms.store == StoreUse::None => {
                Err("nobody has named a host for it".into())
            }
            (None, _) | (_, None) => {
                Err("nobody has named a host for it, and it cannot sleep in the store".into())
            }
        };
        let safe = self.began.elapsed();
        match done {
            Err(why) => {
                outcome.error = Some(match outcome.not_moved.take() {
                    Some(not_moved) => format!("{not_moved}; it was not put to sleep: {why}"),
                    None => why,
                });
                return Came::To(Box::new(outcome));
            }
            Ok(Done::Moved(moved)) => {
                outcome.host = Some(moved.host);
                outcome.blackout_ms = Some(moved.blackout_ms);
                outcome.sent_bytes = Some(moved.sent_bytes);
                outcome.known_bytes = moved.known_bytes;
            }
            Ok(Done::Asleep(asleep)) => outcome.asleep = Some(asleep),
        }
        outcome.safe_s = Some(safe.as_secs_f64());
        outcome.in_time = safe <= self.deadline;
        Came::To(Box::new(outcome))
    }

    /// Until the host is gone.
    fn left(&self) -> Duration {
        self.deadline.saturating_sub(self.began.elapsed())
    }

    /// Whether a machine that sleeps now, with the whole line, does so before the host is gone.
    fn is_time_to_sleep(&self, load: &Load) -> bool {
        let left = self.left();
        let alone = std::slice::from_ref(load);
        let times = evacuation::foresee(alone, &[(0, Way::Suspend)], self.terms);
        times.into_iter().flatten().any(|times| times.safe <= left)
    }

    /// The hosts that are asked to wake a machine.
    fn wakes_at(&self, machine: &str) -> &[HostAt] {
        match self.to.get(machine) {
            Some(Destination { place: Place::Hosts(hosts), .. }) => hosts,
            Some(Destination { place: Place::Runner(_), .. }) | None => self.hosts,
        }
    }

    fn is_to_be_woken(&self, outcome: &Outcome) -> bool {
        outcome.asleep.is_some() && !self.wakes_at(&outcome.machine).is_empty()
    }

    fn wake(&self, outcome: &mut Outcome) {
        match self.deeds.wake(&outcome.machine, self.wakes_at(&outcome.machine)) {
            Ok(host) => {
                outcome.host = Some(host);
                outcome.woken_s = Some(self.began.elapsed().as_secs_f64());
            }
            Err(why) => outcome.not_woken = Some(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use evacuation::{Bytes, Rate};

    /// Deeds by script: which machines do not move, sleep or wake; and what was done.
    #[derive(Default)]
    struct Script {
        stuck: Vec<&'static str>,
        sleepless: Vec<&'static str>,
        unwoken: Vec<&'static str>,
        done: Mutex<Vec<String>>,
    }

    impl Script {
        fn does(&self, what: &str, machine: &str, not: &[&str]) -> Result<(), String> {
            lock(&self.done).push(format!("{what} {machine}"));
            if not.contains(&machine) { Err(format!("no {what}")) } else { Ok(()) }
        }
    }

    impl Deeds for Script {
        fn go(&self, load: &Load, to: &Destination, _: Way, _: Duration) -> Result<Moved, String> {
            self.does("move", &load.name, &self.stuck)?;
            let host = to.place.first().unwrap().to_owned();
            Ok(Moved { host, blackout_ms: 1.0, sent_bytes: 1, known_bytes: 0 })
        }

        fn sleep(&self, load: &Load) -> Result<Asleep, String> {
            self.does("sleep", &load.name, &self.sleepless)?;
            Ok(Asleep {
                line: format!("machines/{}.suspended", load.name),
                generation: 2,
                stored_bytes: 1,
                paused_ms: 1.0,
                resume: format!("drafter resume {}", load.name),
            })
        }

        fn wake(&self, machine: &str, hosts: &[HostAt]) -> Result<String, String> {
            self.does("wake", machine, &self.unwoken)?;
            Ok(hosts[0].host.clone())
        }
    }

    fn load(name: &str, mib: u64) -> Load {
        Load {
            name: name.into(),
            weight: 1,
            bytes: Bytes(mib << 20),
            in_store: Bytes(0),
            brought: Bytes(0),
            dirties: Rate(0),
            hot: Bytes(0),
            destination: true,
            may_sleep: true,
            generation_age: None,
        }
    }

    /// One machine at a time over a line of 1 MiB a second, for a minute, all to host b.
    fn run(script: &Script, loads: &[Load], store: StoreUse) -> Vec<Outcome> {
        let host: HostAt = "b=10.0.0.2:7500".parse().unwrap();
        let place = Place::Hosts(vec![host]);
        let named = loads.iter().filter(|load| load.destination);
        let to = named
            .map(|load| (load.name.clone(), Destination { place: place.clone(), worth: 1 }))
            .collect();
        let deadline = Duration::from_secs(60);
        let terms = Terms {
            deadline,
            reserve_percent: 0,
            line: Rate(1 << 20),
            parallel: 1,
            setup: Duration::ZERO,
            store,
        };
        let course = Course {
            loads,
            to: &to,
            hosts: &[],
            terms: &terms,
            began: Instant::now(),
            deadline,
            deeds: script,
        };
        course.run(&evacuation::plan(loads, &terms))
    }

    fn one<'a>(outcomes: &'a [Outcome], machine: &str) -> &'a Outcome {
        outcomes.iter().find(|one| one.machine == machine).unwrap()
    }

    #[test]
    fn who_cannot_move_sleeps_after_all_others_have_moved_and_is_woken_where_it_was_to_go() {
        let script = Script { stuck: vec!["a"], ..Script::default() };
        let outcomes = run(&script, &[load("a", 1), load("c", 2)], StoreUse::Sleeps);
        let done = script.done.lock().unwrap();
        assert_eq!(*done, ["move a", "move c", "sleep a", "wake a"]);
        let slept = one(&outcomes, "a");
        assert_eq!((slept.way, slept.host.as_deref()), (Some(Way::Suspend), Some("b")));
        assert_eq!(slept.not_moved.as_deref(), Some("no move"));
        assert!(slept.expected && slept.in_time && slept.woken_s.is_some());
        assert!(one(&outcomes, "c").asleep.is_none());
    }

    #[test]
    fn who_is_not_woken_sleeps_on_and_is_told_how_to_wake_it() {
        let script = Script { stuck: vec!["a"], unwoken: vec!["a"], ..Script::default() };
        let outcomes = run(&script, &[load("a", 1)], StoreUse::Sleeps);
        let (outcome, text) = (&outcomes[0], super::super::report::lines(&outcomes));
        assert!(outcome.error.is_none() && outcome.in_time && outcome.host.is_none());
        for words in ["safe in the store", "no move", "no wake", "drafter resume a"] {
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn who_has_no_host_sleeps_and_is_woken_by_nobody() {
        let loads = [Load { destination: false, ..load("a", 1) }];
        let script = Script::default();
        let outcomes = run(&script, &loads, StoreUse::Sleeps);
        assert_eq!(*script.done.lock().unwrap(), ["sleep a"]);
        assert!(outcomes[0].asleep.is_some() && outcomes[0].not_woken.is_none());
    }

    #[test]
    fn who_neither_moves_nor_sleeps_is_still_here_with_both_reasons() {
        let slow = load("slow", 300);
        let guarded = Load { may_sleep: false, ..load("guarded", 2) };
        let homeless = Load { destination: false, ..guarded.clone() };
        let homeless = Load { name: "homeless".into(), ..homeless };
        let script = Script {
            stuck: vec!["a", "slow", "guarded"],
            sleepless: vec!["a"],
            ..Script::default()
        };
        let loads = [load("a", 1), slow, guarded, homeless];
        let outcomes = run(&script, &loads, StoreUse::Sleeps);
        let error = |machine: &str| one(&outcomes, machine).error.clone().unwrap();
        assert_eq!(error("a"), "no move; it was not put to sleep: no sleep");
        assert!(error("slow").ends_with("there is no time left for that"), "{}", error("slow"));
        assert_eq!(error("guarded"), "no move");
        assert!(error("homeless").contains("cannot sleep in the store"));
        // Without a store nothing sleeps.
        let script = Script { stuck: vec!["a"], ..Script::default() };
        let outcomes = run(&script, &[load("a", 1)], StoreUse::None);
        assert_eq!(outcomes[0].error.as_deref(), Some("no move"));
    }
}
