//! What every store of leases must do, run against each: linearizable compare-and-set under eight
//! threads with lost answers, two processes at once, a writer killed with SIGKILL in the middle.
#![allow(clippy::unwrap_used, reason = "a test")]

mod api_server;
mod history;
mod outages;
mod refusals;
mod rig;

use history::{Did, Entry, Value, check};
use lease::{Cells, Key, MachineName, StoreError, Swap};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use rig::Rig;
use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// For other processes' locks: machines that test are slow.
const LIMIT: Duration = Duration::from_secs(60);

/// The child's task: see [`a_writer`].
const CHILD: &str = "LEASE_CONFORMANCE_CHILD";

fn key() -> Key {
    Key::Lease(MachineName::new("redis-1").unwrap())
}

fn bytes(value: Value) -> Vec<u8> {
    format!("{{\"content\": {value}}}\n").into_bytes()
}

fn value(bytes: Option<&[u8]>) -> Value {
    let Some(bytes) = bytes else { return 0 };
    let text = std::str::from_utf8(bytes).unwrap();
    let number = text.strip_prefix("{\"content\": ").and_then(|t| t.strip_suffix("}\n"));
    number.unwrap_or_else(|| panic!("half a record: {text:?}")).parse().unwrap()
}

/// One read and one swap by each of eight threads again and again; some answers are thrown away, and
/// what was asked without an answer is sometimes asked again, as a caller does that settles it.
/// Meanwhile `trouble` is made; what it is given waits until all have made some more rounds. Half of the
/// threads have a store of their own, and too little patience for any trouble.
fn threads(kind: &str, rig: &mut Rig, trouble: impl FnOnce(&mut Rig, &dyn Fn())) {
    const ROUNDS: u64 = 12;
    let begun = Instant::now();
    let now = || u64::try_from(begun.elapsed().as_nanos()).unwrap();
    let history: Mutex<Vec<Entry>> = Mutex::new(Vec::new());
    let (rounds, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let shared = rig.open(LIMIT);
    let is_remote = !matches!(kind, "file" | "sqlite");
    let patience = if is_remote { Duration::from_millis(500) } else { LIMIT };
    let own: Vec<_> = (0..4).map(|_| rig.open(patience)).collect();
    let work = |thread: u64, store: &dyn Cells| {
        let note =
            |begun, answered, did| history.lock().unwrap().push(Entry { begun, answered, did });
        for round in 0.. {
            if round >= ROUNDS && over.load(Ordering::Acquire) {
                break;
            }
            let start = now();
            let Ok(there) = store.get(&key()) else { continue };
            let seen = value(there.as_deref());
            note(start, Some(now()), Did::Saw(seen));
            let new = 1 + thread * 1_000_000 + round;
            let start = now();
            let wrote = Did::Wrote { expected: seen, new };
            match store.swap(&key(), there.as_deref(), &bytes(new)) {
                Ok(Swap::Done) if round % 3 == 1 => {
                    // The answer got lost: asked again, the store shows the caller's own.
                    note(start, None, wrote);
                    let start = now();
                    let saw = match store.swap(&key(), there.as_deref(), &bytes(new)) {
                        Ok(Swap::Found(found)) => Did::Saw(value(found.as_deref())),
                        // It was found there after a try without an answer: the history must allow that.
                        Ok(Swap::Done) if is_remote => Did::Saw(new),
                        Ok(Swap::Done) => panic!("one write won twice"),
                        Err(_) => continue,
                    };
                    note(start, Some(now()), saw);
                }
                Ok(Swap::Done) => note(start, Some(now()), wrote),
                Ok(Swap::Found(found)) => {
                    let there = value(found.as_deref());
                    if is_remote {
                        // A try without an answer may have done it, and another have replaced it.
                        note(start, None, wrote);
                    }
                    note(start, Some(now()), Did::Saw(there));
                }
                Err(_) => note(start, None, wrote),
            }
            rounds.fetch_add(1, Ordering::AcqRel);
        }
    };
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let store = own.get(thread as usize).unwrap_or(&shared);
            let work = &work;
            scope.spawn(move || work(thread, &**store));
        }
        // Also if it panics.
        let _end = End(&over);
        trouble(rig, &|| {
            let (until, enough) = (Instant::now() + 2 * LIMIT, rounds.load(Ordering::Acquire) + 24);
            while rounds.load(Ordering::Acquire) < enough {
                assert!(Instant::now() < until, "{kind}: nothing happens any more");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    });
    let history = history.into_inner().unwrap();
    let length = check(&history).unwrap_or_else(|e| panic!("{kind}: {e}\n{history:#?}"));
    assert!(length >= 12, "{kind}: hardly anything was written: {length}");
}

struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn eight_threads(kind: &str) {
    let Some(mut rig) = Rig::start(kind) else { return };
    threads(kind, &mut rig, |_, _| {});
}

/// Not a test: what a child does. Counts up in the cell, and says each number that it has won.
#[test]
fn a_writer() {
    let Ok(address) = std::env::var(CHILD) else { return };
    let store = lease::open_cells(&address, LIMIT).unwrap();
    loop {
        let there = store.get(&key()).unwrap();
        let new = value(there.as_deref()) + 1;
        if store.swap(&key(), there.as_deref(), &bytes(new)).unwrap() == Swap::Done {
            println!("won {new}");
        }
    }
}

fn writer(rig: &Rig) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_writer", "--nocapture"])
        .env(CHILD, rig.address())
        .envs(rig.credentials())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The numbers that it says it has won, and whether it was heard to the end.
fn wins(child: &mut Child, count: usize) -> Vec<Value> {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let won = lines.map_while(Result::ok).filter_map(|l| l.strip_prefix("won ")?.parse().ok());
    let mut first: Vec<Value> = Vec::new();
    for number in won {
        first.push(number);
        if first.len() == count {
            // SIGKILL, wherever it is by now; what it said until then is read on.
            child.kill().unwrap();
        }
    }
    child.wait().unwrap();
    first
}

/// Two at once, each killed at some moment of its writing, several times over.
fn two_processes_that_are_killed(kind: &str) {
    let Some(rig) = Rig::start(kind) else { return };
    let mut all: Vec<Value> = Vec::new();
    for round in 0..4 {
        let mut children = [writer(&rig), writer(&rig)];
        let [one, two] = &mut children;
        let (first, second) = std::thread::scope(|scope| {
            let first = scope.spawn(|| wins(one, 3 + round));
            let second = scope.spawn(|| wins(two, 5 + round));
            (first.join().unwrap(), second.join().unwrap())
        });
        all.extend(first);
        all.extend(second);
        // A new process finds the cell whole and free, with everything that was said to be there.
        let last = value(rig.open(LIMIT).get(&key()).unwrap().as_deref());
        let newest = all.iter().max().copied().unwrap();
        // What a killed writer had done and not said: one number each, in every round.
        assert!(last >= newest, "{kind}: {newest} was won, and {last} is there");
        let mut distinct = all.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), all.len(), "{kind}: a number was won twice");
        let unsaid = usize::try_from(last).unwrap() - all.len();
        assert!(unsaid <= 2 * (round + 1), "{kind}: {unsaid} numbers were won by nobody");
    }
}

