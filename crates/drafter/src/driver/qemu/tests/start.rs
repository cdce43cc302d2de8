//! Starting: what a machine's QEMU is allowed, and what is left when it does not start.

use super::{nbd::Disk, rig::*};
use crate::driver::{Driver, DriverError, Start, Vm, qemu::memory_map};
use serde_json::json;
use std::{fs, path::Path, time::Duration};

fn line<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in {text}"))
}

#[test]
fn hop_check_32_a_machines_qemu_has_its_own_user_its_own_limits_and_no_way_to_more() {
    let rig = Rig::new();
    let shape = rig.shape();
    let a = rig.boot(&shape, Given::default());
    let b = rig.boot(&shape, Given::default());
    assert_eq!(ask(&a.vm, "ping 17"), "pong 17");

    let mut users = vec![];
    for machine in [&a, &b] {
        let status = proc_file(machine.vm.pid(), "status");
        let ids: Vec<&str> = line(&status, "Uid:").split_whitespace().collect();
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        let user: u32 = ids[0].parse().unwrap();
        assert!((64_512..=65_500).contains(&user), "{user}");
        assert_eq!(line(&status, "Gid:").split_whitespace().next(), Some(ids[0]));
        assert_eq!(line(&status, "Groups:").trim(), ids[0], "no other groups");
        assert_eq!(line(&status, "CapEff:").trim(), "0000000000000000");
        assert_eq!(line(&status, "NoNewPrivs:").trim(), "1");
        assert_eq!(line(&status, "Seccomp:").trim(), "2", "QEMU's sandbox is on");
        let environment = proc_file(machine.vm.pid(), "environ");
        assert!(!environment.contains("HOME="), "{environment}");
        users.push(user);
    }
    assert_ne!(users[0], users[1]);

    let membership = proc_file(a.vm.pid(), "cgroup");
    let names: Vec<&str> = membership.lines().filter(|l| l.contains("drafter-redis-1-")).collect();
    assert!(!names.is_empty(), "{membership}");
    let expected = (256 << 20) + (256 << 20) + (256 << 20);
    let limits: Vec<u64> = ["memory/memory.limit_in_bytes", "memory.max", "unified/memory.max"]
        .iter()
        .flat_map(|file| {
            let (folder, file) = file.rsplit_once('/').unwrap_or(("", file));
            names.iter().map(move |name| {
                let group = name.splitn(3, ':').nth(2).unwrap().trim_start_matches('/');
                Path::new("/sys/fs/cgroup").join(folder).join(group).join(file)
            })
        })
        .filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok())
        .collect();
    assert!(limits.contains(&expected), "{limits:?}");
}

/// What a machine could leave behind on a host.
fn left_behind(rig: &Rig, run_dir: &Path) -> Vec<String> {
    let names = |path: &Path| -> Vec<String> {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    };
    let mut left = names(&rig.state.path().join("users"));
    left.extend(names(run_dir));
    left.retain(|name| name != "lock" && !name.ends_with(".log"));
    left
}

#[test]
fn a_machine_that_does_not_start_leaves_nothing_and_says_why() {
    let rig = Rig::new();
    let mut shape = rig.shape();
    shape.disks = vec!["root".into()];
    let run_dir = tempfile::tempdir().unwrap();
    let memory = memory(shape.memory_bytes);
    let nobody = rig.state.path().join("nobody.sock");
    drop(std::os::unix::net::UnixListener::bind(&nobody).unwrap());
    let given = Given { disk: Some(&nobody), tap: None };
    let start = |given| rig.try_start(&shape, &memory, run_dir.path(), Start::Boot, given);
    let error = start(given).err().expect("nobody listens at the disk's socket");
    assert!(
        matches!(&error, DriverError::Gone { detail, .. } if detail.contains("refused")),
        "{error}"
    );
    assert_eq!(left_behind(&rig, run_dir.path()), Vec::<String>::new());

    // The same place works once the disk is there.
    fs::remove_file(&nobody).unwrap();
    let _disk = Disk::serve(&nobody, 1 << 20);
    let mut vm = start(given).unwrap();
    let second = start(given).err().expect("one QEMU per run directory").to_string();
    assert!(second.contains("still uses"), "{second}");
    vm.kill().unwrap();
    vm.kill().unwrap();
    assert_eq!(left_behind(&rig, run_dir.path()), Vec::<String>::new());
    assert!(rig.driver.take_over(run_dir.path()).unwrap().is_none());
}

