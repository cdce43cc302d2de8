//! Blocks by hash from several hosts at once: the source names them, nobody sends them twice.

use crate::{
    common::{MIB, content::noise, memory::Memory, rig::*},
    site::{Kind, Plan, Site},
};
use identity::{HostName, Security};
use silo::{
    io::BlockDevice,
    moving::{
        assist::{ByHash, HashIndex, Lookup, PeerFetch},
        codec::Naming,
        destination::{Accepted, Offer, Reception},
        peer::{Dial, Listener},
        source::Advertised,
    },
};
use silo_block::{
    block::BlockIndex, geometry::Geometry, session::messages::BlockHash, session::source::Config,
};
use std::{net::TcpListener, sync::Arc, time::Duration};

/// The hashes of an image that others have.
struct Image(Vec<BlockHash>);

impl Image {
    fn of(device: &dyn BlockDevice) -> Self {
        let all = bytes(device);
        Self(all.chunks(4096).map(|block| Naming::Plain.name(block)).collect())
    }
}

impl Advertised for Image {
    fn hash(&self, _: usize, block: BlockIndex) -> Option<BlockHash> {
        self.0.get(block.0 as usize).copied()
    }
}

/// A host that has content and takes no devices.
struct Closed;

impl Reception for Closed {
    fn receive(&self, _: &Offer<'_>) -> Result<Accepted, String> {
        Err("nothing is taken here".to_owned())
    }
}

fn share(device: &Arc<Memory>) -> (silo::moving::Server, Arc<PeerFetch>) {
    let index = Arc::new(HashIndex::default());
    index.add(device.clone(), Geometry::new(device.size(), 4096).unwrap()).unwrap();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let listener = Listener::new(socket, Security::Plaintext, limits(), |_| true).unwrap();
    let server = silo::moving::Server::new(listener, Arc::new(Closed), Some(index)).unwrap();
    let name = HostName::new("peer").unwrap();
    let dial = Dial::new(server.address(), name, Security::Plaintext, limits());
    (server, Arc::new(PeerFetch::new(dial, Duration::from_secs(5))))
}

#[test]
fn blocks_that_others_have_come_from_several_hosts_by_hash_and_the_source_sends_the_rest() {
    let size = 6 * MIB;
    let image = noise(size, 40);
    let device = Arc::new(Memory::new(size));
    device.write_at(0, &bytes(&*image)).unwrap();
    let volume = owned("disk", device.clone(), 4096);
    // Written since: not what the image's hash says.
    for block in 0..50 {
        volume.write_at(block * 20 * 4096 + 17, b"ours").unwrap();
    }
    // One host has the first half, one the second, in another place; this host has a piece itself.
    let all = bytes(&*image);
    let (first, second) = (Arc::new(Memory::new(size / 2)), Arc::new(Memory::new(size / 2 + 8192)));
    first.write_at(0, &all[..size as usize / 2]).unwrap();
    second.write_at(8192, &all[size as usize / 2..]).unwrap();
    let local = HashIndex::default();
    let own = Arc::new(Memory::new(MIB));
    own.write_at(0, &all[..MIB as usize]).unwrap();
    local.add(own, Geometry::new(MIB, 4096).unwrap()).unwrap();
    let (server_a, place_a) = share(&first);
    let (server_b, place_b) = share(&second);

    let target = Arc::new(Memory::new(size));
    let mut options = quick();
    options.places = vec![place_a, place_b];
    options.local = Some(Arc::new(local) as Arc<dyn Lookup>);
    let receiver = Receiver::new(vec![empty("disk", target.clone(), 4096)], options);
    let server = serve(&receiver);
    let mut options = source_options(Config::default());
    options.advertised = Some(Arc::new(Image::of(&*image)));
    let outbound = start(&[volume], server.address(), &Arc::default(), options);
    let report = outbound.wait().unwrap();
    let arrived = receiver.session(1).wait().unwrap();
    same(&*device, &*target);
    let blocks = size / 4096;
    assert_eq!(report.paths.held, blocks - 50, "{:?}", report.paths);
    let fetched: Vec<u64> = arrived.by_place.iter().map(|(_, counts)| counts.fetched).collect();
    // The third of a half that this host had itself was asked of nobody.
    let own = MIB / 4096;
    assert_eq!(fetched[1], blocks / 2 - fetched_late(&report, blocks), "{fetched:?}");
    assert!(fetched[0] + own >= blocks / 2 - 50 && fetched[0] <= blocks / 2 - own, "{fetched:?}");
    assert!(report.wire.data < size / 4, "{:?}", report.wire);
    drop((server_a, server_b));
}

/// Blocks of the second half that were written since the image was made.
fn fetched_late(_: &silo::moving::report::SourceReport, blocks: u64) -> u64 {
    (0..50).filter(|block| block * 20 >= blocks / 2).count() as u64
}

#[test]
fn a_store_and_a_host_that_has_content_are_asked_in_turn_and_a_slow_one_is_hedged() {
    let site = Site::new(Kind::S3, 4 * MIB, 41);
    let server = site.server.as_ref().unwrap();
    // The store has every block and gives none of them in time.
    site.slow(Duration::from_millis(350));
    let (peer, place) = share(&site.device);
    let plan = Plan { rate: 1_000_000, ..Plan::default() };
    let mut options = site.options(&plan);
    options.places.push(place);
    options.policy.hedge = Duration::from_millis(20);
    let moving = site.start_with(plan, options);
    moving.outbound.wait().unwrap();
    let arrived = moving.receiver.session(1).wait().unwrap();
    same(&*site.device, &*site.target);
    assert!(arrived.places.hedged > 0 && arrived.by_place[1].1.fetched > 0, "{arrived:?}");
    let all = arrived.places;
    assert_eq!(all.fetched, arrived.by_place.iter().map(|(_, counts)| counts.fetched).sum::<u64>());
    server.faults().clear();
    drop(peer);
}

#[test]
fn a_copy_on_this_host_is_a_place_as_well() {
    let device = noise(MIB, 42);
    let index = HashIndex::default();
    index.add(device.clone(), Geometry::new(MIB, 4096).unwrap()).unwrap();
    let target = Arc::new(Memory::new(MIB));
    let mut options = quick();
    options.places = vec![Arc::new(ByHash::new("an older image", index))];
    let receiver = Receiver::new(vec![empty("disk", target.clone(), 4096)], options);
    let server = serve(&receiver);
    let mut options = source_options(Config::default());
    options.advertised = Some(Arc::new(Image::of(&*device)));
    let volume = owned("disk", device.clone(), 4096);
    let report = start(&[volume], server.address(), &Arc::default(), options).wait().unwrap();
    let arrived = receiver.session(1).wait().unwrap();
    same(&*device, &*target);
    assert_eq!((report.paths.held, arrived.by_place[0].1.fetched), (256, 256));
}
