//! Disks whose servers were away: letting QEMU in to the new ones, and whether it has found them.

use super::{
    files,
    qmp::{Qmp, QmpError},
    record::Record,
};
use crate::driver::{DiskKind, DriverError};
use serde_json::Value;
use std::{path::PathBuf, time::Duration};

/// What the file name of a character device begins with while its socket is not connected
/// (`update_disconnected_filename` of QEMU's chardev/char-socket.c).
const DISCONNECTED: &str = "disconnected:";

/// Lets a machine's user connect to its disks at these sockets.
pub(super) fn admit(sockets: &[PathBuf], user: u32) -> Result<(), DriverError> {
    for socket in sockets {
        files::admit(socket, user).map_err(|source| DriverError::Host {
            operation: format!(
                "letting a machine's user connect to its disk at {}",
                socket.display()
            ),
            source,
        })?;
    }
    Ok(())
}

/// The same for those that are there: their servers may come later, and make new sockets then.
pub(super) fn admit_to_those_there(record: &Record) -> Result<(), DriverError> {
    let Some(user) = &record.user else { return Ok(()) };
    let there: Vec<_> = record.disk_sockets.iter().filter(|path| path.exists()).cloned().collect();
    admit(&there, user.uid)
}

/// Whether QEMU is connected to the server of each vhost-user disk. What it says to a server that it has
/// just found, and the answers, it has behind it when it says so: both are done in one go
/// (`tcp_chr_connect`, `vhost_user_blk_event`). NBD disks find theirs by themselves, whenever they are used.
pub(super) fn are_found(qmp: &mut Qmp, record: &Record, limit: Duration) -> Result<bool, QmpError> {
    if record.shape.disk_kind == DiskKind::Nbd || record.shape.disks.is_empty() {
        return Ok(true);
    }
    let answer = qmp.call("query-chardev", Value::Null, limit)?;
    Ok((0..record.shape.disks.len()).all(|index| is_connected(&answer, &format!("vu{index}"))))
}

fn is_connected(answer: &Value, label: &str) -> bool {
    let devices = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    devices.iter().any(|device| {
        let name = device["filename"].as_str().unwrap_or(DISCONNECTED);
        device["label"] == label && !name.starts_with(DISCONNECTED)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_socket_that_qemu_calls_disconnected_or_does_not_know_is_not_connected() {
        let answer = json!([
            { "label": "qmp", "filename": "unix:", "frontend-open": true },
            { "label": "vu0", "filename": "unix:", "frontend-open": true },
            { "label": "vu1", "filename": "disconnected:unix:/proc/self/fd/18/d.sock" },
            { "label": "vu2" },
        ]);
        let connected = ["vu0", "vu1", "vu2", "vu3"].map(|label| is_connected(&answer, label));
        assert_eq!(connected, [true, false, false, false]);
    }
}
