//! Which accelerator this host offers, found by trying.
//!
//! A /dev/kvm that opens is no proof: under some hypervisors it cannot run Linux, and a guest dies
//! or crawls in it. So a tiny guest (`probe_guest.s`) does under QEMU and KVM what every Linux
//! does, with a deadline. The verdict holds for one boot of one kernel with one QEMU, and is kept
//! in a file.

use super::{kept, process, sys};
use crate::driver::{Accelerator, DriverError};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Firmware and guest take 0.1 s where KVM works; an emulated one would take 13 s.
const LIMIT: Duration = Duration::from_secs(5);
const DEVICE: &str = "/dev/kvm";
/// What isa-debug-exit makes of the value 0x2a that the guest writes at its end.
const SUCCESS: i32 = 0x2a << 1 | 1;
/// Where the guest is loaded and entered.
const ENTRY: u64 = 0x10_0000;

/// Which accelerator, and why.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Verdict {
    /// The accelerator.
    pub accelerator: Accelerator,
    /// A sentence for people.
    pub reason: String,
    /// Group that a machine's user needs for [`Accelerator::Kvm`], if it is not everybody's.
    pub device_group: Option<u32>,
}

/// What a verdict depends on.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Key {
    kernel: String,
    boot: String,
    qemu: String,
    own_users: bool,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Cached {
    key: Key,
    verdict: Verdict,
}

/// The verdict for this host: from the file if it was made under the same kernel, boot and QEMU,
/// else by trying. `own_users`: machines run as users of their own, which need access to KVM.
pub(super) fn verdict(
    qemu: &Path,
    version: &str,
    state_dir: &Path,
    own_users: bool,
) -> Result<Verdict, DriverError> {
    let read = |path: &str| {
        let text = fs::read_to_string(path)
            .map_err(|source| DriverError::Host { operation: format!("reading {path}"), source })?;
        Ok::<_, DriverError>(text.trim().to_owned())
    };
    let key = Key {
        kernel: read("/proc/sys/kernel/osrelease")?,
        boot: read("/proc/sys/kernel/random/boot_id")?,
        qemu: version.to_owned(),
        own_users,
    };
    let path = state_dir.join("kvm-verdict.json");
    if let Some(cached) = kept::read::<Cached>(&path).filter(|cached| cached.key == key) {
        return Ok(cached.verdict);
    }
    let cached = Cached { key, verdict: try_kvm(qemu, own_users)? };
    if let Err(error) = kept::write(&path, &cached) {
        tracing::warn!(file = %path.display(), %error, "the verdict on KVM is not kept");
    }
    Ok(cached.verdict)
}

fn try_kvm(qemu: &Path, own_users: bool) -> Result<Verdict, DriverError> {
    let tcg =
        |reason: String| Verdict { accelerator: Accelerator::Tcg, reason, device_group: None };
    if let Err(error) = fs::File::options().read(true).write(true).open(DEVICE) {
        return Ok(tcg(format!("{DEVICE} cannot be opened: {error}")));
    }
    if let Err(why) = run_probe_guest(qemu, Accelerator::Kvm, LIMIT)? {
        return Ok(tcg(format!("{DEVICE} opens, but a test guest did not live in it: {why}")));
    }
    let device_group = match device_group(own_users) {
        Ok(group) => group,
        Err(why) => return Ok(tcg(format!("a test guest runs in {DEVICE}, but {why}"))),
    };
    let reason = "a test guest runs in it".to_owned();
    Ok(Verdict { accelerator: Accelerator::Kvm, reason, device_group })
}

/// The group that a machine's own user needs to open KVM, if it needs one; the error is a reason
/// why no group would do.
pub(super) fn device_group(own_users: bool) -> Result<Option<u32>, String> {
    if !own_users {
        return Ok(None);
    }
    let metadata = fs::metadata(DEVICE).map_err(|error| format!("{DEVICE}: {error}"))?;
    let mode = metadata.mode();
    if mode & 0o006 == 0o006 {
        return Ok(None);
    }
    if mode & 0o060 == 0o060 && metadata.gid() != 0 {
        return Ok(Some(metadata.gid()));
    }
    Err(format!(
        "machines run as users of their own, which may not open it; give it a group with rights \
         (chgrp kvm {DEVICE}; chmod 660 {DEVICE})"
    ))
}

