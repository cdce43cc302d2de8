//! Figures of real processes, scraped while they work: a move at both its ends, and a backup that
//! holds writers.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{
    Client, LIMIT,
    s3::{figure, wait_for},
    silo::{Running, command, http, silo},
};
use std::{
    fs,
    net::TcpListener,
    time::{Duration, Instant},
};

const MIB: usize = 1 << 20;
const SIZE: usize = 16 * MIB;
const BLOCK: usize = 4096;

fn noise(bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    blake3::Hasher::new().update(b"metrics").finalize_xof().fill(&mut content);
    content
}

#[test]
fn a_move_tells_of_its_blocks_phases_and_waits_while_it_runs_and_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = |end: &str, way: &str| {
        let file = dir.path().join(format!("{end}.toml"));
        let text = format!(
            "[device.memory]\nsize = \"{SIZE}\"\nsource = \"memory\"\n\
             expose = {{ nbd = {{ unix = \"{end}\" }} }}\n\
             [migrate]\n{way} = \"{address}\"\nplaintext = true\nconnections = 1\n\
             bandwidth = \"4M\"\nblackout = \"60s\"\n[metrics]\nlisten = \"127.0.0.1:0\"\n"
        );
        fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let source = Running::start(["serve", "--config", &config("source", "listen")]);
    let at_source = source.ready["metrics"].as_str().unwrap().to_owned();
    let (mut client, _) = Client::go(&dir.path().join("source")).unwrap();
    // Half of it noise, some of it one pattern, the rest never written.
    let mut content = noise(SIZE / 2);
    content.resize(SIZE, 0);
    content[SIZE / 2..SIZE / 2 + MIB].fill(7);
    for at in (0..SIZE / 2 + MIB).step_by(MIB) {
        assert_eq!(client.write(at as u64, &content[at..at + MIB], 0).unwrap(), 0);
    }
    let (_, text) = http(&at_source, "GET", "/metrics");
    let blocks = (SIZE / BLOCK) as f64;
    assert_eq!(figure(&text, "silo_tracking_blocks{device=\"memory\"}"), Some(blocks));
    assert_eq!(figure(&text, "silo_tracking_absent_blocks{device=\"memory\"}"), Some(0.0));
    assert!(
        figure(&text, "silo_tracking_memory_bytes{device=\"memory\"}").unwrap() >= 4.0 * blocks
    );
    let epoch = figure(&text, "silo_tracking_epoch{device=\"memory\"}").unwrap();

    let destination = Running::start(["connect", "--config", &config("destination", "peer")]);
    // At 4 MiB a second the first round takes two seconds.
    let plain = "silo_move_blocks_total{end=\"source\",path=\"plain\"}";
    let text = wait_for(&at_source, plain, 1.0);
    let remaining = figure(&text, "silo_move_remaining_bytes{end=\"source\"}").unwrap();
    assert!(remaining > 0.0, "it is not running any more: {text}");
    let phase = figure(&text, "silo_move_phase{end=\"source\"}").unwrap();
    assert!((1.0..5.0).contains(&phase), "{text}");
    assert!(figure(&text, "silo_tracking_epoch{device=\"memory\"}").unwrap() > epoch);
    // Written faster than it is sent, until the devices change hands: rounds are of no use, the rest
    // follows, and who reads it there waits.
    let other = noise(SIZE);
    for turn in 0_usize.. {
        let (at, from) = (turn * MIB % (SIZE / 2), turn * BLOCK % (SIZE / 2));
        let part = &other[from..from + MIB];
        match client.write(at as u64, part, 0) {
            Ok(0) => content[at..at + MIB].copy_from_slice(part),
            // ESHUTDOWN: it has left, and the write is nowhere.
            Ok(108) => break,
            other => panic!("turn {turn}: {other:?}"),
        }
    }
    drop(client);
    let at_destination = destination.next()["metrics"].as_str().unwrap().to_owned();
    let (mut client, _) = Client::go(&dir.path().join("destination")).unwrap();
    for at in (0..SIZE).step_by(MIB) {
        assert!(client.read(at as u64, MIB as u32).unwrap() == content[at..at + MIB]);
    }
    drop(client);
    let said = source.wait().good();
    assert!(said.out.contains("\"moved\":true"), "{said:?}");
    let complete = destination.next();
    assert_eq!(complete["complete"], true);

    // What the destination says afterwards is what it reported, in whole.
    let (_, text) = http(&at_destination, "GET", "/metrics");
    let of = |metric: &str| figure(&text, metric).unwrap_or_else(|| panic!("{metric}: {text}"));
    assert_eq!(of("silo_move_phase{end=\"destination\"}"), 5.0);
    assert_eq!(of("silo_move_remaining_bytes{end=\"destination\"}"), 0.0);
    assert_eq!(of("silo_tracking_absent_blocks{device=\"memory\"}"), 0.0);
    let waits = of("silo_move_read_wait_seconds_count");
    // The one access that waited for the last block may be told of after the report.
    let reported = complete["read_waits"]["count"].as_f64().unwrap();
    assert!(waits >= 1.0 && (waits == reported || waits == reported + 1.0), "{text}");
    let sum = of("silo_move_read_wait_seconds_sum");
    let longest = complete["read_waits"]["longest_seconds"].as_f64().unwrap();
    assert!(sum >= longest, "{sum} of {waits}: {complete}");
    assert_eq!(of("silo_move_read_wait_seconds_bucket{le=\"+Inf\"}"), waits);
    let came = of("silo_move_blocks_total{end=\"destination\",path=\"peer\"}");
    assert!(came >= (SIZE / 2 / BLOCK) as f64, "{text}");
    for phase in ["pre-copy", "post-copy"] {
        let metric = format!("silo_move_phase_seconds{{end=\"destination\",phase=\"{phase}\"}}");
        let key = phase.replace('-', "_");
        assert!((of(&metric) - complete["seconds"][key].as_f64().unwrap()).abs() < 1e-6, "{phase}");
    }
    assert!(of("silo_move_blackout_seconds{end=\"destination\"}") > 0.0, "{text}");
    destination.stop().good();
}

