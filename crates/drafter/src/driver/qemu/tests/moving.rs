//! Pause, save, load, run: from one QEMU into another on the same memory.

use super::{nbd::Disk, rig::*, sys};
use crate::driver::{DiskKind, MachineShape, Urgent, UrgentHelpers, Vm};
use nix::sched::{CloneFlags, unshare};
use std::{
    net::{SocketAddr, TcpStream},
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

const SOON: Duration = Duration::from_secs(30);

/// Runs in a network namespace of its own, which ends with it.
pub(super) fn in_own_network(test: impl FnOnce() + Send) {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            test();
        });
        if let Err(panic) = inside.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Runs `ip` in this thread's namespace.
pub(super) fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

#[derive(Clone, Copy, Default)]
struct Blackout {
    stop: Duration,
    save: Duration,
    load: Duration,
    run: Duration,
}

impl Blackout {
    fn total(&self) -> Duration {
        self.stop + self.save + self.load + self.run
    }
}

impl std::fmt::Display for Blackout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |d: Duration| d.as_secs_f64() * 1000.0;
        write!(
            f,
            "stop {:.2} save {:.2} load {:.2} run {:.2} total {:.2} ms",
            ms(self.stop),
            ms(self.save),
            ms(self.load),
            ms(self.run),
            ms(self.total())
        )
    }
}

fn timed<T>(operation: impl FnOnce() -> T) -> (Duration, T) {
    let begin = Instant::now();
    let result = operation();
    (begin.elapsed(), result)
}

fn hop(from: &mut Machine, to: &mut Machine) -> (Blackout, usize) {
    let _urgent = Urgent::this_thread();
    let (stop, ()) = timed(|| from.vm.pause(&mut || ()).unwrap());
    let (save, state) = timed(|| from.vm.save().unwrap());
    let (load, ()) = timed(|| to.vm.load(&state).unwrap());
    let (run, ()) = timed(|| to.vm.run().unwrap());
    (Blackout { stop, save, load, run }, state.len())
}

#[test]
fn a_machine_with_network_and_disk_hops_ten_times_and_nothing_is_lost() {
    let rig = Rig::new();
    in_own_network(|| {
        let shape = rig.full_shape();
        let path = rig.state.path().join("disk.sock");
        let _disk = Disk::serve(&path, 1 << 20);
        let taps = ["tap-a", "tap-b"].map(|name| sys::tap(name).unwrap());
        let given = |hop: usize| Given { tap: Some(&taps[hop % 2]), disk: Some(&path) };
        let mut machine = rig.boot(&shape, given(0));
        assert_eq!(ask(&machine.vm, "sync"), "sync ok");
        let mut blackouts = vec![];
        let mut counted = count(&machine.vm);
        for number in 1..=10 {
            let (ready, mut place) = timed(|| rig.place_for(&machine, &shape, given(number)));
            let (blackout, bytes) = hop(&mut machine, &mut place);
            machine = place;
            let now = count(&machine.vm);
            assert!(now >= counted, "it counted to {counted} there and to {now} here");
            counted = now;
            assert_eq!(ask(&machine.vm, "check"), "check ok");
            println!("hop {number}: {blackout}, {bytes} bytes; place ready in {ready:.0?}");
            blackouts.push(blackout);
        }
        until(Duration::from_secs(30), "it goes on counting", || count(&machine.vm) > counted);
        assert_eq!(ask(&machine.vm, "sync"), "sync ok");
        blackouts.sort_by_key(Blackout::total);
        let median = blackouts[blackouts.len() / 2];
        println!("median: {median}");
        // Many times what an idle computer needs: a busy one must pass, a wait of a limit must not.
        assert!(median.total() < Duration::from_millis(200), "{median}");
    });
}

