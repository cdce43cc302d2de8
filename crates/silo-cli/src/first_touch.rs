//! The order in which blocks of devices are first used: kept in a folder, one file a device, and
//! shipped with a move, so that the destination gets first what a start will touch first.
//!
//! Called by the source of a move. A file that is there is shipped as it is: it says what a start
//! touches. Without one it is recorded from now on, shipped as far as it goes, and written at the end.

use anyhow::{Context, Result, ensure};
use silo::moving::Volume;
use silo_block::{block::BlockRange, order::touch::Manifest};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

struct Order {
    volume: Arc<Volume>,
    path: PathBuf,
    /// From an earlier time.
    kept: Option<Manifest>,
}

/// The orders of a group.
pub(crate) struct Orders(Vec<Order>);

impl Orders {
    /// Reads what is in `folder`, which is made if there is none, and records the rest.
    ///
    /// # Errors
    /// If a file cannot be read, or is of another device.
    pub(crate) fn open(folder: &Path, volumes: &[Arc<Volume>]) -> Result<Self> {
        fs::create_dir_all(folder)
            .with_context(|| format!("could not make {} for first touches", folder.display()))?;
        let open = |volume: &Arc<Volume>| {
            let path = folder.join(format!("{}.touch", volume.name()));
            let kept = load(&path, volume)?;
            if kept.is_none() {
                volume.record_first_touch();
            }
            Ok(Order { volume: volume.clone(), path, kept })
        };
        Ok(Self(volumes.iter().map(open).collect::<Result<_>>()?))
    }

    /// The order of a device of the group.
    pub(crate) fn of(&self, device: usize) -> Vec<BlockRange> {
        let Some(Order { volume, kept, .. }) = self.0.get(device) else { return Vec::new() };
        let manifest = kept.clone().or_else(|| volume.first_touch());
        manifest.map_or_else(Vec::new, |manifest| manifest.order)
    }

    /// Writes what was recorded.
    ///
    /// # Errors
    /// If that cannot be written.
    pub(crate) fn keep(&self) -> Result<()> {
        for Order { volume, path, kept } in &self.0 {
            let recorded = volume.first_touch().filter(|recorded| !recorded.order.is_empty());
            let (None, Some(recorded)) = (kept, recorded) else { continue };
            write(path, &recorded.encode())
                .with_context(|| format!("could not keep first touches in {}", path.display()))?;
        }
        Ok(())
    }
}

fn load(path: &Path, volume: &Volume) -> Result<Option<Manifest>> {
    let read = || format!("the first touches in {}", path.display());
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(read),
    };
    let manifest = Manifest::decode(&bytes).with_context(read)?;
    let blocks = volume.geometry().blocks();
    ensure!(
        manifest.blocks == blocks,
        "{} are of a device of {} blocks, this has {blocks}; remove the file",
        read(),
        manifest.blocks
    );
    Ok(Some(manifest))
}

/// Replaces a file as a whole.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = fs::File::create(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&fresh, path)
}
