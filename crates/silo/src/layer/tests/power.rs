//! A seeded host that loses power at any change of any file, tears what was not synced and brings
//! it out of order; and that kills the process at any point.
//!
//! `SILO_SEEDS` says how many seeds are tried, `SILO_SEED` runs one alone:
//! `SILO_SEED=17 cargo nextest run -p silo layer::tests::power`.

use super::*;
use crate::tests::model::Model;
use std::{sync::atomic::AtomicBool, time::Duration};

const LIMIT: Duration = Duration::from_secs(60);

struct Host {
    folder: Arc<SimFolder>,
    boots: u32,
    base: Base,
}

impl Host {
    fn boot(&self) -> BootId {
        BootId::new(&format!("boot {}", self.boots))
    }

    fn open(&self, context: &str) -> Stack {
        Stack::open_in(self.folder.clone(), Some(&self.base), self.boot(), None)
            .unwrap_or_else(|error| panic!("{context}: {error}"))
    }
}

/// One operation. An error means that the power went while it ran.
fn step(
    stack: &Stack,
    model: &mut Model,
    views: &mut Vec<(View, Vec<u8>)>,
    random: &mut Random,
    context: &str,
) -> std::io::Result<()> {
    let size = model.now.len() as u64;
    let offset = random.below(size);
    let most = (size - offset).min(1 << random.below(15));
    let length = 1 + random.below(most);
    let (at, count) = (offset as usize, length as usize);
    match random.below(16) {
        0 | 1 => {
            model.put(at, &vec![0; count]);
            stack.zero(offset, length, random.below(2) == 0)?;
        }
        2 => {
            // Blocks that are covered become zero, the rest stays: all of it allowed on a crash.
            let covered = stack.geometry().covered(offset, length);
            let start = stack.geometry().offset(covered.start) as usize;
            model.put(start.min(at + count), &vec![0; stack.geometry().bytes_of(covered) as usize]);
            stack.trim(offset, length)?;
        }
        3 | 4 => {
            stack.flush()?;
            model.flushed();
        }
        5 => {
            let view = stack.push(LIMIT)?;
            if random.below(2) == 0 {
                views.push((view, model.now.clone()));
            }
        }
        6 => {
            if random.below(2) == 0 && !views.is_empty() {
                views.swap_remove(random.below(views.len() as u64) as usize);
            }
            stack.merge(&AtomicBool::new(false))?;
        }
        7 => {
            assert!(content_of(stack) == model.now, "{context}: content");
            for (view, frozen) in &*views {
                assert!(content_of(view) == *frozen, "{context}: a view changed");
            }
        }
        _ => {
            let data = random.bytes(count);
            model.put(at, &data);
            stack.write_at(offset, &data)?;
        }
    }
    Ok(())
}

fn run(seed: u64) {
    let random = &mut Random(seed);
    let block = 512u32 << random.below(4);
    let size = 30_000 + random.below(40_000);
    let (base, mut content) = base((10_000 + random.below(20_000)) as usize, seed);
    content.resize(size as usize, 0);
    let mut host = Host { folder: SimFolder::new(), boots: 0, base };
    let options = StackOptions { bytes: size, block };
    let stack = Stack::create_in(host.folder.clone(), Some(&host.base), options, host.boot(), None);
    let mut stack = stack.unwrap();
    let mut model = Model::new(content);
    let mut views = Vec::new();
    for life in 0..6 {
        if random.below(3) > 0 {
            host.folder.power_for(random.below(120));
        }
        let mut context = String::new();
        let mut lost = false;
        for index in 0..40 {
            context = format!("seed {seed}, life {life}, step {index}");
            match step(&stack, &mut model, &mut views, random, &context) {
                Ok(()) => {}
                Err(error) => {
                    assert!(error.to_string().contains("no power"), "{context}: {error}");
                    lost = true;
                    break;
                }
            }
        }
        views.clear();
        drop(stack);
        if !lost && random.below(2) == 0 {
            // `kill -9`: everything that was answered is there. The power may go while it opens.
            let base = Some(&host.base);
            match Stack::open_in(host.folder.clone(), base, host.boot(), None) {
                Ok(opened) => {
                    stack = opened;
                    assert!(content_of(&stack) == model.now, "{context}: content after a kill");
                    continue;
                }
                Err(error) => assert!(error.to_string().contains("no power"), "{error}"),
            }
        }
        host.folder = host.folder.crash(random);
        host.boots += 1;
        stack = host.open(&context);
        model.crashed(content_of(&stack), &format!("{context}, crash"));
    }
}

