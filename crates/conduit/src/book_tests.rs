use super::*;
use crate::datapath::NetworkId;
use proptest::prelude::*;

const B: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 3);
const C: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 4);

fn net() -> MachineNet {
    MachineNet::new("redis", Ipv4Addr::new(10, 77, 0, 5), [2, 0, 0, 0, 0, 5], 1400)
}

fn here(epoch: u64) -> Book {
    let mut book = Book::default();
    book.prepare(&net(), Wait::Tap).unwrap();
    book.resume(&net(), epoch).unwrap();
    book.edge_answered(net().address, epoch, Ok(())).unwrap();
    book
}

#[test]
fn machines_of_two_tenants_with_the_same_address_are_two_machines() {
    let mut book = here(5);
    let other = MachineNet { network: NetworkId(7), machine: "other".into(), ..net() };
    book.prepare(&other, Wait::Tap).unwrap();
    book.resume(&other, 1).unwrap();
    assert_eq!((book.floor(net().key()), book.floor(other.key())), (5, 1));
    book.divert(&other, B, 2).unwrap();
    assert_eq!(book.get(net().key()).unwrap().place, Place::Here);
}

#[test]
fn an_ipv6_address_is_one_machines_in_its_network_and_stays_for_life() {
    let v6 = |machine: &str, last, network| MachineNet {
        machine: machine.into(),
        address: Ipv4Addr::new(10, 77, 0, last),
        address_v6: "fd77::1".parse().ok(),
        network: NetworkId(network),
        ..net()
    };
    let mut book = Book::default();
    book.prepare(&v6("one", 1, 7), Wait::Tap).unwrap();
    let error = book.prepare(&v6("two", 2, 7), Wait::Tap).unwrap_err().to_string();
    assert!(error.contains("\"one\" has its IPv6 address"), "{error}");
    book.prepare(&v6("three", 3, 9), Wait::Tap).unwrap();
    let without = MachineNet { address_v6: None, ..v6("one", 1, 7) };
    let error = book.resume(&without, 1).unwrap_err().to_string();
    assert!(error.contains("fixed when it is made"), "{error}");
}

#[test]
fn an_older_epoch_is_refused_and_changes_nothing() {
    let mut book = here(5);
    let error = book.divert(&net(), B, 4).unwrap_err();
    assert!(matches!(error, NetError::StaleEpoch { asked: 4, current: 5, .. }), "{error}");
    assert!(matches!(book.forget(&net(), 4), Err(NetError::StaleEpoch { .. })));
    assert_eq!(book.get(net().address).unwrap().place, Place::Here);
}

#[test]
fn the_same_call_with_the_same_epoch_again_changes_nothing() {
    let mut book = here(5);
    let first = book.divert(&net(), B, 6).unwrap().clone();
    assert_eq!(first.edge, EdgeView::Held);
    assert_eq!(book.drained(net().address, 6).unwrap().edge, EdgeView::Pending);
    assert!(book.drained(net().address, 6).is_none());
    book.edge_answered(net().address, 6, Ok(())).unwrap();
    let again = book.divert(&net(), B, 6).unwrap();
    assert_eq!(again.edge, EdgeView::Confirmed, "a repeated call does not ask the edge again");
}

#[test]
fn one_epoch_never_has_two_owners() {
    let mut book = here(5);
    book.divert(&net(), B, 6).unwrap();
    assert!(matches!(book.divert(&net(), C, 6), Err(NetError::EpochTaken { epoch: 6, .. })));
    assert!(matches!(book.resume(&net(), 6), Err(NetError::EpochTaken { epoch: 6, .. })));
    book.resume(&net(), 7).unwrap();
}

#[test]
fn a_machine_cannot_come_back_while_the_edge_still_sends_its_frames_here() {
    let mut book = here(5);
    book.divert(&net(), B, 6).unwrap();
    let error = book.prepare(&net(), Wait::Tap).unwrap_err().to_string();
    assert!(error.contains("100.64.0.3") && error.contains("edge"), "{error}");
    book.drained(net().address, 6).unwrap();
    book.edge_answered(net().address, 6, Ok(())).unwrap();
    assert_eq!(book.prepare(&net(), Wait::Tap).unwrap().place, Place::Candidate);
    assert!(
        matches!(book.resume(&net(), 6), Err(NetError::StaleEpoch { current: 7, .. })),
        "the epoch given away stays given away"
    );
    book.resume(&net(), 7).unwrap();
}

#[test]
fn a_forgotten_route_forwards_until_the_edge_has_confirmed() {
    let mut book = here(5);
    book.divert(&net(), B, 6).unwrap();
    assert_eq!(book.forget(&net(), 6).unwrap(), Forgotten::KeepForwarding);
    let record = book.edge_answered(net().address, 6, Ok(())).unwrap();
    assert!(record.retiring);
    assert!(book.get(net().address).is_none());
    assert_eq!(book.forget(&net(), 6).unwrap(), Forgotten::Nothing, "idempotent");
}

