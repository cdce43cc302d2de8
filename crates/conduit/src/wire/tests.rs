use super::*;
use crate::datapath::{PortMapping, Protocol};
use proptest::prelude::*;

fn net() -> MachineNet {
    MachineNet {
        ports: vec![PortMapping { protocol: Protocol::Tcp, public: 6379, machine: 6379 }],
        ..MachineNet::new("redis", Ipv4Addr::new(10, 77, 0, 5), [2, 0, 0, 0, 0, 5], 1400)
    }
}

fn golden<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(message: &T, text: &str) {
    let mut bytes = Vec::new();
    send(&mut bytes, message).unwrap();
    assert_eq!(String::from_utf8(bytes).unwrap(), format!("{text}\n"));
    let mut from = format!("{text}\n").into_bytes();
    from.extend_from_slice(b"{\"next\":1}\n");
    assert_eq!(&receive::<T>(&mut from.as_slice()).unwrap().unwrap(), message);
}

const NET: &str = r#"{"machine":"redis","address":"10.77.0.5","mac":[2,0,0,0,0,5],"mtu":1400,"ports":[{"protocol":"tcp","public":6379,"machine":6379}]}"#;

#[test]
fn the_bytes_between_agent_and_edge_are_fixed() {
    let peer =
        Peer { overlay: Ipv4Addr::new(100, 64, 0, 2), underlay: Ipv4Addr::new(10, 88, 0, 2) };
    golden(
        &HostSays::Hello { version: 5, host: "a".into(), peer, path: PathKind::Bpf },
        r#"{"say":"hello","version":5,"host":"a","overlay":"100.64.0.2","underlay":"10.88.0.2","path":"bpf"}"#,
    );
    golden(
        &HostSays::Candidate { id: 6, net: net(), host: peer.overlay, long: false },
        &format!(r#"{{"say":"candidate","id":6,"net":{NET},"host":"100.64.0.2"}}"#),
    );
    golden(
        &HostSays::Claim { id: 7, net: net(), owner: peer.overlay, epoch: 3, home: None },
        &format!(r#"{{"say":"claim","id":7,"net":{NET},"owner":"100.64.0.2","epoch":3}}"#),
    );
    golden(
        &HostSays::Release { id: 8, net: net(), epoch: 4 },
        &format!(r#"{{"say":"release","id":8,"net":{NET},"epoch":4}}"#),
    );
    golden(
        &HostSays::Address { id: 10, machine: "redis".into(), network: NetworkId(7) },
        r#"{"say":"address","id":10,"machine":"redis","network":7}"#,
    );
    golden(
        &HostSays::Resolve { id: 11, network: NetworkId(7), question: "AP8=".into(), stream: true },
        r#"{"say":"resolve","id":11,"network":7,"question":"AP8=","stream":true}"#,
    );
    let (address, address_v6) = (Ipv4Addr::new(10, 77, 0, 5), "fd77::5".parse().ok());
    golden(
        &EdgeSays::Given { id: 10, address, address_v6 },
        r#"{"say":"given","id":10,"address":"10.77.0.5","address_v6":"fd77::5"}"#,
    );
    golden(
        &EdgeSays::Resolved { id: 11, answer: "AP8=".into() },
        r#"{"say":"resolved","id":11,"answer":"AP8="}"#,
    );
    let key = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
    let proof = serde_json::from_str(&format!("\"{key}\"")).unwrap();
    golden(
        &HostSays::Note {
            to: peer.overlay,
            note: Note::Offer { generation: 7, key: key.parse().unwrap() },
        },
        &format!(
            r#"{{"say":"note","to":"100.64.0.2","note":{{"note":"offer","generation":7,"key":"{key}"}}}}"#
        ),
    );
    golden(
        &EdgeSays::Note {
            from: peer.overlay,
            note: Note::At { generation: 7, proof: Some(proof), to: None },
        },
        &format!(
            r#"{{"say":"note","from":"100.64.0.2","note":{{"note":"at","generation":7,"proof":"{key}"}}}}"#
        ),
    );
    golden(&HostSays::Ping { id: 9 }, r#"{"say":"ping","id":9}"#);
    golden(
        &EdgeSays::Welcome {
            version: 5,
            edge: peer,
            peers: vec![peer],
            domain: None,
            homes: vec![],
        },
        r#"{"say":"welcome","version":5,"edge":{"overlay":"100.64.0.2","underlay":"10.88.0.2"},"peers":[{"overlay":"100.64.0.2","underlay":"10.88.0.2"}]}"#,
    );
    golden(&EdgeSays::Peers { peers: vec![] }, r#"{"say":"peers","peers":[]}"#);
    golden(&EdgeSays::Done { id: 7 }, r#"{"say":"done","id":7}"#);
    golden(
        &EdgeSays::Refused {
            id: 7,
            error: NetError::StaleEpoch { machine: "redis".into(), asked: 3, current: 4 },
        },
        r#"{"say":"refused","id":7,"error":{"kind":"stale-epoch","machine":"redis","asked":3,"current":4}}"#,
    );
}

#[test]
fn the_bytes_between_runner_and_agent_are_fixed() {
    let to = Ipv4Addr::new(100, 64, 0, 3);
    golden(&Ask::Endpoint, r#"{"ask":"endpoint"}"#);
    golden(
        &Ask::Prepare { net: net(), blackout_ms: None },
        &format!(r#"{{"ask":"prepare","net":{NET}}}"#),
    );
    golden(
        &Ask::Prepare { net: net(), blackout_ms: Some(300) },
        &format!(r#"{{"ask":"prepare","net":{NET},"blackout_ms":300}}"#),
    );
    golden(
        &Ask::Divert { net: net(), to, epoch: 5 },
        &format!(r#"{{"ask":"divert","net":{NET},"to":"100.64.0.3","epoch":5}}"#),
    );
    golden(
        &Ask::Drained { net: net(), epoch: 5 },
        &format!(r#"{{"ask":"drained","net":{NET},"epoch":5}}"#),
    );
    golden(
        &Ask::Resume { net: net(), epoch: 5 },
        &format!(r#"{{"ask":"resume","net":{NET},"epoch":5}}"#),
    );
    golden(
        &Ask::Settled { net: net(), epoch: 5, limit_ms: 250 },
        &format!(r#"{{"ask":"settled","net":{NET},"epoch":5,"limit_ms":250}}"#),
    );
    golden(
        &Ask::Forget { net: net(), epoch: 5 },
        &format!(r#"{{"ask":"forget","net":{NET},"epoch":5}}"#),
    );
    golden(&Answer::Done, r#""done""#);
    golden(&Answer::Tap("dr-0a4d0005".into()), r#"{"tap":"dr-0a4d0005"}"#);
    golden(&Answer::Endpoint(to), r#"{"endpoint":"100.64.0.3"}"#);
}

#[test]
fn a_line_over_the_limit_or_cut_short_is_an_error_and_never_a_message() {
    let long = vec![b' '; LINE_LIMIT + 10];
    let error = receive::<EdgeSays>(&mut long.as_slice()).unwrap_err();
    assert!(error.to_string().contains("too long"), "{error}");
    let error = receive::<EdgeSays>(&mut br#"{"say":"done","id":7}"#.as_slice()).unwrap_err();
    assert!(error.to_string().contains("cut short"), "{error}");
    assert!(receive::<EdgeSays>(&mut b"".as_slice()).unwrap().is_none());
}

#[test]
fn impossible_machines_are_refused_with_a_reason() {
    check_machine(&net()).unwrap();
    let bad = |change: fn(&mut MachineNet), word: &str| {
        let mut net = net();
        change(&mut net);
        let error = check_machine(&net).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    bad(|n| n.machine = String::new(), "name");
    bad(|n| n.machine = "a\nb".into(), "name");
    bad(|n| n.address = Ipv4Addr::new(127, 0, 0, 1), "127.0.0.1");
    bad(|n| n.address = Ipv4Addr::new(169, 254, 1, 1), "gateway");
    bad(|n| n.mac[0] = 1, "MAC");
    bad(|n| n.mac = crate::tap::GATEWAY_MAC, "MAC");
    bad(|n| n.mtu = 100, "MTU");
    bad(|n| n.ports[0].public = 0, "port 0");
    bad(|n| n.ports.push(n.ports[0]), "twice");
}

proptest! {
    #[test]
    fn no_bytes_from_outside_make_the_codec_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = receive::<HostSays>(&mut bytes.as_slice());
        let _ = receive::<EdgeSays>(&mut bytes.as_slice());
        let _ = receive::<Ask>(&mut bytes.as_slice());
    }
}
