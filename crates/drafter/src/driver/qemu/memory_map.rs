//! Where guest-physical addresses are in the machine's memory, and where that is in QEMU.

use super::qmp::{Qmp, QmpError};
use serde_json::{Value, json};
use silo::block::{BLOCK_SIZE, BlockIndex, BlockRange, BlockSet};
use std::{io, time::Duration};

/// microvm puts at most this much memory below 4 GiB (`MICROVM_MAX_BELOW_4G` in QEMU's
/// hw/i386/microvm.h); a test compares with `info mtree` of the installed QEMU.
const MOST_BELOW_4G: u64 = 3 << 30;
const FOUR_GIB: u64 = 4 << 30;

/// Offset in the memfd of a guest-physical address, if memory is there.
pub(super) fn offset_of(address: u64, memory_bytes: u64) -> Option<u64> {
    let below = memory_bytes.min(MOST_BELOW_4G);
    if address < below {
        return Some(address);
    }
    let above = address.checked_sub(FOUR_GIB)?;
    (above < memory_bytes - below).then_some(below + above)
}

/// The three parts of a split virtqueue of `size` entries (virtio 1.2, section 2.7), with the two
/// bytes for event suppression, as address and length.
fn ring_parts(size: u64, descriptors: u64, available: u64, used: u64) -> [(u64, u64); 3] {
    [(descriptors, 16 * size), (available, 6 + 2 * size), (used, 6 + 8 * size)]
}

/// Adds the blocks that `length` bytes at a guest-physical address touch. An address without
/// memory behind it is the guest's nonsense: QEMU will refuse it too.
fn insert(blocks: &mut BlockSet, address: u64, length: u64, memory_bytes: u64) {
    let last = address.saturating_add(length.saturating_sub(1));
    let mut at = address & !(BLOCK_SIZE as u64 - 1);
    while at <= last {
        if let Some(offset) = offset_of(at, memory_bytes) {
            blocks.insert(BlockIndex::containing(offset));
        }
        let Some(next) = at.checked_add(BLOCK_SIZE as u64) else { break };
        at = next;
    }
}

/// Most devices and queues asked about: far more than a machine of ours has.
const MOST_DEVICES: usize = 64;
const MOST_QUEUES: u64 = 64;

/// Where to ask for a queue's place, and under which names the answer has its number of entries,
/// descriptors, available ring and used ring.
type Question = (&'static str, [&'static str; 4]);
const OF_QEMU: Question =
    ("x-query-virtio-queue-status", ["vring-num", "vring-desc", "vring-avail", "vring-used"]);
const OF_VHOST: Question =
    ("x-query-virtio-vhost-queue-status", ["num", "desc-phys", "avail-phys", "used-phys"]);

/// How to ask for the queues of a device; `None`: it has none now.
///
/// [`OF_QEMU`] about a queue that a vhost-user server works on is passed on to the server as
/// GET_VRING_BASE, which stops the ring, and nothing would start it again. So it is not asked about
/// such a device while the guest runs, which may begin to use it at any moment.
fn question(status: &Value, running: bool) -> Option<Question> {
    let is_vhost = status["name"].as_str().is_some_and(|name| name.starts_with("vhost"));
    match (is_vhost, status["vhost-started"].as_bool().unwrap_or(false)) {
        (_, true) => Some(OF_VHOST),
        (true, false) if running => None,
        _ => Some(OF_QEMU),
    }
}

/// The blocks of all virtqueues that the guest's drivers have set up.
pub(super) fn virtqueue_blocks(
    qmp: &mut Qmp,
    memory_bytes: u64,
    running: bool,
    limit: Duration,
) -> Result<Vec<BlockRange>, QmpError> {
    let mut blocks = BlockSet::new(memory_bytes.div_ceil(BLOCK_SIZE as u64));
    let devices = qmp.call("x-query-virtio", Value::Null, limit)?;
    let paths = devices.as_array().into_iter().flatten().filter_map(|d| d["path"].as_str());
    for path in paths.take(MOST_DEVICES) {
        let status = qmp.call("x-query-virtio-status", json!({ "path": path }), limit)?;
        let queues = status["num-vqs"].as_u64().unwrap_or(0).min(MOST_QUEUES);
        let Some((command, [number, descriptors, available, used])) = question(&status, running)
        else {
            continue;
        };
        for queue in 0..queues {
            let question = json!({ "path": path, "queue": queue });
            let ring = qmp.call(command, question, limit)?;
            let value = |key: &str| ring[key].as_u64().unwrap_or(0);
            // At most 32768 entries (virtio 1.2, 2.7); an address of 0 is a queue without a driver.
            let (size, descriptors) = (value(number).min(32_768), value(descriptors));
            if descriptors == 0 || size == 0 {
                continue;
            }
            for (address, length) in ring_parts(size, descriptors, value(available), value(used)) {
                insert(&mut blocks, address, length, memory_bytes);
            }
        }
    }
    Ok(blocks.ranges().collect())
}

