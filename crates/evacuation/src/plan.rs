//! The decision: who leaves, in which order, by which way.
//!
//! 1. Each machine's way of least bytes is taken. Of the machines that could leave so, those are chosen
//!    that are worth most together and fit through the line in time.
//! 2. They go in the order of worth per byte: should the host be gone early, most is saved.
//! 3. All are given the gentlest way that is open to them; while that takes too long, the machine with
//!    which most bytes are saved for the least harm goes a rougher one.
//!
//! Whoever is not chosen is named, with what becomes of it, and is tried last: lines and guests may
//! turn out better than they were measured.

use crate::{Bytes, Load, Rate, StoreUse, Terms, Times, Way, foresee, subset};
use serde::{Deserialize, Serialize};
use std::{cmp::Reverse, fmt, time::Duration};

/// A machine that is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Its place among the loads.
    pub machine: usize,
    /// How it goes.
    pub way: Way,
    /// What is expected.
    pub times: Times,
}

/// What becomes of a machine that does not leave in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It comes back from its newest generation, which is as old as this when the host goes.
    FromGeneration(Duration),
    /// It has no generation: it boots from the disks that are elsewhere, if there are any.
    FromDisks,
}

/// A machine that is not expected to leave in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// Its place among the loads.
    pub machine: usize,
    /// By which way it is tried when all others have gone; none is open to it otherwise.
    pub way: Option<Way>,
    /// What becomes of it if that does not succeed.
    pub fate: Fate,
}

/// What it would take to save all that have a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needed {
    /// With this line: so long a notice. None: the line carries nothing.
    pub deadline: Option<Duration>,
    /// With this notice: such a line. None: no line is fast enough, because moves have costs of their own.
    pub line: Option<Rate>,
}

/// The decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Who is saved, in the order in which they begin.
    pub steps: Vec<Step>,
    /// Who is not, in the order in which they are tried.
    pub left: Vec<Left>,
    /// When the last of the steps is safe.
    pub safe_in: Duration,
    /// Told when somebody is left who has a way.
    pub needed: Option<Needed>,
}

/// The way of least bytes, whatever the others send meanwhile; among equals the gentlest.
fn leanest(load: &Load, terms: &Terms) -> Option<Way> {
    let lean = |way: &Way| !matches!(way, Way::Hybrid | Way::HybridWithStore);
    let open = |way: &Way| lean(way) && way.is_open(load, terms);
    Way::ALL.into_iter().filter(open).min_by_key(|way| (way.most(load), *way))
}

/// The gentlest way.
fn gentlest(load: &Load, terms: &Terms) -> Option<Way> {
    Way::ALL.into_iter().find(|way| way.is_open(load, terms))
}

/// By when all are safe; None if somebody never is.
fn end(loads: &[Load], steps: &[(usize, Way)], terms: &Terms) -> Option<Duration> {
    let times = foresee(loads, steps, terms);
    times.into_iter().try_fold(Duration::ZERO, |end, times| Some(end.max(times?.safe)))
}

/// Worth per byte, largest first; who has nothing to come back from before who has.
fn order(load: &Load, way: Way) -> impl Ord + use<> {
    let bytes = u128::from(way.most(load).0.max(1));
    let density = (u128::from(load.weight.max(1)) << 64) / bytes;
    (Reverse(density), load.generation_age.is_some())
}

