//! The data path outlives its owner: taken up, upgraded, removed.

use crate::rig::{MACHINE, Options, PORT, Rig, eventually, heard, key};
use conduit::lab::Space;
use conduit_bpf::{Attach, DataPlane, Error, Event, Place};
use std::{
    net::UdpSocket,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::Duration,
};

/// Sends numbered datagrams until told to stop, and counts them.
fn flood(client: &Space, stop: &AtomicBool, sent: &AtomicU32) {
    client.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        while !stop.load(Ordering::Relaxed) {
            let number = sent.load(Ordering::Relaxed);
            socket.send_to(&number.to_be_bytes(), (MACHINE, PORT)).unwrap();
            sent.store(number + 1, Ordering::Relaxed);
            thread::sleep(Duration::from_micros(200));
        }
    });
}

/// Counts what comes, until all was sent and nothing comes any more.
fn count(ear: &UdpSocket, all_sent: &AtomicBool) -> u32 {
    let (mut buffer, mut count) = ([0; 16], 0);
    loop {
        let last = all_sent.load(Ordering::Relaxed);
        match ear.recv_from(&mut buffer) {
            Ok(_) => count += 1,
            Err(_) if last => return count,
            Err(_) => {}
        }
    }
}

/// Opens the data path of everyone anew, again and again, under traffic.
fn taken_up_under_traffic(attach: Attach) {
    let mut rig = Rig::with(&Options { attach, ..Options::default() });
    rig.place(0, 3);
    let ear = rig.listen(0);
    let (stop, all_sent, sent) =
        (AtomicBool::new(false), AtomicBool::new(false), AtomicU32::new(0));
    let received = thread::scope(|scope| {
        let receiving = scope.spawn(|| count(&ear, &all_sent));
        let client = &rig.client;
        let sending = scope.spawn(|| flood(client, &stop, &sent));
        for _ in 0..10 {
            rig.edge.open();
            rig.hosts[0].open();
            let before = sent.load(Ordering::Relaxed);
            eventually("datagrams are sent", || sent.load(Ordering::Relaxed) > before + 10);
        }
        stop.store(true, Ordering::Relaxed);
        sending.join().unwrap();
        all_sent.store(true, Ordering::Relaxed);
        receiving.join().unwrap()
    });
    assert_eq!(received, sent.into_inner());
    let entry = rig.hosts[0].plane().entry(key()).unwrap().unwrap();
    assert_eq!(entry.epoch, 3, "entries stay");
    let stale = rig.hosts[0].try_set(key(), 2, rig.local(0), rig.hosts[0].this).unwrap_err();
    assert!(matches!(stale, Error::Stale { .. }), "{stale}");
}

#[test]
fn a_new_owner_takes_the_data_path_up_without_a_frame_lost() {
    taken_up_under_traffic(Attach::Auto);
}

#[test]
fn a_new_owner_takes_filters_of_clsact_up_too() {
    taken_up_under_traffic(Attach::Clsact);
}

#[test]
fn frames_flow_while_nobody_owns_the_data_path() {
    let mut rig = Rig::new();
    rig.place(0, 1);
    let ear = rig.listen(0);
    rig.edge.plane = None;
    rig.hosts[0].plane = None;
    rig.say("nobody home");
    assert_eq!(heard(&ear).unwrap().0, "nobody home");
    rig.edge.open();
    rig.hosts[0].open();
    rig.say("somebody again");
    assert_eq!(heard(&ear).unwrap().0, "somebody again");
    assert_eq!(rig.hosts[0].count(Event::ToTap), 2, "counters go on");
}

#[test]
fn a_second_owner_is_refused_by_name() {
    let rig = Rig::new();
    let root = rig.edge.root().to_owned();
    let error = rig.edge.space.run(|| DataPlane::open(&root, Attach::Auto).err()).unwrap();
    assert!(matches!(error, Error::Owned { .. }), "{error}");
    assert!(error.to_string().contains("still runs"), "{error}");
}

