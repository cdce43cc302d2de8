//! What the tests of several modules share.

pub(crate) mod model;
pub(crate) mod random;
