//! `conduit tunnel`: the encrypted tunnel in user space, of the crate `conduit-wg`, as a process of
//! its own. Agents and edges start it (`--encrypt`); people may, too.

use crate::{exec, netlink::interface_index};
use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use conduit_wg::{Ask, End, PeerConfig, Settings, Status, Tunnel};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a tunnel, until it is stopped.
    Run(RunArgs),
    /// Show its keys, its peers and what it counted.
    Status(StatusArgs),
    /// Set its peers: a JSON list of {name, keys, allowed, endpoint, keepalive}.
    Peers(PeersArgs),
    /// Make a new key pair. The old one serves each peer until it knows the new one.
    Rotate(ControlArgs),
    /// End it. Its interface stays for the next one, with addresses and routes.
    Stop(StopArgs),
}

/// Where a running tunnel is asked.
#[derive(Debug, Args)]
pub struct ControlArgs {
    /// Its control socket.
    #[arg(long, value_name = "PATH", default_value_os_t = default_control())]
    control: PathBuf,
}

/// Settings of `conduit tunnel run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Name of its interface.
    #[arg(long, default_value = "cd-wg")]
    interface: String,
    /// The interface's addresses.
    #[arg(long, value_name = "ADDRESS[/BITS]")]
    address: Vec<String>,
    /// Where it is reached by UDP; [::] takes IPv4 as well.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:7451")]
    listen: SocketAddr,
    /// Folder for its keys and peers; should outlive a reboot.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/conduit/tunnel")]
    state: PathBuf,
    /// Largest MTU of the interface; smaller where the path to a peer is narrow. 1420 fits a path
    /// of 1500 over IPv6, 1440 over IPv4.
    #[arg(long, default_value_t = 1420, value_parser = clap::value_parser!(u32).range(576..=65_000))]
    mtu: u32,
    /// How long a key pair is used, as in 12h or 7d; changed by `conduit tunnel rotate` only if not
    /// given.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    rotate_every: Option<Duration>,
    /// Take the place of the tunnel that runs, without a packet lost.
    #[arg(long)]
    upgrade: bool,
    /// At the end, remove the interface.
    #[arg(long)]
    remove_on_exit: bool,
    #[command(flatten)]
    at: ControlArgs,
}

/// What to show.
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    at: ControlArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Who the peers are.
#[derive(Debug, Args)]
pub struct PeersArgs {
    #[command(flatten)]
    at: ControlArgs,
    /// The list; - for standard input.
    file: PathBuf,
}

/// How to end.
#[derive(Debug, Args)]
pub struct StopArgs {
    #[command(flatten)]
    at: ControlArgs,
    /// Remove the interface as well.
    #[arg(long)]
    remove: bool,
}

fn default_control() -> PathBuf {
    Path::new(crate::cli::RUN_DIR).join("tunnel.sock")
}

/// Parses `90s`, `15m`, `12h`, `7d`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let parse = || {
        if let Some(number) = text.strip_suffix("ms") {
            return number.parse().ok().filter(|n| *n > 0).map(Duration::from_millis);
        }
        let at = text.len().checked_sub(1)?;
        let (number, unit) = text.split_at_checked(at)?;
        let unit = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => return None,
        };
        let number: u32 = number.parse().ok().filter(|n| *n > 0)?;
        Some(Duration::from_secs(u64::from(number) * unit))
    };
    parse().ok_or_else(|| "not a time like 90s, 15m, 12h or 7d".to_owned())
}

/// Runs a parsed command to its end.
pub(crate) fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(args) => serve(args),
        Command::Status(args) => {
            let status = conduit_wg::status(&args.at.control)?;
            let mut out = std::io::stdout().lock();
            if args.json {
                serde_json::to_writer_pretty(&mut out, &status)?;
                writeln!(out)?;
                return Ok(());
            }
            Ok(print(&status, &mut out)?)
        }
        Command::Peers(args) => {
            let mut text = String::new();
            if args.file == Path::new("-") {
                std::io::stdin().read_to_string(&mut text)?;
            } else {
                text = std::fs::read_to_string(&args.file)
                    .with_context(|| format!("read {}", args.file.display()))?;
            }
            let peers: Vec<PeerConfig> =
                serde_json::from_str(&text).context("the list of peers")?;
            Ok(conduit_wg::tell(&args.at.control, &Ask::Peers { peers })?)
        }
        Command::Rotate(at) => Ok(conduit_wg::tell(&at.control, &Ask::Rotate)?),
        Command::Stop(args) => {
            Ok(conduit_wg::tell(&args.at.control, &Ask::Stop { remove: args.remove })?)
        }
    }
}

