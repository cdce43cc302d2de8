//! What machines run on: QEMU, KVM, and the time stamp counter.

use super::{Finding, State, command, sys};
use std::{
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

const QEMU: &str = "qemu-system-x86_64";
const LIMIT: Duration = Duration::from_secs(20);

/// `7.2.22` of `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`.
pub(super) fn parse_version(text: &str) -> Option<&str> {
    let after = text.lines().next()?.split("version ").nth(1)?;
    let version = after.split(|c: char| !(c.is_ascii_digit() || c == '.')).next()?;
    version.starts_with(|c: char| c.is_ascii_digit()).then_some(version)
}

pub(super) fn qemu(_: &Path) -> Finding {
    const INSTALL: &str = "install QEMU 7.2 or newer (Debian: qemu-system-x86)";
    let text = match command::run(QEMU, &["--version"], LIMIT) {
        Ok(text) => text,
        Err(error) => return Finding::missing(error, INSTALL),
    };
    let Some(version) = parse_version(&text) else {
        return Finding::missing(format!("it calls itself {text:?}"), INSTALL);
    };
    let lists = |option: &str, word: &str| {
        command::run(QEMU, &[option, "help"], LIMIT)
            .is_ok_and(|list| list.split_whitespace().any(|found| found == word))
    };
    if !lists("-M", "microvm") {
        return Finding::missing(format!("{version}, without the machine type microvm"), INSTALL);
    }
    if !lists("-object", "filter-buffer") {
        return Finding::missing(format!("{version}, without the object filter-buffer"), INSTALL);
    }
    let found = format!("{version}, with microvm and filter-buffer");
    if version.starts_with("7.2.") {
        Finding::ok(found)
    } else {
        Finding::limited(found, "tested with 7.2; both hosts of a move need the same version")
    }
}

/// The flags of the first processor in /proc/cpuinfo.
pub(super) fn flags(cpuinfo: &str) -> Vec<&str> {
    let line = cpuinfo.lines().find(|line| line.starts_with("flags"));
    line.and_then(|line| line.split(':').nth(1)).unwrap_or("").split_whitespace().collect()
}

fn cpuinfo() -> String {
    std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()
}

pub(super) fn kvm(_: &Path) -> Finding {
    let absent = "QEMU's translator runs machines instead: every feature, a fraction of the speed";
    match sys::kvm_api() {
        Ok(12) => {}
        Ok(version) => {
            return Finding::missing(format!("API version {version} is unknown"), absent);
        }
        Err(error) => return Finding::missing(format!("/dev/kvm: {error}"), absent),
    }
    let cpuinfo = cpuinfo();
    let flags = flags(&cpuinfo);
    match ["vmx", "svm"].into_iter().find(|flag| flags.contains(flag)) {
        Some(flag) => Finding::ok(format!("/dev/kvm on {flag}; tried at a machine's first boot")),
        None => Finding {
            state: State::Missing,
            detail: "/dev/kvm is there, but the processor shows neither VMX nor SVM (a PVM host): \
                     a stock kernel dies in it"
                .into(),
            hint: Some(absent.into()),
        },
    }
}

/// Rate in kHz over `span`, against the clock that nobody adjusts.
fn tsc_khz(span: Duration) -> f64 {
    // Instant is CLOCK_MONOTONIC, which NTP may slew by 500 ppm at most: enough for a verdict.
    let (ticks, started) = (sys::tsc(), Instant::now());
    sleep(span);
    let (later, elapsed) = (sys::tsc(), started.elapsed());
    later.wrapping_sub(ticks) as f64 / elapsed.as_secs_f64() / 1e3
}

pub(super) fn tsc(_: &Path) -> Finding {
    let cpuinfo = cpuinfo();
    let flags = flags(&cpuinfo);
    let rates: Vec<f64> = (0..3).map(|_| tsc_khz(Duration::from_millis(50))).collect();
    let mut sorted = rates.clone();
    sorted.sort_by(f64::total_cmp);
    let (low, rate, high) = (sorted[0], sorted[1], sorted[2]);
    let spread = (high - low) / rate * 1e6;
    let constant = flags.contains(&"constant_tsc") && flags.contains(&"nonstop_tsc");
    let found = format!("{:.3} MHz ± {:.0} ppm", rate / 1e3, spread / 2.0);
    if !constant {
        return Finding::limited(
            format!("{found}, not marked constant"),
            "the clock of machines may drift on this processor",
        );
    }
    if spread > 2000.0 {
        return Finding::limited(
            format!("{found}: readings disagree"),
            "this host is very busy, or its clock is not steady; try again when it is quiet",
        );
    }
    Finding::ok(format!("{found}, constant"))
}
