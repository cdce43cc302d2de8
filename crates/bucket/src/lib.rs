//! From an address to an object store: S3, GCS, Azure, a local folder. Backups (`silo-store`) and
//! leases (`lease`) take the same addresses.
//!
//! Credentials come from the environment's usual variables (`AWS_…`, `GOOGLE_…`, `AZURE_…`) and
//! never from the address, which is logged. A local server is reached with
//! `s3://bucket/folder?endpoint=http://127.0.0.1:9000`; plain HTTP only where that says so.

use object_store::{
    ClientOptions, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    local::LocalFileSystem,
    memory::InMemory,
    path::Path,
};
use std::{fmt, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

/// An address that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{url}\" is no store: {detail}; write s3://bucket/folder, gs://bucket/folder, az://container/folder or file:///folder"
)]
pub struct BadUrl {
    /// What was given.
    pub url: String,
    /// What is wrong with it.
    pub detail: String,
}

/// Why a client was not made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder cannot be made.
    #[error("cannot create the store's folder {}: {source}", path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The client lacks something.
    #[error("cannot open {url}: {source}")]
    Client {
        /// The address.
        url: String,
        /// What.
        source: Box<object_store::Error>,
    },
}

/// A client for what an address names.
pub struct Bucket {
    /// The whole bucket, container or folder.
    pub store: Arc<dyn ObjectStore>,
    /// The part of it that is meant.
    pub prefix: Path,
    /// Of a local store.
    pub folder: Option<PathBuf>,
}

/// Which kind of store.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    S3,
    Gcs,
    Azure,
    Folder(PathBuf),
    Memory,
}

/// Address of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreUrl {
    text: String,
    kind: Kind,
    bucket: String,
    prefix: String,
    endpoint: Option<String>,
    region: Option<String>,
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for StoreUrl {
    type Err = BadUrl;

    fn from_str(text: &str) -> Result<Self, BadUrl> {
        let wrong = |detail: &str| BadUrl { url: text.to_owned(), detail: detail.to_owned() };
        let (scheme, rest) =
            text.split_once("://").ok_or_else(|| wrong("it does not begin with a scheme"))?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (mut endpoint, mut region) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("endpoint", value))
                    if value.starts_with("http://") || value.starts_with("https://") =>
                {
                    endpoint = Some(value.to_owned());
                }
                Some(("endpoint", _)) => return Err(wrong("endpoint= takes http:// or https://")),
                Some(("region", value)) => region = Some(value.to_owned()),
                _ => return Err(wrong("after the ? it takes endpoint= and region= only")),
            }
        }
        if place.contains('@') {
            return Err(wrong("credentials belong into the environment, not into an address"));
        }
        let text = text.to_owned();
        if scheme == "file" {
            let path = PathBuf::from(place);
            if !path.is_absolute() || !query.is_empty() {
                return Err(wrong("a local folder is file:/// and an absolute path"));
            }
            let (bucket, prefix) = (String::new(), String::new());
            return Ok(Self { text, kind: Kind::Folder(path), bucket, prefix, endpoint, region });
        }
        let kind = match scheme {
            "s3" => Kind::S3,
            "gs" => Kind::Gcs,
            "az" => Kind::Azure,
            "memory" => Kind::Memory,
            _ => return Err(wrong("schemes are s3, gs, az, file, and memory for trying out")),
        };
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        if bucket.is_empty() && kind != Kind::Memory {
            return Err(wrong("it names no bucket"));
        }
        let (bucket, prefix) = (bucket.to_owned(), prefix.trim_matches('/').to_owned());
        if Path::parse(&prefix).is_err() {
            return Err(wrong("its folder is not a path"));
        }
        Ok(Self { text, kind, bucket, prefix, endpoint, region })
    }
}

/// Variables that credentials are taken from.
#[derive(Clone, Default)]
pub struct Environment(Vec<(String, String)>);

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

impl Environment {
    /// This process's.
    #[must_use]
    pub fn of_process() -> Self {
        Self(
            std::env::vars_os()
                .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
                .collect(),
        )
    }

    /// Given ones, for who keeps them elsewhere.
    pub fn given<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self(pairs.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    fn with<K: FromStr>(&self, beginning: &str) -> Vec<(K, &str)> {
        let ours = self.0.iter().filter(|(name, _)| name.starts_with(beginning));
        ours.filter_map(|(name, value)| {
            Some((name.to_ascii_lowercase().parse::<K>().ok()?, value.as_str()))
        })
        .collect()
    }
}

impl StoreUrl {
    /// Whether it is an object store somewhere else: no folder, no memory.
    #[must_use]
    pub const fn is_remote(&self) -> bool {
        matches!(self.kind, Kind::S3 | Kind::Gcs | Kind::Azure)
    }

