//! Ends the machine.

use super::Init;
use crate::{log::say, sys};
use nix::{
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        signal::{Signal, kill},
    },
    unistd::{Pid, sync},
};
use std::time::{Duration, Instant};

/// How long leftover processes have between SIGTERM and SIGKILL.
const LEFTOVER_LIMIT: Duration = Duration::from_secs(1);

/// Ends the entry point, then everything else, writes all data to the disks, powers off.
pub(super) fn off(init: &mut Init, why: &str) -> ! {
    say!("{why}; powering off");
    init.stop_entry();
    for (signal, limit) in [(Signal::SIGTERM, LEFTOVER_LIMIT), (Signal::SIGKILL, LEFTOVER_LIMIT)] {
        // -1: everybody but process 1. Fails when nobody is left.
        if kill(Pid::from_raw(-1), signal).is_err() {
            break;
        }
        let deadline = Instant::now() + limit;
        while has_children() && Instant::now() < deadline {
            while sys::reap().is_some() {}
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    sync();
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    if let Err(error) = mount(None::<&str>, "/", None::<&str>, read_only, None::<&str>) {
        // Everything is synced; the journal settles the rest at the next boot.
        say!("the root stays writable: {error}");
    }
    now()
}

fn has_children() -> bool {
    use nix::{
        errno::Errno,
        sys::wait::{Id, WaitPidFlag, waitid},
    };
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    waitid(Id::All, flags) != Err(Errno::ECHILD)
}

/// Ends the machine at once, in order: its monitor sees a power-off.
fn now() -> ! {
    end([RebootMode::RB_POWER_OFF, RebootMode::RB_AUTOBOOT])
}

/// Ends a machine that could not start: its monitor, which runs with `-no-reboot`, sees a reset, so
/// that the host can tell this from an orderly end.
pub(super) fn fail() -> ! {
    end([RebootMode::RB_AUTOBOOT, RebootMode::RB_POWER_OFF])
}

/// Tries the ways to end the machine, again and again: nothing else is left to do.
fn end(ways: [RebootMode; 2]) -> ! {
    sync();
    loop {
        for mode in ways {
            let Err(error) = reboot(mode);
            say!("{mode:?}: {error}");
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}
