//! Devices on the move between hosts.
