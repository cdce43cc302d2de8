//! The saved state of a machine with vhost-user-blk disks, as that of the same machine with NBD disks.
//!
//! A copy of a machine has its memory in its monitor alone, where the server of a vhost-user disk cannot
//! reach it (decision 15), so its disks are the other kind. The guest cannot tell: both are the same
//! virtio disk at the same place of the PCI bus, with a queue for each processor. Nor does QEMU save them
//! in different ways: the bus, the rings and the negotiated features are written by the same code
//! (`virtio_save` of hw/virtio/virtio.c). What differs in a disk's section is
//!
//! ```text
//! 0x04 │ section u32 │ length u8, "0000:00:08.0/vhost-user-blk" │ instance u32 │ version u32 = 1 │
//!      PCI device and MSI-X, status, features, configuration │ queues │ (nothing)       │ subsections
//!                                 ".../virtio-blk"                         version 2
//!                                                                      u8 = 0: no request in hand
//! ```
//!
//! (numbers big-endian; the name and version of `vmstate_virtio_blk` and the list of requests of
//! `virtio_blk_save_device`, hw/block/virtio-blk.c). The list is empty because the server of a vhost-user
//! disk has answered every request or put it back into its ring before the rings count as stopped.
//!
//! What must hold: whatever is not exactly as described here is refused and nothing is guessed; what comes
//! out is read by QEMU with all of its own checks (names, versions, lengths by the section's footer, rings
//! and features).

use super::command::FIRST_DISK_SLOT;
use std::ops::Range;

/// `QEMU_VM_SECTION_FULL` and `QEMU_VM_SUBSECTION` of migration/savevm.h.
const SECTION_FULL: u8 = 4;
const SUBSECTION: u8 = 5;
/// Names and versions of the two devices' states.
const VHOST_USER: (&str, u32) = ("vhost-user-blk", 1);
const VIRTIO: (&str, u32) = ("virtio-blk", 2);
/// What the names of the virtio code's own subsections begin with.
const OF_VIRTIO: &[u8] = b"virtio/";
/// Bytes of a queue: its size u32, the address of its descriptors u64, where to go on u16, its vector u16.
const QUEUE: usize = 16;
/// Most bytes of a section before its queues: the PCI configuration is 4 KiB at most, an interrupt vector
/// takes 16 bytes and a bit.
const MOST_BEFORE: usize = 16 << 10;

/// Where a disk's section begins and what of it changes.
struct Section {
    /// The length of its name, the name, the instance and the version.
    head: Range<usize>,
    /// Where the requests in hand belong.
    requests: usize,
}

/// See the module. `disks` and `queues` are the machine's disks, and the queues of each.
pub(super) fn with_nbd_disks(state: &[u8], disks: usize, queues: u32) -> Result<Vec<u8>, String> {
    let mut made = Vec::with_capacity(state.len());
    let mut done = 0;
    for disk in 0..disks {
        let found = section(&state[done..], disk, queues)
            .map_err(|why| format!("disk {disk} of its saved state: {why}"))?;
        made.extend_from_slice(&state[done..][..found.head.start]);
        made.extend(name(disk, VIRTIO.0));
        made.extend(0u32.to_be_bytes());
        made.extend(VIRTIO.1.to_be_bytes());
        made.extend_from_slice(&state[done..][found.head.end..found.requests]);
        made.push(0);
        done += found.requests;
    }
    made.extend_from_slice(&state[done..]);
    Ok(made)
}

/// The name of a section, after its length.
fn name(disk: usize, device: &str) -> Vec<u8> {
    let name = format!("0000:00:{:02x}.0/{device}", FIRST_DISK_SLOT + disk);
    // Not longer than 40 bytes: there are 16 disks.
    let mut bytes = vec![name.len() as u8];
    bytes.extend(name.into_bytes());
    bytes
}

