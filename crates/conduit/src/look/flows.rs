//! `conduit flows`: who talks to whom, and how much, of the machines here. Frames are counted by flow
//! while it looks, and only then; at an edge connection tracking adds what a conversation is outside.

use super::{
    Interrupted, Where,
    conversation::{Conversation, Moved, conversations, reading},
    find_status, json_line,
    names::Names,
    protocol_name,
};
use crate::conntrack::{self, Connection};
use anyhow::{Context, Result};
use conduit_bpf::{Role, View};
use serde::Serialize;
use std::{
    collections::HashMap,
    io::Write,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

/// Settings of `conduit flows`.
#[derive(Debug, clap::Args)]
pub struct FlowsArgs {
    /// Where to look.
    #[command(flatten)]
    pub at: Where,
    /// For how many seconds frames are counted.
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,
    /// Go on, with a list for each interval, until interrupted.
    #[arg(long)]
    pub watch: bool,
    /// Show at most this many, those that move most.
    #[arg(long, value_name = "N", default_value_t = 40)]
    pub top: usize,
}

/// One conversation.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Line {
    #[serde(skip_serializing_if = "Option::is_none")]
    machine: Option<String>,
    network: u32,
    protocol: String,
    /// The machine's end.
    address: SocketAddr,
    /// The other end.
    peer: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_machine: Option<String>,
    /// What the machine's end is outside, where this edge translates it.
    #[serde(skip_serializing_if = "Option::is_none")]
    public: Option<SocketAddr>,
    /// The state of its connection, where that is tracked.
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<&'static str>,
    to_machine: Rate,
    from_machine: Rate,
}

/// What one direction moves; a second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Rate {
    bits: f64,
    packets: f64,
    /// Frames that ended here.
    dropped: f64,
}

impl Rate {
    fn of(moved: Moved, time: Duration) -> Self {
        let each = |count: u64| count as f64 / time.as_secs_f64().max(1e-9);
        Self {
            bits: each(moved.bytes) * 8.0,
            packets: each(moved.packets),
            dropped: each(moved.dropped),
        }
    }
}

