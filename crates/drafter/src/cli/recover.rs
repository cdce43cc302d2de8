//! `recover`, `supervise`: a runner that comes after one that died, and whoever sees to it.
//!
//! What there is to do is decided by what the state directory and the host show, never by flags that
//! somebody would have to remember:
//!
//! | its monitor | the last runner | so |
//! |---|---|---|
//! | lives | any | takes it over |
//! | is gone | waited for a machine (it may have moved away before) | waits again |
//! | is gone | was receiving one | waits again, if the lease says that it is another's |
//! | is gone | ended orderly | nothing is to be done |
//! | is gone | ran the machine | the machine is lost: boots it from its disks if `--boot-from-disks`, as after a power cut; else says so |

use super::{StateArgs, output::say};
use crate::{
    driver::qemu,
    runner::{
        self,
        config::{Launch, RunnerConfig},
        state::{MachineDir, RunnerRecord, check_name},
    },
};
use anyhow::{Context, bail};
use clap::Args;
use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Pauses between two starts of a runner that fails: the first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// How long a process that was killed may take to end.
const ENDS: Duration = Duration::from_secs(2);
/// A runner that lived so long did not fail at its start.
const LIVED: Duration = Duration::from_secs(10);

/// `drafter recover`, `drafter supervise`.
#[derive(Args, Debug)]
pub struct RecoverArgs {
    /// The machine's name
    name: String,
    /// If its monitor is gone: boot it from the disks that are here, as after a power cut. What was in
    /// its memory is lost
    #[arg(long)]
    boot_from_disks: bool,
}

/// What is to be done.
#[derive(Debug)]
enum Next {
    Start(Box<RunnerConfig>, Box<Launch>),
    Nothing(String),
}

fn next(
    name: &str,
    record: RunnerRecord,
    monitor: Option<u32>,
    arrived: bool,
    boot_from_disks: bool,
) -> anyhow::Result<Next> {
    let config =
        record.config.context("its last runner was of an older version and left no settings")?;
    let config = Box::new(config);
    if monitor.is_some() {
        return Ok(Next::Start(config, Box::new(Launch::Recover)));
    }
    // One that has found out nothing yet tells nothing.
    let state = record.left_as.as_deref().unwrap_or(&record.state);
    if state == "stopped" {
        let how = if record.detail.is_empty() { "it was stopped" } else { &record.detail };
        return Ok(Next::Nothing(format!("\"{name}\" does not run here: {how}")));
    }
    // Of one that waited nothing had come: a note is of an earlier stay (the machine has been put to sleep
    // since, say).
    let waited = state == "standby" || (state == "receiving" && !arrived);
    if waited && config.listen.is_some() {
        return Ok(Next::Start(config, Box::new(Launch::Receive)));
    }
    if state == "receiving" && arrived && config.listen.is_some() {
        // A monitor that waits for its state ends with its runner. Whether the machine had become this
        // host's, the lease says.
        return Ok(Next::Start(config, Box::new(Launch::Recover)));
    }
    let launch: Launch = serde_json::from_value(record.launch)
        .context("how its last runner was started cannot be read")?;
    match launch {
        Launch::Boot(mut boot) | Launch::TakeOver(mut boot) if boot_from_disks => {
            boot.keep_disks = true;
            Ok(Next::Start(config, Box::new(Launch::Boot(boot))))
        }
        _ => bail!(
            "the monitor of \"{name}\" is gone, and with it what was in its memory: `drafter restore` \
             brings it back from its last generation; `drafter run {name} --keep-disks` boots it from \
             its disks, as after a power cut (`recover --boot-from-disks` does so where it was booted)"
        ),
    }
}

fn look(args: &RecoverArgs, state: &StateArgs) -> anyhow::Result<Next> {
    check_name(&args.name).map_err(anyhow::Error::msg)?;
    let dir = MachineDir::at(&state.state, &args.name);
    let record = dir.read_record()?.with_context(|| {
        format!("no runner of \"{}\" has ever been started on this host", args.name)
    })?;
    // One that has just been killed needs a moment to let go of its files.
    let deadline = Instant::now() + ENDS;
    while record.is_ending() && Instant::now() < deadline {
        std::thread::sleep(PAUSES.0 / 10);
    }
    if record.alive() {
        bail!("it has a runner on this host already (process {})", record.pid);
    }
    let monitor = qemu::monitor_without_runner(&dir.run());
    let arrived = dir.root().join("machine.json").exists();
    next(&args.name, record, monitor, arrived, args.boot_from_disks)
}

