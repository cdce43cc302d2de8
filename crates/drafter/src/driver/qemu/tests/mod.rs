//! The driver with real QEMUs.
