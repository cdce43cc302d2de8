//! SIGKILL of processes that upload to a real S3 server, at every moment of their work: before a
//! request takes effect, and after it has and before its answer. Then: the newest generation is one
//! that was committed, exactly; a new process goes on; who was only stopped is fenced; and a
//! collection deletes everything that was left.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{
    Client, LIMIT,
    s3::{LINE, Load, MIB, Rig, is_one_moment, uploader, wait_for},
    silo::Said,
};
use nix::sys::signal::Signal;
use silo_testing::{Fault, Rule};
use std::{
    fs,
    process::{Child, Stdio},
    time::Duration,
};

const GENERATIONS: &str = "silo_backup_generations_total{line=\"acme/vm\"}";

/// The moments of one kind of request: before and after each of the first so many.
fn moments(requests: &[(&'static str, &'static str, u32)]) -> Vec<Rule> {
    let mut all = Vec::new();
    for (method, contains, count) in requests {
        for skip in 0..*count {
            for fault in [Fault::Hangs, Fault::NoAnswer] {
                all.push(Rule { skip, ..Rule::next(method, contains, fault) });
            }
        }
    }
    all
}

fn kill(child: &mut Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_sync_that_is_killed_at_any_request_leaves_the_last_generation_or_makes_its_own_whole() {
    let rig = Rig::new();
    let mut committed = rig.image("image", 0, MIB);
    rig.back_up("image");
    let (mut before, mut made, mut probes) = (0, 0, 0);
    // Probing the store, taking the line, the packs, the commit.
    let requests = [
        ("PUT", "probe/", 5),
        ("POST", "delete", 1),
        ("GET", "collections", 1),
        ("PUT", "packs/", 2),
        ("PUT", "lines/", 2),
    ];
    for (seed, rule) in moments(&requests).into_iter().enumerate() {
        // More than two packs of content that the store does not have.
        let wanted = rig.image("image", 100 + seed as u64, 17 * MIB);
        let (numbers, happened) = (rig.numbers(LINE), rig.server.faults().happened());
        rig.server.faults().add(rule.clone());
        let image = rig.path("image");
        let mut command = rig.command(&["sync", "--once", "--line", LINE, "--file", &image]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let met = rig.server.faults().wait_for_more(happened, LIMIT);
        kill(&mut child);
        assert!(met, "{rule:?} was never met");
        rig.server.faults().clear();

        probes += rig.objects("probe").len();
        let (restored, now) = (rig.restored(LINE, None), rig.numbers(LINE));
        if now == numbers {
            assert!(restored == committed, "{rule:?}: not the last generation");
            before += 1;
        } else {
            assert_eq!(now[1..], numbers, "{rule:?}");
            assert!(restored == wanted, "{rule:?}: not the new generation");
            made += 1;
        }
        // A new process goes on with the same line.
        rig.back_up("image");
        assert!(rig.restored(LINE, None) == wanted, "{rule:?}");
        committed = wanted;
        if seed % 5 == 4 {
            rig.nothing_leaks();
        }
    }
    assert!(before > 0 && made > 0, "{before} before the commit, {made} after");
    assert!(probes > 0, "a probe that was killed leaves an object for the collection");
    rig.nothing_leaks();
    assert!(rig.restored(LINE, None) == committed);
}

#[test]
fn serve_and_sync_that_are_killed_while_they_upload_under_load_leave_one_moment_each() {
    let rig = Rig::new();
    let size = 2 * MIB;
    for by_config in [true, false] {
        for rule in moments(&[("PUT", "packs/", 2), ("PUT", "lines/", 2)]) {
            fs::write(rig.at("image"), vec![0; size]).unwrap();
            rig.back_up("image");
            let numbers = rig.numbers(LINE);
            let running = uploader(&rig, by_config);
            let address = running.ready["metrics"].as_str().unwrap().to_owned();
            wait_for(&address, GENERATIONS, 1.0);
            let happened = rig.server.faults().happened();
            rig.server.faults().add(rule.clone());
            let load = Load::start(&rig.at("sock"), size);
            let met = rig.server.faults().wait_for_more(happened, LIMIT);
            running.signal(Signal::SIGKILL);
            rig.check(&running.wait());
            load.end();
            rig.server.faults().clear();
            assert!(met, "{rule:?} was never met");

            is_one_moment(&rig.restored(LINE, None));
            assert!(rig.numbers(LINE)[0] > numbers[0], "{rule:?}");
            rig.silo(&["verify", "--depth", "full"]).good();
            // The device itself is as the load left it, and the next process stores that.
            rig.back_up("image");
            assert!(rig.restored(LINE, None) == fs::read(rig.at("image")).unwrap(), "{rule:?}");
        }
        rig.nothing_leaks();
    }
}

#[test]
fn a_process_that_slept_through_a_take_over_is_fenced_and_stores_nothing() {
    for (contains, fault) in [
        // Asleep while a pack is on its way, while its commit is, and after that without its answer.
        ("packs/", Fault::Slow(Duration::from_millis(300))),
        ("lines/", Fault::Slow(Duration::from_millis(300))),
        ("lines/", Fault::LostAnswer(500)),
    ] {
        let rig = Rig::new();
        fs::write(rig.at("image"), vec![0; MIB]).unwrap();
        let running = uploader(&rig, true);
        let address = running.ready["metrics"].as_str().unwrap().to_owned();
        wait_for(&address, GENERATIONS, 1.0);
        let happened = rig.server.faults().happened();
        rig.server.faults().add(Rule::next("PUT", contains, fault.clone()));
        let (mut client, _) = Client::go(&rig.at("sock")).unwrap();
        assert_eq!(client.write(0, &[3; 4096], 0).unwrap(), 0);
        assert!(rig.server.faults().wait_for_more(happened, LIMIT), "{contains}");
        running.signal(Signal::SIGSTOP);
        let content = rig.image("other", 5, MIB);
        rig.back_up("other");
        let numbers = rig.numbers(LINE);
        running.signal(Signal::SIGCONT);
        // Whatever it had on its way, and what it is told to store now, is refused.
        let _ = client.write(8192, &[4; 4096], 0);
        let said: Said = running.wait().failed(1, "taken over by another writer");
        rig.check(&said);
        assert_eq!(rig.numbers(LINE), numbers, "{contains} {fault:?}");
        assert!(rig.restored(LINE, None) == content, "{contains} {fault:?}");
        rig.nothing_leaks();
    }
}
