//! A front end whose server went away while its rings stood still, or is taken for the one before.

use super::{
    VhostOptions, VhostServer,
    client::{Ask, ClientOptions, VhostClient},
};
use crate::test_devices::{Gated, LIMIT};
use std::{
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use vhost::vhost_user::{VhostUserFrontend, message::VhostUserProtocolFeatures};

fn serve(path: &Path, disk: &Arc<Gated>) -> VhostServer {
    let options = VhostOptions { memory_slots: false, ..VhostOptions::default() };
    VhostServer::start(path, disk.clone(), options).unwrap()
}

#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "not in {LIMIT:?}: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_front_end_that_lost_its_server_while_its_rings_stood_still_goes_on_with_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let disk = Gated::new(true);
    let server = serve(&path, &disk);
    let mut client = VhostClient::connect(&path, ClientOptions::default()).unwrap();
    assert_eq!(client.queues[0].call(Ask::Write, 1, &mut [1; 512]).unwrap(), 0);
    assert!(!server.is_mistaken());
    // Again and again: it never says more, also to the servers after the next.
    let mut server = Some(server);
    for round in 2..6u8 {
        client.stop_queue(0).unwrap();
        server.take().unwrap().stop(LIMIT).unwrap();
        let next = serve(&path, &disk);
        client.connect_silently(&path).unwrap();
        until("it is connected", || next.is_answering());
        assert!(next.is_mistaken(), "it has said nothing");
        assert!(next.comes_to_rest(LIMIT));
        client.go_on().unwrap();
        assert!(!next.is_mistaken());
        let queue = &mut client.queues[0];
        assert_eq!(queue.call(Ask::Write, u64::from(round), &mut [round; 512]).unwrap(), 0);
        let mut data = [0; 512];
        assert_eq!(queue.call(Ask::Read, u64::from(round) - 1, &mut data).unwrap(), 0);
        assert_eq!(data, [round - 1; 512]);
        server = Some(next);
    }
    server.take().unwrap().stop(LIMIT).unwrap();
}

#[test]
fn a_ring_that_the_server_before_was_told_of_gets_no_answer_and_is_run_once_more_from_the_record() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let disk = Gated::new(true);
    let server = serve(&path, &disk);
    let mut client = VhostClient::connect(&path, ClientOptions::default()).unwrap();
    for sector in 0..7 {
        assert_eq!(client.queues[0].call(Ask::Write, sector, &mut [9; 512]).unwrap(), 0);
    }
    disk.set_open(false);
    let queue = &mut client.queues[0];
    let mut slots: Vec<_> = (0..3u64)
        .map(|at| {
            let slot = queue.take_slot().unwrap();
            queue.fill(slot, &[at as u8 + 1; 512]);
            queue.submit(slot, Ask::Write, 100 + at, 512);
            slot
        })
        .collect();
    queue.kick().unwrap();
    disk.await_waiting(3);
    // Its rings run, and it does not notice that this server is gone.
    server.stop(LIMIT).unwrap();
    let disk = Gated::new(true);
    let server = serve(&path, &disk);
    client.connect_silently(&path).unwrap();
    until("it is connected", || server.is_answering() && server.is_mistaken());
    client.stop_queue(0).expect_err("a base that nobody knows");
    until("it is cut off", || server.connections() == 0);

    client.connect_silently(&path).unwrap();
    client.go_on().unwrap();
    let queue = &mut client.queues[0];
    let mut answered: Vec<_> = (0..3).map(|_| queue.wait(LIMIT).unwrap()).collect();
    answered.sort_unstable();
    slots.sort_unstable();
    assert_eq!(answered, slots.into_iter().map(|slot| (slot, 0)).collect::<Vec<_>>());
    let now = disk.now();
    assert_eq!([now[100 * 512], now[101 * 512], now[102 * 512]], [1, 2, 3]);
    assert_eq!(now[0], 0, "what was answered before is not run again");
    server.stop(LIMIT).unwrap();
}

#[test]
fn regions_are_told_one_by_one_only_where_that_is_offered() {
    let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    for memory_slots in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let options = VhostOptions { memory_slots, ..VhostOptions::default() };
        let server = VhostServer::start(&path, Gated::new(true), options).unwrap();
        let mut client = VhostClient::connect(&path, ClientOptions::default()).unwrap();
        let offered = client.frontend().get_protocol_features().unwrap();
        assert_eq!(offered.contains(slots), memory_slots);
        drop(client);
        server.stop(LIMIT).unwrap();
    }
}