/// Connections by protocol, the machine's end and the other's.
type Tracked = HashMap<(u8, SocketAddr, SocketAddr), (SocketAddr, Option<&'static str>)>;

/// What a machine's end is outside. A machine has the same end on one side of both tuples.
fn tracked(connections: &[Connection]) -> Tracked {
    let mut found = Tracked::new();
    for c in connections {
        // From outside: the answer comes from the machine.
        found.insert((c.protocol, c.reply.from, c.reply.to), (c.original.to, c.state));
        // From the machine: the answer goes to its public address.
        found.insert((c.protocol, c.original.from, c.original.to), (c.reply.to, c.state));
    }
    found
}

fn line(c: &Conversation, time: Duration, names: &Names, tracked: &Tracked) -> Line {
    let outside = tracked.get(&(c.protocol, c.machine, c.peer));
    let name = |end: SocketAddr| names.machine(c.net, end.ip()).map(str::to_owned);
    Line {
        machine: name(c.machine),
        network: c.net,
        protocol: protocol_name(c.protocol),
        address: c.machine,
        peer: c.peer,
        peer_machine: name(c.peer),
        public: outside.map(|o| o.0).filter(|&o| o != c.machine),
        state: outside.and_then(|o| o.1),
        to_machine: Rate::of(c.to_machine, time),
        from_machine: Rate::of(c.from_machine, time),
    }
}

/// Runs the command.
pub(crate) fn run(args: &FlowsArgs) -> Result<()> {
    let view = View::open(&args.at.pins)?;
    let role =
        view.config()?.context("nobody has said yet what this host is; is the agent up?")?.role;
    let names = Names::of(find_status(args.at.socket.as_ref()).ok().as_ref());
    let interrupted = Interrupted::watch()?;
    let flows = view.flows()?;
    let mut out = std::io::stdout().lock();
    let (mut before, mut since) = (reading(&flows.read()?), Instant::now());
    loop {
        let until = since + Duration::from_secs(args.seconds);
        while Instant::now() < until && !interrupted.yet() {
            let left = until.saturating_duration_since(Instant::now());
            thread::sleep(left.min(Duration::from_millis(200)));
            flows.renew()?;
        }
        let (after, time) = (reading(&flows.read()?), since.elapsed());
        since = Instant::now();
        // At a host there is no translation, and an edge may be without it too.
        let tracked = match role {
            Role::Edge => tracked(&conntrack::list().unwrap_or_default()),
            Role::Host => Tracked::new(),
        };
        let all = conversations(&before, &after, role);
        let lines = all.iter().take(args.top).map(|c| line(c, time, &names, &tracked));
        if args.at.json {
            for line in lines {
                json_line(&mut out, &line)?;
            }
        } else {
            print(&lines.collect::<Vec<_>>(), all.len(), &mut out)?;
        }
        if !args.watch || interrupted.yet() {
            return Ok(());
        }
        before = after;
    }
}

fn print(lines: &[Line], all: usize, out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(
        out,
        "{:<16} {:<5} {:<22} {:<22} {:>10} {:>10} {:>10} {:>10}  OUTSIDE",
        "MACHINE", "PROTO", "ADDRESS", "PEER", "IN", "OUT", "IN/s", "OUT/s"
    )?;
    for line in lines {
        let name = line.machine.as_deref().unwrap_or("-");
        let (proto, address) = (&line.protocol, line.address.to_string());
        let peer = line
            .peer_machine
            .clone()
            .map_or_else(|| line.peer.to_string(), |name| format!("{name}:{}", line.peer.port()));
        let (into, from) = (line.to_machine, line.from_machine);
        let outside = match (line.public, line.state) {
            (Some(public), Some(state)) => format!("{public} {state}"),
            (Some(public), None) => public.to_string(),
            (None, state) => state.unwrap_or_default().to_owned(),
        };
        let text = format!(
            "{name:<16} {proto:<5} {address:<22} {peer:<22} {:>10} {:>10} {:>10} {:>10}  {outside}",
            scaled(into.bits, "b/s"),
            scaled(from.bits, "b/s"),
            scaled(into.packets, ""),
            scaled(from.packets, ""),
        );
        writeln!(out, "{}", text.trim_end())?;
        let dropped = into.dropped + from.dropped;
        if dropped > 0.0 {
            writeln!(out, "{:<16} {} frames a second end here", "", scaled(dropped, ""))?;
        }
    }
    if all > lines.len() {
        writeln!(out, "and {} more (--top)", all - lines.len())?;
    }
    Ok(())
}

/// A figure with at most four digits and a prefix.
fn scaled(value: f64, unit: &str) -> String {
    let (value, prefix) = match value {
        v if v >= 999.5e6 => (v / 1e9, "G"),
        v if v >= 999.5e3 => (v / 1e6, "M"),
        v if v >= 999.5 => (v / 1e3, "k"),
        v => (v, ""),
    };
    let digits = usize::from(value < 99.95 && !prefix.is_empty());
    format!("{value:.digits$}{prefix}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::Tuple;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn connection(original: (&str, &str), reply: (&str, &str)) -> Connection {
        let tuple = |(from, to): (&str, &str)| Tuple { from: at(from), to: at(to) };
        Connection {
            protocol: 6,
            original: tuple(original),
            reply: tuple(reply),
            timeout: None,
            state: Some("established"),
        }
    }

    fn conversation(machine: &str, peer: &str) -> Conversation {
        Conversation {
            net: 1,
            protocol: 6,
            machine: at(machine),
            peer: at(peer),
            to_machine: Moved { packets: 10, bytes: 1000, dropped: 0 },
            from_machine: Moved { packets: 2000, bytes: 3_000_000, dropped: 2 },
        }
    }

    #[test]
    fn a_machines_end_is_found_outside_whoever_opened_the_connection() {
        let found = tracked(&[
            connection(
                ("203.0.113.2:4040", "203.0.113.1:80"),
                ("10.77.0.5:8080", "203.0.113.2:4040"),
            ),
            connection(
                ("10.77.0.5:5000", "198.51.100.7:443"),
                ("198.51.100.7:443", "203.0.113.1:61000"),
            ),
        ]);
        let time = Duration::from_secs(2);
        let inward = line(
            &conversation("10.77.0.5:8080", "203.0.113.2:4040"),
            time,
            &Names::default(),
            &found,
        );
        assert_eq!(
            (inward.public, inward.state),
            (Some(at("203.0.113.1:80")), Some("established"))
        );
        let outward = line(
            &conversation("10.77.0.5:5000", "198.51.100.7:443"),
            time,
            &Names::default(),
            &found,
        );
        assert_eq!(outward.public, Some(at("203.0.113.1:61000")));
        assert_eq!(outward.to_machine, Rate { bits: 4000.0, packets: 5.0, dropped: 0.0 });
        let mut text = Vec::new();
        print(&[inward], 3, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("12.0Mb/s") && text.contains("203.0.113.1:80 established"), "{text}");
        assert!(
            text.contains("1 frames a second end here") && text.contains("and 2 more"),
            "{text}"
        );
    }

    #[test]
    fn figures_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (999.4, "999"),
            (999.6, "1.0k"),
            (12_345.0, "12.3k"),
            (999_499.0, "999k"),
            (1.5e6, "1.5M"),
            (25e9, "25.0G"),
        ] {
            assert_eq!(scaled(value, ""), text);
        }
    }
}
