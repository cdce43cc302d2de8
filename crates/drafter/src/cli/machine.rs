//! Commands about one machine: status, inspect, console, exec, suspend, stop, remove, stays, certs.

use super::{
    Format, StateArgs,
    output::{bytes, put, say},
};
use crate::{
    driver::qemu,
    runner::{
        api::{Client, OutputStream, Reply, Request, Status},
        state::{MachineDir, RunnerRecord},
    },
};
use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use std::{
    collections::BTreeMap,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Duration,
};

/// How long a runner that has said that it ends is waited for.
pub(super) const LEAVES: Duration = Duration::from_secs(10);

/// A machine by name.
#[derive(Args, Debug)]
pub struct NameArgs {
    /// The machine's name
    name: String,
}

/// `drafter console`.
#[derive(Args, Debug)]
pub struct ConsoleArgs {
    /// The machine's name
    name: String,
    /// Go on printing until Ctrl-C
    #[arg(long, short)]
    follow: bool,
}

/// `drafter exec`.
#[derive(Args, Debug)]
pub struct ExecArgs {
    /// The machine's name
    name: String,
    /// Ends the command after this many seconds
    #[arg(long, default_value_t = 3600)]
    timeout_s: u64,
    /// NAME=VALUE for the command's environment
    #[arg(long, short)]
    env: Vec<String>,
    /// Program and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    argv: Vec<String>,
}

/// `drafter suspend`.
#[derive(Args, Debug)]
pub struct SuspendArgs {
    /// The machine's name
    name: String,
    /// An empty or absent directory, rather than a store
    #[arg(long, required_unless_present = "store")]
    to: Option<PathBuf>,
    #[command(flatten)]
    history: super::backup::SuspendHistory,
}

/// `drafter stop`.
#[derive(Args, Debug)]
pub struct StopArgs {
    /// The machine's name
    name: String,
    /// How long the guest may take to shut down, seconds; 0 ends it at once
    #[arg(long, default_value_t = 20)]
    grace_s: u64,
}

/// `drafter remove`.
#[derive(Args, Debug)]
pub struct RemoveArgs {
    /// The machine's name
    name: String,
    /// Also if its network agent does not answer: its address and its ports stay taken
    #[arg(long)]
    without_agent: bool,
}

/// `drafter stay`.
#[derive(Subcommand, Debug)]
pub enum StayCommand {
    /// Empty what is kept of an earlier stay of a machine
    Drop(NameArgs),
}

/// `drafter cert`.
#[derive(Subcommand, Debug)]
pub enum CertCommand {
    /// Make an authority and certificates for hosts, all in one go
    Create {
        /// Directory for ca.crt and NAME.crt, NAME.key
        #[arg(long)]
        dir: PathBuf,
        /// How long the certificates are valid, days
        #[arg(long, default_value_t = 90)]
        days: u64,
        /// The same in hours: short-lived ones, renewed by running this again and copying the files;
        /// what runs takes them up by itself
        #[arg(long, conflicts_with = "days")]
        hours: Option<u64>,
        /// Names of hosts
        #[arg(required = true)]
        hosts: Vec<String>,
    },
    /// Revoke every certificate that hosts have had so far; writes revoked.crl, which belongs on every
    /// host beside its ca.crt
    Revoke {
        /// The authority's directory
        #[arg(long)]
        dir: PathBuf,
        /// Names of hosts
        #[arg(required = true)]
        hosts: Vec<String>,
    },
}

fn dir(state: &StateArgs, name: &str) -> anyhow::Result<MachineDir> {
    crate::runner::state::check_name(name).map_err(anyhow::Error::msg)?;
    Ok(MachineDir::at(&state.state, name))
}

fn connect(state: &StateArgs, name: &str) -> anyhow::Result<Client> {
    Ok(Client::connect(&dir(state, name)?.socket())?)
}