fn section(state: &[u8], disk: usize, queues: u32) -> Result<Section, String> {
    let name = name(disk, VHOST_USER.0);
    let mut places = state.windows(name.len()).enumerate().filter(|(_, bytes)| *bytes == name);
    let (Some((start, _)), None) = (places.next(), places.next()) else {
        return Err(format!("there is not one section of a {} device", VHOST_USER.0));
    };
    let end = start + name.len() + 8;
    let instance = number(state, start + name.len());
    let version = number(state, start + name.len() + 4);
    let kind = start.checked_sub(5).map(|at| state[at]);
    if (kind, instance, version) != (Some(SECTION_FULL), Some(0), Some(VHOST_USER.1)) {
        return Err(format!("its section is not one of version {}", VHOST_USER.1));
    }
    let within = &state[end..state.len().min(end + MOST_BEFORE + QUEUE * queues as usize)];
    let is_subsection = |bytes: &[u8]| bytes[0] == SUBSECTION && bytes[2..] == *OF_VIRTIO;
    let requests = within.windows(2 + OF_VIRTIO.len()).position(is_subsection);
    let requests = end + requests.ok_or("the rest of its section is not there")?;
    // What stands before it are the queues and how many they are.
    let first = requests.checked_sub(QUEUE * queues as usize).filter(|&first| first >= end + 4);
    let first = first.ok_or("its section is too short")?;
    let sizes = (0..queues as usize).map(|queue| number(state, first + QUEUE * queue));
    let mut sizes = sizes.flatten();
    // virtio 1.2, 2.7: a power of two up to 32768.
    let fit = sizes.all(|size| size.is_power_of_two() && size <= 1 << 15);
    if number(state, first - 4) != Some(queues) || !fit {
        return Err(format!("it does not have {queues} queues"));
    }
    Ok(Section { head: start..end, requests })
}

fn number(state: &[u8], at: usize) -> Option<u32> {
    let bytes = state.get(at..)?.first_chunk()?;
    Some(u32::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A section as QEMU 7.2 writes one, with less of PCI.
    fn disk(number: usize, device: (&str, u32), requests: &[u8], queues: u32) -> Vec<u8> {
        let mut bytes = vec![SECTION_FULL, 0, 0, 0, 7 + number as u8];
        bytes.extend(name(number, device.0));
        bytes.extend([0, 0, 0, 0]);
        bytes.extend(device.1.to_be_bytes());
        bytes.extend([0x5a; 300]);
        bytes.extend(queues.to_be_bytes());
        for queue in 0..queues {
            bytes.extend(128u32.to_be_bytes());
            bytes.extend([0, 0, 0, 0, 1, 2, 3, queue as u8, 0, 9, 0, 1]);
        }
        bytes.extend(requests);
        bytes.extend(b"\x05\x16virtio/64bit_features\0\0\0\x01\0\0\0\x01");
        bytes.extend(b"\x05\x11virtio/virtqueues\0\0\0\x01");
        bytes.extend([0x7e, 0, 0, 0, 7 + number as u8]);
        bytes
    }

    fn state(device: (&str, u32), requests: &[u8], queues: u32) -> Vec<u8> {
        let parts = [
            b"QEVM\0\0\0\x03".to_vec(),
            disk(0, device, requests, queues),
            b"between".to_vec(),
            disk(1, device, requests, queues),
            vec![0],
        ];
        parts.concat()
    }

    #[test]
    fn names_versions_and_an_empty_list_of_requests_are_all_that_changes() {
        for queues in [1, 2, 16] {
            let made = with_nbd_disks(&state(VHOST_USER, &[], queues), 2, queues).unwrap();
            assert!(made == state(VIRTIO, &[0], queues), "{queues} queues");
        }
        assert_eq!(with_nbd_disks(b"no disks", 0, 1).unwrap(), b"no disks");
    }

    #[test]
    fn a_state_that_is_anything_else_is_refused() {
        let good = state(VHOST_USER, &[], 2);
        let refused = |state: &[u8], disks, queues, words: &str| {
            let error = with_nbd_disks(state, disks, queues).unwrap_err();
            assert!(error.contains(words), "{error}");
        };
        refused(&good, 3, 2, "disk 2");
        refused(&good, 2, 1, "queues");
        refused(&good, 2, 3, "queues");
        refused(&good, 2, 40, "too short");
        refused(&state(VIRTIO, &[0], 2), 2, 2, "there is not one section");
        refused(&state(("vhost-user-blk", 2), &[], 2), 2, 2, "version 1");
        // A request in hand, which no vhost-user disk has.
        refused(&state(VHOST_USER, &[1], 2), 2, 2, "queues");
        refused(&[&good[..], &good[..]].concat(), 2, 2, "there is not one section");
        // Cut off anywhere: a name is four bytes shorter, and a list one byte.
        for length in 0..good.len() {
            let made = with_nbd_disks(&good[..length], 2, 2);
            assert!(made.is_err() || made.is_ok_and(|made| made.len() == length - 2 * 3));
        }
    }
}
