use super::*;

#[test]
fn every_host_has_an_address_in_the_tunnel_by_its_overlay_address() {
    assert_eq!(address(Ipv4Addr::new(100, 64, 0, 2)), Ipv4Addr::new(198, 18, 0, 2));
    assert_eq!(address(Ipv4Addr::new(100, 65, 3, 4)), Ipv4Addr::new(198, 19, 3, 4));
}

fn end(keys: &[PublicKey], since: u64) -> TunnelEnd {
    let endpoint = "192.0.2.1:7451".parse().unwrap();
    TunnelEnd { keys: keys.to_vec(), endpoint, since }
}

#[test]
fn of_what_several_edges_say_of_an_end_the_newest_word_counts_in_any_order() {
    let [old, new] = [0; 2].map(|_| PrivateKey::generate().unwrap().public());
    let at = Ipv4Addr::new(100, 64, 0, 2);
    let words = [(at, end(&[old], 5)), (at, end(&[new, old], 7))];
    let ends = newest(words.clone());
    assert_eq!(ends[&at].keys, [new, old]);
    assert_eq!(newest(words.into_iter().rev()), ends);
}

#[test]
fn who_claims_anothers_key_is_left_out_and_the_others_are_not() {
    let [own, other] = [0; 2].map(|_| PrivateKey::generate().unwrap().public());
    let at = |last| Ipv4Addr::new(100, 64, 0, last);
    let before = Ends::from([(at(3), end(&[own], 1))]);
    // The claim comes first by address, and still is none.
    let said = Ends::from([
        (at(2), end(&[own], 2)),
        (at(3), end(&[own], 1)),
        (at(4), end(&[other], 1)),
        (at(5), end(&[], 1)),
    ]);
    let sound = without_claims(said, &before);
    assert_eq!(sound.keys().copied().collect::<Vec<_>>(), [at(3), at(4)]);
}
