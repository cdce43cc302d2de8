//! Flags that name a history in a store and the keys to it, in place of a config file.

use crate::{
    backup::{Place, Target, key_ring},
    config::{Config, Secret},
};
use anyhow::{Context, Result};
use clap::Args;
use silo::store::{KeyRing, LineName, Retention};
use std::path::PathBuf;

/// The environment variable with the keys themselves.
const KEYS: &str = "SILO_KEYS";

/// A store and its keys.
#[derive(Args, Clone)]
#[command(next_help_heading = "The store")]
pub(super) struct StoreArgs {
    /// Take store, line and keys from the [backup] of this file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["store", "keys"])]
    backup_config: Option<PathBuf>,
    /// s3://bucket/folder?endpoint=…&region=…, gs://…, az://… or file:///folder; credentials come
    /// from the provider's usual variables, as AWS_ACCESS_KEY_ID
    #[arg(long, value_name = "URL", env = "SILO_STORE", required_unless_present = "backup_config")]
    store: Option<String>,
    /// The file with the tenant's keys; without it the variable SILO_KEYS holds them
    #[arg(long, value_name = "FILE", env = "SILO_KEY_FILE")]
    keys: Option<PathBuf>,
}

impl StoreArgs {
    /// Of what was given elsewhere.
    pub(super) fn given(store: Option<String>, keys: Option<PathBuf>) -> Self {
        Self { backup_config: None, store, keys }
    }

    fn backup(&self) -> Result<Option<(Config, String)>> {
        let Some(path) = &self.backup_config else { return Ok(None) };
        let config = Config::load(path)?;
        let backup = config.backup.as_ref();
        let backup = backup.with_context(|| format!("{} has no [backup]", path.display()))?;
        let members = config.members(backup.group.as_deref()).context("the group to back up")?;
        let group = members.0;
        Ok(Some((config, group)))
    }

    /// The store alone.
    ///
    /// # Errors
    /// If it is not named, or wrongly.
    pub(super) fn place(&self) -> Result<Place> {
        if let Some((config, _)) = self.backup()? {
            let backup = config.backup.context("the [backup] was there before")?;
            return Place::by_config(&backup.store);
        }
        Place::by_url(self.store.as_deref().context("no store is named; add --store URL")?)
    }

    /// The store and a line of it, for what needs no keys.
    ///
    /// # Errors
    /// If one of them is missing or wrong.
    pub(super) fn place_and_line(&self, line: Option<&str>) -> Result<(Place, LineName)> {
        let line = match (line, self.backup()?) {
            (Some(line), _) => LineName::parse(line)?,
            (None, Some((config, group))) => {
                let backup = config.backup.context("the [backup] was there before")?;
                LineName::new(&backup.tenant, backup.line.as_deref().unwrap_or(&group))?
            }
            (None, None) => anyhow::bail!("which line? write tenant/line"),
        };
        Ok((self.place()?, line))
    }

    /// The rules of the config, if there is one and it has any.
    ///
    /// # Errors
    /// If the config is wrong.
    pub(super) fn retention(&self) -> Result<Option<Retention>> {
        let backup = self.backup()?.and_then(|(config, _)| config.backup);
        Ok(backup.and_then(|backup| backup.retention.rules()))
    }

    /// The keys alone.
    ///
    /// # Errors
    /// If they are nowhere, or others can read them.
    pub(super) fn keys(&self) -> Result<KeyRing> {
        if let Some((config, _)) = self.backup()? {
            let backup = config.backup.context("the [backup] was there before")?;
            return key_ring(&backup.keys);
        }
        key_ring(&self.key_source())
    }

    /// Where the keys are.
    pub(super) fn key_source(&self) -> Secret {
        match &self.keys {
            Some(path) => Secret::File(path.clone()),
            None => Secret::Env(KEYS.to_owned()),
        }
    }

    /// The address of the store as it was given.
    pub(super) fn url(&self) -> Option<&str> {
        self.store.as_deref()
    }

    /// Store, keys and line; `line` is `tenant/line`, or that of the config.
    ///
    /// # Errors
    /// If one of them is missing or wrong.
    pub(super) fn target(&self, line: Option<&str>) -> Result<Target> {
        let line = match (line, self.backup()?) {
            (Some(line), _) => LineName::parse(line)?,
            (None, Some((config, group))) => {
                let backup = config.backup.context("the [backup] was there before")?;
                return Target::by_config(&backup, &group);
            }
            (None, None) => anyhow::bail!("which line? write tenant/line"),
        };
        Ok(Target { place: self.place()?, line, keys: self.keys()? })
    }
}
