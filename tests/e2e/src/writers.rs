//! A machine whose memory and disk are both under load, with the oracle knowing what each must hold.
//! Every block that the oracle writes is synced, dropped from the cache, and read back from the disk
//! into pages that may be anywhere.

use crate::{
    Stage,
    busy::{OracleReport, Work, sh, start_oracle, verify_oracle},
    eventually,
};
use architect::fleet::{MachineSpec, Runner, RunnerId};
use std::{fs, time::Duration};

/// What the memory and one file take; two more files are written as fast as the disk can.
pub const WORK: Work = Work { memory_mib: 96, hot_mib: 24, rate_mb_s: 40, file_mib: 16 };
const WRITERS: u32 = 2;
/// How long a full check of a guest may take beside everything else.
const VERIFY: Duration = Duration::from_secs(120);

/// A machine of two processors with disks of this kind.
#[must_use]
pub fn spec(stage: &Stage, kind: &str) -> MachineSpec {
    let mut spec = stage.plain_spec("redis");
    spec.vcpus = Some(2);
    // Only where it boots: the others learn it from the machine.
    spec.extra = vec!["--disk-kind".into(), kind.into()];
    spec
}

/// Boots the machine on host a; returns with its disk under load.
pub fn busy_machine(stage: &mut Stage, kind: &str) -> RunnerId {
    let spec = spec(stage, kind);
    let a = stage.fleet.run(0, &spec).unwrap();
    stage.fleet.runner(a).wait_ready(crate::BOOT).unwrap();
    let runner = stage.fleet.runner(a);
    start_oracle(runner, WORK);
    for number in 0..WRITERS {
        sh(
            runner,
            &format!(
                "oracle run --background --file /var/lib/disk{number} --file-mib 24 \
                 --file-writes-s 5000 --socket /run/oracle-disk{number}.sock"
            ),
        );
    }
    a
}

/// Waits for the machine on another host; that host is told nothing of its disks.
pub fn receiver(stage: &mut Stage, host: usize) -> RunnerId {
    let spec = stage.plain_spec("redis");
    stage.fleet.receive(host, &spec).unwrap()
}

/// How much the writers have written, all of it right so far.
#[track_caller]
#[must_use]
pub fn written(runner: &Runner) -> u64 {
    let ask = |number| {
        let words = ["oracle", "status", "--socket", &format!("/run/oracle-disk{number}.sock")];
        let (_, out) = runner.exec(&words, Duration::from_secs(60)).unwrap();
        let report: OracleReport =
            serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: oracle said {out}"));
        assert_eq!((report.file_mismatches, report.file_errors), (0, 0), "{report:?}");
        report.file_writes
    };
    (0..WRITERS).map(ask).sum()
}

/// Waits until the writers have written more.
#[track_caller]
pub fn works_on(runner: &Runner) {
    let before = written(runner);
    eventually("the disk's writers go on", Duration::from_secs(60), || {
        written(runner) > before + 500
    });
}

/// Every page and every block, and the kernel's own word.
#[track_caller]
pub fn verify_all(runner: &Runner) {
    let report = verify_oracle(runner);
    assert!(report.dirtied_mb > WORK.hot_mib, "the guest hardly ran: {report:?}");
    for number in 0..WRITERS {
        let words = ["oracle", "verify", "--socket", &format!("/run/oracle-disk{number}.sock")];
        let (code, out) = runner.exec(&words, VERIFY).unwrap();
        let report: OracleReport = serde_json::from_str(&out).unwrap();
        assert!(code == 0 && report.ok && report.file_mismatches == 0, "{report:?}");
        eprintln!("writer {number}: {} blocks written, each read back", report.file_writes);
    }
    let console = fs::read_to_string(runner.dir().run().join("console.log")).unwrap();
    for words in ["I/O error", "EXT4-fs error", "blocked for more than"] {
        assert!(!console.contains(words), "{console}");
    }
}