#[test]
fn pins_of_a_newer_layout_are_refused_and_left_alone() {
    let mut rig = Rig::new();
    let root = rig.edge.root().to_owned();
    let newer = rig.edge.plane().pins().join("v99");
    rig.edge.plane = None;
    std::fs::create_dir(&newer).unwrap();
    let error = rig.edge.space.run(|| DataPlane::open(&root, Attach::Auto).err()).unwrap();
    assert!(matches!(error, Error::Newer { found: 99, .. }), "{error}");
    std::fs::remove_dir(&newer).unwrap();
    rig.edge.open();
}

/// Compiles the maps and a program as layout 1 had them, and pins them as its owner did.
fn pin_layout_1(rig: &Rig, folder: &std::path::Path, tap: u32) {
    let scratch = std::env::temp_dir().join(format!("conduit-layout1-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).unwrap();
    let object = scratch.join("layout1.o");
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data_path/layout1.bpf.c");
    let headers = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../conduit-bpf/bpf");
    let status = Command::new("clang")
        .args(["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-I/usr/include/x86_64-linux-gnu", "-I"])
        .arg(headers)
        .arg("-c")
        .arg(source)
        .arg("-o")
        .arg(&object)
        .status()
        .unwrap();
    assert!(status.success());
    let maps = folder.join("v1");
    std::fs::create_dir_all(&maps).unwrap();
    let bytes = std::fs::read(&object).unwrap();
    std::fs::remove_dir_all(&scratch).unwrap();
    rig.hosts[0].space.run(|| layout1::pin(&bytes, folder, &maps, tap, rig));
}

mod layout1 {
    //! The owner of layout 1, as far as the test needs it.

    use super::Rig;
    use aya::{
        EbpfLoader,
        maps::{Array, HashMap},
        programs::{LinkOrder, SchedClassifier, TcAttachType, links::FdLink, tc::TcAttachOptions},
    };
    use std::path::Path;

    pub(crate) fn pin(object: &[u8], folder: &Path, maps: &Path, tap: u32, rig: &Rig) {
        let mut old =
            EbpfLoader::new().btf(None).default_map_pin_directory(maps).load(object).unwrap();
        let mut key = [0; 20];
        key[..4].copy_from_slice(&conduit::tunnel::NETWORK.to_ne_bytes());
        key[4..].copy_from_slice(&super::MACHINE.to_ipv6_mapped().octets());
        let std::net::IpAddr::V4(this) = rig.hosts[0].this else { panic!("an IPv4 rig") };
        let std::net::IpAddr::V4(edge) = rig.edge.this else { panic!("an IPv4 rig") };
        let mut entry = [0; 48];
        entry[8..16].copy_from_slice(&41_u64.to_ne_bytes());
        entry[16..32].copy_from_slice(&this.to_ipv6_mapped().octets());
        entry[32..36].copy_from_slice(&tap.to_ne_bytes());
        entry[36] = 2; // local
        entry[38..44].copy_from_slice(&crate::rig::MAC);
        let mut forward: HashMap<_, [u8; 20], [u8; 48]> =
            old.take_map("forward").unwrap().try_into().unwrap();
        forward.insert(key, entry, 0).unwrap();
        let mut port = [0; 44];
        port[..4].copy_from_slice(&conduit::tunnel::NETWORK.to_ne_bytes());
        port[4..10].copy_from_slice(&crate::rig::MAC);
        port[12..28].copy_from_slice(&super::MACHINE.to_ipv6_mapped().octets());
        let mut ports: HashMap<_, u32, [u8; 44]> =
            old.take_map("ports").unwrap().try_into().unwrap();
        ports.insert(tap, port, 0).unwrap();
        let mut peers: HashMap<_, [u8; 16], u32> =
            old.take_map("peers").unwrap().try_into().unwrap();
        peers.insert(edge.to_ipv6_mapped().octets(), 2, 0).unwrap();
        let mut config = [0; 56];
        config[..16].copy_from_slice(&this.to_ipv6_mapped().octets());
        config[16..32].copy_from_slice(&edge.to_ipv6_mapped().octets());
        config[32..36].copy_from_slice(&rig.hosts[0].tunnel.index.to_ne_bytes());
        config[40..44].copy_from_slice(&conduit::tunnel::NETWORK.to_ne_bytes());
        config[44..48].copy_from_slice(&1_u32.to_ne_bytes());
        config[48..54].copy_from_slice(&conduit::tap::GATEWAY_MAC);
        let mut settings: Array<_, [u8; 56]> = old.take_map("config").unwrap().try_into().unwrap();
        settings.set(0, config, 0).unwrap();
        let program: &mut SchedClassifier =
            old.program_mut("cd_decap").unwrap().try_into().unwrap();
        program.load().unwrap();
        let order = TcAttachOptions::TcxOrder(LinkOrder::default());
        let id = program.attach_with_options("cd-tunnel", TcAttachType::Ingress, order).unwrap();
        let link = FdLink::try_from(program.take_link(id).unwrap()).unwrap();
        let pin = folder.join("links").join(format!("{}-cd_decap", rig.hosts[0].tunnel.index));
        link.pin(pin).unwrap();
    }
}

#[test]
fn an_upgrade_carries_the_entries_of_an_older_layout_over() {
    let mut rig = Rig::new();
    rig.place(0, 41);
    let ear = rig.listen(0);
    // The host as a program of layout 1 left it.
    let folder = rig.hosts[0].plane().pins().to_owned();
    let (space, plane) = (&rig.hosts[0].space, rig.hosts[0].plane.take().unwrap());
    space.run(move || plane.remove()).unwrap();
    std::fs::create_dir_all(folder.join("links")).unwrap();
    pin_layout_1(&rig, &folder, rig.taps[0]);
    rig.say("to the old one");
    assert_eq!(heard(&ear).unwrap().0, "to the old one");

    let (stop, all_sent, sent) =
        (AtomicBool::new(false), AtomicBool::new(false), AtomicU32::new(0));
    let root = rig.hosts[0].root().to_owned();
    let (received, plane) = thread::scope(|scope| {
        let receiving = scope.spawn(|| count(&ear, &all_sent));
        let sending = scope.spawn(|| flood(&rig.client, &stop, &sent));
        let plane = rig.hosts[0].space.run(|| DataPlane::open(&root, Attach::Auto)).unwrap();
        stop.store(true, Ordering::Relaxed);
        sending.join().unwrap();
        all_sent.store(true, Ordering::Relaxed);
        (receiving.join().unwrap(), plane)
    });
    assert_eq!(received, sent.into_inner(), "of those sent during the upgrade");
    let entry = plane.entry(key()).unwrap().unwrap();
    assert_eq!((entry.epoch, entry.owner, entry.candidate), (41, rig.hosts[0].this, None));
    assert_eq!(entry.place, Place::Local { tap: rig.taps[0], candidate: false });
    assert_eq!(plane.peers().unwrap(), [rig.edge.this]);
    assert!(!folder.join("v1").exists(), "the old maps are gone");
    rig.say("to the new one");
    assert_eq!(heard(&ear).unwrap().0, "to the new one");
    assert!(plane.count(Event::ToTap).unwrap() > 0, "the new program sees the frames");
    rig.hosts[0].plane = Some(plane);
}

#[test]
fn a_removed_data_path_leaves_nothing_attached() {
    for attach in [Attach::Auto, Attach::Clsact] {
        let mut rig = Rig::with(&Options { attach, ..Options::default() });
        rig.place(0, 1);
        let plane = rig.hosts[0].plane.take().unwrap();
        let folder = plane.pins().to_owned();
        rig.hosts[0].space.run(move || plane.remove()).unwrap();
        assert!(!folder.exists());
        let attached = || {
            rig.hosts[0].space.run(|| {
                let query = |hook| aya::programs::SchedClassifier::query_tcx("tap0", hook);
                let tcx = query(aya::programs::TcAttachType::Ingress).unwrap().1.len();
                let show = ["filter", "show", "dev", "tap0", "ingress"];
                let filters = conduit::exec::run("tc", &show, "").unwrap_or_default();
                (tcx, filters.trim().to_owned())
            })
        };
        // The kernel lets go of a link in its own time.
        eventually("nothing is attached", || attached() == (0, String::new()));
    }
}
