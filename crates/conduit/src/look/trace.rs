//! `conduit trace`: follows frames from program to program, and says what each decided. Lines of the
//! same frame, at host and edge, have the same number; `sort -k2` over both outputs joins them.

use super::{
    Interrupted, Where, find_status, json_line, names::Names, protocol_name, protocol_number,
};
use anyhow::{Result, bail};
use conduit_bpf::{Filter, Seen, View};
use serde::Serialize;
use std::{
    io::Write,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Settings of `conduit trace`.
#[derive(Debug, clap::Args)]
pub struct TraceArgs {
    /// Where to look.
    #[command(flatten)]
    pub at: Where,
    /// Frames to or from this address.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "machine")]
    pub address: Option<IpAddr>,
    /// Frames to or from this machine, by name (its IPv4 address).
    #[arg(long, value_name = "NAME", conflicts_with = "network")]
    pub machine: Option<String>,
    /// Frames to or from this port.
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// Frames of this protocol: tcp, udp, icmp, icmp6, or a number.
    #[arg(long, value_name = "PROTOCOL", value_parser = protocol_number)]
    pub protocol: Option<u8>,
    /// Only frames of this network of a tenant.
    #[arg(long, value_name = "ID")]
    pub network: Option<u32>,
    /// Only frames that end here.
    #[arg(long)]
    pub drops: bool,
    /// End after so many frames.
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    /// End after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<u64>,
}

/// One frame in one place.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Line {
    /// Seconds since 1970 by this host's clock.
    time: f64,
    /// The same for the same frame everywhere.
    frame: String,
    network: u32,
    protocol: String,
    from: SocketAddr,
    to: SocketAddr,
    #[serde(skip_serializing_if = "String::is_empty")]
    tcp_flags: String,
    length: u32,
    /// Pieces on the wire, of a large segment.
    segments: u16,
    /// The program that decided, and the interface where.
    program: &'static str,
    interface: String,
    /// What it decided, as `conduit status` counts it; and what that means.
    event: &'static str,
    meaning: &'static str,
    /// The frame ended here.
    dropped: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    entry: Option<EntryLine>,
}

/// The entry that it was decided by.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct EntryLine {
    state: &'static str,
    epoch: u64,
    owner: IpAddr,
}

/// The letters of `tcpdump`.
fn flags(bits: u8) -> String {
    let letters = [(1, 'F'), (2, 'S'), (4, 'R'), (8, 'P'), (16, '.'), (32, 'U')];
    letters.into_iter().filter_map(|(bit, letter)| (bits & bit != 0).then_some(letter)).collect()
}

/// `clock`: what this host's clock said when `CLOCK_MONOTONIC` was 0.
fn line(seen: &Seen, clock: Duration, interface: String, names: &Names) -> Line {
    Line {
        time: (clock + seen.at).as_secs_f64(),
        frame: format!("{:08x}", seen.hash),
        network: seen.net,
        protocol: protocol_name(seen.protocol),
        from: seen.from,
        to: seen.to,
        tcp_flags: if seen.protocol == 6 { flags(seen.tcp_flags) } else { String::new() },
        length: seen.len,
        segments: seen.segments,
        program: seen.place.program(),
        interface,
        event: seen.event.map_or("unknown", conduit_bpf::Event::name),
        meaning: seen.event.map_or("by a newer program", conduit_bpf::Event::about),
        dropped: seen.event.is_some_and(conduit_bpf::Event::is_drop),
        entry: seen.entry.map(|(state, epoch, owner)| EntryLine {
            state,
            epoch,
            owner: names.host(owner),
        }),
    }
}

/// The time of day, UTC, with microseconds.
fn clock_text(seconds: f64) -> String {
    let micros = (seconds * 1e6).round() as u64;
    let (second, micros) = (micros / 1_000_000 % 86_400, micros % 1_000_000);
    format!("{:02}:{:02}:{:02}.{micros:06}", second / 3600, second / 60 % 60, second % 60)
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { frame, protocol, from, to, length, program, interface, event, .. } = self;
        write!(f, "{} {frame} {protocol} {from} → {to}", clock_text(self.time))?;
        if !self.tcp_flags.is_empty() {
            write!(f, " [{}]", self.tcp_flags)?;
        }
        write!(f, " {length} bytes")?;
        if self.segments > 1 {
            write!(f, " in {}", self.segments)?;
        }
        write!(f, ", {program} at {interface}: ")?;
        if self.dropped {
            f.write_str("DROPPED, ")?;
        }
        write!(f, "{event} ({})", self.meaning)?;
        if let Some(entry) = &self.entry {
            write!(f, "; {} at epoch {}, owner {}", entry.state, entry.epoch, entry.owner)?;
        }
        Ok(())
    }
}

