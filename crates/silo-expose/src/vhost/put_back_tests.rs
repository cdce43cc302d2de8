//! Rings that are stopped while requests wait: they are put back, and done by whoever starts the ring
//! next. The device here is full until it is told that there is room.

use super::{
    GuestPages, GuestRange, VhostOptions, VhostServer,
    client::{Ask, ClientOptions, VhostClient},
    sys::{self, Shared},
};
use crate::test_devices::LIMIT;
use silo_block::io::BlockDevice;
use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

const SECTORS: u64 = 512;
/// Requests that begin here never wait.
const FREE: u64 = SECTORS / 2;

struct State {
    room: bool,
    waiting: usize,
    interrupted: u64,
    content: Vec<u8>,
}

/// A disk whose writes to the first half, and flushes, wait for room.
struct Full {
    /// Nothing tells that a write would wait but the write.
    unforeseen: bool,
    state: Mutex<State>,
    changed: Condvar,
    flushed: AtomicU64,
}

impl Full {
    fn new() -> Arc<Self> {
        let content = vec![0; SECTORS as usize * 512];
        let state = State { room: false, waiting: 0, interrupted: 0, content };
        let (changed, flushed) = (Condvar::new(), AtomicU64::new(0));
        Arc::new(Self { unforeseen: false, state: Mutex::new(state), changed, flushed })
    }

    /// As a file system that is full all of a sudden.
    fn unforeseen() -> Arc<Self> {
        let full = Arc::into_inner(Self::new()).unwrap();
        Arc::new(Self { unforeseen: true, ..full })
    }

    fn set_room(&self, room: bool) {
        self.state.lock().unwrap().room = room;
        self.changed.notify_all();
    }

    fn content(&self) -> Vec<u8> {
        self.state.lock().unwrap().content.clone()
    }

    fn await_waiting(&self, count: usize) {
        let state = self.state.lock().unwrap();
        let (state, _) =
            self.changed.wait_timeout_while(state, LIMIT, |state| state.waiting != count).unwrap();
        assert_eq!(state.waiting, count, "requests that wait");
    }

    fn pass(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state.lock().unwrap();
        let before = state.interrupted;
        state.waiting += 1;
        self.changed.notify_all();
        state = self
            .changed
            .wait_timeout_while(state, LIMIT, |state| !state.room && state.interrupted == before)
            .unwrap()
            .0;
        state.waiting -= 1;
        self.changed.notify_all();
        if state.room { Ok(state) } else { Err(io::ErrorKind::StorageFull.into()) }
    }
}

impl BlockDevice for Full {
    fn size(&self) -> u64 {
        SECTORS * 512
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(&self.state.lock().unwrap().content[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, buf).map(|()| true)
    }

    fn may_wait(&self, _: u64, _: u64) -> bool {
        !self.unforeseen
    }

    fn try_write_at(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        let has_room = offset >= FREE * 512 || self.state.lock().unwrap().room;
        if self.may_wait(offset, 0) || !has_room {
            return Ok(false);
        }
        self.write_at(offset, data).map(|()| true)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = if offset < FREE * 512 { self.pass()? } else { self.state.lock().unwrap() };
        state.content[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let state = self.pass()?;
        self.flushed.fetch_add(1, Ordering::SeqCst);
        drop(state);
        Ok(())
    }

    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.write_at(offset, &vec![0; length as usize])
    }

    fn interrupt(&self) {
        self.state.lock().unwrap().interrupted += 1;
        self.changed.notify_all();
    }
}

/// Notes what the server says that it wrote.
#[derive(Default)]
struct Tracker(Mutex<Vec<GuestRange>>);

impl GuestPages for Tracker {
    fn is_present(&self, _: GuestRange) -> bool {
        true
    }

    fn make_present(&self, _: GuestRange) -> io::Result<()> {
        Ok(())
    }

    fn wrote(&self, range: GuestRange) {
        self.0.lock().unwrap().push(range);
    }
}

struct Host {
    _dir: TempDir,
    path: PathBuf,
    disk: Arc<Full>,
    tracker: Arc<Tracker>,
    server: VhostServer,
}

impl Host {
    fn new(disk: Arc<Full>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let tracker = Arc::new(Tracker::default());
        let options = VhostOptions {
            put_back_after: Some(Duration::from_millis(2)),
            pages: Some(tracker.clone()),
            workers: 4,
            ..VhostOptions::default()
        };
        let server = VhostServer::start(&path, disk.clone(), options).unwrap();
        Self { _dir: dir, path, disk, tracker, server }
    }
}

/// A guest whose memory can go to another host.
struct Guest {
    file: File,
    memory: Shared,
    client: VhostClient,
}

impl Guest {
    fn on(host: &Host, options: ClientOptions) -> Self {
        let bytes = VhostClient::bytes(&options);
        let file = sys::scratch(&[]).unwrap();
        file.set_len(bytes).unwrap();
        let client =
            VhostClient::connect_with(&host.path, options, file.try_clone().unwrap()).unwrap();
        let memory = Shared::map(file.try_clone().unwrap(), 0, bytes).unwrap();
        Self { file, memory, client }
    }

