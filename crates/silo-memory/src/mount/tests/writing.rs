//! Writes: through the mapping and the library, before content arrives and after, and back.

use super::*;
use proptest::prelude::*;

#[test]
fn stores_reach_the_backend_once_and_durably() {
    let far = Arc::new(Far::new(8 * MIB + 100, Duration::ZERO));
    let mount = Mount::managed(Arc::clone(&far) as _, options()).unwrap();
    assert!(mount.wait_complete(LONG));
    mount.sync().unwrap();
    assert_eq!(far.writes.load(Ordering::Relaxed), 0, "nothing was written, nothing goes back");
    poke(&mount, 3 * BLOCK + 7, b"stored");
    poke(&mount, 8 * MIB + 90, b"0123456789");
    mount.sync().unwrap();
    let durable = far.durable.lock().unwrap().clone();
    assert_eq!(&durable[3 * BLOCK_SIZE + 7..][..6], b"stored");
    assert_eq!(&durable[8 * MIB as usize + 90..], b"0123456789");
    assert_eq!(far.written.load(Ordering::Relaxed), BLOCK + 100, "only what was written");
    mount.sync().unwrap();
    assert_eq!(far.written.load(Ordering::Relaxed), BLOCK + 100, "and once");
    assert_eq!(mount.status().dirty_bytes, 0);
}

#[test]
fn marks_of_read_ahead_are_not_taken_for_writes() {
    let far = Arc::new(Far::new(16 * MIB, Duration::ZERO));
    let mount = Mount::direct(Arc::clone(&far) as _, options()).unwrap();
    for block in 0..2000 {
        peek(&mount, block * BLOCK, 1);
    }
    assert!(mount.status().ahead_bytes > 0);
    // Pages that are being put in place during a scan count as written, to be safe.
    let deadline = Instant::now() + LONG;
    while !mount.shared.lock().table.is_at_rest() {
        assert!(Instant::now() < deadline, "read-ahead does not end: {:?}", mount.status());
        thread::yield_now();
    }
    mount.shared.scan().unwrap();
    let dirty = mount.shared.lock().table.dirty().clone();
    assert!(dirty.is_empty(), "{:?}", dirty.ranges().collect::<Vec<_>>());
    mount.sync().unwrap();
    assert_eq!(far.writes.load(Ordering::Relaxed), 0);
}