/// Runs the command.
pub(crate) fn run(args: &TraceArgs) -> Result<()> {
    let view = View::open(&args.at.pins)?;
    let status = find_status(args.at.socket.as_ref());
    let names = Names::of(status.as_ref().ok());
    let (net, address) = match &args.machine {
        Some(machine) => match (names.address(machine), status) {
            (Some((net, address)), _) => (Some(net), Some(address)),
            (None, Err(error)) => bail!("no name is known here: {error}; give --address"),
            (None, Ok(_)) => bail!("no machine \"{machine}\" is known here; see `conduit map`"),
        },
        None => (args.network, args.address),
    };
    let filter =
        Filter { address, net, port: args.port, protocol: args.protocol, drops: args.drops };
    let interrupted = Interrupted::watch()?;
    let mut trace = view.trace(filter)?;
    let clock = SystemTime::now().duration_since(UNIX_EPOCH)?.saturating_sub(trace.now());
    let deadline = args.seconds.map(|s| Instant::now() + Duration::from_secs(s));
    let mut out = std::io::stdout().lock();
    let mut told = 0;
    while args.count.is_none_or(|count| told < count)
        && deadline.is_none_or(|d| Instant::now() < d)
        && !interrupted.yet()
    {
        let wait = deadline.map_or(Duration::from_millis(500), |d| {
            d.saturating_duration_since(Instant::now()).min(Duration::from_millis(500))
        });
        let Some(seen) = trace.next(wait)? else { continue };
        told += 1;
        let interface = nix::net::if_::if_indextoname(seen.interface)
            .map_or_else(|_| format!("#{}", seen.interface), |n| n.to_string_lossy().into_owned());
        let line = line(&seen, clock, interface, &names);
        if args.at.json {
            json_line(&mut out, &line)?;
        } else {
            writeln!(out, "{line}")?;
            out.flush()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use conduit_bpf::{At, Event};

    fn seen() -> Seen {
        Seen {
            at: Duration::from_micros(2_000_001),
            place: At::Tunnel,
            interface: 3,
            event: Some(Event::ToTap),
            net: 6472,
            from: "203.0.113.2:4040".parse().unwrap(),
            to: "10.77.0.5:80".parse().unwrap(),
            protocol: 6,
            tcp_flags: 0x12,
            len: 2800,
            segments: 2,
            hash: 0xbeef,
            entry: Some(("local", 7, IpAddr::from([10, 88, 0, 2]))),
        }
    }

    #[test]
    fn a_line_says_which_frame_was_where_and_what_was_decided() {
        let clock = Duration::from_secs(86_400 + 3 * 3600 + 25 * 60);
        let text = line(&seen(), clock, "cd-tunnel".into(), &Names::default()).to_string();
        assert_eq!(
            text,
            "03:25:02.000001 0000beef tcp 203.0.113.2:4040 → 10.77.0.5:80 [S.] 2800 bytes in 2, \
             cd_decap at cd-tunnel: to_tap (put into a machine's tap); local at epoch 7, owner \
             10.88.0.2"
        );
    }

    #[test]
    fn a_frame_that_ended_says_so_and_why() {
        let dropped = Seen { event: Some(Event::SpoofedSource), entry: None, ..seen() };
        let line = line(&dropped, Duration::ZERO, "dr-1".into(), &Names::default());
        assert!(line.dropped);
        let text = line.to_string();
        assert!(text.contains("DROPPED, spoofed_source (a machine sent with another"), "{text}");
        let json = serde_json::to_value(&line).unwrap();
        assert_eq!(json["event"], "spoofed_source");
        assert_eq!(json["entry"], serde_json::Value::Null);
    }
}
