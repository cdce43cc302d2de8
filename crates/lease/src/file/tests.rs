use super::*;
use crate::{AttemptId, Epoch, HostName, LeaseStore, MachineName, Outcome, Record};
use nix::fcntl::{Flock, FlockArg};
use std::{
    fmt,
    sync::{Arc, Mutex, mpsc},
    thread,
};

/// What is done before a step.
#[derive(Clone, Default)]
pub(super) struct Hook(Option<Arc<dyn Fn(Step) + Send + Sync>>);

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hook")
    }
}

impl Hook {
    pub(super) fn at(&self, step: Step) {
        if let Some(hook) = &self.0 {
            hook(step);
        }
    }
}

/// What a program before this one wrote for `redis-1`.
const GOLDEN: &str = r#"{
  "version": 1,
  "machine": "redis-1",
  "epoch": 1,
  "owner": "a",
  "handing_to": null,
  "attempt": "0000000000000007",
  "nonce": "00000000000000000000000000000abc"
}
"#;

fn machine() -> MachineName {
    MachineName::new("redis-1").unwrap()
}

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

fn store(dir: &Path) -> FileStore {
    FileStore::open(dir, Duration::from_secs(60)).unwrap()
}

fn first() -> Record {
    Record::first(machine(), host("a"), AttemptId(7), Nonce(0xabc))
}

/// The files of the cell, sorted.
fn files(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir.join("redis-1.lease")).unwrap();
    let mut names: Vec<_> =
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn content(dir: &Path) -> PathBuf {
    let name = files(dir).into_iter().find(|name| name.ends_with(".json")).unwrap();
    dir.join("redis-1.lease").join(name)
}

#[test]
fn only_the_expected_record_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    assert_eq!(store.read(&machine()).unwrap(), None);
    let one = first();
    let two = one.taken(host("b"), AttemptId(8), Nonce(2));
    let set = |expected, new| store.compare_and_set(&machine(), expected, new).unwrap();
    assert_eq!(set(Some(&one), &two), Outcome::Lost(None));
    assert_eq!(set(None, &one), Outcome::Won);
    assert_eq!(set(None, &one), Outcome::Lost(Some(one.clone())));
    assert_eq!(set(Some(&one), &two), Outcome::Won);
    assert_eq!(set(Some(&one), &two), Outcome::Lost(Some(two.clone())));
    assert_eq!(store.read(&machine()).unwrap(), Some(two));
}

#[test]
fn of_many_writers_at_once_exactly_one_wins_each_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let wins = Mutex::new(Vec::new());
    store(dir.path()).compare_and_set(&machine(), None, &first()).unwrap();
    thread::scope(|scope| {
        for writer in 0..4_u64 {
            let (store, wins) = (store(dir.path()), &wins);
            scope.spawn(move || {
                for round in 0..25 {
                    let seen = store.read(&machine()).unwrap().unwrap();
                    let nonce = Nonce(u128::from(writer * 1000 + round));
                    let new = seen.taken(host(&format!("w{writer}")), AttemptId(writer), nonce);
                    let outcome = store.compare_and_set(&machine(), Some(&seen), &new).unwrap();
                    if outcome == Outcome::Won {
                        wins.lock().unwrap().push(new.epoch);
                    }
                }
            });
        }
    });
    let mut wins = wins.into_inner().unwrap();
    wins.sort_unstable();
    let expected: Vec<_> = (2..2 + wins.len() as u64).map(Epoch).collect();
    assert_eq!(wins, expected);
    assert_eq!(store(dir.path()).read(&machine()).unwrap().unwrap().epoch, wins[wins.len() - 1]);
    assert_eq!(files(dir.path()).len(), 2, "{:?}", files(dir.path()));
}

#[test]
fn a_damaged_file_is_an_error_that_names_it_and_is_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let whole = first().encode();
    let mut other_machine = first();
    other_machine.machine = MachineName::new("other").unwrap();
    let newer = String::from_utf8(whole.clone()).unwrap().replace(": 1,", ": 2,");
    let damaged: [&[u8]; 5] =
        [b"", &whole[..40], b"\xff\xfe", newer.as_bytes(), &other_machine.encode()];
    store.compare_and_set(&machine(), None, &first()).unwrap();
    let path = content(dir.path());
    for bytes in damaged {
        fs::write(&path, bytes).unwrap();
        let e = store.read(&machine()).unwrap_err();
        assert!(matches!(e, StoreError::Corrupt { .. }), "{e}");
        assert!(e.to_string().contains("redis-1.lease"), "{e}");
        assert!(store.compare_and_set(&machine(), None, &first()).is_err());
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
    fs::remove_file(&path).unwrap();
    for e in [
        store.read(&machine()).unwrap_err(),
        store.compare_and_set(&machine(), None, &first()).unwrap_err(),
    ] {
        assert!(matches!(e, StoreError::Corrupt { .. }), "{e}");
        assert!(e.to_string().contains("is not there"), "{e}");
    }
}

