//! What the types cannot say: names that must exist, sizes that must fit, combinations that cannot
//! work. Looks at nothing outside of the file.

use super::{
    ByteSize, Config, DeviceConfig, MigrateConfig, NbdConfig, SourceConfig, StoreConfig,
    problem::{Finding, nearest},
};
use silo::{device::DeviceName, hash::RootHash, nbd::NbdUri, store::LineName};
use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

/// Collects findings below one place of the file.
struct At<'a> {
    keys: Vec<String>,
    findings: &'a mut Vec<Finding>,
}

impl At<'_> {
    fn below(&mut self, key: &str) -> At<'_> {
        let keys = self.keys.iter().cloned().chain([key.to_owned()]).collect();
        At { keys, findings: self.findings }
    }

    fn wrong(&mut self, key: &str, message: impl Into<String>) {
        let keys = self.keys.iter().cloned().chain([key.to_owned()]).collect();
        self.findings.push(Finding { keys, message: message.into() });
    }
}

/// Everything that is wrong.
pub(super) fn all(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut root = At { keys: Vec::new(), findings: &mut findings };
    for (name, device) in &config.device {
        let mut devices = root.below("device");
        if DeviceName::new(name).is_none() {
            devices
                .wrong(name, "a device's name is at most 64 lower-case letters, digits and dashes");
        }
        check_device(&mut devices.below(name), device, config);
    }
    check_groups(&mut root, config);
    check_shared_places(&mut root, config);
    if let Some(identity) = &config.identity
        && identity.name.parse::<identity::HostName>().is_err()
    {
        root.below("identity").wrong("name", "not a host's name; write host-a or a.example.org");
    }
    if let Some(backup) = &config.backup {
        let mut at = root.below("backup");
        check_group_of(&mut at, config, backup.group.as_deref());
        check_store(&mut at.below("store"), &backup.store);
        if let Err(error) = LineName::new(&backup.tenant, backup.line.as_deref().unwrap_or("x")) {
            at.wrong("tenant", error.to_string());
        }
        if backup.max_age.0.is_zero() {
            at.wrong("max-age", "a backup needs some time; write 1s or more");
        }
        if backup.bandwidth == Some(ByteSize(0)) {
            at.wrong(
                "bandwidth",
                "nothing moves at 0 bytes a second; leave the key out for no limit",
            );
        }
    }
    check_migrate(&mut root, config);
    findings
}

fn check_device(at: &mut At<'_>, device: &DeviceConfig, config: &Config) {
    let block = device.block_size.0;
    if !block.is_power_of_two() || !(512..=1 << 20).contains(&block) {
        at.wrong("block-size", "must be a power of two from 512 to 1M");
    }
    if device.size == Some(ByteSize(0)) {
        at.wrong("size", "a device has at least one byte");
    }
    if let Some(hash) = &device.hash
        && let Err(error) = hash.parse::<RootHash>()
    {
        at.wrong("hash", error.to_string());
    }
    check_source(at, device);
    if device.read_only && !device.overlays.is_empty() {
        at.wrong("read-only", "overlays take writes; leave out one of the two");
    }
    if device.write_cache.as_ref().is_some_and(|cache| cache.limit.0 < block) {
        at.below("write-cache").wrong("limit", "must hold at least one block");
    }
    if let Some(nbd) = &device.expose.nbd {
        check_nbd(&mut at.below("expose").below("nbd"), nbd, config);
    }
    if let Some(vhost) = &device.expose.vhost_user_blk
        && !(1..=64).contains(&vhost.queues)
    {
        at.below("expose").below("vhost-user-blk").wrong("queues", "must be from 1 to 64");
    }
}

fn check_source(at: &mut At<'_>, device: &DeviceConfig) {
    let needs_size = match &device.source {
        SourceConfig::Memory
        | SourceConfig::Sparse { .. }
        | SourceConfig::Directory { .. }
        | SourceConfig::Object { .. }
        | SourceConfig::File { create: true, .. }
        | SourceConfig::Disk { create: true, base: None, .. } => true,
        SourceConfig::File { .. }
        | SourceConfig::Disk { .. }
        | SourceConfig::Silo { .. }
        | SourceConfig::Generation { .. }
        | SourceConfig::Process { .. } => false,
    };
    if needs_size && device.size.is_none() {
        at.wrong("size", "is missing: this source does not know its size");
    }
    match &device.source {
        SourceConfig::Directory { piece, .. } | SourceConfig::Object { piece, .. }
            if piece.0 == 0 || !piece.0.is_multiple_of(device.block_size.0.max(1)) =>
        {
            at.below("source").wrong("piece", "must be a multiple of the block size");
        }
        SourceConfig::Object { store, .. } => {
            check_store(&mut at.below("source").below("object").below("store"), store);
        }
        SourceConfig::Generation { store, line, .. } => {
            let mut at = at.below("source");
            let mut at = at.below("generation");
            check_store(&mut at.below("store"), store);
            if let Err(error) = LineName::parse(line) {
                at.wrong("line", error.to_string());
            }
        }
        SourceConfig::Silo { url, connections, .. } => {
            let mut at = at.below("source");
            let mut at = at.below("silo");
            if let Err(error) = url.parse::<NbdUri>() {
                at.wrong("url", error.to_string());
            }
            if !(1..=32).contains(connections) {
                at.wrong("connections", "must be from 1 to 32");
            }
        }
        _ => {}
    }
}

