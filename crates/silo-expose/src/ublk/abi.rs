//! The driver's numbers and layouts, as bytes: `include/uapi/linux/ublk_cmd.h` of Linux 6.4 and
//! newer, from which every name in a comment here is. Nothing here talks to a kernel.
//!
//! Commands carry the numbers that are encoded like an ioctl's (`UBLK_U_…`); those without were
//! the only ones before 6.4, and may be missing in newer kernels.

use std::mem::size_of;

/// Where devices are made (`drivers/block/ublk_drv.c`).
pub(super) const CONTROL: &str = "/dev/ublk-control";
/// Most entries of a queue (`UBLK_MAX_QUEUE_DEPTH`).
pub(super) const MAX_DEPTH: u16 = 4096;
/// Bytes of a sector, the unit of every address.
pub(super) const SECTOR: u64 = 512;
/// How a command ends that brings no request any more (`UBLK_IO_RES_ABORT`): the device stops.
pub(super) const ABORTED: i32 = -libc::ENODEV;
/// Asks for any free number of a device, and means no queue.
pub(super) const ANY_DEVICE: u32 = u32::MAX;
const NO_QUEUE: u16 = u16::MAX;

/// The device stays, and its requests wait, when the server dies (`UBLK_F_USER_RECOVERY`).
pub(super) const RECOVERY: u64 = 1 << 3;
/// Requests that the dead server had in hand go to the next (`UBLK_F_USER_RECOVERY_REISSUE`).
pub(super) const RECOVERY_REISSUE: u64 = 1 << 4;

/// Bytes of `struct ublksrv_ctrl_cmd`, `ublksrv_io_cmd`, `ublksrv_io_desc`,
/// `ublksrv_ctrl_dev_info`, and of `ublk_params` up to the end of its part about discards.
const CONTROL_BYTES: usize = 32;
const IO_BYTES: usize = 16;
pub(super) const DESCRIPTOR_BYTES: usize = 24;
pub(super) const INFO_BYTES: usize = 64;
pub(super) const PARAMS_BYTES: usize = 60;

/// A command on [`CONTROL`]; the value is its number (`UBLK_CMD_…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Control {
    GetInfo = 0x02,
    Add = 0x04,
    Delete = 0x05,
    Start = 0x06,
    Stop = 0x07,
    SetParams = 0x08,
    GetParams = 0x09,
    StartRecovery = 0x10,
    EndRecovery = 0x11,
}

impl Control {
    /// What goes into `cmd_op` (`UBLK_U_CMD_…`).
    pub(super) fn opcode(self) -> u32 {
        let number = self as u8;
        let code = match self {
            Self::GetInfo | Self::GetParams => {
                nix::request_code_read!(b'u', number, CONTROL_BYTES)
            }
            _ => nix::request_code_readwrite!(b'u', number, CONTROL_BYTES),
        };
        code as u32
    }

    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::GetInfo => "look at",
            Self::Add => "add",
            Self::Delete => "delete",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::SetParams => "describe",
            Self::GetParams => "read the parameters of",
            Self::StartRecovery => "begin to take over",
            Self::EndRecovery => "take over",
        }
    }

    /// `struct ublksrv_ctrl_cmd`: `buffer` is the address and length of what it reads or writes.
    pub(super) fn encode(self, device: u32, buffer: (u64, u16), data: u64) -> [u8; CONTROL_BYTES] {
        let mut bytes = [0; CONTROL_BYTES];
        put(&mut bytes, 0, &device.to_ne_bytes());
        put(&mut bytes, 4, &NO_QUEUE.to_ne_bytes());
        put(&mut bytes, 6, &buffer.1.to_ne_bytes());
        put(&mut bytes, 8, &buffer.0.to_ne_bytes());
        put(&mut bytes, 16, &data.to_ne_bytes());
        bytes
    }
}

/// A command on a device's own file, for one entry of a queue (`UBLK_U_IO_…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Io {
    /// Takes the next request.
    Fetch,
    /// Answers one and takes the next: bytes moved, or a negative errno.
    Commit(i32),
}

impl Io {
    pub(super) fn opcode(self) -> u32 {
        let number = match self {
            Self::Fetch => 0x20,
            Self::Commit(_) => 0x21,
        };
        nix::request_code_readwrite!(b'u', number, IO_BYTES) as u32
    }

    /// `struct ublksrv_io_cmd`: `buffer` is where the data of the next request goes, and where
    /// that of the answered one is.
    pub(super) fn encode(self, queue: u16, tag: u16, buffer: u64) -> [u8; IO_BYTES] {
        let result = match self {
            Self::Fetch => 0,
            Self::Commit(result) => result,
        };
        let mut bytes = [0; IO_BYTES];
        put(&mut bytes, 0, &queue.to_ne_bytes());
        put(&mut bytes, 2, &tag.to_ne_bytes());
        put(&mut bytes, 4, &result.to_ne_bytes());
        put(&mut bytes, 8, &buffer.to_ne_bytes());
        bytes
    }
}

