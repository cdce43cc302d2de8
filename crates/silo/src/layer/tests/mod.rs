//! Tests of stacks: content against a model, through pushes, merges and every kind of crash.

mod capture;
mod kill;
mod power;
mod stacks;

use super::*;
use crate::{
    files::sim::SimFolder, io::BlockDevice, map::BootId, source::MemoryDevice,
    tests::random::Random,
};
use std::sync::Arc;

/// A base in memory with content that tells where it is from.
fn base(bytes: usize, seed: u64) -> (Base, Vec<u8>) {
    let content = Random(seed).bytes(bytes);
    let memory = MemoryDevice::new("base", bytes as u64).unwrap();
    memory.write_at(0, &content).unwrap();
    let root = crate::hash::hash_reader(&content[..]).unwrap();
    (Base::trusted(Arc::new(memory), "test base", Some(root)), content)
}

fn content_of(device: &dyn BlockDevice) -> Vec<u8> {
    let mut all = vec![0xEE; device.size() as usize];
    device.read_at(0, &mut all).unwrap();
    all
}
