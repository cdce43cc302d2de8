//! `silo binlog`: record, show, replay, create.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{
    Client, FLUSH, TRIM, WRITE_ZEROES,
    silo::{Running, silo},
};
use std::{fs, path::Path, thread, time::Duration};

const SIZE: usize = 1 << 20;

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn what_was_recorded_gives_the_same_image_when_it_is_replayed_at_any_speed() {
    let dir = tempfile::tempdir().unwrap();
    let (one, log, socket) =
        (dir.path().join("one"), dir.path().join("log"), dir.path().join("socket"));
    let record = ["binlog", "record", path(&log), "--file", path(&one), "--create", "--size", "1M"];
    let running = Running::start(record.iter().chain(&["--socket", path(&socket), "--reads"]));
    let (mut client, _) = Client::go(&socket).unwrap();
    let mut random = 1_u64;
    let mut next = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040);
        (random >> 33) % below
    };
    for step in 0..200_u64 {
        let (offset, length) = (next(SIZE as u64 - 40_000), next(40_000) as u32 + 1);
        let error = match step % 8 {
            5 => client.call(WRITE_ZEROES, 0, offset, length).unwrap(),
            6 => client.call(TRIM, 0, offset, length).unwrap(),
            7 => client.call(FLUSH, 0, 0, 0).unwrap(),
            _ => client.write(offset, &vec![step as u8 + 1; length as usize], 0).unwrap(),
        };
        assert_eq!(error, 0);
        if step == 100 {
            // So that there is a pause to keep.
            thread::sleep(Duration::from_millis(300));
        }
    }
    client.read(0, 100).unwrap();
    drop(client);
    running.stop().good();
    let image = fs::read(&one).unwrap();

    let shown = silo(["--json", "binlog", "show", path(&log)]).good().json();
    // The last flush is that of the end.
    assert_eq!(shown["operations"], 202);
    assert_eq!(shown["writes"], 125);
    assert_eq!(shown["trims"], 25);
    assert_eq!(shown["reads"], 1);
    assert_eq!(shown["damage"], serde_json::Value::Null);
    let listed = silo(["binlog", "show", path(&log), "--operations"]).good().out;
    assert_eq!(listed.lines().count(), 203);

    let replay = |to: &Path, speed: &str| {
        let what = ["--json", "binlog", "replay", path(&log), "--speed", speed];
        let whom = ["--file", path(to), "--create", "--size", "1M"];
        silo(what.iter().chain(&whom)).good().json()
    };
    let (fast, slow) = (dir.path().join("fast"), dir.path().join("slow"));
    assert_eq!(replay(&fast, "0")["operations"], 202);
    let played = replay(&slow, "1");
    let (took, recorded) = (&played["seconds"], &played["recorded_seconds"]);
    assert!(recorded.as_f64() > Some(0.3) && took.as_f64() >= recorded.as_f64(), "{played}");
    assert!(fs::read(&fast).unwrap() == image);
    assert!(fs::read(&slow).unwrap() == image);

    // Onto another silo, by NBD, no; a smaller device, no; the log itself, no.
    silo(["binlog", "replay", path(&log), "--memory", "64K"]).failed(1, "this one has 65536");
    let again = ["binlog", "record", path(&log), "--memory", "1M", "--socket", path(&socket)];
    silo(again).failed(1, "it must not exist yet");
    silo(["binlog", "replay", path(&one), "--memory", "1M"]).failed(1, "not a log of a device");
    silo(["binlog", "replay", path(&log), "--memory", "1M", "--speed", "-1"]).failed(2, "-1");
}

#[test]
fn a_log_that_was_cut_is_told_with_what_was_good_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let (image, log, to) =
        (dir.path().join("image"), dir.path().join("log"), dir.path().join("to"));
    let mut content = vec![0; 300_000];
    content[70_000..140_000].fill(3);
    content[299_999] = 1;
    fs::write(&image, &content).unwrap();
    let made = silo(["--json", "binlog", "create", path(&image), path(&log)]).good().json();
    assert_eq!(made["blocks"], 3);
    silo(["binlog", "create", path(&image), path(&log)]).failed(1, "it must not exist yet");
    let whole =
        ["binlog", "replay", path(&log), "--file", path(&to), "--create", "--size", "300000"];
    silo(whole).good();
    assert!(fs::read(&to).unwrap() == content);

    let bytes = fs::read(&log).unwrap();
    fs::write(&log, &bytes[..bytes.len() - 1]).unwrap();
    fs::remove_file(&to).unwrap();
    silo(whole).failed(1, "2 whole records are before it");
    content[299_999] = 0;
    assert!(fs::read(&to).unwrap() == content);
    let shown = silo(["--json", "binlog", "show", path(&log)]).good().json();
    assert_eq!(shown["writes"], 2);
    assert!(shown["damage"].as_str().unwrap().contains("was cut at byte"), "{shown}");
}