/// What the driver says of a request (`struct ublksrv_io_desc`; its address is the one we gave).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// The operation (`UBLK_IO_OP_…`) in the lowest byte, flags above.
    pub(super) op_flags: u32,
    /// Length, in sectors.
    pub(super) sectors: u32,
    /// Where it starts, in sectors.
    pub(super) start: u64,
}

impl Descriptor {
    pub(super) fn decode(bytes: &[u8; DESCRIPTOR_BYTES]) -> Self {
        Self { op_flags: u32_at(bytes, 0), sectors: u32_at(bytes, 4), start: u64_at(bytes, 8) }
    }

    /// The bytes as the driver writes them.
    #[cfg(test)]
    pub(super) fn encode(self) -> [u8; DESCRIPTOR_BYTES] {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        put(&mut bytes, 0, &self.op_flags.to_ne_bytes());
        put(&mut bytes, 4, &self.sectors.to_ne_bytes());
        put(&mut bytes, 8, &self.start.to_ne_bytes());
        bytes
    }
}

/// Where the descriptors of a queue lie in the device's file, and how many bytes they are
/// (`UBLKSRV_CMD_BUF_OFFSET`, and `ublk_ch_mmap` in the driver).
pub(super) fn descriptors_at(queue: u16, depth: u16, page: usize) -> (u64, usize) {
    let most = usize::from(MAX_DEPTH) * DESCRIPTOR_BYTES;
    let bytes = (usize::from(depth) * DESCRIPTOR_BYTES).next_multiple_of(page);
    (u64::from(queue) * most.next_multiple_of(page) as u64, bytes)
}

/// The state of a device (`UBLK_S_DEV_…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// There is no disk.
    Dead,
    /// A server has it.
    Live,
    /// Its server died; requests wait for the next.
    Quiesced,
    /// Newer than what is known here.
    Unknown(u16),
}

/// A device as the driver knows it (`struct ublksrv_ctrl_dev_info`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Info {
    pub(super) queues: u16,
    pub(super) depth: u16,
    pub(super) state: State,
    /// Longest request, in bytes.
    pub(super) max_request: u32,
    pub(super) id: u32,
    /// The server, in the driver's eyes.
    pub(super) pid: i32,
    pub(super) flags: u64,
}

impl Info {
    pub(super) fn encode(&self) -> [u8; INFO_BYTES] {
        let state = match self.state {
            State::Dead => 0,
            State::Live => 1,
            State::Quiesced => 2,
            State::Unknown(state) => state,
        };
        let mut bytes = [0; INFO_BYTES];
        put(&mut bytes, 0, &self.queues.to_ne_bytes());
        put(&mut bytes, 2, &self.depth.to_ne_bytes());
        put(&mut bytes, 4, &state.to_ne_bytes());
        put(&mut bytes, 8, &self.max_request.to_ne_bytes());
        put(&mut bytes, 12, &self.id.to_ne_bytes());
        put(&mut bytes, 16, &self.pid.to_ne_bytes());
        put(&mut bytes, 24, &self.flags.to_ne_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; INFO_BYTES]) -> Self {
        let state = match u16_at(bytes, 4) {
            0 => State::Dead,
            1 => State::Live,
            2 => State::Quiesced,
            other => State::Unknown(other),
        };
        Self {
            queues: u16_at(bytes, 0),
            depth: u16_at(bytes, 2),
            state,
            max_request: u32_at(bytes, 8),
            id: u32_at(bytes, 12),
            pid: u32_at(bytes, 16).cast_signed(),
            flags: u64_at(bytes, 24),
        }
    }
}

/// What the kernel tells users of the device (`struct ublk_params`: basic, and discard).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Params {
    pub(super) read_only: bool,
    /// Size, in sectors.
    pub(super) sectors: u64,
    /// Longest read or write, in sectors.
    pub(super) max_sectors: u32,
    /// Longest discard or write of zeros, in sectors.
    pub(super) max_range_sectors: u32,
}

/// `UBLK_ATTR_READ_ONLY`, `UBLK_ATTR_VOLATILE_CACHE`, `UBLK_ATTR_FUA`.
const ATTR_READ_ONLY: u32 = 1 << 0;
const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
const ATTR_FUA: u32 = 1 << 3;
/// `UBLK_PARAM_TYPE_BASIC`, `UBLK_PARAM_TYPE_DISCARD`.
const TYPE_BASIC: u32 = 1 << 0;
const TYPE_DISCARD: u32 = 1 << 1;
/// Sectors are addressed one by one; whole blocks of silo are what is fast.
const LOGICAL_SHIFT: u8 = SECTOR.trailing_zeros() as u8;
const PHYSICAL_SHIFT: u8 = (silo_block::block::BLOCK_SIZE as u64).trailing_zeros() as u8;

