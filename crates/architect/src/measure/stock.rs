//! The other side: the same guest under a stock QEMU, moved by QEMU itself over the same link.

use super::{
    Abandon,
    cell::Cell,
    journal::Journal,
    ours::{Bed, Findings, oracle_words},
};
use crate::baseline::{Guest, Machine, Migration, Mode, Monitor, Outcome, Side, Tls};
use anyhow::{Context, ensure};
use drafter::{
    driver::{
        Driver,
        qemu::{self, QemuConfig, QemuDriver},
    },
    guest::GuestChannel,
    package::Package,
};
use drafter_guest::protocol::{ExecRequest, ExitStatus};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    net::SocketAddrV4,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// Where QEMU listens for its own migration.
const PORT: u16 = 7600;
/// How long a translated guest may take to boot on a busy computer.
const BOOT: Duration = Duration::from_secs(90);
/// How long the oracle may take to fill the memory.
const FILL: Duration = Duration::from_secs(90);
/// How long a guest that was moved may take to answer before it counts as dead.
const ALIVE: Duration = Duration::from_secs(8);

impl Monitor for qemu::Monitor {
    fn call(&mut self, command: &str, arguments: Value, limit: Duration) -> Result<Value, String> {
        qemu::Monitor::call(self, command, arguments, limit)
    }
}

fn connect(socket: &Path, limit: Duration) -> Result<Box<dyn Monitor>, String> {
    Ok(Box::new(qemu::Monitor::connect(socket, limit)?))
}

/// Modes that a baseline is measured in, by their short names.
pub(super) const DEFAULT: Mode = Mode::PreCopyDefault;
/// See [`DEFAULT`].
pub(super) const TUNED: Mode = Mode::PRE_COPY_TUNED;
/// See [`DEFAULT`]: as many connections as processors, otherwise as tuned.
pub(super) const MULTIFD: Mode =
    Mode::Multifd { channels: 2, downtime_limit_ms: 50, bandwidth_mib: 4000 };
/// See [`DEFAULT`].
pub(super) const POST_COPY: Mode = Mode::PostCopy { pre_copy_ms: 50, bandwidth_mib: 4000 };

/// The name of a mode in bars.
pub(super) fn name_of(mode: Mode) -> &'static str {
    match mode {
        Mode::PreCopyDefault => "default",
        Mode::PreCopyTuned { .. } => "50ms",
        Mode::Multifd { .. } => "multifd",
        Mode::PostCopy { .. } => "post-copy",
    }
}

/// A guest under a stock QEMU on a rig.
pub(super) struct Stock {
    cell: Cell,
    guest: Guest,
    sides: [Side; 2],
    sockets: [PathBuf; 2],
    listen: [SocketAddrV4; 2],
    tls: [Option<Tls>; 2],
    machine: Option<Machine>,
    channel: Option<GuestChannel>,
    at: usize,
}

/// One migration by QEMU.
pub(super) struct Moved {
    /// What QEMU and the guest say.
    pub(super) outcome: Outcome,
    /// From before the destination's QEMU was started until the end, milliseconds.
    pub(super) whole_ms: f64,
}

