//! `list`: the machines of this host, and monitors that lost their runner.

use super::{Format, StateArgs};
use crate::runner::{
    api::{Client, Request, Status},
    state::{self, MachineDir},
};
use serde::Serialize;
use std::time::Duration;

#[derive(Serialize)]
struct Row {
    machine: String,
    state: String,
    runner_pid: Option<u32>,
    monitor_pid: Option<u32>,
    lease_owner: Option<String>,
    epoch: Option<u64>,
    detail: String,
}

pub(super) fn list(args: &StateArgs, format: Format) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for name in state::machines(&args.state)? {
        rows.push(row(args, &name)?);
    }
    format.print(&rows, || {
        if rows.is_empty() {
            return format!("no machines in {}", args.state.display());
        }
        let mut table = comfy_table::Table::new();
        table.load_preset(comfy_table::presets::NOTHING);
        table.set_header(["MACHINE", "STATE", "RUNNER", "MONITOR", "OWNER", "EPOCH", "DETAIL"]);
        let text = |pid: Option<u32>| pid.map_or("-".into(), |p| p.to_string());
        for row in &rows {
            table.add_row([
                row.machine.clone(),
                row.state.clone(),
                text(row.runner_pid),
                text(row.monitor_pid),
                row.lease_owner.clone().unwrap_or_else(|| "-".into()),
                row.epoch.map_or("-".into(), |e| e.to_string()),
                row.detail.clone(),
            ]);
        }
        table.to_string()
    })
}

fn row(args: &StateArgs, name: &str) -> anyhow::Result<Row> {
    let dir = MachineDir::at(&args.state, name);
    let ask = || -> Result<Status, crate::runner::api::ClientError> {
        let mut client = Client::connect(&dir.socket())?;
        client.set_deadline(Some(Duration::from_secs(3)))?;
        client.get(&Request::Status)
    };
    if let Ok(status) = ask() {
        return Ok(Row {
            machine: name.to_owned(),
            state: status.state,
            runner_pid: Some(status.runner_pid),
            monitor_pid: status.monitor_pid,
            lease_owner: status.lease_owner,
            epoch: status.epoch,
            detail: status.detail,
        });
    }
    let monitor = crate::driver::qemu::monitor_without_runner(&dir.run());
    let record = dir.read_record()?;
    let alive = record.as_ref().is_some_and(state::RunnerRecord::alive);
    let (state, detail) = match (monitor, alive) {
        (_, true) => ("unknown".into(), "its runner lives but does not answer".into()),
        (Some(_), false) => (
            "orphaned".into(),
            format!(
                "its monitor runs without a runner: `drafter run {name} --take-over` or `drafter stop {name}`"
            ),
        ),
        (None, false) => (
            record.as_ref().map_or("stopped".into(), |r| match r.state.as_str() {
                "stopped" | "suspended" | "failed" | "moved" => r.state.clone(),
                _ => "crashed".into(),
            }),
            record.map(|r| r.detail).unwrap_or_default(),
        ),
    };
    Ok(Row {
        machine: name.to_owned(),
        state,
        runner_pid: None,
        monitor_pid: monitor,
        lease_owner: None,
        epoch: None,
        detail,
    })
}
