//! One request of the driver: checked, and done on the device. No kernel is needed for it.

use super::abi::{Descriptor, SECTOR};
use silo_block::io::BlockDevice;
use std::io;

/// Flags of a descriptor (`UBLK_IO_F_FUA`, `UBLK_IO_F_NOUNMAP`). The driver has them in their
/// place above the operation, so they are compared without a shift.
pub(super) const FUA: u32 = 1 << 13;
pub(super) const NOUNMAP: u32 = 1 << 15;
/// Most sectors of a discard or a write of zeros: 1 GiB, as for the other front ends.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// A write up to this is done by the queue's thread if it need not wait.
const SMALL: u64 = 64 << 10;

/// What a request asks for (`UBLK_IO_OP_…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    Unknown(u8),
}

impl Operation {
    pub(super) fn of(descriptor: &Descriptor) -> Self {
        match (descriptor.op_flags & 0xff) as u8 {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Flush,
            3 => Self::Discard,
            5 => Self::WriteZeroes,
            // 4 was WRITE_SAME, which no kernel that has this driver sends.
            other => Self::Unknown(other),
        }
    }
}

/// Who does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// The queue's thread, which must not wait.
    Queue,
    /// A worker, which may.
    Worker,
}

/// Does a request. `buffer` is that of its entry: the data of a write is in it, that of a read goes
/// there. Gives what the driver is told, bytes or a negative errno; `None`: it has to wait, and a
/// worker is to do it.
pub(super) fn perform(
    device: &dyn BlockDevice,
    descriptor: &Descriptor,
    buffer: &mut [u8],
    by: By,
) -> Option<i32> {
    match run(device, descriptor, buffer, by) {
        Ok(Some(bytes)) => Some(bytes),
        Ok(None) => None,
        Err(error) => {
            tracing::debug!(?descriptor, %error, "a request failed");
            Some(-errno(&error))
        }
    }
}

fn run(
    device: &dyn BlockDevice,
    descriptor: &Descriptor,
    buffer: &mut [u8],
    by: By,
) -> io::Result<Option<i32>> {
    let operation = Operation::of(descriptor);
    let durable = descriptor.op_flags & FUA != 0;
    match operation {
        Operation::Unknown(_) => return Err(io::ErrorKind::Unsupported.into()),
        Operation::Flush if by == By::Queue => return Ok(None),
        Operation::Flush => return device.flush().map(|()| Some(0)),
        _ => {}
    }
    let (offset, length) = range(device, descriptor)?;
    if operation != Operation::Read && device.is_read_only() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    match operation {
        Operation::Read | Operation::Write => {
            let most = buffer.len();
            let data = usize::try_from(length).ok().and_then(|length| buffer.get_mut(..length));
            let data = data.ok_or_else(|| {
                let text = format!("a request of {length} bytes, and a buffer of {most}");
                io::Error::new(io::ErrorKind::InvalidInput, text)
            })?;
            let done = match (operation, by) {
                (Operation::Read, By::Queue) => device.try_read_at(offset, data)?,
                (Operation::Read, By::Worker) => device.read_at(offset, data).map(|()| true)?,
                (_, By::Queue) if durable || length > SMALL || device.may_wait(offset, length) => {
                    false
                }
                _ => device.write_at(offset, data).map(|()| true)?,
            };
            if !done {
                return Ok(None);
            }
            if operation == Operation::Write && durable {
                device.flush()?;
            }
            // No request is as long as 2 GiB: the buffer is not.
            Ok(Some(i32::try_from(length).unwrap_or(i32::MAX)))
        }
        _ if by == By::Queue => Ok(None),
        _ => {
            if operation == Operation::Discard {
                device.trim(offset, length)?;
            } else {
                device.zero(offset, length, descriptor.op_flags & NOUNMAP != 0)?;
            }
            if durable {
                device.flush()?;
            }
            Ok(Some(0))
        }
    }
}

/// The bytes that it is about, if they are of the device.
fn range(device: &dyn BlockDevice, descriptor: &Descriptor) -> io::Result<(u64, u64)> {
    let sectors = device.size() / SECTOR;
    let end = descriptor.start.checked_add(descriptor.sectors.into());
    let fits = end.is_some_and(|end| end <= sectors) && descriptor.sectors > 0;
    if !fits {
        let (start, count) = (descriptor.start, descriptor.sectors);
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{count} sectors from {start}, of a device of {sectors}"),
        ));
    }
    Ok((descriptor.start * SECTOR, u64::from(descriptor.sectors) * SECTOR))
}

/// How the kinds of errors that [`BlockDevice`] names are told.
fn errno(error: &io::Error) -> i32 {
    match error.kind() {
        io::ErrorKind::InvalidInput => libc::EINVAL,
        io::ErrorKind::StorageFull => libc::ENOSPC,
        io::ErrorKind::PermissionDenied => libc::EPERM,
        io::ErrorKind::NotConnected => libc::ESHUTDOWN,
        io::ErrorKind::Unsupported => libc::EOPNOTSUPP,
        _ => libc::EIO,
    }
}