impl Params {
    pub(super) fn encode(&self) -> [u8; PARAMS_BYTES] {
        let (attributes, types) = if self.read_only {
            (ATTR_READ_ONLY, TYPE_BASIC)
        } else {
            (ATTR_VOLATILE_CACHE | ATTR_FUA, TYPE_BASIC | TYPE_DISCARD)
        };
        let mut bytes = [0; PARAMS_BYTES];
        put(&mut bytes, 0, &(PARAMS_BYTES as u32).to_ne_bytes());
        put(&mut bytes, 4, &types.to_ne_bytes());
        put(&mut bytes, 8, &attributes.to_ne_bytes());
        // Shifts: logical block, physical block, best size, least size.
        put(&mut bytes, 12, &[LOGICAL_SHIFT, PHYSICAL_SHIFT, PHYSICAL_SHIFT, PHYSICAL_SHIFT]);
        put(&mut bytes, 16, &self.max_sectors.to_ne_bytes());
        put(&mut bytes, 24, &self.sectors.to_ne_bytes());
        if !self.read_only {
            let granularity = silo_block::block::BLOCK_SIZE as u32;
            put(&mut bytes, 44, &granularity.to_ne_bytes());
            put(&mut bytes, 48, &self.max_range_sectors.to_ne_bytes());
            put(&mut bytes, 52, &self.max_range_sectors.to_ne_bytes());
            // One range a request: the driver takes nothing else (`ublk_validate_params`).
            put(&mut bytes, 56, &1u16.to_ne_bytes());
        }
        bytes
    }

    /// The size in sectors that a device was started with.
    pub(super) fn decode_sectors(bytes: &[u8; PARAMS_BYTES]) -> u64 {
        u64_at(bytes, 24)
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes(bytes[at..at + size_of::<u16>()].try_into().expect("2 bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + size_of::<u32>()].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + size_of::<u64>()].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_numbers_of_the_kernels_header() {
        let expected = [
            (Control::GetInfo, 0x8020_7502),
            (Control::Add, 0xc020_7504),
            (Control::Delete, 0xc020_7505),
            (Control::Start, 0xc020_7506),
            (Control::Stop, 0xc020_7507),
            (Control::SetParams, 0xc020_7508),
            (Control::GetParams, 0x8020_7509),
            (Control::StartRecovery, 0xc020_7510),
            (Control::EndRecovery, 0xc020_7511),
        ];
        for (command, number) in expected {
            assert_eq!(command.opcode(), number, "{command:?}");
        }
        assert_eq!(Io::Fetch.opcode(), 0xc010_7520);
        assert_eq!(Io::Commit(0).opcode(), 0xc010_7521);
    }

    #[test]
    fn commands_have_the_bytes_of_the_kernels_structures() {
        let control = Control::Start.encode(7, (0x1122_3344_5566_7788, 64), 4711);
        let expected = "07000000 ffff 4000 8877665544332211 6712000000000000 0000000000000000";
        assert_eq!(hex(&control), expected.replace(' ', ""));
        let io = Io::Commit(-5).encode(1, 0x0203, 0x1000);
        assert_eq!(hex(&io), "0100 0302 fbffffff 0010000000000000".replace(' ', ""));
        let info = Info {
            queues: 2,
            depth: 64,
            state: State::Quiesced,
            max_request: 512 << 10,
            id: 3,
            pid: 4711,
            flags: RECOVERY | RECOVERY_REISSUE,
        };
        let bytes = info.encode();
        let expected = "0200 4000 0200 0000 00000800 03000000 67120000 00000000 1800000000000000";
        assert_eq!(hex(&bytes[..32]), expected.replace(' ', ""));
        assert!(bytes[32..].iter().all(|&byte| byte == 0), "the rest is the driver's");
        assert_eq!(Info::decode(&bytes), info);
    }

    #[test]
    fn parameters_have_the_bytes_of_the_kernels_structure() {
        let params = Params {
            read_only: false,
            sectors: 2048,
            max_sectors: 1024,
            max_range_sectors: 1 << 21,
        };
        let expected = "3c000000 03000000 0c000000 090c0c0c 00040000 00000000 0008000000000000 \
                        0000000000000000 00000000 00100000 00002000 00002000 0100 0000";
        assert_eq!(hex(&params.encode()), expected.replace(' ', ""));
        assert_eq!(Params::decode_sectors(&params.encode()), 2048);
        let read_only = Params { read_only: true, ..params }.encode();
        assert_eq!(hex(&read_only[..12]), "3c000000 01000000 01000000".replace(' ', ""));
        assert!(read_only[40..].iter().all(|&byte| byte == 0), "nothing is discarded");
    }

    #[test]
    fn descriptors_of_queues_lie_apart() {
        assert_eq!(descriptors_at(0, 64, 4096), (0, 4096));
        assert_eq!(descriptors_at(2, 4096, 4096), (2 * 98304, 98304));
        let descriptor = Descriptor { op_flags: 0x2001, sectors: 8, start: 1 << 33 };
        assert_eq!(Descriptor::decode(&descriptor.encode()), descriptor);
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
