//! Leases: who may run a machine.
