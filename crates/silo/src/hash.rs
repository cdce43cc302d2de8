//! BLAKE3 root hashes of devices.
