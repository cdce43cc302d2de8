//! Content comes: on demand, ahead of walkers, first, in the background.

use super::*;

#[test]
fn what_is_touched_is_fetched_and_nothing_else() {
    for instant in [false, true] {
        let far = Arc::new(Far { instant, ..Far::new(4 * MIB + 1234, Duration::ZERO) });
        let mount = Mount::direct(Arc::clone(&far) as _, options()).unwrap();
        for block in [1000, 3, 500, 1024] {
            let length = (BLOCK.min(4 * MIB + 1234 - block * BLOCK)) as usize;
            assert_eq!(peek(&mount, block * BLOCK, length), pattern(block * BLOCK, length));
        }
        // The rest of the last page is zero.
        assert_eq!(peek(&mount, 4 * MIB + 1234, 100), [0; 100]);
        // A reader may go on a moment before its content is counted.
        let deadline = Instant::now() + LONG;
        while mount.status().demanded_bytes < 3 * BLOCK + 1234 && Instant::now() < deadline {
            thread::yield_now();
        }
        let status = mount.status();
        assert_eq!(status.here_bytes, 3 * BLOCK + 1234, "{status:?}");
        assert_eq!((status.demands, status.errors), (4, 0));
        assert_eq!(far.reads.lock().unwrap().iter().sum::<u32>(), 4);
    }
}

#[test]
fn check_10_concurrent_readers_of_one_absent_block_make_one_demand() {
    let far = Arc::new(Far::new(4 * MIB, Duration::from_millis(20)));
    let mount = Mount::direct(Arc::clone(&far) as _, options()).unwrap();
    far.set(Mood::Silent);
    thread::scope(|scope| {
        let mount = &mount;
        let readers: Vec<_> = (0..16)
            .map(|number| {
                scope.spawn(move || {
                    if number % 2 == 0 {
                        return peek(mount, 77 * BLOCK, BLOCK_SIZE);
                    }
                    let mut bytes = vec![0; BLOCK_SIZE];
                    mount.read_at(77 * BLOCK, &mut bytes).unwrap();
                    bytes
                })
            })
            .collect();
        far.wait_for_read(77);
        // All mapped readers have faulted before the answer comes.
        let deadline = Instant::now() + LONG;
        while mount.status().faults < 8 && Instant::now() < deadline {
            thread::yield_now();
        }
        far.set(Mood::Fine);
        for reader in readers {
            assert_eq!(reader.join().unwrap(), pattern(77 * BLOCK, BLOCK_SIZE));
        }
    });
    assert_eq!(far.reads.lock().unwrap()[77], 1, "one request however many wait");
    assert_eq!(mount.status().demands, 1);
}

#[test]
fn each_mapped_access_that_waits_is_counted_with_its_time() {
    let distance = Duration::from_millis(20);
    let far = Arc::new(Far::new(4 * MIB, distance));
    let mut options = options();
    options.read_ahead = 0;
    let mount = Mount::direct(Arc::clone(&far) as _, options).unwrap();
    assert_eq!(mount.waits().count(), 0);
    // The second time it is here, and waits for nobody.
    for block in [900, 3, 500, 3] {
        assert_eq!(peek(&mount, block * BLOCK, BLOCK_SIZE), pattern(block * BLOCK, BLOCK_SIZE));
    }
    // The last one is counted a moment after it was let go.
    let deadline = Instant::now() + LONG;
    while mount.waits().count() < 3 && Instant::now() < deadline {
        thread::yield_now();
    }
    let waits = mount.waits();
    assert_eq!(waits.count(), 3, "{waits:?}");
    assert!(waits.sum() >= 3 * distance && waits.longest() >= distance, "{waits:?}");
    let status = mount.status();
    assert!(status.wait_p50_us >= 20_000 && status.wait_max_us >= status.wait_p99_us, "{status:?}");
}