fn content_is_compared_whole(kind: &str) {
    let Some(rig) = Rig::start(kind) else { return };
    compared_whole(&rig);
}

fn compared_whole(rig: &Rig) {
    let store = rig.open(LIMIT);
    let swap = |expected: Option<&[u8]>, new: &[u8]| store.swap(&key(), expected, new).unwrap();
    assert_eq!(store.get(&key()).unwrap(), None);
    assert_eq!(swap(Some(b"a"), b"b"), Swap::Found(None));
    assert_eq!(swap(None, b"a"), Swap::Done);
    assert_eq!(swap(None, b"b"), Swap::Found(Some(b"a".to_vec())));
    assert_eq!(swap(Some(b"a "), b"b"), Swap::Found(Some(b"a".to_vec())));
    let long: Vec<u8> = (0..lease::MAX_CELL).map(|i| i as u8).collect();
    assert_eq!(swap(Some(b"a"), &long), Swap::Done);
    assert_eq!(store.get(&key()).unwrap().as_ref(), Some(&long));
    assert_eq!(swap(Some(&long), b"c"), Swap::Done);
    // Cells are apart, and survive the store that wrote them.
    let names = [
        Key::Lease(MachineName::new("redis-2").unwrap()),
        Key::Beat(lease::BeatName::of_host(lease::HostName::new("redis-1").unwrap())),
    ];
    drop(store);
    let store = rig.open(LIMIT);
    for other in &names {
        assert_eq!(store.get(other).unwrap(), None);
    }
    assert_eq!(store.get(&key()).unwrap(), Some(b"c".to_vec()));
}

