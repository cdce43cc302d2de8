//! From an address to a store.

use super::{Limits, Remote};
use crate::error::{Result, StoreError};
use std::time::Duration;

pub use bucket::{Environment, StoreUrl};

impl From<bucket::BadUrl> for StoreError {
    fn from(bad: bucket::BadUrl) -> Self {
        Self::Url { url: bad.url, detail: bad.detail }
    }
}

/// Opens the store: makes no request yet.
pub(crate) fn open(url: &StoreUrl, environment: &Environment, limits: Limits) -> Result<Remote> {
    let connect = limits.request.min(Duration::from_secs(5));
    let bucket = url.open(environment, connect).map_err(|error| match error {
        bucket::OpenError::Folder { source, .. } => {
            StoreError::Local { operation: "create the store's folder", source }
        }
        bucket::OpenError::Client { url: object, source } => {
            StoreError::Request { operation: "open", object, attempts: 1, source }
        }
    })?;
    let mut remote = Remote::new(bucket.store, bucket.prefix, url.to_string(), limits)?;
    remote.folder = bucket.folder;
    Ok(remote)
}
