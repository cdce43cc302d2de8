//! `conduit check`'s view of the paths to peers.

use crate::rig::Rig;
use conduit::{exec, probe};

#[test]
fn a_path_is_probed_for_the_largest_packet_that_comes_back_though_nobody_tells() {
    let rig = Rig::new();
    let peer = rig.hosts[0].this;
    let look = || rig.edge.space.run(|| probe::path(peer));
    let open = look();
    assert_eq!((open.carries, open.inside), (Some(1500), Some(1450)), "{open:?}");
    assert!(open.detail.is_empty() && open.round_trip_us.is_some(), "{open:?}");
    // A router that drops what is larger and says nothing.
    let rules = "add table ip quiet; \
        add chain ip quiet c { type filter hook forward priority 0; }; \
        add rule ip quiet c ip length > 1432 drop";
    rig.router.run(|| exec::run("nft", &[rules], "")).unwrap();
    let narrow = look();
    assert_eq!((narrow.carries, narrow.believed), (Some(1432), 1500), "{narrow:?}");
    assert!(narrow.detail.contains("1432"), "{narrow:?}");
    // One that is not there.
    let nobody = rig.edge.space.run(|| probe::path([10, 88, 3, 77].into()));
    assert_eq!(nobody.carries, None);
    assert!(!nobody.detail.is_empty());
}
