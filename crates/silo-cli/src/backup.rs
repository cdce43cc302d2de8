//! Stores and keys as the config or flags name them, and the backup of a running service.
//!
//! Callers: `silo sync`, `silo serve` with a `[backup]`, and the commands about generations. What
//! must hold: secrets are read from where the config says they are and nowhere else, and no error
//! repeats one.

use crate::{
    config::{BackupConfig, Secret, StoreConfig},
    metrics::{Readings, Source, names, spread},
};
use anyhow::{Context, Result, anyhow, bail, ensure};
use silo::store::{
    Access, Backup, BackupOptions, Environment, KeyRing, Limits, LineName, LineWriter, Objects,
    Policy, Store, StoreError, StoreUrl, WriterOptions, capture::Capture,
};
use std::{
    ffi::OsString,
    fmt, fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Longest time between two generations' beginnings that the policy keeps by itself.
const REST: Duration = Duration::from_secs(10);

/// A store, and the environment that its credentials come from.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    url: StoreUrl,
    environment: Environment,
}

impl Place {
    /// As a command's flag says.
    ///
    /// # Errors
    /// If it is no address of a store.
    pub(crate) fn by_url(url: &str) -> Result<Self> {
        Ok(Self { url: url.parse()?, environment: Environment::of_process() })
    }

    /// As a config says.
    ///
    /// # Errors
    /// If it is no address of a store, or a secret is not where it should be.
    pub(crate) fn by_config(config: &StoreConfig) -> Result<Self> {
        let mut url = config.url.clone();
        let more = [("endpoint", &config.endpoint), ("region", &config.region)];
        for (key, value) in more {
            if let Some(value) = value {
                url.push(if url.contains('?') { '&' } else { '?' });
                url.push_str(&format!("{key}={value}"));
            }
        }
        // What is no text is nothing that a store asks for.
        let text = |(name, value): (OsString, OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        let mut environment: Vec<_> = std::env::vars_os().filter_map(text).collect();
        if let (Some(access), Some(secret)) = (&config.access_key, &config.secret_key) {
            let (access_name, secret_name) = variables(&config.url)?;
            environment.push((access_name.to_owned(), read_secret(access)?));
            environment.push((secret_name.to_owned(), read_secret(secret)?));
        }
        let pairs = environment.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        Ok(Self { url: url.parse()?, environment: Environment::given(pairs) })
    }

    /// Opens it.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub(crate) fn open(&self, access: Access) -> Result<Arc<Store>> {
        Ok(self.open_within(access, Limits::default())?)
    }

    /// Opens it for whoever can do without, if that takes long.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub(crate) fn open_within(
        &self,
        access: Access,
        limits: Limits,
    ) -> Result<Arc<Store>, StoreError> {
        Store::open(&self.url, access, &self.environment, limits)
    }

    /// Opens it for plain objects.
    ///
    /// # Errors
    /// As [`Objects::open`].
    pub(crate) fn objects(&self) -> Result<Objects> {
        Ok(Objects::open(&self.url, &self.environment, Limits::default())?)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.url.fmt(f)
    }
}