/// Device and inode of the memfd: how its mapping is told from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct FileId {
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// Where `file` is mapped from its start, in the text of /proc/PID/maps: address and length.
/// The kernel may show one mapping in several neighbouring pieces.
pub(super) fn find_mapping(maps: &str, file: FileId, bytes: u64) -> io::Result<u64> {
    let (mut start, mut end) = (0, 0);
    for line in maps.lines() {
        let Some(piece) = Piece::parse(line).filter(|piece| piece.file == file) else { continue };
        if piece.offset == 0 {
            (start, end) = (piece.start, piece.end);
        } else if piece.start == end && piece.offset == end - start {
            end = piece.end;
        }
    }
    if end - start == bytes {
        return Ok(start);
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!("{} of {bytes} bytes of the machine's memory are mapped", end - start),
    ))
}

struct Piece {
    start: u64,
    end: u64,
    offset: u64,
    file: FileId,
}

impl Piece {
    /// `7f00-7f80 rw-s 00001000 00:01 1234   /memfd:name (deleted)`
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let offset = fields.nth(1)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let inode = fields.next()?.parse().ok()?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let device = nix::sys::stat::makedev(hex(major)?, hex(minor)?);
        Some(Self {
            start: hex(start)?,
            end: hex(end)?,
            offset: hex(offset)?,
            file: FileId { device, inode },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_up_to_3_gib_is_all_below_and_the_rest_starts_at_4_gib() {
        for bytes in [256 * MIB, GIB, 3 * GIB] {
            assert_eq!(offset_of(0, bytes), Some(0));
            assert_eq!(offset_of(bytes - 1, bytes), Some(bytes - 1));
            assert_eq!(offset_of(bytes, bytes), None);
            assert_eq!(offset_of(4 * GIB, bytes), None);
        }
        for bytes in [3 * GIB + MIB, 4 * GIB, 8 * GIB] {
            assert_eq!(offset_of(3 * GIB - 1, bytes), Some(3 * GIB - 1));
            assert_eq!(offset_of(3 * GIB, bytes), None, "the hole for devices");
            assert_eq!(offset_of(4 * GIB - 1, bytes), None);
            assert_eq!(offset_of(4 * GIB, bytes), Some(3 * GIB));
            assert_eq!(offset_of(bytes + GIB - 1, bytes), Some(bytes - 1));
            assert_eq!(offset_of(bytes + GIB, bytes), None);
        }
        assert_eq!(offset_of(u64::MAX, 8 * GIB), None);
    }

    #[test]
    fn a_ring_at_work_at_its_server_is_never_asked_about_in_the_way_that_stops_it() {
        let status = |name, started| json!({ "name": name, "vhost-started": started });
        for running in [true, false] {
            assert_eq!(question(&status("vhost-user-blk", true), running), Some(OF_VHOST));
            assert_eq!(question(&status("virtio-net", false), running), Some(OF_QEMU));
        }
        assert_eq!(question(&status("vhost-user-blk", false), true), None);
        assert_eq!(question(&status("vhost-user-blk", false), false), Some(OF_QEMU));
    }

    #[test]
    fn a_ring_of_256_entries_has_the_sizes_of_the_standard() {
        let parts = ring_parts(256, 0x1000, 0x2000, 0x3000);
        assert_eq!(parts, [(0x1000, 4096), (0x2000, 518), (0x3000, 2054)]);
    }

    #[test]
    fn a_part_that_crosses_pages_touches_each_and_nonsense_touches_none() {
        let blocks = |address, length, bytes: u64| -> Vec<u64> {
            let mut set = BlockSet::new(bytes / BLOCK_SIZE as u64);
            insert(&mut set, address, length, bytes);
            set.ranges().flat_map(|r| r.start.0..r.end()).collect()
        };
        assert_eq!(blocks(0x1ff0, 0x20, MIB), [1, 2]);
        assert_eq!(blocks(0x1000, 0x1000, MIB), [1]);
        let first_above = 3 * GIB / BLOCK_SIZE as u64;
        assert_eq!(blocks(4 * GIB + 5, 1, 4 * GIB), [first_above]);
        assert_eq!(blocks(3 * GIB - 1, 2, 4 * GIB), [first_above - 1]);
        assert!(blocks(u64::MAX - 10, 4096, MIB).is_empty());
    }

    #[test]
    fn the_mapping_is_found_whole_in_pieces_and_among_others() {
        let file = FileId { device: nix::sys::stat::makedev(0, 1), inode: 99 };
        let maps = "\
1000-2000 rw-s 00000000 00:01 98 /memfd:other (deleted)
7f0000000000-7f0000002000 rw-s 00000000 00:01 99 /memfd:ram (deleted)
7f0000002000-7f0000004000 rw-s 00002000 00:01 99 /memfd:ram (deleted)
7fffff000000-7fffff001000 rw-p 00000000 00:00 0 [stack]";
        assert_eq!(find_mapping(maps, file, 0x4000).unwrap(), 0x7f00_0000_0000);
        let error = find_mapping(maps, file, 0x5000).unwrap_err().to_string();
        assert!(error.contains("16384 of 20480"), "{error}");
        find_mapping("garbage\n\n1-2", file, 0x1000).unwrap_err();
    }
}