#[test]
fn a_vhost_user_disks_rings_rest_from_the_pause_on_and_run_again_here_or_there() {
    let rig = Rig::new();
    let disks = vec!["root".into()];
    let disk_kind = DiskKind::VhostUserBlk;
    let shape = MachineShape { disks, disk_kind, vcpus: 2, ..rig.shape() };
    let path = rig.state.path().join("disk.sock");
    let server = vhost_disk(&path, 1 << 20);
    let given = Given { tap: None, disk: Some(&path) };
    let mut machine = rig.boot(&shape, given);
    let mut blackouts = vec![];
    for number in 0..6 {
        assert_eq!(ask(&machine.vm, "sync"), "sync ok");
        assert!(!machine.vm.state_blocks().unwrap().is_empty());
        assert_eq!(ask(&machine.vm, "sync"), "sync ok", "the question stops no ring");
        assert!(!server.is_at_rest());
        let mut place = rig.place_for(&machine, &shape, given);
        if number % 2 == 1 {
            // A move that is called off after the state was saved.
            machine.vm.pause(&mut || assert!(server.comes_to_rest(SOON))).unwrap();
            machine.vm.save().unwrap();
            assert!(server.comes_to_rest(SOON), "saving starts nothing");
            assert!(!machine.vm.state_blocks().unwrap().is_empty(), "also while it stands still");
            machine.vm.run().unwrap();
            assert_eq!(ask(&machine.vm, "sync"), "sync ok", "it goes on here");
        }
        let (blackout, bytes) = hop(&mut machine, &mut place);
        let (rings, ()) =
            timed(|| until(Duration::from_secs(10), "a ring runs", || !server.is_at_rest()));
        machine = place;
        assert_eq!(ask(&machine.vm, "check"), "check ok");
        println!("hop {number}: {blackout}, {bytes} bytes; rings {rings:?} later");
        blackouts.push(blackout);
    }
    assert_eq!(ask(&machine.vm, "sync"), "sync ok");
    blackouts.sort_by_key(Blackout::total);
    println!("median: {}", blackouts[blackouts.len() / 2]);
    machine.vm.kill().unwrap();
    server.stop(Duration::from_secs(5)).unwrap();
}

/// Programs that compute, each in a session of its own, more of them than processors.
struct Load(Vec<std::process::Child>);

impl Load {
    fn new() -> Self {
        let processors = thread::available_parallelism().unwrap().get();
        let spin = || Command::new("setsid").args(["sh", "-c", "while :; do :; done"]).spawn();
        Self((0..2 * processors).map(|_| spin().unwrap()).collect())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

#[test]
fn pausing_and_running_are_quick_on_a_host_whose_processors_are_all_taken() {
    let rig = Rig::new();
    let mut machine = rig.boot(&rig.shape(), Given::default());
    quick_under_load(&mut machine);
}

#[test]
fn so_they_are_with_a_vhost_user_disk_whose_server_has_to_answer() {
    let rig = Rig::new();
    let disks = vec!["root".into()];
    let shape = MachineShape { disks, disk_kind: DiskKind::VhostUserBlk, ..rig.shape() };
    let path = rig.state.path().join("disk.sock");
    let _server = vhost_disk(&path, 1 << 20);
    let mut machine = rig.boot(&shape, Given { tap: None, disk: Some(&path) });
    assert_eq!(ask(&machine.vm, "sync"), "sync ok");
    quick_under_load(&mut machine);
}

fn quick_under_load(machine: &mut Machine) {
    let helpers = UrgentHelpers::named("silo-vhost");
    let load = Load::new();
    // Others than this load may take the processors too, in some of the tries.
    let quick = (0..4).any(|_| is_quick(machine, &helpers));
    drop(load);
    assert!(quick, "in none of four tries");
}

/// Whether nine of ten pauses are over long before a turn of somebody else would be.
fn is_quick(machine: &mut Machine, helpers: &UrgentHelpers) -> bool {
    let mut rounds = vec![];
    for round in 0..150 {
        let first = helpers.go_first();
        let urgent = Urgent::this_thread();
        let (stop, ()) = timed(|| machine.vm.pause(&mut || ()).unwrap());
        let (run, ()) = timed(|| machine.vm.run().unwrap());
        drop(urgent);
        drop(first);
        rounds.push(stop + run);
        thread::sleep(Duration::from_millis(5 + round % 10));
    }
    rounds.sort_unstable();
    let part = |percent: usize| rounds[rounds.len() * percent / 100];
    println!("p50 {:?} p90 {:?} p99 {:?} max {:?}", part(50), part(90), part(99), rounds[149]);
    part(90) < Duration::from_millis(4)
}

#[test]
fn after_an_aborted_move_the_machine_goes_on_here_and_can_be_saved_again() {
    let rig = Rig::new();
    let shape = rig.shape();
    let mut machine = rig.boot(&shape, Given::default());
    for _ in 0..3 {
        let before = count(&machine.vm);
        machine.vm.pause(&mut || ()).unwrap();
        let state = machine.vm.save().unwrap();
        assert!(machine.vm.save().unwrap() == state, "asked again, the same state");
        machine.vm.pause(&mut || ()).unwrap();
        machine.vm.run().unwrap();
        until(Duration::from_secs(30), "it goes on", || count(&machine.vm) > before);
    }
    let mut place = rig.place_for(&machine, &shape, Given::default());
    hop(&mut machine, &mut place);
    assert_eq!(ask(&place.vm, "check"), "check ok");
}

#[test]
fn frames_of_the_guest_are_held_and_go_out_on_release() {
    let rig = Rig::new();
    in_own_network(|| {
        let shape = rig.full_shape();
        let path = rig.state.path().join("disk.sock");
        let _disk = Disk::serve(&path, 1 << 20);
        let tap = sys::tap("tap-a").unwrap();
        ip("addr add 10.77.0.1/24 dev tap-a");
        ip("link set tap-a up");
        let mut machine = rig.boot(&shape, Given { tap: Some(&tap), disk: Some(&path) });
        // Nobody listens in the guest: its kernel's refusal is the answer.
        let guest = SocketAddr::from((GUEST, 9));
        let answered = move |limit| {
            let result = TcpStream::connect_timeout(&guest, limit);
            result.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
        };
        assert!(answered(Duration::from_secs(30)), "the guest's network should work");

        machine.vm.hold_output(true).unwrap();
        let (send, answers) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(move || send.send((answered(Duration::from_secs(20)), Instant::now())));
            answers.recv_timeout(Duration::from_millis(600)).unwrap_err();
            let released = Instant::now();
            machine.vm.hold_output(false).unwrap();
            let (answered, at) = answers.recv_timeout(Duration::from_secs(25)).unwrap();
            assert!(answered && at > released);
            println!("answered {:?} after the release", at - released);
        });
        assert!(answered(Duration::from_secs(30)), "later frames go");
    });
}

