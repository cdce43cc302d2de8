//! A copy of a machine becomes a machine of its own: names, addresses, and a generation that programs
//! can watch.
//!
//! [`IDENTITY_FILE`] says what the machine is now; it is there from the first fork on, lies in memory
//! and so is copied with the machine, and is replaced as a whole:
//!
//! ```text
//! {"generation":1,"instance":"5f…","copy_of":"redis","host_name":"redis-1","address":"10.77.0.9"}
//! ```
//!
//! `generation` counts the forks on the way from the boot to this machine. Called by the agent, once
//! for each fork, while nothing that the machine sends leaves its host.

use crate::{config::InstanceConfig, init::network, protocol::NewIdentity};
use serde::{Deserialize, Serialize};
use std::{fs, io, path::Path};

/// Where programs in the machine find it.
pub const IDENTITY_FILE: &str = "/run/drafter/identity.json";

#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    generation: u64,
    #[serde(flatten)]
    identity: NewIdentity,
}

fn read(path: &Path) -> Option<Stored> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// What the machine became since it booted, for an agent that starts.
pub(super) fn found(path: &Path, instance: &mut InstanceConfig) {
    let Some(Stored { identity, .. }) = read(path) else { return };
    instance.host = Some(identity.host_name);
    instance.address = identity.address;
    instance.address_v6 = identity.address_v6;
}

/// Takes names and addresses in place of those in `instance`, which then holds the new ones. Returns
/// what did not work.
pub(super) fn take(instance: &mut InstanceConfig, identity: &NewIdentity) -> Vec<String> {
    let mut problems = Vec::new();
    let mut tried = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            problems.push(format!("{what}: {error}"));
        }
    };
    let old = instance.clone();
    instance.host = Some(identity.host_name.clone());
    // Without a network a copy has none either.
    if old.address.is_some() {
        instance.address = identity.address;
        instance.address_v6 = identity.address_v6;
    }
    tried("the host name in /etc could not be set", network::rename(&old, instance));
    tried("the addresses could not be changed", network::readdress(&old, instance));
    tried("the generation could not be raised", raise(Path::new(IDENTITY_FILE), identity));
    problems
}

fn raise(path: &Path, identity: &NewIdentity) -> io::Result<()> {
    let generation = read(path).map_or(0, |stored| stored.generation) + 1;
    let new = path.with_extension("new");
    let stored = serde_json::to_vec(&Stored { generation, identity: identity.clone() })?;
    match fs::write(&new, &stored) {
        // The init makes the folder.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path.parent().ok_or(error)?)?;
            fs::write(&new, &stored)?;
        }
        other => other?,
    }
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn the_generation_counts_forks_and_an_agent_that_starts_again_knows_who_it_is() {
        let folder = std::env::temp_dir().join(format!("drafter-identity-{}", std::process::id()));
        let path = folder.join("identity.json");
        let mut instance = InstanceConfig::parse("drafter.host=a drafter.ip=10.9.0.5").unwrap();
        found(&path, &mut instance);
        assert_eq!(instance.host.as_deref(), Some("a"));
        for number in 1..=3u8 {
            let identity = NewIdentity {
                host_name: format!("copy-{number}"),
                copy_of: "a".into(),
                address: Some(Ipv4Addr::new(10, 9, 0, 100 + number)),
                address_v6: None,
                instance: format!("{number}"),
            };
            raise(&path, &identity).unwrap();
            let stored = read(&path).unwrap();
            assert_eq!((stored.generation, stored.identity), (u64::from(number), identity));
        }
        found(&path, &mut instance);
        assert_eq!(instance.host.as_deref(), Some("copy-3"));
        assert_eq!(instance.address, Some(Ipv4Addr::new(10, 9, 0, 103)));
        fs::remove_dir_all(folder).unwrap();
    }
}