macro_rules! conforms {
    ($kind:ident) => {
        mod $kind {
            const KIND: &str = stringify!($kind);

            #[test]
            fn content_is_compared_whole() {
                super::content_is_compared_whole(KIND);
            }

            #[test]
            fn every_history_of_eight_threads_is_linearizable() {
                super::eight_threads(KIND);
            }

            #[test]
            fn what_a_killed_writer_said_is_there_and_nothing_is_won_twice() {
                super::two_processes_that_are_killed(KIND);
            }
        }
    };
}

/// SIGSTOP at thousands of random moments of its writing; while it stands still, another process reads and
/// writes. It could not, if the one that stands still held anything.
#[test]
fn a_writer_that_is_stopped_anywhere_keeps_nobody_waiting() {
    let rig = Rig::start("file").unwrap();
    let store = rig.open(LIMIT);
    let mut child = writer(&rig);
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    let out = child.stdout.take().unwrap();
    let won = std::thread::spawn(move || -> Vec<Value> {
        let lines = BufReader::new(out).lines().map_while(Result::ok);
        lines.filter_map(|line| line.strip_prefix("won ")?.parse().ok()).collect()
    });
    let until = Instant::now() + LIMIT;
    while store.get(&key()).unwrap().is_none() {
        assert!(Instant::now() < until, "the writer does not begin");
    }
    let (mut mine, mut slowest) = (Vec::new(), Duration::ZERO);
    let mut random = 7_u64;
    for round in 0..2000 {
        // Whoever is overtaken each time never wins: now and then nobody disturbs it.
        let before = value(store.get(&key()).unwrap().as_deref());
        let until = Instant::now() + LIMIT;
        while round % 8 == 0 && value(store.get(&key()).unwrap().as_deref()) == before {
            assert!(Instant::now() < until, "the writer does not go on");
        }
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros((random >> 33) % 700));
        kill(pid, Signal::SIGSTOP).unwrap();
        let stands = waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert!(matches!(stands, WaitStatus::Stopped(..)), "{stands:?}");
        let begun = Instant::now();
        // Nobody else writes now.
        let there = store.get(&key()).unwrap();
        let new = value(there.as_deref()) + 1;
        assert_eq!(store.swap(&key(), there.as_deref(), &bytes(new)).unwrap(), Swap::Done);
        assert_eq!(value(store.get(&key()).unwrap().as_deref()), new);
        slowest = slowest.max(begun.elapsed());
        mine.push(new);
        kill(pid, Signal::SIGCONT).unwrap();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    println!("the slowest of 2000 reads and writes beside a stopped writer took {slowest:?}");
    assert!(slowest < LIMIT, "somebody was waited for");
    let mut all = won.join().unwrap();
    assert!(all.len() >= 200, "the writer said {} numbers", all.len());
    all.extend(mine);
    let last = value(store.get(&key()).unwrap().as_deref());
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), count, "a number was won twice");
    let unsaid = usize::try_from(last).unwrap() - count;
    assert!(unsaid <= 1, "{unsaid} of {last} numbers were won by nobody");
}

conforms!(file);
conforms!(sqlite);
conforms!(postgres);
conforms!(etcd);
conforms!(s3);
conforms!(kubernetes);

/// It looks at conditions without a lock, so of what comes at once two may win. If the store's own trial
/// sees that, it is refused, which is right.
#[test]
fn an_s3_server_that_is_not_ours_compares_content_whole() {
    let Some(rig) = Rig::start("moto") else { return };
    let other = Key::Lease(MachineName::new("other").unwrap());
    match rig.open(LIMIT).swap(&other, None, b"a") {
        Ok(swapped) => assert_eq!(swapped, Swap::Done),
        Err(StoreError::Refused { detail, .. }) if detail.contains("conditions of writes") => {
            lease_testing::missing(&format!("moto with conditional puts that one wins ({detail})"));
            return;
        }
        Err(e) => panic!("{e}"),
    }
    compared_whole(&rig);
}
