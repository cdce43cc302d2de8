//! A generation of two rounds: what there was while somebody still wrote, and what was written then.

use crate::support::*;
use silo_block::{
    block::{BlockIndex, BlockRange, BlockSet},
    geometry::Geometry,
};
use silo_store::{
    LineWriter, PackOptions, RestoreOptions, StoreError, Stored, Which, WriterOptions,
    capture::{DeviceInfo, Frozen},
};
use std::{io, sync::atomic::AtomicBool, time::Duration};

const BLOCK: usize = 4096;

/// A round of one device.
struct Round {
    content: Vec<u8>,
    changed: BlockSet,
    zeros: BlockSet,
    early: Vec<BlockRange>,
}

impl Round {
    /// All blocks; those that are zeros are said to be.
    fn all(content: &[u8]) -> Self {
        let blocks = (content.len() / BLOCK) as u64;
        let mut zeros = BlockSet::new(blocks);
        for (at, block) in content.chunks(BLOCK).enumerate() {
            if block.iter().all(|byte| *byte == 0) {
                zeros.insert(BlockIndex(at as u64));
            }
        }
        let (content, changed) = (content.to_vec(), BlockSet::full(blocks));
        Self { content, changed, zeros, early: Vec::new() }
    }

    fn some(content: &[u8], ranges: &[(u64, u64)]) -> Self {
        let blocks = (content.len() / BLOCK) as u64;
        let mut changed = BlockSet::new(blocks);
        ranges.iter().for_each(|(at, count)| changed.insert_range(BlockRange::new(*at, *count)));
        let (content, zeros) = (content.to_vec(), BlockSet::new(blocks));
        Self { content, changed, zeros, early: Vec::new() }
    }
}

impl Frozen for Round {
    fn changed(&self, _: usize) -> &BlockSet {
        &self.changed
    }

    fn zeros(&self, _: usize) -> Option<&BlockSet> {
        Some(&self.zeros)
    }

    fn early(&self, _: usize) -> &[BlockRange] {
        &self.early
    }

    fn read(&self, _: usize, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        let from = range.start.0 as usize * BLOCK;
        // Zeros that are known are not read, so it does not matter what would come of them.
        buf.copy_from_slice(&self.content[from..from + buf.len()]);
        Ok(())
    }

    fn held(&self) -> Duration {
        Duration::ZERO
    }

    fn release(self: Box<Self>) {}

    fn put_back(self: Box<Self>) {}
}

fn infos(content: &[u8]) -> Vec<DeviceInfo> {
    let geometry = Geometry::new(content.len() as u64, BLOCK as u32).unwrap();
    vec![DeviceInfo { name: "memory".into(), geometry }]
}

/// What is there at first, torn where it is written to, and in the end.
fn contents(seed: u64) -> (Vec<u8>, Vec<u8>, Vec<(u64, u64)>) {
    let mut last = noise(seed, 3000 * BLOCK);
    last[200 * BLOCK..900 * BLOCK].fill(0);
    last[2000 * BLOCK..2500 * BLOCK].fill(seed as u8 | 1);
    let mut first = last.clone();
    let written = vec![(10, 3), (300, 20), (1000, 200), (2999, 1)];
    for (at, count) in &written {
        let (at, count) = (*at as usize, *count as usize);
        first[at * BLOCK..(at + count) * BLOCK].copy_from_slice(&noise(seed + 7, count * BLOCK));
    }
    last[300 * BLOCK..320 * BLOCK].fill(0);
    (first, last, written)
}

fn store(
    writer: &mut LineWriter,
    first: &Round,
    rest: impl Fn() -> Result<Round, StoreError>,
) -> Result<Stored, StoreError> {
    let stop = AtomicBool::new(false);
    let mut rest = || rest().map(|round| Box::new(round) as Box<dyn Frozen>);
    writer.store_with_rest(&infos(&first.content), first, true, &mut rest, "", &stop)
}

