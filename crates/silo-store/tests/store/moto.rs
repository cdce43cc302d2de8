//! The same against an S3 server that is not ours, over TCP: moto, from PyPI.

use crate::support::*;
use silo_block::io::BlockDevice;
use silo_store::{Access, Depth, Environment, Reading, Store, StoreError, StoreUrl, capture::Want};
use silo_testing::{Moto, missing};
use std::sync::atomic::AtomicBool;

#[test]
fn a_second_s3_server_takes_generations_and_fences_writers() {
    let Some(moto) = Moto::start() else { return };
    let url: StoreUrl = moto.address("folder").parse().unwrap();
    let environment = Environment::given(Moto::CREDENTIALS);
    let store = match Store::open(&url, Access::Write, &environment, limits()) {
        Ok(store) => store,
        // A version of moto without the lock of conditional puts is refused, which is right.
        Err(error @ StoreError::NoCreateIfAbsent { .. }) => {
            missing(&format!("moto with create-if-absent that has one winner ({error})"));
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let disk = Disk::new(noise(1, 1 << 20));
    let group = group(&[("disk", 4096, &disk)]);
    let mut first = writer(&store, "vm");
    round(&mut first, &group, Want::Changed).unwrap();
    group.device(0).write_at(77, &noise(2, 50_000)).unwrap();
    round(&mut first, &group, Want::Changed).unwrap();
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
    let (done, stop) = (Reading::default(), AtomicBool::new(false));
    let verified = store.verify(&ring(), &line("vm"), None, Depth::Full, &done, &stop).unwrap();
    assert!(verified.is_well(), "{verified:?}");
    let _second = writer(&store, "vm");
    let error = round(&mut first, &group, Want::Everything).unwrap_err();
    assert!(matches!(error, StoreError::Fenced { .. }), "{error}");
}
