//! What a server offers: devices under names, each of which can be exchanged while it is served.

use super::{
    BlockDevice, NbdError,
    gate::{Gate, Pass},
};
use identity::HostName;
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

/// Longest name and description of an export, in bytes (the protocol's own limit).
pub const MAX_TEXT: usize = 4096;

/// Whether clients may write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// As far as the device takes writes.
    #[default]
    ReadWrite,
    /// Never.
    ReadOnly,
}

/// Which clients see an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Peers {
    /// All that reach the server and pass its TLS.
    #[default]
    Anyone,
    /// Those that have proved one of these names by TLS; to others there is no such export.
    Named(BTreeSet<HostName>),
}

/// How an export is offered.
#[derive(Clone, Debug, Default)]
pub struct ExportOptions {
    /// For people; `nbdinfo` shows it.
    pub description: String,
    /// Whether clients may write.
    pub access: Access,
    /// Which clients see it.
    pub peers: Peers,
}

/// A device under a name.
pub struct Export {
    name: String,
    options: ExportOptions,
    size: u64,
    gate: Gate,
    device: RwLock<Arc<dyn BlockDevice>>,
}

/// A device in use by one request.
pub(super) struct Hold<'a> {
    pub(super) device: Arc<dyn BlockDevice>,
    /// After the device, so that nobody has it when the gate counts zero.
    _pass: Pass<'a>,
}

impl Export {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its size in bytes, which is that of every device behind it.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn description(&self) -> &str {
        &self.options.description
    }

    /// The device that is behind it now.
    #[must_use]
    pub fn device(&self) -> Arc<dyn BlockDevice> {
        self.device.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it refuses writes.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.options.access == Access::ReadOnly || self.device().is_read_only()
    }

    pub(super) fn is_open_to(&self, peer: Option<&HostName>) -> bool {
        match (&self.options.peers, peer) {
            (Peers::Anyone, _) => true,
            (Peers::Named(names), Some(peer)) => names.contains(peer),
            (Peers::Named(_), None) => false,
        }
    }

    /// The device, kept in place until the hold is dropped. `None` if `give_up` says so while
    /// another device is being put in.
    pub(super) fn hold(&self, give_up: impl Fn() -> bool) -> Option<Hold<'_>> {
        let pass = self.gate.enter(give_up)?;
        Some(Hold { device: self.device(), _pass: pass })
    }

    /// Puts another device behind the export while clients go on using it. Requests in hand end
    /// first, then the old device is flushed (so that a client's next flush keeps what it
    /// promises), then `next` makes the new device; whoever asks meanwhile waits. Gives the old
    /// device back.
    ///
    /// # Errors
    /// If requests do not end within `limit`, if the old device cannot be flushed, if `next` fails,
    /// or if the new device has another size or takes no writes where the old one did. Then the old
    /// one stays.
    pub fn swap(
        &self,
        limit: Duration,
        next: impl FnOnce(&Arc<dyn BlockDevice>) -> io::Result<Arc<dyn BlockDevice>>,
    ) -> Result<Arc<dyn BlockDevice>, NbdError> {
        let export = || self.name.clone();
        let failed = |source| NbdError::Swap { export: export(), source };
        // Most of the work, while requests still come.
        self.device().flush().map_err(failed)?;
        let swapped = self.gate.while_closed(limit, || {
            let old = self.device();
            old.flush().map_err(failed)?;
            let new = next(&old).map_err(failed)?;
            if new.size() != self.size {
                return Err(NbdError::Size { export: export(), old: self.size, new: new.size() });
            }
            if new.is_read_only() && !old.is_read_only() {
                let error = io::Error::new(
                    io::ErrorKind::ReadOnlyFilesystem,
                    "the new device takes no writes, and clients were told that it does",
                );
                return Err(failed(error));
            }
            *self.device.write().unwrap_or_else(PoisonError::into_inner) = new;
            Ok(old)
        });
        swapped.unwrap_or_else(|requests| Err(NbdError::Busy { export: export(), requests, limit }))
    }
}

/// The exports of a server. They can be added and removed while it runs.
#[derive(Default)]
pub struct Exports(RwLock<BTreeMap<String, Arc<Export>>>);

impl Exports {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Offers `device` as `name`. A client that asks for "" gets the export of that name, or else
    /// the only one there is.
    ///
    /// # Errors
    /// If the name is taken, or name or description are longer than [`MAX_TEXT`].
    pub fn add(
        &self,
        name: &str,
        device: Arc<dyn BlockDevice>,
        options: ExportOptions,
    ) -> Result<Arc<Export>, NbdError> {
        if name.len() > MAX_TEXT || options.description.len() > MAX_TEXT {
            return Err(NbdError::LongName { bytes: name.len().max(options.description.len()) });
        }
        let export = Arc::new(Export {
            name: name.to_owned(),
            options,
            size: device.size(),
            gate: Gate::default(),
            device: RwLock::new(device),
        });
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if all.contains_key(name) {
            return Err(NbdError::NameTaken { export: name.to_owned() });
        }
        all.insert(name.to_owned(), export.clone());
        Ok(export)
    }

    /// Offers the export to nobody any more; clients that have it keep it until they go.
    pub fn remove(&self, name: &str) -> Option<Arc<Export>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(name)
    }

    /// All of them, by name.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Export>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// What a client that has proved to be `peer` gets for `name`.
    pub(super) fn find(&self, name: &[u8], peer: Option<&HostName>) -> Option<Arc<Export>> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let named = str::from_utf8(name).ok().and_then(|name| all.get(name));
        let found = match (named, all.len()) {
            (Some(export), _) => Some(export),
            (None, 1) if name.is_empty() => all.values().next(),
            _ => None,
        };
        found.filter(|export| export.is_open_to(peer)).cloned()
    }
}
