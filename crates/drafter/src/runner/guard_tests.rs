//! The guard's loop with a page, a line and a monitor of its own; the fence counts.

use super::*;
use crate::driver::DriverError;
use std::sync::atomic::AtomicU32;

const LIMIT: Duration = Duration::from_secs(60);
const LONG: u64 = 600_000;

#[derive(Default)]
struct Counted {
    frozen: AtomicU32,
    thawed: AtomicU32,
}

impl Fence for Counted {
    fn freeze(&self) -> Result<(), DriverError> {
        self.frozen.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn thaw(&self) -> Result<(), DriverError> {
        self.thawed.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn kill(&self) -> Result<(), DriverError> {
        Ok(())
    }
}

/// A guard on a thread, and what it is told by.
struct Scene {
    /// Absent once the runner has died.
    runner: Option<Guard>,
    /// Of the page, as somebody else has it.
    page: Page,
    /// Absent once the monitor has ended.
    monitor: Option<io::PipeWriter>,
    fence: Arc<Counted>,
    guard: std::thread::JoinHandle<()>,
}

impl Scene {
    fn new() -> Self {
        let (page, fence) = (Page::new().unwrap(), Arc::new(Counted::default()));
        let (line, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let (monitor, lives) = io::pipe().unwrap();
        let copy = || Page(page.0.try_clone().unwrap());
        let (seen, counted) = (copy(), Arc::clone(&fence));
        let guard =
            std::thread::spawn(move || watch(&seen, &theirs, monitor.as_fd(), counted.as_ref()));
        let (kept, over) = (AtomicBool::new(false), AtomicBool::new(false));
        let runner = Guard { page: copy(), line, pid: 0, ended: Arc::default(), kept, over };
        Self { runner: Some(runner), page, monitor: Some(lives), fence, guard }
    }

    fn tells(&self) -> &Guard {
        self.runner.as_ref().unwrap()
    }

    /// How often it was frozen and thawed.
    fn did(&self) -> (u32, u32) {
        (self.fence.frozen.load(Ordering::SeqCst), self.fence.thawed.load(Ordering::SeqCst))
    }

    #[track_caller]
    fn wait(&self, what: &str, did: (u32, u32)) {
        let deadline = Instant::now() + LIMIT;
        while self.did() != did {
            assert!(Instant::now() < deadline, "{what}: {:?}", self.did());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn ends(self) -> (u32, u32) {
        self.guard.join().unwrap();
        (self.fence.frozen.load(Ordering::SeqCst), self.fence.thawed.load(Ordering::SeqCst))
    }
}

fn at(ms: u64) -> BootTime {
    BootClock.now() + Duration::from_millis(ms)
}

#[test]
fn a_machine_is_frozen_once_when_its_term_is_over_and_thawed_when_it_has_more() {
    let scene = Scene::new();
    scene.tells().until(at(LONG));
    scene.tells().until(at(20));
    scene.wait("it freezes", (1, 0));
    scene.tells().until(at(LONG));
    scene.wait("it thaws", (1, 1));
    scene.tells().until(at(0));
    scene.wait("it freezes again", (2, 1));
    scene.tells().end();
    assert_eq!(scene.ends(), (2, 1), "what is over stays frozen");
}

#[test]
fn the_end_that_comes_first_counts_and_both_must_have_time_for_a_thaw() {
    let scene = Scene::new();
    scene.tells().until(at(LONG));
    scene.tells().offer_until(Some(at(10))).unwrap();
    scene.wait("the offer is over", (1, 0));
    scene.tells().until(at(0));
    scene.tells().offer_until(None).unwrap();
    // Another end, which is over too: nothing is thawed.
    scene.wait("it is held for the term", (2, 0));
    scene.tells().open_end();
    scene.wait("it thaws", (2, 1));
    scene.tells().end();
    assert_eq!(scene.ends(), (2, 1));
}

#[test]
fn an_unconfirmed_machine_whose_runner_dies_is_frozen_at_the_end_of_its_offer() {
    let mut scene = Scene::new();
    scene.tells().offer_until(Some(at(300))).unwrap();
    scene.runner = None;
    scene.wait("it freezes", (1, 0));
    assert!(nanos(BootClock.now()) >= scene.page.get().unwrap().unwrap().until());
    assert!(!scene.guard.is_finished(), "it goes on for as long as there is something to hold");
    scene.monitor = None;
    assert_eq!(scene.ends(), (1, 0));
}

#[test]
fn a_lease_that_was_won_at_the_last_moment_leaves_the_machine_running_whatever_comes_first() {
    for wait in [0, 1, 2, 5, 10] {
        let mut scene = Scene::new();
        scene.tells().offer_until(Some(at(wait))).unwrap();
        std::thread::sleep(Duration::from_millis(wait / 2));
        scene.tells().offer_until(None).unwrap();
        if wait == 2 {
            scene.runner = None;
        } else {
            scene.tells().end();
        }
        let (frozen, thawed) = scene.ends();
        assert_eq!(frozen, thawed, "frozen {frozen} times, thawed {thawed} times");
    }
}

#[test]
fn a_guard_ends_with_its_monitor_and_with_a_runner_that_set_no_end() {
    let mut scene = Scene::new();
    scene.monitor = None;
    assert_eq!(scene.ends(), (0, 0));
    let mut scene = Scene::new();
    scene.runner = None;
    assert_eq!(scene.ends(), (0, 0));
}

#[test]
fn a_guard_that_is_kept_for_a_term_does_not_end_with_the_offers() {
    let scene = Scene::new();
    assert!(scene.tells().keep());
    scene.tells().end_of_offers();
    assert!(scene.tells().keep());
    scene.tells().until(at(0));
    scene.wait("it still freezes", (1, 0));
    scene.tells().end();
    assert!(!scene.tells().keep());
    scene.ends();
    let scene = Scene::new();
    scene.tells().end_of_offers();
    assert!(!scene.tells().keep());
    scene.ends();
}

#[test]
fn a_page_that_is_just_being_set_says_nothing() {
    let page = Page::new().unwrap();
    assert_eq!(page.get().unwrap().unwrap().until(), OPEN);
    page.set(Slot::Offer, 7).unwrap();
    assert_eq!(page.get().unwrap().unwrap().until(), 7);
    page.0.write_all_at(&8_u64.to_le_bytes(), SLOT_BYTES as u64).unwrap();
    assert_eq!(page.get().unwrap(), None);
}

#[test]
fn an_offer_is_never_taken_up_that_ends_before_the_guard_looks() {
    let terms = crate::migrate::switchover::Terms::default();
    assert!(terms.start_margin >= LOOK);
}

#[test]
fn a_guard_that_an_earlier_runner_left_is_found_with_what_it_was_told_and_ended() {
    let folder = tempfile::tempdir().unwrap();
    let page = Page::new().unwrap();
    page.set(Slot::Asked, 1).unwrap();
    let stdin = Stdio::from(page.0.try_clone().unwrap());
    let mut child = Command::new("sleep").arg("600").stdin(stdin).spawn().unwrap();
    let started = process_start(child.id()).unwrap();
    let write = |started: u64| {
        fs::write(folder.path().join(FILE), format!("{} {started}\n", child.id())).unwrap();
    };
    write(started + 1);
    assert!(Left::find(folder.path()).is_none(), "another process has its number");
    write(started);
    let left = Left::find(folder.path()).unwrap();
    assert!(left.has_asked() && !left.is_bound());
    page.set(Slot::Term, 5).unwrap();
    let left = Left::find(folder.path()).unwrap();
    assert!(left.is_bound());
    left.end().unwrap();
    assert!(Left::find(folder.path()).is_none());
    child.wait().unwrap();
}
