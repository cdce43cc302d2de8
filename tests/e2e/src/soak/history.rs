//! What clients asked registers and were told, with times, and whether that can have been: the checker
//! of the soak.
//!
//! Exact, and fast enough for an hour's history: no two writes write the same value, so that it is known
//! which write each read saw. The operations of one value (its write and the reads of it) are a cluster,
//! and a history is linearizable exactly if no cluster's zone conflicts with another's (Gibbons and
//! Korach, "Testing shared memories", SIAM J. Comput. 26, 1997). A write without an answer may have
//! happened at any time after its beginning, or never.

use serde::{Deserialize, Serialize};
use std::{collections::HashMap, fmt};

/// The content of a register that nobody wrote yet.
pub const NOTHING: u64 = 0;

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Did {
    /// Wrote this value, which no other write writes.
    Wrote(u64),
    /// Saw this value.
    Saw(u64),
}

/// One operation on one register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Whose register; copies have numbers of their own.
    pub machine: u16,
    /// Which one.
    pub key: u16,
    /// What was done.
    pub did: Did,
    /// When it was asked for, in nanoseconds since the history began; 1 at least.
    pub begun: u64,
    /// When it was answered; `None`: nobody knows what became of it.
    pub answered: Option<u64>,
}

impl Operation {
    fn end(&self) -> u64 {
        self.answered.unwrap_or(u64::MAX)
    }
}

/// Something that cannot have been, if registers keep what they acknowledge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What is wrong, in a sentence.
    pub what: String,
    /// The operations that show it.
    pub of: Vec<Operation>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        for operation in &self.of {
            write!(f, "\n    {operation:?}")?;
        }
        Ok(())
    }
}

/// All operations of one value.
#[derive(Default)]
struct Cluster {
    write: Option<Operation>,
    reads: Vec<Operation>,
}

/// Of a cluster: the operation that ends first and the one that begins last.
struct Zone {
    value: u64,
    first_end: Operation,
    last_begin: Operation,
}

impl Zone {
    fn from(&self) -> u64 {
        self.first_end.end()
    }

    fn to(&self) -> u64 {
        self.last_begin.begun
    }

    /// The register held the value for all of the time from `from` to `to`.
    fn is_forward(&self) -> bool {
        self.from() < self.to()
    }
}

/// Checks all registers of a history; the violations that were found, at most one for a register.
#[must_use]
pub fn check(history: &[Operation]) -> Vec<Violation> {
    let mut registers: HashMap<(u16, u16), Vec<Operation>> = HashMap::new();
    for operation in history {
        registers.entry((operation.machine, operation.key)).or_default().push(*operation);
    }
    let mut keys: Vec<_> = registers.keys().copied().collect();
    keys.sort_unstable();
    keys.iter().filter_map(|key| check_register(&registers[key]).err()).collect()
}

/// A stretch of a machine's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Whose.
    pub machine: u16,
    /// What was asked for from here on is in it…
    pub from: u64,
    /// … until here, this not.
    pub to: u64,
    /// What was not answered by then may be in it or not.
    pub sure: u64,
}

impl Part {
    fn has(&self, operation: &Operation) -> bool {
        operation.machine == self.machine && (self.from..self.to).contains(&operation.begun)
    }
}

/// What a machine remembers, if it keeps what it acknowledges: its own history, or, once it has gone back to
/// a generation, that of before the generation and then its own; of a copy, that of the machine before the
/// fork and then its own. The parts are one after the other, and the last one is its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    /// For people.
    pub name: String,
    /// What it consists of.
    pub parts: Vec<Part>,
}

