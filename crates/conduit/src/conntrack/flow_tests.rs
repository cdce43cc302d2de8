use super::*;
use crate::lab::Space;
use proptest::prelude::*;

const CLIENT: [u8; 4] = [198, 51, 100, 2];
const PUBLIC: [u8; 4] = [203, 0, 113, 1];
const MACHINE: [u8; 4] = [10, 77, 0, 5];

fn end(from: [u8; 4], sport: u16, to: [u8; 4], dport: u16, zone: u16) -> FlowTuple {
    FlowTuple { from: from.into(), to: to.into(), sport, dport, zone }
}

fn flow(protocol: u8, original: FlowTuple, reply: FlowTuple) -> Flow {
    let tcp = Tcp { state: 3, scale: [7, 8], flags: [3, 3] };
    Flow {
        protocol,
        original,
        reply,
        zone: 0,
        status: SEEN_REPLY | ASSURED | CONFIRMED,
        timeout: 300,
        mark: 0x6d00_1948,
        tcp: (protocol == TCP).then_some(tcp),
    }
}

/// A mapped port, a masqueraded flow whose port was changed, both hairpin, and echoes.
fn flows() -> Vec<Flow> {
    let mapped =
        |p| flow(p, end(CLIENT, 4040, PUBLIC, 80, 0), end(MACHINE, 8080, CLIENT, 4040, 6472));
    let masqueraded =
        |p| flow(p, end(MACHINE, 5050, CLIENT, 443, 6472), end(CLIENT, 443, PUBLIC, 1024, 0));
    let hairpin =
        flow(TCP, end(MACHINE, 6060, PUBLIC, 81, 6472), end([10, 77, 0, 6], 8081, PUBLIC, 6061, 0));
    let echo = flow(ICMP, end(MACHINE, 77, CLIENT, 8 << 8, 6472), end(CLIENT, 78, PUBLIC, 0, 0));
    let whole = flow(ICMP, end(CLIENT, 79, PUBLIC, 8 << 8, 0), end(MACHINE, 79, CLIENT, 0, 6472));
    let mut both = flow(17, end(MACHINE, 53, CLIENT, 99, 0), end(CLIENT, 99, PUBLIC, 53, 0));
    both.zone = 9;
    let v6 = |text: &str| text.parse::<IpAddr>().unwrap();
    let six = |p: u8, sport, dport, answer, seen| Flow {
        original: FlowTuple { from: v6("fd77::5"), to: v6("fd0a::2"), sport, dport, zone: 9 },
        reply: FlowTuple {
            from: v6("fd0a::2"),
            to: v6("fd03::1"),
            sport: answer,
            dport: seen,
            zone: 0,
        },
        ..flow(p, end(MACHINE, 0, CLIENT, 0, 0), end(CLIENT, 0, MACHINE, 0, 0))
    };
    vec![
        mapped(TCP),
        mapped(17),
        masqueraded(TCP),
        masqueraded(17),
        hairpin,
        echo,
        whole,
        both,
        six(TCP, 7, 80, 80, 1025),
        six(ICMP6, 7, 128 << 8, 8, 129 << 8),
    ]
}

#[test]
fn what_is_made_is_what_is_read() {
    Space::new().unwrap().run(|| {
        let wanted = flows();
        for flow in &wanted {
            assert_eq!(made(&[*flow]).unwrap(), Done { done: 1, failed: 0 }, "{flow:?}");
        }
        let addresses = [IpAddr::from(PUBLIC), MACHINE.into(), "fd03::1".parse().unwrap()];
        let mut found = taken(&[addresses[0], addresses[2], CLIENT.into()]).unwrap();
        for want in wanted {
            let have = found.remove(&want.id()).unwrap_or_else(|| panic!("{want:?} is not there"));
            assert_eq!((have.reply, have.mark), (want.reply, want.mark), "{want:?}");
            let (seen, timeout) = (have.status & (SEEN_REPLY | ASSURED), have.timeout);
            assert_eq!(seen, SEEN_REPLY | ASSURED);
            assert!((290..=300).contains(&timeout), "{timeout}");
            assert_eq!(have.tcp.map(|t| (t.state, t.scale)), want.tcp.map(|t| (t.state, t.scale)));
            assert!(have.tcp.is_none_or(|t| t.flags.iter().all(|f| f & LIBERAL != 0)));
            // What was read makes the same again.
            assert!(!have.differs(&Flow { status: have.status, ..want }), "{have:?}");
        }
        assert!(found.is_empty(), "{found:?}");
    });
}

#[test]
fn what_is_there_is_replaced_and_what_is_gone_is_removed_again() {
    Space::new().unwrap().run(|| {
        let old = flows();
        made(&old).unwrap();
        let newer: Vec<Flow> = old
            .iter()
            .map(|f| Flow { mark: 5, tcp: f.tcp.map(|t| Tcp { state: 4, ..t }), ..*f })
            .collect();
        assert_eq!(made(&newer).unwrap(), Done { done: newer.len(), failed: 0 });
        let everybody = [IpAddr::from(PUBLIC), CLIENT.into(), "fd03::1".parse().unwrap()];
        let found = taken(&everybody).unwrap();
        assert_eq!(found.len(), newer.len());
        assert!(found.values().all(|f| f.mark == 5 && f.tcp.is_none_or(|t| t.state == 4)));
        for _ in 0..2 {
            assert_eq!(ended(newer.iter()).unwrap(), Done { done: newer.len(), failed: 0 });
            assert!(taken(&everybody).unwrap().is_empty());
        }
    });
}

#[test]
fn only_translated_flows_of_an_address_are_of_it() {
    let public = [IpAddr::from(PUBLIC)];
    assert!(flows().iter().take(7).all(|f| f.is_of(&public)));
    let own = flow(TCP, end(CLIENT, 1, PUBLIC, 7450, 0), end(PUBLIC, 7450, CLIENT, 1, 0));
    assert!(!own.is_of(&public), "an agent's connection to the edge itself");
    assert!(!flows()[0].is_of(&[[203, 0, 113, 2].into()]));
}

#[test]
fn many_are_made_in_a_moment() {
    Space::new().unwrap().run(|| {
        let many: Vec<Flow> = (1..=20_000_u32)
            .map(|n| {
                let port = 1024 + (n % 60_000) as u16;
                flow(TCP, end(CLIENT, port, PUBLIC, 80, 0), end(MACHINE, 8080, CLIENT, port, 7))
            })
            .collect();
        let start = std::time::Instant::now();
        assert_eq!(made(&many).unwrap().failed, 0);
        let took = start.elapsed();
        eprintln!("20000 flows made in {took:?}");
        assert_eq!(taken(&[PUBLIC.into()]).unwrap().len(), many.len());
        assert!(took.as_secs() < 10, "{took:?}");
    });
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Flow::read(&bytes);
    }
}