pub(super) fn status(args: &NameArgs, state: &StateArgs, format: Format) -> anyhow::Result<()> {
    let mut client = connect(state, &args.name)?;
    client.set_deadline(Some(Duration::from_secs(10)))?;
    let status: Status = client.get(&Request::Status)?;
    format.print(&status, || {
        let mut text = format!("{} on {}: {}", status.machine, status.host, status.state);
        if !status.detail.is_empty() {
            text += &format!(" ({})", status.detail);
        }
        if let (Some(owner), Some(epoch)) = (&status.lease_owner, status.epoch) {
            text += &format!("\nlease: {owner}, epoch {epoch}");
        }
        for missing in &status.monitor_without {
            text += &format!("\nits monitor runs without {missing}");
        }
        for (device, left) in &status.missing {
            if *left > 0 {
                text += &format!("\nmissing: {} of {device}", bytes(left * 4096));
            }
        }
        if status.stay_bytes > 0 {
            text += &format!("\nkept of an earlier stay: {}", bytes(status.stay_bytes));
        }
        if let Some(backup) = &status.backup {
            text += &super::backup::state_line(backup);
        }
        if let Some(protection) = &status.protection {
            text += &super::protect::state_line(protection);
        }
        for report in &status.moves {
            text += &format!("\n{report}");
        }
        text
    })
}

pub(super) fn inspect(args: &NameArgs, state: &StateArgs) -> anyhow::Result<()> {
    let dir = dir(state, &args.name)?;
    let value = match Client::connect(&dir.socket()) {
        Ok(mut client) => {
            client.set_deadline(Some(Duration::from_secs(10)))?;
            client.call(&Request::Inspect, |_| {})?
        }
        Err(no_runner) => match dir.read_record()? {
            Some(record) => serde_json::to_value(record)?,
            None => return Err(no_runner.into()),
        },
    };
    say(&serde_json::to_string_pretty(&value)?);
    Ok(())
}