/// Plans an evacuation.
#[must_use]
pub fn plan(loads: &[Load], terms: &Terms) -> Plan {
    let mut able: Vec<(usize, Way)> =
        (0..loads.len()).filter_map(|at| leanest(&loads[at], terms).map(|way| (at, way))).collect();
    // Stable: equals stay in the order in which they were named.
    able.sort_by_key(|(at, way)| order(&loads[*at], *way));
    let chosen = choose(loads, &able, terms);
    let rest: Vec<_> = able.iter().filter(|one| !chosen.contains(one)).copied().collect();
    let (ways, times) = soften(loads, &chosen, terms);
    let steps: Vec<Step> = ways
        .into_iter()
        .zip(times)
        .map(|((machine, way), times)| Step { machine, way, times })
        .collect();
    let fate = |at: usize| match loads[at].generation_age {
        Some(age) => Fate::FromGeneration(age.saturating_add(terms.deadline)),
        None => Fate::FromDisks,
    };
    let without = (0..loads.len()).filter(|at| able.iter().all(|(one, _)| one != at));
    let left = rest.iter().map(|(at, way)| (*at, Some(*way))).chain(without.map(|at| (at, None)));
    Plan {
        safe_in: steps.iter().map(|step| step.times.safe).max().unwrap_or_default(),
        left: left.map(|(machine, way)| Left { machine, way, fate: fate(machine) }).collect(),
        needed: (!rest.is_empty()).then(|| needed(loads, &able, terms)),
        steps,
    }
}

/// Those of `able` that are worth most and are all safe in time by their leanest ways; in its order.
fn choose(loads: &[Load], able: &[(usize, Way)], terms: &Terms) -> Vec<(usize, Way)> {
    let usable = terms.usable();
    let fits = |steps: &[(usize, Way)]| end(loads, steps, terms).is_some_and(|end| end <= usable);
    let items: Vec<(u64, u64)> = able
        .iter()
        .map(|(at, way)| (way.alone(&loads[*at], terms.line).0, u64::from(loads[*at].weight)))
        .collect();
    let sending = usable.saturating_sub(terms.setup).as_secs_f64();
    let capacity = (sending * terms.line.0 as f64) as u64;
    let mut chosen: Vec<_> =
        subset::best(&items, capacity).into_iter().map(|at| able[at]).collect();
    // The line is not all: each move has its own cost, and the last one to begin may be late.
    while !chosen.is_empty() && !fits(&chosen) {
        chosen.pop();
    }
    for one in able {
        if chosen.contains(one) {
            continue;
        }
        let with: Vec<_> =
            able.iter().filter(|it| *it == one || chosen.contains(it)).copied().collect();
        if fits(&with) {
            chosen = with;
        }
    }
    chosen
}

/// Gives `chosen`, all of which are safe in time by their leanest ways, the gentlest ways that keep
/// them so.
fn soften(
    loads: &[Load],
    chosen: &[(usize, Way)],
    terms: &Terms,
) -> (Vec<(usize, Way)>, Vec<Times>) {
    let usable = terms.usable();
    let in_time = |steps: &[(usize, Way)]| -> Option<Vec<Times>> {
        let times: Vec<Times> = foresee(loads, steps, terms).into_iter().collect::<Option<_>>()?;
        times.iter().all(|times| times.safe <= usable).then_some(times)
    };
    let mut steps: Vec<(usize, Way)> = chosen
        .iter()
        .map(|(at, way)| (*at, gentlest(&loads[*at], terms).unwrap_or(*way)))
        .collect();
    let mut rougher = Vec::new();
    while in_time(&steps).is_none() {
        // Bytes saved for each step of harm, among all ways that save any.
        let gain = |place: usize, way: Way| {
            let (at, now) = steps[place];
            let cost = |way: Way| way.most(&loads[at]).0;
            let saved = cost(now).saturating_sub(cost(way));
            (way > now && saved > 0).then(|| saved / (way as u64 - now as u64))
        };
        let options = (0..steps.len()).flat_map(|place| Way::ALL.map(|way| (place, way)));
        let best = options
            .filter(|(place, way)| way.is_open(&loads[steps[*place].0], terms))
            .filter_map(|(place, way)| Some((gain(place, way)?, Reverse(place), way)))
            .max_by_key(|(gain, place, _)| (*gain, *place));
        let Some((_, Reverse(place), way)) = best else {
            // All are as lean as they get by these steps; these are known to be in time.
            chosen.clone_into(&mut steps);
            break;
        };
        rougher.push((place, steps[place].1));
        steps[place].1 = way;
    }
    // The last ones may have saved more than was lacking.
    for (place, gentler) in rougher.into_iter().rev() {
        let mut tried = steps.clone();
        tried[place].1 = gentler;
        if in_time(&tried).is_some() {
            steps = tried;
        }
    }
    let times = in_time(&steps).unwrap_or_default();
    (steps, times)
}

