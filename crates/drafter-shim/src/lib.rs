//! Preload hook.