#[test]
fn a_store_that_is_away_is_no_empty_store() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("leases");
    let store = store(&folder);
    fs::remove_dir(&folder).unwrap();
    assert!(matches!(store.read(&machine()), Err(StoreError::Unavailable { .. })));
    assert!(store.compare_and_set(&machine(), None, &first()).is_err());
    fs::write(&folder, "no folder").unwrap();
    assert!(matches!(store.read(&machine()), Err(StoreError::Unavailable { .. })));
    assert!(store.compare_and_set(&machine(), None, &first()).is_err());
}

#[test]
fn what_writers_that_died_have_left_changes_nothing_and_is_removed_by_the_next_write() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.compare_and_set(&machine(), None, &first()).unwrap();
    let cell = dir.path().join("redis-1.lease");
    for name in ["1.dead.json", "2.dead.json", "2.dead-too.json"] {
        fs::write(cell.join(name), b"half a rec").unwrap();
    }
    assert_eq!(store.read(&machine()).unwrap(), Some(first()));
    let next = first().taken(host("b"), AttemptId(9), Nonce(9));
    let set = store.compare_and_set(&machine(), Some(&first()), &next).unwrap();
    assert_eq!(set, Outcome::Won);
    assert_eq!(store.read(&machine()).unwrap(), Some(next));
    assert_eq!(files(dir.path()).len(), 2, "{:?}", files(dir.path()));
}

/// A store of which the first call that comes to `step` says so and waits.
fn stopping(dir: &Path, step: Step) -> (FileStore, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let ((came, is_there), (go_on, waits)) = (mpsc::channel(), mpsc::channel::<()>());
    let stop = Mutex::new(Some((came, waits)));
    let mut store = store(dir);
    store.hook = Hook(Some(Arc::new(move |at| {
        let taken = if at == step { stop.lock().unwrap().take() } else { None };
        if let Some((came, waits)) = taken {
            came.send(()).unwrap();
            waits.recv().unwrap();
        }
    })));
    (store, is_there, go_on)
}

#[test]
fn whoever_stands_still_at_any_step_keeps_nobody_waiting_and_learns_the_truth_afterwards() {
    use Step::{Look, Make, Place, Prune, Read, Rename, Sync, Write};
    for step in [Make, Place, Look, Read, Write, Rename, Sync, Prune] {
        // How far the others go on meanwhile.
        for others_write in [0, 1, 2, 5] {
            let dir = tempfile::tempdir().unwrap();
            let others = store(dir.path());
            let before = (!matches!(step, Make | Place)).then(first);
            if before.is_some() {
                others.compare_and_set(&machine(), None, &first()).unwrap();
            }
            let own = Record { owner: host("stopped"), ..first() };
            let (stopped, is_there, go_on) = stopping(dir.path(), step);
            thread::scope(|scope| {
                let (before, own) = (before.as_ref(), &own);
                let call =
                    scope.spawn(move || stopped.compare_and_set(&machine(), before, own).unwrap());
                is_there.recv_timeout(Duration::from_secs(60)).unwrap();
                let mut there = others.read(&machine()).unwrap();
                // Only from the rename on others see it.
                let was_seen = there.as_ref() == Some(own);
                assert_eq!(was_seen, matches!(step, Sync | Prune), "{step:?}");
                for number in 0..others_write {
                    let new = match &there {
                        None => first(),
                        Some(there) => there.taken(host("b"), AttemptId(1), Nonce(number)),
                    };
                    let set = others.compare_and_set(&machine(), there.as_ref(), &new).unwrap();
                    assert_eq!(set, Outcome::Won, "{step:?}");
                    there = Some(new);
                    assert_eq!(others.read(&machine()).unwrap(), there);
                }
                go_on.send(()).unwrap();
                let told = call.join().unwrap();
                let now = others.read(&machine()).unwrap();
                if was_seen || others_write == 0 {
                    assert_eq!(told, Outcome::Won, "{step:?}, {others_write}");
                } else {
                    assert_eq!(told, Outcome::Lost(there.clone()), "{step:?}, {others_write}");
                }
                let last = if others_write == 0 { Some(own.clone()) } else { there };
                assert_eq!(now, last, "{step:?}, {others_write}");
            });
            // And nothing of it is left once somebody writes again.
            let there = others.read(&machine()).unwrap();
            others.compare_and_set(&machine(), there.as_ref(), &first()).unwrap();
            assert_eq!(files(dir.path()).len(), 2, "{step:?}: {:?}", files(dir.path()));
            let all = fs::read_dir(dir.path()).unwrap().count();
            assert_eq!(all, 2, "{step:?}: more than a cell and its mark");
        }
    }
}

