//! The QEMU driver: stock Debian QEMU, microvm with PCI, memory and disks owned by drafter.
