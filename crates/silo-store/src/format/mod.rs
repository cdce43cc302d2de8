//! Bytes of stored objects. Each has a magic number and a version; golden bytes are in the tests.
//! Numbers are little-endian, `v` is LEB128. Everything is checked before it is used; the functions
//! `fuzz_…` take any bytes.

pub(crate) mod map;
pub(crate) mod pack;
pub(crate) mod runs;

/// Decodes any bytes as a pack: header, index, and chunks, under a fixed key.
pub fn fuzz_pack(bytes: &[u8]) {
    pack::fuzz(bytes);
}

/// Decodes any bytes as an opened pack index.
pub fn fuzz_pack_index(bytes: &[u8]) {
    let _ = pack::Index::decode(bytes, 16, 4 << 20);
}

/// Decodes any bytes as runs over a device.
pub fn fuzz_runs(bytes: &[u8]) {
    let mut reader = crate::wire::Reader::new(bytes);
    let mut total = 0u64;
    let _ = runs::decode(&mut reader, 0..1 << 20, 16, |run| total += run.count);
    assert!(total <= 1 << 20, "runs do not overlap and end with the device");
}

/// Decodes any bytes as an opened leaf of a map, and as a map's head.
pub fn fuzz_map(bytes: &[u8]) {
    let _ = map::decode_leaf(bytes, 0..map::LEAF_BLOCKS, |_| ());
    let _ = map::Head::decode(bytes);
}
