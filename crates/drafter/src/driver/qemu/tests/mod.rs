//! The driver with real QEMUs and a real guest.

mod confinement;
mod copies;
mod disks;
mod faults;
mod life;
mod moving;
mod nbd;
mod rig;
mod start;
mod sys;
