//! A disk over a layer that it shares with others.

use super::{super::Layer, *};
use crate::{
    block::{BlockRange, BlockSet},
    device::Device,
    io::BlockDevice,
};

fn set(device: u64, ranges: &[(u64, u64)]) -> BlockSet {
    let mut set = BlockSet::new(device);
    for (start, count) in ranges {
        set.insert_range(BlockRange::new(*start, *count));
    }
    set
}

/// A machine's disk, its content, and the layer of what it has that the base has not.
fn original(rig: &Rig) -> (Vec<u8>, Layer) {
    let (disk, mut content) = rig.create(12);
    let new = pattern(5, 2 * BLOCK_SIZE + 100);
    // Into the base and, partly, behind it; some of the base is made zero.
    for offset in [BLOCK + 50, 7 * BLOCK] {
        disk.write_at(offset, &new).unwrap();
        content[offset as usize..offset as usize + new.len()].copy_from_slice(&new);
    }
    disk.zero(5 * BLOCK, BLOCK, false).unwrap();
    content[5 * BLOCK_SIZE..6 * BLOCK_SIZE].fill(0);
    let allocated = disk.allocated().unwrap();
    let read = |range: BlockRange, buf: &mut [u8]| {
        disk.read_at(range.start.offset(), buf).map_err(std::io::Error::other)
    };
    let layer = Layer::write(rig.dir.path(), "root", &allocated, read).unwrap();
    assert!(Layer::write(rig.dir.path(), "root", &allocated, read).is_err(), "there is one");
    (content, layer)
}

impl Rig {
    fn copy(&self, layer: &Layer, name: &str) -> Disk {
        let dir = self.dir.path().join(name);
        layer.put_below(&dir).unwrap();
        Disk::create(&dir, Some(&self.base()), 12 * BLOCK, &self.options()).unwrap()
    }
}

#[test]
fn copies_begin_with_the_content_of_the_original_and_each_goes_its_own_way() {
    let mut rig = Rig::new(8 * BLOCK_SIZE - 7);
    let (content, layer) = original(&rig);
    let (one, two) = (rig.copy(&layer, "one"), rig.copy(&layer, "two"));
    // The folder in which the layer was made may go.
    for file in ["root.below", "root.below.json"] {
        fs::remove_file(rig.dir.path().join(file)).unwrap();
    }
    assert_eq!(content_of(&one), content);
    assert_eq!(one.allocated_bytes().unwrap(), 0, "all of it is shared");
    let listed = one.allocated().unwrap();
    assert!(
        listed.contains_range(BlockRange::new(1, 3))
            && listed.contains_range(BlockRange::new(7, 3))
    );
    assert_eq!(listed, set(12, &[(1, 3), (5, 1), (7, 3)]));

    // Odd pieces, so that blocks are merged with what lies in the layer, in the base and in neither.
    let (mut mine, mut other) = (content.clone(), content);
    for (offset, length) in
        [(BLOCK - 9, 30), (5 * BLOCK + 3, 9), (7 * BLOCK, 4096), (11 * BLOCK, 5)]
    {
        let data = pattern(offset, length);
        one.write_at(offset, &data).unwrap();
        mine[offset as usize..offset as usize + length].copy_from_slice(&data);
    }
    two.zero(2 * BLOCK, BLOCK, false).unwrap();
    other[2 * BLOCK_SIZE..3 * BLOCK_SIZE].fill(0);
    let (mut quick, mut waited) = (vec![0; mine.len()], 0);
    if one.try_read_at(0, &mut quick).unwrap() {
        assert_eq!(quick, mine);
    } else {
        waited += 1;
    }
    assert!(waited <= 1);
    for at in 0..12 {
        let piece = read(&one, at * BLOCK + 100, 700.min((12 - at) as usize * BLOCK_SIZE - 100));
        assert_eq!(piece, mine[(at * BLOCK + 100) as usize..][..piece.len()], "block {at}");
    }
    one.flush().unwrap();
    two.flush().unwrap();
    drop((one, two));
    rig.crash_host();
    for (name, content) in [("one", mine), ("two", other)] {
        let dir = rig.dir.path().join(name);
        let disk = Disk::open(&dir, Some(&rig.base()), &rig.options()).unwrap();
        assert_eq!(content_of(&disk), content, "{name}");
    }
}

#[test]
fn what_is_received_is_over_the_base_alone() {
    let rig = Rig::new(8 * BLOCK_SIZE);
    let (_, layer) = original(&rig);
    let disk = rig.copy(&layer, "one");
    disk.reset().unwrap();
    let mut bytes = vec![0; 8 * BLOCK_SIZE];
    disk.read_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, rig.base);
    assert!(disk.allocated().unwrap().is_empty());
    drop(disk);
    let dir = rig.dir.path().join("one");
    assert!(!dir.join("below").exists() && !dir.join("below.json").exists());
    let opened = Disk::open(&dir, Some(&rig.base()), &rig.options());
    assert!(matches!(opened, Err(DiskError::Incomplete { .. })), "{opened:?}");
}

#[test]
fn a_layer_that_is_not_this_disks_is_refused_with_what_is_wrong() {
    let rig = Rig::new(8 * BLOCK_SIZE);
    let (_, layer) = original(&rig);
    drop(rig.copy(&layer, "one"));
    let dir = rig.dir.path().join("one");
    let open = || Disk::open(&dir, Some(&rig.base()), &rig.options()).map(drop).unwrap_err();
    let map = fs::read_to_string(dir.join("below.json")).unwrap();
    let with = |text: String| {
        fs::remove_file(dir.join("below.json")).unwrap();
        fs::write(dir.join("below.json"), text).unwrap();
    };
    with(map.replace("\"blocks\":12", "\"blocks\":11"));
    assert!(matches!(open(), DiskError::Corrupt { .. }));
    with(map.replace("[1,3]", "[1,18446744073709551615]"));
    assert!(open().to_string().contains("beyond the disk's end"));
    with(map.replace("\"version\":1", "\"version\":2"));
    assert!(matches!(open(), DiskError::Version { .. }));
    with(map);
    fs::remove_file(dir.join("below")).unwrap();
    fs::write(dir.join("below"), "short").unwrap();
    assert!(matches!(open(), DiskError::Corrupt { .. }));
}
