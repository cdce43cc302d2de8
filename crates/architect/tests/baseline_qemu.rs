//! QEMU's own migration, really done: between two network namespaces, in every mode, encrypted and
//! not, and one that cannot converge. The guest is the driver's test guest.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

// The driver's own client, so that there is one.
#[allow(dead_code, reason = "the driver uses more of it")]
#[path = "../../drafter/src/driver/qemu/qmp.rs"]
mod qmp;

use architect::{
    baseline::{Guest, Machine, Migration, Mode, Monitor, Outcome, Side, Tls},
    doctor::missing,
};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddrV4,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

struct Client(qmp::Qmp);

impl Monitor for Client {
    fn call(&mut self, command: &str, arguments: Value, limit: Duration) -> Result<Value, String> {
        self.0.call(command, arguments, limit).map_err(|error| error.to_string())
    }
}

fn connect(path: &Path, limit: Duration) -> Result<Box<dyn Monitor>, String> {
    let client = qmp::Qmp::connect(path, limit).map_err(|error| error.to_string())?;
    Ok(Box::new(Client(client)))
}

/// Kernel and initramfs: named by the environment, or built by the driver's script.
fn guest_files() -> Option<(PathBuf, PathBuf)> {
    let named = |name: &str| std::env::var_os(name).map(PathBuf::from);
    if let (Some(kernel), Some(initramfs)) =
        (named("DRAFTER_TEST_KERNEL"), named("DRAFTER_TEST_INITRAMFS"))
    {
        return Some((kernel, initramfs));
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("test-guest");
    let files = (folder.join("vmlinux"), folder.join("initramfs.cpio"));
    if !files.1.exists() {
        let script = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../drafter/src/driver/qemu/tests/guest/build.sh");
        let output = Command::new("timeout").arg("300").arg(&script).arg(&folder).output().unwrap();
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            missing::note("a guest for QEMU's own migration", &why);
            return None;
        }
    }
    Some(files)
}

/// Two namespaces with a link between them; gone when dropped.
struct Hosts {
    names: [String; 2],
    folder: tempfile::TempDir,
}

fn ip(arguments: &str) -> bool {
    Command::new("ip").args(arguments.split(' ')).status().is_ok_and(|status| status.success())
}

impl Hosts {
    fn new() -> Option<Hosts> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let own = format!("bl{}n{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let names = [format!("{own}a"), format!("{own}b")];
        let hosts = Hosts { names, folder: tempfile::tempdir().unwrap() };
        let [a, b] = &hosts.names;
        let steps = [
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("-n {a} link add l0 type veth peer name l0 netns {b}"),
            format!("-n {a} addr add 10.99.0.1/24 dev l0"),
            format!("-n {b} addr add 10.99.0.2/24 dev l0"),
            format!("-n {a} link set l0 up"),
            format!("-n {b} link set l0 up"),
        ];
        if steps.iter().all(|step| ip(step)) {
            return Some(hosts);
        }
        missing::note("network namespaces", "ip netns add does not work; run as root");
        None
    }

    fn side(&self, index: usize) -> Side {
        let agent = self.agent(index);
        let chardev = format!("socket,id=ag,path={},server=on,wait=off", agent.display());
        let words = ["-device", "virtio-serial-pci", "-chardev", &chardev, "-device"];
        let words = words.into_iter().chain(["virtserialport,chardev=ag,name=drafter.agent"]);
        Side {
            name: ["a", "b"][index].into(),
            namespace: Some(Path::new("/run/netns").join(&self.names[index])),
            folder: self.folder.path().into(),
            arguments: words.map(Into::into).collect(),
        }
    }

    fn agent(&self, index: usize) -> PathBuf {
        self.folder.path().join(format!("{index}.agent"))
    }

    fn address(index: usize, port: u16) -> SocketAddrV4 {
        format!("10.99.0.{}:{port}", index + 1).parse().unwrap()
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            ip(&format!("netns del {name}"));
        }
    }
}

/// One question to the guest, and the answer that begins with `word`: answers to questions that
/// were given up come first.
fn ask(agent: &Path, question: &str, word: &str, limit: Duration) -> Option<String> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        let answer = || {
            let mut stream = UnixStream::connect(agent).ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
            stream.write_all(format!("{question}\n").as_bytes()).ok()?;
            let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
            lines.find(|line| line.starts_with(word))
        };
        if let Some(answer) = answer() {
            return Some(answer);
        }
        sleep(Duration::from_millis(50));
    }
    None
}

/// The guest counts on, and what it keeps in memory is what it was.
fn is_alive(agent: &Path) -> bool {
    let count = || {
        let answer = ask(agent, "count", "count ", Duration::from_secs(30))?;
        answer.strip_prefix("count ")?.parse::<u64>().ok()
    };
    let first = count();
    sleep(Duration::from_millis(300));
    let second = count();
    let sound =
        ask(agent, "check", "check ", Duration::from_secs(30)).as_deref() == Some("check ok");
    matches!((first, second), (Some(first), Some(second)) if second > first) && sound
}

fn boot(hosts: &Hosts) -> Option<Machine> {
    let (kernel, initramfs) = guest_files()?;
    let guest = Guest {
        kernel,
        initramfs,
        command_line: format!(
            "console=ttyS0 quiet reboot=t panic=-1 tsc=reliable no_timer_check \
             tsc_early_khz={} random.trust_cpu=on mitigations=off",
            tsc_khz()
        ),
        memory_mib: 256,
        vcpus: 1,
        accelerator: "tcg".into(),
    };
    let machine = Machine::boot(&guest, &hosts.side(0), &connect).unwrap();
    let up = ask(&hosts.agent(0), "ping 1", "pong ", Duration::from_secs(120));
    assert_eq!(up.as_deref(), Some("pong 1"), "see {}", machine.console_log().display());
    Some(machine)
}

