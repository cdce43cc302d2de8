//! Moves of device groups in one process, over real connections.

mod common;

use common::{Random, WAIT, memory::Memory, rig::*, tap::Tap, until};
use silo_block::{io::BlockDevice, session::source::Config};
use silo_move::{Volume, destination, source};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

const MIB: u64 = 1 << 20;

fn filled(size: u64, seed: u64) -> Arc<Memory> {
    let device = Arc::new(Memory::new(size));
    let mut random = Random(seed);
    let mut chunk = vec![0; 64 << 10];
    let mut at = 0;
    while at < size {
        let length = (size - at).min(chunk.len() as u64) as usize;
        match random.below(4) {
            0 => {}
            1 => {
                chunk.fill(random.next() as u8);
                device.write_at(at, &chunk[..length]).unwrap();
            }
            _ => {
                random.fill(&mut chunk);
                device.write_at(at, &chunk[..length]).unwrap();
            }
        }
        at += length as u64;
    }
    device
}

#[test]
fn a_group_of_devices_moves_and_both_ends_say_so() {
    let devices = [filled(8 * MIB, 1), filled(3 * MIB + 78, 2)];
    let targets = [Arc::new(Memory::new(8 * MIB)), Arc::new(Memory::new(3 * MIB + 78))];
    let names = ["memory", "root"];
    let volumes: Vec<Arc<Volume>> =
        (0..2).map(|at| owned(names[at], devices[at].clone(), 4096)).collect();
    let there: Vec<Arc<Volume>> =
        (0..2).rev().map(|at| empty(names[at], targets[at].clone(), 4096)).collect();
    let receiver = Receiver::new(there.clone(), destination::Options::default());
    let server = serve(&receiver);
    let host = Arc::new(Host::default());
    host.handover.lock().unwrap().state = b"registers".to_vec();
    let outbound = start(&volumes, server.address(), &host, source::Options::default());
    outbound.custom(7, b"hello".to_vec());
    let report = outbound.wait().unwrap();
    let session = receiver.session(1);
    let arrived = session.wait().unwrap();
    eprintln!("{}\n{}", report.timings, arrived.timings);
    assert_eq!(report.session, arrived.session);
    assert_eq!(
        receiver.host.wait_for(|seen| matches!(seen, Seen::Run(..))),
        Seen::Run(1, b"registers".to_vec(), vec![vec![], vec![]])
    );
    assert!(receiver.host.seen().contains(&Seen::Custom(7, b"hello".to_vec())));
    assert!(host.seen().contains(&Seen::HandedOver));
    for at in 0..2 {
        same(&*devices[at], &*targets[at]);
    }
    // The source's volumes are gone, the destination's are in use.
    assert!(volumes[0].write_at(0, &[1]).is_err());
    there[0].write_at(0, &[1]).unwrap();
    assert_eq!(report.links, 1);
    assert!(report.paths.fill > 0 && report.paths.plain + report.paths.packed > 0);
}
