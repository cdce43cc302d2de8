//! Continuous backup of devices to an object store.

mod backup;
pub mod capture;
mod collect;
mod copy;
mod error;
mod format;
mod generation;
mod keys;
mod layout;
mod leftovers;
mod log;
mod objects;
mod pin;
mod prune;
mod remote;
mod root;
mod store;
mod verify;
mod wire;
mod writer;

pub use backup::{Backup, BackupOptions, BackupStatus, Pace, Policy};
pub use collect::{Collected, Swept, fuzz_tombs};
pub use copy::{CopyBeforeWrite, CopyGroup, ScratchOptions};
pub use error::StoreError;
pub use format::{fuzz_map, fuzz_pack, fuzz_pack_index, fuzz_runs};
pub use generation::{Generation, GenerationDevice, RestoreOptions, Restored, StoredDevice, Which};
pub use keys::{BlockName, DataKeyId, KeyError, KeyId, KeyRing, KeySource};
pub use layout::LineName;
pub use log::fuzz_entry;
pub use objects::Objects;
pub use pin::fuzz_pin;
pub use prune::{Pruned, Retention};
pub use remote::{Environment, Limits, Requests, StoreUrl};
pub use store::{Access, GenerationInfo, Rotation, Store};
pub use verify::{Depth, Problem, Reading, Verified};
pub use writer::{LineWriter, PackOptions, Stored, WriterOptions};
