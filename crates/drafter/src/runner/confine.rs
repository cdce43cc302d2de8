//! What a runner gives up before it does anything: it is root, and needs little of that.
//!
//! - Capabilities: those of `packaging/drafter@.service` stay (`docs/security.md` says what each is for), also
//!   where nobody started it by that unit. What it starts has no more.
//! - System calls: those that load code into the kernel, end or change the host, or look into other processes
//!   by other ways than a runner's own, are refused with EPERM, by seccomp, for all of its threads and all that
//!   they start.
//!
//! Its monitor gives up the rest (`driver::qemu::confine`). A host that does not allow one of the two runs its
//! machines all the same; the log says so.

use caps::{CapSet, Capability, CapsHashSet};
use seccompiler::{SeccompAction, SeccompFilter, TargetArch};
use std::collections::BTreeMap;

/// What a runner may do as root.
const KEPT: [Capability; 16] = [
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    Capability::CAP_SETPCAP,
    Capability::CAP_CHOWN,
    Capability::CAP_FOWNER,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_KILL,
    Capability::CAP_SYS_NICE,
    Capability::CAP_SYS_RESOURCE,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_RAW,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_BPF,
];

/// What neither a runner nor anything that it starts ever asks the kernel for. Numbers of the architecture
/// that this is built for.
const REFUSED: &[libc::c_long] = &[
    // Code in the kernel, and another kernel.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    libc::SYS_kexec_file_load,
    // The host as a whole.
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    // Other processes, files and keys, past what shows them to it.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_perf_event_open,
    libc::SYS_open_by_handle_at,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
];

/// Gives up what a runner does not need, for good. Before its first thread.
pub(super) fn confine() {
    if let Err(why) = drop_capabilities() {
        tracing::warn!("this runner keeps capabilities that it does not need: {why}");
    }
    if let Err(why) = refuse_system_calls() {
        tracing::warn!("this runner may ask the kernel for anything: {why}");
    }
}

fn drop_capabilities() -> Result<(), caps::errors::CapsError> {
    let kept = CapsHashSet::from(KEPT);
    let has = |set| caps::read(None, set);
    let less = |set: &CapsHashSet| set.intersection(&kept).copied().collect::<CapsHashSet>();
    // Only who may set capabilities can make the bounding set smaller; who may not has few to lose.
    if has(CapSet::Effective)?.contains(&Capability::CAP_SETPCAP) {
        for one in has(CapSet::Bounding)?.difference(&kept) {
            caps::drop(None, CapSet::Bounding, *one)?;
        }
    }
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &less(&has(set)?))?;
    }
    Ok(())
}

fn refuse_system_calls() -> Result<(), String> {
    let rules: BTreeMap<i64, _> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| error.to_string())?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, arch);
    let program = filter.and_then(TryInto::try_into).map_err(|error| error.to_string())?;
    let program: seccompiler::BpfProgram = program;
    seccompiler::apply_filter_all_threads(&program).map_err(|error| error.to_string())
}