pub(super) fn recover(args: &RecoverArgs, state: &StateArgs) -> anyhow::Result<()> {
    match look(args, state)? {
        Next::Nothing(why) => {
            say(&why);
            Ok(())
        }
        Next::Start(config, launch) => runner::serve(*config, *launch).map_err(Into::into),
    }
}

pub(super) fn supervise(args: &RecoverArgs, state: &StateArgs) -> anyhow::Result<()> {
    let mut pause = PAUSES.0;
    loop {
        let started = Instant::now();
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--state").arg(&state.state).args(["recover", &args.name]);
        if args.boot_from_disks {
            command.arg("--boot-from-disks");
        }
        let status = command.stdin(Stdio::null()).status().context("starting the runner")?;
        if status.success() {
            return Ok(());
        }
        tracing::warn!(machine = args.name, %status, "its runner ended; it is started again");
        if started.elapsed() > LIVED {
            pause = PAUSES.0;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSES.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::config::{AcceleratorChoice, Boot, NetworkConfig, SecurityConfig};

    fn record(state: &str, launch: &Launch) -> RunnerRecord {
        let config = RunnerConfig {
            machine: "m".into(),
            host: "h".into(),
            state: "/s".into(),
            listen: Some(([127, 0, 0, 1], 1).into()),
            security: SecurityConfig::Plaintext,
            accept_from: vec![],
            protect: None,
            lease: "/l".into(),
            network: NetworkConfig::None,
            accelerator: AcceleratorChoice::Auto,
            keep_stay_bytes: 0,
            track: true,
            packages: vec![],
            wait_ms: None,
            bring_from: None,
        };
        RunnerRecord {
            machine: "m".into(),
            host: "h".into(),
            pid: 1,
            started: 1,
            boot_id: String::new(),
            state: state.into(),
            detail: String::new(),
            left_as: None,
            launch: serde_json::to_value(launch).unwrap(),
            config: Some(config),
            network: None,
        }
    }

    fn what(state: &str, launch: &Launch, monitor: bool, arrived: bool, disks: bool) -> String {
        match next("m", record(state, launch), monitor.then_some(7), arrived, disks) {
            Ok(Next::Nothing(why)) => format!("nothing: {why}"),
            Ok(Next::Start(_, launch)) => match *launch {
                Launch::Recover => "recover".into(),
                Launch::Receive => "receive".into(),
                Launch::Boot(boot) => format!("boot, keep disks {}", boot.keep_disks),
                other => format!("{other:?}"),
            },
            Err(error) => format!("no: {error}"),
        }
    }

    #[test]
    fn hop_check_36_what_a_runner_left_decides_what_the_next_one_does() {
        let boot: Boot = serde_json::from_value(serde_json::json!({
            "package": "/p", "memory_bytes": null, "vcpus": null, "address": null,
            "mtu": 1380, "ports": [], "keep_disks": false,
        }))
        .unwrap();
        let boot = Launch::Boot(boot);
        for launch in [&boot, &Launch::Receive, &Launch::Recover] {
            assert_eq!(what("running", launch, true, true, false), "recover");
        }
        assert_eq!(what("standby", &Launch::Receive, false, false, false), "receive");
        assert_eq!(what("standby", &boot, false, false, false), "receive", "it had moved away");
        let stale = what("standby", &Launch::Receive, false, true, false);
        assert_eq!(stale, "receive", "the note is of a stay before a sleep");
        assert_eq!(what("receiving", &boot, false, true, false), "recover", "the lease tells");
        assert!(what("stopped", &boot, false, true, true).starts_with("nothing"));
        let mut again = record("booting", &Launch::Receive);
        again.left_as = Some("receiving".into());
        let next = next("m", again, None, true, false).unwrap();
        let Next::Start(_, launch) = next else { panic!("{next:?}") };
        assert!(matches!(*launch, Launch::Recover), "the runner in between had found out nothing");
        let lost = what("running", &boot, false, true, false);
        assert!(lost.contains("restore") && lost.contains("--keep-disks"), "{lost}");
        assert_eq!(what("running", &boot, false, true, true), "boot, keep disks true");
        let lost = what("running", &Launch::Receive, false, true, true);
        assert!(lost.starts_with("no:"), "an arrived machine has no settings to boot with: {lost}");
    }
}
