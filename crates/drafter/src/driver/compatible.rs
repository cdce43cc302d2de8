//! Whether a machine can go on living on another host: what `prepare` asks before a move.

use super::{Accelerator, HostFacts, MachineShape};

/// How far the TSC of a host may be from the rate the guest's clock was set by. NTP corrects up to
/// 500 parts per million, so a guest that disciplines its clock can absorb it.
const TSC_TOLERANCE_PPM: u64 = 500;

/// Checks that a machine which runs at `source` can run at `dest`. On refusal, every reason, each
/// a sentence.
///
/// Saved state belongs to one version of the monitor, because microvm is not a versioned machine
/// type; and an accelerator's virtual CPU is not the other's.
pub fn compatible(
    source: &HostFacts,
    shape: &MachineShape,
    dest: &HostFacts,
) -> Result<(), Vec<String>> {
    let mut reasons = Vec::new();
    if source.driver != dest.driver {
        reasons.push(format!(
            "the machine's state was made by {} and the destination has {}; install the same \
             version there, or boot the machine there from its disks",
            source.driver, dest.driver
        ));
    }
    if source.accelerator == dest.accelerator {
        match source.accelerator {
            Accelerator::Tcg => {
                reasons.extend(tsc_differs(shape.tsc_khz, dest.tsc_khz, "the destination"));
            }
            Accelerator::Kvm => reasons.extend(features_missing(source, dest)),
        }
    } else {
        reasons.push(format!(
            "the machine runs on {} and the destination offers {}; force the same accelerator on \
             both hosts",
            source.accelerator, dest.accelerator
        ));
    }
    if reasons.is_empty() { Ok(()) } else { Err(reasons) }
}

/// Under TCG the guest reads the host's TSC, at the rate it was told when it booted. (Under KVM
/// the guest's clock is kvmclock, which the host scales.)
pub(super) fn tsc_differs(machine_khz: u64, dest_khz: u64, host: &str) -> Option<String> {
    let ppm =
        u128::from(machine_khz.abs_diff(dest_khz)) * 1_000_000 / u128::from(machine_khz.max(1));
    (ppm > u128::from(TSC_TOLERANCE_PPM)).then(|| {
        format!(
            "the machine's clock counts at {machine_khz} kHz and {host}'s processor at \
             {dest_khz} kHz, {ppm} parts per million apart (at most {TSC_TOLERANCE_PPM}); its clock \
             would run wrong there"
        )
    })
}

fn features_missing(source: &HostFacts, dest: &HostFacts) -> Option<String> {
    let missing: Vec<&str> = source
        .cpu_features
        .iter()
        .filter(|feature| !dest.cpu_features.contains(feature))
        .map(String::as_str)
        .collect();
    (!missing.is_empty()).then(|| {
        format!(
            "the destination's processor lacks features that the machine may use: {}",
            missing.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(accelerator: Accelerator) -> HostFacts {
        HostFacts {
            driver: "qemu 7.2.22".into(),
            accelerator,
            tsc_khz: 2_700_000,
            cpu_features: match accelerator {
                Accelerator::Tcg => vec![],
                Accelerator::Kvm => vec!["avx".into(), "sse4_2".into()],
            },
        }
    }

    fn shape() -> MachineShape {
        MachineShape {
            name: "m".into(),
            machine_type: "microvm".into(),
            vcpus: 1,
            memory_bytes: 256 << 20,
            command_line: String::new(),
            network: None,
            disks: vec![],
            disk_kind: crate::driver::DiskKind::default(),
            tsc_khz: 2_700_000,
        }
    }

    #[test]
    fn equal_hosts_are_compatible() {
        for accelerator in [Accelerator::Tcg, Accelerator::Kvm] {
            assert_eq!(compatible(&facts(accelerator), &shape(), &facts(accelerator)), Ok(()));
        }
    }

    #[test]
    fn a_clock_within_500_ppm_is_accepted_and_one_beyond_is_refused() {
        let mut dest = facts(Accelerator::Tcg);
        dest.tsc_khz = 2_701_350;
        assert_eq!(compatible(&facts(Accelerator::Tcg), &shape(), &dest), Ok(()));
        dest.tsc_khz = 2_702_000;
        let reasons = compatible(&facts(Accelerator::Tcg), &shape(), &dest).unwrap_err();
        assert!(reasons[0].contains("740 parts per million"), "{reasons:?}");
        // What counts is the clock that the machine booted with, not the present host's.
        let mut moved = shape();
        moved.tsc_khz = 2_702_000;
        assert_eq!(compatible(&facts(Accelerator::Tcg), &moved, &dest), Ok(()));
    }

    #[test]
    fn another_version_and_another_accelerator_are_each_named() {
        let mut dest = facts(Accelerator::Kvm);
        dest.driver = "qemu 8.0.0".into();
        let reasons = compatible(&facts(Accelerator::Tcg), &shape(), &dest).unwrap_err();
        assert_eq!(reasons.len(), 2);
        assert!(reasons[0].contains("qemu 7.2.22") && reasons[0].contains("qemu 8.0.0"));
        assert!(reasons[1].contains("tcg") && reasons[1].contains("kvm"));
    }

    #[test]
    fn under_kvm_the_destination_needs_every_feature_and_may_have_more() {
        let mut dest = facts(Accelerator::Kvm);
        dest.cpu_features.push("avx512f".into());
        assert_eq!(compatible(&facts(Accelerator::Kvm), &shape(), &dest), Ok(()));
        let reasons = compatible(&dest, &shape(), &facts(Accelerator::Kvm)).unwrap_err();
        assert!(reasons[0].contains("avx512f"), "{reasons:?}");
    }
}
