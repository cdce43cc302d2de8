//! What stops a machine from outside, at once or at the end of its offer: its fence, and its guard while it
//! arrives.

use crate::{
    driver::{DriverError, Fence},
    lease::BootTime,
    migrate::destination::Freezer,
    runner::guard::Guard,
};
use std::sync::Arc;

/// See the module.
pub(super) struct Fenced(pub(super) Arc<dyn Fence>, pub(super) Option<Arc<Guard>>);

impl Freezer for Fenced {
    fn freeze(&self) -> Result<(), String> {
        self.0.freeze().map_err(|e: DriverError| e.to_string())
    }

    fn thaw(&self) -> Result<(), String> {
        self.0.thaw().map_err(|e: DriverError| e.to_string())
    }

    fn run_until(&self, end: Option<BootTime>) -> Result<(), String> {
        match (&self.1, end) {
            (Some(guard), end) => guard.offer_until(end).map_err(|e| e.to_string()),
            (None, None) => Ok(()),
            (None, Some(_)) => Err("nothing would stop it at the end of its offer".to_owned()),
        }
    }

    fn lease_asked(&self) {
        if let Some(guard) = &self.1 {
            guard.lease_asked();
        }
    }
}
