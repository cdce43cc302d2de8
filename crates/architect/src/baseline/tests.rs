use super::*;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

type Answer = (&'static str, Result<Value, String>);

/// Plays a script: each command has its answer, in order.
struct Script(Arc<Mutex<VecDeque<Answer>>>);

impl Monitor for Script {
    fn call(&mut self, command: &str, _: Value, _: Duration) -> Result<Value, String> {
        let mut script = self.0.lock().unwrap();
        let (expected, answer) =
            script.pop_front().unwrap_or_else(|| panic!("unscripted {command}"));
        assert_eq!(command, expected);
        answer
    }
}

fn guest() -> Guest {
    Guest {
        kernel: "/boot/vmlinux".into(),
        initramfs: "/boot/initramfs".into(),
        command_line: "console=ttyS0 quiet".into(),
        memory_mib: 256,
        vcpus: 2,
        accelerator: "tcg".into(),
    }
}

/// A machine whose process is harmless and whose monitor plays a script.
fn machine(script: Vec<Answer>) -> (Machine, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let side = Side {
        name: "a".into(),
        namespace: None,
        folder: folder.path().into(),
        // QEMU lists its devices and ends.
        arguments: vec!["-device".into(), "help".into()],
    };
    let process = Process::start(&guest(), &side, 0, &[]).unwrap();
    let monitor = Box::new(Script(Arc::new(Mutex::new(script.into()))));
    (Machine { guest: guest(), process, monitor, generation: 0 }, folder)
}

fn status(word: &str) -> Result<Value, String> {
    Ok(
        json!({"status": word, "total-time": 9, "ram": {"transferred": 4096}, "error-desc": "broken pipe"}),
    )
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

#[test]
fn a_migration_that_fails_is_told_in_qemus_words() {
    let (mut machine, _folder) =
        machine(vec![("query-migrate", status("active")), ("query-migrate", status("failed"))]);
    let end = machine.follow(Mode::PreCopyDefault, soon()).unwrap();
    assert_eq!(end.note.as_deref(), Some("QEMU: broken pipe"));
}

#[test]
fn a_migration_that_does_not_converge_is_cancelled_and_waited_for() {
    let (mut machine, _folder) = machine(vec![
        ("query-migrate", status("active")),
        ("migrate_cancel", Ok(json!({}))),
        ("query-migrate", status("cancelling")),
        ("query-migrate", status("cancelled")),
    ]);
    let end = machine.follow(Mode::PreCopyDefault, Instant::now()).unwrap();
    assert_eq!(end.note.as_deref(), Some("did not converge before its deadline"));
    assert_eq!(end.status["ram"]["transferred"], 4096);
}

#[test]
fn post_copy_begins_after_its_time_once() {
    let (mut machine, _folder) = machine(vec![
        ("query-migrate", status("setup")),
        ("query-migrate", status("active")),
        ("migrate-start-postcopy", Ok(json!({}))),
        ("query-migrate", status("postcopy-active")),
        ("query-migrate", status("completed")),
    ]);
    let mode = Mode::PostCopy { pre_copy_ms: 0, bandwidth_mib: 100 };
    assert!(machine.follow(mode, soon()).unwrap().note.is_none());
}

#[test]
fn figures_that_qemu_has_not_added_up_yet_are_waited_for() {
    let early = || json!({"status": "completed", "total-time": 0});
    let (mut machine, _folder) =
        machine(vec![("query-migrate", Ok(early())), ("query-migrate", status("completed"))]);
    assert_eq!(machine.figures(early()).unwrap()["total-time"], 9);
}

#[test]
fn an_error_names_side_command_and_answer() {
    let (mut machine, _folder) = machine(vec![("query-migrate", Err("no answer".into()))]);
    let error = machine.follow(Mode::PreCopyDefault, soon()).err().unwrap().to_string();
    assert!(
        error.starts_with("baseline: query-migrate on a: no answer; QEMU's last words"),
        "{error}"
    );
}

#[test]
fn a_namespace_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let side = Side {
        name: "b".into(),
        namespace: Some("/run/netns/no-such".into()),
        folder: folder.path().into(),
        arguments: vec![],
    };
    let connect: Connect<'_> = &|_, _| Err("not reached".into());
    let error = Machine::boot(&guest(), &side, connect).err().unwrap().to_string();
    assert!(error.contains("starting QEMU on b: namespace /run/netns/no-such"), "{error}");
}

#[test]
fn the_command_line_is_that_of_the_machines_measured_and_the_sides_own_arguments_come_last() {
    let side = Side {
        name: "a".into(),
        namespace: None,
        folder: "/run/x".into(),
        arguments: vec!["-netdev".into(), "tap,id=n0".into()],
    };
    let words = process::arguments(&guest(), Path::new("/run/x/s"), Path::new("/run/x/c"), &side);
    let line = words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    assert_eq!(
        line,
        "-accel tcg -nodefaults -no-user-config -no-reboot -display none -cpu max -smp 2 -m 256 \
         -M microvm,x-option-roms=off,isa-serial=on,rtc=on,pcie=on -kernel /boot/vmlinux \
         -initrd /boot/initramfs -append console=ttyS0 quiet -serial file:/run/x/c \
         -qmp unix:/run/x/s,server=on,wait=off -netdev tap,id=n0"
    );
}

#[test]
fn modes_set_what_they_are_named_after_and_undo_what_others_set() {
    let parameters = Mode::PRE_COPY_TUNED.parameters();
    assert_eq!(parameters["downtime-limit"], 50);
    assert_eq!(parameters["max-bandwidth"], 4_194_304_000_u64);
    let default = Mode::PreCopyDefault.parameters();
    assert_eq!(
        (&default["downtime-limit"], &default["max-bandwidth"]),
        (&json!(300), &json!(134_217_728))
    );
    assert_eq!(default["tls-creds"], "");
    let multifd = Mode::Multifd { channels: 4, downtime_limit_ms: 300, bandwidth_mib: 1 };
    assert_eq!(multifd.parameters()["multifd-channels"], 4);
    let on = |mode: Mode| {
        let capabilities = mode.capabilities()["capabilities"].as_array().unwrap().clone();
        assert_eq!(capabilities.len(), 2, "each is set, on or off");
        let on = capabilities.into_iter().filter(|capability| capability["state"] == true);
        on.map(|capability| capability["capability"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(on(multifd), ["multifd"]);
    assert_eq!(on(Mode::PostCopy { pre_copy_ms: 1, bandwidth_mib: 1 }), ["postcopy-ram"]);
    assert!(on(Mode::PreCopyDefault).is_empty());
}
