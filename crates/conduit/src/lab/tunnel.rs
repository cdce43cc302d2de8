//! Two ends of the encrypted tunnel, each `conduit tunnel run` in a process and a network namespace
//! of its own, joined by a veth pair.
//!
//! ```text
//!  a: 10.99.0.1, fd99::1 on cd-wg          b: 10.99.0.2, fd99::2
//!     10.88.0.1, fd88::1 on under0 ════════ 10.88.0.2, fd88::2
//! ```

use super::{Space, wait_for};
use anyhow::{Context, bail, ensure};
use conduit_wg::{Ask, PeerConfig, PublicKey, Status};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(10);
/// Where both listen.
pub const PORT: u16 = 7451;

/// The inner addresses of end 1 or 2.
#[must_use]
pub fn inner(number: u8) -> (Ipv4Addr, Ipv6Addr) {
    (Ipv4Addr::new(10, 99, 0, number), Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, number.into()))
}

/// The outer addresses of end 1 or 2.
#[must_use]
pub fn outer(number: u8) -> (Ipv4Addr, Ipv6Addr) {
    (Ipv4Addr::new(10, 88, 0, number), Ipv6Addr::new(0xfd88, 0, 0, 0, 0, 0, 0, number.into()))
}

/// One end: a namespace and the process in it.
pub struct TunnelEnd {
    /// Its namespace.
    pub space: Space,
    program: PathBuf,
    folder: PathBuf,
    number: u8,
    process: Option<Child>,
}

impl TunnelEnd {
    /// Makes end 1 or 2 in a namespace; its files are in `folder`.
    pub fn new(program: &Path, folder: &Path, number: u8) -> anyhow::Result<Self> {
        Ok(Self {
            space: Space::new()?,
            program: program.to_owned(),
            folder: folder.join(format!("end{number}")),
            number,
            process: None,
        })
    }

    /// Its control socket.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.folder.join("tunnel.sock")
    }

    fn spawn(&self, more: &[&str]) -> anyhow::Result<Child> {
        std::fs::create_dir_all(&self.folder)?;
        let (v4, v6) = inner(self.number);
        let mut command = Command::new(&self.program);
        command
            .args(["tunnel", "run", "--interface", "cd-wg", "--mtu", "1420"])
            .args(["--listen", &format!("[::]:{PORT}")])
            .args(["--address", &format!("{v4}/24"), "--address", &format!("{v6}/64")])
            .arg("--state")
            .arg(self.folder.join("state"))
            .arg("--control")
            .arg(self.control())
            .args(more)
            .stdin(Stdio::null());
        self.space.run(|| command.spawn()).context("start conduit tunnel run")
    }

    /// Starts it, and waits until it answers.
    pub fn start(&mut self, more: &[&str]) -> anyhow::Result<()> {
        let child = self.spawn(more)?;
        let id = child.id();
        self.process = Some(child);
        ensure!(
            wait_for(PATIENCE, || self.status().is_ok_and(|s| s.process == id)),
            "the tunnel did not answer"
        );
        Ok(())
    }

    /// Another process takes its place. Returns how long it took until the old one had ended.
    pub fn upgrade(&mut self) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let old = self.process.take().context("it runs")?;
        self.start(&["--upgrade"])?;
        ensure!(ended(old)?.success(), "the old process failed");
        Ok(began.elapsed())
    }

    /// Starts a process that is to take its place, and kills it after `time`.
    pub fn fail_to_upgrade(&mut self, time: Duration) -> anyhow::Result<()> {
        let mut child = self.spawn(&["--upgrade"])?;
        std::thread::sleep(time);
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let mut child = self.process.take().context("it runs")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        ended(self.process.take().context("it runs")?)
    }

    /// Starts another one beside it, and waits for the end of that.
    pub fn second(&self) -> anyhow::Result<ExitStatus> {
        ended(self.spawn(&[])?)
    }

    /// How it is.
    pub fn status(&self) -> anyhow::Result<Status> {
        Ok(conduit_wg::status(&self.control())?)
    }

    /// One of its counters.
    pub fn count(&self, name: &str) -> anyhow::Result<u64> {
        self.status()?.counts.get(name).copied().with_context(|| format!("no counter {name}"))
    }

    /// Asks it for something.
    pub fn tell(&self, what: &Ask) -> anyhow::Result<()> {
        Ok(conduit_wg::tell(&self.control(), what)?)
    }

    /// This end as a peer of the other one.
    pub fn as_peer(&self, endpoint: Option<SocketAddr>) -> anyhow::Result<PeerConfig> {
        let (v4, v6) = inner(self.number);
        Ok(PeerConfig {
            name: format!("end{}", self.number),
            keys: self.status()?.keys,
            allowed: vec![IpAddr::from(v4).into(), IpAddr::from(v6).into()],
            endpoint,
            keepalive: None,
        })
    }

    /// The process's number.
    #[must_use]
    pub fn process(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }
}