#[test]
fn an_epoch_stays_the_floor_after_forget() {
    let mut book = here(5);
    assert_eq!(book.forget(&net(), 5).unwrap(), Forgotten::RemoveAndRelease);
    assert!(book.resume(&net(), 6).is_err(), "its tap is gone");
    assert!(book.get(net().address).is_some(), "the edge is still to be told");
    book.edge_answered(net().address, 5, Ok(())).unwrap();
    assert!(book.get(net().address).is_none());
    book.prepare(&net(), Wait::Tap).unwrap();
    assert!(matches!(book.resume(&net(), 4), Err(NetError::StaleEpoch { current: 5, .. })));
    book.resume(&net(), 5).unwrap();
}

#[test]
fn nothing_is_done_for_a_machine_that_was_not_prepared() {
    let error = Book::default().resume(&net(), 1).unwrap_err().to_string();
    assert!(error.contains("prepare"), "{error}");
}

#[test]
fn another_machine_does_not_get_an_address_in_use() {
    let mut book = here(5);
    let mut other = net();
    other.machine = "postgres".into();
    let error = book.prepare(&other, Wait::Tap).unwrap_err().to_string();
    assert!(error.contains("redis"), "{error}");
}

#[test]
fn a_late_answer_of_the_edge_for_an_older_epoch_is_ignored() {
    let mut book = here(5);
    book.divert(&net(), B, 6).unwrap();
    assert!(book.drained(net().address, 5).is_none());
    book.drained(net().address, 6).unwrap();
    assert!(book.edge_answered(net().address, 5, Ok(())).is_none());
    assert_eq!(book.get(net().address).unwrap().edge, EdgeView::Pending);
}

#[test]
fn an_edge_that_forgot_is_told_again_what_runs_here() {
    let mut book = here(5);
    book.edge_reconnected();
    assert_eq!(book.get(net().address).unwrap().edge, EdgeView::Pending);
}

#[test]
fn a_refusal_by_the_edge_is_kept_for_whoever_waits() {
    let mut book = here(5);
    book.resume(&net(), 6).unwrap();
    let error = NetError::StaleEpoch { machine: "redis".into(), asked: 6, current: 9 };
    book.edge_answered(net().address, 6, Err(error.clone())).unwrap();
    assert_eq!(book.get(net().address).unwrap().edge, EdgeView::Refused { error });
}

#[test]
fn the_state_file_is_fixed() {
    let mut book = here(5);
    let record = book.divert(&net(), B, 6).unwrap();
    let text = serde_json::to_string(record).unwrap();
    assert_eq!(
        text,
        r#"{"version":2,"net":{"machine":"redis","address":"10.77.0.5","mac":[2,0,0,0,0,5],"mtu":1400,"ports":[]},"at":"away","to":"100.64.0.3","epoch":6,"edge":"held","retiring":false}"#
    );
    assert_eq!(&serde_json::from_str::<Record>(&text).unwrap(), record);
}

#[derive(Clone, Debug)]
enum Op {
    Prepare,
    Divert(u8, u64),
    Resume(u64),
    Forget(u64),
    Drained(u64),
    Answer(u64, bool),
    Reconnect,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        Just(Op::Prepare),
        (0..2_u8, 0..8_u64).prop_map(|(h, e)| Op::Divert(h, e)),
        (0..8_u64).prop_map(Op::Resume),
        (0..8_u64).prop_map(Op::Forget),
        (0..8_u64).prop_map(Op::Drained),
        (0..8_u64, any::<bool>()).prop_map(|(e, ok)| Op::Answer(e, ok)),
        Just(Op::Reconnect),
    ]
}

proptest! {
    /// Whatever happens in whatever order: the accepted epoch never goes back, and an epoch that
    /// was given to one place is never accepted for another.
    #[test]
    fn epochs_never_go_back_and_never_have_two_owners(ops in proptest::collection::vec(op(), 0..60)) {
        let mut book = Book::default();
        let net = net();
        let mut owners = BTreeMap::<u64, Place>::new();
        let mut floor = 0;
        for op in ops {
            let taken = match op {
                Op::Prepare => { let _ = book.prepare(&net, Wait::Tap); None }
                Op::Divert(host, epoch) => {
                    let to = if host == 0 { B } else { C };
                    book.divert(&net, to, epoch).ok().map(|_| (epoch, Place::Away { to }))
                }
                Op::Resume(epoch) => book.resume(&net, epoch).ok().map(|_| (epoch, Place::Here)),
                Op::Forget(epoch) => { let _ = book.forget(&net, epoch); None }
                Op::Drained(epoch) => { let _ = book.drained(net.address, epoch); None }
                Op::Answer(epoch, ok) => {
                    let answer = if ok { Ok(()) } else { Err(NetError::failed(&net, "x", "y")) };
                    let _ = book.edge_answered(net.address, epoch, answer);
                    None
                }
                Op::Reconnect => { book.edge_reconnected(); None }
            };
            if let Some((epoch, place)) = taken {
                prop_assert!(epoch >= floor);
                let owner = owners.entry(epoch).or_insert(place);
                // What ran here and was forgotten may be given away in the epoch that it had.
                prop_assert!(*owner == place || *owner == Place::Here, "{epoch}: {owner:?} then {place:?}");
                *owner = place;
            }
            prop_assert!(book.floor(net.address) >= floor);
            floor = book.floor(net.address);
        }
    }
}
