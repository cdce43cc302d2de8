//! Disks that fail on this host, as on a full file system: the runner says so in the machine's
//! status and has the requests tried again until they succeed. The guest sees a slow disk.
//!
//! An NBD disk's failure stops the machine, and running it tries the request again. A vhost-user
//! disk's server holds the request, and only what waits for it stands still.

use super::{Inner, Runner, hosted::Hosted};
use crate::driver::VmEvent;
use std::time::{Duration, Instant};

/// How often a disk request that failed is tried again.
const DISK_RETRY: Duration = Duration::from_secs(1);

/// What is being done about it.
#[derive(Default)]
pub(super) struct DiskWatch {
    /// The machine stands still; when to run it again.
    stopped: Option<Instant>,
    /// Requests are held; when to try them again.
    held: Option<Instant>,
}

impl Runner {
    /// Notes that a disk request has failed, and that it no longer does. True if it is time to run
    /// a machine again that stands still because of one; the guest has seen nothing.
    pub(super) fn look_at_disks(&self, inner: &mut Inner, watch: &mut DiskWatch) -> bool {
        let events = inner.body.as_mut().map(|body| body.vm().events()).unwrap_or_default();
        for event in events {
            match event {
                VmEvent::DiskError { disk, operation, detail } => {
                    watch.stopped.get_or_insert_with(|| Instant::now() + DISK_RETRY);
                    self.say(inner, "it stands still", &operation, &disk, &detail);
                }
                VmEvent::Stopped | VmEvent::Resumed | VmEvent::Ending => {}
            }
        }
        self.look_at_held_requests(inner, watch);
        if watch.stopped.is_some_and(|at| Instant::now() >= at) {
            watch.stopped = None;
            return true;
        }
        false
    }

    fn look_at_held_requests(&self, inner: &mut Inner, watch: &mut DiskWatch) {
        let Some(body) = &inner.body else { return };
        match (body.disk_trouble(), watch.held) {
            (None, None) => {}
            (None, Some(_)) => {
                watch.held = None;
                inner.detail.clear();
            }
            (Some(_), Some(at)) if Instant::now() >= at => {
                body.retry_disks();
                watch.held = Some(Instant::now() + DISK_RETRY);
            }
            (Some(trouble), held) => {
                watch.held = held.or_else(|| Some(Instant::now() + DISK_RETRY));
                let (operation, disk) = (&trouble.operation, &trouble.disk);
                self.say(inner, "its disk stands still", operation, disk, &trouble.detail);
            }
        }
    }

    fn say(&self, inner: &mut Inner, what: &str, operation: &str, disk: &str, detail: &str) {
        let text = format!(
            "{what}: a {operation} of disk \"{disk}\" failed on this host ({detail}); make room or \
             mend it, it is tried again every {DISK_RETRY:?}"
        );
        if inner.detail != text {
            tracing::error!(machine = %self.name.as_str(), "{text}");
            inner.detail = text;
        }
    }

    /// Has a monitor that takes the servers of its disks for those before them say everything anew.
    pub(super) fn rejoin_disks(&self, body: Option<Box<Hosted>>) {
        let Some(mut body) = body else { return };
        let done = body.rejoin_disks();
        let mut inner = self.lock();
        inner.body = Some(body);
        if let Err(error) = done {
            inner.detail = format!("its disks stand still: {error}; it is tried again");
            tracing::error!(machine = %self.name.as_str(), %error, "its disks stand still");
        }
    }

    /// Lets a machine go on that stood still because of a disk. If the disk fails again, an event
    /// says so; if its monitor does not take the command, it is asked again.
    pub(super) fn try_again(&self, body: Option<Box<Hosted>>, watch: &mut DiskWatch) {
        let Some(mut body) = body else { return };
        let went = body.vm().run();
        let mut inner = self.lock();
        inner.body = Some(body);
        inner.detail = match went {
            Ok(()) => String::new(),
            Err(error) => {
                watch.stopped = Some(Instant::now() + DISK_RETRY);
                tracing::error!(machine = %self.name.as_str(), %error, "it cannot go on");
                format!(
                    "it stands still after a disk failed, and its monitor does not let it go on \
                     ({error}); it is asked again every {DISK_RETRY:?}"
                )
            }
        };
    }
}
