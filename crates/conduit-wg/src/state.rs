//! What outlives the process, in its state folder (mode 0700): the key pairs, the peers with where
//! they were last heard from, and the number of this process among those that had the folder.
//!
//! A file is replaced as a whole, so that a crash leaves the old one or the new one.

use crate::{PrivateKey, PublicKey, TunnelError};
use ip_network::IpNetwork;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Version of the files.
const VERSION: u32 = 1;
/// Largest file that is read.
const LIMIT: u64 = 16 << 20;

/// A network whose addresses belong to a peer, as in `10.1.0.0/16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network(pub(crate) IpNetwork);

impl FromStr for Network {
    type Err = TunnelError;
    fn from_str(text: &str) -> Result<Self, TunnelError> {
        let parse = || {
            let (address, bits) = text.split_once('/').unwrap_or((text, ""));
            let address: IpAddr = address.parse().ok()?;
            let all = if address.is_ipv4() { 32 } else { 128 };
            let bits = if bits.is_empty() { all } else { bits.parse().ok()? };
            IpNetwork::new_truncate(address, bits).ok().map(Self)
        };
        parse().ok_or_else(|| TunnelError::invalid(text, "not a network like 10.1.0.0/16"))
    }
}

impl TryFrom<String> for Network {
    type Error = TunnelError;
    fn try_from(text: String) -> Result<Self, TunnelError> {
        text.parse()
    }
}

impl From<Network> for String {
    fn from(network: Network) -> Self {
        network.to_string()
    }
}

impl From<IpAddr> for Network {
    fn from(address: IpAddr) -> Self {
        Self(address.into())
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who may be at the other end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerConfig {
    /// What people call it; unique among the peers.
    pub name: String,
    /// Its keys, the newest first; two while it changes them.
    pub keys: Vec<PublicKey>,
    /// Addresses that are behind it, and that it may send from.
    pub allowed: Vec<Network>,
    /// Where it can be reached, if that is known. Where it is heard from counts more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<SocketAddr>,
    /// Seconds between signs of life, for a peer that a firewall must not forget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keepalive: Option<u16>,
}

/// A peer as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KnownPeer {
    #[serde(flatten)]
    pub(crate) config: PeerConfig,
    /// Where it was last heard from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) heard_from: Option<SocketAddr>,
}

#[derive(Serialize, Deserialize)]
struct PeersFile {
    version: u32,
    peers: Vec<KnownPeer>,
}

#[derive(Serialize, Deserialize)]
struct KeysFile {
    version: u32,
    current: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    next: Option<String>,
    /// When `current` came into use: seconds since 1970.
    since: u64,
}

/// This host's key pairs.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    pub(crate) current: PrivateKey,
    /// Takes the place of `current` once every peer that is there has used it.
    pub(crate) next: Option<PrivateKey>,
    since: SystemTime,
}

impl Keys {
    /// Both, the newest first.
    pub(crate) fn all(&self) -> impl Iterator<Item = &PrivateKey> {
        self.next.iter().chain([&self.current])
    }

    /// Begins or ends a rotation.
    pub(crate) fn set_next(&mut self, next: PrivateKey) {
        self.next = Some(next);
    }

    /// The next key becomes the current one.
    pub(crate) fn promote(&mut self, now: SystemTime) {
        if let Some(next) = self.next.take() {
            self.current = next;
            self.since = now;
        }
    }

    /// For how long the current key has been in use.
    pub(crate) fn age(&self, now: SystemTime) -> Duration {
        now.duration_since(self.since).unwrap_or_default()
    }
}

/// The state folder.
#[derive(Debug)]
pub(crate) struct State {
    folder: PathBuf,
}

impl State {
    pub(crate) fn open(folder: &Path) -> Result<Self, TunnelError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(TunnelError::system(format!("make {}", folder.display())))?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// The keys; made now if there are none.
    pub(crate) fn keys(&self) -> Result<Keys, TunnelError> {
        let Some(file) = self.read::<KeysFile>("keys.json")? else {
            let keys =
                Keys { current: PrivateKey::generate()?, next: None, since: SystemTime::now() };
            self.save_keys(&keys)?;
            return Ok(keys);
        };
        self.check_version(file.version, "keys.json")?;
        Ok(Keys {
            current: file.current.parse()?,
            next: file.next.map(|k| k.parse()).transpose()?,
            since: UNIX_EPOCH + Duration::from_secs(file.since),
        })
    }