    /// Makes the client, and no request yet. `connect` is the longest that a connection may take to
    /// come about; requests have no deadline and are not repeated, which is left to the caller.
    ///
    /// # Errors
    /// The environment lacks what the client needs, or the folder cannot be made.
    pub fn open(&self, environment: &Environment, connect: Duration) -> Result<Bucket, OpenError> {
        let failed = |source: object_store::Error| OpenError::Client {
            url: self.text.clone(),
            source: Box::new(source),
        };
        // Another part of the process may have chosen one already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let insecure = self.endpoint.as_deref().is_some_and(|e| e.starts_with("http://"));
        let client = ClientOptions::new()
            .with_allow_http(insecure)
            .with_timeout_disabled()
            .with_connect_timeout(connect);
        // Repeating is done where it is counted and where a create is read back.
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let store: Arc<dyn ObjectStore> = match &self.kind {
            Kind::S3 => {
                let mut builder = AmazonS3Builder::new();
                for (key, value) in environment.with::<AmazonS3ConfigKey>("AWS_") {
                    builder = builder.with_config(key, value);
                }
                builder = builder
                    .with_bucket_name(&self.bucket)
                    .with_client_options(client)
                    .with_retry(retry);
                if let Some(endpoint) = &self.endpoint {
                    builder = builder
                        .with_endpoint(endpoint)
                        .with_allow_http(insecure)
                        .with_virtual_hosted_style_request(false);
                }
                if let Some(region) = &self.region {
                    builder = builder.with_region(region);
                }
                Arc::new(builder.build().map_err(failed)?)
            }
            Kind::Gcs => {
                let mut builder = GoogleCloudStorageBuilder::new();
                for (key, value) in environment.with::<GoogleConfigKey>("GOOGLE_") {
                    builder = builder.with_config(key, value);
                }
                builder = builder
                    .with_bucket_name(&self.bucket)
                    .with_client_options(client)
                    .with_retry(retry);
                if let Some(endpoint) = &self.endpoint {
                    builder = builder.with_base_url(endpoint);
                }
                Arc::new(builder.build().map_err(failed)?)
            }
            Kind::Azure => {
                let mut builder = MicrosoftAzureBuilder::new();
                for (key, value) in environment.with::<AzureConfigKey>("AZURE_") {
                    builder = builder.with_config(key, value);
                }
                builder = builder
                    .with_container_name(&self.bucket)
                    .with_client_options(client)
                    .with_retry(retry);
                if let Some(endpoint) = &self.endpoint {
                    builder = builder.with_endpoint(endpoint.clone()).with_allow_http(insecure);
                }
                Arc::new(builder.build().map_err(failed)?)
            }
            Kind::Folder(path) => {
                std::fs::create_dir_all(path)
                    .map_err(|source| OpenError::Folder { path: path.clone(), source })?;
                let store = LocalFileSystem::new_with_prefix(path).map_err(failed)?;
                Arc::new(store.with_fsync(true).with_automatic_cleanup(false))
            }
            Kind::Memory => Arc::new(InMemory::new()),
        };
        let prefix = Path::parse(&self.prefix).map_err(|e| failed(e.into()))?;
        let folder = match &self.kind {
            Kind::Folder(path) => Some(path.clone()),
            _ => None,
        };
        Ok(Bucket { store, prefix, folder })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_known_kinds_are_taken_and_others_refused_by_what_is_wrong() {
        let s3: StoreUrl = "s3://b/a/c?endpoint=http://127.0.0.1:9&region=x".parse().unwrap();
        assert_eq!((s3.bucket.as_str(), s3.prefix.as_str()), ("b", "a/c"));
        assert!("gs://bucket".parse::<StoreUrl>().is_ok());
        assert!("file:///srv/store".parse::<StoreUrl>().is_ok());
        for (bad, says) in [
            ("bucket", "scheme"),
            ("ftp://x", "schemes are"),
            ("s3://", "no bucket"),
            ("s3://key:secret@bucket/x", "environment"),
            ("file://relative", "absolute"),
            ("s3://b?endpoint=10.0.0.1", "http://"),
            ("s3://b?secret=1", "only"),
            ("s3://b/a//../c", "path"),
        ] {
            let error = bad.parse::<StoreUrl>().unwrap_err().to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }

    #[test]
    fn credentials_are_not_shown() {
        let environment = Environment::given([("AWS_SECRET_ACCESS_KEY", "hush")]);
        assert!(!format!("{environment:?}").contains("hush"));
    }
}