#[test]
fn under_output_commit_a_frame_goes_when_the_instant_after_it_is_released_and_not_with_an_earlier_one()
 {
    let rig = Rig::new();
    in_own_network(|| {
        let shape = rig.full_shape();
        let path = rig.state.path().join("disk.sock");
        let _disk = Disk::serve(&path, 1 << 20);
        let tap = sys::tap("tap-a").unwrap();
        ip("addr add 10.77.0.1/24 dev tap-a");
        ip("link set tap-a up");
        let mut machine = rig.boot(&shape, Given { tap: Some(&tap), disk: Some(&path) });
        let guest = SocketAddr::from((GUEST, 9));
        let answered = move |limit| {
            let result = TcpStream::connect_timeout(&guest, limit);
            result.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
        };
        assert!(answered(Duration::from_secs(30)), "the guest's network should work");
        let vm: &mut dyn Vm = &mut machine.vm;
        let instant = |vm: &mut dyn Vm| {
            vm.pause(&mut || ()).unwrap();
            vm.seal_output().unwrap();
            vm.run().unwrap();
        };
        vm.commit_output(true).unwrap();
        vm.commit_output(true).unwrap();
        thread::scope(|scope| {
            let silent = Duration::from_secs(1);
            let ask = || {
                let (send, answers) = mpsc::channel();
                scope.spawn(move || send.send(answered(Duration::from_secs(20))));
                answers
            };
            let first = ask();
            first.recv_timeout(silent).unwrap_err();
            vm.release_sealed().unwrap();
            first.recv_timeout(silent).unwrap_err();
            instant(vm);
            first.recv_timeout(silent).unwrap_err();
            // Of after that instant: it does not go with it.
            let second = ask();
            second.recv_timeout(silent).unwrap_err();
            vm.release_sealed().unwrap();
            assert!(first.recv_timeout(Duration::from_secs(25)).unwrap());
            second.recv_timeout(silent).unwrap_err();
            instant(vm);
            vm.release_sealed().unwrap();
            assert!(second.recv_timeout(Duration::from_secs(25)).unwrap());
            let third = ask();
            third.recv_timeout(silent).unwrap_err();
            vm.commit_output(false).unwrap();
            assert!(third.recv_timeout(Duration::from_secs(25)).unwrap());
        });
        assert!(answered(Duration::from_secs(30)), "later frames go");
    });
}
