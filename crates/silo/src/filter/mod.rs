//! Filters: devices over one device that change how it behaves and not what it holds.
//!
//! | filter | does |
//! |---|---|
//! | [`WriteCache`] | answers writes from memory and writes them back; slows writers, fails none |
//! | [`RedundantWrites`] | forwards only what differs from what is there |
//! | [`Combinator`] | several writers of different priority, by block and version |
//! | [`Recorder`] | writes a [`binlog`] of what happens |
//! | [`Tracked`] | tells holders which blocks were written, in exact rounds |
//! | [`Metered`] | counts operations, bytes, errors and times |
//! | [`Policied`] | stops, passes on or waits when the device below fails or is full |
//! | [`ReadOnly`] | refuses writes |
//! | [`Delayed`] | adds latency and a bandwidth: benchmarks, tests |
//! | [`Faulty`] | fails, waits and tears when told to: tests |
//! | [`Mirror`] | writes to all, compares on read: a test aid |

/// Passes methods of `BlockDevice` on to the device in a field.
macro_rules! forward {
    ($field:ident: $($method:ident)*) => { $(forward!(@ $field $method);)* };
    (@ $field:ident size) => {
        fn size(&self) -> u64 { self.$field.size() }
    };
    (@ $field:ident read_at) => {
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
            self.$field.read_at(offset, buf)
        }
    };
    (@ $field:ident try_read_at) => {
        fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<bool> {
            self.$field.try_read_at(offset, buf)
        }
    };
    (@ $field:ident may_wait) => {
        fn may_wait(&self, offset: u64, length: u64) -> bool {
            self.$field.may_wait(offset, length)
        }
    };
    (@ $field:ident flush) => {
        fn flush(&self) -> std::io::Result<()> { self.$field.flush() }
    };
    (@ $field:ident interrupt) => {
        fn interrupt(&self) { self.$field.interrupt() }
    };
    (@ $field:ident extents) => {
        fn extents(&self, offset: u64, length: u64) -> std::io::Result<Vec<$crate::io::Extent>> {
            self.$field.extents(offset, length)
        }
    };
    (@ $field:ident prefetch) => {
        fn prefetch(&self, offset: u64, length: u64) -> std::io::Result<()> {
            self.$field.prefetch(offset, length)
        }
    };
    (@ $field:ident zeroes_fast) => {
        fn zeroes_fast(&self) -> bool { self.$field.zeroes_fast() }
    };
    (@ $field:ident is_read_only) => {
        fn is_read_only(&self) -> bool { self.$field.is_read_only() }
    };
}

pub mod binlog;
mod cache;
mod combinator;
mod delayed;
mod faulty;
mod metered;
mod mirror;
mod policied;
mod read_only;
mod redundant;
mod tracked;

pub use binlog::Recorder;
pub use cache::{CacheOptions, CacheStatus, WriteCache};
pub use combinator::{Combinator, Mark, Taken};
pub use delayed::{Delayed, Delays};
pub use faulty::{Fault, Faulty, Op};
pub use metered::{Measures, Metered, OpMeasures};
pub use mirror::Mirror;
pub use policied::{ErrorPolicy, OnError, Policied, Trouble};
pub use read_only::ReadOnly;
pub use redundant::{MAX_ALLOWANCE, RedundantWrites};
pub use tracked::Tracked;
