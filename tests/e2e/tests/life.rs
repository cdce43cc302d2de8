//! A machine's life apart from moves, by the commands that a person types: run, look, suspend,
//! resume, crash, take over, stop, remove.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use drafter::{migrate::messages::Mode, runner::state::process_start};
use e2e::{
    Stage,
    busy::sh,
    command::{Said, say},
    eventually,
    moves::{budgets, go},
    program,
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const QUICK: Duration = Duration::from_secs(20);

/// `drafter --json WORDS` on a host.
#[track_caller]
fn on(stage: &Stage, host: usize, words: &[&str]) -> Said {
    say(stage.drafter(host).arg("--json").args(words), Duration::from_secs(60))
}

/// Starts a runner in the background, as a person does: `run`, `resume`, with further words.
#[track_caller]
fn begin(stage: &Stage, host: usize, words: &[&str]) -> Said {
    let name = &stage.fleet.rig().hosts()[host].name;
    let mut command = stage.drafter(host);
    command.args(words).arg("--package").arg(stage.package());
    command.args(["--host", name, "--plaintext", "--detach", "--lease"]).arg(stage.leases());
    say(&mut command, Duration::from_secs(120))
}

/// The guest's answer to a command, once it has booted.
#[track_caller]
fn guest(stage: &Stage, host: usize, argv: &[&str]) -> String {
    let mut answer = String::new();
    eventually("the guest answers", e2e::BOOT, || {
        let words = [&["exec", "redis", "--"], argv].concat();
        let said = on(stage, host, &words);
        if said.code != Some(0) {
            return false;
        }
        answer = said.json()["stdout"].as_str().unwrap_or_default().trim().to_owned();
        true
    });
    answer
}

/// The row of the machine in `drafter list`.
#[track_caller]
fn row(stage: &Stage, host: usize) -> serde_json::Value {
    let rows = on(stage, host, &["list"]).json();
    let row = rows.as_array().unwrap().iter().find(|r| r["machine"] == "redis").cloned();
    row.unwrap_or_else(|| panic!("\"redis\" is not listed: {rows}"))
}

fn pid(row: &serde_json::Value, which: &str) -> u32 {
    row[which].as_u64().unwrap_or_else(|| panic!("no {which}: {row}")) as u32
}

/// Kills processes the hard way and waits until they are gone.
#[track_caller]
fn kill_hard(pids: &[u32]) {
    for pid in pids {
        kill(Pid::from_raw(*pid as i32), Signal::SIGKILL).unwrap();
    }
    eventually("the killed are gone", QUICK, || pids.iter().all(|p| process_start(*p).is_none()));
}

/// All threads of a runner are without the capabilities and system calls that none of them needs.
#[track_caller]
fn gives_up_what_it_does_not_need(runner: u32) {
    // Those of /usr/include/linux/capability.h: modules, clocks, raw devices, restarts, the kernel's log, audit.
    let given_up = [16, 17, 22, 25, 27, 29, 30, 34];
    let tasks = fs::read_dir(format!("/proc/{runner}/task")).unwrap();
    for task in tasks {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let says = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} {status}")).trim().to_owned()
        };
        for set in ["CapEff:", "CapPrm:", "CapBnd:", "CapInh:"] {
            let has = u64::from_str_radix(&says(set), 16).unwrap();
            let kept = given_up.iter().filter(|one| has >> **one & 1 == 1).collect::<Vec<_>>();
            assert!(kept.is_empty(), "{set} {kept:?}");
        }
        // A filter, and no way to more.
        assert_eq!((says("Seccomp:"), says("NoNewPrivs:")), ("2".into(), "1".into()));
    }
}

