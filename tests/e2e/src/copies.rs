//! Watches that a machine never runs twice: the processor time of its monitors on all hosts, many
//! times a second. Processors that stand still use none.

use drafter::{driver::qemu::monitor_without_runner, runner::state::MachineDir};
use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(40);
/// A guest that uses less in a look does not count as running: a stopped processor is woken now and
/// then to be told something.
const RUNS: u64 = 2_000_000;
/// Looks in a row in which two ran: one may hold the end of one copy and the beginning of the other.
const TWICE: u32 = 2;

/// See the module. Dropping it ends the watching.
pub struct Copies {
    over: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
}

/// Nanoseconds that the guest's processors have used.
#[must_use]
pub fn used(pid: u32) -> u64 {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
    tasks
        .flatten()
        .filter(|task| {
            let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            name.starts_with("CPU ")
        })
        .filter_map(|task| {
            let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        })
        .sum()
}

impl Copies {
    /// Watches `machine` in the state directories of all hosts.
    #[must_use]
    pub fn watch(states: &[PathBuf], machine: &str) -> Self {
        let (over, seen) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<String>>>::default());
        let (end, told) = (Arc::clone(&over), Arc::clone(&seen));
        let dirs: Vec<_> =
            states.iter().map(|state| MachineDir::at(state, machine).run()).collect();
        let thread = thread::spawn(move || {
            let mut before: Vec<(Option<u32>, u64)> = vec![(None, 0); dirs.len()];
            let mut twice = 0;
            while !end.load(Ordering::Relaxed) {
                let mut ran = Vec::new();
                for (dir, before) in dirs.iter().zip(&mut before) {
                    let pid = monitor_without_runner(dir);
                    let now = pid.map_or(0, used);
                    if pid.is_some() && pid == before.0 && now.saturating_sub(before.1) > RUNS {
                        ran.push(format!("{} ({} us)", dir.display(), (now - before.1) / 1000));
                    }
                    *before = (pid, now);
                }
                twice = if ran.len() > 1 { twice + 1 } else { 0 };
                if twice >= TWICE {
                    told.lock().unwrap().push(ran.join(" and "));
                }
                thread::sleep(LOOK);
            }
        });
        Self { over, seen, thread: Some(thread) }
    }

    /// Wants that there never were two.
    #[track_caller]
    pub fn one(&self, when: &str) {
        let seen = self.seen();
        assert!(seen.is_none(), "two copies ran {when}: {seen:?}");
    }

    /// The two that ran at once, if any did.
    #[must_use]
    pub fn seen(&self) -> Option<String> {
        let seen = self.seen.lock().unwrap();
        (!seen.is_empty()).then(|| seen.join("; "))
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
