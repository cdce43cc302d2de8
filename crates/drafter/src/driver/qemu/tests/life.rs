//! Ends, disk errors, events, and a runner that dies.

use super::{nbd::Disk, rig::*};
use crate::driver::{DiskKind, Driver, DriverError, Exit, Start, Vm, VmEvent};
use nix::sys::signal::{Signal, kill};
use silo::expose::vhost::{VhostOptions, VhostServer};
use std::{
    process::{Command, Stdio},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

const SOON: Duration = Duration::from_secs(30);

fn ends(machine: &mut Machine) -> Exit {
    until(SOON, "the machine ends", || machine.vm.exit().is_some());
    machine.vm.exit().unwrap()
}

#[test]
fn each_end_has_its_own_reason() {
    let rig = Rig::new();
    let shape = rig.shape();
    for (said, expected) in
        [("poweroff", Exit::Shutdown), ("reboot", Exit::Reset), ("crash", Exit::Reset)]
    {
        let mut machine = rig.boot(&shape, Given::default());
        assert_eq!(machine.vm.exit(), None);
        let _answer = say(&machine.vm, said);
        assert_eq!(ends(&mut machine), expected, "after {said}");
    }

    let mut machine = rig.boot(&shape, Given::default());
    kill(nix::unistd::Pid::from_raw(machine.vm.pid() as i32), Signal::SIGKILL).unwrap();
    let exit = ends(&mut machine);
    assert!(matches!(&exit, Exit::Failed { detail } if detail.contains("SIGKILL")), "{exit:?}");
    let error = machine.vm.pause(&mut || ()).unwrap_err();
    assert!(matches!(error, DriverError::Gone { .. }), "{error}");

    let mut machine = rig.boot(&shape, Given::default());
    machine.vm.kill().unwrap();
    assert_eq!(machine.vm.exit(), Some(Exit::Shutdown));
}

#[test]
fn another_thread_freezes_and_kills_a_machine_through_its_fence() {
    let rig = Rig::new();
    let mut machine = rig.boot(&rig.shape(), Given::default());
    let fence = machine.vm.fence();
    std::thread::spawn(move || {
        fence.freeze().unwrap();
        fence.kill().unwrap();
    })
    .join()
    .unwrap();
    assert_eq!(ends(&mut machine), Exit::Shutdown);
}

#[test]
fn a_frozen_machine_stands_still_and_goes_on() {
    let rig = Rig::new();
    let mut machine = rig.boot(&rig.shape(), Given::default());
    let before = count(&machine.vm);
    machine.vm.freeze().unwrap();
    let ticks = |pid| {
        let stat = proc_file(pid, "stat");
        let fields: Vec<u64> = stat
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|n| n.parse().unwrap())
            .collect();
        fields[0] + fields[1]
    };
    let used = ticks(machine.vm.pid());
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(ticks(machine.vm.pid()), used, "a frozen process uses no processor");
    machine.vm.thaw().unwrap();
    assert!(count(&machine.vm) >= before);
}

#[test]
fn a_failed_write_stops_the_machine_and_run_tries_it_again() {
    let rig = Rig::new();
    let shape = crate::driver::MachineShape { disks: vec!["root".into()], ..rig.shape() };
    let path = rig.state.path().join("disk.sock");
    let disk = Disk::serve(&path, 1 << 20);
    let mut machine = rig.boot(&shape, Given { disk: Some(&path), tap: None });
    machine.vm.events();

    disk.failing.store(true, Ordering::SeqCst);
    let mut answer = say(&machine.vm, "sync");
    let mut seen = vec![];
    until(SOON, "the machine stops", || {
        seen.extend(machine.vm.events());
        seen.contains(&VmEvent::Stopped)
    });
    let error = seen.iter().find_map(|event| match event {
        VmEvent::DiskError { disk, operation, detail } => Some((disk, operation, detail)),
        _ => None,
    });
    let (name, operation, detail) = error.unwrap_or_else(|| panic!("{seen:?}"));
    assert_eq!((name.as_str(), operation.as_str()), ("root", "write"));
    assert!(detail.contains("Input/output"), "{detail}");

    disk.failing.store(false, Ordering::SeqCst);
    machine.vm.run().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut answer, &mut line).unwrap();
    assert_eq!(line.trim(), "sync ok", "the guest never saw the error");
}