#[test]
fn a_managed_mount_gets_all_of_it_whatever_the_size() {
    for bytes in [0, 1, 511, 4095, 4096, 4097, MIB - 1, MIB, 3 * MIB + 78] {
        let far = Arc::new(Far::new(bytes, Duration::ZERO));
        let mount = Mount::managed(Arc::clone(&far) as _, options()).unwrap();
        assert!(mount.wait_complete(LONG), "{:?}", mount.status());
        assert_eq!(peek(&mount, 0, bytes as usize), pattern(0, bytes as usize));
        assert!(mount.status().is_complete());
        assert!(far.reads.lock().unwrap().iter().all(|count| *count == 1), "each block once");
    }
}

#[test]
fn many_readers_and_the_pull_together_read_the_same_bytes() {
    let far = Arc::new(Far::new(32 * MIB + 5, Duration::from_millis(2)));
    let mount = Mount::managed(Arc::clone(&far) as _, options()).unwrap();
    thread::scope(|scope| {
        for seed in 1..9u64 {
            let mount = &mount;
            scope.spawn(move || {
                let mut random = seed;
                for _ in 0..300 {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let offset = (random >> 20) % (32 * MIB - 10_000);
                    let length = (random >> 50) as usize % 10_000 + 1;
                    let found = if random & 1024 == 0 {
                        peek(mount, offset, length)
                    } else {
                        let mut bytes = vec![0; length];
                        mount.read_at(offset, &mut bytes).unwrap();
                        bytes
                    };
                    assert_eq!(found, pattern(offset, length), "at {offset}");
                }
            });
        }
    });
    assert!(mount.wait_complete(LONG));
    assert!(far.reads.lock().unwrap().iter().all(|count| *count == 1), "each block once");
}

#[test]
fn a_walker_through_a_direct_mount_hardly_waits() {
    let walk = || {
        let far = Arc::new(Far::new(64 * MIB, Duration::from_millis(5)));
        let mount = Mount::direct(Arc::clone(&far) as _, options()).unwrap();
        for block in 0..64 * MIB / BLOCK {
            let found = peek(&mount, block * BLOCK, 16);
            assert_eq!(found, pattern(block * BLOCK, 16));
        }
        assert!(far.reads.lock().unwrap().iter().all(|count| *count == 1), "each block once");
        let status = mount.status();
        eprintln!("{status:?}");
        status.demands < 20 && status.ahead_bytes > 60 * MIB
    };
    // On a busy computer whoever reads ahead may have no turn for long.
    assert!((0..10).any(|_| walk()), "it waited in each of ten walks");
}

#[test]
fn a_far_demand_does_not_wait_for_the_background() {
    let took = || {
        let far = Arc::new(Far::new(64 * MIB, Duration::from_millis(30)));
        let mount = Mount::managed(Arc::clone(&far) as _, options()).unwrap();
        let began = Instant::now();
        assert_eq!(peek(&mount, 63 * MIB, 8), pattern(63 * MIB, 8));
        began.elapsed()
    };
    // The best of some: a busy computer is slow in the others.
    let quick = |took: &Duration| *took < Duration::from_millis(200);
    let times: Vec<_> = (0..10).map(|_| took()).collect();
    assert!(times.iter().any(quick), "took {times:?} with 64 MiB queued before it");
}

#[test]
fn what_was_to_come_first_is_here_when_the_mount_opens() {
    let far = Arc::new(Far::new(16 * MIB, Duration::from_millis(5)));
    let ranges = vec![5 * MIB..6 * MIB, 100..200];
    let first = PullFirst::Ranges(ranges);
    let mount = Mount::direct(Arc::clone(&far) as _, Options { pull_first: first, ..options() });
    let mount = mount.unwrap();
    let status = mount.status();
    assert_eq!((status.first_bytes, status.demands), (MIB + BLOCK, 0), "{status:?}");
    far.set(Mood::Broken);
    assert_eq!(peek(&mount, 5 * MIB, MIB as usize), pattern(5 * MIB, MIB as usize));
    assert_eq!(peek(&mount, 100, 100), pattern(100, 100));
}