pub(super) fn console(args: &ConsoleArgs, state: &StateArgs) -> anyhow::Result<()> {
    let path = dir(state, &args.name)?.run().join("console.log");
    let mut file = std::fs::File::open(&path).with_context(|| {
        format!("no console log of \"{}\" on this host ({})", args.name, path.display())
    })?;
    let mut out = std::io::stdout().lock();
    let mut seen = 0;
    loop {
        let mut chunk = Vec::new();
        file.read_to_end(&mut chunk)?;
        seen += chunk.len() as u64;
        out.write_all(&chunk)?;
        out.flush()?;
        if !args.follow {
            return Ok(());
        }
        if file.metadata()?.len() < seen {
            seen = file.seek(SeekFrom::Start(0))?;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

pub(super) fn exec(args: ExecArgs, state: &StateArgs, format: Format) -> anyhow::Result<()> {
    let mut env = BTreeMap::new();
    for pair in args.env {
        let Some((name, value)) = pair.split_once('=') else {
            bail!("\"{pair}\" is not NAME=VALUE");
        };
        env.insert(name.to_owned(), value.to_owned());
    }
    let mut client = connect(state, &args.name)?;
    let request = Request::Exec { argv: args.argv, env, timeout_s: args.timeout_s };
    let (mut stdout, mut stderr) = (String::new(), String::new());
    let value = client.call(&request, |reply| {
        if let Reply::Output { stream, text } = reply {
            match (format, stream) {
                (Format::Human, OutputStream::Stdout) => put(text),
                (Format::Human, OutputStream::Stderr) => eprint!("{text}"),
                (Format::Json, OutputStream::Stdout) => stdout.push_str(text),
                (Format::Json, OutputStream::Stderr) => stderr.push_str(text),
            }
        }
    })?;
    let code = value.get("exit_code").and_then(serde_json::Value::as_i64);
    if format == Format::Json {
        let all = serde_json::json!({ "result": value, "stdout": stdout, "stderr": stderr });
        say(&serde_json::to_string_pretty(&all)?);
    }
    match code {
        Some(0) => Ok(()),
        Some(code) => std::process::exit(i32::try_from(code).unwrap_or(1)),
        None => bail!("the command did not end by itself: {value}"),
    }
}

/// Whoever gives the next command finds the port and the files of a runner free that has said that it ends.
fn leaves(runner: Option<&RunnerRecord>) {
    if let Some(runner) = runner.filter(|runner| !runner.ends_within(LEAVES)) {
        tracing::warn!("its runner (process {}) has not ended after {LEAVES:?}", runner.pid);
    }
}

pub(super) fn suspend(args: &SuspendArgs, state: &StateArgs, format: Format) -> anyhow::Result<()> {
    let dir = dir(state, &args.name)?;
    let runner = dir.read_record()?;
    let mut client = Client::connect(&dir.socket())?;
    let Some(to) = &args.to else {
        let report = super::backup::suspend(&args.history, &mut client, &args.name)?;
        leaves(runner.as_ref());
        return format.print(&report, || super::backup::suspended(&report));
    };
    let directory = std::path::absolute(to)?;
    let value = client.call(&Request::Suspend { directory }, |_| {})?;
    leaves(runner.as_ref());
    format.print(&value, || format!("\"{}\" is suspended in {}", args.name, to.display()))
}

pub(super) fn stop(args: &StopArgs, state: &StateArgs, format: Format) -> anyhow::Result<()> {
    let dir = dir(state, &args.name)?;
    let value = match Client::connect(&dir.socket()) {
        Ok(mut client) => {
            let runner = dir.read_record()?;
            client.set_deadline(Some(Duration::from_secs(args.grace_s + 60)))?;
            let value = client.call(&Request::Stop { grace_s: args.grace_s }, |_| {})?;
            leaves(runner.as_ref());
            value
        }
        Err(no_runner) => {
            // A monitor that lost its runner can be ended all the same.
            if !qemu::stop_without_runner(&dir.run())? {
                return Err(no_runner.into());
            }
            serde_json::json!("its monitor, which had no runner, was ended")
        }
    };
    format.print(&value, || format!("\"{}\" stopped: {}", args.name, value.as_str().unwrap_or("")))
}

pub(super) fn remove(args: &RemoveArgs, state: &StateArgs, format: Format) -> anyhow::Result<()> {
    let dir = dir(state, &args.name)?;
    if !dir.root().exists() {
        bail!("this host has nothing of a machine \"{}\"", args.name);
    }
    let record = dir.read_record()?;
    if record.as_ref().is_some_and(RunnerRecord::alive) {
        bail!("\"{}\" has a runner on this host: stop it first", args.name);
    }
    if qemu::monitor_without_runner(&dir.run()).is_some() {
        bail!("the monitor of \"{}\" still runs on this host: stop it first", args.name);
    }
    if let Some(network) = record.and_then(|record| record.network)
        && !args.without_agent
    {
        network.forget().with_context(|| {
            format!(
                "the network still has the address {} of \"{}\"; start its agent, or use \
                 --without-agent",
                network.net.address, args.name
            )
        })?;
    }
    std::fs::remove_dir_all(dir.root())
        .with_context(|| format!("removing {}", dir.root().display()))?;
    format.print(&serde_json::json!({ "removed": args.name }), || {
        format!("removed what this host kept of \"{}\"", args.name)
    })
}

pub(super) fn stay(command: &StayCommand, state: &StateArgs, format: Format) -> anyhow::Result<()> {
    let StayCommand::Drop(args) = command;
    let value = connect(state, &args.name)?.call(&Request::DropStay, |_| {})?;
    let freed = value.as_u64().unwrap_or(0);
    format.print(&value, || format!("{} are free again", bytes(freed)))
}

pub(super) fn cert(command: CertCommand, format: Format) -> anyhow::Result<()> {
    let (dir, lifetime, hosts) = match command {
        CertCommand::Create { dir, days, hours, hosts } => {
            let hours = hours.unwrap_or(days.saturating_mul(24));
            (dir, Duration::from_secs(hours.saturating_mul(3600)), hosts)
        }
        CertCommand::Revoke { dir, hosts } => return revoke(&dir, &hosts, format),
    };
    let authority = if dir.join("ca.key").exists() {
        identity::Authority::open(&dir)?
    } else {
        identity::Authority::create(&dir)?
    };
    for host in &hosts {
        authority.issue(&identity::HostName::new(host)?, lifetime)?;
    }
    format.print(&serde_json::json!({ "dir": dir, "hosts": hosts }), || {
        format!("certificates for {} in {}", hosts.join(", "), dir.display())
    })
}

fn revoke(dir: &Path, hosts: &[String], format: Format) -> anyhow::Result<()> {
    let authority = identity::Authority::open(dir)?;
    let mut revoked = 0;
    for host in hosts {
        revoked += authority.revoke(&identity::HostName::new(host)?)?;
    }
    let list = dir.join("revoked.crl");
    format.print(&serde_json::json!({ "list": list, "revoked": revoked }), || {
        let list = list.display();
        format!("{revoked} certificates of {} revoked: copy {list} to every host", hosts.join(", "))
    })
}