#[test]
fn pausing_tells_that_the_processors_stopped_before_the_disk_is_flushed() {
    let rig = Rig::new();
    let shape = crate::driver::MachineShape { disks: vec!["root".into()], ..rig.shape() };
    let path = rig.state.path().join("disk.sock");
    let disk = Disk::serve(&path, 1 << 20);
    let mut machine = rig.boot(&shape, Given { disk: Some(&path), tap: None });
    assert_eq!(ask(&machine.vm, "sync"), "sync ok");

    disk.flush_takes.store(1500, Ordering::SeqCst);
    let begin = Instant::now();
    let mut stopped = None;
    machine.vm.pause(&mut || stopped = Some(begin.elapsed())).unwrap();
    let (stopped, paused) = (stopped.unwrap(), begin.elapsed());
    assert!(paused >= Duration::from_millis(1500), "the flush is waited for: {paused:?}");
    assert!(stopped + Duration::from_millis(200) < paused, "told {stopped:?}, paused {paused:?}");
    assert!(disk.flushes.load(Ordering::SeqCst) > 0);
}

#[test]
fn pausing_waits_for_what_a_vhost_user_disk_has_in_hand_and_its_rings_rest_after_that() {
    let rig = Rig::new();
    let disks = vec!["root".into()];
    let disk_kind = DiskKind::VhostUserBlk;
    let shape = crate::driver::MachineShape { disks, disk_kind, ..rig.shape() };
    let path = rig.state.path().join("disk.sock");
    let disk = Gated::new(1 << 20);
    let server = VhostServer::start(&path, disk.clone(), VhostOptions::default()).unwrap();
    let mut machine = rig.boot(&shape, Given { disk: Some(&path), tap: None });
    assert_eq!(ask(&machine.vm, "sync"), "sync ok");
    for _ in 0..3 {
        // It may still be listened to, which nobody waits for.
        until(SOON, "nobody waits for the server", || server.is_answering());
        disk.shut(true);
        let mut answer = say(&machine.vm, "sync");
        until(SOON, "a flush is in hand", || disk.waiting.load(Ordering::SeqCst) > 0);
        std::thread::scope(|scope| {
            let opening = scope.spawn(|| {
                // The front end waits for us: its pause has come as far as the ring.
                until(SOON, "the pause waits for the flush", || !server.is_answering());
                assert!(!server.is_at_rest());
                disk.shut(false);
            });
            machine.vm.pause(&mut || assert!(server.comes_to_rest(SOON))).unwrap();
            opening.join().unwrap();
        });
        assert!(server.comes_to_rest(SOON));
        until(SOON, "nobody waits for the server", || server.is_answering());
        machine.vm.run().unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut answer, &mut line).unwrap();
        assert_eq!(line.trim(), "sync ok", "what was in hand was done before the pause");
    }
}

#[test]
fn hop_check_20_what_does_not_fit_the_machines_phase_is_refused_and_harms_nothing() {
    let rig = Rig::new();
    let shape = rig.shape();
    let mut machine = rig.boot(&shape, Given::default());
    let words = |result: Result<(), DriverError>| result.unwrap_err().to_string();
    assert!(words(machine.vm.save().map(|_| ())).contains("it must be paused"));
    assert!(words(machine.vm.load(b"x")).contains("started empty"));
    assert!(words(machine.vm.prepare_load()).contains("started empty"));
    let mut empty = rig.place_for(&machine, &shape, Given::default());
    assert!(words(empty.vm.run()).contains("booted or loaded"));
    assert!(words(empty.vm.pause(&mut || ())).contains("running"));
    assert_eq!(ask(&machine.vm, "ping 1"), "pong 1");

    let error = empty.vm.load(b"this is not a state").unwrap_err();
    assert!(matches!(error, DriverError::Gone { .. } | DriverError::Refused { .. }), "{error}");
    println!("{error}");
}

