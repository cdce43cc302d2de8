use super::*;
use crate::doctor::host::Hierarchy;

fn check(name: &str, required: bool, state: State) -> Check {
    Check {
        name: name.into(),
        needed_for: "something".into(),
        required,
        state,
        detail: format!("detail of {name}"),
        hint: (state != State::Ok).then(|| format!("fix {name}")),
    }
}

fn all_well() -> Vec<Check> {
    SUBJECTS.iter().map(|(s, _)| check(s.name, s.required, State::Ok)).collect()
}

#[test]
fn names_are_unique_and_features_need_checks_that_exist() {
    let mut names: Vec<_> = SUBJECTS.iter().map(|(subject, _)| subject.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), SUBJECTS.len());
    for (feature, needs) in FEATURES {
        assert!(!needs.is_empty(), "{feature}");
        for need in needs {
            assert!(names.contains(need), "{feature} needs {need}, which nobody checks");
        }
    }
}

#[test]
fn the_demonstration_needs_what_is_required_and_nothing_else() {
    assert!(Diagnosis::from_checks(all_well()).can_run_demo);
    for index in 0..SUBJECTS.len() {
        let mut checks = all_well();
        checks[index].state = State::Missing;
        let diagnosis = Diagnosis::from_checks(checks);
        assert_eq!(diagnosis.can_run_demo, !SUBJECTS[index].0.required);
        let mut checks = all_well();
        checks[index].state = State::Limited;
        assert!(Diagnosis::from_checks(checks).can_run_demo);
    }
}

#[test]
fn without_exact_tracking_only_post_copy_works_and_the_table_says_why() {
    let mut checks = all_well();
    let tracking = checks.iter_mut().find(|check| check.name == "dirty tracking").unwrap();
    *tracking = check("dirty tracking", false, State::Missing);
    let diagnosis = Diagnosis::from_checks(checks);
    let feature = |name: &str| diagnosis.features.iter().find(|f| f.name == name).unwrap().clone();
    assert_eq!(feature("post-copy moves").state, State::Ok);
    let hybrid = feature("pre-copy and hybrid moves");
    assert_eq!(
        (hybrid.state, hybrid.held_back_by),
        (State::Missing, vec!["dirty tracking".into()])
    );
    let text = diagnosis.render(Style::Plain);
    assert!(text.contains("dirty tracking: fix dirty tracking"), "{text}");
    assert!(text.ends_with("The demonstration can run here.\n"), "{text}");
    assert_eq!(diagnosis.missing(), ["dirty tracking: detail of dirty tracking"]);
}

#[test]
fn the_verdict_names_what_is_lacking() {
    let mut checks = all_well();
    checks[0].state = State::Missing;
    let text = Diagnosis::from_checks(checks).render(Style::Plain);
    assert!(text.ends_with("The demonstration cannot run here: root missing.\n"), "{text}");
}

#[test]
fn a_real_diagnosis_has_every_check_and_survives_json() {
    let diagnosis = diagnose(Path::new("."));
    assert_eq!(diagnosis.checks.len(), SUBJECTS.len());
    assert!(diagnosis.checks.iter().all(|check| !check.detail.is_empty()));
    for check in diagnosis.checks.iter().filter(|check| check.state == State::Missing) {
        missing::note(&check.name, &check.detail);
    }
    let json = serde_json::to_string(&diagnosis).unwrap();
    assert_eq!(serde_json::from_str::<Diagnosis>(&json).unwrap(), diagnosis);
    assert!(json.contains(r#""state":"ok""#), "something works everywhere: {json}");
    let nowhere = host::disk_space(Path::new("/no/such/folder"));
    assert_eq!(nowhere.state, State::Missing);
    let kernel = kernel::parse_release("6.1.0-56-cloud-amd64");
    assert_eq!(kernel, Some((6, 1)));
}

#[test]
fn what_the_kernel_writes_is_read_right_and_nonsense_gives_nothing() {
    assert_eq!(kernel::parse_release("6.18-rc3"), Some((6, 18)));
    assert_eq!(kernel::parse_release("x"), None);
    let qemu = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
    assert_eq!(monitor::parse_version(qemu), Some("7.2.22"));
    assert_eq!(monitor::parse_version("bash: version x"), None);
    assert_eq!(monitor::flags("processor : 0\nflags\t\t: fpu vme\n"), ["fpu", "vme"]);
    assert!(monitor::flags("").is_empty());
    assert_eq!(host::capabilities("Name: x\nCapEff:\t00000000000000ff\n"), 255);
    assert_eq!(host::capabilities("CapEff: nonsense"), 0);
    assert_eq!(host::available("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
    let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
        cgroup /sys/fs/cgroup/freezer cgroup rw,relatime,freezer 0 0\n\
        cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
        cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nnonsense\n";
    assert_eq!(
        host::hierarchies(mounts),
        [
            Hierarchy::V2("/sys/fs/cgroup/unified".into()),
            Hierarchy::FreezerV1("/sys/fs/cgroup/freezer".into())
        ]
    );
}