#[test]
fn a_guest_is_not_booted_with_another_processors_clock() {
    let rig = Rig::new();
    let (mut shape, run_dir) = (rig.shape(), tempfile::tempdir().unwrap());
    shape.tsc_khz *= 2;
    let memory = memory(shape.memory_bytes);
    let result = rig.try_start(&shape, &memory, run_dir.path(), Start::Boot, Given::default());
    let error = result.err().expect("its clock would run wrong").to_string();
    assert!(error.contains("kHz") && error.contains("facts"), "{error}");
}

#[test]
fn memory_of_another_size_than_the_shape_is_refused() {
    let rig = Rig::new();
    let run_dir = tempfile::tempdir().unwrap();
    let wrong = memory(1 << 20);
    let result = rig.try_start(&rig.shape(), &wrong, run_dir.path(), Start::Boot, Given::default());
    let error = result.err().expect("1 MiB is not 256").to_string();
    assert!(error.contains("1048576") && error.contains("268435456"), "{error}");
}

#[test]
fn a_preload_hook_that_cannot_be_loaded_is_a_clear_error() {
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("broken.so");
    fs::write(&broken, "not a library").unwrap();
    let rig = Rig::with(|config| config.shim = Some(broken));
    let (shape, run_dir) = (rig.shape(), tempfile::tempdir().unwrap());
    let memory = memory(shape.memory_bytes);
    let result = rig.try_start(&shape, &memory, run_dir.path(), Start::Boot, Given::default());
    let error = result.err().expect("a text file is no library").to_string();
    assert!(error.contains("hook could not be loaded"), "{error}");
    assert_eq!(left_behind(&rig, run_dir.path()), Vec::<String>::new());
}

#[test]
fn the_address_map_is_that_of_the_installed_qemu() {
    let rig = Rig::new();
    for mib in [256, 1024, 3072, 4096, 8192] {
        let mut shape = rig.shape();
        shape.memory_bytes = mib << 20;
        let memory = memory(shape.memory_bytes);
        let mut machine = rig.start(&shape, memory, Start::Boot, Given::default());
        let text = machine.vm.monitor("info mtree -f");
        let view = text.split("FlatView").find(|view| view.contains("AS \"memory\"")).unwrap();
        // "  0000000100000000-000000013fffffff (prio 0, ram): ram0 @00000000c0000000 KVM"
        let mut covered = 0;
        for line in view.lines().filter(|line| line.contains("): ram0")) {
            let (range, rest) = line.trim().split_once(' ').unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
            let (start, end) = (hex(start), hex(end));
            let offset = rest.split_once('@').map_or(0, |(_, o)| hex(&o[..16]));
            for (address, at) in [(start, offset), (end, offset + end - start)] {
                let found = memory_map::offset_of(address, shape.memory_bytes);
                assert_eq!(found, Some(at), "{mib} MiB, address {address:#x}");
            }
            covered += end - start + 1;
        }
        // The firmware's ROM covers a little of the first MiB.
        let uncovered = shape.memory_bytes - covered;
        assert!(uncovered <= 256 << 10, "{mib} MiB: {uncovered} bytes are nowhere\n{view}");
        let handle = machine.vm.memory().unwrap();
        assert_eq!(handle.length, shape.memory_bytes);
    }
}

impl super::super::vm::QemuVm {
    /// The answer of QEMU's human monitor.
    fn monitor(&mut self, command: &str) -> String {
        let arguments = json!({ "command-line": command });
        let answer = self.qmp().call("human-monitor-command", arguments, Duration::from_secs(10));
        answer.unwrap().as_str().unwrap().to_owned()
    }
}

#[test]
fn the_facts_of_this_host_name_a_version_and_a_reason() {
    let rig = Rig::new();
    let facts = rig.driver.facts().unwrap();
    assert!(facts.driver.starts_with("qemu ") && facts.driver.contains('.'), "{facts:?}");
    let verdict = rig.driver.verdict().unwrap();
    assert_eq!(verdict.accelerator, facts.accelerator);
    println!("{}: {}", verdict.accelerator, verdict.reason);
}