fn serve(args: RunArgs) -> anyhow::Result<()> {
    let addresses = args.address.iter().map(|a| address(a)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    let settings = Settings {
        interface: args.interface,
        listen: args.listen,
        state: args.state,
        control: args.at.control,
        mtu: args.mtu,
        rotate_every: args.rotate_every,
    };
    let interface = settings.interface.clone();
    // Nothing on it is disturbed if it is so already.
    let mut script = format!("link set dev {interface} txqueuelen 1000 up\n");
    for address in addresses {
        script += &format!("address replace {address} dev {interface}\n");
    }
    let set_up = || exec::run("ip", &["-batch", "-"], &script);
    // An interface that is there is set up first: packets do not wait for it then.
    let there = interface_index(&interface).is_ok();
    if there {
        set_up()?;
    }
    let open = if args.upgrade { Tunnel::take_over } else { Tunnel::open };
    let tunnel = open(settings).context("the tunnel did not start")?;
    if !there {
        set_up()?;
    }
    let stopper = tunnel.stopper();
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            stopper.stop();
        }
    });
    tracing::info!(interface, "tunnel ready");
    match tunnel.run()? {
        End::Stopped if args.remove_on_exit => {
            exec::run("ip", &["link", "del", &interface], "")?;
        }
        End::Stopped | End::Removed | End::HandedOver => {}
    }
    Ok(())
}

/// An address with or without the size of its network.
fn address(text: &str) -> anyhow::Result<String> {
    let (ip, bits) = text.split_once('/').unwrap_or((text, ""));
    let ip: IpAddr = ip.parse().with_context(|| format!("\"{text}\" is no address"))?;
    let all = if ip.is_ipv4() { 32 } else { 128 };
    let bits: u8 = if bits.is_empty() { all } else { bits.parse()? };
    if bits > all {
        bail!("\"{text}\" is no address: it has at most {all} bits");
    }
    Ok(format!("{ip}/{bits}"))
}

fn print(status: &Status, out: &mut dyn Write) -> std::io::Result<()> {
    let Status { interface, mtu, listen, process, .. } = status;
    writeln!(out, "{interface} listens on UDP {listen}, MTU {mtu}, process {process}")?;
    for key in &status.keys {
        writeln!(out, "  key {key}")?;
    }
    for peer in &status.peers {
        let config = &peer.config;
        let at = peer.at.map_or("nowhere yet".to_owned(), |a| a.to_string());
        let session =
            peer.handshake.map_or("no session".to_owned(), |s| format!("session of {s} s"));
        writeln!(out, "  peer {} at {at}, {session}", config.name)?;
        let allowed: Vec<_> = config.allowed.iter().map(ToString::to_string).collect();
        writeln!(out, "    addresses {}", allowed.join(" "))?;
        for key in &config.keys {
            writeln!(out, "    key {key}{}", if Some(*key) == peer.key { " (used)" } else { "" })?;
        }
    }
    for (name, count) in status.counts.iter().filter(|(_, n)| **n > 0) {
        writeln!(out, "  {count:>12} {name}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_or_refused() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("7d"), Ok(Duration::from_secs(7 * 86_400)));
        for bad in ["", "s", "0h", "5", "-1h", "1µ", "99999999999d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_get_their_bits_or_are_refused() {
        assert_eq!(address("10.0.0.1").unwrap(), "10.0.0.1/32");
        assert_eq!(address("fd00::1/64").unwrap(), "fd00::1/64");
        for bad in ["", "10.0.0.1/33", "x", "10.0.0.1/y", "10.0.0.1/32\nlink del eth0"] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }
}
