//! Who talks to whom: flows of both directions put together, with what they moved in an interval.
//! No I/O.

use conduit_bpf::{At, Flow, Role};
use std::{collections::BTreeMap, net::SocketAddr};

/// One direction of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Way {
    net: u32,
    protocol: u8,
    from: SocketAddr,
    to: SocketAddr,
}

/// What one direction moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moved {
    pub(super) packets: u64,
    pub(super) bytes: u64,
    pub(super) dropped: u64,
}

/// A machine and whom it talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Conversation {
    pub(super) net: u32,
    pub(super) protocol: u8,
    /// The machine's end.
    pub(super) machine: SocketAddr,
    /// The other's, which may be a machine too.
    pub(super) peer: SocketAddr,
    pub(super) to_machine: Moved,
    pub(super) from_machine: Moved,
}

/// Counters at one moment, by direction and place.
pub(super) type Reading = BTreeMap<(u32, u8, SocketAddr, SocketAddr, At), Moved>;

pub(super) fn reading(flows: &[Flow]) -> Reading {
    let each = flows.iter().map(|f| {
        let Flow { packets, bytes, dropped, .. } = *f;
        ((f.net, f.protocol, f.from, f.to, f.at), Moved { packets, bytes, dropped })
    });
    each.collect()
}

/// What moved between two readings at a host or an edge. A flow that was silent is not in it.
pub(super) fn conversations(before: &Reading, after: &Reading, role: Role) -> Vec<Conversation> {
    // Where frames come from machines, as seen from there.
    let out_of_machines = |at| match role {
        Role::Host => matches!(at, At::Tap | At::Stack),
        Role::Edge => at == At::Tunnel,
    };
    let mut ways = BTreeMap::<Way, (Moved, bool)>::new();
    for (&(net, protocol, from, to, at), now) in after {
        let then = before.get(&(net, protocol, from, to, at)).copied().unwrap_or_default();
        let moved = Moved {
            packets: now.packets.saturating_sub(then.packets),
            bytes: now.bytes.saturating_sub(then.bytes),
            dropped: now.dropped.saturating_sub(then.dropped),
        };
        if moved == Moved::default() {
            continue;
        }
        let (all, out) = ways.entry(Way { net, protocol, from, to }).or_default();
        // The same frames may have been seen in two places of a host, out of a machine and into the
        // next: they are counted once, and what ended in either place is added.
        all.packets = all.packets.max(moved.packets);
        all.bytes = all.bytes.max(moved.bytes);
        all.dropped += moved.dropped;
        *out |= out_of_machines(at);
    }
    let mut found = BTreeMap::<(u32, u8, SocketAddr, SocketAddr), Conversation>::new();
    for (Way { net, protocol, from, to }, (moved, out)) in ways {
        // Between two machines, the end that was there first is the machine's.
        let sender = out && !found.contains_key(&(net, protocol, to, from));
        let (machine, peer) = if sender { (from, to) } else { (to, from) };
        let (to_machine, from_machine) = (Moved::default(), Moved::default());
        let fresh = Conversation { net, protocol, machine, peer, to_machine, from_machine };
        let known = found.entry((net, protocol, machine, peer)).or_insert(fresh);
        if sender { known.from_machine = moved } else { known.to_machine = moved }
    }
    let mut found: Vec<Conversation> = found.into_values().collect();
    found.sort_by_key(|c| std::cmp::Reverse(c.to_machine.bytes + c.from_machine.bytes));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const NET: u32 = 6472;

    fn flow(from: &str, to: &str, at: At, bytes: u64) -> Flow {
        let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
        Flow { net: NET, from, to, protocol: 6, at, packets: bytes / 100, bytes, dropped: 0 }
    }

    fn moved(bytes: u64) -> Moved {
        Moved { packets: bytes / 100, bytes, dropped: 0 }
    }

    #[test]
    fn both_directions_are_one_conversation_and_the_interval_is_the_difference() {
        let (web, client) = ("10.77.0.5:80", "203.0.113.2:4040");
        let before = reading(&[flow(client, web, At::Tunnel, 1000)]);
        let after = reading(&[
            flow(client, web, At::Tunnel, 1500),
            flow(web, client, At::Tap, 9000),
            flow("10.77.0.6:80", client, At::Tap, 100),
        ]);
        let found = conversations(&before, &after, Role::Host);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].machine, web.parse().unwrap(), "the most of it first");
        assert_eq!(found[0].peer, client.parse().unwrap());
        assert_eq!((found[0].to_machine, found[0].from_machine), (moved(500), moved(9000)));
        assert_eq!(found[1].machine, "10.77.0.6:80".parse().unwrap());
    }

    #[test]
    fn what_is_silent_is_left_out() {
        let flows = reading(&[flow("10.77.0.5:80", "203.0.113.2:1", At::Tap, 700)]);
        assert!(conversations(&flows, &flows, Role::Host).is_empty());
    }

    #[test]
    fn frames_that_were_seen_twice_on_their_way_through_a_host_count_once() {
        let (a, b) = ("10.77.0.5:80", "10.77.0.6:5000");
        let mut seen = vec![flow(a, b, At::Tap, 400), flow(a, b, At::Tunnel, 400)];
        seen[1].dropped = 3;
        seen.extend([flow(b, a, At::Tap, 100), flow(b, a, At::Tunnel, 100)]);
        let found = conversations(&Reading::new(), &reading(&seen), Role::Host);
        assert_eq!(found.len(), 1, "two machines of one host have one conversation");
        assert_eq!(found[0].from_machine, Moved { dropped: 3, ..moved(400) });
        assert_eq!(found[0].to_machine, moved(100));
    }

    #[test]
    fn at_an_edge_what_comes_through_the_tunnel_is_from_a_machine() {
        let (web, client) = ("10.77.0.5:80", "203.0.113.2:4040");
        let after =
            reading(&[flow(client, web, At::Stack, 100), flow(web, client, At::Tunnel, 200)]);
        let found = conversations(&Reading::new(), &after, Role::Edge);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].machine, web.parse().unwrap());
        assert_eq!((found[0].to_machine, found[0].from_machine), (moved(100), moved(200)));
    }
}
