//! The kernel's WireGuard, set up by `ip` and `wg`, and what this end's folder has of it: its key pair and the
//! preshared keys. Secrets go to `wg` through files that only their owner may read, or through a pipe, never
//! by a command line; what `wg` prints of them is never asked for. Tried in a virtual machine
//! (`scripts/kernel-vm.sh wireguard`).

use super::{
    INTERFACE, NETWORK, address,
    pair_key::{Saved, Secret},
    pairs::File,
};
use crate::{
    exec::{self, KernelError},
    netlink::interface_index,
};
use conduit_wg::{PeerConfig, PrivateKey, PublicKey};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs::{self, OpenOptions},
    io::{ErrorKind, Write as _},
    net::Ipv4Addr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Has this kernel WireGuard, and is there what sets it up?
pub(super) fn can() -> Result<(), KernelError> {
    const PROBE: &str = "cd-wg-probe";
    exec::run("wg", &["--version"], "")?;
    exec::run("ip", &["link", "add", "dev", PROBE, "type", "wireguard"], "")?;
    exec::run("ip", &["link", "del", PROBE], "").map(drop)
}

/// The interface of the host at `overlay`, made if it is not there; true if it was made.
pub(super) fn ensure(overlay: Ipv4Addr, mtu: u32) -> Result<bool, KernelError> {
    if interface_index(INTERFACE).is_ok() {
        return Ok(false);
    }
    exec::run("ip", &["link", "add", "dev", INTERFACE, "type", "wireguard"], "")?;
    let (own, bits) = (address(overlay), NETWORK.1);
    let script = format!(
        "link set dev {INTERFACE} mtu {mtu} up\naddress replace {own}/{bits} dev {INTERFACE}\n"
    );
    exec::run("ip", &["-batch", "-"], &script)?;
    Ok(true)
}

pub(super) fn remove() -> Result<(), KernelError> {
    exec::run("ip", &["link", "del", INTERFACE], "").map(drop)
}

/// Gives the interface this key pair, if it has another one (of a folder that was lost, or was emptied to
/// change it). Its sessions end then.
pub(super) fn set_key(key: &PrivateKey) -> Result<(), KernelError> {
    let has = exec::run("wg", &["show", INTERFACE, "public-key"], "")?;
    if has.trim() == key.public().to_string() {
        return Ok(());
    }
    let input = format!("{}\n", key.text());
    exec::run("wg", &["set", INTERFACE, "private-key", PIPE], &input).map(drop)
}

/// Where a command reads what it is given.
const PIPE: &str = "/proc/self/fd/0";

/// Mixes a preshared key into all handshakes with a peer from now on; sessions go on.
pub(super) fn set_secret(peer: &PublicKey, secret: Option<Secret>) -> Result<(), KernelError> {
    let peer = peer.to_string();
    let base = ["set", INTERFACE, "peer", &peer, "preshared-key"];
    let (path, input) = match secret {
        Some(secret) => (PIPE, format!("{}\n", secret.text())),
        // An empty file is none.
        None => ("/dev/null", String::new()),
    };
    exec::run("wg", &[&base[..], &[path]].concat(), &input).map(drop)
}

/// These are the peers from now on; `file` is for what `wg` reads.
pub(super) fn set_peers(
    file: &Path,
    (key, port): (&PrivateKey, u16),
    peers: &[(PeerConfig, Option<Secret>)],
) -> Result<(), KernelError> {
    let fail = |e: std::io::Error| KernelError::new(format!("write {}", file.display()), e);
    write_private(file, &config(key, port, peers)).map_err(fail)?;
    exec::run("wg", &["syncconf", INTERFACE, &file.display().to_string()], "").map(drop)
}

/// A file for `wg syncconf`. Of a peer that changes its keys, the newest is used.
fn config(key: &PrivateKey, port: u16, peers: &[(PeerConfig, Option<Secret>)]) -> String {
    let mut text = format!("[Interface]\nPrivateKey = {}\nListenPort = {port}\n", key.text());
    for (peer, secret) in peers {
        let Some(key) = peer.keys.first() else { continue };
        let allowed: Vec<_> = peer.allowed.iter().map(ToString::to_string).collect();
        let _ = write!(text, "\n[Peer]\nPublicKey = {key}\nAllowedIPs = {}\n", allowed.join(", "));
        if let Some(secret) = secret {
            let _ = writeln!(text, "PresharedKey = {}", secret.text());
        }
        if let Some(endpoint) = peer.endpoint {
            let _ = writeln!(text, "Endpoint = {endpoint}");
        }
        if let Some(every) = peer.keepalive {
            let _ = writeln!(text, "PersistentKeepalive = {every}");
        }
    }
    text
}

/// Peers' addresses in the tunnel, as the interface has them.
pub(super) fn remembered() -> BTreeSet<Ipv4Addr> {
    let listed = exec::run("wg", &["show", INTERFACE, "allowed-ips"], "");
    listed.map_or_else(|_| BTreeSet::new(), |text| allowed(&text))
}

/// The addresses in what `wg show … allowed-ips` says: a line for each peer, its key and its networks.
fn allowed(text: &str) -> BTreeSet<Ipv4Addr> {
    let networks = text.lines().flat_map(|line| line.split_whitespace().skip(1));
    networks.filter_map(|network| network.strip_suffix("/32")?.parse().ok()).collect()
}

