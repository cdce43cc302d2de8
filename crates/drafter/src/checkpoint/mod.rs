//! A running machine in a store, and back: what a generation of a machine is made of.
//!
//! ```text
//!   memory      its pages
//!   machine     what it is, and the driver's state      [`description`]
//!   disk-NAME   each disk, as a whole: `silo restore` makes an image of it; or, of a suspended machine,
//!   overlay-NAME  what of the disk differs from the package
//! ```
//!
//! [`capture`] freezes all of them at one instant, at which the machine stands still for milliseconds;
//! silo's backup engine stores what it froze. [`restore`] puts a generation's content into memory and
//! disks that no machine uses yet; [`fill`] brings it while the machine runs already. Who may run the machine is not decided here: the runner does
//! (`runner/backup.rs`, `runner/sleep.rs`, `runner/restore.rs`). [`moment`] freezes one that will not go on.

pub mod capture;
pub mod description;
pub mod fill;
pub mod moment;
pub mod restore;

/// The device of a generation that holds memory.
pub const MEMORY: &str = "memory";
/// The device that says what the machine is.
pub const MACHINE: &str = "machine";

/// The device that holds what of a disk differs from its package.
#[must_use]
pub fn overlay_device(disk: &str) -> String {
    format!("overlay-{disk}")
}

/// The device that holds a disk.
#[must_use]
pub fn disk_device(disk: &str) -> String {
    format!("disk-{disk}")
}