fn check_nbd(at: &mut At<'_>, nbd: &NbdConfig, config: &Config) {
    if nbd.unix.is_none() && nbd.tcp.is_none() {
        at.wrong("unix", "is missing: an export listens on unix, on tcp, or on both");
    }
    if nbd.tcp.is_some() && !nbd.plaintext && config.identity.is_none() {
        at.wrong(
            "tcp",
            "needs TLS, and [identity] is missing; add it, or write plaintext = true if the \
             network is trusted as a whole",
        );
    }
    if nbd.clients.iter().any(|name| name.parse::<identity::HostName>().is_err()) {
        at.wrong("clients", "each is a host's name, as in host-a or a.example.org");
    }
    if !nbd.clients.is_empty() && nbd.plaintext {
        at.wrong("clients", "cannot be told apart without TLS; leave out plaintext");
    }
    if !(1..=1024).contains(&nbd.max_connections) {
        at.wrong("max-connections", "must be from 1 to 1024");
    }
}

fn check_store(at: &mut At<'_>, store: &StoreConfig) {
    let schemes = ["s3://", "gs://", "az://", "file:///"];
    let Some(scheme) = schemes.iter().find(|scheme| store.url.starts_with(**scheme)) else {
        at.wrong("url", format!("must begin with {}", schemes.join(", ")));
        return;
    };
    let place = store.url.trim_start_matches(scheme);
    if place.split('/').next().is_some_and(|host| host.contains('@')) {
        at.wrong(
            "url",
            "credentials do not belong in an address; write access-key = { env = \"NAME\" } and \
             secret-key = { env = \"NAME\" }",
        );
    }
    if store.access_key.is_some() != store.secret_key.is_some() {
        at.wrong("access-key", "access-key and secret-key go together");
    }
    let schemes = ["http://", "https://"];
    if let Some(endpoint) = &store.endpoint
        && !schemes.iter().any(|scheme| endpoint.starts_with(scheme))
    {
        at.wrong("endpoint", "must begin with https:// or http://");
    }
    let host = store.endpoint.as_deref().and_then(|endpoint| endpoint.split('/').nth(2));
    if host.is_some_and(|host| host.contains('@')) {
        at.wrong("endpoint", "credentials do not belong in an address");
    }
}

fn check_groups(root: &mut At<'_>, config: &Config) {
    let mut owner: BTreeMap<&str, &str> = BTreeMap::new();
    let names: Vec<&str> = config.device.keys().map(String::as_str).collect();
    for (name, group) in &config.group {
        let mut at = root.below("group");
        let mut at = at.below(name);
        if group.devices.is_empty() {
            at.wrong("devices", "a group has at least one device");
        }
        for device in &group.devices {
            if !config.device.contains_key(device) {
                let hint = nearest(device, &names)
                    .map_or_else(String::new, |meant| format!("; did you mean \"{meant}\"?"));
                at.wrong("devices", format!("there is no device \"{device}\"{hint}"));
            } else if let Some(other) = owner.insert(device, name) {
                at.wrong("devices", format!("\"{device}\" is in group \"{other}\" already"));
            }
        }
    }
}

fn check_group_of(at: &mut At<'_>, config: &Config, group: Option<&str>) {
    match group {
        Some(name) if config.members(Some(name)).is_none() => {
            let known: Vec<_> = config.group.keys().map(String::as_str).collect();
            at.wrong(
                "group",
                format!("there is no group \"{name}\"; there are {}", known.join(", ")),
            );
        }
        None if config.group.len() > 1 => {
            at.wrong("group", "is missing: there are several groups");
        }
        _ => {}
    }
}

