//! A machine whose disk waits for room: its host's file system is small, and somebody else's file takes
//! what is left while the guest writes.

use crate::{Stage, busy::sh, eventually, writers::spec};
use architect::fleet::{Runner, RunnerId};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::{fs, path::PathBuf, time::Duration};

/// What the guest writes: 24 MiB that can be made again to compare.
const STREAM: &str = "seq 1 5000000 | head -c 25165824";

/// The small file system below host a's machines; unmounted when dropped.
pub struct Small {
    at: PathBuf,
}

impl Small {
    /// On host a, before anything runs there. Declare it before what lies on it, so that it goes last.
    #[must_use]
    pub fn mount(stage: &Stage) -> Self {
        let at = stage.fleet.state_of(0);
        fs::create_dir_all(&at).unwrap();
        let options = Some("size=48m,mode=0755");
        mount(Some("tmpfs"), &at, Some("tmpfs"), MsFlags::empty(), options).unwrap();
        Self { at }
    }

    fn ballast(&self) -> PathBuf {
        self.at.join("ballast")
    }

    /// Gives the machine its room back.
    pub fn make_room(&self) {
        fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}

/// Boots a machine on host a, and has it write more than there is room for. Returns when it waits.
#[track_caller]
pub fn waiting_machine(stage: &mut Stage, small: &Small, kind: &str) -> RunnerId {
    let spec = spec(stage, kind);
    let a = stage.fleet.run(0, &spec).unwrap();
    let runner = stage.fleet.runner(a);
    runner.wait_ready(crate::BOOT).unwrap();
    fs::write(small.ballast(), vec![1; 30 << 20]).unwrap();
    sh(
        runner,
        &format!(
            "( {STREAM} | dd of=/var/lib/big bs=1M iflag=fullblock conv=fsync 2> /run/big.err; \
             echo $? > /run/big.code ) > /dev/null 2>&1 &"
        ),
    );
    await_trouble(runner);
    a
}

/// Waits until the machine's status says that its disk waits for room.
#[track_caller]
pub fn await_trouble(runner: &Runner) {
    eventually("the status tells that a write waits", Duration::from_secs(60), || {
        let status = runner.status().unwrap();
        assert_ne!(status.state, "failed", "{}", status.detail);
        status.detail.contains("stands still") && status.detail.contains("make room")
    });
}

/// The guest's write ends without an error, and what it wrote is on the disk.
#[track_caller]
pub fn ends_well(runner: &Runner) {
    eventually("the guest's write has ended", Duration::from_secs(60), || {
        sh(runner, "cat /run/big.code 2> /dev/null || true").trim() != ""
    });
    assert_eq!(sh(runner, "cat /run/big.code").trim(), "0", "{}", sh(runner, "cat /run/big.err"));
    sh(runner, "sync; echo 3 > /proc/sys/vm/drop_caches");
    let wanted = sh(runner, &format!("{STREAM} | sha256sum"));
    assert_eq!(sh(runner, "sha256sum < /var/lib/big"), wanted, "what it wrote is not there");
    let console = fs::read_to_string(runner.dir().run().join("console.log")).unwrap();
    for words in ["I/O error", "EXT4-fs error"] {
        assert!(!console.contains(words), "{console}");
    }
    eventually("the status is clear again", Duration::from_secs(20), || {
        runner.status().unwrap().detail.is_empty()
    });
}