impl Life {
    /// What it remembers. Writes that nobody answered may come to pass as long as their connection lasts:
    /// those from times that it has forgotten may be in it as well.
    fn remembers(&self, history: &[Operation]) -> Vec<Operation> {
        let Some(last) = self.parts.last() else { return Vec::new() };
        let within = |operation: &Operation| -> Option<Operation> {
            let writes = matches!(operation.did, Did::Wrote(_));
            let Some(part) = self.parts.iter().find(|part| part.has(operation)) else {
                let mine = self.parts.iter().any(|part| part.machine == operation.machine);
                let late = mine && operation.begun < last.from;
                return (late && writes && operation.answered.is_none()).then_some(*operation);
            };
            if operation.end() <= part.sure {
                return Some(*operation);
            }
            writes.then_some(Operation { answered: None, ..*operation })
        };
        let own = |operation: Operation| Operation { machine: last.machine, ..operation };
        history.iter().filter_map(within).map(own).collect()
    }
}

/// Checks all registers of each life; the violations that were found, at most one for a register and life.
#[must_use]
pub fn check_lives(history: &[Operation], lives: &[Life]) -> Vec<Violation> {
    let found = |life: &Life| {
        let told = |violation: Violation| Violation {
            what: format!("{}: {}", life.name, violation.what),
            ..violation
        };
        check(&life.remembers(history)).into_iter().map(told).collect::<Vec<_>>()
    };
    lives.iter().flat_map(found).collect()
}

fn violation(what: String, of: &[Operation]) -> Violation {
    Violation { what, of: of.to_vec() }
}

fn check_register(history: &[Operation]) -> Result<(), Violation> {
    let mut clusters: HashMap<u64, Cluster> = HashMap::new();
    if let Some(any) = history.first() {
        // Nothing is written before everything.
        let write = Operation { did: Did::Wrote(NOTHING), begun: 0, answered: Some(0), ..*any };
        clusters.insert(NOTHING, Cluster { write: Some(write), reads: Vec::new() });
    }
    for operation in history {
        match operation.did {
            Did::Wrote(value) => {
                let cluster = clusters.entry(value).or_default();
                if let Some(other) = cluster.write.replace(*operation) {
                    let what = format!("value {value} was written twice: the test is wrong");
                    return Err(violation(what, &[other, *operation]));
                }
            }
            Did::Saw(value) => clusters.entry(value).or_default().reads.push(*operation),
        }
    }
    let mut zones = Vec::new();
    for (value, cluster) in &clusters {
        let Some(write) = cluster.write else {
            let what = format!("value {value} was seen, and nobody wrote it");
            return Err(violation(what, &cluster.reads[..1]));
        };
        if let Some(read) = cluster.reads.iter().find(|read| read.end() < write.begun) {
            let what = format!("value {value} was seen before it was written");
            return Err(violation(what, &[*read, write]));
        }
        if write.answered.is_none() && cluster.reads.is_empty() {
            // It may never have happened.
            continue;
        }
        let (mut first_end, mut last_begin) = (write, write);
        for read in &cluster.reads {
            if read.end() < first_end.end() {
                first_end = *read;
            }
            if read.begun > last_begin.begun {
                last_begin = *read;
            }
        }
        zones.push(Zone { value: *value, first_end, last_begin });
    }
    let (mut forward, backward): (Vec<_>, Vec<_>) = zones.into_iter().partition(Zone::is_forward);
    forward.sort_unstable_by_key(Zone::from);
    for pair in forward.windows(2) {
        let [one, two] = pair else { continue };
        if two.from() < one.to() {
            return Err(conflict(one, two));
        }
    }
    for inner in &backward {
        // The last one that begins before it is the only one that can hold it.
        let at = forward.partition_point(|outer| outer.from() < inner.to());
        let Some(outer) = at.checked_sub(1).map(|at| &forward[at]) else { continue };
        if inner.from() < outer.to() {
            return Err(conflict(outer, inner));
        }
    }
    Ok(())
}

/// Both values must have been there, each before the other.
fn conflict(one: &Zone, two: &Zone) -> Violation {
    let what = format!(
        "value {} was there both before and after value {}: an acknowledged write was lost, or came back",
        one.value, two.value
    );
    violation(what, &[one.first_end, two.first_end, two.last_begin, one.last_begin])
}

#[cfg(test)]
mod tests {
    use super::{super::plan::Random, *};
    use stateright::semantics::{
        ConsistencyTester, LinearizabilityTester,
        register::{Register, RegisterOp, RegisterRet},
    };

