//! The protocol between writers, forks, readers, pruning and collection (see `src/collect.rs` and
//! `src/pin.rs`), in every order of its steps. Any of the writers may stall before any step for as long as the others like: a
//! stalled writer is one whose next step comes later in the order, so all of that is tried.
//!
//! Some variants leave out one rule each, and the checker has to find how content is lost then: it
//! proves that the model can lose something, and that each rule is needed.

use stateright::{Checker, Model, Property};

type Packs = u8;

/// Entries of a log. A number is free (`None`) if it was never taken or its commit was pruned.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Entry {
    Opened(u8),
    Commit(u8, Packs),
    Barrier,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Writer {
    /// Has not begun, or looks for the next number to take the line with.
    Begins,
    /// Is about to create the entry "opened".
    Opens {
        number: u8,
    },
    /// Is about to look at what is condemned.
    Looks {
        head: u8,
    },
    /// Is about to read what it goes on from.
    Reads {
        head: u8,
        avoid: Packs,
    },
    /// Knows content that is stored, and chooses what its next generation refers to.
    Chooses {
        head: u8,
        avoid: Packs,
        known: Packs,
        newest: Packs,
        left: u8,
    },
    /// Is about to create its commit.
    Commits {
        head: u8,
        avoid: Packs,
        known: Packs,
        newest: Packs,
        left: u8,
        packs: Packs,
    },
    Ended,
}

/// Who reads the oldest generation of line 0.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Reader {
    Begins,
    /// Has read the entry that is at this place.
    Pins {
        at: u8,
        packs: Packs,
    },
    /// Has written the pin, and looks whether the entry is still there.
    Looks {
        at: u8,
        packs: Packs,
    },
    Reads {
        packs: Packs,
    },
    Ended,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Collector {
    Begins,
    /// Has listed packs; reads generations, line after line, and then the pins.
    Marks {
        listed: Packs,
        line: u8,
        referred: Packs,
    },
    /// Has written down what is condemned; the lines there are, listed.
    Waits,
    Barriers {
        lines: u8,
        line: u8,
    },
    Reads {
        line: u8,
        referred: Packs,
    },
    Deletes {
        dead: Packs,
    },
    Ended,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    logs: [Vec<Option<Entry>>; 2],
    packs: Packs,
    condemned: Packs,
    writers: [Writer; 3],
    reader: Reader,
    pinned: Packs,
    collector: Collector,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    Writer(u8),
    Choose(u8, Packs),
    Reader,
    Collector,
    Prune(u8, u8),
}

/// Which rule is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    AsItIs,
    NoBarriers,
    ForkDoesNotLook,
    NoSecondReading,
    ReaderDoesNotLook,
    PinsBeforeLines,
}

/// A variant, and which of the writers there are, and the reader: all at once are too many orders to
/// try.
struct Protocol(Variant, [bool; 4]);

/// Two that fight for a line; one of them and a fork; one of them and a reader.
const CASTS: [[bool; 4]; 3] =
    [[true, true, false, false], [true, false, true, false], [true, false, false, true]];

/// Lines of the writers: two fight for line 0, the third forks line 1 from it.
const LINES: [usize; 3] = [0, 0, 1];

fn head(log: &[Option<Entry>]) -> u8 {
    log.iter().rposition(Option::is_some).map_or(0, |at| at as u8 + 1)
}

fn newest(log: &[Option<Entry>]) -> Packs {
    let commits = log.iter().rev().flatten().filter_map(|entry| match entry {
        Entry::Commit(_, packs) => Some(*packs),
        _ => None,
    });
    commits.into_iter().next().unwrap_or(0)
}

fn referred(log: &[Option<Entry>]) -> Packs {
    log.iter().flatten().fold(0, |all, entry| match entry {
        Entry::Commit(_, packs) => all | packs,
        _ => all,
    })
}

/// Creates entry `number` (from 1) if it is absent.
fn create(log: &mut Vec<Option<Entry>>, number: u8, entry: Entry) -> Result<(), Entry> {
    let at = number as usize - 1;
    if log.len() <= at {
        log.resize(at + 1, None);
    }
    if let Some(there) = &log[at] {
        return Err(there.clone());
    }
    log[at] = Some(entry);
    Ok(())
}

