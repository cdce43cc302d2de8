//! What an agent or edge says about itself to Prometheus. The list of metrics is here and in
//! `docs/conduit-metrics.md`; a test compares them, and the dashboard with both.
//!
//! Figures come from counters that are kept anyway: the programs' in the kernel, the book's or the
//! ledger's, and those of [`Changes`], which cost two additions for each question that is answered.

use crate::{holder::Stats, plane::PathKind, wire::PairStatus};
use conduit_bpf::Event;
use scrape::{Readings, Timings};
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

scrape::metrics! { "conduit_"
    BUILD Gauge "build_info" ["version", "role", "path"] "1; what runs here";
    FRAMES Counter "frames" ["event", "end"]
        "Frames by what was decided about them; the end is passed or dropped";
    MACHINES Gauge "machines" ["place"]
        "Machines by where they are: here, candidate, away, gone; at an edge: known";
    HOSTS Gauge "hosts" [] "Other hosts that are known here";
    EDGE Gauge "edge_connected" [] "1: this agent has its edge, 0: it dials";
    AGENTS Gauge "agents_connected" [] "Agents that this edge hears";
    CHANGES Counter "changes" ["operation", "result"]
        "Changes that were asked for, by whether they were done or refused";
    CHANGE_SECONDS Histogram "change_seconds" ["operation"]
        "Time from a question that was read to its answer";
    BEHIND Gauge "state_files_behind" []
        "State files that are older than what the kernel remembers";
    MTU Gauge "tunnel_mtu_bytes" [] "Largest packet that the tunnel carries whole";
    MAP_MEMORY Gauge "map_memory_bytes" [] "Kernel memory that the machines' entries take";
    HOMES Gauge "homes" ["by"] "Homes by who serves them: here, elsewhere; where there are several edges";
    EDGES Gauge "edges" ["health"]
        "Other edges by how they are: alive, hung, silent; of an agent: connected, not";
    HOME_CHANGES Counter "home_changes" ["kind"]
        "Homes that were taken_over, given_up, drained, or whose drain was undone";
    DRAINED_FLOWS Counter "drained_flows" ["way"]
        "Connections that drains handed over: out, in, failed";
    CONNECTIONS Gauge "tracked_connections" [] "Connections that are tracked on this computer";
    CONNECTIONS_LIMIT Gauge "tracked_connections_limit" [] "As many as can be";
    RULE_DROPS Counter "rule_drops" ["rule"]
        "Packets that an edge's translation and policies dropped or answered with a reset, by rule";
    DISBELIEVED Counter "disbelieved_words" ["reason"]
        "Words on who has a machine that an edge did not believe, by reason";
    HELD Gauge "held" ["what"] "What waits in the holder: machines, frames, bytes";
    HELD_FRAMES Counter "held_frames" ["fate"]
        "Frames that the holder took out of the hold tap, gave back, or threw away, and why";
    HOLDERS Counter "holder_takeovers" [] "Times that a holder took over from another one";
    ENCRYPTED_PACKETS Counter "encrypted_packets" ["way"]
        "Packets that the tunnel in user space encrypted and decrypted: sent, received";
    ENCRYPTED_BYTES Counter "encrypted_bytes" ["way"]
        "Their bytes, before encryption; of the kernel's tunnel, after it";
    ENCRYPTED_DROPS Counter "encrypted_drops" ["reason"]
        "What the tunnel in user space dropped, by reason";
    ENCRYPTED_PEERS Gauge "encrypted_peers" ["session"]
        "Hosts and edges by whether the tunnel has a session with them: up, none";
    KEY_AGE Gauge "encrypted_key_age_seconds" []
        "For how long the oldest key that is in use has been so: of the key pairs of the tunnel in user space, of the preshared keys of the kernel's";
    PAIR_KEY_AGE Gauge "encrypted_pair_key_age_seconds" ["peer"]
        "For how long the preshared key with a host or edge has been in use, in the kernel's tunnel";
    PAIR_HANDSHAKE Gauge "encrypted_pair_handshake_age_seconds" ["peer"]
        "Time since the last handshake with a host or edge, in the kernel's tunnel";
    PAIR_KEYS Counter "encrypted_pair_key_changes" []
        "Preshared keys that this process has agreed on with others, in the kernel's tunnel";
}

/// Questions of one kind.
#[derive(Default)]
struct Kind {
    done: AtomicU64,
    refused: AtomicU64,
    times: Timings,
}

