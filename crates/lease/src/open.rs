//! From what people write to a store.

use super::{Cells, FileStore, LeaseStore};
use std::{path::Path, sync::Arc, time::Duration};

/// Why a store of leases was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The words are no address.
    #[error("lease store \"{given}\": {detail}")]
    Address {
        /// What was given.
        given: String,
        /// What is wrong with it, and what can be said instead.
        detail: String,
    },
    /// It is one, and opening failed.
    #[error("lease store: cannot {0}")]
    Failed(String),
}

/// Schemes that may have been left out.
const KNOWN: [&str; 8] =
    ["sqlite", "postgres", "postgresql", "etcd", "kubernetes", "s3", "gs", "az"];

/// Whether whoever runs the store at this address bills each request, as object stores do.
#[must_use]
pub fn bills_requests(address: &str) -> bool {
    let scheme = address.split_once(':').map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| ["s3", "gs", "az"].contains(&scheme))
}

/// Opens the store at `address`: see [`open_cells`].
///
/// # Errors
/// As there.
pub fn open(address: &str, limit: Duration) -> Result<Arc<dyn LeaseStore>, OpenError> {
    Ok(Arc::new(open_cells(address, limit)?))
}

/// Opens the store at `address`, each behind a cargo feature but the first:
///
/// | address | store |
/// |---|---|
/// | `/dir`, `file:/dir` | a directory |
/// | `sqlite:/file` | an SQLite file |
/// | `postgres://user@host/database` | a table in PostgreSQL; the password from `PGPASSWORD` or `password_file=` |
/// | `etcd://host:port,host:port/prefix` | etcd |
/// | `s3://bucket/folder`, `gs://…`, `az://…` | objects; credentials from the environment, as for backups |
/// | `kubernetes://namespace` | Lease objects |
///
/// A call waits at most `limit` for other processes' locks, a few times at worst, or for a store that
/// is elsewhere, and a second more. Only the first two ask the store anything here: the others may be
/// away when a program starts that needs them later.
///
/// # Errors
/// The address is none that this program knows, or the store cannot be opened.
pub fn open_cells(address: &str, limit: Duration) -> Result<Arc<dyn Cells>, OpenError> {
    let wrong = |detail: String| OpenError::Address { given: shown(address), detail };
    let (scheme, rest) = match address.split_once(':') {
        // A path may have a colon in it, behind a slash.
        Some((scheme, rest)) if !scheme.contains('/') => (scheme, rest),
        _ => ("file", address),
    };
    if rest.is_empty() {
        return Err(wrong("it names no path".to_owned()));
    }
    // file:///a/path is the same as file:/a/path.
    let path = Path::new(rest.strip_prefix("//").unwrap_or(rest));
    match scheme {
        "file" => match FileStore::open(path, limit) {
            Ok(store) => Ok(Arc::new(store)),
            Err(e) => Err(OpenError::Failed(format!("make the directory {}: {e}", path.display()))),
        },
        #[cfg(feature = "sqlite")]
        "sqlite" => match crate::SqliteStore::open(path, limit) {
            Ok(store) => Ok(Arc::new(store)),
            Err(e) => Err(OpenError::Failed(e)),
        },
        #[cfg(feature = "postgres")]
        "postgres" | "postgresql" => {
            let password = std::env::var("PGPASSWORD").ok();
            let store = crate::postgres::Postgres::new(address, password.as_deref(), limit);
            remote(store.map_err(wrong)?, limit)
        }
        #[cfg(feature = "etcd")]
        "etcd" => remote(crate::etcd::Etcd::new(rest).map_err(wrong)?, limit),
        #[cfg(feature = "kubernetes")]
        "kubernetes" => {
            let variable = |name: &str| std::env::var(name).ok();
            remote(crate::kubernetes::Kubernetes::new(rest, variable).map_err(wrong)?, limit)
        }
        #[cfg(feature = "object")]
        "s3" | "gs" | "az" => {
            let url = address.parse().map_err(|e: bucket::BadUrl| wrong(e.detail))?;
            open_bucket(&url, &bucket::Environment::of_process(), limit)
        }
        known if KNOWN.contains(&known) => {
            Err(wrong(format!("this program was built without stores of that kind ({known})")))
        }
        _ => Err(wrong(
            "it is no directory and no address that is known: use a directory, file:/directory, \
             sqlite:/file, postgres://user@host/database, etcd://host:port/prefix, \
             s3://bucket/folder (gs:, az:), or kubernetes://namespace"
                .to_owned(),
        )),
    }
}

/// Opens a store of leases in an object store, with credentials of the caller's.
///
/// # Errors
/// The address is a folder's or memory's, or the credentials do not do.
#[cfg(feature = "object")]
pub fn open_bucket(
    url: &bucket::StoreUrl,
    environment: &bucket::Environment,
    limit: Duration,
) -> Result<Arc<dyn Cells>, OpenError> {
    if !url.is_remote() {
        return Err(OpenError::Address {
            given: url.to_string(),
            detail: "leases in a folder are /folder or file:/folder; there are none in memory"
                .into(),
        });
    }
    let connect = Duration::from_secs(1).min(limit);
    let opened = url.open(environment, connect);
    let opened = opened.map_err(|e| OpenError::Failed(format!("open it: {e}")))?;
    remote(crate::object::Objects::new(opened, url.to_string()), limit)
}

#[cfg(feature = "_remote")]
fn remote(
    backend: impl crate::remote::Backend,
    limit: Duration,
) -> Result<Arc<dyn Cells>, OpenError> {
    match crate::remote::Remote::new(backend, limit) {
        Ok(store) => Ok(Arc::new(store)),
        Err(e) => Err(OpenError::Failed(e)),
    }
}

/// An address that was refused may have a password in it.
#[cfg(any(feature = "postgres", feature = "_http"))]
fn shown(address: &str) -> String {
    crate::address::without_secrets(address)
}

#[cfg(not(any(feature = "postgres", feature = "_http")))]
fn shown(address: &str) -> String {
    address.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_store_bills_requests_and_no_other_store_does() {
        assert!(["s3://b/f?region=x", "gs://b/f", "az://c/f"].into_iter().all(bills_requests));
        let free = ["/s3", "file:/s3", "sqlite:/s3", "etcd://s3:1/gs", "postgres://s3@a/b", "s3"];
        assert!(!free.into_iter().any(bills_requests));
    }

    #[test]
    fn an_address_is_a_directory_or_says_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("a").display().to_string();
        for good in [dir.clone(), format!("file:{dir}"), format!("file://{dir}")] {
            assert!(open(&good, Duration::from_secs(1)).is_ok(), "{good}");
        }
        for bad in ["", "file:", "sqlite:", "etcd:", "consul://127.0.0.1:8500"] {
            let e = open(bad, Duration::from_secs(1)).err().unwrap().to_string();
            assert!(e.contains(bad), "{e}");
        }
        #[cfg(feature = "postgres")]
        {
            let e = open("postgres://me:hush@a/leases", Duration::from_secs(1)).err().unwrap();
            let e = e.to_string();
            assert!(e.contains("postgres://me:…@a/leases") && !e.contains("hush"), "{e}");
        }
        let file = folder.path().join("file");
        std::fs::write(&file, b"x").unwrap();
        let e = open(&file.join("b").display().to_string(), Duration::from_secs(1));
        assert!(e.err().unwrap().to_string().contains("make the directory"));
    }
}