impl Stock {
    /// Boots the package's guest under a stock QEMU on the first host and starts its oracle.
    pub(super) fn boot(
        bed: &Bed,
        cell: Cell,
        package: &Path,
        accelerator: &str,
    ) -> anyhow::Result<Stock> {
        let rig = bed.fleet.rig();
        let folder = rig.folder().join("stock");
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let package = Package::open(package)?;
        let image = package.device("root").context("the package has no device \"root\"")?;
        let disk = folder.join("root.raw");
        // With its holes; both QEMUs open it, as they would a disk in shared storage.
        let copied = Command::new("cp").arg("--sparse=always").args([&image, &disk]).status();
        ensure!(copied.is_ok_and(|status| status.success()), "copying {}", image.display());
        let facts = QemuDriver::new(QemuConfig {
            accelerator: match accelerator {
                "kvm" => qemu::AcceleratorChoice::Kvm,
                _ => qemu::AcceleratorChoice::Tcg,
            },
            ..QemuConfig::new(&folder)
        })
        .facts()?;
        let guest = Guest {
            kernel: package.kernel(),
            initramfs: package.initramfs(),
            // The driver's own words (see `driver::qemu::command`), so that the guests are alike.
            command_line: format!(
                "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on tsc=reliable \
                 no_timer_check mitigations=off tsc_early_khz={} {} drafter.host=stock",
                facts.tsc_khz,
                package.manifest().command_line
            ),
            memory_mib: cell.memory_mib,
            vcpus: package.manifest().vcpus,
            accelerator: accelerator.to_owned(),
        };
        let hosts = rig.hosts();
        let sockets = [0, 1].map(|at| folder.join(format!("guest-{}", hosts[at].name)));
        let sides = [0, 1].map(|at| Side {
            name: hosts[at].name.clone(),
            namespace: Some(Path::new("/run/netns").join(hosts[at].namespace.name())),
            folder: folder.clone(),
            arguments: devices(&disk, &sockets[at]),
        });
        let listen = [0, 1].map(|at| SocketAddrV4::new(hosts[at].migration, PORT));
        let tls = match (cell.tls, rig.identity()) {
            (true, Some(identity)) => {
                let made = |from: usize, to: usize| {
                    credentials(&identity, &folder, &hosts[from].name, &hosts[to].name)
                };
                [Some(made(1, 0)?), Some(made(0, 1)?)]
            }
            _ => [None, None],
        };
        let mut stock =
            Stock { cell, guest, sides, sockets, listen, tls, machine: None, channel: None, at: 0 };
        stock.boot_again()?;
        Ok(stock)
    }

    /// Boots the guest, after a death or for the first time.
    fn boot_again(&mut self) -> anyhow::Result<()> {
        (self.channel, self.machine) = (None, None);
        self.at = 0;
        self.machine = Some(Machine::boot(&self.guest, &self.sides[0], &connect)?);
        let channel = GuestChannel::connect(&self.sockets[0], "stock")?;
        channel.wait_ready(BOOT)?;
        self.channel = Some(channel);
        self.start_oracle()
    }

    fn start_oracle(&self) -> anyhow::Result<()> {
        let channel = self.channel.as_ref().context("the baseline's guest is not running")?;
        let words = oracle_words(self.cell);
        exec(channel, &words, FILL).context("starting the oracle of the baseline")?;
        Ok(())
    }

    /// Another rate of writing: the oracle begins anew.
    pub(super) fn set_rate(&mut self, rate_mb_s: u64) -> anyhow::Result<()> {
        self.cell.rate_mb_s = rate_mb_s;
        let channel = self.channel.as_ref().context("the baseline's guest is not running")?;
        exec(channel, &oracle("stop"), ALIVE)?;
        self.start_oracle()
    }

    /// Lets the oracle write, or rest while something else is measured.
    pub(super) fn writes(&self, on: bool) -> anyhow::Result<()> {
        let channel = self.channel.as_ref().context("the baseline's guest is not running")?;
        let word = if on { "resume-writes" } else { "pause-writes" };
        exec(channel, &oracle(word), ALIVE).map(drop)
    }

