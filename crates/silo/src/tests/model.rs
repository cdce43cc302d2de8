//! What a device must hold, and what it may hold after a crash, by sectors.

const SECTOR: usize = 512;

/// What the device must hold, and what it may hold after a crash.
pub(crate) struct Model {
    pub(crate) now: Vec<u8>,
    /// Per sector: its content at the last flush, and everything it held since.
    may: Vec<Vec<Vec<u8>>>,
}

impl Model {
    pub(crate) fn new(now: Vec<u8>) -> Self {
        let mut model = Self { now, may: Vec::new() };
        model.flushed();
        model
    }

    fn sectors(&self) -> impl Iterator<Item = &[u8]> {
        self.now.chunks(SECTOR)
    }

    pub(crate) fn flushed(&mut self) {
        self.may = self.sectors().map(|sector| vec![sector.to_vec()]).collect();
    }

    pub(crate) fn put(&mut self, offset: usize, data: &[u8]) {
        self.now[offset..offset + data.len()].copy_from_slice(data);
        for index in offset / SECTOR..(offset + data.len()).div_ceil(SECTOR) {
            let end = (index * SECTOR + SECTOR).min(self.now.len());
            let sector = self.now[index * SECTOR..end].to_vec();
            self.may[index].push(sector);
        }
    }

    pub(crate) fn crashed(&mut self, found: Vec<u8>, context: &str) {
        assert_eq!(found.len(), self.now.len());
        for (index, sector) in found.chunks(SECTOR).enumerate() {
            let allowed = &self.may[index];
            assert!(
                allowed.iter().any(|version| version == sector),
                "{context}: sector {index} holds none of its {} allowed versions: {:?} …",
                allowed.len(),
                &sector[..8.min(sector.len())]
            );
        }
        self.now = found;
        self.flushed();
    }
}
