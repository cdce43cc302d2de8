//! Backends that fail, hang or go away, and mounts that close under their users.

use super::*;
use std::os::fd::AsRawFd;

/// Touches a block the way a system call does, which reports EFAULT where a thread gets SIGBUS.
fn touch(mount: &Mount, block: u64) -> io::Result<()> {
    let sink = sys::memfd("sink", BLOCK).unwrap();
    // SAFETY: the address is inside the mapping; the kernel checks it while copying.
    let written = unsafe {
        libc::pwrite(
            sink.as_raw_fd(),
            mount.address().as_ptr().add(block as usize * BLOCK_SIZE).cast(),
            16,
            0,
        )
    };
    if written == 16 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[test]
fn an_access_waits_out_a_short_failure() {
    let far = Arc::new(Far::new(MIB, Duration::ZERO));
    let mount = Mount::direct(Arc::clone(&far) as _, options()).unwrap();
    far.set(Mood::Broken);
    thread::scope(|scope| {
        let reader = scope.spawn(|| peek(&mount, 5 * BLOCK, 100));
        let deadline = Instant::now() + LONG;
        while mount.status().errors < 3 {
            assert!(Instant::now() < deadline, "{:?}", mount.status());
            thread::yield_now();
        }
        far.set(Mood::Fine);
        assert_eq!(reader.join().unwrap(), pattern(5 * BLOCK, 100));
    });
    let error = mount.status().last_error.unwrap();
    assert!(error.contains("reading 4096 bytes at 20480: the far end is broken"), "{error}");
}

#[test]
fn check_17_a_dead_backend_ends_accesses_within_the_deadline_and_healing_is_seen() {
    for mood in [Mood::Broken, Mood::Silent] {
        let far = Arc::new(Far::new(MIB, Duration::ZERO));
        let soon = Options { deadline: Duration::from_secs(1), ..options() };
        let mount = Mount::direct(Arc::clone(&far) as _, soon).unwrap();
        far.set(mood);
        let began = Instant::now();
        let error = touch(&mount, 7).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "where a thread gets SIGBUS");
        let error = mount.read_at(9 * BLOCK, &mut [0; 100]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("block 9 did not come within"), "{error}");
        let took = began.elapsed();
        assert!(took < LONG, "{took:?} for two deadlines of 1 s");
        assert!(mount.status().failed_bytes > 0);
        far.set(Mood::Fine);
        let mut bytes = vec![0; BLOCK_SIZE];
        // The request that hangs may still be the one that is answered.
        mount.read_at(7 * BLOCK, &mut bytes).unwrap();
        assert_eq!(bytes, pattern(7 * BLOCK, BLOCK_SIZE));
        touch(&mount, 7).expect("content that came after all heals the page");
        assert_eq!(peek(&mount, 9 * BLOCK, 10), pattern(9 * BLOCK, 10));
    }
}

#[test]
fn the_background_rests_after_errors_and_goes_on_when_they_end() {
    let far = Arc::new(Far::new(8 * MIB, Duration::ZERO));
    far.set(Mood::Broken);
    let mount = Mount::managed(Arc::clone(&far) as _, options()).unwrap();
    let deadline = Instant::now() + LONG;
    while mount.status().errors < 3 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    let errors = mount.status().errors;
    assert!((3..1000).contains(&errors), "{errors} errors: it rests in between");
    // An access in the meantime waits, and is served.
    thread::scope(|scope| {
        let reader = scope.spawn(|| peek(&mount, 8 * MIB - 100, 100));
        thread::sleep(Duration::from_millis(5));
        far.set(Mood::Fine);
        assert_eq!(reader.join().unwrap(), pattern(8 * MIB - 100, 100));
    });
    assert!(mount.wait_complete(LONG), "{:?}", mount.status());
}

#[test]
fn what_cannot_come_first_is_a_named_error() {
    let far = Arc::new(Far::new(MIB, Duration::ZERO));
    far.set(Mood::Broken);
    let first = PullFirst::Bytes(10_000);
    let soon = Duration::from_millis(200);
    let asked = Options { pull_first: first, deadline: soon, ..options() };
    let error = Mount::managed(Arc::clone(&far) as _, asked).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("\"far\"") && text.contains("12288 bytes"), "{text}");
    assert!(text.contains("the far end is broken"), "{text}");
}

#[test]
fn check_39_closing_during_accesses_ends_them_within_a_second() {
    let far = Arc::new(Far::new(64 * MIB, Duration::ZERO));
    let mount = Mount::managed(Arc::clone(&far) as _, options()).unwrap();
    assert!(mount.wait_complete(LONG));
    drop(mount);
    let mount = Mount::direct(Arc::clone(&far) as _, options()).unwrap();
    mount.write_at(40 * MIB, &[7; BLOCK_SIZE]).unwrap();
    far.set(Mood::Silent);
    thread::scope(|scope| {
        let mapped: Vec<_> = (0..4)
            .map(|n| {
                scope.spawn({
                    let mount = &mount;
                    move || touch(mount, n)
                })
            })
            .collect();
        let library: Vec<_> = (10..14)
            .map(|n| {
                scope.spawn({
                    let mount = &mount;
                    move || mount.read_at(n * BLOCK, &mut [0; 8])
                })
            })
            .collect();
        (0..4).chain(10..14).for_each(|block| far.wait_for_read(block));
        // Write-back is possible, the reads hang.
        let closing = Instant::now();
        let closer = scope.spawn(|| mount.close());
        for reader in mapped {
            assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EFAULT));
        }
        for reader in library {
            let error = reader.join().unwrap().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotConnected);
        }
        let took = closing.elapsed();
        assert!(took < LONG / 2, "pending accesses ended after {took:?}");
        far.set(Mood::Fine);
        closer.join().unwrap().unwrap();
    });
    assert_eq!(far.durable.lock().unwrap()[40 * MIB as usize], 7, "what was written is durable");
    // What is here stays readable, nothing else reads as zeros.
    assert_eq!(peek(&mount, 40 * MIB, 4), [7; 4]);
    assert!(touch(&mount, 9000).is_err());
    assert!(mount.read_at(9001 * BLOCK, &mut [0; 8]).is_err());
    assert!(mount.write_at(0, &[0; BLOCK_SIZE]).is_err(), "nothing is taken and then lost");
}

