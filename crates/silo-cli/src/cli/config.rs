//! `silo config`: what a config file may say, and whether one says it right.

use super::print;
use crate::config::Config;
use anyhow::Result;
use clap::Subcommand;
use std::path::PathBuf;

#[derive(Subcommand)]
pub(super) enum ConfigCommand {
    /// Check a config file; nothing is opened or connected to
    Check {
        /// The file
        file: PathBuf,
    },
    /// Print the JSON schema of config files, for editors
    Schema,
}

pub(super) fn run(command: &ConfigCommand, json: bool) -> Result<()> {
    match command {
        ConfigCommand::Check { file } => {
            let config = Config::load(file)?;
            let devices: Vec<&String> = config.device.keys().collect();
            let value = serde_json::json!({
                "file": file,
                "devices": devices,
                "groups": config.group.keys().collect::<Vec<_>>(),
                "backup": config.backup.is_some(),
                "migrate": config.migrate.is_some(),
            });
            let text = format!("{}: good, {} devices", file.display(), devices.len());
            print(json, &value, &text)
        }
        ConfigCommand::Schema => {
            let schema = Config::schema();
            let text = serde_json::to_string_pretty(&schema)?;
            print(json, &schema, &text)
        }
    }
}
