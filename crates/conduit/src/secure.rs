//! Encryption of what hosts and edges send each other: WireGuard under the overlay.
//!
//! Each host has an address of its own in the tunnel's network, made of its overlay address; the
//! vxlan device runs between these addresses instead of the underlay's. Keys are made by each host
//! in its state folder, and public ones go over the connection between agent and edge, which proves
//! who says them. The edge tells every host of all others.
//!
//! | | by | keys |
//! |---|---|---|
//! | `userspace` | `conduit tunnel run`, a process of its own that outlives the agent | sessions every two minutes; the key pair by `rotate_every` or `conduit tunnel rotate`, without a packet lost |
//! | `kernel` | the kernel's WireGuard, set up by `ip` and `wg` | sessions every two minutes; the key pair stays |
//! | `off` | nobody | – |
//!
//! The agent may be killed at any time: the tunnel goes on with the peers that it was told last.

use crate::{
    exec::{self, KernelError},
    netlink::interface_index,
    overlay,
    wire::{Peer, TunnelEnd},
};
use conduit_wg::{Ask, PeerConfig, PrivateKey, PublicKey};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt::Write as _,
    fs::{self, OpenOptions},
    io::Write as _,
    net::{Ipv4Addr, SocketAddr},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// The tunnel's network: 198.18.0.0/15, which no network outside of a laboratory has (RFC 2544).
const NETWORK: (Ipv4Addr, u8) = (Ipv4Addr::new(198, 18, 0, 0), 15);
/// Name of the tunnel's interface.
pub const INTERFACE: &str = "cd-wg";
/// The UDP port unless told otherwise.
pub const PORT: u16 = 7451;
/// What WireGuard adds to a packet over IPv4: 20 + 8 + 32 bytes.
const OVERHEAD: u32 = 60;
/// How long a tunnel's process may take to answer.
const READY: Duration = Duration::from_secs(10);
/// How often the process is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Seconds between signs of life, so that a firewall or translator before a host keeps the way open.
const KEEPALIVE: u16 = 20;

/// How packets between hosts and edges are protected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Encrypt {
    /// By the kernel's WireGuard where there is one, else in user space.
    #[default]
    Auto,
    /// By the kernel's WireGuard.
    Kernel,
    /// By `conduit tunnel run`.
    Userspace,
    /// Not at all: only on a network that is trusted as a whole.
    Off,
}

/// How encryption is set up.
#[derive(Clone, Debug)]
pub struct SecureConfig {
    /// By whom.
    pub encrypt: Encrypt,
    /// The UDP port; the same at both ends of a firewall's rule.
    pub port: u16,
    /// Folder for keys and the control socket.
    pub state: PathBuf,
    /// The `conduit` command, with what stands before its subcommands.
    pub program: Vec<OsString>,
    /// How long a key pair is used, in user space.
    pub rotate_every: Option<Duration>,
}

impl SecureConfig {
    /// Without encryption.
    #[must_use]
    pub fn off() -> Self {
        let (state, program) = (PathBuf::new(), Vec::new());
        Self { encrypt: Encrypt::Off, port: PORT, state, program, rotate_every: None }
    }

    fn control(&self) -> PathBuf {
        self.state.join("tunnel.sock")
    }
}

/// The address in the tunnel of the host with an overlay address: the low 17 bits are its.
#[must_use]
pub fn address(overlay: Ipv4Addr) -> Ipv4Addr {
    let low = u32::from(overlay) & (u32::MAX >> NETWORK.1);
    Ipv4Addr::from(u32::from(NETWORK.0) | low)
}

/// By whom packets are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Kernel,
    Userspace,
}

/// Encryption at work on this host.
pub(crate) struct Secure {
    way: Way,
    config: SecureConfig,
    /// Where this host really is.
    real: Peer,
    mtu: u32,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    keys: Vec<PublicKey>,
    peers: BTreeMap<Ipv4Addr, TunnelEnd>,
}

impl Secure {
    /// Sets encryption up as `config` says; `None` if it is off. `this` becomes where the host is
    /// within the tunnel. Must be called in the host's network namespace.
    pub(crate) fn open(
        config: &SecureConfig,
        this: &mut Peer,
    ) -> Result<Option<Arc<Self>>, KernelError> {
        let way = match config.encrypt {
            Encrypt::Off => return Ok(None),
            Encrypt::Userspace => Way::Userspace,
            Encrypt::Kernel => kernel_can().map(|()| Way::Kernel)?,
            Encrypt::Auto => match kernel_can() {
                Ok(()) => Way::Kernel,
                Err(error) => {
                    tracing::info!(%error, "packets are encrypted in user space");
                    Way::Userspace
                }
            },
        };
        let mtu = overlay::underlay_mtu(this.underlay.into())?.saturating_sub(OVERHEAD);
        let mtu = mtu.min(65_000);
        let (config, known) = (config.clone(), Mutex::default());
        let secure = Arc::new(Self { way, config, real: *this, mtu, known });
        secure.look()?;
        let looking = Arc::downgrade(&secure);
        let look = move || {
            while let Some(secure) = looking.upgrade() {
                if let Err(error) = secure.look() {
                    tracing::warn!(%error, "the tunnel is not well");
                }
                drop(secure);
                thread::sleep(LOOK);
            }
        };
        crate::agent::spawn("secure", look);
        this.underlay = address(this.overlay);
        Ok(Some(secure))
    }

