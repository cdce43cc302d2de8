//! A small Linux guest under QEMU's translator with disks and a shell on its serial line, for the
//! benchmarks and (by path) for the tests.
//!
//! The kernel and the base of its initramfs are those of drafter's tests: `scripts/test.sh` builds
//! them (or `crates/drafter/src/driver/qemu/tests/guest/build.sh target/test-guest`). The machine
//! is what drafter starts: microvm with PCI, memory in a shared memfd.

use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

/// A boot under a translator on a busy host.
const BOOT: Duration = Duration::from_secs(120);
/// How long a command may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /sbin /usr/bin /usr/sbin
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs tmp /tmp
/bin/busybox --install -s
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
while read -r module; do insmod /modules/$module; done < /modules/order
stty -echo < /dev/ttyS0
exec < /dev/ttyS0 > /dev/ttyS0 2>&1
echo guest: up
while read -r line; do
    eval \"$line\"
    echo guest: done $?
done
";

/// How the guest gets a disk.
pub(crate) enum Disk<'a> {
    Vhost { socket: &'a Path, queues: u16 },
    Nbd { socket: &'a Path },
}

/// A running guest.
pub(crate) struct Guest {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file of an initramfs (Documentation/driver-api/early-userspace/buffer-format.rst, newc).
fn cpio_entry(name: &str, mode: u32, content: &[u8]) -> Vec<u8> {
    let mut out = b"070701".to_vec();
    let fields = [1, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    for field in fields {
        out.extend(format!("{field:08x}").bytes());
    }
    out.extend(name.bytes().chain([0]));
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend(content);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

fn test_guest() -> Result<(PathBuf, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let named = |variable: &str, file: &str| {
        std::env::var_os(variable)
            .map_or_else(|| root.join("target/test-guest").join(file), PathBuf::from)
    };
    let kernel = named("DRAFTER_TEST_KERNEL", "vmlinux");
    let initramfs = named("DRAFTER_TEST_INITRAMFS", "initramfs.cpio");
    ensure!(
        kernel.exists() && initramfs.exists(),
        "{} is missing: run scripts/test.sh, which builds the guest of the tests",
        kernel.display()
    );
    Ok((kernel, initramfs))
}

/// The rate of the time stamp counter: microvm's guest cannot measure it on a busy host, and does
/// not boot with a wrong one.
fn tsc_khz() -> u64 {
    // SAFETY: the instruction exists on every x86-64 processor and changes nothing.
    let ticks = || unsafe { std::arch::x86_64::_rdtsc() };
    let start = Instant::now();
    // Both clocks, as close together as 16 tries allow: this thread may lose its processor.
    let reading = || {
        let tries = (0..16).map(|_| {
            let (before, now, after) = (ticks(), start.elapsed(), ticks());
            (after - before, before + (after - before) / 2, now)
        });
        let (_, ticks, now) = tries.min().unwrap_or_default();
        (ticks, now)
    };
    let mut rates: Vec<u64> = (0..5)
        .map(|_| {
            let (first, began) = reading();
            thread::sleep(Duration::from_millis(60));
            let (last, ended) = reading();
            (u128::from(last - first) * 1_000_000 / (ended - began).as_nanos().max(1)) as u64
        })
        .collect();
    rates.sort_unstable();
    rates[2]
}

impl Guest {
    /// Boots it with these disks, which it calls vda, vdb and so on.
    pub(crate) fn start(dir: &Path, disks: &[Disk<'_>]) -> Result<Self> {
        let (kernel, base) = test_guest()?;
        let mut initramfs = fs::read(base)?;
        initramfs.resize(initramfs.len().next_multiple_of(512), 0);
        initramfs.extend(cpio_entry("init", 0o100_755, INIT.as_bytes()));
        initramfs.extend(cpio_entry("TRAILER!!!", 0, b""));
        let image = dir.join("initramfs.cpio");
        fs::write(&image, initramfs)?;

        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "256M"]);
        command.args(["-object", "memory-backend-memfd,id=ram0,size=256M,share=on", "-M"]);
        command.arg("microvm,x-option-roms=off,isa-serial=on,rtc=on,pcie=on,memory-backend=ram0");
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(image);
        command.arg("-append").arg(format!(
            "console=ttyS0 quiet reboot=t panic=-1 tsc=reliable no_timer_check tsc_early_khz={} \
             random.trust_cpu=on mitigations=off",
            tsc_khz()
        ));
        command.args(["-chardev", "stdio,id=serial,signal=off", "-serial", "chardev:serial"]);
        for (index, disk) in disks.iter().enumerate() {
            let slot = 8 + index;
            match disk {
                Disk::Vhost { socket, queues } => {
                    let socket = socket.display();
                    let device = format!(
                        "vhost-user-blk-pci,chardev=vu{index},num-queues={queues},queue-size=128,\
                         addr={slot:#x}"
                    );
                    command.arg("-chardev");
                    command.arg(format!("socket,id=vu{index},path={socket},reconnect=1"));
                    command.args(["-device", &device]);
                }
                Disk::Nbd { socket } => {
                    let node = serde_json::json!({
                        "driver": "nbd", "node-name": format!("disk{index}"), "discard": "unmap",
                        "server": { "type": "unix", "path": socket }, "reconnect-delay": 86_400,
                    });
                    let device = format!(
                        "virtio-blk-pci,drive=disk{index},disable-legacy=on,werror=stop,\
                         rerror=stop,addr={slot:#x}"
                    );
                    command.arg("-blockdev").arg(node.to_string());
                    command.args(["-device", &device]);
                }
            }
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("could not start the guest; install the package qemu-system-x86")?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("the guest has no serial line");
        };
        let (send, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        let mut guest = Self { child, input, lines, seen: Vec::new() };
        guest.until(BOOT, |line| line.contains("guest: up"))?;
        Ok(guest)
    }

    fn until(&mut self, limit: Duration, ends: impl Fn(&str) -> bool) -> Result<Vec<String>> {
        let (deadline, mut out) = (Instant::now() + limit, Vec::new());
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    let ended = ends(&line);
                    out.push(line);
                    if ended {
                        return Ok(out);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("the guest did not answer within {limit:?}; it said {:#?}", self.tail())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the machine ended; it said {:#?}", self.tail())
                }
            }
        }
    }

    fn tail(&self) -> &[String] {
        &self.seen[self.seen.len().saturating_sub(40)..]
    }

    /// Begins a command; [`Guest::finish`] waits for it.
    pub(crate) fn begin(&mut self, command: &str) -> Result<()> {
        self.input.write_all(command.as_bytes())?;
        Ok(self.input.write_all(b"\n")?)
    }

    /// The output of the command that was begun, which must succeed.
    pub(crate) fn finish(&mut self, limit: Duration) -> Result<String> {
        let mut lines = self.until(limit, |line| line.contains("guest: done"))?;
        let last = lines.pop().unwrap_or_default();
        ensure!(last.ends_with("guest: done 0"), "{lines:#?} {last}");
        Ok(lines.join("\n"))
    }

    /// Runs a command, which must succeed; gives its output.
    pub(crate) fn run(&mut self, command: &str) -> Result<String> {
        self.begin(command)?;
        self.finish(LIMIT)
    }
}