fn check_migrate(root: &mut At<'_>, config: &Config) {
    let Some(migrate) = &config.migrate else { return };
    let mut at = root.below("migrate");
    check_group_of(&mut at, config, migrate.group.as_deref());
    if !migrate.plaintext && config.identity.is_none() {
        at.wrong(
            "plaintext",
            "moving needs TLS, and [identity] is missing; add it, or write plaintext = true if \
             the network is trusted as a whole",
        );
    }
    // Whoever only answers by hash gives nothing away.
    let moves = migrate.share.is_none() || migrate.listen.is_some() || migrate.peer.is_some();
    if moves && !migrate.plaintext && migrate.peer_name.is_none() {
        at.wrong("peer-name", "is missing: which host may devices go to or come from?");
    }
    if migrate.peer_name.as_ref().is_some_and(|name| name.parse::<identity::HostName>().is_err()) {
        at.wrong("peer-name", "not a host's name; write host-a or a.example.org");
    }
    let members = config.members(migrate.group.as_deref());
    let kept = |name: &String| config.device.get(name).is_some_and(DeviceConfig::is_kept);
    if moves && migrate.note.is_none() && members.is_some_and(|(_, names)| names.iter().any(kept)) {
        at.wrong(
            "note",
            "is missing: without it a restart would serve devices that have left or have not come \
             whole; name a file of this host",
        );
    }
    if !(1..=32).contains(&migrate.connections) {
        at.wrong("connections", "must be from 1 to 32");
    }
    if migrate.in_flight.0 < 1 << 20 {
        at.wrong("in-flight", "must be at least 1M");
    }
    if migrate.bandwidth == Some(ByteSize(0)) {
        at.wrong("bandwidth", "nothing moves at 0 bytes a second; leave the key out for no limit");
    }
    check_elsewhere(&mut at, config, migrate);
}

/// Where blocks of a move may come from beside its source.
fn check_elsewhere(at: &mut At<'_>, config: &Config, migrate: &MigrateConfig) {
    if let Some(assist) = &migrate.assist {
        let mut at = at.below("assist");
        if let Some(store) = &assist.store {
            check_store(&mut at.below("store"), store);
        }
        if let Some(Err(error)) = assist.line.as_deref().map(LineName::parse) {
            at.wrong("line", error.to_string());
        }
        let whole = assist.store.is_some() && assist.line.is_some() && assist.keys.is_some();
        if config.backup.is_none() && !whole {
            at.wrong("store", "without [backup] it needs store, line and keys");
        }
    }
    let named = |name: &Option<String>| {
        migrate.plaintext
            || name.as_ref().is_some_and(|name| name.parse::<identity::HostName>().is_ok())
    };
    if migrate.peers.iter().any(|peer| !named(&peer.name)) {
        at.wrong("peers", "each has a name, as in its certificate: host-c or c.example.org");
    }
    if migrate.peers.iter().any(|peer| !peer.address.contains(':')) {
        at.wrong("peers", "each has an address and a port, as in host-c:5171");
    }
    let names: Vec<&str> = config.device.keys().map(String::as_str).collect();
    for device in migrate.known.keys().filter(|name| !config.device.contains_key(*name)) {
        let hint = nearest(device, &names)
            .map_or_else(String::new, |meant| format!("; did you mean \"{meant}\"?"));
        at.wrong("known", format!("there is no device \"{device}\"{hint}"));
    }
    if let Some(share) = &migrate.share {
        if migrate.known.is_empty() {
            at.wrong("share", "there is nothing to share; name files in known");
        }
        if share.hosts.iter().any(|name| name.parse::<identity::HostName>().is_err()) {
            at.below("share")
                .wrong("hosts", "each is a host's name, as in host-a or a.example.org");
        }
    }
}

/// A path as it is told apart from others.
fn plain(path: &Path) -> String {
    let parts = path.components().filter(|part| *part != Component::CurDir);
    parts.collect::<PathBuf>().display().to_string()
}

/// Two devices must not share a file, a folder or a socket: each would destroy the other's.
fn check_shared_places(root: &mut At<'_>, config: &Config) {
    let mut taken: BTreeMap<String, String> = BTreeMap::new();
    for (name, device) in &config.device {
        let mut places: Vec<(&str, String)> = Vec::new();
        match &device.source {
            SourceConfig::Disk { dir, .. } => places.push(("source", plain(dir))),
            SourceConfig::File { path, .. } if !device.read_only && device.overlays.is_empty() => {
                places.push(("source", plain(path)));
            }
            SourceConfig::Sparse { path } | SourceConfig::Directory { path, .. } => {
                places.push(("source", plain(path)));
            }
            _ => {}
        }
        places.extend(device.overlays.iter().map(|dir| ("overlays", plain(dir))));
        let expose = &device.expose;
        if let Some(nbd) = &expose.nbd {
            places.extend(nbd.unix.iter().map(|path| ("expose", plain(path))));
            places.extend(nbd.tcp.iter().map(|address| ("expose", address.to_string())));
        }
        let vhost = expose.vhost_user_blk.iter();
        places.extend(vhost.map(|vhost| ("expose", plain(&vhost.socket))));
        let fuse = expose.fuse.iter();
        places.extend(fuse.map(|fuse| ("expose", plain(&fuse.mount))));
        let attach = expose.attach.iter();
        places.extend(attach.map(|attach| ("expose", plain(&attach.device))));
        let ublk = expose.ublk.iter().filter_map(|ublk| ublk.id);
        places.extend(ublk.map(|id| ("expose", format!("/dev/ublkb{id}"))));
        for (key, place) in places {
            if let Some(other) = taken.insert(place.clone(), name.clone()) {
                let mut at = root.below("device");
                at.below(name).wrong(key, format!("{place} is used by \"{other}\" too"));
            }
        }
    }
}
