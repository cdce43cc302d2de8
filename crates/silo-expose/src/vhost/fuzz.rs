//! For fuzzing: guest memory of any bytes, with a ring in it, walked, read as requests, and done on
//! a small device. Also run as a test with pseudo-random bytes.

use super::{
    memory::{GuestMemory, Place as Region},
    request::{By, ID_BYTES, Manner, Request, Tried},
    ring::{self, Absent, Chain, Place, Used},
    sys,
};
use silo_block::io::BlockDevice;
use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

const MEMORY: usize = 64 << 10;
const SIZE: u16 = 16;

/// A disk in memory.
struct Small(Mutex<Vec<u8>>);

impl Small {
    fn with<T>(&self, offset: u64, length: u64, act: impl FnOnce(&mut [u8]) -> T) -> io::Result<T> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let end = offset.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
        let range = usize::try_from(offset).unwrap_or(usize::MAX)
            ..usize::try_from(end).unwrap_or(usize::MAX);
        bytes.get_mut(range).map(act).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl BlockDevice for Small {
    fn size(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.with(offset, buf.len() as u64, |bytes| buf.copy_from_slice(bytes))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with(offset, data.len() as u64, |bytes| bytes.copy_from_slice(data))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length, false)
    }

    fn zero(&self, offset: u64, length: u64, _allocate: bool) -> io::Result<()> {
        self.with(offset, length, |bytes| bytes.fill(0))
    }
}

/// Runs every chain of a ring in memory that begins with `bytes`.
pub(super) fn chains(bytes: &[u8]) {
    let mut content = vec![0; MEMORY];
    let length = bytes.len().min(MEMORY);
    content[..length].copy_from_slice(&bytes[..length]);
    let Ok(file) = sys::scratch(&content) else { return };
    let place = Region { guest: 0, user: 0, length: MEMORY as u64, offset: 0 };
    let memory = GuestMemory::new(None, Arc::default());
    let memory = memory.with(place, file).expect("the file has that length");
    for event_idx in [false, true] {
        let place = Place::new(&memory, SIZE, [0, 0x100, 0x200], event_idx);
        let place = place.expect("it lies in memory, aligned");
        let device = Small(Mutex::new(vec![0x5a; 256 << 10]));
        let mut used = Used::new(place.used_index());
        let manner = Manner { read_only: false, write_through: event_idx, id: [7; ID_BYTES] };
        let (mut chain, mut buffer) = (Chain::default(), Vec::new());
        for index in 0..SIZE {
            let Ok(head) = place.head(index) else { continue };
            let Ok(true) = ring::walk(&place, &memory, head, Absent::Wait, &mut chain) else {
                continue;
            };
            let Ok(request) = Request::parse(&mut chain) else { continue };
            let mut tried = request.run(&device, &memory, &manner, By::Queue, &mut buffer);
            if matches!(tried, Tried::WouldWait) {
                tried = request.run(&device, &memory, &manner, By::Worker, &mut buffer);
            }
            let (status, written) = match tried {
                Tried::Done(status, written) => (status, written),
                Tried::WouldWait => unreachable!("a worker may wait"),
                Tried::Failed(error) => panic!("what is in bounds does not fail: {error}"),
            };
            let written = request.conclude(&memory, status, written);
            used.push(&place, &memory, None, head, written);
            used.must_tell(&place);
        }
        assert!(buffer.len() <= 1 << 20, "no more than a piece is held");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> Vec<u8> {
        [
            &address.to_le_bytes()[..],
            &length.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ]
        .concat()
    }

    fn any_descriptor() -> impl Strategy<Value = Vec<u8>> {
        let address = prop_oneof![0..0x10000u64, Just(u64::MAX - 4), any::<u64>()];
        let length = prop_oneof![Just(1u32), Just(16), 0..2000u32, any::<u32>()];
        (address, length, 0..8u16, 0..20u16).prop_map(|(a, l, f, n)| descriptor(a, l, f, n))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]

        #[test]
        fn check_30_no_chain_of_descriptors_makes_it_panic_or_allocate_much(
            table in proptest::collection::vec(any_descriptor(), 16),
            heads in proptest::collection::vec(0..18u16, 16),
            rest in proptest::collection::vec(any::<u8>(), 0..4000),
            kind in 0..16u32,
        ) {
            let mut bytes = table.concat();
            bytes.extend([0, 0, 16, 0]);
            bytes.extend(heads.iter().flat_map(|head| head.to_le_bytes()));
            bytes.resize(0x400, 0);
            bytes.extend(kind.to_le_bytes());
            bytes.extend(rest);
            chains(&bytes);
        }
    }

    #[test]
    fn a_whole_read_is_done_by_what_is_fuzzed() {
        // Header at 0x400, data at 0x1000, status at 0x2000: the fuzzer reaches the device.
        let table = [
            descriptor(0x400, 16, 1, 1),
            descriptor(0x1000, 512, 3, 2),
            descriptor(0x2000, 1, 2, 0),
        ];
        chains(&table.concat());
    }
}