#[test]
fn a_reader_that_stands_still_tells_what_was_there_before_or_after_never_something_older() {
    for step in [Step::Look, Step::Read] {
        let dir = tempfile::tempdir().unwrap();
        let others = store(dir.path());
        others.compare_and_set(&machine(), None, &first()).unwrap();
        let (stopped, is_there, go_on) = stopping(dir.path(), step);
        thread::scope(|scope| {
            let call = scope.spawn(move || stopped.read(&machine()).unwrap().unwrap());
            is_there.recv_timeout(Duration::from_secs(60)).unwrap();
            let mut there = first();
            for number in 0..3 {
                let new = there.taken(host("b"), AttemptId(1), Nonce(number));
                others.compare_and_set(&machine(), Some(&there), &new).unwrap();
                there = new;
            }
            go_on.send(()).unwrap();
            // What it had listed is gone.
            assert_eq!(call.join().unwrap(), there, "{step:?}");
        });
    }
}

#[test]
fn a_record_of_the_form_before_is_taken_over_and_older_programs_are_kept_out() {
    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("redis-1.lease.json");
    fs::write(&old, GOLDEN).unwrap();
    let store = store(dir.path());
    assert_eq!(store.read(&machine()).unwrap(), Some(first()));
    // What they make of it.
    let refused = Record::decode(&fs::read(&old).unwrap()).unwrap_err();
    assert!(refused.to_string().contains("version 1000"), "{refused}");
    let mark =
        "{\n  \"version\": 1000,\n  \"moved_to\": \"redis-1.lease\",\n  \"before\": null\n}\n";
    assert_eq!(fs::read_to_string(&old).unwrap(), mark);
    let next = first().taken(host("b"), AttemptId(9), Nonce(9));
    let set = store.compare_and_set(&machine(), Some(&first()), &next).unwrap();
    assert_eq!(set, Outcome::Won);
    // Who removes the cell has removed it.
    fs::remove_dir_all(dir.path().join("redis-1.lease")).unwrap();
    assert_eq!(store.read(&machine()).unwrap(), None);
    // A new cell is marked as well.
    let other = MachineName::new("other").unwrap();
    let record = Record { machine: other.clone(), ..first() };
    assert_eq!(store.compare_and_set(&other, None, &record).unwrap(), Outcome::Won);
    assert!(Record::decode(&fs::read(dir.path().join("other.lease.json")).unwrap()).is_err());
}

#[test]
fn a_take_over_that_was_broken_off_at_the_mark_is_finished_by_the_next_call() {
    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("redis-1.lease.json");
    fs::write(&old, GOLDEN).unwrap();
    let (stopped, is_there, go_on) = stopping(dir.path(), Step::Make);
    thread::scope(|scope| {
        let late = scope.spawn(move || stopped.read(&machine()).unwrap());
        is_there.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(fs::read_to_string(&old).unwrap().contains("moved_to"));
        let next = first().taken(host("b"), AttemptId(9), Nonce(9));
        let set = store(dir.path()).compare_and_set(&machine(), Some(&first()), &next).unwrap();
        assert_eq!(set, Outcome::Won);
        go_on.send(()).unwrap();
        assert_eq!(late.join().unwrap(), Some(next), "made again of what was there before");
    });
}

#[test]
fn an_older_program_that_holds_its_lock_ends_the_take_over_at_its_limit() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("redis-1.lease.json"), GOLDEN).unwrap();
    let lock = File::create(dir.path().join("redis-1.lock")).unwrap();
    let held = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    let limit = Duration::from_millis(50);
    let impatient = FileStore::open(dir.path(), limit).unwrap();
    let started = Instant::now();
    let e = impatient.read(&machine()).unwrap_err();
    assert!(matches!(e, StoreError::Locked { .. }), "{e}");
    assert!(started.elapsed() >= limit);
    drop(held);
    assert_eq!(store(dir.path()).read(&machine()).unwrap(), Some(first()));
}