#[test]
fn hop_check_33_a_machine_lives_by_the_commands_alone() {
    let Some(stage) = Stage::open() else { return };
    begin(&stage, 0, &["run", "redis", "--memory-mib", "192"]).succeeds();
    assert_eq!(guest(&stage, 0, &["redis-cli", "set", "k", "v"]), "OK");

    let listed = row(&stage, 0);
    assert_eq!((&listed["state"], &listed["lease_owner"]), (&"running".into(), &"a".into()));
    let status = on(&stage, 0, &["status", "redis"]).json();
    assert_eq!((&status["state"], &status["epoch"]), (&"running".into(), &1.into()));
    assert_eq!(status["monitor_pid"], listed["monitor_pid"]);
    let inspected = on(&stage, 0, &["inspect", "redis"]).json();
    assert_eq!(inspected["machine"]["shape"]["memory_bytes"], 192 << 20);
    assert!(on(&stage, 0, &["console", "redis"]).out.to_lowercase().contains("redis"));

    gives_up_what_it_does_not_need(pid(&listed, "runner_pid"));

    // An exit code comes through, and so does what was said.
    let said = on(
        &stage,
        0,
        &["exec", "redis", "--", "/bin/dash", "-c", "echo out; echo err >&2; exit 7"],
    );
    assert_eq!(said.code, Some(7), "{said:?}");
    let json: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((&json["stdout"], &json["stderr"]), (&"out\n".into(), &"err\n".into()));

    // What cannot be done says why.
    begin(&stage, 0, &["run", "redis"]).fails_with(&["has a runner on this host already"]);
    begin(&stage, 1, &["run", "redis"]).fails_with(&["host \"a\" owns it"]);
    on(&stage, 0, &["remove", "redis"]).fails_with(&["stop it first"]);
    on(&stage, 0, &["status", "nobody"]).fails_with(&["drafter list"]);
    on(&stage, 0, &["status", "../x"]).fails_with(&["cannot name a machine"]);

    on(&stage, 0, &["stop", "redis"]).succeeds();
    assert_eq!(row(&stage, 0)["state"], "stopped");
    let monitor = pid(&listed, "monitor_pid");
    assert!(process_start(monitor).is_none(), "a stopped machine leaves no monitor");
    on(&stage, 0, &["remove", "redis"]).succeeds();
    assert_eq!(on(&stage, 0, &["list"]).json(), serde_json::json!([]));
    on(&stage, 0, &["remove", "redis"]).fails_with(&["nothing of a machine"]);

    for shell in ["bash", "zsh", "fish"] {
        let said = say(Command::new(program("drafter")).args(["completions", shell]), QUICK);
        said.succeeds();
        assert!(said.out.contains("migrate"), "{shell}");
    }
}

#[test]
fn hop_check_29_a_suspended_machine_goes_on_at_another_host_with_its_data_and_the_right_time() {
    let Some(stage) = Stage::open() else { return };
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("saved").display().to_string();
    begin(&stage, 0, &["run", "redis"]).succeeds();
    assert_eq!(guest(&stage, 0, &["redis-cli", "set", "k", "kept"]), "OK");
    guest(&stage, 0, &["/bin/dash", "-c", "echo on disk > /var/lib/note; sync"]);
    let boot = guest(&stage, 0, &["cat", "/proc/sys/kernel/random/boot_id"]);
    on(&stage, 0, &["suspend", "redis", "--to", &saved]).succeeds();
    // Whoever gives the next command finds nothing of it in the way.
    assert_eq!(row(&stage, 0)["state"], "stopped");
    std::thread::sleep(Duration::from_secs(4));

    begin(&stage, 1, &["resume", "redis", "--from", &saved]).succeeds();
    assert_eq!(guest(&stage, 1, &["redis-cli", "get", "k"]), "kept");
    assert_eq!(guest(&stage, 1, &["cat", "/var/lib/note"]), "on disk");
    assert_eq!(guest(&stage, 1, &["cat", "/proc/sys/kernel/random/boot_id"]), boot);
    eventually("the guest's clock is right", QUICK, || {
        let there: f64 = guest(&stage, 1, &["date", "+%s.%N"]).parse().unwrap();
        let here = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        (here - there).abs() < 1.5
    });
    assert_eq!(row(&stage, 1)["lease_owner"], "b");

    // The directory is not a way to have the machine twice.
    begin(&stage, 0, &["resume", "redis", "--from", &saved]).fails_with(&["host \"b\" owns it"]);
    // Nor is one that was changed a machine.
    on(&stage, 1, &["stop", "redis", "--grace-s", "0"]).succeeds();
    let memory = Path::new(&saved).join("memory");
    let mut bytes = fs::read(&memory).unwrap();
    bytes[1 << 20] ^= 1;
    fs::write(&memory, bytes).unwrap();
    begin(&stage, 1, &["resume", "redis", "--from", &saved]).fails_with(&["changed or damaged"]);
}

