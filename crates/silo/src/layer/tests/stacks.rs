//! Stacks on a real file system, and as parts of each other.

use super::*;
use crate::source::{DirectoryDevice, FileDevice};
use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

const LIMIT: Duration = Duration::from_secs(60);
static GO: AtomicBool = AtomicBool::new(false);

/// Random writes to a device and to a buffer.
fn scribble(device: &dyn BlockDevice, model: &mut [u8], random: &mut Random, count: usize) {
    for _ in 0..count {
        let offset = random.below(model.len() as u64);
        let length = 1 + random.below((model.len() as u64 - offset).min(20_000));
        let data = random.bytes(length as usize);
        device.write_at(offset, &data).unwrap();
        model[offset as usize..][..data.len()].copy_from_slice(&data);
    }
}

#[test]
fn check_23_every_layer_has_its_own_block_size_whatever_its_base_and_its_mover_use() {
    let dir = tempfile::tempdir().unwrap();
    let random = &mut Random(23);
    let bytes = 3 * (1 << 20) + 78;
    let shards = DirectoryDevice::create(&dir.path().join("base"), bytes, 1 << 20).unwrap();
    let mut model = vec![0; bytes as usize];
    scribble(&shards, &mut model, random, 50);
    let mut device: Arc<dyn BlockDevice> = Arc::new(shards);
    for (index, block) in [64 << 10, 512, 1 << 20, 4096, 16 << 10].into_iter().enumerate() {
        let below = model.clone();
        let base = Base::trusted(device.clone(), "below", None);
        let path = dir.path().join(format!("stack {index}"));
        let options = StackOptions { bytes: 0, block };
        let stack = Stack::create(&path, Some(&base), options).unwrap();
        scribble(&stack, &mut model, random, 20);
        stack.trim(1 << 20, 1 << 20).unwrap();
        model[1 << 20..2 << 20].fill(0);
        scribble(&stack, &mut model, random, 5);
        assert!(content_of(&stack) == model, "blocks of {block}");
        assert!(content_of(&*device) == below, "what is below never changes");
        device = Arc::new(stack);
    }
    // A mover that takes 4 KiB, 64 KiB, 1 MiB or odd pieces sees the same.
    for step in [4096usize, 64 << 10, 1 << 20, 12_345] {
        for (index, want) in model.chunks(step).enumerate() {
            let mut got = vec![0; want.len()];
            device.read_at((index * step) as u64, &mut got).unwrap();
            assert!(got == want);
        }
    }
}

#[test]
fn check_24_stacked_shared_and_unshared_layers_are_found_and_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let random = &mut Random(24);
    let path = dir.path().join("base");
    let mut shared = vec![0; 700_000];
    let file = FileDevice::create(&path, 700_000).unwrap();
    scribble(&file, &mut shared, random, 30);
    file.flush().unwrap();
    drop(file);
    let now = std::time::SystemTime::now();
    let base = Base::identified(&path, now).unwrap();
    // Two machines over one base, each several layers deep.
    let mut models = Vec::new();
    for name in ["a", "b"] {
        let stack = Stack::create(&dir.path().join(name), Some(&base), StackOptions::default());
        let (stack, mut model) = (stack.unwrap(), shared.clone());
        for _ in 0..3 {
            scribble(&stack, &mut model, random, 10);
            drop(stack.push(LIMIT).unwrap());
        }
        scribble(&stack, &mut model, random, 10);
        stack.flush().unwrap();
        assert_eq!(stack.depth(), 4);
        models.push(model);
    }
    let found = Stack::discover(dir.path()).unwrap();
    assert_eq!(found.len(), 2);
    for (info, model) in found.into_iter().zip(&models) {
        let info = info.unwrap();
        assert_eq!((info.layers, info.base_root), (4, base.root()));
        let base = Base::verified(&path, info.base_root.unwrap(), now).unwrap();
        let stack = Stack::open(&info.path, Some(&base)).unwrap();
        assert!(content_of(&stack) == *model);
        // One process at a time.
        assert!(matches!(Stack::open(&info.path, Some(&base)), Err(LayerError::InUse { .. })));
        stack.merge(&GO).unwrap();
        assert_eq!(stack.depth(), 2);
        drop(stack);
        let stack = Stack::open(&info.path, Some(&base)).unwrap();
        assert!(content_of(&stack) == *model);
    }
}

