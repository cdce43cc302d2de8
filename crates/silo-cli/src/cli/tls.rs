//! `silo tls`: certificates for hosts that move devices or serve them over a network.

use super::print;
use anyhow::Result;
use clap::Subcommand;
use identity::{Authority, HostName};
use std::{path::PathBuf, time::Duration};

#[derive(Subcommand)]
pub(super) enum TlsCommand {
    /// Make an authority: ca.crt, which every host needs, and ca.key, which stays in this folder
    Init {
        /// The folder
        dir: PathBuf,
    },
    /// Issue a host's certificate: NAME.crt and NAME.key, to copy to the host beside ca.crt
    Issue {
        /// The folder of the authority
        dir: PathBuf,
        /// The host's name, as in host-a or a.example.org
        name: HostName,
        /// How many days it is good for
        #[arg(long, default_value = "365", value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
    },
}

pub(super) fn run(command: &TlsCommand, json: bool) -> Result<()> {
    match command {
        TlsCommand::Init { dir } => {
            Authority::create(dir)?;
            let value = serde_json::json!({ "authority": dir.join("ca.crt") });
            let text = format!(
                "made an authority in {}; next: silo tls issue {} NAME",
                dir.display(),
                dir.display()
            );
            print(json, &value, &text)
        }
        TlsCommand::Issue { dir, name, days } => {
            let length = Duration::from_secs(u64::from(*days) * 24 * 3600);
            Authority::open(dir)?.issue(name, length)?;
            let (certificate, key) =
                (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
            let value = serde_json::json!({ "certificate": certificate, "key": key });
            let text = format!(
                "issued {} for {days} days; copy it, {name}.key and ca.crt to the host",
                certificate.display()
            );
            print(json, &value, &text)
        }
    }
}