impl State {
    fn step_writer(&mut self, number: u8, variant: Variant) {
        let line = LINES[number as usize];
        let is_fork = number == 2;
        let log = &mut self.logs[line];
        self.writers[number as usize] = match self.writers[number as usize].clone() {
            Writer::Begins => Writer::Opens { number: head(log) + 1 },
            Writer::Opens { number: at } => match create(log, at, Entry::Opened(number)) {
                Err(_) => Writer::Begins,
                Ok(()) if head(log) > at => {
                    // The number was freed by pruning and lies behind others.
                    log[at as usize - 1] = None;
                    Writer::Begins
                }
                Ok(()) => Writer::Looks { head: at },
            },
            Writer::Looks { head } => {
                let looks = !(is_fork && variant == Variant::ForkDoesNotLook);
                Writer::Reads { head, avoid: if looks { self.condemned } else { 0 } }
            }
            Writer::Reads { head, avoid } => {
                if is_fork {
                    // The oldest generation of the other line that is there.
                    let oldest = self.logs[0].iter().flatten().find_map(|entry| match entry {
                        Entry::Commit(_, packs) => Some(*packs),
                        _ => None,
                    });
                    match oldest {
                        Some(packs) if packs & avoid == 0 => {
                            Writer::Commits { head, avoid, known: packs, newest: 0, left: 0, packs }
                        }
                        _ => Writer::Ended,
                    }
                } else {
                    let newest = newest(log);
                    // It may know of content of older generations as well: all that there is now.
                    let known = self.packs;
                    let left = u8::from(number == 0);
                    Writer::Chooses { head, avoid, known, newest, left }
                }
            }
            Writer::Commits { head, avoid, known, newest, left, packs } => {
                match create(log, head + 1, Entry::Commit(number, packs)) {
                    Ok(()) if left == 0 => Writer::Ended,
                    Ok(()) => Writer::Chooses {
                        head: head + 1,
                        avoid,
                        known,
                        newest: packs,
                        left: left - 1,
                    },
                    Err(Entry::Barrier) => {
                        let avoid = avoid | self.condemned;
                        // What the newest generation refers to is found by the second reading.
                        if packs & avoid & !newest != 0 {
                            if is_fork {
                                Writer::Ended
                            } else {
                                Writer::Chooses { head: head + 1, avoid, known, newest, left }
                            }
                        } else {
                            Writer::Commits { head: head + 1, avoid, known, newest, left, packs }
                        }
                    }
                    Err(_) => Writer::Ended,
                }
            }
            other @ (Writer::Chooses { .. } | Writer::Ended) => other,
        };
    }

    fn step_reader(&mut self, variant: Variant) {
        let log = &self.logs[0];
        self.reader = match self.reader.clone() {
            Reader::Begins => {
                let commits = log.iter().enumerate().find_map(|(at, entry)| match entry {
                    Some(Entry::Commit(_, packs)) => Some((at as u8, *packs)),
                    _ => None,
                });
                commits.map_or(Reader::Ended, |(at, packs)| Reader::Pins { at, packs })
            }
            Reader::Pins { at, packs } => {
                self.pinned = packs;
                Reader::Looks { at, packs }
            }
            Reader::Looks { at, packs } => {
                let there = matches!(&log[at as usize], Some(Entry::Commit(..)));
                if there || variant == Variant::ReaderDoesNotLook {
                    Reader::Reads { packs }
                } else {
                    self.pinned = 0;
                    Reader::Ended
                }
            }
            Reader::Reads { .. } => {
                self.pinned = 0;
                Reader::Ended
            }
            Reader::Ended => Reader::Ended,
        };
    }

    /// What a collection reads in step `step` of three.
    fn read(&self, step: u8, variant: Variant) -> Packs {
        let order = if variant == Variant::PinsBeforeLines { [2, 0, 1] } else { [0, 1, 2] };
        match order[step as usize] {
            2 => self.pinned,
            line => referred(&self.logs[line]),
        }
    }