/// Not a test: the runner of the next one, which dies without a word.
#[test]
#[ignore = "started by another test, in a process of its own"]
fn a_runner_that_dies() {
    let directory = std::env::var_os("DRAFTER_TEST_DYING_RUNNER").expect("run by the other test");
    let directory = std::path::PathBuf::from(directory);
    let rig = Rig::inside(tempfile::tempdir_in(&directory).unwrap(), |_| ());
    let shape = rig.shape();
    let memory = memory(shape.memory_bytes);
    let run_dir = directory.join("run");
    let mut vm = rig.try_start(&shape, &memory, &run_dir, Start::Boot, Given::default()).unwrap();
    vm.run().unwrap();
    wait_for_guest(&vm);
    kill(nix::unistd::getpid(), Signal::SIGKILL).unwrap();
}

#[test]
fn a_machine_outlives_its_runner_and_is_taken_over_with_its_memory() {
    let rig = Rig::new();
    let directory = tempfile::tempdir().unwrap();
    let run_dir = directory.path().join("run");
    std::fs::create_dir(&run_dir).unwrap();
    let runner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "driver::qemu::tests::life::a_runner_that_dies", "--ignored"])
        .env("DRAFTER_TEST_DYING_RUNNER", directory.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let signal = std::os::unix::process::ExitStatusExt::signal(&runner.status);
    assert_eq!(signal, Some(libc::SIGKILL), "{}", String::from_utf8_lossy(&runner.stdout));

    let mut vm = rig.driver.take_over(&run_dir).unwrap().expect("it should still be there");
    let before = count(&*vm);
    assert_eq!(ask(&*vm, "check"), "check ok");
    // Its memory's userfaultfd works: it can be put to use, which only an unused one can.
    let memory = vm.memory().unwrap();
    super::sys::register_missing(&memory).unwrap();
    // The shim's copy stays open, and nobody would answer a guest that touches a fresh page.
    super::sys::unregister(&memory).unwrap();
    drop(memory);
    vm.pause(&mut || ()).unwrap();
    let state = vm.save().unwrap();
    assert!(!state.is_empty());
    vm.run().unwrap();
    assert!(count(&*vm) >= before);

    // A frozen machine is not set free by taking it over.
    drop(vm);
    let fence = rig.driver.fence(&run_dir).unwrap().expect("it is there");
    fence.freeze().unwrap();
    let error = rig.driver.take_over(&run_dir).err().expect("it is frozen").to_string();
    assert!(error.contains("frozen") && error.contains("fence"), "{error}");
    fence.thaw().unwrap();
    let vm = rig.driver.take_over(&run_dir).unwrap().expect("it still runs");

    // A second heir, before and after the machine's end. QEMU talks to one at a time.
    drop(vm);
    let mut vm = rig.driver.take_over(&run_dir).unwrap().expect("it still runs");
    vm.kill().unwrap();
    assert_eq!(vm.exit(), Some(Exit::Shutdown));
    assert!(rig.driver.take_over(&run_dir).unwrap().is_none());
}

#[test]
fn hop_check_25_what_a_dead_qemu_left_is_cleaned_up_by_the_next_runner() {
    let rig = Rig::new();
    let machine = rig.boot(&rig.shape(), Given::default());
    let membership = proc_file(machine.vm.pid(), "cgroup");
    let name = membership.split(['/', '\n']).find(|part| part.starts_with("drafter-redis-1-"));
    let name = name.expect("it has a control group").to_owned();
    let groups = || {
        let found = Command::new("find").args(["/sys/fs/cgroup", "-name", &name]).output().unwrap();
        String::from_utf8_lossy(&found.stdout).lines().count()
    };
    assert!(groups() > 0);
    kill(nix::unistd::Pid::from_raw(machine.vm.pid() as i32), Signal::SIGKILL).unwrap();
    until(SOON, "it is gone", || rig.driver.take_over(machine.dir.path()).unwrap().is_none());
    assert_eq!(groups(), 0);
    assert!(!machine.dir.path().join("qmp.sock").exists());
}