#[test]
fn a_backup_tells_what_it_tracks_and_each_writer_that_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    silo(["keys", "create", &at("keys")]).good();
    fs::write(at("image"), noise(8 * MIB)).unwrap();
    // So little bandwidth that a round is under way for seconds.
    let mut sync = command(["--json", "sync", "--line", "acme/vm", "--file", &at("image")]);
    sync.args(["--socket", &at("s"), "--max-age", "200ms", "--metrics", "127.0.0.1:0"])
        .args(["--bandwidth", "2M", "--store", &format!("file://{}", at("store"))])
        .args(["--keys", &at("keys")]);
    let running = Running::of(&mut sync);
    let metrics = running.ready["metrics"].as_str().unwrap().to_owned();
    let line = "{line=\"acme/vm\"}";
    let count = format!("silo_backup_held_seconds_count{line}");
    // The freeze of the first round.
    let text = wait_for(&metrics, &count, 1.0);
    assert_eq!(
        figure(&text, &format!("silo_backup_tracked_blocks{line}")),
        Some((8 * MIB / BLOCK) as f64)
    );
    // Blocks that are frozen and not read yet are copied first: each of these writers is held.
    let (mut client, _) = Client::go(&dir.path().join("s")).unwrap();
    for block in (0..8 * MIB / BLOCK).rev().take(16) {
        assert_eq!(client.write((block * BLOCK) as u64, &[9; BLOCK], 0).unwrap(), 0);
    }
    let text = wait_for(&metrics, &count, 17.0);
    let bucket = "silo_backup_held_seconds_bucket{le=\"+Inf\",line=\"acme/vm\"}";
    assert_eq!(figure(&text, bucket), figure(&text, &count), "{text}");
    assert!(figure(&text, &format!("silo_backup_held_seconds_sum{line}")).unwrap() > 0.0);
    // They are in no generation; the first one does not have them.
    let generations = format!("silo_backup_generations_total{line}");
    wait_for(&metrics, &generations, 1.0);
    let changed = format!("silo_backup_changed_blocks{line}");
    let deadline = Instant::now() + LIMIT;
    loop {
        let (_, text) = http(&metrics, "GET", "/metrics");
        // Sixteen are seen, or were stored already by then.
        let seen = figure(&text, &changed).unwrap();
        if seen == 16.0 {
            let fullest = figure(&text, &format!("silo_backup_changed_fullest_blocks{line}"));
            assert_eq!(fullest, Some(16.0), "{text}");
            break;
        }
        if figure(&text, &generations).unwrap() >= 2.0 {
            break;
        }
        assert!(Instant::now() < deadline, "{text}");
        std::thread::sleep(Duration::from_millis(1));
    }
    wait_for(&metrics, &generations, 2.0);
    drop(client);
    running.stop().good();
}