    /// What others must know to reach this host; changes when its keys do.
    pub(crate) fn this(&self) -> TunnelEnd {
        let endpoint = SocketAddr::from((self.real.underlay, self.config.port));
        TunnelEnd { keys: self.known().keys.clone(), endpoint }
    }

    /// Tells the tunnel who is where.
    pub(crate) fn set_peers(
        &self,
        peers: BTreeMap<Ipv4Addr, TunnelEnd>,
    ) -> Result<(), KernelError> {
        let mut known = self.known();
        if known.peers != peers {
            known.peers = peers;
            self.tell(&known)?;
        }
        Ok(())
    }

    /// How, for people.
    pub(crate) fn describe(&self) -> &'static str {
        match self.way {
            Way::Kernel => "encrypted by the kernel's WireGuard",
            Way::Userspace => "encrypted by WireGuard in user space",
        }
    }

    /// Takes the tunnel away.
    pub(crate) fn remove(&self) -> Result<(), KernelError> {
        match self.way {
            Way::Kernel => exec::run("ip", &["link", "del", INTERFACE], "").map(drop),
            Way::Userspace => conduit_wg::tell(&self.config.control(), &Ask::Stop { remove: true })
                .map_err(|e| KernelError::new("remove the tunnel", e)),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is the tunnel there? Makes it, if not; notes its keys.
    fn look(&self) -> Result<(), KernelError> {
        let keys = match self.way {
            Way::Kernel => vec![self.ensure_kernel()?],
            Way::Userspace => match conduit_wg::status(&self.config.control()) {
                Ok(status) => status.keys,
                Err(_) => self.start()?,
            },
        };
        let mut known = self.known();
        if known.keys != keys {
            tracing::info!(?keys, "keys of this host's tunnel");
            known.keys = keys;
        }
        Ok(())
    }

    /// Starts the tunnel's process, in a group of its own: it is to outlive this one.
    fn start(&self) -> Result<Vec<PublicKey>, KernelError> {
        let fail = |e: &dyn std::fmt::Display| KernelError::new("start the tunnel's process", e);
        let (program, first) = self.config.program.split_first().ok_or_else(|| {
            fail(&"nothing says which program it is; start `conduit tunnel run` by hand")
        })?;
        fs::create_dir_all(&self.config.state).map_err(|e| fail(&e))?;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.config.state.join("tunnel.log"))
            .map_err(|e| fail(&e))?;
        let (own, bits) = (address(self.real.overlay), NETWORK.1);
        let mut command = Command::new(program);
        command
            .args(first)
            .args(["tunnel", "run", "--interface", INTERFACE, "--mtu", &self.mtu.to_string()])
            .args(["--listen", &format!("{}:{}", self.real.underlay, self.config.port)])
            .args(["--address", &format!("{own}/{bits}")])
            .arg("--state")
            .arg(self.config.state.join("tunnel"))
            .arg("--control")
            .arg(self.config.control())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0);
        if let Some(every) = self.config.rotate_every {
            command.args(["--rotate-every", &format!("{}s", every.as_secs())]);
        }
        let mut child = command.spawn().map_err(|e| fail(&e))?;
        let deadline = Instant::now() + READY;
        loop {
            if let Ok(status) = conduit_wg::status(&self.config.control()) {
                // So that it leaves no zombie while this process lives.
                thread::spawn(move || child.wait());
                self.tell(&self.known())?;
                return Ok(status.keys);
            }
            let ended = child.try_wait().map_err(|e| fail(&e))?;
            if let Some(status) = ended {
                let log = self.config.state.join("tunnel.log");
                return Err(fail(&format!("it ended ({status}); see {}", log.display())));
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(fail(&format!("it did not answer within {READY:?}")));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The peers, as the tunnel takes them.
    fn tell(&self, known: &Known) -> Result<(), KernelError> {
        let peers: Vec<PeerConfig> = known
            .peers
            .iter()
            .filter(|(overlay, _)| **overlay != self.real.overlay)
            .map(|(overlay, end)| PeerConfig {
                name: overlay.to_string(),
                keys: end.keys.clone(),
                allowed: vec![std::net::IpAddr::from(address(*overlay)).into()],
                endpoint: Some(end.endpoint),
                keepalive: Some(KEEPALIVE),
            })
            .collect();
        let fail = |e: &dyn std::fmt::Display| KernelError::new("tell the tunnel its peers", e);
        match self.way {
            // One that was told nothing yet keeps what it remembers.
            Way::Userspace if peers.is_empty() => Ok(()),
            Way::Userspace => conduit_wg::tell(&self.config.control(), &Ask::Peers { peers })
                .map_err(|e| fail(&e)),
            Way::Kernel => {
                let key = self.kernel_key()?;
                let path = self.config.state.join("wg.conf");
                write_private(&path, &kernel_config(&key, self.config.port, &peers))
                    .map_err(|e| fail(&e))?;
                let path = path.display().to_string();
                exec::run("wg", &["syncconf", INTERFACE, &path], "").map(drop)
            }
        }
    }

    /// The kernel's interface, made if it is not there. Not tested: no kernel at hand has it.
    fn ensure_kernel(&self) -> Result<PublicKey, KernelError> {
        let key = self.kernel_key()?;
        if interface_index(INTERFACE).is_err() {
            exec::run("ip", &["link", "add", "dev", INTERFACE, "type", "wireguard"], "")?;
            let (own, bits) = (address(self.real.overlay), NETWORK.1);
            let script = format!(
                "link set dev {INTERFACE} mtu {} up\naddress replace {own}/{bits} dev {INTERFACE}\n",
                self.mtu
            );
            exec::run("ip", &["-batch", "-"], &script)?;
            self.tell(&self.known())?;
        }
        Ok(key.public())
    }

    fn kernel_key(&self) -> Result<PrivateKey, KernelError> {
        let path = self.config.state.join("wg.key");
        let fail = |e: &dyn std::fmt::Display| {
            KernelError::new(format!("read or make the key {}", path.display()), e)
        };
        match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map_err(|e| fail(&e)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let key = PrivateKey::generate().map_err(|e| fail(&e))?;
                fs::create_dir_all(&self.config.state).map_err(|e| fail(&e))?;
                write_private(&path, &key.text()).map_err(|e| fail(&e))?;
                Ok(key)
            }
            Err(e) => Err(fail(&e)),
        }
    }
}

/// Has this kernel WireGuard, and is there what sets it up?
fn kernel_can() -> Result<(), KernelError> {
    const PROBE: &str = "cd-wg-probe";
    exec::run("wg", &["--version"], "")?;
    exec::run("ip", &["link", "add", "dev", PROBE, "type", "wireguard"], "")?;
    exec::run("ip", &["link", "del", PROBE], "").map(drop)
}

/// A file for `wg setconf`. Of a peer that changes its keys, the newest is used.
fn kernel_config(key: &PrivateKey, port: u16, peers: &[PeerConfig]) -> String {
    let mut text = format!("[Interface]\nPrivateKey = {}\nListenPort = {port}\n", key.text());
    for peer in peers {
        let Some(key) = peer.keys.first() else { continue };
        let allowed: Vec<_> = peer.allowed.iter().map(ToString::to_string).collect();
        let _ = write!(text, "\n[Peer]\nPublicKey = {key}\nAllowedIPs = {}\n", allowed.join(", "));
        if let Some(endpoint) = peer.endpoint {
            let _ = writeln!(text, "Endpoint = {endpoint}");
        }
        if let Some(every) = peer.keepalive {
            let _ = writeln!(text, "PersistentKeepalive = {every}");
        }
    }
    text
}

/// Replaces a file that only its owner may read.
fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    let new = path.with_extension("new");
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_has_an_address_in_the_tunnel_by_its_overlay_address() {
        assert_eq!(address(Ipv4Addr::new(100, 64, 0, 2)), Ipv4Addr::new(198, 18, 0, 2));
        assert_eq!(address(Ipv4Addr::new(100, 65, 3, 4)), Ipv4Addr::new(198, 19, 3, 4));
    }

    #[test]
    fn the_kernels_tools_are_told_the_newest_key_of_each_peer() {
        let new = || PrivateKey::generate().unwrap();
        let (own, newest, older) = (new(), new().public(), new().public());
        let peer = PeerConfig {
            name: "b".into(),
            keys: vec![newest, older],
            allowed: vec!["198.18.0.2".parse().unwrap()],
            endpoint: Some("192.0.2.1:7451".parse().unwrap()),
            keepalive: Some(20),
        };
        let text = kernel_config(&own, 7451, &[peer]);
        assert_eq!(
            text,
            format!(
                "[Interface]\nPrivateKey = {}\nListenPort = 7451\n\n[Peer]\nPublicKey = {newest}\n\
                 AllowedIPs = 198.18.0.2/32\nEndpoint = 192.0.2.1:7451\nPersistentKeepalive = 20\n",
                own.text()
            )
        );
    }
}
