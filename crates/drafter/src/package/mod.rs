//! Packages: what a machine boots from.