/// Counts the changes that were asked for, by operation.
pub(crate) struct Changes<const N: usize> {
    operations: [&'static str; N],
    kinds: [Kind; N],
}

impl<const N: usize> Changes<N> {
    pub(crate) fn of(operations: [&'static str; N]) -> Self {
        Self { operations, kinds: std::array::from_fn(|_| Kind::default()) }
    }

    /// One was answered. An operation that is not in the list is not counted.
    pub(crate) fn count(&self, operation: &str, done: bool, since: Instant) {
        let at = self.operations.iter().position(|&o| o == operation);
        if let Some(kind) = at.map(|at| &self.kinds[at]) {
            let count = if done { &kind.done } else { &kind.refused };
            count.fetch_add(1, Ordering::Relaxed);
            kind.times.record(since.elapsed());
        }
    }

    pub(crate) fn read(&self, readings: &mut Readings) {
        for (operation, kind) in self.operations.iter().zip(&self.kinds) {
            let done = kind.done.load(Ordering::Relaxed);
            readings.count(&CHANGES, &[operation, "done"], done);
            readings.count(&CHANGES, &[operation, "refused"], kind.refused.load(Ordering::Relaxed));
            readings.spread(&CHANGE_SECONDS, &[operation], kind.times.read());
        }
    }
}

/// What agent and edge have in common.
pub(crate) fn common(readings: &mut Readings, role: &str, path: PathKind) {
    let version = env!("CARGO_PKG_VERSION");
    readings.level(&BUILD, &[version, role, &path.to_string()], 1.0);
}

/// What the programs counted.
pub(crate) fn frames(readings: &mut Readings, counts: &[(Event, u64)]) {
    for (event, count) in counts {
        let end = if event.is_drop() { "dropped" } else { "passed" };
        readings.count(&FRAMES, &[event.name(), end], *count);
    }
}

/// What the holder did with frames.
pub(crate) fn held(readings: &mut Readings, stats: &Stats) {
    let Stats {
        machines,
        frames,
        bytes,
        taken,
        given,
        machine_full,
        network_full,
        total_full,
        expired,
        gone,
        lost,
        refused,
        stray,
        early_lost,
        handed_over,
    } = *stats;
    for (what, level) in [("machines", machines), ("frames", frames), ("bytes", bytes)] {
        readings.level(&HELD, &[what], level as f64);
    }
    for (fate, count) in [
        ("taken", taken),
        ("given", given),
        ("machine_full", machine_full),
        ("network_full", network_full),
        ("total_full", total_full),
        ("expired", expired),
        ("gone", gone),
        ("lost", lost),
        ("refused", refused),
        ("stray", stray),
        ("early_lost", early_lost),
    ] {
        readings.count(&HELD_FRAMES, &[fate], count);
    }
    readings.count(&HOLDERS, &[], handed_over);
}

/// How the tunnel in user space is.
pub(crate) fn encrypted(readings: &mut Readings, status: &conduit_wg::Status) {
    let count = |name: &str| status.counts.get(name).copied().unwrap_or(0);
    for way in ["sent", "received"] {
        readings.count(&ENCRYPTED_PACKETS, &[way], count(&format!("packets_{way}")));
        readings.count(&ENCRYPTED_BYTES, &[way], count(&format!("bytes_{way}")));
    }
    for (name, count) in &status.counts {
        if let Some(reason) = name.strip_prefix("dropped_") {
            readings.count(&ENCRYPTED_DROPS, &[reason], *count);
        }
    }
    let up = status.peers.iter().filter(|peer| peer.handshake.is_some()).count();
    readings.level(&ENCRYPTED_PEERS, &["up"], up as f64);
    readings.level(&ENCRYPTED_PEERS, &["none"], (status.peers.len() - up) as f64);
    readings.level(&KEY_AGE, &[], status.key_age as f64);
}

/// A session is over after this long without a handshake (WireGuard's reject-after-time), in seconds.
const SESSION: u64 = 180;

/// How the kernel's tunnel is: its pairs' keys and how often they changed, bytes received and sent.
pub(crate) fn encrypted_by_the_kernel(
    readings: &mut Readings,
    (pairs, changes): (&[PairStatus], u64),
    transfer: Option<[u64; 2]>,
) {
    if let Some([received, sent]) = transfer {
        readings.count(&ENCRYPTED_BYTES, &["sent"], sent);
        readings.count(&ENCRYPTED_BYTES, &["received"], received);
    }
    let up = pairs.iter().filter(|pair| pair.handshake.is_some_and(|age| age < SESSION)).count();
    readings.level(&ENCRYPTED_PEERS, &["up"], up as f64);
    readings.level(&ENCRYPTED_PEERS, &["none"], (pairs.len() - up) as f64);
    if let Some(oldest) = pairs.iter().filter_map(|pair| pair.age).max() {
        readings.level(&KEY_AGE, &[], oldest as f64);
    }
    for pair in pairs {
        let peer = pair.peer.to_string();
        if let Some(age) = pair.age {
            readings.level(&PAIR_KEY_AGE, &[&peer], age as f64);
        }
        if let Some(age) = pair.handshake {
            readings.level(&PAIR_HANDSHAKE, &[&peer], age as f64);
        }
    }
    readings.count(&PAIR_KEYS, &[], changes);
}

/// Connections that the kernel tracks; nothing where it does not.
pub(crate) fn connections(readings: &mut Readings) {
    let read = |name: &str| -> Option<f64> {
        crate::exec::read_sysctl(&format!("net/netfilter/nf_conntrack_{name}"))?.parse().ok()
    };
    if let Some((count, limit)) = read("count").zip(read("max")) {
        readings.level(&CONNECTIONS, &[], count);
        readings.level(&CONNECTIONS_LIMIT, &[], limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use scrape::Metrics;
    use std::{collections::BTreeSet, sync::Arc};

    /// Names and kinds in the table of the documentation.
    fn documented() -> Vec<(String, String)> {
        let text = include_str!("../../../docs/conduit-metrics.md");
        let rows = text.lines().filter_map(|line| line.strip_prefix("| `conduit_"));
        let rows = rows.map(|line| {
            let mut cells = line.split('|').map(str::trim);
            let name = cells.next().unwrap().trim_end_matches('`');
            let kind = cells.next().unwrap();
            let name = if kind == "counter" { name.strip_suffix("_total").unwrap() } else { name };
            (format!("conduit_{name}"), kind.to_owned())
        });
        rows.collect()
    }

    #[test]
    fn the_documentation_lists_what_there_is_in_its_order() {
        let listed =
            ALL.iter().map(|m| (m.name.to_owned(), format!("{:?}", m.kind).to_lowercase()));
        assert_eq!(documented(), listed.collect::<Vec<_>>());
    }

    #[test]
    fn the_dashboard_asks_for_nothing_else() {
        let text = include_str!("../../../deploy/grafana/conduit.json");
        let json: serde_json::Value = serde_json::from_str(text).unwrap();
        let exported: BTreeSet<String> = ALL
            .iter()
            .flat_map(|m| match m.kind {
                scrape::Kind::Counter => vec![format!("{}_total", m.name)],
                scrape::Kind::Gauge => vec![m.name.to_owned()],
                scrape::Kind::Histogram => {
                    ["bucket", "sum", "count"].map(|s| format!("{}_{s}", m.name)).to_vec()
                }
            })
            .collect();
        let mut asked = 0;
        for panel in json["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().into_iter().flatten() {
                let words = target["expr"].as_str().unwrap();
                let words = words.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                for word in words.filter(|word| word.starts_with("conduit_")) {
                    assert!(exported.contains(word), "{word} in \"{}\"", panel["title"]);
                    asked += 1;
                }
            }
        }
        assert!(asked >= 10, "it asks for {asked} figures");
    }

    #[test]
    fn changes_are_counted_by_operation_and_result() {
        struct Fixed(Changes<2>);
        impl scrape::Source for Fixed {
            fn read(&self, readings: &mut Readings) {
                common(readings, "agent", PathKind::Bpf);
                frames(readings, &[(Event::ToTap, 5), (Event::SpoofedMac, 2)]);
                held(
                    readings,
                    &Stats { frames: 3, taken: 9, given: 4, expired: 2, ..Stats::default() },
                );
                self.0.read(readings);
            }
        }
        let changes = Changes::of(["divert", "resume"]);
        changes.count("divert", true, Instant::now());
        changes.count("divert", false, Instant::now());
        changes.count("else", true, Instant::now());
        let metrics = Metrics::new(ALL);
        metrics.add(Arc::new(Fixed(changes)));
        let text = metrics.text().unwrap();
        for line in [
            "conduit_changes_total{operation=\"divert\",result=\"done\"} 1",
            "conduit_changes_total{operation=\"divert\",result=\"refused\"} 1",
            "conduit_changes_total{operation=\"resume\",result=\"done\"} 0",
            "conduit_change_seconds_count{operation=\"divert\"} 2",
            "conduit_frames_total{event=\"to_tap\",end=\"passed\"} 5",
            "conduit_held{what=\"frames\"} 3.0",
            "conduit_held_frames_total{fate=\"taken\"} 9",
            "conduit_held_frames_total{fate=\"expired\"} 2",
            "conduit_frames_total{event=\"spoofed_mac\",end=\"dropped\"} 2",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is missing in\n{text}");
        }
    }
}
