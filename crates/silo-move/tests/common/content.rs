//! What devices hold in tests.

use super::{MIB, Random, memory::Memory};
use silo_block::io::BlockDevice;
use std::sync::Arc;

/// A device with noise, repeats and untouched parts.
pub fn filled(size: u64, seed: u64) -> Arc<Memory> {
    let device = Arc::new(Memory::new(size));
    fill(&*device, seed);
    device
}

/// Noise, repeats and untouched parts.
pub fn fill(device: &dyn BlockDevice, seed: u64) {
    let mut random = Random(seed);
    let mut chunk = vec![0; 64 << 10];
    let (mut at, size) = (0, device.size());
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
}

/// Noise everywhere.
pub fn noise(size: u64, seed: u64) -> Arc<Memory> {
    let device = Arc::new(Memory::new(size));
    let mut chunk = vec![0; MIB as usize];
    let mut random = Random(seed);
    for at in (0..size).step_by(MIB as usize) {
        random.fill(&mut chunk);
        let length = (size - at).min(MIB) as usize;
        device.write_at(at, &chunk[..length]).unwrap();
    }
    device
}