/// Runs the guest; the inner error is why it did not succeed.
fn run_probe_guest(
    qemu: &Path,
    accelerator: Accelerator,
    limit: Duration,
) -> Result<Result<(), String>, DriverError> {
    let host =
        |source| DriverError::Host { operation: "trying KVM with a test guest".into(), source };
    let directory = tempfile::tempdir().map_err(host)?;
    let (kernel, stderr) = (directory.path().join("kernel"), directory.path().join("stderr"));
    fs::write(&kernel, elf(sys::probe_guest::code())).map_err(host)?;
    let mut command = Command::new(qemu);
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "64"])
        .args(["-M", "microvm,x-option-roms=off", "-cpu", "max", "-sandbox", "on,spawn=deny"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .args(["-accel", &accelerator.to_string(), "-kernel"])
        .arg(&kernel)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&stderr).map_err(host)?);
    let mut child = command.spawn().map_err(host)?;

    let end = Instant::now() + limit;
    let first_error = || process::tail(&stderr, 1 << 16).split("; ").next().map(str::to_owned);
    loop {
        if let Some(status) = child.try_wait().map_err(host)? {
            return Ok(match status.code() {
                Some(SUCCESS) => Ok(()),
                _ => {
                    Err(format!("QEMU ended with {status}: {}", first_error().unwrap_or_default()))
                }
            });
        }
        // QEMU does not end after this; it waits for a debugger.
        let died = first_error().filter(|line| line.contains("KVM internal error"));
        if died.is_some() || Instant::now() >= end {
            child.kill().and_then(|()| child.wait()).map_err(host)?;
            return Ok(Err(died.unwrap_or_else(|| format!("it was not done after {limit:?}"))));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// An ELF kernel for PVH: one segment with `code`, and the note that gives the 32-bit entry.
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: usize = 64 + 2 * 56;
    const NOTE: usize = 12 + 4 + 8;
    let mut out = Vec::with_capacity(HEADERS + NOTE + code.len());
    let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
    // ELF64, little-endian, version 1, System V; executable, x86-64.
    put(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(&[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&ENTRY.to_le_bytes());
    put(&64u64.to_le_bytes()); // program headers
    put(&0u64.to_le_bytes()); // no sections
    put(&0u32.to_le_bytes());
    for half in [64u16, 56, 2, 64, 0, 0] {
        put(&half.to_le_bytes());
    }
    let mut segment = |kind: u32, flags: u32, offset: usize, address: u64, size: usize| {
        put(&kind.to_le_bytes());
        put(&flags.to_le_bytes());
        for word in [offset as u64, address, address, size as u64, size as u64, 4] {
            put(&word.to_le_bytes());
        }
    };
    segment(1, 7, HEADERS + NOTE, ENTRY, code.len()); // PT_LOAD
    segment(4, 4, HEADERS, 0, NOTE); // PT_NOTE
    // XEN_ELFNOTE_PHYS32_ENTRY (18) of "Xen".
    for word in [4u32, 8, 18] {
        put(&word.to_le_bytes());
    }
    put(b"Xen\0");
    put(&ENTRY.to_le_bytes());
    put(code);
    out
}

/// The path of the QEMU program.
pub(super) fn program(binary: &Path) -> Result<PathBuf, DriverError> {
    in_path(binary).ok_or_else(|| DriverError::Unusable {
        what: format!("{} cannot be used: it is not there", binary.display()),
        hint: "install QEMU (apt-get install qemu-system-x86)".into(),
    })
}

fn in_path(binary: &Path) -> Option<PathBuf> {
    if binary.components().count() > 1 {
        return binary.is_file().then(|| binary.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(binary)).find(|path| path.is_file())
}

/// What /proc/cpuinfo says the processor can do, sorted: an upper bound of what a guest sees.
pub(super) fn cpu_features() -> Vec<String> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'));
    let mut features: Vec<String> = flags
        .map(|(_, all)| all.split_ascii_whitespace().map(str::to_owned).collect())
        .unwrap_or_default();
    features.sort_unstable();
    features
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu() -> PathBuf {
        program(Path::new("qemu-system-x86_64")).unwrap()
    }

    #[test]
    fn the_test_guest_succeeds_on_a_processor_that_works() {
        // The translator is one; so a failure under KVM is KVM's.
        run_probe_guest(&qemu(), Accelerator::Tcg, Duration::from_secs(60)).unwrap().unwrap();
    }

    #[test]
    fn a_test_guest_that_hangs_is_given_up_at_the_deadline() {
        let limit = Duration::from_millis(1);
        let why = run_probe_guest(&qemu(), Accelerator::Tcg, limit).unwrap().unwrap_err();
        assert!(why.contains("not done after 1ms"), "{why}");
    }

    #[test]
    fn a_verdict_is_kept_for_the_same_boot_and_qemu_and_made_anew_for_another() {
        let directory = tempfile::tempdir().unwrap();
        let made = verdict(&qemu(), "1.2.3", directory.path(), true).unwrap();
        assert!(!made.reason.is_empty());
        let path = directory.path().join("kvm-verdict.json");
        let mut cached: Cached = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        cached.verdict.reason = "kept".into();
        fs::write(&path, serde_json::to_vec(&cached).unwrap()).unwrap();
        let again = |version| verdict(&qemu(), version, directory.path(), true).unwrap();
        assert_eq!(again("1.2.3").reason, "kept");
        assert_eq!(again("1.2.4"), made);
        fs::write(&path, "{").unwrap();
        assert_eq!(again("1.2.3"), made, "a broken file is made anew");
    }
}
