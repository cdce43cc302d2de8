//! Through the kernel: these tests mount, so they need /dev/fuse and root (or fusermount3).

use super::{Caching, FuseError, FuseMount, FuseOptions};
use crate::test_devices::{Gated, LIMIT, Plain};
use silo_block::io::BlockDevice;
use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

const SIZE: u64 = 4 << 20;

fn mount(dir: &Path, device: Arc<dyn BlockDevice>, options: &FuseOptions) -> FuseMount {
    FuseMount::mount(dir, "disk", device, options).unwrap()
}

fn open(mount: &FuseMount) -> File {
    File::options().read(true).write(true).open(mount.path()).unwrap()
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn fallocate(file: &File, mode: i32, offset: u64, length: u64) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the call takes no pointers.
    let done = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, length as i64) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// Random reads, writes, holes and syncs by several threads, each in a part of its own.
fn exercise(file: &File, part: u64, length: u64, seed: u64) {
    let (mut state, start) = (seed | 1, part * length);
    let mut model = vec![0u8; length as usize];
    for step in 0..400 {
        let count = random(&mut state) % 100_000 + 1;
        let at = random(&mut state) % (length - count);
        let range = at as usize..(at + count) as usize;
        match random(&mut state) % 10 {
            0..4 => {
                let mut got = vec![0; count as usize];
                file.read_exact_at(&mut got, start + at).unwrap();
                assert!(got == model[range], "step {step}: {count} bytes at {at} differ");
            }
            4..8 => {
                let byte = random(&mut state) as u8;
                let data: Vec<u8> =
                    (0..count).map(|at| byte.wrapping_add((at % 251) as u8)).collect();
                file.write_all_at(&data, start + at).unwrap();
                model[range].copy_from_slice(&data);
            }
            8 => {
                let mode = if count.is_multiple_of(2) { PUNCH } else { libc::FALLOC_FL_ZERO_RANGE };
                fallocate(file, mode, start + at, count).unwrap();
                model[range].fill(0);
            }
            _ => file.sync_data().unwrap(),
        }
    }
    let mut got = vec![0; length as usize];
    file.read_exact_at(&mut got, start).unwrap();
    assert!(got == model);
}

#[test]
fn random_work_leaves_what_a_model_says_however_the_kernel_caches() {
    for caching in [Caching::WriteThrough, Caching::WriteBack, Caching::None] {
        let dir = tempfile::tempdir().unwrap();
        let device = Plain::new(SIZE, false);
        let options = FuseOptions { caching, ..FuseOptions::default() };
        let mount = mount(dir.path(), device.clone(), &options);
        let file = open(&mount);
        thread::scope(|scope| {
            for part in 0..3 {
                let file = &file;
                scope.spawn(move || exercise(file, part, 1 << 20, part + 77));
            }
        });
        let mut through = vec![0; SIZE as usize];
        file.read_exact_at(&mut through, 0).unwrap();
        drop(file);
        mount.stop(LIMIT).unwrap();
        let mut below = vec![0; SIZE as usize];
        device.file().read_exact_at(&mut below, 0).unwrap();
        assert!(through == below, "{caching:?}: all of it is on the device after an unmount");
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none(), "nothing is mounted any more");
    }
}

#[test]
fn check_25_fsync_through_the_file_makes_writes_durable_and_its_failure_is_seen() {
    let (dir, device) = (tempfile::tempdir().unwrap(), Gated::new(true));
    let mount = mount(dir.path(), device.clone(), &FuseOptions::default());
    let file = open(&mount);
    file.write_all_at(&[7; 4096], 8192).unwrap();
    assert_eq!(device.now()[8192], 7, "handed over at once");
    assert_eq!(device.durable()[8192], 0, "not asked for yet");
    file.sync_all().unwrap();
    assert_eq!(device.durable()[8192..12288], [7; 4096]);
    let synced =
        File::options().write(true).custom_flags(libc::O_DSYNC).open(mount.path()).unwrap();
    synced.write_all_at(&[8; 512], 0).unwrap();
    assert_eq!(device.durable()[..512], [8; 512]);
    device.fail_flushes(true);
    assert_eq!(file.sync_data().unwrap_err().raw_os_error(), Some(libc::EIO));
    device.fail_flushes(false);
    file.sync_data().unwrap();
    drop((file, synced));
    mount.stop(LIMIT).unwrap();
}