#[test]
fn closing_with_a_backend_that_hangs_ends_and_says_what_is_not_durable() {
    let far = Arc::new(Far::new(MIB, Duration::ZERO));
    let soon = Options { close_deadline: Duration::from_millis(200), ..options() };
    let mount = Mount::direct(Arc::clone(&far) as _, soon).unwrap();
    mount.write_at(0, &[7; 3 * BLOCK_SIZE]).unwrap();
    far.set(Mood::Silent);
    let began = Instant::now();
    let error = mount.close().unwrap_err().to_string();
    assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
    assert!(error.contains("12288 bytes that were written here"), "{error}");
    far.set(Mood::Fine);
}

/// Waits until no thread of a mount that was dropped holds its backend any more.
fn wait_until_alone(far: &Arc<Far>) {
    let deadline = Instant::now() + LONG;
    while Arc::strong_count(far) > 1 {
        assert!(Instant::now() < deadline, "threads of the mount are left");
        thread::yield_now();
    }
}

#[test]
fn dropping_does_not_wait_for_a_write_that_the_backend_holds_for_good() {
    let far = Arc::new(Far::new(MIB, Duration::ZERO));
    let soon = Options {
        close_deadline: Duration::from_millis(100),
        write_back: Some(Duration::from_millis(1)),
        ..options()
    };
    let mount = Mount::direct(Arc::clone(&far) as _, soon).unwrap();
    far.set(Mood::Deaf);
    mount.write_at(0, &[7; BLOCK_SIZE]).unwrap();
    let deadline = Instant::now() + LONG;
    while far.writes_begun.load(Ordering::Relaxed) == 0 {
        assert!(Instant::now() < deadline, "nothing is written back");
        thread::yield_now();
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    let dropping = thread::spawn(move || {
        drop(mount);
        sender.send(()).unwrap();
    });
    let dropped = receiver.recv_timeout(LONG);
    far.set(Mood::Fine);
    dropping.join().unwrap();
    dropped.expect("dropping ends though the backend does not");
    wait_until_alone(&far);
}

#[test]
fn a_closed_mount_begins_no_more_writes() {
    let far = Arc::new(Far::new(MIB, Duration::ZERO));
    let soon = Options { close_deadline: Duration::from_millis(100), ..options() };
    let mount = Mount::direct(Arc::clone(&far) as _, soon).unwrap();
    (0..100).for_each(|n| mount.write_at(2 * n * BLOCK, &[7; BLOCK_SIZE]).unwrap());
    far.set(Mood::Deaf);
    mount.close().unwrap_err();
    // Whoever opens the device next writes there, too.
    let begun = far.writes_begun.load(Ordering::Relaxed);
    assert!(begun < 100, "{begun} were under way");
    far.set(Mood::Fine);
    drop(mount);
    wait_until_alone(&far);
    assert_eq!(far.writes_begun.load(Ordering::Relaxed), begun);
}

/// The kernel gives a new mapping the addresses of the one that has just gone, and copies to them
/// for whoever has any userfaultfd.
#[test]
fn late_content_of_a_mount_that_is_gone_does_not_land_in_the_next_one() {
    const BYTES: u64 = 64 * MIB;
    let other = Arc::new(Far::new(BYTES, Duration::ZERO));
    other.content.write().unwrap().fill(0xee);
    for _ in 0..20 {
        let far = Arc::new(Far::new(BYTES, Duration::ZERO));
        let mount = Mount::direct(Arc::clone(&far) as _, options()).unwrap();
        far.set(Mood::Deaf);
        thread::scope(|scope| {
            let reader = scope.spawn(|| mount.read_at(5 * BLOCK, &mut [0; 8]));
            far.wait_for_read(5);
            mount.close().unwrap();
            reader.join().unwrap().unwrap_err();
        });
        let address = mount.address();
        drop(mount);
        let next = Mount::direct(Arc::clone(&other) as _, options()).unwrap();
        let same = next.address() == address;
        far.set(Mood::Fine);
        wait_until_alone(&far);
        assert_eq!(peek(&next, 5 * BLOCK, 64), [0xee; 64]);
        if same {
            return;
        }
    }
    panic!("the next mapping never lay where the last one had been");
}

/// In a process of its own, because the signal ends it.
#[test]
fn a_thread_that_touches_what_cannot_be_had_gets_sigbus() {
    const ROLE: &str = "SILO_MOUNT_TEST_TOUCHES_A_DEAD_BACKEND";
    if std::env::var_os(ROLE).is_some() {
        let far = Arc::new(Far::new(MIB, Duration::ZERO));
        let soon = Options { deadline: Duration::from_millis(100), ..options() };
        let mount = Mount::direct(Arc::clone(&far) as _, soon).unwrap();
        far.set(Mood::Broken);
        std::hint::black_box(peek(&mount, 0, 1));
        return;
    }
    use std::os::unix::process::ExitStatusExt;
    let name = "mount::tests::failing::a_thread_that_touches_what_cannot_be_had_gets_sigbus";
    let run = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name])
        .env(ROLE, "1")
        .output()
        .unwrap();
    assert_eq!(run.status.signal(), Some(libc::SIGBUS), "{run:?}");
}