    /// Migrates to the other host. A guest that did not survive is booted again.
    pub(super) fn go(
        &mut self,
        mode: Mode,
        deadline: Duration,
        journal: &mut Journal,
        abandon: &Abandon,
    ) -> anyhow::Result<Moved> {
        abandon.check()?;
        let to = 1 - self.at;
        let machine = self.machine.take().context("the baseline's guest is not running")?;
        // Its end of the guest channel goes with the source.
        self.channel = None;
        let mut found = None;
        let socket = &self.sockets[to];
        let mut alive = || {
            found = survivor(socket);
            found.is_some()
        };
        let start = Instant::now();
        let migration = Migration {
            to: &self.sides[to],
            listen: self.listen[to],
            mode,
            tls: self.tls[to].as_ref(),
            deadline,
            alive: &mut alive,
        };
        let (mut outcome, machine) = machine.migrate(migration, &connect)?;
        let end = outcome.window.map_or_else(Instant::now, |(_, end)| end);
        let whole_ms = end.saturating_duration_since(start).as_secs_f64() * 1e3;
        if outcome.converged {
            self.at = to;
            self.channel = found;
        } else {
            // It is still where it was; the question went to the wrong door.
            self.channel = survivor(&self.sockets[self.at]);
            outcome.guest_alive = self.channel.is_some();
        }
        journal.stock(self.cell, &outcome, whole_ms);
        if self.channel.is_some() {
            self.machine = Some(machine);
        } else {
            drop(machine);
            self.boot_again()?;
        }
        Ok(Moved { outcome, whole_ms })
    }
}

/// A channel to a guest that is alive and whose memory and file are as they must be.
fn survivor(socket: &Path) -> Option<GuestChannel> {
    let channel = GuestChannel::connect(socket, "stock").ok()?;
    let out = exec(&channel, &oracle("status"), ALIVE).ok()?;
    Findings::read(&out).is_ok_and(|findings| findings.wrong == 0).then_some(channel)
}

fn oracle(word: &str) -> [String; 2] {
    ["/usr/bin/oracle".to_owned(), word.to_owned()]
}

fn exec(channel: &GuestChannel, words: &[String], limit: Duration) -> anyhow::Result<String> {
    let request = ExecRequest {
        argv: words.to_vec(),
        env: BTreeMap::new(),
        working_dir: None,
        user: None,
        timeout: limit,
    };
    let mut out = Vec::new();
    let status = channel.exec(&request, |output| out.extend(output.data))?;
    let out = String::from_utf8_lossy(&out).into_owned();
    ensure!(
        status == ExitStatus::Code(0),
        "\"{}\" in the baseline's guest ended with {status:?}: {out}",
        words.join(" ")
    );
    Ok(out)
}

/// The devices that our machines have, but for what only we need.
fn devices(disk: &Path, socket: &Path) -> Vec<OsString> {
    let blockdev = serde_json::json!({
        "driver": "raw", "node-name": "disk0",
        "file": { "driver": "file", "filename": disk, "locking": "off" },
    });
    let mut chardev = OsString::from("socket,id=guest,server=on,wait=off,path=");
    chardev.push(socket);
    let mut words: Vec<OsString> = vec!["-blockdev".into(), blockdev.to_string().into()];
    words.extend(["-chardev".into(), chardev]);
    for device in [
        "virtio-blk-pci,id=blk0,drive=disk0,disable-legacy=on",
        "virtio-serial-pci,id=serial0,disable-legacy=on,max_ports=2",
        "virtserialport,bus=serial0.0,nr=1,chardev=guest,name=drafter.agent",
    ] {
        words.extend(["-device".into(), device.into()]);
    }
    words
}

/// Certificates under the names that QEMU wants: `from` is the client, `to` the server.
fn credentials(identity: &Path, folder: &Path, from: &str, to: &str) -> anyhow::Result<Tls> {
    let made = folder.join(format!("tls-{from}-{to}"));
    fs::create_dir_all(&made).with_context(|| format!("making {}", made.display()))?;
    for (name, as_name) in [
        ("ca.crt".to_owned(), "ca-cert.pem"),
        (format!("{to}.crt"), "server-cert.pem"),
        (format!("{to}.key"), "server-key.pem"),
        (format!("{from}.crt"), "client-cert.pem"),
        (format!("{from}.key"), "client-key.pem"),
    ] {
        fs::copy(identity.join(&name), made.join(as_name))
            .with_context(|| format!("copying {name} for the baseline"))?;
    }
    Ok(Tls { folder: made, destination: to.to_owned() })
}
