//! `fork`: copies of a running machine on the same host.
//!
//! The command asks the machine's runner for an image, starts a runner for each copy, waits until all
//! run (or have failed), and hangs up, which ends the image. A copy that failed is removed again and
//! told by name; the others and the machine itself run on.

use super::{
    Format, StateArgs,
    output::bytes,
    spawned::{self, Spawned},
};
use crate::{
    driver::qemu,
    runner::{
        api::{Client, ForkReport, Request, Status},
        config::{CopyOf, Forked, Launch, NetworkConfig, RunnerConfig},
        state::{MachineDir, check_name},
    },
};
use anyhow::{Context, bail, ensure};
use clap::Args;
use serde::Serialize;
use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    process::Child,
    time::{Duration, Instant},
};

/// Most copies of one fork.
const MOST: u32 = 256;
/// How long the machine's runner may take for the image: it may wait for a backup, and disks are
/// copied.
const IMAGE_LIMIT: Duration = Duration::from_secs(600);
/// How long a copy may take until it runs.
const COPY_LIMIT: Duration = Duration::from_secs(120);
/// How often it is looked.
const LOOK: Duration = Duration::from_millis(5);

/// `drafter fork`.
#[derive(Args, Debug)]
pub struct ForkArgs {
    /// The machine's name
    name: String,
    /// How many copies
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST)))]
    copies: u32,
    /// Copies are called PREFIX-1, PREFIX-2, … [default: the machine's name]
    #[arg(long)]
    prefix: Option<String>,
    /// The first copy's address, the others have the ones after it; auto: the edge gives each one
    #[arg(long, value_name = "ADDRESS|auto")]
    address: Option<String>,
    /// The first copy's IPv6 address, the others have the ones after it
    #[arg(long, requires = "address")]
    address_v6: Option<Ipv6Addr>,
}

/// A copy and what became of it.
#[derive(Clone, Debug, Serialize)]
struct Copy {
    name: String,
    address: Option<Ipv4Addr>,
    /// The runner, if it runs.
    runner_pid: Option<u32>,
    monitor_pid: Option<u32>,
    /// From the start of the command until it ran, milliseconds.
    ran_ms: Option<f64>,
    /// Why it does not run.
    error: Option<String>,
}

#[derive(Serialize)]
struct Report {
    machine: String,
    pause_ms: f64,
    image_ms: f64,
    total_ms: f64,
    memory_bytes: u64,
    disk_bytes: u64,
    copies: Vec<Copy>,
}

/// Addresses of a copy.
type Addresses = (Option<Ipv4Addr>, Option<Ipv6Addr>);

/// A runner that was started.
struct Started {
    copy: Copy,
    dir: MachineDir,
    child: Option<Child>,
}

pub(super) fn fork(args: &ForkArgs, state: &StateArgs, format: Format) -> anyhow::Result<()> {
    let began = Instant::now();
    check_name(&args.name).map_err(anyhow::Error::msg)?;
    let prefix = args.prefix.as_deref().unwrap_or(&args.name);
    let names: Vec<String> = (1..=args.copies).map(|number| format!("{prefix}-{number}")).collect();
    for name in &names {
        check_name(name).map_err(anyhow::Error::msg)?;
        let dir = MachineDir::at(&state.state, name);
        ensure!(
            !dir.root().exists(),
            "this host has a machine \"{name}\" already: `drafter remove {name}`, or choose another \
             --prefix"
        );
    }
    let mut client = Client::connect(&MachineDir::at(&state.state, &args.name).socket())?;
    client.set_deadline(Some(IMAGE_LIMIT))?;
    // The machine is not paused for a fork that is refused.
    let config = inspect(&mut client)?;
    let addresses = addresses(args, &names, config.has_network, &config.network, config.id)?;
    let image: ForkReport = client.get(&Request::Fork)?;
    let image_ms = image.total_ms;

    let mut started = Vec::new();
    for (name, addresses) in names.iter().zip(addresses) {
        started.push(start(name, addresses, &image, state));
    }
    let deadline = Instant::now() + COPY_LIMIT;
    while started.iter().any(|one| one.child.is_some()) {
        let late = Instant::now() > deadline;
        for one in &mut started {
            one.look(began, late);
        }
        std::thread::sleep(LOOK);
    }
    // All have opened what they need.
    drop(client);
    let report = Report {
        machine: args.name.clone(),
        pause_ms: image.pause_ms,
        image_ms,
        total_ms: began.elapsed().as_secs_f64() * 1e3,
        memory_bytes: image.memory_bytes,
        disk_bytes: image.disk_bytes,
        copies: started.into_iter().map(|one| one.copy).collect(),
    };
    format.print(&report, || words(&report))?;
    let failed: Vec<&str> =
        report.copies.iter().filter(|c| c.error.is_some()).map(|c| c.name.as_str()).collect();
    if failed.is_empty() {
        return Ok(());
    }
    bail!("{} of {} copies do not run: {}", failed.len(), names.len(), failed.join(", "))
}

fn words(report: &Report) -> String {
    let mut text = format!(
        "\"{}\" was copied: it stood still for {:.1} ms, all after {:.0} ms; its copies share {} of \
         memory",
        report.machine,
        report.pause_ms,
        report.total_ms,
        bytes(report.memory_bytes)
    );
    for copy in &report.copies {
        text += &match (&copy.error, copy.ran_ms) {
            (Some(error), _) => format!("\n  {}: does not run: {error}", copy.name),
            (None, ran) => format!(
                "\n  {}{}: ran after {:.0} ms",
                copy.name,
                copy.address.map(|address| format!(" at {address}")).unwrap_or_default(),
                ran.unwrap_or_default()
            ),
        };
    }
    text
}