impl Drop for TunnelEnd {
    fn drop(&mut self) {
        if let Some(mut child) = self.process.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits for a process's end, for which it has some seconds.
fn ended(mut child: Child) -> anyhow::Result<ExitStatus> {
    let mut ended = None;
    wait_for(PATIENCE, || {
        ended = child.try_wait().ok().flatten();
        ended.is_some()
    });
    match ended {
        Some(status) => Ok(status),
        None => {
            child.kill()?;
            child.wait()?;
            bail!("it did not end")
        }
    }
}

/// Two ends that know each other.
pub struct Pair {
    /// End 1.
    pub a: TunnelEnd,
    /// End 2.
    pub b: TunnelEnd,
    _folder: tempfile::TempDir,
}

/// Over which addresses the ends reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outer {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Outer {
    /// The address of an end.
    #[must_use]
    pub fn of(self, number: u8) -> SocketAddr {
        let (v4, v6) = outer(number);
        match self {
            Self::V4 => (v4, PORT).into(),
            Self::V6 => (v6, PORT).into(),
        }
    }
}

impl Pair {
    /// Starts two ends of `program` (the `conduit` command), and waits until they have a session.
    pub fn new(program: &Path, over: Outer) -> anyhow::Result<Self> {
        let mut pair = Self::apart(program)?;
        pair.a.start(&[])?;
        pair.b.start(&[])?;
        pair.introduce(Some(over.of(1)), Some(over.of(2)))?;
        pair.wait_for_session()?;
        Ok(pair)
    }

    /// Two namespaces that reach each other; nothing runs in them yet.
    pub fn apart(program: &Path) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let a = TunnelEnd::new(program, folder.path(), 1)?;
        let b = TunnelEnd::new(program, folder.path(), 2)?;
        a.space.join("under0", &b.space, "under0")?;
        for (end, number) in [(&a, 1), (&b, 2)] {
            let (v4, v6) = outer(number);
            end.space.ip(&format!(
                "address add {v4}/24 dev under0\naddress add {v6}/64 dev under0 nodad\n"
            ))?;
        }
        Ok(Self { a, b, _folder: folder })
    }

    /// Tells each end of the other, and where it is.
    pub fn introduce(
        &self,
        a_at: Option<SocketAddr>,
        b_at: Option<SocketAddr>,
    ) -> anyhow::Result<()> {
        self.a.tell(&Ask::Peers { peers: vec![self.b.as_peer(b_at)?] })?;
        self.b.tell(&Ask::Peers { peers: vec![self.a.as_peer(a_at)?] })
    }

    /// Waits until both have one.
    pub fn wait_for_session(&self) -> anyhow::Result<()> {
        let has = |end: &TunnelEnd| {
            end.status().is_ok_and(|s| s.peers.iter().all(|p| p.handshake.is_some()))
        };
        ensure!(wait_for(PATIENCE, || has(&self.a) && has(&self.b)), "no session");
        Ok(())
    }

    /// The keys in use: the first end's own, and the second's.
    pub fn keys_in_use(&self) -> anyhow::Result<(Option<PublicKey>, Option<PublicKey>)> {
        let peer = self.a.status()?.peers.into_iter().next().context("it has a peer")?;
        Ok((peer.own, peer.key))
    }
}
