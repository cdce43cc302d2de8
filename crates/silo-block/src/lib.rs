//! The block model: what a device is, what is known of each of its blocks, and which block goes
//! next. No I/O and no clock of its own: events go in, decisions come out.

pub mod block;
pub mod device;
pub mod geometry;
pub mod hash;
pub mod io;
pub mod model;
pub mod order;
pub mod rounds;
pub mod session;
pub mod times;
