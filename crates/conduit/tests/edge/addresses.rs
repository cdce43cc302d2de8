//! Addresses that the edge gives to machines which come without.

use crate::rig::{LIMIT, Rig, epoch, translated};
use conduit::{DataPath, MachineNet, NetworkId, edge::EdgeOptions, lab::wait_for, mac_of};
use std::{collections::BTreeMap, net::Ipv4Addr, thread, time::Duration};

const TENANT: NetworkId = NetworkId(7);

/// A machine with what it was given.
fn machine(rig: &Rig, at: usize, name: &str) -> MachineNet {
    let (address, address_v6) = rig.hosts[at].path.address(name, TENANT).unwrap();
    MachineNet {
        network: TENANT,
        address_v6,
        ..MachineNet::new(name, address, mac_of(address), 1380)
    }
}

#[test]
fn each_machine_is_given_one_address_for_life_by_whichever_host_asks() {
    let rig = Rig::new(&translated());
    let given: Vec<BTreeMap<String, Ipv4Addr>> = thread::scope(|scope| {
        let asking = [0, 1].map(|at| {
            let rig = &rig;
            scope.spawn(move || {
                let names = (0..40).map(|n| format!("m{}", if at == 0 { n } else { 39 - n }));
                names.map(|n| (n.clone(), machine(rig, at, &n).address)).collect()
            })
        });
        asking.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(given[0], given[1], "a name has one address, whoever asks");
    let mut addresses: Vec<_> = given[0].values().collect();
    addresses.sort_unstable();
    addresses.dedup();
    assert_eq!(addresses.len(), 40);
    // It runs and moves.
    let net = machine(&rig, 0, "m7");
    let mut running = rig.boot(net.clone(), 0);
    rig.move_machine(&mut running, Duration::from_millis(20));
    for (name, address) in &given[0] {
        assert_eq!(machine(&rig, 1, name).address, *address);
    }
    assert_eq!(machine(&rig, 0, "m7"), net);
    let common = rig.hosts[0].path.address("m7", NetworkId::COMMON).unwrap();
    assert_eq!(common.0, Ipv4Addr::new(10, 77, 0, 1), "tenants have the same addresses");
}

#[test]
fn a_pool_that_is_empty_says_so_and_what_was_returned_rests() {
    let options = EdgeOptions {
        pools: vec!["10.77.9.4/30".parse().unwrap()],
        quarantine: Duration::from_secs(2),
        ..translated()
    };
    let rig = Rig::new(&options);
    let path = &rig.hosts[0].path;
    let (one, two) = (machine(&rig, 0, "one"), machine(&rig, 0, "two"));
    assert_eq!([5, 6].map(|n| Ipv4Addr::new(10, 77, 9, n)), [one.address, two.address]);
    let error = path.address("three", TENANT).unwrap_err().to_string();
    assert!(error.contains("all 2 addresses of 10.77.9.4/30 are in use"), "{error}");
    // An address that is promised to one is not another's, whatever that one says.
    let thief = MachineNet { machine: "thief".into(), ..one.clone() };
    let refused = rig.boot_at(thief.clone(), 1, epoch(1)).err().unwrap().to_string();
    assert!(refused.contains("was given to machine \"one\""), "{refused}");
    rig.hosts[1].path.forget(&thief, epoch(1)).unwrap();
    let running = rig.boot(one.clone(), 0);
    drop(running);
    path.forget(&one, epoch(1)).unwrap();
    let waiting = || path.address("three", TENANT).unwrap_err().to_string().contains("1 of them");
    assert!(wait_for(LIMIT, waiting), "it is returned");
    assert!(wait_for(LIMIT, || path.address("three", TENANT).is_ok()), "after its quarantine");
    assert_eq!(machine(&rig, 0, "three").address, one.address);
    let error = path.address("one", TENANT).unwrap_err().to_string();
    assert!(error.contains("in use"), "{error}");
}

#[test]
fn a_machine_with_an_address_of_its_own_keeps_it_and_nobody_is_given_it() {
    let rig = Rig::new(&translated());
    let own = MachineNet {
        network: TENANT,
        ..MachineNet::new("own", Ipv4Addr::new(10, 77, 0, 1), [2, 0, 0, 0, 0, 1], 1380)
    };
    let _running = rig.boot(own.clone(), 0);
    assert_eq!(machine(&rig, 1, "other").address, Ipv4Addr::new(10, 77, 0, 2));
    assert_eq!(machine(&rig, 1, "own").address, own.address);
}