fn needed(loads: &[Load], able: &[(usize, Way)], terms: &Terms) -> Needed {
    let planned = 100 - u32::from(terms.reserve_percent.min(99));
    let deadline = end(loads, able, terms).map(|end| end.saturating_mul(100) / planned);
    let usable = terms.usable();
    let enough = |line: u64| {
        let terms = Terms { line: Rate(line), ..terms.clone() };
        end(loads, able, &terms).is_some_and(|end| end <= usable)
    };
    // 8 Tb/s is faster than any line.
    let (mut low, mut high) = (terms.line.0, 1u64 << 40);
    let line = enough(high).then(|| {
        while high.saturating_sub(low) > (high / 1000).max(1) {
            let middle = low + (high - low) / 2;
            if enough(middle) { high = middle } else { low = middle }
        }
        Rate(high)
    });
    Needed { deadline, line }
}

impl Plan {
    /// Whether every machine is saved.
    #[must_use]
    pub fn saves_all(&self) -> bool {
        self.left.is_empty()
    }

    /// The verdict for people, in a few lines.
    #[must_use]
    pub fn verdict<'a>(&'a self, loads: &'a [Load], terms: &'a Terms) -> impl fmt::Display + 'a {
        Verdict { plan: self, loads, terms }
    }
}

struct Verdict<'a> {
    plan: &'a Plan,
    loads: &'a [Load],
    terms: &'a Terms,
}

impl fmt::Display for Verdict<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { plan, loads, terms } = self;
        let (saved, all) = (plan.steps.len(), loads.len());
        let (safe, deadline) = (plan.safe_in.as_secs_f64(), terms.deadline.as_secs_f64());
        if plan.saves_all() {
            return write!(f, "all {all} machines leave: safe in {safe:.1} s of {deadline:.0} s");
        }
        write!(
            f,
            "{saved} of {all} machines can be saved: safe in {safe:.1} s of {deadline:.0} s"
        )?;
        for left in &plan.left {
            let load = &loads[left.machine];
            write!(f, "\n  not \"{}\" (", load.name)?;
            match left.way {
                Some(way) => write!(f, "{} to send; tried last", way.first_copy(load))?,
                None if terms.store == StoreUse::None => {
                    f.write_str("no host takes it, and there is no store")?;
                }
                None => f.write_str("no host takes it, and it cannot sleep in the store")?,
            }
            match left.fate {
                Fate::FromGeneration(age) => {
                    write!(f, "): comes back from a generation {:.0} s old", age.as_secs_f64())?;
                }
                Fate::FromDisks => f.write_str("): has no generation, its memory is lost")?,
            }
        }
        let Some(needed) = &plan.needed else { return Ok(()) };
        f.write_str("\n  to save them all: ")?;
        match (needed.deadline, needed.line) {
            (Some(time), Some(line)) => {
                write!(f, "{:.0} s of notice, or a line of {line}", time.as_secs_f64())
            }
            (Some(time), None) => write!(f, "{:.0} s of notice", time.as_secs_f64()),
            (None, Some(line)) => write!(f, "a line of {line}"),
            (None, None) => f.write_str("another line, and more notice"),
        }
    }
}

