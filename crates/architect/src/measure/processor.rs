//! What a guest has of a processor, whatever that processor's speed is just now.

use anyhow::Context;
use nix::unistd::{SysconfVar, sysconf};
use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

/// What QEMU calls the thread of a virtual processor, before its number.
const THREAD: &str = "CPU ";

/// The threads of a machine's virtual processors.
pub(super) struct Processors(Vec<PathBuf>);

/// What they had run at an instant.
pub(super) struct Reading {
    at: Instant,
    ran: Duration,
    /// Of that, in the kernel: faults of tracking among it.
    kernel: Duration,
}

impl Processors {
    /// Of the machine whose monitor is the process `monitor`.
    pub(super) fn of(monitor: u32) -> anyhow::Result<Self> {
        let threads = PathBuf::from(format!("/proc/{monitor}/task"));
        let of_a_processor = |thread: &PathBuf| {
            let name = fs::read_to_string(thread.join("comm")).unwrap_or_default();
            name.starts_with(THREAD)
        };
        let all = threads.read_dir().with_context(|| format!("read {}", threads.display()))?;
        let own: Vec<_> = all.flatten().map(|e| e.path()).filter(of_a_processor).collect();
        anyhow::ensure!(!own.is_empty(), "process {monitor} has no thread of a virtual processor");
        Ok(Self(own))
    }

    /// Times on a processor are of `schedstat` (nanoseconds; sched-stats.rst of the kernel), those in the
    /// kernel of `stat` (field 15, stime, in ticks of `_SC_CLK_TCK`; proc_pid_stat(5)).
    pub(super) fn read(&self) -> anyhow::Result<Reading> {
        let ticks = sysconf(SysconfVar::CLK_TCK)?.context("the system does not tell its ticks")?;
        let mut reading =
            Reading { at: Instant::now(), ran: Duration::ZERO, kernel: Duration::ZERO };
        for thread in &self.0 {
            let schedstat = fs::read_to_string(thread.join("schedstat"))?;
            let ran = schedstat.split_ascii_whitespace().next().and_then(|ns| ns.parse().ok());
            let stat = fs::read_to_string(thread.join("stat"))?;
            // The name, field 2, may hold anything but is the last thing in parentheses.
            let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            let kernel = rest.split_ascii_whitespace().nth(12).and_then(|t| t.parse::<u32>().ok());
            let (ran, kernel) = ran
                .zip(kernel)
                .with_context(|| format!("{} has another form than is known", thread.display()))?;
            reading.ran += Duration::from_nanos(ran);
            reading.kernel += Duration::from_secs(1) * kernel / u32::try_from(ticks)?;
        }
        Ok(reading)
    }
}

impl Reading {
    /// The share of the time since `earlier` in which the guest, or its translator, ran: 1 is one
    /// processor.
    pub(super) fn share_since(&self, earlier: &Self) -> f64 {
        let time = (self.at - earlier.at).as_secs_f64();
        let ran = self.ran.saturating_sub(earlier.ran);
        let kernel = self.kernel.saturating_sub(earlier.kernel);
        ran.saturating_sub(kernel).as_secs_f64() / time
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]

    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_thread_that_computes_has_a_share_and_one_that_waits_has_none() {
        let (over, (say, named)) = (AtomicBool::new(false), std::sync::mpsc::channel());
        std::thread::scope(|scope| {
            let worker = std::thread::Builder::new().name("CPU 0/TCG".into());
            let work = || {
                say.send(()).unwrap();
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            };
            worker.spawn_scoped(scope, work).unwrap();
            named.recv().unwrap();
            let processors = Processors::of(std::process::id()).unwrap();
            assert_eq!(processors.0.len(), 1);
            let first = processors.read().unwrap();
            // On a busy computer it has to wait for its turn; and the kernel counts a few milliseconds
            // at a time.
            let until = Instant::now() + Duration::from_secs(30);
            let share = loop {
                std::thread::park_timeout(Duration::from_millis(300));
                let share = processors.read().unwrap().share_since(&first);
                if share > 0.02 || Instant::now() > until {
                    break share;
                }
            };
            over.store(true, Ordering::Relaxed);
            assert!(share > 0.02 && share < 1.1, "{share}");
        });
        let until = Instant::now() + Duration::from_secs(30);
        while Processors::of(std::process::id()).is_ok() {
            assert!(Instant::now() < until, "the thread has ended, and is found");
        }
    }
}