#[test]
fn the_file_is_as_long_as_the_device_and_stays_so() {
    let dir = tempfile::tempdir().unwrap();
    let device = Plain::new(SIZE + 1000, false);
    let mount = mount(dir.path(), device.clone(), &FuseOptions::default());
    let file = open(&mount);
    let metadata = fs::metadata(mount.path()).unwrap();
    assert_eq!((metadata.len(), metadata.mode()), (SIZE + 1000, 0o100_600));
    assert_eq!(metadata.blocks(), (SIZE + 1000).div_ceil(512));
    let names: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["disk"]);
    let facts = nix::sys::statvfs::statvfs(dir.path()).unwrap();
    assert_eq!((facts.blocks(), facts.blocks_available()), ((SIZE + 1000).div_ceil(4096), 0));

    let mut buffer = [1; 2000];
    assert_eq!(file.read_at(&mut buffer, SIZE).unwrap(), 1000, "short at the end");
    assert_eq!(file.read_at(&mut buffer, SIZE + 1000).unwrap(), 0);
    assert_eq!(file.write_at(&buffer, SIZE).unwrap(), 1000);
    let beyond = file.write_at(&buffer, SIZE + 1000).unwrap_err();
    assert_eq!(beyond.kind(), ErrorKind::StorageFull);
    for size in [0, SIZE, SIZE + 1001] {
        assert_eq!(file.set_len(size).unwrap_err().raw_os_error(), Some(libc::EPERM), "{size}");
    }
    file.set_len(SIZE + 1000).unwrap();
    assert!(fallocate(&file, libc::FALLOC_FL_ZERO_RANGE, SIZE, 5000).is_err());
    assert!(fs::remove_file(mount.path()).is_err() && fs::write(dir.path().join("x"), "").is_err());
    assert!(fs::rename(mount.path(), dir.path().join("other")).is_err());
    assert_eq!(fs::metadata(mount.path()).unwrap().len(), SIZE + 1000);

    // Where there is data and where not: this device says that it is data throughout.
    // SAFETY: the descriptor is open, and the call takes no pointers.
    let seek = |at, whence| unsafe { libc::lseek(file.as_raw_fd(), at, whence) };
    assert_eq!(seek(0, libc::SEEK_DATA), 0);
    assert_eq!(seek(5, libc::SEEK_HOLE), SIZE as i64 + 1000);
    drop(file);
    mount.stop(LIMIT).unwrap();
    assert_eq!(device.flushes(), 0, "nobody asked for one");
}

#[test]
fn a_read_only_mount_is_read_and_never_written() {
    let dir = tempfile::tempdir().unwrap();
    let device = Plain::new(SIZE, false);
    device.file().write_all_at(b"as it was", 0).unwrap();
    let options = FuseOptions { read_only: true, ..FuseOptions::default() };
    let mount = mount(dir.path(), device, &options);
    assert!(File::options().write(true).open(mount.path()).is_err());
    assert_eq!(&fs::read(mount.path()).unwrap()[..9], b"as it was");
    mount.stop(LIMIT).unwrap();
}

#[test]
fn a_read_that_waits_for_a_block_holds_up_none_of_the_others() {
    let (dir, device) = (tempfile::tempdir().unwrap(), Gated::new(false));
    let options = FuseOptions { caching: Caching::None, ..FuseOptions::default() };
    let mount = mount(dir.path(), device.clone(), &options);
    let file = open(&mount);
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..10)
            .map(|block| {
                let file = &file;
                scope.spawn(move || file.read_exact_at(&mut [0; 512], block * 4096))
            })
            .collect();
        device.await_waiting(10);
        for block in 0..50 {
            file.read_exact_at(&mut [0; 4096], (512 << 10) + block * 4096).unwrap();
        }
        assert!(waiting.iter().all(|thread| !thread.is_finished()));
        device.set_open(true);
        waiting.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
    });
    drop(file);
    mount.stop(LIMIT).unwrap();
}

#[test]
fn check_39_stopping_a_mount_in_use_ends_its_requests_and_says_so() {
    let (dir, device) = (tempfile::tempdir().unwrap(), Gated::new(false));
    let options = FuseOptions { caching: Caching::None, ..FuseOptions::default() };
    let mount = mount(dir.path(), device.clone(), &options);
    let file = open(&mount);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| file.read_exact_at(&mut [0; 512], 0));
        device.await_waiting(1);
        let began = Instant::now();
        let error = mount.stop(Duration::from_millis(100)).unwrap_err();
        assert!(matches!(error, FuseError::InUse { .. }), "{error}");
        assert!(began.elapsed() < LIMIT);
        assert_eq!(waiting.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    });
    let late = file.read_exact_at(&mut [0; 512], 600 << 10).unwrap_err();
    assert_eq!(late.raw_os_error(), Some(libc::ENODEV), "the device is out of reach");
    assert!(fs::read_dir(dir.path()).unwrap().next().is_none(), "the mount is out of sight");
}

#[test]
fn a_mount_that_cannot_be_is_refused_with_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let try_mount = |at: &Path, name: &str| {
        FuseMount::mount(at, name, Plain::new(SIZE, false), &FuseOptions::default())
            .err()
            .expect("it is refused")
    };
    for name in ["", ".", "..", "a/b", &"x".repeat(256)] {
        assert!(matches!(try_mount(dir.path(), name), FuseError::Name { .. }), "{name}");
    }
    let error = try_mount(&dir.path().join("nowhere"), "disk").to_string();
    assert!(error.contains("nowhere") && error.contains("No such file"), "{error}");

    // Without the kernel's device: in a mount namespace whose /dev is empty.
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", "mount -t tmpfs none /dev && exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args(["fuse::tests::without_the_device", "--exact", "--ignored", "--nocapture"])
        .env("SILO_TEST_AT", dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("modprobe fuse"), "{output:?}");
}

/// Not a test: what the one above runs in its namespace.
#[test]
#[ignore = "a part of another test"]
fn without_the_device() {
    let Some(at) = std::env::var_os("SILO_TEST_AT") else { return };
    let device = Plain::new(SIZE, false);
    let error = FuseMount::mount(Path::new(&at), "disk", device, &FuseOptions::default());
    let error = error.err().expect("there is no /dev/fuse");
    assert!(matches!(error, FuseError::NoFuse { .. }));
    println!("{error}");
}
