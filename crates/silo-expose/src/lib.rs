//! Block devices for others to use. Every front end serves a
//! [`BlockDevice`](silo_block::io::BlockDevice) and knows nothing of what is behind it.

pub mod fuse;
pub mod nbd;
#[cfg(feature = "ublk")]
pub mod ublk;
pub mod vhost;

mod polling;
mod pool;
mod socket;
#[cfg(test)]
mod test_devices;