#[test]
fn what_was_written_during_the_first_round_is_what_the_second_says_and_nothing_is_kept_of_a_failure()
 {
    for sealers in [0, 2] {
        let (_, stores) = in_memory();
        let packs = PackOptions { sealers, level: -1, ..PackOptions::default() };
        let options = WriterOptions { packs, ..WriterOptions::default() };
        let mut writer = LineWriter::open(stores.clone(), &ring(), &line("vm"), options).unwrap();
        let (first, last, written) = contents(1);
        let round = Round::all(&first);
        let failed = store(&mut writer, &round, || Err(StoreError::Stopped)).unwrap_err();
        assert!(matches!(failed, StoreError::Stopped), "{failed}");
        assert!(generation(&stores, "vm", Which::Newest).is_err(), "nothing was committed");
        assert!(writer.needs_everything());

        let stored = store(&mut writer, &round, || Ok(Round::some(&last, &written))).unwrap();
        // Written to and zeros at first, or in the end: 20 blocks.
        assert_eq!(stored.zeros, 700, "{stored:?}");
        assert!(newest(&stores, "vm", "memory").unwrap() == last);

        // The next one knows what is stored, whichever round it was in.
        let (first, last, written) = contents(2);
        let before = writer.newest();
        let failed = store(&mut writer, &Round::all(&first), || Err(StoreError::Stopped));
        assert!(failed.is_err() && writer.newest() == before);
        let again = Round::all(&newest(&stores, "vm", "memory").unwrap());
        let same = store(&mut writer, &again, || Ok(Round::some(&again.content, &[(5, 9)])));
        let same = same.unwrap();
        assert_eq!(same.content, 0, "{same:?}");
        let stored =
            store(&mut writer, &Round::all(&first), || Ok(Round::some(&last, &written))).unwrap();
        assert!(stored.number > same.number);
        assert!(newest(&stores, "vm", "memory").unwrap() == last, "{sealers} sealers");
        let old = generation(&stores, "vm", Which::Number(same.number)).unwrap();
        assert!(restored(&old, "memory").unwrap() == again.content);
    }
}

#[test]
fn what_is_read_first_is_stored_together_and_had_in_few_requests_whatever_was_stored_before() {
    let (_, stores) = in_memory();
    let mut writer = writer(&stores, "vm");
    let content = noise(3, 6000 * BLOCK);
    let round = Round::all(&content);
    let nothing = || Ok(Round::some(&content, &[]));
    store(&mut writer, &round, nothing).unwrap();
    // Every fifteenth block: each is in another chunk of the first packs.
    let early: Vec<_> = (0..400).map(|at| BlockRange::new(at * 15 % 6000, 1)).collect();
    let again = Round { early: early.clone(), ..Round::all(&content) };
    let stored = store(&mut writer, &again, nothing).unwrap();
    assert_eq!(stored.content, 400 * BLOCK as u64, "{stored:?}");

    let mut only = BlockSet::new(6000);
    early.iter().for_each(|range| only.insert_range(*range));
    let generation = generation(&stores, "vm", Which::Newest).unwrap();
    let target = Disk::new(vec![0xee; content.len()]);
    let (stop, options) = (AtomicBool::new(false), RestoreOptions::default());
    let before = stores.requests().total();
    generation.restore_some("memory", &only, &*target, options, &stop).unwrap();
    let requests = stores.requests().total() - before;
    assert!(requests <= 6, "{requests} requests");
    let got = target.content();
    for (at, block) in got.chunks(BLOCK).enumerate() {
        let wanted = only.contains(BlockIndex(at as u64));
        let from = at * BLOCK;
        let right = if wanted { &content[from..from + BLOCK] } else { &[0xee; BLOCK][..] };
        assert!(block == right, "block {at}");
    }
    // Also where they are scattered, and where zeros are asked for.
    let old = self::generation(&stores, "vm", Which::Number(stored.number - 1)).unwrap();
    let target = Disk::new(vec![0xee; content.len()]);
    old.restore_some("memory", &only, &*target, options, &stop).unwrap();
    assert!(target.content() == got);
    assert!(newest(&stores, "vm", "memory").unwrap() == content);
}