    /// Its rings are stopped already.
    fn move_to(&mut self, host: &Host) {
        let file = self.file.try_clone().unwrap();
        self.client = self.client.moved_to(&host.path, file, &self.memory).unwrap();
    }

    /// Rings that went round so often that their indices are about to wrap.
    fn use_rings(&mut self, requests: u16) {
        let queue = &mut self.client.queues[0];
        let mut left = requests;
        while left > 0 || queue.under_way() > 0 {
            while left > 0
                && let Some(slot) = queue.take_slot()
            {
                queue.submit(slot, Ask::Read, FREE, 512);
                left -= 1;
            }
            queue.kick().unwrap();
            assert_eq!(queue.wait(LIMIT).unwrap().1, 0);
        }
    }

    fn submit(&mut self, queue: usize, ask: Ask, sector: u64, data: &[u8]) -> u16 {
        let queue = &mut self.client.queues[queue];
        let slot = queue.take_slot().unwrap();
        queue.fill(slot, data);
        queue.submit(slot, ask, sector, data.len());
        queue.kick().unwrap();
        slot
    }
}

/// Requests that wait among ones that do not, as the ring of `options` has them after `used` earlier
/// ones: stopped, moved, done elsewhere.
fn moves(options: ClientOptions, used: u16) {
    let (old, new) = (Host::new(Full::new()), Host::new(Full::new()));
    let mut guest = Guest::on(&old, options);
    guest.use_rings(used);
    let mut waiting = Vec::new();
    for at in 0..6u64 {
        let (ask, sector) = if at == 3 { (Ask::Flush, 0) } else { (Ask::Write, at) };
        let data = if at == 3 { vec![] } else { vec![at as u8 + 1; 512] };
        waiting.push(guest.submit(0, ask, sector, &data));
        // And some that are done meanwhile, whose places in the ring get free.
        let done = guest.submit(0, Ask::Read, FREE + at, &[0x77; 512]);
        assert_eq!(guest.client.queues[0].wait(LIMIT).unwrap(), (done, 0));
    }
    // More than there are workers: some have not even begun to wait.
    old.disk.await_waiting(4);
    old.tracker.0.lock().unwrap().clear();
    let began = Instant::now();
    let base = guest.client.stop_queue(0).unwrap();
    assert!(began.elapsed() < LIMIT / 2, "it took {:?}", began.elapsed());
    assert!(old.server.comes_to_rest(LIMIT));
    old.disk.await_waiting(0);
    assert_eq!(base, used.wrapping_add(6), "what was answered, and nothing else");
    assert!(guest.client.queues[0].poll().is_none(), "nobody was told of an error");
    // The ring says what is to be done, in its order, and the tracking knows of it.
    let queue = &guest.client.queues[0];
    let entries = options.entries;
    let slots_at = queue.available_at() + 4;
    for (at, &slot) in (0u16..).zip(&waiting) {
        let place = slots_at + 2 * usize::from(base.wrapping_add(at) % entries);
        let head = queue.raw().0.u16_at(place).load(Ordering::SeqCst);
        assert_eq!(head, 3 * slot, "place {at}");
        let told = old.tracker.0.lock().unwrap();
        let place = place as u64;
        let covers =
            |range: &GuestRange| range.offset <= place && place + 2 <= range.offset + range.length;
        assert!(told.iter().any(covers), "a change of the ring that nobody was told of");
    }
    // The source could have room now: nothing of the machine is done there any more.
    old.disk.set_room(true);
    guest.move_to(&new);
    new.disk.await_waiting(4);
    assert!(guest.client.queues[0].poll().is_none(), "they wait at the destination too");
    new.disk.set_room(true);
    let mut answered = BTreeMap::new();
    for _ in &waiting {
        let (slot, status) = guest.client.queues[0].wait(LIMIT).unwrap();
        assert_eq!(answered.insert(slot, status), None, "answered twice");
    }
    assert!(answered.values().all(|&status| status == 0), "{answered:?}");
    assert!(waiting.iter().all(|slot| answered.contains_key(slot)), "{answered:?}");
    for at in [0, 1, 2, 4, 5] {
        assert_eq!(new.disk.content()[at * 512..][..512], [at as u8 + 1; 512], "sector {at}");
    }
    assert_eq!(new.disk.flushed.load(Ordering::SeqCst), 1);
    old.server.stop(LIMIT).unwrap();
    assert!(old.disk.content()[..FREE as usize * 512].iter().all(|&byte| byte == 0));
    assert_eq!(old.disk.flushed.load(Ordering::SeqCst), 0);
    // And the rings go on, all the way round.
    guest.use_rings(2 * entries);
}

#[test]
fn requests_that_wait_when_a_ring_is_stopped_are_done_where_it_starts_again() {
    for indirect in [false, true] {
        for event_idx in [false, true] {
            let options = ClientOptions {
                indirect,
                event_idx,
                slot_bytes: 4096,
                inflight: indirect == event_idx,
                ..ClientOptions::default()
            };
            moves(options, 0);
        }
    }
}

#[test]
fn requests_are_put_back_where_the_indices_of_the_ring_wrap() {
    let options = ClientOptions { slot_bytes: 4096, entries: 64, ..ClientOptions::default() };
    // The ring's places, and then the index itself.
    moves(options, 60);
    moves(options, u16::MAX - 4);
}

#[test]
fn a_move_that_is_called_off_leaves_requests_waiting_as_before() {
    let host = Host::new(Full::new());
    let options = ClientOptions { slot_bytes: 4096, ..ClientOptions::default() };
    let mut guest = Guest::on(&host, options);
    let slots: Vec<_> =
        (0..3).map(|at| guest.submit(0, Ask::Write, at, &[at as u8 + 1; 512])).collect();
    for _ in 0..5 {
        host.disk.await_waiting(3);
        guest.client.stop_queue(0).unwrap();
        host.disk.await_waiting(0);
        guest.client.restart_queue(0).unwrap();
    }
    host.disk.await_waiting(3);
    host.disk.set_room(true);
    let mut answered: Vec<_> =
        (0..3).map(|_| guest.client.queues[0].wait(LIMIT).unwrap()).collect();
    answered.sort_unstable();
    let mut expected: Vec<_> = slots.into_iter().map(|slot| (slot, 0)).collect();
    expected.sort_unstable();
    assert_eq!(answered, expected);
    assert!(guest.client.queues[0].poll().is_none());
    assert_eq!(host.disk.content()[1024..1536], [3; 512]);
}

fn stops_one_ring_of(disk: Arc<Full>) {
    let host = Host::new(disk);
    let options = ClientOptions { slot_bytes: 4096, queues: 2, ..ClientOptions::default() };
    let mut guest = Guest::on(&host, options);
    guest.submit(0, Ask::Write, 0, &[1; 512]);
    let other = guest.submit(1, Ask::Write, 1, &[2; 512]);
    host.disk.await_waiting(2);
    let began = Instant::now();
    guest.client.stop_queue(0).unwrap();
    assert!(began.elapsed() < LIMIT / 2, "it took {:?}", began.elapsed());
    host.disk.await_waiting(1);
    assert!(guest.client.queues[1].poll().is_none());
    host.disk.set_room(true);
    assert_eq!(guest.client.queues[1].wait(LIMIT).unwrap(), (other, 0));
    assert_eq!(host.disk.content()[..1024], [[0; 512], [2; 512]].concat());
}

#[test]
fn stopping_one_ring_leaves_the_requests_of_the_others_waiting_without_an_error() {
    stops_one_ring_of(Full::new());
}

#[test]
fn a_write_that_waits_although_nothing_told_so_is_neither_failed_nor_in_the_way_of_a_stop() {
    stops_one_ring_of(Full::unforeseen());
}

#[test]
fn a_daemon_that_dies_after_requests_were_put_back_has_them_done_once_by_the_next() {
    let Host { _dir, path, disk, server, .. } = Host::new(Full::new());
    let options = ClientOptions { slot_bytes: 4096, ..ClientOptions::default() };
    let mut client = VhostClient::connect(&path, options).unwrap();
    let mut slots = Vec::new();
    for at in 0..3u8 {
        let queue = &mut client.queues[0];
        let slot = queue.take_slot().unwrap();
        queue.fill(slot, &[at + 1; 512]);
        queue.submit(slot, Ask::Write, at.into(), 512);
        queue.kick().unwrap();
        slots.push((slot, 0));
    }
    disk.await_waiting(3);
    client.stop_queue(0).unwrap();
    // The front end keeps its record and its rings; the next server gets both.
    server.stop(LIMIT).unwrap();
    let next = Full::new();
    next.set_room(true);
    let server = VhostServer::start(&path, next.clone(), VhostOptions::default()).unwrap();
    client.reconnect(&path).unwrap();
    let mut answered: Vec<_> =
        slots.iter().map(|_| client.queues[0].wait(LIMIT).unwrap()).collect();
    answered.sort_unstable();
    slots.sort_unstable();
    assert_eq!(answered, slots);
    assert!(client.queues[0].poll().is_none());
    assert_eq!(next.content()[1024..1536], [3; 512]);
    drop(server);
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Two rings under writes and reads, stopped and moved at any moment between two hosts that share a
/// disk which is full now and then.
fn random_moves(seed: u64) {
    let disk = Full::new();
    disk.set_room(true);
    let hosts = [Host::new(disk.clone()), Host::new(disk.clone())];
    let options = ClientOptions {
        queues: 2,
        entries: 32,
        slot_bytes: 4096,
        indirect: seed.is_multiple_of(2),
        ..ClientOptions::default()
    };
    let mut guest = Guest::on(&hosts[0], options);
    let (mut state, mut at) = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, 0);
    let mut model = vec![0u8; SECTORS as usize];
    let mut busy = vec![false; SECTORS as usize];
    let mut under_way = [BTreeMap::new(), BTreeMap::new()];
    let mut put_back = 0;
    let settle = |guest: &mut Guest,
                  under_way: &mut [BTreeMap<u16, (Ask, u64)>; 2],
                  model: &[u8],
                  busy: &mut [bool]| {
        for (index, under_way) in under_way.iter_mut().enumerate() {
            while let Some((slot, status)) = guest.client.queues[index].poll() {
                let (ask, sector) = under_way.remove(&slot).unwrap_or_else(|| {
                    panic!("seed {seed}: slot {slot} of queue {index} was answered twice")
                });
                assert_eq!(status, 0, "seed {seed}: {ask:?} at {sector}");
                busy[sector as usize] = false;
                if ask == Ask::Read {
                    let mut data = [0; 512];
                    guest.client.queues[index].fetch(slot, &mut data);
                    assert_eq!(data, [model[sector as usize]; 512], "seed {seed}: {sector}");
                }
            }
        }
    };
    for step in 0..1500u64 {
        match random(&mut state) % 20 {
            0 => disk.set_room(step.is_multiple_of(3)),
            1 => {
                let queue = (step % 2) as usize;
                let before = guest.client.queues[queue].under_way();
                guest.client.stop_queue(queue).unwrap();
                settle(&mut guest, &mut under_way, &model, &mut busy);
                put_back += u64::from(guest.client.queues[queue].under_way().min(before));
                guest.client.restart_queue(queue).unwrap();
            }
            2 => {
                guest.client.stop_queue(0).unwrap();
                guest.client.stop_queue(1).unwrap();
                at = 1 - at;
                guest.move_to(&hosts[at]);
            }
            _ => {
                let queue = (random(&mut state) % 2) as usize;
                let sector = random(&mut state) % SECTORS;
                if busy[sector as usize] {
                    continue;
                }
                let Some(slot) = guest.client.queues[queue].take_slot() else {
                    settle(&mut guest, &mut under_way, &model, &mut busy);
                    disk.set_room(true);
                    continue;
                };
                let ask = if random(&mut state).is_multiple_of(3) { Ask::Read } else { Ask::Write };
                let value = random(&mut state) as u8;
                busy[sector as usize] = true;
                if ask == Ask::Write {
                    model[sector as usize] = value;
                }
                let client = &mut guest.client.queues[queue];
                client.fill(slot, &[if ask == Ask::Write { value } else { 0xee }; 512]);
                client.submit(slot, ask, sector, 512);
                client.kick().unwrap();
                under_way[queue].insert(slot, (ask, sector));
            }
        }
        settle(&mut guest, &mut under_way, &model, &mut busy);
    }
    disk.set_room(true);
    let deadline = Instant::now() + LIMIT;
    while under_way.iter().any(|under_way| !under_way.is_empty()) {
        settle(&mut guest, &mut under_way, &model, &mut busy);
        assert!(Instant::now() < deadline, "seed {seed}: never answered: {under_way:?}");
        thread::yield_now();
    }
    let content = disk.content();
    for (sector, &value) in model.iter().enumerate() {
        assert_eq!(content[sector * 512..][..512], [value; 512], "seed {seed}: sector {sector}");
    }
    assert!(put_back > 0, "seed {seed}: nothing was ever put back");
}

#[test]
fn every_request_is_answered_once_however_often_its_ring_is_stopped_and_moved() {
    for seed in 1..=8 {
        random_moves(seed);
    }
}