#[test]
fn check_24_layers_keep_what_was_flushed_through_power_cuts_at_any_change_of_any_file() {
    if let Ok(seed) = std::env::var("SILO_SEED") {
        return run(seed.parse().unwrap());
    }
    let seeds = std::env::var("SILO_SEEDS").map_or(400, |seeds| seeds.parse().unwrap());
    (0..seeds).for_each(run);
}

#[test]
fn check_20_a_full_disk_fails_the_write_and_harms_nothing_else() {
    for seed in 0..20 {
        let random = &mut Random(seed);
        let (base, mut content) = base(50_000, seed);
        content.resize(60_000, 0);
        let folder = SimFolder::new();
        let options = StackOptions { bytes: 60_000, block: 4096 };
        let boot = BootId::new("only");
        let stack =
            Stack::create_in(folder.clone(), Some(&base), options, boot.clone(), None).unwrap();
        folder.set_room(Some(30_000));
        let mut full = 0;
        for _ in 0..60 {
            let offset = random.below(14) * 4096;
            let data = random.bytes(4096);
            match stack.write_at(offset, &data) {
                Ok(()) => content[offset as usize..][..4096].copy_from_slice(&data),
                Err(error) => {
                    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error}");
                    full += 1;
                }
            }
            assert!(content_of(&stack) == content, "seed {seed}");
        }
        assert!(full > 0, "seed {seed}: the disk was never full");
        // A push that has no room changes nothing either.
        folder.set_room(Some(0));
        assert!(stack.push(LIMIT).is_err());
        assert!(content_of(&stack) == content);
        // With room again everything goes on, and what was flushed is there after a crash.
        folder.set_room(None);
        stack.write_at(0, &[7; 9000]).unwrap();
        content[..9000].fill(7);
        stack.flush().unwrap();
        drop(stack);
        let after = folder.crash(random);
        let stack = Stack::open_in(after, Some(&base), BootId::new("next"), None).unwrap();
        assert!(content_of(&stack) == content, "seed {seed}, after a crash");
    }
}

#[test]
fn check_25_a_flush_over_nbd_is_durable_in_every_layer_after_a_power_cut() {
    use crate::nbd::{Endpoint, NbdClient, NbdClientOptions, NbdOptions, NbdServer};
    let dir = tempfile::tempdir().unwrap();
    for seed in 0..8 {
        let random = &mut Random(seed);
        let (base, mut model) = base(90_000, seed);
        let folder = SimFolder::new();
        let options = StackOptions { bytes: 0, block: 4096 };
        let boot = BootId::new("first");
        let stack = Stack::create_in(folder.clone(), Some(&base), options, boot, None).unwrap();
        let stack = Arc::new(stack);
        let socket = dir.path().join(format!("{seed}.sock"));
        let server = NbdServer::start(&socket, stack.clone(), NbdOptions::default()).unwrap();
        let client =
            NbdClient::connect(&Endpoint::unix(&socket), NbdClientOptions::default()).unwrap();
        let write = |random: &mut Random| {
            let offset = random.below(85_000);
            let data = random.bytes(5000);
            client.write_at(offset, &data).unwrap();
            (offset as usize, data)
        };
        // Flushed data lies in a frozen layer and in the top.
        for round in 0..3 {
            for _ in 0..5 {
                let (at, data) = write(random);
                model[at..at + data.len()].copy_from_slice(&data);
            }
            if round < 2 {
                drop(stack.push(LIMIT).unwrap());
            }
        }
        client.flush().unwrap();
        let mut may = Model::new(model);
        // Not flushed: may be there or not.
        for _ in 0..3 {
            let (at, data) = write(random);
            may.put(at, &data);
        }
        let after = folder.crash(random);
        // From here on a flush cannot succeed, and must not claim to.
        folder.power_for(0);
        assert!(client.write_at(0, &[1; 512]).is_err());
        assert!(client.flush().is_err(), "seed {seed}: flushed without power");
        drop(client);
        server.stop(LIMIT).unwrap();
        let stack = Stack::open_in(after, Some(&base), BootId::new("second"), None).unwrap();
        may.crashed(content_of(&stack), &format!("seed {seed}"));
    }
}
