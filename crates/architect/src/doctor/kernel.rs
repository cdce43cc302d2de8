//! The kernel: its version, and the calls by which memory moves.

use super::{Finding, sys};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::{path::Path, time::Duration};

const NEWER: &str = "Linux 6.7 or newer has it (Debian: the backports kernel)";

/// Major and minor of a release like `6.1.0-56-cloud-amd64`.
pub(super) fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

pub(super) fn version(_: &Path) -> Finding {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let text = format!("Linux {release}");
    match parse_release(&release) {
        Some(version) if version >= (6, 7) => Finding::ok(text),
        Some(version) if version >= (5, 11) => Finding::limited(
            text,
            "exact tracking needs Linux 6.7; without it moves are post-copy only",
        ),
        _ => Finding::missing(text, NEWER),
    }
}

pub(super) fn userfaultfd(_: &Path) -> Finding {
    match sys::userfaultfd_features() {
        Ok(features) => {
            let (there, absent): (Vec<_>, Vec<_>) =
                sys::FEATURES.iter().partition(|(bit, _)| features & bit != 0);
            let names = |list: Vec<&(u64, &'static str)>| {
                list.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(" ")
            };
            if absent.is_empty() {
                Finding::ok(names(there))
            } else {
                Finding::limited(format!("without {}", names(absent)), NEWER)
            }
        }
        Err(error) => Finding::missing(
            format!("/dev/userfaultfd: {error}"),
            "run as root; the device needs Linux 6.1 with CONFIG_USERFAULTFD",
        ),
    }
}

pub(super) fn tracking(_: &Path) -> Finding {
    match sys::tracks_exactly() {
        Ok(true) => Finding::ok("WP_ASYNC and PAGEMAP_SCAN found exactly the written pages"),
        Ok(false) => Finding::missing(
            "PAGEMAP_SCAN did not report exactly the written pages",
            "this kernel's tracking cannot be trusted; moves are post-copy only",
        ),
        Err(error) => Finding::missing(error.to_string(), NEWER),
    }
}

pub(super) fn faults(_: &Path) -> Finding {
    match sys::serves_a_fault(Duration::from_secs(2)) {
        Ok(waited) => Finding::ok(format!("a fault was served in {} µs", waited.as_micros())),
        Err(error) => Finding::missing(
            error.to_string(),
            "faults are served through /dev/userfaultfd; run as root on Linux 6.1 or newer",
        ),
    }
}

pub(super) fn soft_dirty(_: &Path) -> Finding {
    match sys::soft_dirty_works() {
        Ok(true) => Finding::ok("tells written pages from others"),
        Ok(false) => Finding {
            hint: None,
            ..Finding::missing("not configured (CONFIG_MEM_SOFT_DIRTY); not needed from 6.7 on", "")
        },
        Err(error) => Finding { hint: None, ..Finding::missing(error.to_string(), "") },
    }
}

pub(super) fn memfd(_: &Path) -> Finding {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    match memfd_create(c"architect-doctor", flags) {
        Ok(_) => Finding::ok("can be made and sealed"),
        Err(error) => {
            Finding::missing(error.desc(), "memfd_create is refused; is a seccomp filter in force?")
        }
    }
}
