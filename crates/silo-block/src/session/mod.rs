//! A move of a device group, sans I/O: events and the time go in, actions come out. The same code
//! runs over real connections (`silo_move`), in the seeded simulator and in the model checker.
//!
//! [`source`] gives devices away, [`destination`] receives them; a destination that still misses
//! blocks can be a source at the same time. What must hold, whatever connections, hosts and stores
//! do, and is tried in `tests/`:
//!
//! - a read never returns what was there before the newest write that came before it;
//! - one side at most owns a device, and after a cut or crash at any point there is a way on;
//! - a flush that was acknowledged is durable on one side or the other;
//! - nothing waits without a deadline.

pub mod destination;
mod link;
pub mod messages;
mod pace;
pub mod source;
#[cfg(test)]
mod tests;

pub use link::{LinkId, Patience};
pub use pace::{Finish, Next, Outpaced, Pace, Policy};
