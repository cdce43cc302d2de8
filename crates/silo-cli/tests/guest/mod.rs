//! A small Linux guest under QEMU's translator with one disk and a shell on its serial line.
//!
//! The kernel and the base of its initramfs are those of drafter's tests: `scripts/test.sh` builds
//! them (or `crates/drafter/src/driver/qemu/tests/guest/build.sh target/test-guest`). The machine
//! is what drafter starts: microvm with PCI, memory in a shared memfd.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses a part of it")]

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
pub const BOOT: Duration = Duration::from_secs(120);
pub const LIMIT: Duration = Duration::from_secs(120);

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

/// How the guest gets its disk.
pub enum Disk<'a> {
    Vhost { socket: &'a Path, queues: u16 },
    Nbd { socket: &'a Path },
}

pub struct Guest {
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

fn test_guest() -> (PathBuf, PathBuf) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
    let named = |variable: &str, file: &str| {
        std::env::var_os(variable)
            .map_or_else(|| root.join("target/test-guest").join(file), PathBuf::from)
    };
    let kernel = named("DRAFTER_TEST_KERNEL", "vmlinux");
    let initramfs = named("DRAFTER_TEST_INITRAMFS", "initramfs.cpio");
    assert!(
        kernel.exists() && initramfs.exists(),
        "{} is missing: run scripts/test.sh, which builds the guest of the tests",
        kernel.display()
    );
    (kernel, initramfs)
}

/// The rate of the time stamp counter: microvm's guest cannot measure it on a busy host.
fn tsc_khz() -> u64 {
    // SAFETY: the instruction exists on every x86-64 processor and changes nothing.
    let read = || unsafe { std::arch::x86_64::_rdtsc() };
    let mut rates: Vec<u64> = (0..5)
        .map(|_| {
            let (start, ticks) = (Instant::now(), read());
            thread::sleep(Duration::from_millis(50));
            let ticks = read() - ticks;
            (u128::from(ticks) * 1_000_000 / start.elapsed().as_nanos()) as u64
        })
        .collect();
    rates.sort_unstable();
    rates[2]
}

impl Guest {
    /// Boots it; `files` (name, mode, content) are added to its initramfs.
    pub fn start(dir: &Path, disk: &Disk<'_>, files: &[(&str, u32, Vec<u8>)]) -> Self {
        let (kernel, base) = test_guest();
        let mut initramfs = fs::read(base).unwrap();
        initramfs.resize(initramfs.len().next_multiple_of(512), 0);
        initramfs.extend(cpio_entry("init", 0o100_755, INIT.as_bytes()));
        let mut folders = std::collections::BTreeSet::new();
        for (name, mode, content) in files {
            for folder in Path::new(name).ancestors().skip(1).collect::<Vec<_>>().iter().rev() {
                let folder = folder.to_str().unwrap();
                if !folder.is_empty() && folders.insert(folder.to_owned()) {
                    initramfs.extend(cpio_entry(folder, 0o040_755, b""));
                }
            }
            initramfs.extend(cpio_entry(name, *mode, content));
        }
        initramfs.extend(cpio_entry("TRAILER!!!", 0, b""));
        let image = dir.join("initramfs.cpio");
        fs::write(&image, initramfs).unwrap();

        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "256M"]);
        command.args(["-object", "memory-backend-memfd,id=ram0,size=256M,share=on"]);
        command.args([
            "-M",
            "microvm,x-option-roms=off,isa-serial=on,rtc=on,pcie=on,memory-backend=ram0",
        ]);
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(image);
        command.arg("-append").arg(format!(
            "console=ttyS0 quiet reboot=t panic=-1 tsc=reliable no_timer_check tsc_early_khz={} \
             random.trust_cpu=on mitigations=off",
            tsc_khz()
        ));
        command.args(["-chardev", "stdio,id=serial,signal=off", "-serial", "chardev:serial"]);
        match disk {
            Disk::Vhost { socket, queues } => {
                let socket = socket.display();
                command.arg("-chardev").arg(format!("socket,id=vu,path={socket},reconnect=1"));
                command.arg("-device").arg(format!(
                    "vhost-user-blk-pci,chardev=vu,num-queues={queues},queue-size=128"
                ));
            }
            Disk::Nbd { socket } => {
                let node = serde_json::json!({
                    "driver": "nbd", "node-name": "disk0", "discard": "unmap",
                    "server": { "type": "unix", "path": socket }, "reconnect-delay": 86_400,
                });
                command.arg("-blockdev").arg(node.to_string());
                command.args([
                    "-device",
                    "virtio-blk-pci,drive=disk0,disable-legacy=on,werror=stop,rerror=stop",
                ]);
            }
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("install the package qemu-system-x86");
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
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
        guest.until(BOOT, |line| line.contains("guest: up"));
        guest
    }

    fn until(&mut self, limit: Duration, ends: impl Fn(&str) -> bool) -> Vec<String> {
        let (deadline, mut out) = (Instant::now() + limit, Vec::new());
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if ends(&line) {
                        out.push(line);
                        return out;
                    }
                    out.push(line);
                }
                Err(RecvTimeoutError::Timeout) => {
                    panic!("the guest did not answer within {limit:?}; it said {:#?}", self.tail())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("the machine ended; it said {:#?}", self.tail())
                }
            }
        }
    }

    fn tail(&self) -> &[String] {
        &self.seen[self.seen.len().saturating_sub(40)..]
    }

    /// Begins a command; [`Guest::finish`] waits for it.
    pub fn begin(&mut self, command: &str) {
        self.input.write_all(command.as_bytes()).unwrap();
        self.input.write_all(b"\n").unwrap();
    }

    /// The output of the command that was begun, which must succeed.
    pub fn finish(&mut self, limit: Duration) -> String {
        let mut lines = self.until(limit, |line| line.contains("guest: done"));
        let last = lines.pop().unwrap();
        assert!(last.ends_with("guest: done 0"), "{lines:#?} {last}");
        lines.join("\n")
    }

    /// Runs a command, which must succeed; gives its output.
    pub fn run(&mut self, command: &str) -> String {
        self.begin(command);
        self.finish(LIMIT)
    }
}