#[test]
fn write_back_goes_by_itself_at_the_interval() {
    let far = Arc::new(Far::new(MIB, Duration::ZERO));
    let interval = Some(Duration::from_millis(20));
    let mount = Mount::direct(Arc::clone(&far) as _, Options { write_back: interval, ..options() });
    let mount = mount.unwrap();
    poke(&mount, 5000, b"by itself");
    let deadline = Instant::now() + LONG;
    while &far.content.read().unwrap()[5000..5009] != b"by itself" {
        assert!(Instant::now() < deadline, "never written back: {:?}", mount.status());
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn check_08_a_whole_block_written_before_it_arrives_is_never_overwritten() {
    let far = Arc::new(Far::new(4 * MIB, Duration::ZERO));
    far.set(Mood::Silent);
    let mount = Mount::managed(Arc::clone(&far) as _, options()).unwrap();
    far.wait_for_read(0);
    // Under way, and not asked for yet: neither write waits for the backend.
    let local = vec![0xee; 3 * BLOCK_SIZE];
    mount.write_at(0, &local).unwrap();
    mount.write_at(900 * BLOCK, &local).unwrap();
    assert_eq!(peek(&mount, 0, local.len()), local);
    far.set(Mood::Fine);
    assert!(mount.wait_complete(LONG));
    assert_eq!(peek(&mount, 0, local.len()), local);
    assert_eq!(peek(&mount, 900 * BLOCK, local.len()), local);
    assert_eq!(peek(&mount, 3 * BLOCK, BLOCK_SIZE), pattern(3 * BLOCK, BLOCK_SIZE));
    mount.sync().unwrap();
    assert_eq!(far.durable.lock().unwrap()[..local.len()], local);
    assert_eq!(mount.status().local_bytes, 6 * BLOCK);
}

#[test]
fn check_09_a_partial_write_before_arrival_waits_merges_and_raises_the_demand() {
    let far = Arc::new(Far::new(4 * MIB, Duration::from_millis(5)));
    let mount = Mount::direct(Arc::clone(&far) as _, options()).unwrap();
    far.set(Mood::Silent);
    let mut expected = pattern(0, 4 * MIB as usize);
    expected[10 * BLOCK_SIZE + 100..][..7].copy_from_slice(b"library");
    expected[20 * BLOCK_SIZE + 100..][..7].copy_from_slice(b"mapping");
    // From the middle of one block to the middle of another, over a whole one.
    let long = vec![0x77; 2 * BLOCK_SIZE];
    expected[30 * BLOCK_SIZE + 2000..][..long.len()].copy_from_slice(&long);
    thread::scope(|scope| {
        scope.spawn(|| mount.write_at(10 * BLOCK + 100, b"library").unwrap());
        scope.spawn(|| poke(&mount, 20 * BLOCK + 100, b"mapping"));
        scope.spawn(|| mount.write_at(30 * BLOCK + 2000, &long).unwrap());
        [10, 20, 30].into_iter().for_each(|block| far.wait_for_read(block));
        far.set(Mood::Fine);
    });
    for block in [10, 20, 30, 31, 32] {
        let at = block as usize * BLOCK_SIZE;
        assert_eq!(peek(&mount, block * BLOCK, BLOCK_SIZE), expected[at..at + BLOCK_SIZE]);
    }
    mount.sync().unwrap();
    assert!(*far.durable.lock().unwrap() == expected, "merged in the backend, too");
    assert_eq!(far.reads.lock().unwrap()[31], 0, "a block that is written whole is not fetched");
}

#[test]
fn a_failed_write_back_and_a_failed_flush_lose_nothing() {
    let far = Arc::new(Far::new(MIB, Duration::ZERO));
    let mount = Mount::direct(Arc::clone(&far) as _, options()).unwrap();
    poke(&mount, 100, b"mapped");
    mount.write_at(50_000, b"written").unwrap();
    far.set(Mood::Broken);
    let error = mount.sync().unwrap_err().to_string();
    assert!(error.contains("not known to be durable") && error.contains("broken"), "{error}");
    assert!(mount.status().dirty_bytes >= 2 * BLOCK);
    far.set(Mood::Fine);
    far.flush_fails.store(true, Ordering::Relaxed);
    assert!(mount.sync().is_err());
    // Nobody knows what became of what was written before a flush that failed.
    *far.content.write().unwrap() = pattern(0, MIB as usize);
    far.flush_fails.store(false, Ordering::Relaxed);
    mount.sync().unwrap();
    let durable = far.durable.lock().unwrap();
    assert_eq!(&durable[100..106], b"mapped");
    assert_eq!(&durable[50_000..50_007], b"written");
}

#[test]
fn beyond_the_limit_a_writer_is_slowed_and_not_failed() {
    let far = Arc::new(Far::new(16 * MIB, Duration::from_millis(10)));
    let limit = Options { dirty_limit: 2 * MIB, ..options() };
    let mount = Mount::direct(Arc::clone(&far) as _, limit).unwrap();
    let data = vec![5; MIB as usize];
    for number in 0..16 {
        mount.write_at(number * MIB, &data).unwrap();
        assert!(mount.status().dirty_bytes <= 4 * MIB, "{:?}", mount.status());
    }
    mount.sync().unwrap();
    assert!(far.durable.lock().unwrap().iter().all(|byte| *byte == 5));
    assert!(far.reads.lock().unwrap().iter().all(|count| *count == 0), "nothing was fetched");
}

#[test]
fn a_read_only_mount_refuses_writes_by_name_and_never_writes() {
    let far = Arc::new(Far { read_only: true, ..Far::new(MIB, Duration::ZERO) });
    let mount = Mount::managed(Arc::clone(&far) as _, options()).unwrap();
    let refused = mount.write_at(0, b"no").unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
    assert!(refused.to_string().contains("\"far\" is read-only"), "{refused}");
    assert!(mount.zero(0, 4096, false).is_err() && mount.trim(0, 4096).is_err());
    assert_eq!(peek(&mount, 12_345, 10), pattern(12_345, 10));
    mount.sync().unwrap();
    mount.close().unwrap();
    assert_eq!(far.writes.load(Ordering::Relaxed), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, usize),
    Poke(u64, usize),
    Zero(u64, u64),
    Trim(u64, u64),
    Read(u64, usize),
    Peek(u64, usize),
    Sync,
}

const SIZE: u64 = 40 * BLOCK + 1000;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let at = 0..SIZE;
    let length = prop_oneof![1u64..100, 4000u64..5000, 1u64..20_000];
    let step = (0u8..7, at, length).prop_map(|(kind, at, length)| {
        let length = length.min(SIZE - at);
        match kind {
            0 => Step::Write(at, length as usize),
            1 => Step::Poke(at, length as usize),
            2 => Step::Zero(at, length),
            3 => Step::Trim(at, length),
            4 => Step::Read(at, length as usize),
            5 => Step::Peek(at, length as usize),
            _ => Step::Sync,
        }
    });
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is done in whatever order, through whichever way in, a mount reads as the device
    /// would, and so does the device after a flush.
    #[test]
    fn a_mount_behaves_like_the_device_it_stands_for(steps in steps(), managed in any::<bool>()) {
        let far = Arc::new(Far::new(SIZE, Duration::ZERO));
        let open = if managed { Mount::managed } else { Mount::direct };
        let mount = open(Arc::clone(&far) as _, options()).unwrap();
        let mut model = pattern(0, SIZE as usize);
        for (number, step) in steps.iter().enumerate() {
            let fill = vec![number as u8 | 128; SIZE as usize];
            match *step {
                Step::Write(at, length) => {
                    mount.write_at(at, &fill[..length]).unwrap();
                    model[at as usize..][..length].fill(fill[0]);
                }
                Step::Poke(at, length) => {
                    poke(&mount, at, &fill[..length]);
                    model[at as usize..][..length].fill(fill[0]);
                }
                Step::Zero(at, length) => {
                    mount.zero(at, length, false).unwrap();
                    model[at as usize..][..length as usize].fill(0);
                }
                Step::Trim(at, length) => {
                    mount.trim(at, length).unwrap();
                    // Whole blocks read as zeros here, the last short one as well.
                    let first = at.div_ceil(BLOCK);
                    let end = at + length;
                    let last = if end == SIZE { SIZE } else { end / BLOCK * BLOCK };
                    if first * BLOCK < last {
                        model[(first * BLOCK) as usize..last as usize].fill(0);
                    }
                }
                Step::Read(at, length) => {
                    let mut found = vec![0; length];
                    mount.read_at(at, &mut found).unwrap();
                    prop_assert_eq!(&found[..], &model[at as usize..][..length]);
                }
                Step::Peek(at, length) => {
                    prop_assert_eq!(&peek(&mount, at, length)[..], &model[at as usize..][..length]);
                }
                Step::Sync => {
                    mount.sync().unwrap();
                    prop_assert!(*far.durable.lock().unwrap() == model);
                }
            }
        }
        mount.close().unwrap();
        prop_assert!(*far.durable.lock().unwrap() == model, "closing writes back, too");
    }
}

/// What the process that maps a mount is started with.
const MAPS: &str = "SILO_MOUNT_TEST_MAPS";

/// Not a test by itself: maps the file that it is told, and stores in it when it is told.
#[test]
fn another_process_maps_and_stores() {
    let Some(file) = std::env::var_os(MAPS) else { return };
    let file = File::options().read(true).write(true).open(file).unwrap();
    let map = SharedMap::new(&file, MIB as usize, true).unwrap();
    let device = File::options().read(true).write(true).open("/dev/userfaultfd").unwrap();
    let userfaultfd = sys::new_userfaultfd(&device).unwrap();
    use std::os::fd::AsRawFd;
    println!("\nmapped {} {}", map.base().as_ptr() as u64, userfaultfd.as_raw_fd());
    io::stdin().read_line(&mut String::new()).unwrap();
    // SAFETY: inside the mapping.
    unsafe { map.base().as_ptr().add(7 * BLOCK_SIZE).write_volatile(99) };
}

#[test]
fn what_a_process_stored_before_it_ended_reaches_the_backend() {
    use std::{
        io::{BufRead, BufReader, Write},
        os::fd::{AsRawFd, FromRawFd, OwnedFd},
        process::{Command, Stdio},
    };
    let far = Arc::new(Far::new(MIB, Duration::ZERO));
    let mount = Mount::managed(Arc::clone(&far) as _, options()).unwrap();
    assert!(mount.wait_complete(LONG));
    let path = format!("/proc/{}/fd/{}", std::process::id(), mount.file().as_raw_fd());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "mount::tests::writing::another_process_maps_and_stores", "--nocapture"])
        .env(MAPS, path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let said = lines.find(|line| line.starts_with("mapped ")).unwrap();
    let mut words = said.split(' ').skip(1).map(|word| word.parse::<u64>().unwrap());
    let (address, fd) = (words.next().unwrap(), words.next().unwrap());
    let pid = child.id();
    // SAFETY: both calls take numbers and give new descriptors, which nobody else has.
    let userfaultfd = unsafe {
        let process = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        assert!(process >= 0, "{}", io::Error::last_os_error());
        let process = OwnedFd::from_raw_fd(process as i32);
        let fd = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0);
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as i32)
    };
    mount.attach(Foreign { userfaultfd, pid, address }).unwrap();
    mount.sync().unwrap();
    assert_eq!(far.written.load(Ordering::Relaxed), 0);
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    // To its end: the child has ended, and what it says finds a reader until then.
    lines.for_each(drop);
    assert!(child.wait().unwrap().success());
    mount.sync().unwrap();
    assert_eq!(far.durable.lock().unwrap()[7 * BLOCK_SIZE], 99);
    let written = far.written.load(Ordering::Relaxed);
    mount.sync().unwrap();
    assert_eq!(far.written.load(Ordering::Relaxed), written, "once");
}
