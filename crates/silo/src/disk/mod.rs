//! Disks: copy-on-write overlays over a read-only base, tracked and movable.