fn tsc_khz() -> u64 {
    let read = || {
        // SAFETY: every x86-64 processor has the counter, and Linux lets programs read it.
        unsafe { core::arch::x86_64::_rdtsc() }
    };
    let (ticks, started) = (read(), Instant::now());
    sleep(Duration::from_millis(100));
    let (later, elapsed) = (read(), started.elapsed());
    ((later - ticks) as f64 / elapsed.as_secs_f64() / 1e3) as u64
}

fn migrate(
    hosts: &Hosts,
    machine: Machine,
    to: usize,
    mode: Mode,
    tls: Option<&Tls>,
    deadline: Duration,
    ends_at: usize,
) -> (Outcome, Machine) {
    let side = hosts.side(to);
    let mut alive = || is_alive(&hosts.agent(ends_at));
    let migration = Migration {
        to: &side,
        listen: Hosts::address(to, 7000),
        mode,
        tls,
        deadline,
        alive: &mut alive,
    };
    let (outcome, mut machine) = machine.migrate(migration, &connect).unwrap();
    if !outcome.guest_alive {
        let console = std::fs::read(machine.console_log()).unwrap_or_default();
        eprintln!("{outcome:?}; QEMU says {:?}; console:", machine.status());
        eprintln!("{}", String::from_utf8_lossy(&console[console.len().saturating_sub(2000)..]));
    }
    (outcome, machine)
}

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn a_guest_moves_there_and_back_in_every_mode_and_is_asked_whether_it_lives() {
    let Some(hosts) = Hosts::new() else { return };
    let Some(mut machine) = boot(&hosts) else { return };
    let modes = [
        Mode::PreCopyDefault,
        Mode::PostCopy { pre_copy_ms: 50, bandwidth_mib: 4000 },
        Mode::Multifd { channels: 2, downtime_limit_ms: 300, bandwidth_mib: 4000 },
        Mode::PRE_COPY_TUNED,
    ];
    for (index, mode) in modes.into_iter().enumerate() {
        let (outcome, now) =
            migrate(&hosts, machine, (index + 1) % 2, mode, None, MINUTE, (index + 1) % 2);
        eprintln!("{outcome:?}");
        assert!(outcome.converged, "{outcome:?}");
        assert!(outcome.bytes > 1 << 20 && outcome.wall_ms > 0.0, "{outcome:?}");
        assert!(
            outcome.total_ms.is_some_and(|total| (1.0..=outcome.wall_ms).contains(&total)),
            "{outcome:?}"
        );
        assert_eq!(outcome.downtime_ms.is_none(), matches!(mode, Mode::PostCopy { .. }));
        if !outcome.guest_alive {
            // QEMU's pre-copy under its translator kills guests now and then, which is why the
            // baseline asks them. Nothing more can be learnt from this one.
            eprintln!("QEMU lost the guest in {mode:?}");
            return;
        }
        machine = now;
    }
}

#[test]
fn what_cannot_converge_is_cancelled_at_its_deadline_and_the_guest_lives_on_at_its_source() {
    let Some(hosts) = Hosts::new() else { return };
    let Some(machine) = boot(&hosts) else { return };
    let pid = machine.pid();
    let mode = Mode::PreCopyTuned { downtime_limit_ms: 1, bandwidth_mib: 1 };
    let (outcome, now) = migrate(&hosts, machine, 1, mode, None, Duration::from_secs(2), 0);
    assert!(!outcome.converged && outcome.guest_alive, "{outcome:?}");
    assert!(outcome.note.unwrap().contains("did not converge"));
    assert!((2000.0..15_000.0).contains(&outcome.wall_ms), "{}", outcome.wall_ms);
    assert_eq!(now.pid(), pid, "it is the source's");
}

#[test]
fn a_migration_encrypted_by_qemu_arrives_and_one_with_a_strangers_certificate_does_not() {
    let Some(hosts) = Hosts::new() else { return };
    let Some(machine) = boot(&hosts) else { return };
    let tls = Tls { folder: hosts.folder.path().join("tls"), destination: "b.test".into() };
    certificates(&tls);
    let wrong = Tls { destination: "c.test".into(), ..tls.clone() };
    let mode = Mode::PostCopy { pre_copy_ms: 5000, bandwidth_mib: 4000 };
    let (outcome, machine) = migrate(&hosts, machine, 1, mode, Some(&wrong), MINUTE, 0);
    assert!(!outcome.converged && outcome.guest_alive, "{outcome:?}");
    // The first attempt left its credentials behind at the source; the second has its own.
    let mode = Mode::PreCopyTuned { downtime_limit_ms: 300, bandwidth_mib: 4000 };
    let (outcome, _machine) = migrate(&hosts, machine, 1, mode, Some(&tls), MINUTE, 1);
    assert!(outcome.converged, "{outcome:?}");
}

fn certificates(tls: &Tls) {
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
        KeyUsagePurpose,
    };
    std::fs::create_dir_all(&tls.folder).unwrap();
    let write = |name: &str, pem: String| std::fs::write(tls.folder.join(name), pem).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(vec![]).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    write("ca-cert.pem", ca.self_signed(&key).unwrap().pem());
    let issuer = Issuer::new(ca, key);
    for (name, purpose) in [
        ("server", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![tls.destination.clone()]).unwrap();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        write(&format!("{name}-cert.pem"), params.signed_by(&key, &issuer).unwrap().pem());
        write(&format!("{name}-key.pem"), key.serialize_pem());
    }
}