/// When each peer's last handshake was, in seconds since 1970.
pub(super) fn handshakes() -> BTreeMap<PublicKey, u64> {
    let listed = exec::run("wg", &["show", INTERFACE, "latest-handshakes"], "");
    let numbers = listed.map_or_else(|_| BTreeMap::new(), |text| numbers::<1>(&text));
    numbers.into_iter().filter(|(_, [at])| *at > 0).map(|(key, [at])| (key, at)).collect()
}

/// Bytes that came from all peers and went to them, with what encryption adds.
pub(super) fn transfer() -> Option<[u64; 2]> {
    let listed = exec::run("wg", &["show", INTERFACE, "transfer"], "").ok()?;
    let sum = |[a, b]: [u64; 2], [c, d]: [u64; 2]| [a + c, b + d];
    Some(numbers::<2>(&listed).into_values().fold([0, 0], sum))
}

/// What `wg show` says in lines of a key and numbers.
fn numbers<const N: usize>(text: &str) -> BTreeMap<PublicKey, [u64; N]> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let key = words.next()?.parse().ok()?;
        let numbers: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
        Some((key, numbers.try_into().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// This host's key pair in its folder, made if there is none.
pub(super) fn own_key(folder: &Path) -> Result<PrivateKey, KernelError> {
    let path = folder.join("wg.key");
    let fail = |e: &dyn std::fmt::Display| {
        KernelError::new(format!("read or make the key {}", path.display()), e)
    };
    match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|e| fail(&e)),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let key = PrivateKey::generate().map_err(|e| fail(&e))?;
            fs::create_dir_all(folder).map_err(|e| fail(&e))?;
            write_private(&path, &key.text()).map_err(|e| fail(&e))?;
            Ok(key)
        }
        Err(e) => Err(fail(&e)),
    }
}

/// The files of pairs' preshared keys, named by the other end's overlay address.
pub(super) struct PairFiles(PathBuf);

impl PairFiles {
    pub(super) fn of(folder: &Path) -> Self {
        Self(folder.join("pairs"))
    }

    fn path(&self, at: Ipv4Addr) -> PathBuf {
        self.0.join(format!("{at}.json"))
    }

    /// All that are there. What cannot be read is left out, and said: its pair agrees anew.
    pub(super) fn load(&self) -> Vec<(Ipv4Addr, Saved)> {
        let names = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        let ends = names.filter_map(|name| name.strip_suffix(".json")?.parse().ok());
        ends.filter_map(|at| {
            let text = fs::read_to_string(self.path(at)).map_err(|e| e.to_string());
            match text.and_then(|text| Saved::read(&text)) {
                Ok(saved) => Some((at, saved)),
                Err(error) => {
                    tracing::warn!(peer = %at, error, "its preshared key is not read");
                    None
                }
            }
        })
        .collect()
    }

    pub(super) fn put(&self, at: Ipv4Addr, file: &File) -> Result<(), KernelError> {
        let path = self.path(at);
        let fail = |e: std::io::Error| {
            KernelError::new(format!("write the preshared key {}", path.display()), e)
        };
        match file {
            File::Write(saved) => {
                let mut folder = fs::DirBuilder::new();
                folder.recursive(true).mode(0o700).create(&self.0).map_err(fail)?;
                let text = serde_json::to_string(saved).map_err(|e| fail(e.into()))?;
                write_private(&path, &text).map_err(fail)
            }
            File::Remove => match fs::remove_file(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => Err(fail(e)),
                _ => Ok(()),
            },
        }
    }
}

/// Replaces a file that only its owner may read.
fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    let new = path.with_extension("new");
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    // The name, too: the other end may have been told.
    path.parent().map_or(Ok(()), |folder| fs::File::open(folder)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_remembers_of_peers_is_read() {
        let text = "AAAA=\t198.18.0.2/32\nBBBB=\t198.18.0.3/32 fd00::1/128\nCCCC=\t(none)\n";
        let expected = [2, 3].map(|last| Ipv4Addr::new(198, 18, 0, last));
        assert_eq!(allowed(text), BTreeSet::from(expected));
    }

    #[test]
    fn figures_of_peers_are_read() {
        let [a, b] = [0; 2].map(|_| PrivateKey::generate().unwrap().public());
        let text = format!("{a}\t5\t7\n{b}\t0\t1\nno key\t1\t2\n");
        assert_eq!(numbers::<2>(&text), BTreeMap::from([(a, [5, 7]), (b, [0, 1])]));
        assert!(numbers::<1>(&text).is_empty(), "another number of them");
    }

    #[test]
    fn the_kernels_tools_are_told_the_newest_key_of_each_peer_and_the_preshared_one() {
        let new = || PrivateKey::generate().unwrap();
        let (own, newest, older) = (new(), new().public(), new().public());
        let peer = PeerConfig {
            name: "b".into(),
            keys: vec![newest, older],
            allowed: vec!["198.18.0.2".parse().unwrap()],
            endpoint: Some("192.0.2.1:7451".parse().unwrap()),
            keepalive: Some(20),
        };
        let secret: Secret = serde_json::from_str(&format!("\"{older}\"")).unwrap();
        let text = config(&own, 7451, &[(peer.clone(), Some(secret)), (peer, None)]);
        let peer = |more: &str| {
            format!(
                "\n[Peer]\nPublicKey = {newest}\nAllowedIPs = 198.18.0.2/32\n{more}\
                 Endpoint = 192.0.2.1:7451\nPersistentKeepalive = 20\n"
            )
        };
        assert_eq!(
            text,
            format!(
                "[Interface]\nPrivateKey = {}\nListenPort = 7451\n{}{}",
                own.text(),
                peer(&format!("PresharedKey = {older}\n")),
                peer("")
            )
        );
    }
}