#[test]
fn the_rest_comes_in_the_order_that_was_asked_for() {
    let far = Arc::new(Far::new(16 * MIB, Duration::ZERO));
    far.set(Mood::Silent);
    let order: Order = Arc::new(|offset| (offset / MIB) as i64);
    let asked = Options { order: Some(order), budget: MIB, ..options() };
    let mount = Mount::managed(Arc::clone(&far) as _, asked).unwrap();
    far.wait_for_read(15 * 256);
    let begun = far.reads.lock().unwrap().clone();
    assert!(begun[..14 * 256].iter().all(|count| *count == 0), "the last MiB goes first");
    far.set(Mood::Fine);
    assert!(mount.wait_complete(LONG));
    let first_bytes = PullFirst::Bytes(2 * MIB);
    let asked = Options { pull_first: first_bytes, order: mount_order(), ..options() };
    let far = Arc::new(Far::new(16 * MIB, Duration::ZERO));
    let mount = Mount::direct(Arc::clone(&far) as _, asked).unwrap();
    let reads = far.reads.lock().unwrap().clone();
    assert!(reads[14 * 256..].iter().all(|count| *count == 1), "the last two MiB");
    assert_eq!(mount.status().here_bytes, 2 * MIB);
}

fn mount_order() -> Option<Order> {
    Some(Arc::new(|offset| (offset / MIB) as i64))
}

#[test]
fn a_page_made_by_reading_the_descriptor_is_not_taken_for_content() {
    let far = Arc::new(Far::new(4 * MIB, Duration::ZERO));
    let mount = Mount::direct(Arc::clone(&far) as _, options()).unwrap();
    let other = SharedMap::new(mount.file(), mount.mapped_len(), true).unwrap();
    // SAFETY: inside the mapping; a read of a hole makes a page of zeros in the file.
    let stray = unsafe { other.base().as_ptr().add(50 * BLOCK_SIZE).read_volatile() };
    assert_eq!(stray, 0);
    assert_eq!(peek(&mount, 49 * BLOCK, 3 * BLOCK_SIZE), pattern(49 * BLOCK, 3 * BLOCK_SIZE));
    let mut bytes = vec![0; BLOCK_SIZE];
    mount.read_at(50 * BLOCK, &mut bytes).unwrap();
    assert_eq!(bytes, pattern(50 * BLOCK, BLOCK_SIZE));
}

#[test]
fn a_second_mapping_has_the_same_content_and_its_stores_are_seen() {
    let far = Arc::new(Far::new(8 * MIB, Duration::from_millis(1)));
    let mount = Mount::direct(Arc::clone(&far) as _, options()).unwrap();
    let other = SharedMap::new(mount.file(), mount.mapped_len(), true).unwrap();
    let device = File::options().read(true).write(true).open("/dev/userfaultfd").unwrap();
    mount
        .attach(Foreign {
            userfaultfd: sys::new_userfaultfd(&device).unwrap(),
            pid: std::process::id(),
            address: other.base().as_ptr() as u64,
        })
        .unwrap();
    let at = |offset: u64| {
        // SAFETY: inside the mapping.
        unsafe { other.base().as_ptr().add(offset as usize) }
    };
    for block in [7, 700, 1500] {
        // SAFETY: inside the mapping; waits for the content.
        assert_eq!(unsafe { at(block * BLOCK).read_volatile() }, pattern(block * BLOCK, 1)[0]);
        assert_eq!(peek(&mount, block * BLOCK, 64), pattern(block * BLOCK, 64));
    }
    mount.sync().unwrap();
    assert_eq!(far.writes.load(Ordering::Relaxed), 0, "reading dirties nothing");
    // SAFETY: as above.
    unsafe { at(700 * BLOCK + 5).write_volatile(99) };
    mount.sync().unwrap();
    assert_eq!(far.content.read().unwrap()[700 * BLOCK_SIZE + 5], 99);
    assert_eq!(far.written.load(Ordering::Relaxed), BLOCK, "one block was written");
    drop(mount);
}
