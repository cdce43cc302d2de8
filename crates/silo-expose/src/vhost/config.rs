//! What the device says of itself: features and configuration (virtio 1.2, 5.2.3 and 5.2.4).

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    },
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

/// Bytes of a sector, the unit of every address and of the capacity, whatever the block size.
pub(super) const SECTOR: u64 = 512;
/// Most parts of the data of a request. QEMU announces the same for a queue of 128.
pub(super) const SEG_MAX: u32 = 126;
/// Most ranges of one DISCARD or WRITE_ZEROES.
pub(super) const MAX_RANGES: usize = 32;
/// Most sectors of one such range: 1 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Sectors of a block as silo keeps them: smaller discards free nothing.
const BLOCK_SECTORS: u32 = silo_block::block::BLOCK_SIZE as u32 / SECTOR as u32;

/// `VHOST_F_LOG_ALL`: the server can log what it writes; without it QEMU does not migrate.
pub(super) const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
/// Rings are enabled by message (`VHOST_USER_F_PROTOCOL_FEATURES`).
pub(super) const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Whether a negotiated set has a feature.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// What is offered.
pub(super) fn features(read_only: bool) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_MQ,
    ];
    if read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    bits.iter().fold(LOG_ALL | PROTOCOL_FEATURES, |all, bit| all | 1 << bit)
}

/// What of the vhost-user protocol is offered; `memory_slots`: also that regions of memory are told
/// one by one. This may grow, but what was offered once is offered for good: see the module `heir`.
pub(super) fn protocol_features(memory_slots: bool) -> VhostUserProtocolFeatures {
    let slots = if memory_slots {
        VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    } else {
        VhostUserProtocolFeatures::empty()
    };
    slots
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
}

/// The configuration of a device of `bytes`, as the guest reads it (`struct virtio_blk_config`).
pub(super) fn space(bytes: u64, queues: u16) -> [u8; 60] {
    let mut out = [0; 60];
    let mut put = |at: usize, value: &[u8]| out[at..at + value.len()].copy_from_slice(value);
    put(0, &(bytes / SECTOR).to_le_bytes()); // capacity
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes()); // blk_size
    put(24, &[BLOCK_SECTORS.trailing_zeros() as u8]); // physical_block_exp
    put(26, &(BLOCK_SECTORS as u16).to_le_bytes()); // min_io_size
    put(34, &queues.to_le_bytes()); // num_queues
    put(36, &MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
    put(40, &(MAX_RANGES as u32).to_le_bytes()); // max_discard_seg
    put(44, &BLOCK_SECTORS.to_le_bytes()); // discard_sector_alignment
    put(48, &MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    put(52, &(MAX_RANGES as u32).to_le_bytes()); // max_write_zeroes_seg
    put(56, &[1]); // write_zeroes_may_unmap
    out
}

/// A part of the configuration; beyond its end it is zeros, as newer drivers ask for more.
pub(super) fn part(space: &[u8], offset: u32, size: u32) -> Vec<u8> {
    let byte = |at: u32| space.get(at as usize).copied().unwrap_or(0);
    (offset..offset.saturating_add(size)).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use virtio_bindings::virtio_blk::virtio_blk_config as Config;

    #[test]
    fn the_configuration_lies_as_the_kernels_header_says() {
        let space = space(10 << 30, 4);
        let u32_at = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        assert_eq!(space[..8], (20u64 << 20).to_le_bytes());
        assert_eq!(u32_at(offset_of!(Config, seg_max)), SEG_MAX);
        assert_eq!(u32_at(offset_of!(Config, blk_size)), 512);
        assert_eq!(space[offset_of!(Config, physical_block_exp)], 3);
        assert_eq!(space[offset_of!(Config, min_io_size)], 8);
        assert_eq!(space[offset_of!(Config, num_queues)], 4);
        assert_eq!(u32_at(offset_of!(Config, max_discard_sectors)), MAX_RANGE_SECTORS);
        assert_eq!(u32_at(offset_of!(Config, max_discard_seg)), 32);
        assert_eq!(u32_at(offset_of!(Config, discard_sector_alignment)), 8);
        assert_eq!(u32_at(offset_of!(Config, max_write_zeroes_sectors)), MAX_RANGE_SECTORS);
        assert_eq!(u32_at(offset_of!(Config, max_write_zeroes_seg)), 32);
        assert_eq!(space[offset_of!(Config, write_zeroes_may_unmap)], 1);
        assert_eq!(part(&space, 56, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(part(&space, u32::MAX - 1, 4).len(), 1);
    }

    #[test]
    fn a_read_only_device_offers_no_way_to_change_it() {
        let features = features(true);
        assert!(has(features, VIRTIO_BLK_F_RO) && has(features, VIRTIO_BLK_F_FLUSH));
        assert!(!has(features, VIRTIO_BLK_F_DISCARD) && !has(features, VIRTIO_BLK_F_WRITE_ZEROES));
    }
}
