//! The BPF data path against the kernel, in namespaces without names. Needs root.

mod decisions;
mod life;
mod rig;
mod sizes;
