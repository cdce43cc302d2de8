//! What is read and written at a destination that runs while almost everything is still to come.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{
    MIB, Random,
    early::early,
    memory::Memory,
    rig::*,
    tap::{
        Way,
        kind::{BLOCKS, NEED},
    },
    until,
};
use silo_block::io::BlockDevice;
use silo_move::source;
use std::{
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

#[test]
fn check_10_many_readers_of_one_absent_block_send_one_demand_and_all_get_it() {
    let mut early = early(64 * MIB, quick(), 30_000);
    let at = 40 * MIB;
    let readers: Vec<_> = (0..12)
        .map(|n| {
            let there = early.there.clone();
            thread::spawn(move || {
                let mut got = vec![0; 100 + n];
                there.read_at(at + n as u64, &mut got).unwrap();
                got
            })
        })
        .collect();
    let mut expected = vec![0; 4096];
    early.device.read_at(at, &mut expected).unwrap();
    for (n, reader) in readers.into_iter().enumerate() {
        assert_eq!(reader.join().unwrap(), expected[n..][..100 + n]);
    }
    assert_eq!(early.tap.kinds().get(&(Way::Back, NEED)).map(|seen| seen.0), Some(1));
    assert!(early.receiver.session(1).waits().count >= 1);
    let outbound = early.outbound.take().unwrap();
    outbound.set_bandwidth(None);
    let report = outbound.wait().unwrap();
    let arrived = early.receiver.session(1).wait().unwrap();
    assert_eq!(arrived.counters.demands, 1);
    assert_eq!(report.sent[0], 1, "one block was sent as a demand: {:?}", report.sent);
    same(&*early.device, &*early.there);
}

#[test]
fn check_11_a_demanded_block_passes_all_that_have_not_left() {
    let mut early = early(64 * MIB, quick(), 30_000);
    let between = Arc::new(Mutex::new((false, 0u64, Vec::new())));
    let noted = between.clone();
    early.tap.at_each_frame(move |_, way, frame| {
        let mut noted = noted.lock().unwrap();
        match (way, frame[0], frame[1]) {
            (Way::Back, NEED, _) => (noted.0, noted.1) = (true, 0),
            (Way::Out, BLOCKS, 0) if noted.0 => {
                let count = noted.1;
                noted.2.push(count);
                noted.0 = false;
            }
            (Way::Out, BLOCKS, _) => noted.1 += 1,
            _ => {}
        }
        true
    });
    let outbound = early.outbound.take().unwrap();
    // Bulk flows, slowly: dozens of runs are in the window all the time.
    outbound.set_bandwidth(Some(20_000_000));
    let mut random = Random(4);
    for _ in 0..10 {
        let block = random.below(16 * 1024) * 4096;
        let (mut got, mut expected) = ([0; 512], [0; 512]);
        early.there.read_at(block, &mut got).unwrap();
        early.device.read_at(block, &mut expected).unwrap();
        assert_eq!(got, expected);
    }
    outbound.set_bandwidth(None);
    outbound.wait().unwrap();
    early.receiver.session(1).wait().unwrap();
    let counts = between.lock().unwrap().2.clone();
    assert!(!counts.is_empty(), "no demand was seen");
    // What is in the hands of the two senders may pass first, and a run that is on its way.
    assert!(counts.iter().all(|count| *count <= 3), "bulk runs before the demanded: {counts:?}");
    same(&*early.device, &*early.there);
}

#[test]
fn check_08_and_09_writes_at_the_destination_before_arrival_survive_all_that_comes_later() {
    let mut early = early(8 * MIB, quick(), 30_000);
    let expected = Memory::new(8 * MIB);
    let mut all = bytes(&*early.device);
    // A whole block, part of one, and both ends of a run.
    let writes: [(u64, usize); 3] = [(5 * MIB, 4096), (6 * MIB + 100, 50), (7 * MIB - 10, 20_000)];
    for (n, (at, length)) in writes.into_iter().enumerate() {
        let data = vec![n as u8 + 1; length];
        early.there.write_at(at, &data).unwrap();
        all[at as usize..][..length].copy_from_slice(&data);
        let mut got = vec![0; length];
        early.there.read_at(at, &mut got).unwrap();
        assert_eq!(got, data);
    }
    expected.write_at(0, &all).unwrap();
    let outbound = early.outbound.take().unwrap();
    outbound.set_bandwidth(None);
    outbound.wait().unwrap();
    let arrived = early.receiver.session(1).wait().unwrap();
    assert!(arrived.counters.written >= 5, "{:?}", arrived.counters);
    same(&expected, &*early.there);
}

#[test]
fn check_17_without_the_source_reads_of_what_is_missing_fail_in_time_and_the_rest_works() {
    let early = early(16 * MIB, quick(), 1500);
    early.there.write_at(0, &[7; 4096]).unwrap();
    early.tap.cut();
    let begin = Instant::now();
    let error = early.there.read_at(12 * MIB, &mut [0; 512]).unwrap_err();
    assert!(begin.elapsed() < common::WAIT, "{:?}", begin.elapsed());
    let text = error.to_string();
    assert!(text.contains("\"memory\"") && text.contains("post-copy"), "{text}");
    // Soon without a wait.
    until("reads fail at once", || {
        let begin = Instant::now();
        early.there.read_at(13 * MIB, &mut [0; 512]).is_err()
            && begin.elapsed() < Duration::from_millis(100)
    });
    let mut got = [0; 4096];
    early.there.read_at(0, &mut got).unwrap();
    assert_eq!(got, [7; 4096]);
    // The line comes back: so does everything else.
    early.tap.mend();
    early.outbound.as_ref().unwrap().set_bandwidth(None);
    early.receiver.session(1).wait().unwrap();
    let mut got = vec![0; 4096];
    early.there.read_at(12 * MIB, &mut got).unwrap();
    let mut expected = vec![0; 4096];
    early.device.read_at(12 * MIB, &mut expected).unwrap();
    assert_eq!(got, expected);
}

#[test]
fn check_38_a_chain_through_a_host_that_is_still_filling_is_right() {
    let mut first = early(8 * MIB, quick(), 30_000);
    let bottom = Arc::new(Memory::new(8 * MIB));
    let third = empty("memory", bottom.clone(), 4096);
    let receiver = Receiver::new(vec![third.clone()], quick());
    let server = serve(&receiver);
    // B writes, and gives everything on to C while almost all of it is still at A.
    first.there.write_at(3 * MIB + 5, b"written at b").unwrap();
    assert!(first.there.absent() > 1000, "b misses {} blocks", first.there.absent());
    let host = Arc::new(Host::default());
    let onward = start(
        std::slice::from_ref(&first.there),
        server.address(),
        &host,
        source::Options::default(),
    );
    first.outbound.as_ref().unwrap().set_bandwidth(None);
    let report = onward.wait().unwrap();
    receiver.session(1).wait().unwrap();
    first.outbound.take().unwrap().wait().unwrap();
    let mut expected = bytes(&*first.device);
    expected[3 * MIB as usize + 5..][..12].copy_from_slice(b"written at b");
    assert!(bytes(&*bottom) == expected, "c has other bytes");
    assert!(report.paths.content >= 8 * MIB - 4096);
}

#[test]
fn check_42_bytes_paths_phases_and_waits_agree_with_an_independent_tap() {
    let mut early = early(16 * MIB, quick(), 30_000);
    let mut waited = Vec::new();
    for block in (0..64).map(|n| 2000 + n * 31) {
        let begin = Instant::now();
        early.there.read_at(block * 4096, &mut [0; 64]).unwrap();
        waited.push(begin.elapsed());
    }
    let outbound = early.outbound.take().unwrap();
    outbound.set_bandwidth(None);
    let report = outbound.wait().unwrap();
    let arrived = early.receiver.session(1).wait().unwrap();
    let seen = early.tap.kinds();
    let sum = |way: Way, which: &dyn Fn(u8) -> bool| -> u64 {
        let chosen = seen.iter().filter(|((of, kind), _)| *of == way && which(*kind));
        chosen.map(|(_, (_, bytes))| bytes).sum()
    };
    let (out, back) = (sum(Way::Out, &|kind| kind != BLOCKS), sum(Way::Back, &|_| true));
    let blocks = sum(Way::Out, &|kind| kind == BLOCKS);
    for (wire, sent, received) in [(report.wire, out, back), (arrived.wire, back, out)] {
        assert_eq!((wire.control_sent, wire.control_received), (sent, received));
        assert_eq!(wire.data + wire.demand, blocks);
    }
    assert_eq!(report.wire.total(), early.tap.bytes());
    // Every block went one way, and all of them were noise.
    assert_eq!(report.paths.plain * 4096, report.paths.content);
    assert_eq!(report.sent.iter().sum::<u64>() * 4096, report.paths.content);
    let phases = report.timings;
    let parts = phases.connect + phases.filling + phases.quiesce + phases.switch + phases.following;
    assert!(parts <= phases.total && phases.total - parts < Duration::from_secs(5));
    // What the volume says of waits is what whoever waited saw.
    waited.sort();
    let summary = arrived.waits;
    assert!(summary.count >= 50, "{summary:?}");
    // Whoever waits sees more than the volume counts: a busy computer lets it go on later.
    let (p50, longest) = (waited[waited.len() / 2], waited[waited.len() - 1]);
    let bin = |time: Duration| time.mul_f64(1.3) + Duration::from_micros(200);
    assert!(summary.p50 <= bin(p50), "{:?}, seen {p50:?}", summary.p50);
    assert!(summary.longest <= bin(longest), "{:?}, seen {longest:?}", summary.longest);
    assert!(summary.p50 > Duration::ZERO && summary.p50 <= summary.p99);
    assert!(summary.p99 <= summary.longest);
    let blackout = early.host.seen();
    assert!(blackout.contains(&Seen::HandedOver));
}