    fn step_collector(&mut self, variant: Variant) {
        self.collector = match self.collector.clone() {
            Collector::Begins => Collector::Marks { listed: self.packs, line: 0, referred: 0 },
            Collector::Marks { listed, line, referred: so_far } if line < 3 => {
                let all = so_far | self.read(line, variant);
                Collector::Marks { listed, line: line + 1, referred: all }
            }
            Collector::Marks { listed, referred, .. } => {
                self.condemned = listed & !referred;
                Collector::Waits
            }
            Collector::Waits => {
                let lines = (0..2).filter(|line| head(&self.logs[*line]) > 0);
                let lines = lines.fold(0, |all, line| all | 1 << line);
                if variant == Variant::NoBarriers {
                    Collector::Reads { line: 0, referred: 0 }
                } else {
                    Collector::Barriers { lines, line: 0 }
                }
            }
            Collector::Barriers { lines, line } if line < 2 => {
                if lines >> line & 1 == 1 {
                    let log = &mut self.logs[line as usize];
                    let number = head(log) + 1;
                    create(log, number, Entry::Barrier).expect("nothing is above the head");
                }
                Collector::Barriers { lines, line: line + 1 }
            }
            Collector::Barriers { .. } if variant == Variant::NoSecondReading => {
                Collector::Deletes { dead: self.condemned }
            }
            Collector::Barriers { .. } => Collector::Reads { line: 0, referred: 0 },
            Collector::Reads { line, referred: so_far } if line < 3 => {
                let all = so_far | self.read(line, variant);
                Collector::Reads { line: line + 1, referred: all }
            }
            Collector::Reads { referred, .. } => {
                Collector::Deletes { dead: self.condemned & !referred }
            }
            Collector::Deletes { dead: 0 } | Collector::Ended => Collector::Ended,
            Collector::Deletes { dead } => {
                // One after the other.
                let one = 1 << dead.trailing_zeros();
                self.packs &= !one;
                Collector::Deletes { dead: dead & !one }
            }
        };
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        // Line 0 has two generations; the newer no longer refers to pack 0. Pack 2 was sent by a
        // writer that died before its commit.
        let log = vec![
            Some(Entry::Opened(9)),
            Some(Entry::Commit(9, 0b001)),
            Some(Entry::Commit(9, 0b010)),
        ];
        vec![State {
            logs: [log, Vec::new()],
            packs: 0b111,
            condemned: 0,
            writers: [0, 1, 2].map(|at| if self.1[at] { Writer::Begins } else { Writer::Ended }),
            reader: if self.1[3] { Reader::Begins } else { Reader::Ended },
            pinned: 0,
            collector: Collector::Begins,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (number, writer) in state.writers.iter().enumerate() {
            let number = number as u8;
            match writer {
                Writer::Ended => {}
                Writer::Chooses { avoid, known, newest, .. } => {
                    // Refers to something known, beside what it had, or sends something new.
                    for pack in (0..6u8).map(|pack| 1 << pack) {
                        if known & pack != 0 && (avoid & pack == 0 || newest & pack != 0) {
                            actions.push(Action::Choose(number, pack));
                        }
                    }
                    // A pack that is sent never has the name of one that was there before.
                    if known & (1 << (4 + number)) == 0 {
                        actions.push(Action::Choose(number, 1 << (4 + number)));
                    }
                }
                _ => actions.push(Action::Writer(number)),
            }
        }
        if state.reader != Reader::Ended {
            actions.push(Action::Reader);
        }
        if state.collector != Collector::Ended {
            actions.push(Action::Collector);
        }
        for (line, log) in state.logs.iter().enumerate() {
            let commits: Vec<u8> = (0..log.len() as u8)
                .filter(|at| matches!(log[*at as usize], Some(Entry::Commit(..))))
                .collect();
            // The oldest first, as all retention rules but the cleverest have it.
            if commits.len() > 1 {
                actions.push(Action::Prune(line as u8, commits[0]));
            }
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut state = state.clone();
        match action {
            Action::Writer(number) => state.step_writer(number, self.0),
            Action::Choose(number, pack) => {
                let writer = &mut state.writers[number as usize];
                if let Writer::Chooses { head, avoid, known, newest, left } = writer.clone() {
                    // New content is in the store before the commit that refers to it.
                    if pack >= 1 << 4 {
                        state.packs |= pack;
                    }
                    let known = known | pack;
                    *writer = Writer::Commits { head, avoid, known, newest, left, packs: pack };
                }
            }
            Action::Reader => state.step_reader(self.0),
            Action::Collector => state.step_collector(self.0),
            Action::Prune(line, at) => state.logs[line as usize][at as usize] = None,
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no generation refers to what is gone", |_, state: &State| {
                state.logs.iter().all(|log| referred(log) & !state.packs == 0)
            }),
            Property::always(
                "what a reader reads is there",
                |_, state: &State| !matches!(&state.reader, Reader::Reads { packs } if packs & !state.packs != 0),
            ),
            Property::sometimes("something is deleted", |_, state: &State| state.packs & 7 != 7),
            Property::sometimes("a writer commits after a barrier", |_, state: &State| {
                let after = |log: &Vec<Option<Entry>>| {
                    let barrier = log.iter().position(|e| *e == Some(Entry::Barrier));
                    barrier.is_some_and(|at| {
                        log[at..].iter().any(|e| matches!(e, Some(Entry::Commit(..))))
                    })
                };
                state.logs.iter().any(after)
            }),
        ]
    }
}

#[test]
fn in_every_order_of_steps_no_generation_refers_to_what_a_collection_deleted() {
    for cast in CASTS {
        let checker = Protocol(Variant::AsItIs, cast).checker().threads(2).spawn_bfs().join();
        println!("{} states", checker.unique_state_count());
        assert!(checker.unique_state_count() > 10_000);
        checker.assert_properties();
    }
}

#[test]
fn each_rule_is_needed_without_it_the_checker_finds_how_content_is_lost() {
    let (generation, reader) =
        ("no generation refers to what is gone", "what a reader reads is there");
    for (variant, cast, property) in [
        (Variant::NoBarriers, CASTS[0], generation),
        (Variant::NoSecondReading, CASTS[0], generation),
        (Variant::ForkDoesNotLook, CASTS[1], generation),
        (Variant::ReaderDoesNotLook, CASTS[2], reader),
        (Variant::PinsBeforeLines, CASTS[2], reader),
    ] {
        let checker = Protocol(variant, cast).checker().threads(2).spawn_bfs().join();
        let lost = checker.discovery(property);
        assert!(lost.is_some(), "{variant:?}");
    }
}