/// What addresses depend on.
struct Source {
    has_network: bool,
    network: NetworkConfig,
    id: conduit::NetworkId,
}

fn inspect(client: &mut Client) -> anyhow::Result<Source> {
    let value = client.call(&Request::Inspect, |_| {})?;
    let net: Option<conduit::MachineNet> =
        serde_json::from_value(value["machine"]["network"].clone()).context("its network")?;
    let config: RunnerConfig =
        serde_json::from_value(value["config"].clone()).context("its runner's settings")?;
    let id = net.as_ref().map_or_else(Default::default, |net| net.network);
    Ok(Source { has_network: net.is_some(), network: config.network, id })
}

fn addresses(
    args: &ForkArgs,
    names: &[String],
    has_network: bool,
    network: &NetworkConfig,
    id: conduit::NetworkId,
) -> anyhow::Result<Vec<Addresses>> {
    let given = match (has_network, args.address.as_deref()) {
        (false, None) => return Ok(vec![(None, None); names.len()]),
        (false, Some(_)) => bail!("\"{}\" has no network, and its copies have none", args.name),
        (true, None) => bail!(
            "each copy needs an address of its own: --address auto, or the address of the first"
        ),
        (true, Some(given)) => given,
    };
    if given == "auto" {
        let agent = network.agent().context("--address auto needs an edge; give an address")?;
        let agent = conduit::AgentDataPath::connect(agent)
            .with_context(|| format!("ask the network agent at {}", agent.display()))?;
        let ask = |name: &String| {
            let (address, v6) = agent.address(name, id)?;
            anyhow::Ok((Some(address), v6))
        };
        return names.iter().map(ask).collect();
    }
    let first: Ipv4Addr =
        given.parse().ok().context("--address is neither an IPv4 address nor auto")?;
    let each = |number: u32| {
        let v4 = u32::from(first).checked_add(number).context("there are not so many addresses")?;
        let v6 = args.address_v6.map(|first| {
            u128::from(first).checked_add(number.into()).context("there are not so many addresses")
        });
        anyhow::Ok((Some(v4.into()), v6.transpose()?.map(Ipv6Addr::from)))
    };
    (0..args.copies).map(each).collect()
}

/// Starts a copy's runner.
fn start(
    name: &str,
    (address, address_v6): Addresses,
    image: &ForkReport,
    state: &StateArgs,
) -> Started {
    let dir = MachineDir::at(&state.state, name);
    let copy = Copy {
        name: name.to_owned(),
        address,
        runner_pid: None,
        monitor_pid: None,
        ran_ms: None,
        error: None,
    };
    let mut started = Started { copy, dir, child: None };
    let config = RunnerConfig {
        machine: name.to_owned(),
        // The port is the machine's own; a copy that has left can be taken by `drafter receive`.
        listen: None,
        // A history and a lease's end are one machine's alone.
        protect: None,
        ..image.config.clone()
    };
    let from = Forked {
        identity: CopyOf { copy_of: image.machine.clone(), address, address_v6 },
        folder: image.folder.clone(),
        memory: image.memory.clone(),
        package: image.package.clone(),
        facts: image.facts.clone(),
    };
    let start = Spawned { config, launch: Launch::Forked(from) };
    match spawned::spawn(&start, &image.folder, state) {
        Ok(child) => started.child = Some(child),
        Err(error) => started.fail(format!("{error:#}")),
    }
    started
}

impl Started {
    /// Looks once what became of it.
    fn look(&mut self, began: Instant, late: bool) {
        let Some(child) = &mut self.child else { return };
        let pid = child.id();
        match child.try_wait() {
            Ok(None) => {}
            Ok(Some(status)) => return self.fail(format!("its runner ended ({status})")),
            Err(error) => return self.fail(error.to_string()),
        }
        let status = if self.runs(pid) { self.status() } else { None };
        if let Some(status) = status.filter(|s| s.runner_pid == pid && s.state == "running") {
            self.copy.ran_ms = Some(began.elapsed().as_secs_f64() * 1e3);
            self.copy.runner_pid = Some(pid);
            self.copy.monitor_pid = status.monitor_pid;
            self.child = None;
        } else if late {
            if let Some(child) = &mut self.child {
                let _ = child.kill().and_then(|()| child.wait().map(drop));
            }
            self.fail(format!("it did not run within {COPY_LIMIT:?}"));
        }
    }

    /// Whether its runner has written down that it runs. Asking it for its status all the time (a thread,
    /// a look at the lease) would take processors' time that the copies need to begin.
    fn runs(&self, pid: u32) -> bool {
        let record = self.dir.read_record().ok().flatten();
        record.is_some_and(|record| record.pid == pid && record.state == "running")
    }

    fn status(&self) -> Option<Status> {
        let mut client = Client::connect(&self.dir.socket()).ok()?;
        client.set_deadline(Some(Duration::from_secs(5))).ok()?;
        client.get(&Request::Status).ok()
    }

    /// It does not run: what was made for it goes, and what it said is told.
    fn fail(&mut self, why: String) {
        let last = spawned::last_words(&self.dir);
        let mut error = if last.is_empty() { why } else { format!("{why}: {last}") };
        self.child = None;
        let gone = qemu::stop_without_runner(&self.dir.run()).map(drop);
        if let Err(left) = gone.map_err(anyhow::Error::from).and_then(|()| {
            // What the network agent knows of it.
            if let Some(network) = self.dir.read_record()?.and_then(|record| record.network) {
                network.forget()?;
            }
            fs::remove_dir_all(self.dir.root()).map_err(Into::into)
        }) {
            error += &format!("; {left} (`drafter remove {}`)", self.copy.name);
        }
        self.copy.error = Some(error);
    }
}