#[test]
fn check_22_a_stack_opens_over_its_own_base_only() {
    let dir = tempfile::tempdir().unwrap();
    let (right, _) = base(9000, 1);
    let (wrong, _) = base(9000, 2);
    let path = dir.path().join("stack");
    drop(Stack::create(&path, Some(&right), StackOptions::default()).unwrap());
    let nameless = Base::trusted(right.device().clone(), "nameless", None);
    for other in [Some(&wrong), None, Some(&nameless)] {
        let error = Stack::open(&path, other).unwrap_err();
        assert!(matches!(error, LayerError::WrongBase { .. }), "{error}");
    }
    drop(Stack::open(&path, Some(&right)).unwrap());
    assert!(Stack::create(&path, Some(&right), StackOptions::default()).is_err());
    let small = StackOptions { bytes: 10, block: 4096 };
    assert!(matches!(
        Stack::create(&dir.path().join("small"), Some(&right), small),
        Err(LayerError::Size { .. })
    ));
}

#[test]
fn trim_gives_room_back_and_extents_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let options = StackOptions { bytes: 8 << 20, block: 64 << 10 };
    let stack = Stack::create(dir.path(), None, options).unwrap();
    stack.write_at(0, &vec![1; 8 << 20]).unwrap();
    stack.flush().unwrap();
    let before = stack.allocated_bytes().unwrap();
    stack.trim(0, 6 << 20).unwrap();
    stack.flush().unwrap();
    let after = stack.allocated_bytes().unwrap();
    assert!(after * 3 < before, "{before} {after}");
    let extents = stack.extents(0, 8 << 20).unwrap();
    assert_eq!(extents.len(), 2, "{extents:?}");
    assert_eq!(extents[0].length, 6 << 20);
}

#[test]
fn writers_go_on_while_layers_are_pushed_and_merged_and_views_stay_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    const BLOCKS: u64 = 64;
    let options = StackOptions { bytes: BLOCKS * 4096, block: 4096 };
    let stack = Arc::new(Stack::create(dir.path(), None, options).unwrap());
    let stop = AtomicBool::new(false);
    // Each block holds the number of its last write, in order: a view has a prefix of each
    // writer's writes, and of two blocks that one writer writes in turn the first is never behind.
    let written: Vec<AtomicU64> = (0..4).map(|_| AtomicU64::new(0)).collect();
    thread::scope(|scope| {
        for (thread, written) in written.iter().enumerate() {
            let (stack, stop) = (&stack, &stop);
            scope.spawn(move || {
                for number in 1u64.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    for half in 0..2 {
                        let block = thread as u64 * 16 + number % 8 * 2 + half;
                        let page: Vec<u8> =
                            number.to_le_bytes().iter().copied().cycle().take(4096).collect();
                        stack.write_at(block * 4096, &page).unwrap();
                    }
                    written.store(number, Ordering::Release);
                }
            });
        }
        let until = Instant::now() + Duration::from_millis(1500);
        let mut rounds = 0;
        while Instant::now() < until || rounds <= 3 {
            let least: Vec<u64> = written.iter().map(|w| w.load(Ordering::Acquire)).collect();
            let view = stack.push(LIMIT).unwrap();
            let first = content_of(&view);
            let second = content_of(&view);
            assert!(first == second, "a view changed");
            for (thread, least) in least.iter().enumerate() {
                let newest = |half: usize| {
                    (0..8)
                        .map(|pair| {
                            let at = (thread * 16 + pair * 2 + half) * 4096;
                            let number = u64::from_le_bytes(first[at..at + 8].try_into().unwrap());
                            let page = &first[at..at + 4096];
                            assert!(page.chunks(8).all(|c| c == number.to_le_bytes()), "torn");
                            number
                        })
                        .max()
                        .unwrap()
                };
                let (a, b) = (newest(0), newest(1));
                assert!(a >= *least && b >= *least, "an answered write is not in the view");
                assert!(a == b || a == b + 1, "the second half of a pair without the first");
            }
            drop(view);
            if rounds % 3 == 2 {
                stack.merge(&GO).unwrap();
            }
            if rounds % 5 == 0 {
                stack.flush().unwrap();
            }
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn writers_are_held_for_far_less_than_5_milliseconds_by_a_push() {
    let dir = tempfile::tempdir().unwrap();
    // A large device: what a push costs its writers must not depend on that.
    let options = StackOptions { bytes: 64 << 30, block: 4096 };
    let stack = Stack::create(dir.path(), None, options).unwrap();
    let mut times = Vec::new();
    for round in 0..20u64 {
        stack.write_at(round << 20, &[1; 4096]).unwrap();
        stack.prepare().unwrap();
        let held = stack.hold(LIMIT).unwrap();
        times.push(held.swap().1);
    }
    // On a busy computer some are held up by others, and one of so many is not.
    assert!(times.iter().min() < Some(&Duration::from_millis(5)), "{times:?}");
}