    pub(crate) fn save_keys(&self, keys: &Keys) -> Result<(), TunnelError> {
        let since = keys.since.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.write(
            "keys.json",
            &KeysFile {
                version: VERSION,
                current: keys.current.text(),
                next: keys.next.as_ref().map(PrivateKey::text),
                since,
            },
        )
    }

    pub(crate) fn peers(&self) -> Result<Vec<KnownPeer>, TunnelError> {
        let Some(file) = self.read::<PeersFile>("peers.json")? else { return Ok(Vec::new()) };
        self.check_version(file.version, "peers.json")?;
        Ok(file.peers)
    }

    pub(crate) fn save_peers(&self, peers: Vec<KnownPeer>) -> Result<(), TunnelError> {
        self.write("peers.json", &PeersFile { version: VERSION, peers })
    }

    /// A number that the process before this one did not have: sessions of both can be told apart.
    pub(crate) fn next_generation(&self) -> Result<u8, TunnelError> {
        let last = self.read::<u8>("generation")?.unwrap_or(0);
        let next = last.wrapping_add(1);
        self.write("generation", &next)?;
        Ok(next)
    }

    fn check_version(&self, version: u32, name: &str) -> Result<(), TunnelError> {
        if version == VERSION {
            return Ok(());
        }
        let what = self.folder.join(name).display().to_string();
        Err(TunnelError::invalid(
            what,
            format!("it is of version {version}, this program knows {VERSION}: use a newer one"),
        ))
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, TunnelError> {
        let path = self.folder.join(name);
        let fail = || format!("read {}", path.display());
        let mut text = String::new();
        match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(TunnelError::system(fail())(e)),
            Ok(file) => io::Read::read_to_string(&mut io::Read::take(file, LIMIT), &mut text)
                .map_err(TunnelError::system(fail()))?,
        };
        serde_json::from_str(&text).map(Some).map_err(|e| TunnelError::invalid(fail(), e))
    }

    fn write(&self, name: &str, value: &impl Serialize) -> Result<(), TunnelError> {
        let path = self.folder.join(name);
        let new = self.folder.join(format!("{name}.new"));
        let write = || -> io::Result<()> {
            let text = serde_json::to_vec(value)?;
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.folder)?.sync_all()
        };
        write().map_err(TunnelError::system(format!("write {}", path.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn keys_are_made_once_and_only_their_owner_reads_them() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("state");
        let state = State::open(&inner).unwrap();
        let first = state.keys().unwrap();
        let mut again = state.keys().unwrap();
        assert_eq!(first.current.public(), again.current.public());
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&inner), mode(&inner.join("keys.json"))), (0o700, 0o600));
        again.set_next(PrivateKey::generate().unwrap());
        state.save_keys(&again).unwrap();
        let mut both = state.keys().unwrap();
        assert_eq!(both.all().count(), 2);
        let next = both.all().next().unwrap().public();
        both.promote(SystemTime::now());
        assert_eq!((both.current.public(), both.next.is_none()), (next, true));
    }

    #[test]
    fn peers_come_back_as_they_were_and_a_newer_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        assert!(state.peers().unwrap().is_empty());
        let peer = KnownPeer {
            config: PeerConfig {
                name: "b".into(),
                keys: vec![PrivateKey::generate().unwrap().public()],
                allowed: vec!["10.0.0.2".parse().unwrap(), "fd00::/64".parse().unwrap()],
                endpoint: None,
                keepalive: Some(20),
            },
            heard_from: Some("192.0.2.1:7451".parse().unwrap()),
        };
        state.save_peers(vec![peer.clone()]).unwrap();
        assert_eq!(state.peers().unwrap(), [peer]);
        fs::write(folder.path().join("peers.json"), r#"{"version":2,"peers":[]}"#).unwrap();
        let error = state.peers().unwrap_err().to_string();
        assert!(error.contains("peers.json") && error.contains("version 2"), "{error}");
        fs::write(folder.path().join("peers.json"), "{").unwrap();
        assert!(state.peers().is_err());
    }

    #[test]
    fn every_process_has_another_number() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        let numbers: Vec<_> = (0..3).map(|_| state.next_generation().unwrap()).collect();
        assert_eq!(numbers, [1, 2, 3]);
    }

    #[test]
    fn networks_are_read_or_refused() {
        for (text, shown) in
            [("10.1.2.3/8", "10.0.0.0/8"), ("10.1.2.3", "10.1.2.3/32"), ("fd00::1", "fd00::1/128")]
        {
            assert_eq!(text.parse::<Network>().unwrap().to_string(), shown);
        }
        for bad in ["", "10.0.0.0/33", "x/8", "fd00::/129"] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }
}