    fn operation(did: Did, begun: u64, answered: Option<u64>) -> Operation {
        Operation { machine: 1, key: 7, did, begun, answered }
    }

    fn wrote(value: u64, begun: u64, answered: u64) -> Operation {
        operation(Did::Wrote(value), begun, Some(answered))
    }

    fn saw(value: u64, begun: u64, answered: u64) -> Operation {
        operation(Did::Saw(value), begun, Some(answered))
    }

    #[test]
    fn a_history_with_a_lost_write_is_refused_and_names_it() {
        // The write of 2 was acknowledged, and the register has the value before it again.
        let lost = [wrote(1, 1, 2), wrote(2, 3, 4), saw(1, 5, 6)];
        let found = check(&lost);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].to_string().contains("lost"), "{}", found[0]);
        assert!(found[0].of.contains(&lost[1]) && found[0].of.contains(&lost[2]));
        // A machine that began anew has lost everything.
        assert_eq!(check(&[wrote(1, 1, 2), saw(NOTHING, 3, 4)]).len(), 1);
        // It was seen, and then forgotten, though nobody ever said that it was written.
        let unsaid = [operation(Did::Wrote(1), 1, None), saw(1, 2, 3), saw(NOTHING, 4, 5)];
        assert_eq!(check(&unsaid).len(), 1);
        // Another register's writes are its own.
        let other = Operation { key: 8, ..lost[1] };
        assert_eq!(check(&[lost[0], other, lost[2]]), []);
    }

    #[test]
    fn what_may_have_been_is_not_refused() {
        let unknown = operation(Did::Wrote(2), 3, None);
        for fine in [
            vec![],
            vec![saw(NOTHING, 1, 2), wrote(1, 3, 4), saw(1, 5, 6)],
            // Never, or late.
            vec![wrote(1, 1, 2), unknown, saw(1, 5, 6)],
            vec![wrote(1, 1, 2), unknown, saw(1, 5, 6), saw(2, 7, 8)],
            // While it is under way, one sees it and another does not yet.
            vec![wrote(1, 1, 2), wrote(2, 3, 9), saw(2, 4, 5), saw(2, 6, 7)],
            vec![wrote(1, 1, 2), wrote(2, 3, 9), saw(1, 4, 5), saw(2, 6, 7)],
        ] {
            assert_eq!(check(&fine), [], "{fine:?}");
        }
        for wrong in [
            vec![saw(5, 1, 2)],
            vec![saw(1, 1, 2), wrote(1, 3, 4)],
            vec![wrote(1, 1, 2), wrote(2, 3, 9), saw(2, 4, 5), saw(1, 6, 7)],
            vec![wrote(1, 1, 2), unknown, saw(2, 5, 6), saw(1, 7, 8)],
        ] {
            assert_eq!(check(&wrong).len(), 1, "{wrong:?}");
        }
    }

    #[test]
    fn a_machine_that_went_back_has_the_registers_of_then_and_nothing_of_later() {
        let part = |from, to, sure| Part { machine: 1, from, to, sure };
        // The generation was made between 10 and 12, and gone back to at 30.
        let lives = [
            Life { name: "before".into(), parts: vec![part(0, 30, u64::MAX)] },
            Life {
                name: "after".into(),
                parts: vec![part(0, 12, 10), part(30, u64::MAX, u64::MAX)],
            },
        ];
        let first = [wrote(1, 1, 2), wrote(2, 20, 21), saw(2, 22, 23)];
        let and = |more: &[Operation]| check_lives(&[&first[..], more].concat(), &lives);
        assert_eq!(and(&[saw(1, 31, 32), wrote(3, 33, 34), saw(3, 35, 36)]), []);
        // It did not go back, or further than it should have.
        for wrong in [2, NOTHING] {
            let found = and(&[saw(wrong, 31, 32)]);
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].what.starts_with("after:"), "{}", found[0]);
        }
        // A write that was under way when the generation was made is in it or not, but does not change its mind.
        let busy = wrote(9, 9, 11);
        assert_eq!(and(&[busy, saw(9, 31, 32)]), []);
        assert_eq!(and(&[busy, saw(1, 31, 32)]), []);
        assert_eq!(and(&[busy, saw(9, 31, 32), saw(1, 33, 34)]).len(), 1);
        // One that nobody answered may come to pass in either life, one that was answered may not.
        let unsaid = operation(Did::Wrote(7), 25, None);
        assert_eq!(and(&[unsaid, saw(7, 31, 32)]), []);
        // What is lost before the machine goes back is lost all the same.
        assert_eq!(and(&[saw(1, 26, 27), saw(1, 31, 32)]).len(), 1);
    }

    #[test]
    fn a_copy_has_the_registers_of_the_fork_and_each_goes_its_own_way() {
        let part = |machine, from, to, sure| Part { machine, from, to, sure };
        let end = u64::MAX;
        let lives = [
            Life { name: "machine".into(), parts: vec![part(1, 0, end, end)] },
            Life { name: "copy".into(), parts: vec![part(1, 0, 12, 10), part(100, 12, end, end)] },
        ];
        let in_copy = |operation| Operation { machine: 100, ..operation };
        let first = [wrote(1, 1, 2), wrote(2, 20, 21)];
        let and = |more: &[Operation]| check_lives(&[&first[..], more].concat(), &lives);
        let good = [in_copy(saw(1, 22, 23)), in_copy(wrote(1000, 24, 25)), saw(2, 26, 27)];
        assert_eq!(and(&good), []);
        for wrong in [in_copy(saw(2, 22, 23)), in_copy(saw(NOTHING, 22, 23))] {
            assert_eq!(and(&[wrong]).len(), 1, "{wrong:?}");
        }
        assert_eq!(and(&[in_copy(wrote(1000, 24, 25)), saw(1000, 26, 27)]).len(), 1);
    }

    /// A checker of somebody else's, which tries all orders.
    fn tries_all_orders(history: &[Operation]) -> bool {
        let mut events: Vec<(u64, usize, bool)> = Vec::new();
        for (at, operation) in history.iter().enumerate() {
            events.push((operation.begun, at, false));
            events.extend(operation.answered.map(|end| (end, at, true)));
        }
        events.sort_unstable();
        let mut tester = LinearizabilityTester::new(Register(NOTHING));
        for (_, at, ends) in events {
            let (ask, answer) = match history[at].did {
                Did::Wrote(value) => (RegisterOp::Write(value), RegisterRet::WriteOk),
                Did::Saw(value) => (RegisterOp::Read, RegisterRet::ReadOk(value)),
            };
            // Each operation is its own client.
            let told = if ends { tester.on_return(at, answer) } else { tester.on_invoke(at, ask) };
            told.expect("the events are in order");
        }
        tester.is_consistent()
    }

    #[test]
    fn it_decides_as_a_checker_that_tries_all_orders() {
        let (mut fine, mut wrong) = (0, 0);
        for seed in 0..3000 {
            let mut random = Random::new(seed);
            let (mut time, mut value, mut open, mut history) = (0, 0, Vec::new(), Vec::new());
            while history.len() < 6 || !open.is_empty() {
                time += 1;
                if history.len() < 6 && (open.is_empty() || random.below(2) == 0) {
                    let did = if random.below(2) == 0 {
                        value += 1;
                        Did::Wrote(value)
                    } else {
                        Did::Saw(random.below(value + 1))
                    };
                    open.push(history.len());
                    history.push(operation(did, time, None));
                    continue;
                }
                let at = open.swap_remove(random.below(open.len() as u64) as usize);
                // A read without an answer says nothing, and is not kept.
                if matches!(history[at].did, Did::Saw(_)) || random.below(4) > 0 {
                    history[at].answered = Some(time);
                }
            }
            let found = check(&history);
            assert_eq!(found.is_empty(), tries_all_orders(&history), "{seed}: {history:?}");
            if found.is_empty() { fine += 1 } else { wrong += 1 }
        }
        assert!(fine > 300 && wrong > 300, "{fine} and {wrong}");
    }
}
