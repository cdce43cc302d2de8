//! Continuous backup of devices to an object store.
