//! `silo keys`: the keys of a tenant. Whoever has them can read its backups; without them nobody can.

use super::{print, store::StoreArgs};
use crate::backup::write_private;
use anyhow::{Context, Result, ensure};
use clap::Subcommand;
use silo::store::{Access, KeyRing, KeySource};
use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

#[derive(Subcommand)]
pub(super) enum KeysCommand {
    /// Make a key file with one random key; keep a copy where the store is not
    Create {
        /// The file; it must not exist yet
        file: PathBuf,
        /// The key's name, which manifests tell
        #[arg(long, default_value = "1")]
        id: String,
    },
    /// List the names of the keys in a file, the one in use first; never the keys
    List {
        /// The file
        file: PathBuf,
    },
    /// Add a new key, use it from now on, and wrap the store's data keys with it; packs stay
    Rotate {
        /// The key file; older keys stay in it
        file: PathBuf,
        /// The new key's name
        #[arg(long)]
        id: String,
        /// Whose data keys
        #[arg(long)]
        tenant: String,
        /// Delete what is wrapped with older keys: these are then good for nothing any more
        #[arg(long)]
        forget: bool,
        #[command(flatten)]
        store: StoreArgs,
    },
}

pub(super) fn run(command: &KeysCommand, json: bool) -> Result<()> {
    match command {
        KeysCommand::Create { file, id } => {
            write_private(file, &KeyRing::generate_line(id)?)?;
            let value = serde_json::json!({ "file": file, "id": id });
            let text = format!(
                "made {} with key \"{id}\"; keep a copy of it: without it backups cannot be read",
                file.display()
            );
            print(json, &value, &text)
        }
        KeysCommand::List { file } => {
            let ids: Vec<String> =
                KeyRing::from_file(file)?.ids().iter().map(ToString::to_string).collect();
            print(json, &serde_json::json!({ "file": file, "ids": ids }), &ids.join("\n"))
        }
        KeysCommand::Rotate { file, id, tenant, forget, store } => {
            let old = KeyRing::from_file(file)?;
            let known = old.ids().iter().any(|known| known.as_str() == id);
            if known {
                // An attempt before ended between the file and the store.
                let current = old.current()?;
                ensure!(
                    current.as_str() == id,
                    "{} has a key \"{id}\" already, and it is not the one in use; choose another \
                     name",
                    file.display()
                );
            } else {
                prepend(file, &KeyRing::generate_line(id)?)?;
            }
            let keys = KeyRing::from_file(file)?;
            let done = store.place()?.open(Access::Write)?.rotate(tenant, &keys, *forget)?;
            let value = serde_json::json!({
                "file": file, "id": id, "data_keys": done.keys, "wrapped": done.wrapped,
            });
            let text = format!(
                "key \"{id}\" is in use; {} of {} data keys of {tenant} were wrapped with it",
                done.wrapped, done.keys
            );
            print(json, &value, &text)
        }
    }
}

/// Puts a line before all others, as a whole or not at all, readable by its owner only.
fn prepend(path: &Path, line: &str) -> Result<()> {
    let failed = || format!("could not write {}", path.display());
    let old = fs::read_to_string(path).with_context(failed)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut file =
        tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new("."))).with_context(failed)?;
    file.as_file()
        .set_permissions(fs::Permissions::from_mode(0o600))
        .and_then(|()| file.write_all(format!("{line}{old}").as_bytes()))
        .and_then(|()| file.as_file().sync_all())
        .with_context(failed)?;
    file.persist(path).with_context(failed)?;
    Ok(())
}
