//! Going first on a busy host, and letting others go first.
//!
//! A blackout is a chain of short steps in several threads of two processes. On a host whose
//! processors are all taken, each step waits for its turn, and where threads are scheduled by group
//! (a session, a service) one turn was seen to take 50 to 280 ms. So for the few milliseconds of a
//! switchover its threads go before everything that merely computes.

use std::{io, marker::PhantomData};

/// The calling thread goes first until this is dropped. Needs root or CAP_SYS_NICE; without, it
/// changes nothing. For the threads of a switchover, and for milliseconds: whoever goes first and
/// computes starves the host.
#[must_use = "the thread goes first only as long as this lives"]
pub struct Urgent {
    thread: Option<u32>,
    // Must be dropped by the thread that it is about.
    _here: PhantomData<*const ()>,
}

impl Urgent {
    /// Lets the calling thread go first.
    pub fn this_thread() -> Self {
        let thread = nix::unistd::gettid().as_raw().cast_unsigned();
        let thread = sys::set_class(thread, Class::First).is_ok().then_some(thread);
        Self { thread, _here: PhantomData }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if let Some(thread) = self.thread {
            let _ = sys::set_class(thread, Class::Usual);
        }
    }
}

/// The `nice` of a thread that gives way: where a processor is fought for, it gets a tenth of what one
/// with 0 does (`sched_prio_to_weight` in the kernel: 110 of 1024).
const PATIENT: i32 = 10;

/// The calling thread, and those that it starts, let others go first from here on, for good: for long
/// work that nobody waits for.
pub fn give_way() {
    let thread = nix::unistd::gettid().as_raw().cast_unsigned();
    if let Err(error) = sys::set_nice(thread, PATIENT) {
        tracing::debug!(%error, "this thread is like all others");
    }
}

/// Threads of this process that answer the monitor during a switchover, as the servers of its disks
/// do: they go first for as long as somebody holds what [`UrgentHelpers::go_first`] gives.
#[derive(Debug, Default)]
pub struct UrgentHelpers(Vec<u32>);

impl UrgentHelpers {
    /// Those whose names begin with `prefix`. Looking for them takes a while: not in a blackout.
    #[must_use]
    pub fn named(prefix: &str) -> Self {
        let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let is_meant = |thread: &u32| {
            let name = std::fs::read_to_string(format!("/proc/self/task/{thread}/comm"));
            // One that ended meanwhile has no name.
            name.is_ok_and(|name| name.starts_with(prefix))
        };
        let threads = tasks.filter_map(|task| task.file_name().to_str()?.parse().ok());
        Self(threads.filter(is_meant).collect())
    }

    /// Lets those that still live go first.
    #[must_use = "they go first only as long as this lives"]
    pub fn go_first(&self) -> HelpersFirst {
        // The number of a thread that ended may be another process's by now.
        let ours = |thread: &&u32| {
            std::path::Path::new("/proc/self/task").join(thread.to_string()).exists()
        };
        let raised = |thread: &&u32| sys::set_class(**thread, Class::First).is_ok();
        HelpersFirst(self.0.iter().filter(ours).filter(raised).copied().collect())
    }
}

/// See [`UrgentHelpers::go_first`].
#[derive(Debug)]
pub struct HelpersFirst(Vec<u32>);

impl Drop for HelpersFirst {
    fn drop(&mut self) {
        for thread in &self.0 {
            // One that ended meanwhile needs nothing.
            let _ = sys::set_class(*thread, Class::Usual);
        }
    }
}

/// How a thread is scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// As most are.
    Usual,
    /// Before those, but after [`Class::First`]: for threads that compute until they are stopped.
    Second,
    /// Before all of these.
    First,
}

/// Sets the class of one thread of any process.
pub(super) fn set_class(thread: u32, class: Class) -> io::Result<()> {
    sys::set_class(thread, class)
}

mod sys {
    use super::Class;
    use std::io;

    pub(super) fn set_class(thread: u32, class: Class) -> io::Result<()> {
        let (policy, priority) = match class {
            Class::Usual => (libc::SCHED_OTHER, 0),
            Class::Second => (libc::SCHED_RR, 1),
            Class::First => (libc::SCHED_RR, 2),
        };
        let parameters = libc::sched_param { sched_priority: priority };
        // SAFETY: the pointer is to a valid structure on this frame.
        let done = unsafe {
            libc::sched_setscheduler(thread.cast_signed(), policy, &raw const parameters)
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    pub(super) fn set_nice(thread: u32, nice: i32) -> io::Result<()> {
        // SAFETY: the call takes numbers; Linux applies it to one thread (setpriority(2), "BUGS").
        let done = unsafe { libc::setpriority(libc::PRIO_PROCESS, thread, nice) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> String {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        stat.rsplit_once(')').unwrap().1.split_whitespace().nth(38).unwrap().to_owned()
    }

    #[test]
    fn a_thread_is_urgent_as_long_as_it_says() {
        assert_eq!(policy(), "0");
        let urgent = Urgent::this_thread();
        assert_eq!(policy(), libc::SCHED_RR.to_string());
        drop(urgent);
        assert_eq!(policy(), "0");
    }

    #[test]
    fn a_thread_that_gives_way_has_those_that_it_starts_do_so_too() {
        let nice = || {
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            stat.rsplit_once(')').unwrap().1.split_whitespace().nth(16).unwrap().to_owned()
        };
        let before = nice();
        let patient = std::thread::spawn(move || {
            give_way();
            (nice(), std::thread::spawn(nice).join().unwrap())
        });
        assert_eq!(patient.join().unwrap(), ("10".to_owned(), "10".to_owned()));
        assert_eq!(nice(), before, "and nobody else");
    }

    #[test]
    fn helpers_are_urgent_as_long_as_somebody_says_and_only_those_of_the_name() {
        let (ask, asked) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let work = move || {
            for () in asked {
                tell.send(policy()).unwrap();
            }
        };
        let helper = std::thread::Builder::new().name("helper-of-test".into()).spawn(work).unwrap();
        let its_policy = || {
            ask.send(()).unwrap();
            told.recv().unwrap()
        };
        assert_eq!(its_policy(), "0");
        let helpers = UrgentHelpers::named("helper-of");
        let first = helpers.go_first();
        assert_eq!((its_policy(), policy()), (libc::SCHED_RR.to_string(), "0".to_owned()));
        drop(first);
        assert_eq!(its_policy(), "0");
        drop(ask);
        helper.join().unwrap();
        assert!(helpers.go_first().0.is_empty(), "it has ended");
    }
}