impl Left {
    /// What it would have sent.
    #[must_use]
    pub fn bytes(&self, loads: &[Load]) -> Option<Bytes> {
        self.way.map(|way| way.first_copy(&loads[self.machine]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{MIB, load, terms};
    use proptest::prelude::*;

    fn names<'a>(loads: &'a [Load], plan: &Plan) -> Vec<&'a str> {
        plan.steps.iter().map(|step| loads[step.machine].name.as_str()).collect()
    }

    #[test]
    fn with_time_to_spare_all_go_by_the_gentlest_way_small_ones_first() {
        let loads = [load("large", 512), load("small", 64), load("middle", 128)];
        let plan = plan(&loads, &terms(60));
        assert!(plan.saves_all() && plan.needed.is_none());
        assert_eq!(names(&loads, &plan), ["small", "middle", "large"]);
        assert!(plan.steps.iter().all(|step| step.way == Way::Hybrid));
        let text = plan.verdict(&loads, &terms(60)).to_string();
        assert!(text.starts_with("all 3 machines leave: safe in "), "{text}");
    }

    #[test]
    fn who_is_worth_more_goes_first_and_stays_when_not_all_fit() {
        let dear = Load { weight: 10, ..load("dear", 2000) };
        let loads = [load("one", 900), load("two", 900), dear];
        // 19 s carry 2265 MiB.
        let terms = terms(20);
        let plan = plan(&loads, &terms);
        assert_eq!(names(&loads, &plan), ["dear"]);
        assert_eq!(plan.left.len(), 2);
        assert!(plan.left.iter().all(|left| left.fate == Fate::FromDisks));
        let needed = plan.needed.unwrap();
        let time = needed.deadline.unwrap();
        assert!((31..34).contains(&time.as_secs()), "{time:?}");
        let more = Terms { deadline: time + Duration::from_millis(1), ..terms.clone() };
        assert!(super::plan(&loads, &more).saves_all());
        let faster = Terms { line: needed.line.unwrap(), ..terms.clone() };
        assert!(super::plan(&loads, &faster).saves_all());
        let text = plan.verdict(&loads, &terms).to_string();
        assert!(text.contains("1 of 3 machines") && text.contains("not \"one\""), "{text}");
        assert!(text.contains("of notice, or a line of"), "{text}");
    }

    #[test]
    fn who_writes_much_is_handed_over_at_once_when_the_time_is_short() {
        let busy = Load { dirties: Rate(200 * MIB), hot: Bytes(400 * MIB), ..load("busy", 800) };
        let loads = [load("idle", 800), busy];
        let plan = plan(&loads, &terms(15));
        assert!(plan.saves_all());
        let way = |name: &str| {
            plan.steps.iter().find(|step| loads[step.machine].name == name).unwrap().way
        };
        assert_eq!((way("idle"), way("busy")), (Way::Hybrid, Way::PostCopy));
    }

    #[test]
    fn a_store_carries_what_the_line_cannot_and_takes_who_has_no_destination() {
        let age = Some(Duration::from_secs(5));
        let there = Bytes(3900 * MIB);
        let stored = |name| Load {
            in_store: there,
            brought: there,
            generation_age: age,
            ..load(name, 4000)
        };
        let homeless = Load { destination: false, ..stored("homeless") };
        let lost = Load { destination: false, ..load("lost", 10) };
        let loads = [stored("a"), stored("b"), homeless, lost];
        let seen = plan(&loads, &terms(10));
        assert!(seen.saves_all(), "{}", seen.verdict(&loads, &terms(10)));
        let way = |at: usize| seen.steps.iter().find(|step| step.machine == at).unwrap().way;
        assert_eq!([way(0), way(1)], [Way::HybridWithStore; 2]);
        assert_eq!([way(2), way(3)], [Way::Suspend; 2]);

        let alone = Terms { store: StoreUse::None, ..terms(10) };
        let seen = plan(&loads, &alone);
        assert!(seen.steps.is_empty());
        assert_eq!(seen.left.len(), 4);
        let fates: Vec<Fate> = (0..4)
            .map(|at| seen.left.iter().find(|left| left.machine == at).unwrap().fate)
            .collect();
        assert_eq!(fates[2], Fate::FromGeneration(Duration::from_secs(15)));
        assert_eq!(fates[3], Fate::FromDisks);
        let text = seen.verdict(&loads, &alone).to_string();
        assert!(text.contains("no host takes it") && text.contains("15 s old"), "{text}");
    }

    #[test]
    fn what_a_backup_has_helps_a_move_and_what_sleeps_have_a_sleep() {
        let age = Some(Duration::from_secs(1));
        let load = load("a", 4000);
        let saved = Load { brought: Bytes(3900 * MIB), generation_age: age, ..load.clone() };
        let slept = Load { in_store: Bytes(3900 * MIB), ..load };
        let way = |load: Load| plan(&[load], &terms(10)).steps.first().map(|step| step.way);
        assert_eq!(way(saved), Some(Way::HybridWithStore));
        assert_eq!(way(slept), Some(Way::Suspend));
    }

    #[test]
    fn who_cannot_move_in_time_sleeps_where_most_of_it_is_already() {
        let store = |name, mib, stored| Load { in_store: Bytes(stored * MIB), ..load(name, mib) };
        let loads = [store("small", 200, 0), store("large", 4000, 3600), store("new", 300, 0)];
        let sleeps = |seconds| Terms { store: StoreUse::Sleeps, ..terms(seconds) };
        let ways = |plan: &Plan| -> Vec<(String, Way)> {
            let named = |step: &Step| (loads[step.machine].name.clone(), step.way);
            plan.steps.iter().map(named).collect()
        };
        // 119 MiB a second. There is time for all to move, and nobody sleeps who need not.
        let calm = plan(&loads, &sleeps(60));
        assert!(calm.saves_all() && calm.steps.iter().all(|step| step.way == Way::Hybrid));
        let short = plan(&loads, &sleeps(15));
        assert!(short.saves_all(), "{}", short.verdict(&loads, &sleeps(15)));
        let expected = [("small", Way::Hybrid), ("new", Way::Hybrid), ("large", Way::Suspend)];
        assert_eq!(ways(&short), expected.map(|(name, way)| (name.to_owned(), way)));
        // Who writes all of it over and over gains nothing by what the store has.
        let busy = Load { hot: Bytes(4000 * MIB), dirties: Rate(900 * MIB), ..loads[1].clone() };
        let hopeless = plan(&[busy], &sleeps(15));
        assert_eq!(hopeless.left[0].way, Some(Way::PostCopy));
    }

    #[test]
    fn without_a_host_all_sleep_who_may_and_the_others_are_named() {
        let homeless = |name| Load { destination: false, ..load(name, 100) };
        let guarded = Load { may_sleep: false, ..homeless("guarded") };
        let loads = [homeless("a"), guarded, homeless("b")];
        let terms = Terms { store: StoreUse::Sleeps, ..terms(10) };
        let plan = plan(&loads, &terms);
        assert_eq!(names(&loads, &plan), ["a", "b"]);
        assert!(plan.steps.iter().all(|step| step.way == Way::Suspend));
        assert_eq!((plan.left.len(), plan.left[0].way), (1, None));
        let text = plan.verdict(&loads, &terms).to_string();
        assert!(text.contains("\"guarded\" (no host takes it, and it cannot sleep"), "{text}");
    }

    #[test]
    fn twenty_machines_of_128_mib_leave_over_a_gigabit_in_thirty_seconds() {
        let loads: Vec<Load> = (0..20).map(|n| load(&format!("m{n}"), 128)).collect();
        let terms = Terms { reserve_percent: 20, ..terms(30) };
        let plan = plan(&loads, &terms);
        assert!(plan.saves_all(), "{}", plan.verdict(&loads, &terms));
        assert!(plan.steps.iter().all(|step| step.way == Way::Hybrid));
    }

    #[test]
    fn nothing_to_do_and_nothing_to_do_it_with() {
        assert!(plan(&[], &terms(1)).saves_all());
        let loads = [load("a", 1)];
        for terms in [
            Terms { line: Rate(0), ..terms(30) },
            Terms { deadline: Duration::ZERO, ..terms(30) },
            Terms { reserve_percent: 255, ..terms(30) },
            Terms { setup: Duration::from_secs(31), ..terms(30) },
        ] {
            let plan = plan(&loads, &terms);
            assert_eq!((plan.steps.len(), plan.left.len()), (0, 1), "{terms:?}");
            assert!(!plan.verdict(&loads, &terms).to_string().is_empty());
        }
    }

    const STORES: [StoreUse; 3] = [StoreUse::None, StoreUse::Sleeps, StoreUse::SleepsAndMoves];

    fn loads_of(raw: Vec<(u64, u32, u64, u64, u64, [bool; 3])>) -> Vec<Load> {
        raw.into_iter()
            .map(|(mib, weight, stored, dirties, hot, [destination, may_sleep, generation])| Load {
                weight,
                in_store: Bytes(stored.min(mib) * MIB),
                brought: Bytes(stored.min(mib) / 2 * MIB),
                dirties: Rate(dirties * MIB),
                hot: Bytes(hot.min(mib) * MIB),
                destination,
                may_sleep,
                generation_age: generation.then_some(Duration::from_secs(1)),
                ..load("m", mib)
            })
            .collect()
    }

    proptest! {
        #[test]
        fn what_a_plan_calls_saved_is_saved_and_nobody_is_forgotten(
            raw in prop::collection::vec(
                (0u64..3000, 0u32..9, 0u64..3000, 0u64..300, 0u64..900, any::<[bool; 3]>()),
                0..14,
            ),
            seconds in 1u64..90,
            reserve_percent in 0u8..40,
            parallel in 0u16..4,
            store in prop::sample::select(STORES.to_vec()),
        ) {
            let loads = loads_of(raw);
            let terms = Terms { reserve_percent, parallel, store, ..terms(seconds) };
            let plan = plan(&loads, &terms);
            let steps: Vec<_> = plan.steps.iter().map(|step| (step.machine, step.way)).collect();
            let foreseen = foresee(&loads, &steps, &terms);
            for (step, times) in plan.steps.iter().zip(foreseen) {
                prop_assert!(step.way.is_open(&loads[step.machine], &terms));
                prop_assert_eq!(Some(step.times), times);
                prop_assert!(step.times.safe <= terms.usable());
                let sent = step.way.most(&loads[step.machine]);
                prop_assert!(step.way.first_copy(&loads[step.machine]) <= sent);
                prop_assert!(step.way.alone(&loads[step.machine], terms.line) <= sent);
            }
            let mut told: Vec<usize> = plan
                .steps
                .iter()
                .map(|step| step.machine)
                .chain(plan.left.iter().map(|left| left.machine))
                .collect();
            told.sort_unstable();
            prop_assert_eq!(told, (0..loads.len()).collect::<Vec<_>>());
            prop_assert_eq!(plan.needed.is_some(), plan.left.iter().any(|left| left.way.is_some()));
            prop_assert_eq!(super::plan(&loads, &terms), plan);
        }

        #[test]
        fn no_set_of_machines_that_could_be_saved_is_worth_more(
            raw in prop::collection::vec(
                (1u64..3000, 1u32..9, 0u64..3000, 0u64..9, 0u64..9, any::<[bool; 3]>()),
                1..8,
            ),
            seconds in 2u64..60,
            store in prop::sample::select(STORES.to_vec()),
        ) {
            let loads = loads_of(raw);
            // Costs of each move that the knapsack does not know would make it a search.
            let terms = Terms { setup: Duration::ZERO, parallel: 1, store, ..terms(seconds) };
            let plan = plan(&loads, &terms);
            let worth = |set: &[usize]| set.iter().map(|at| loads[*at].weight).sum::<u32>();
            let saved: Vec<usize> = plan.steps.iter().map(|step| step.machine).collect();
            let best = (0..1u32 << loads.len())
                .map(|set| (0..loads.len()).filter(|at| set >> at & 1 == 1).collect::<Vec<_>>())
                .filter(|set| {
                    let steps: Option<Vec<_>> = set
                        .iter()
                        .map(|at| Some((*at, leanest(&loads[*at], &terms)?)))
                        .collect();
                    let end = steps.and_then(|steps| end(&loads, &steps, &terms));
                    // What fits by less than a thousandth may be left out by rounding.
                    end.is_some_and(|end| end.as_secs_f64() * 1.003 <= terms.usable().as_secs_f64())
                })
                .map(|set| worth(&set))
                .max()
                .unwrap_or(0);
            prop_assert!(worth(&saved) >= best, "{} of {best}", worth(&saved));
        }
    }
}
