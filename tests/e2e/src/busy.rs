//! A guest that is busy in every way that a move could break: memory, a file, a Redis connection
//! from outside, and a TCP connection of its own to the outside.

use crate::{Stage, stage::oracle};
use architect::{
    fleet::Runner,
    load::{Load, LoadConfig, LoadHandle, LoadReport},
    rig,
};
use serde::Deserialize;
use std::{
    net::SocketAddr,
    process::{Child, Stdio},
    time::Duration,
};

/// Where the guest's own connection goes, in the client's namespace.
const ECHO: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(rig::CLIENT), 7007);
/// How long a full check of a guest's memory may take.
const VERIFY: Duration = Duration::from_secs(120);

/// What the oracle does in the guest.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Memory under watch, MiB.
    pub memory_mib: u64,
    /// Of it, the part that is written all the time.
    pub hot_mib: u64,
    /// How fast, in MB/s.
    pub rate_mb_s: u64,
    /// Size of the checked file, MiB.
    pub file_mib: u64,
}

impl Default for Work {
    fn default() -> Self {
        Self { memory_mib: 128, hot_mib: 32, rate_mb_s: 100, file_mib: 16 }
    }
}

/// What the oracle says (`oracle status`).
#[derive(Clone, Debug, Deserialize)]
pub struct OracleReport {
    /// Nothing was ever wrong.
    pub ok: bool,
    /// Checks of pages.
    pub pages_checked: u64,
    /// Pages found wrong.
    pub mismatches: u64,
    /// Blocks of the file found wrong.
    pub file_mismatches: u64,
    /// Blocks of the file written.
    pub file_writes: u64,
    /// Operations on the file that failed.
    pub file_errors: u64,
    /// Memory written, 10^6 bytes.
    pub dirtied_mb: u64,
    /// The first thing found wrong.
    pub first_mismatch: Option<String>,
}

/// What the guest's own connection saw.
#[derive(Clone, Debug, Deserialize)]
struct OutboundReport {
    ok: bool,
    echoed: u64,
    resets: u64,
    wrong: u64,
}

/// Runs a command in the guest and wants it to succeed.
#[track_caller]
pub fn sh(runner: &Runner, script: &str) -> String {
    let (code, out) = runner.exec(&["/bin/dash", "-c", script], Duration::from_secs(60)).unwrap();
    assert_eq!(code, 0, "`{script}` in the guest ended with {code}: {out}");
    out
}

/// Starts the oracle in the guest.
#[track_caller]
pub fn start_oracle(runner: &Runner, work: Work) {
    let Work { memory_mib, hot_mib, rate_mb_s, file_mib } = work;
    sh(
        runner,
        &format!(
            "oracle run --background --memory-mib {memory_mib} --hot-mib {hot_mib} \
             --rate-mb-s {rate_mb_s} --file /var/lib/oracle --file-mib {file_mib}"
        ),
    );
}

/// Has the oracle check everything once, and wants it clean.
#[track_caller]
pub fn verify_oracle(runner: &Runner) -> OracleReport {
    let (code, out) = runner.exec(&["oracle", "verify"], VERIFY).unwrap();
    let report: OracleReport =
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: oracle said {out}"));
    assert_eq!(report.mismatches, 0, "memory is wrong: {report:?}");
    assert_eq!(report.file_mismatches, 0, "the file is wrong: {report:?}");
    assert_eq!(report.file_errors, 0, "the disk failed: {report:?}");
    assert!(report.ok && code == 0, "{report:?}");
    report
}

/// How often a retransmission timer of the guest's kernel has fired (`TCPTimeouts`).
#[track_caller]
#[must_use]
pub fn guest_timeouts(runner: &Runner) -> u64 {
    let text = sh(runner, "cat /proc/net/netstat");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let mut pairs = names.split(' ').zip(values.split(' '));
    let (_, value) = pairs.find(|(name, _)| *name == "TCPTimeouts").expect("the kernel counts");
    value.parse().unwrap()
}

/// All of it at once.
pub struct Busy {
    load: Option<LoadHandle>,
    _echo: Echo,
    work: Work,
    timeouts: u64,
}

/// The other end of the guest's own connection.
struct Echo(Child);

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Busy {
    /// Makes machine `number`, which runs at `runner`, busy.
    #[track_caller]
    pub fn start(stage: &Stage, runner: &Runner, number: u8, work: Work) -> Self {
        let client = stage.fleet.rig().client();
        let port = ECHO.port() + u16::from(number);
        let listen = SocketAddr::new(ECHO.ip(), port);
        let echo = client
            .command(oracle())
            .args(["echo", "--listen", &listen.to_string()])
            .stdout(Stdio::null())
            .spawn();
        let echo = Echo(echo.unwrap());
        start_oracle(runner, work);
        sh(runner, &format!("oracle outbound --background --to {listen}"));
        let config = LoadConfig { think: Duration::from_millis(1), ..LoadConfig::default() };
        let load = client.run(|| Load::start(Stage::public(number), config)).unwrap().unwrap();
        Self { load: Some(load), _echo: echo, work, timeouts: guest_timeouts(runner) }
    }

    /// Waits until the client has had answers after now: the machine serves.
    #[track_caller]
    pub fn served(&self) {
        let load = self.load.as_ref().expect("only `finish` takes it");
        let answered = load.wait_for(20, Duration::from_secs(20));
        assert!(answered, "the client gets no answers: {:?}", load.progress());
    }

    /// Ends the work and wants nothing lost: not a page, not a block, not a write, not a
    /// connection, and no retransmission time-out at the client.
    #[track_caller]
    pub fn finish(mut self, runner: &Runner) -> (LoadReport, OracleReport) {
        self.served();
        let oracle = verify_oracle(runner);
        assert!(oracle.file_writes > 0, "nothing was written to the disk: {oracle:?}");
        assert!(oracle.dirtied_mb > self.work.hot_mib, "the guest hardly ran: {oracle:?}");
        let out = sh(runner, "oracle status --socket /run/oracle-outbound.sock");
        let outbound: OutboundReport = serde_json::from_str(&out).unwrap();
        assert_eq!((outbound.resets, outbound.wrong), (0, 0), "the guest's connection: {out}");
        assert!(outbound.ok && outbound.echoed > 10, "the guest's connection: {out}");
        let report = self.load.take().expect("only taken here").finish().unwrap();
        assert!(report.is_clean(), "the client noticed: {report:?}");
        assert_eq!(report.tcp.rto.unwrap_or(0), 0, "the client's timer fired: {:?}", report.tcp);
        let fired = guest_timeouts(runner) - self.timeouts;
        eprintln!(
            "timers of the guest fired {fired} times, {} retransmits",
            report.tcp.retransmits
        );
        (report, oracle)
    }
}
