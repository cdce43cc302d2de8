//! The NBD server that gives a disk to a machine.