/// The variables by which a provider's client takes its two keys.
fn variables(url: &str) -> Result<(&'static str, &'static str)> {
    if url.starts_with("s3://") {
        Ok(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    } else if url.starts_with("az://") {
        Ok(("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"))
    } else {
        bail!(
            "access-key and secret-key are of S3 and Azure; a service account of Google comes by \
             GOOGLE_SERVICE_ACCOUNT, a local folder needs none"
        )
    }
}

/// Reads a secret from where it is.
fn read_secret(secret: &Secret) -> Result<String> {
    match secret {
        // The system's own error repeats a value that is no text.
        Secret::Env(name) => std::env::var_os(name)
            .with_context(|| format!("the environment variable {name} is to hold a secret"))?
            .into_string()
            .map_err(|_| anyhow!("the secret in the environment variable {name} is no text")),
        Secret::File(path) => {
            let read = || format!("could not read the secret in {}", path.display());
            let mode = fs::metadata(path).with_context(read)?.permissions().mode();
            ensure!(
                mode & 0o077 == 0,
                "{} holds a secret and others can read it; chmod 600 {0}",
                path.display()
            );
            Ok(fs::read_to_string(path).with_context(read)?.trim().to_owned())
        }
    }
}

/// The keys of a tenant.
///
/// # Errors
/// If they are not there, others can read them, or they are no keys.
pub(crate) fn key_ring(secret: &Secret) -> Result<KeyRing> {
    Ok(match secret {
        Secret::Env(name) => KeyRing::from_env(name)?,
        Secret::File(path) => KeyRing::from_file(path)?,
    })
}

/// Which history of which store, with the keys to it.
#[derive(Debug)]
pub(crate) struct Target {
    /// The store.
    pub(crate) place: Place,
    /// The history.
    pub(crate) line: LineName,
    /// The keys.
    pub(crate) keys: KeyRing,
}

impl Target {
    /// As a config says; `group` is the name of the group that is backed up.
    ///
    /// # Errors
    /// If a secret is not where it should be.
    pub(crate) fn by_config(config: &BackupConfig, group: &str) -> Result<Self> {
        let line = config.line.as_deref().unwrap_or(group);
        Ok(Self {
            place: Place::by_config(&config.store)?,
            line: LineName::new(&config.tenant, line)?,
            keys: key_ring(&config.keys)?,
        })
    }
}

/// A backup that runs beside a service.
pub(crate) struct Running {
    backup: Backup,
    store: Arc<Store>,
    line: LineName,
    began: Instant,
    /// Reported once.
    told: Mutex<Option<String>>,
}

impl Running {
    /// Takes the line over and begins.
    ///
    /// # Errors
    /// If the store cannot be reached, or a key is lost.
    #[tracing::instrument(name = "backup", skip_all, fields(line = %target.line))]
    pub(crate) fn start(
        target: &Target,
        capture: Arc<dyn Capture>,
        max_age: Duration,
        rate: Option<u64>,
    ) -> Result<Arc<Self>> {
        let store = target.place.open(Access::Write)?;
        let options = WriterOptions { rate, ..WriterOptions::default() };
        let writer = LineWriter::open(store.clone(), &target.keys, &target.line, options)?;
        let policy = Policy {
            max_age,
            min_interval: REST.min(max_age),
            period: (max_age / 4).clamp(Duration::from_millis(50), Duration::from_secs(1)),
            ..Policy::default()
        };
        let options = BackupOptions { policy, tracked_since: None };
        Ok(Arc::new(Self {
            backup: Backup::start(writer, capture, options)?,
            store,
            line: target.line.clone(),
            began: Instant::now(),
            told: Mutex::default(),
        }))
    }

    /// The backup.
    pub(crate) fn backup(&self) -> &Backup {
        &self.backup
    }

    /// Tells of trouble when it is new; an error if there is no point in going on.
    ///
    /// # Errors
    /// If another writer has taken the line.
    pub(crate) fn check(&self) -> Result<()> {
        let status = self.backup.status();
        if status.ended {
            let why = status.error.unwrap_or_else(|| "it was stopped".to_owned());
            bail!("the backup of {} has ended: {why}", self.line);
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if status.error != *told {
            if let Some(error) = &status.error {
                eprintln!("silo: backup of {}: {error}", self.line);
            }
            *told = status.error;
        }
        Ok(())
    }
}

impl Source for Running {
    fn read(&self, readings: &mut Readings) {
        let line = self.line.to_string();
        let line = [line.as_str()];
        let status = self.backup.status();
        readings.count(&names::BACKUP_GENERATIONS, &line, status.generations);
        readings.count(&names::BACKUP_FAILURES, &line, status.failures);
        readings.count(&names::BACKUP_BYTES, &line, status.bytes);
        let newest = status.committed.unwrap_or(self.began);
        readings.level(&names::BACKUP_AGE, &line, newest.elapsed().as_secs_f64());
        readings.level(&names::BACKUP_ENDED, &line, f64::from(u8::from(status.ended)));
        if let Some(last) = &status.last {
            readings.level(&names::BACKUP_NUMBER, &line, last.number as f64);
            readings.level(&names::BACKUP_LAST_BYTES, &line, last.bytes() as f64);
            readings.level(&names::BACKUP_LAST_REQUESTS, &line, last.requests.total() as f64);
            readings.level(&names::BACKUP_LAST_SECONDS, &line, last.took.as_secs_f64());
            readings.level(&names::BACKUP_LAST_HELD, &line, last.held.as_secs_f64());
        }
        readings.spread(&names::BACKUP_HELD, &line, spread(&status.holds));
        readings.level(&names::BACKUP_TRACKED, &line, status.tracked as f64);
        readings.level(&names::BACKUP_CHANGED, &line, status.changed.blocks as f64);
        readings.level(&names::BACKUP_FULLEST, &line, status.changed.fullest as f64);
        let oldest = status.oldest.map_or(0.0, |oldest| oldest.elapsed().as_secs_f64());
        readings.level(&names::BACKUP_OLDEST, &line, oldest);
        let requests = self.store.requests();
        for (kind, count) in [
            ("write", requests.writes),
            ("create", requests.creates),
            ("read", requests.reads),
            ("list", requests.lists),
            ("delete", requests.deletes),
        ] {
            readings.count(&names::STORE_REQUESTS, &[line[0], kind], count);
        }
        readings.count(&names::STORE_REPEATED, &line, requests.repeated);
        readings.count(&names::STORE_UPLOADED, &line, requests.uploaded);
        readings.count(&names::STORE_DOWNLOADED, &line, requests.downloaded);
    }
}

/// Writes text that only its owner can read into a new file.
///
/// # Errors
/// If there is one already, or it cannot be written.
pub(crate) fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let make = || format!("could not make {}", path.display());
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(make)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).with_context(make)
}
