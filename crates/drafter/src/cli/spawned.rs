//! Runners that a command starts, with settings that it has in memory.

use super::StateArgs;
use crate::runner::{
    self,
    config::{Launch, RunnerConfig},
    state::MachineDir,
};
use anyhow::Context;
use clap::Args;
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// `drafter spawned`.
#[derive(Args, Debug)]
pub struct SpawnedArgs {
    /// What the command wrote for it
    file: PathBuf,
}

/// What such a runner is started with.
#[derive(Serialize, Deserialize)]
pub(super) struct Spawned {
    pub(super) config: RunnerConfig,
    pub(super) launch: Launch,
}

/// The command of such a runner.
pub(super) fn serve(args: &SpawnedArgs) -> anyhow::Result<()> {
    let text = fs::read(&args.file).with_context(|| format!("reading {}", args.file.display()))?;
    let start: Spawned = serde_json::from_slice(&text).context("reading what this runner is")?;
    runner::serve(start.config, start.launch).map_err(Into::into)
}

/// Starts one, with its settings in a file of `folder`. It outlives whoever starts it.
pub(super) fn spawn(start: &Spawned, folder: &Path, state: &StateArgs) -> anyhow::Result<Child> {
    use std::os::unix::process::CommandExt;
    let dir = MachineDir::create(&start.config.state, &start.config.machine)?;
    let file = folder.join(format!("{}.json", start.config.machine));
    fs::write(&file, serde_json::to_vec(start)?)
        .with_context(|| format!("writing {}", file.display()))?;
    let log = File::options().create(true).append(true).open(log(&dir))?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--state").arg(&state.state).arg("spawned").arg(file);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // A process group of its own: Ctrl-C at the terminal is not for the machine.
    command.process_group(0).spawn().context("starting the runner")
}

/// Where it writes what happens.
pub(super) fn log(dir: &MachineDir) -> PathBuf {
    dir.root().join("runner.log")
}

/// The last line that it wrote.
pub(super) fn last_words(dir: &MachineDir) -> String {
    let said = fs::read_to_string(log(dir)).unwrap_or_default();
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    last.trim().to_owned()
}