#[test]
fn after_a_crash_of_its_host_a_machine_starts_again_from_its_disks() {
    let Some(stage) = Stage::open() else { return };
    begin(&stage, 0, &["run", "redis"]).succeeds();
    guest(
        &stage,
        0,
        &["dd", "if=/dev/zero", "of=/var/lib/synced", "bs=64k", "count=16", "conv=fsync"],
    );
    guest(
        &stage,
        0,
        &["/bin/dash", "-c", "echo kept > /var/lib/note; sync /var/lib/note /var/lib"],
    );
    let listed = row(&stage, 0);
    kill_hard(&[pid(&listed, "runner_pid"), pid(&listed, "monitor_pid")]);
    assert_eq!(row(&stage, 0)["state"], "crashed");
    on(&stage, 0, &["status", "redis"]).fails_with(&["drafter list"]);
    on(&stage, 0, &["inspect", "redis"]).succeeds();

    begin(&stage, 0, &["run", "redis", "--keep-disks"]).succeeds();
    assert_eq!(guest(&stage, 0, &["cat", "/var/lib/note"]), "kept");
    assert_eq!(guest(&stage, 0, &["stat", "-c", "%s", "/var/lib/synced"]), "1048576");
    assert_eq!(row(&stage, 0)["epoch"], 2, "a new start is a new epoch");
}

#[test]
fn hop_check_36_a_machine_without_its_runner_is_listed_taken_over_moved_and_stopped() {
    let Some(mut stage) = Stage::open() else { return };
    let spec = stage.plain_spec("redis");
    let (a, b) = stage.pair(&spec);
    sh(stage.fleet.runner(a), "redis-cli set k kept");
    stage.fleet.runner_mut(a).kill();
    let orphan = row(&stage, 0);
    assert_eq!(orphan["state"], "orphaned", "{orphan}");
    let monitor = pid(&orphan, "monitor_pid");
    on(&stage, 0, &["remove", "redis"]).fails_with(&["stop it first"]);

    let package = stage.package().display().to_string();
    let words = ["run", "redis", "--take-over", "--package", &package].map(str::to_owned);
    let a = stage.fleet.start(0, &spec, words.to_vec()).unwrap();
    assert_eq!(stage.fleet.runner(a).status().unwrap().monitor_pid, Some(monitor));
    assert_eq!(sh(stage.fleet.runner(a), "redis-cli get k").trim(), "kept");
    go(&stage.fleet, a, b, Mode::Hybrid, budgets());
    assert_eq!(sh(stage.fleet.runner(b), "redis-cli get k").trim(), "kept");

    stage.fleet.runner_mut(b).kill();
    let orphan = row(&stage, 1);
    assert_eq!(orphan["state"], "orphaned", "{orphan}");
    on(&stage, 1, &["stop", "redis"]).succeeds();
    assert!(process_start(pid(&orphan, "monitor_pid")).is_none(), "the monitor still runs");
    assert_ne!(row(&stage, 1)["state"], "orphaned");
}

/// A small file system; unmounted when dropped.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path, size: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        let options = format!("size={size},mode=0755");
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).unwrap();
        Self(at.to_owned())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_machine_whose_hosts_disk_is_full_says_so_and_goes_on_when_there_is_room() {
    let Some(stage) = Stage::open() else { return };
    let state = stage.fleet.state_of(0);
    let _small = Small::mount(&state, "48m");
    // Ends before the mount does: the machine's files are on it.
    let mut stage = stage;
    let a = stage.fleet.run(0, &stage.plain_spec("redis")).unwrap();
    stage.fleet.runner(a).wait_ready(e2e::BOOT).unwrap();
    // Somebody else's file takes the room.
    let ballast = state.join("ballast");
    fs::write(&ballast, vec![1; 30 << 20]).unwrap();
    let runner = stage.fleet.runner(a);
    let mut client = runner.client().unwrap();
    let writer = std::thread::spawn(move || {
        client.set_deadline(Some(Duration::from_secs(120))).unwrap();
        let argv = ["dd", "if=/dev/urandom", "of=/var/lib/big", "bs=1M", "count=24", "conv=fsync"];
        client.call(
            &drafter::runner::api::Request::Exec {
                argv: argv.map(str::to_owned).to_vec(),
                env: std::collections::BTreeMap::new(),
                timeout_s: 110,
            },
            |_| {},
        )
    });
    let mut said = String::new();
    eventually("the machine's status tells that the disk is full", Duration::from_secs(60), || {
        let status = stage.fleet.runner(a).status().unwrap();
        assert_ne!(status.state, "failed", "{}", status.detail);
        said = format!("{}: {}", status.state, status.detail);
        status.detail.contains("No space") || status.detail.contains("full")
    });
    eprintln!("{said}");
    assert!(!writer.is_finished(), "the guest was told of an error instead of being stopped");

    // Room again: nothing was lost, and the writer never knew.
    fs::remove_file(&ballast).unwrap();
    let value = writer.join().unwrap().unwrap();
    assert_eq!(value["exit_code"], 0, "{value}");
    assert_eq!(sh(stage.fleet.runner(a), "stat -c %s /var/lib/big").trim(), "25165824");
}
