//! Copies of a machine over one file, against the running kernel.

use super::*;

fn name() -> DeviceName {
    DeviceName::new("memory").unwrap()
}

/// A file in which the first blocks have content, each its own, and the rest are holes.
fn base(blocks: u64) -> File {
    let file = File::from(sys::memfd("base", BLOCKS * BLOCK_SIZE as u64).unwrap());
    for block in 0..blocks {
        file.write_all_at(&[block as u8 + 1; BLOCK_SIZE], block * BLOCK_SIZE as u64).unwrap();
    }
    file
}

fn copy(file: &File) -> Guest {
    let memory = Memory::copy_of(name(), file.try_clone().unwrap()).unwrap();
    Guest::over(Arc::new(memory), false)
}

fn content(memory: &Memory, block: u64) -> u8 {
    let mut bytes = [0; BLOCK_SIZE];
    memory.read(BlockIndex(block), &mut bytes).unwrap();
    bytes[0]
}

fn allocated_bytes(file: &File) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512
}

#[test]
fn copies_share_what_they_only_read_and_see_nothing_of_what_another_writes() {
    let file = base(200);
    seal_content(&file).unwrap();
    file.write_all_at(&[9], 0).unwrap_err();
    let (one, two) = (copy(&file), copy(&file));
    for block in 0..100 {
        one.write(block, 70);
    }
    two.write(50, 80);
    // Never in the file.
    two.write(3000, 81);
    assert_eq!((one.read(50), two.read(50), two.read(60)), (70, 80, 61));

    assert_eq!(one.memory.take_dirty().unwrap(), set(0..100));
    assert_eq!(two.memory.take_dirty().unwrap(), set([50, 3000]));
    for (guest, own) in [(&one, 100), (&two, 2)] {
        assert_eq!(guest.memory.resident_bytes(), own * BLOCK_SIZE as u64);
        for block in [0, 49, 50, 51, 99, 100, 199] {
            assert_eq!(content(&guest.memory, block), guest.read(block), "block {block}");
        }
    }
    assert_eq!((content(&one.memory, 3000), content(&two.memory, 3000)), (0, 81));
    // A range of both kinds.
    let mut bytes = vec![0; 3 * BLOCK_SIZE];
    two.memory.read(BlockIndex(49), &mut bytes).unwrap();
    assert_eq!(bytes.chunks(BLOCK_SIZE).map(|b| b[0]).collect::<Vec<_>>(), [50, 80, 52]);
    assert_eq!(allocated_bytes(&file), 201 * BLOCK_SIZE as u64, "and the one page for block 3000");
}

#[test]
fn a_copy_tells_what_it_has_at_any_time_and_the_move_is_told_the_same_again() {
    let file = base(10);
    seal_content(&file).unwrap();
    let guest = copy(&file);
    guest.write(5, 1);
    guest.write(500, 1);
    let mut expected = set(0..10);
    expected.insert(BlockIndex(500));
    assert_eq!(guest.memory.allocated().unwrap(), expected);
    assert_eq!(guest.memory.take_dirty().unwrap(), set([5, 500]));
    guest.memory.start_tracking().unwrap();
    assert_eq!(guest.memory.take_dirty().unwrap(), set([]));
    // What was written before tracking began for the move is still read from the right place.
    guest.write(6, 9);
    guest.memory.start_tracking().unwrap();
    assert_eq!((content(&guest.memory, 6), content(&guest.memory, 5)), (9, 1));
    let watcher = guest.memory.watch().unwrap();
    guest.write(7, 3);
    assert_eq!(watcher.take().unwrap(), set([7]));
    assert_eq!(content(&guest.memory, 7), 3);
}

#[test]
fn a_copy_that_another_process_had_is_read_from_its_monitor() {
    let file = base(10);
    seal_content(&file).unwrap();
    let guest = copy(&file);
    guest.write(5, 99);
    let userfaultfd = {
        let attached = guest.memory.attached.read().unwrap();
        attached.as_ref().unwrap().userfault.as_fd().try_clone_to_owned().unwrap()
    };
    guest.memory.detach();
    let gone = guest.memory.read(BlockIndex(5), &mut [0; BLOCK_SIZE]);
    assert!(gone.is_ok(), "nobody looked, so nothing of its own is known");
    let second = Memory::copy_of(name(), file).unwrap();
    let mapping = Mapping {
        userfaultfd,
        pid: std::process::id(),
        address: guest.base.as_ptr() as u64,
        incoming: false,
        adopted: true,
        track: true,
    };
    second.attach(mapping).unwrap();
    assert_eq!((content(&second, 5), content(&second, 6)), (99, 7));
    guest.write(6, 98);
    assert!(second.take_dirty().unwrap().contains(BlockIndex(6)));
    assert_eq!(content(&second, 6), 98);
    second.detach();
    let error = second.read(BlockIndex(5), &mut [0; BLOCK_SIZE]).unwrap_err();
    assert!(error.to_string().contains("monitor is gone"), "{error}");
}

#[test]
fn a_file_that_can_still_be_written_is_no_base() {
    let file = base(1);
    let error = Memory::copy_of(name(), file.try_clone().unwrap()).map(drop).unwrap_err();
    assert!(error.to_string().contains("could still be written"), "{error}");
    let mapped = sys::SharedMap::new(&file, BLOCK_SIZE, true).unwrap();
    seal_content(&file).unwrap_err();
    drop(mapped);
    seal_content(&file).unwrap();
}
