//! Stacks as a group that is backed up.

use super::*;
use crate::{
    block::BlockRange,
    store::capture::{Capture, Changes, Frozen, Want},
};
use std::{sync::atomic::AtomicBool, time::Duration};

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_backup_round_lists_what_changed_since_the_one_that_was_stored() {
    let dir = tempfile::tempdir().unwrap();
    let options = StackOptions { bytes: 1 << 20, block: 4096 };
    let make = |name: &str| Arc::new(Stack::create(&dir.path().join(name), None, options).unwrap());
    let (a, b) = (make("a"), make("b"));
    let group = StackGroup::new(vec![("a".into(), a.clone()), ("b".into(), b.clone())], LIMIT);
    let listed = |frozen: &dyn Frozen, device| -> Vec<BlockRange> {
        frozen.changed(device).ranges().collect()
    };
    assert_eq!(group.changes(4).blocks, 512);
    // The first round has everything, and a second one cannot be taken meanwhile.
    let first = group.freeze(Want::Changed).unwrap();
    assert!(group.freeze(Want::Changed).is_err());
    assert_eq!(first.changed(0).len(), 256);
    a.write_at(4096, &[1; 4096]).unwrap();
    first.release();
    a.write_at(40_960, &[2; 8192]).unwrap();
    b.trim(0, 4096).unwrap();
    assert_eq!(group.changes(2), Changes { blocks: 4, fullest: 2 });
    let second = group.freeze(Want::Changed).unwrap();
    a.write_at(4096, &[3; 4096]).unwrap();
    assert_eq!(listed(&*second, 0), [BlockRange::new(1, 1), BlockRange::new(10, 2)]);
    assert_eq!(listed(&*second, 1), [BlockRange::new(0, 1)]);
    let mut buf = [0; 4096];
    second.read(0, BlockRange::new(1, 1), &mut buf).unwrap();
    assert_eq!(buf, [1; 4096], "as it was at the instant");
    // Not stored: it is all listed again, with what came since.
    second.put_back();
    a.write_at(0, &[4; 4096]).unwrap();
    let third = group.freeze(Want::Changed).unwrap();
    assert_eq!(listed(&*third, 0), [BlockRange::new(0, 2), BlockRange::new(10, 2)]);
    assert_eq!(listed(&*third, 1), [BlockRange::new(0, 1)]);
    assert!(third.held() < LIMIT);
    third.release();
    drop(group);
    a.merge(&AtomicBool::new(false)).unwrap();
    assert_eq!(a.depth(), 2);
    // Opened again, it still knows what is stored.
    a.write_at(20 * 4096, &[5; 4096]).unwrap();
    a.flush().unwrap();
    drop((a, b));
    let a = Arc::new(Stack::open(&dir.path().join("a"), None).unwrap());
    let group = StackGroup::new(vec![("a".into(), a)], LIMIT);
    let fourth = group.freeze(Want::Changed).unwrap();
    assert_eq!(listed(&*fourth, 0), [BlockRange::new(20, 1)]);
    let everything = {
        drop(fourth);
        group.freeze(Want::Everything).unwrap()
    };
    assert_eq!(everything.changed(0).len(), 256);
}
