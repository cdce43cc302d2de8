//! The guest's memory as the front end described it: regions, translation of addresses, and the
//! two who want to know what the server writes there: [`GuestPages`], and the dirty log that QEMU
//! asks for while it migrates.
//!
//! An instance does not change; a new memory table makes a new one, and requests in hand keep
//! theirs.

use super::{
    pages::{GuestPages, GuestRange, MemoryId},
    sys::{Shared, Span},
};
use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// Bytes for which one bit of the dirty log stands (vhost-user: `VHOST_LOG_PAGE`).
const LOG_PAGE: u64 = 4096;
/// Most regions of a table (vhost-user: 8 in one message, QEMU's limit of slots 509).
pub(super) const MAX_REGIONS: usize = 509;

/// Where a region lies, in the words of the front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The guest's address.
    pub(super) guest: u64,
    /// The address in the front end's process, which it uses for rings.
    pub(super) user: u64,
    pub(super) length: u64,
    /// From the start of the file.
    pub(super) offset: u64,
}

#[derive(Debug)]
struct Region {
    place: Place,
    memory: MemoryId,
    map: Shared,
}

/// The log of pages that the server wrote: a bit a page, shared with the front end.
#[derive(Default)]
pub(super) struct DirtyLog {
    /// Asked for with the features.
    wanted: AtomicBool,
    map: RwLock<Option<Shared>>,
}

impl DirtyLog {
    pub(super) fn set_wanted(&self, wanted: bool) {
        self.wanted.store(wanted, Ordering::SeqCst);
    }

    pub(super) fn replace(&self, map: Shared) {
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = Some(map);
    }

    fn mark(&self, guest: u64, length: u64) {
        if length == 0 || !self.wanted.load(Ordering::SeqCst) {
            return;
        }
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let Some(map) = map.as_ref() else { return };
        let span = map.span();
        for page in guest / LOG_PAGE..=(guest + (length - 1)) / LOG_PAGE {
            let byte = (page / 8) as usize;
            if byte >= span.len() {
                tracing::warn!(page, "the front end's dirty log is too short");
                return;
            }
            span.u8_at(byte).fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }
}

/// All regions of one guest.
pub(super) struct GuestMemory {
    /// By the guest's address, without overlap.
    regions: Vec<Arc<Region>>,
    pages: Option<Arc<dyn GuestPages>>,
    log: Arc<DirtyLog>,
}

impl GuestMemory {
    /// No region yet.
    pub(super) fn new(pages: Option<Arc<dyn GuestPages>>, log: Arc<DirtyLog>) -> Self {
        Self { regions: Vec::new(), pages, log }
    }

    /// The same with one region more.
    ///
    /// # Errors
    /// If it cannot be mapped, overlaps another, or there are too many.
    pub(super) fn with(&self, place: Place, file: File) -> io::Result<Self> {
        self.with_known(place, file, self)
    }

    /// The same; a region that `known` has is not mapped anew, which would have the kernel find each of
    /// its pages again: a monitor that stops its machine for a moment tells all of them again.
    ///
    /// # Errors
    /// As [`GuestMemory::with`].
    pub(super) fn with_known(&self, place: Place, file: File, known: &Self) -> io::Result<Self> {
        let refused = |why: &str| {
            let text = format!("memory region of {} at {:#x}: {why}", place.length, place.guest);
            Err(io::Error::new(io::ErrorKind::InvalidInput, text))
        };
        let (Some(end), Some(_)) =
            (place.guest.checked_add(place.length), place.user.checked_add(place.length))
        else {
            return refused("it ends beyond the last address");
        };
        if self.regions.len() >= MAX_REGIONS {
            return refused("there are too many");
        }
        let overlaps = |other: &Arc<Region>| {
            place.guest < other.place.guest + other.place.length && other.place.guest < end
        };
        if self.regions.iter().any(overlaps) {
            return refused("it overlaps another");
        }
        let metadata = file.metadata()?;
        let memory = MemoryId { device: metadata.dev(), inode: metadata.ino() };
        let is_same = |other: &&Arc<Region>| other.place == place && other.memory == memory;
        let region = match known.regions.iter().find(is_same) {
            // Its file is mapped there, so no other can have got its number meanwhile.
            Some(region) => Arc::clone(region),
            None => {
                let map = Shared::map(file, place.offset, place.length)?;
                Arc::new(Region { place, memory, map })
            }
        };
        let mut regions = self.regions.clone();
        regions.push(region);
        regions.sort_by_key(|region| region.place.guest);
        Ok(Self { regions, pages: self.pages.clone(), log: self.log.clone() })
    }

    /// The same without the region at `guest`, of that length.
    pub(super) fn without(&self, guest: u64, length: u64) -> Option<Self> {
        let mut regions = self.regions.clone();
        regions.retain(|region| (region.place.guest, region.place.length) != (guest, length));
        (regions.len() < self.regions.len()).then(|| Self {
            regions,
            pages: self.pages.clone(),
            log: self.log.clone(),
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Whether accesses may have to wait for pages.
    pub(super) fn is_paged(&self) -> bool {
        self.pages.is_some()
    }

    fn region(&self, guest: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|region| region.place.guest <= guest);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (guest - region.place.guest < region.place.length).then_some(region)
    }

    /// Adds the spans of a range of guest addresses; more than one if it crosses regions. False if
    /// a part of it is no memory; then `spans` may have grown.
    pub(super) fn translate(&self, mut guest: u64, mut length: u64, spans: &mut Vec<Span>) -> bool {
        while length > 0 {
            let Some(region) = self.region(guest) else { return false };
            let inside = guest - region.place.guest;
            let count = length.min(region.place.length - inside);
            spans.push(region.map.span().part(inside as usize, count as usize));
            length -= count;
            // No overflow: a region's end is an address.
            guest += count;
        }
        true
    }

    /// The one span of a range that lies within a region.
    pub(super) fn one(&self, guest: u64, length: u64) -> Option<Span> {
        let region = self.region(guest)?;
        let inside = guest - region.place.guest;
        (length <= region.place.length - inside)
            .then(|| region.map.span().part(inside as usize, length as usize))
    }

    /// The guest's address of an address in the front end's process.
    pub(super) fn guest_address(&self, user: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let inside = user.checked_sub(region.place.user)?;
            (inside < region.place.length).then(|| region.place.guest + inside)
        })
    }

    /// Of the spans' ranges, as the pager knows them.
    fn range(&self, span: Span) -> Option<(GuestRange, u64)> {
        self.regions.iter().find_map(|region| {
            let inside = span.address().checked_sub(region.map.span().address())? as u64;
            (inside < region.place.length).then(|| {
                let offset = region.place.offset + inside;
                let length = span.len() as u64;
                (GuestRange { memory: region.memory, offset, length }, region.place.guest + inside)
            })
        })
    }

    /// Whether all of it is certainly present.
    pub(super) fn is_present(&self, spans: &[Span]) -> bool {
        let Some(pages) = &self.pages else { return true };
        spans.iter().all(|&span| {
            span.len() == 0 || self.range(span).is_some_and(|(range, _)| pages.is_present(range))
        })
    }

    /// Makes all of it present; waits for the pager.
    ///
    /// # Errors
    /// If the pager cannot.
    pub(super) fn make_present(&self, spans: &[Span]) -> io::Result<()> {
        let Some(pages) = &self.pages else { return Ok(()) };
        for &span in spans.iter().filter(|span| span.len() > 0) {
            if let Some((range, _)) = self.range(span)
                && !pages.is_present(range)
            {
                pages.make_present(range)?;
            }
        }
        Ok(())
    }

    /// Tells who wants to know that the server wrote there.
    pub(super) fn wrote(&self, span: Span) {
        if self.pages.is_none() && !self.log.wanted.load(Ordering::Relaxed) {
            return;
        }
        let Some((range, guest)) = self.range(span) else { return };
        if let Some(pages) = &self.pages {
            pages.wrote(range);
        }
        self.log.mark(guest, range.length);
    }

    /// As [`GuestMemory::wrote`], for the first `bytes` of many spans.
    pub(super) fn wrote_many(&self, spans: &[Span], mut bytes: usize) {
        for &span in spans {
            let part = span.part(0, bytes);
            if part.len() > 0 {
                self.wrote(part);
            }
            bytes -= part.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(guest: u64, length: u64, offset: u64) -> Place {
        Place { guest, user: 0x7000_0000_0000u64.wrapping_add(guest), length, offset }
    }

    fn memory() -> GuestMemory {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        GuestMemory::new(None, Arc::default())
            .with(place(0, 0x8000, 0), file.try_clone().unwrap())
            .unwrap()
            .with(place(0x8000, 0x1000, 0x10000), file)
            .unwrap()
    }

    #[test]
    fn a_range_over_two_regions_is_two_spans_and_one_past_the_end_is_refused() {
        let memory = memory();
        let mut spans = Vec::new();
        assert!(memory.translate(0x7ff0, 0x20, &mut spans));
        assert_eq!(spans.iter().map(|span| span.len()).collect::<Vec<_>>(), [16, 16]);
        assert!(!memory.translate(0x8ff0, 0x11, &mut spans));
        assert!(!memory.translate(u64::MAX, 1, &mut spans));
        assert!(memory.one(0x7ff0, 0x20).is_none() && memory.one(0x7ff0, 0x10).is_some());
        assert_eq!(memory.guest_address(0x7000_0000_8004), Some(0x8004));
        assert_eq!(memory.guest_address(0x7000_0000_9000), None);
    }

    #[test]
    fn regions_that_overlap_wrap_or_are_longer_than_their_file_are_refused() {
        let memory = memory();
        let file = || {
            let file = tempfile::tempfile().unwrap();
            file.set_len(0x1000).unwrap();
            file
        };
        assert!(memory.with(place(0x8fff, 0x1000, 0), file()).is_err());
        assert!(memory.with(place(u64::MAX - 10, 0x1000, 0), file()).is_err());
        assert!(memory.with(place(0x10000, 0x1001, 0), file()).is_err(), "it would be a SIGBUS");
        assert!(memory.with(place(0x10000, 0, 0), file()).is_err());
        let grown = memory.with(place(0x10000, 0x1000, 0), file()).unwrap();
        assert!(grown.one(0x10fff, 1).is_some());
        assert!(grown.without(0x10000, 0x1000).unwrap().one(0x10fff, 1).is_none());
        assert!(grown.without(0x10000, 0x2000).is_none());
    }

    #[test]
    fn the_dirty_log_has_a_bit_for_each_page_that_was_written_and_no_other() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let memory = memory();
        let mut spans = Vec::new();
        assert!(memory.translate(0x7fff, 2, &mut spans));
        memory.log.replace(Shared::map(file.try_clone().unwrap(), 0, 4096).unwrap());
        memory.wrote_many(&spans, 2);
        let log = |index: usize| {
            let mut bytes = [0; 4096];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
            bytes[index]
        };
        assert_eq!((log(0), log(1)), (0, 0), "nobody asked yet");
        memory.log.set_wanted(true);
        memory.wrote_many(&spans, 1);
        assert_eq!((log(0), log(1)), (0x80, 0));
        memory.wrote_many(&spans, 2);
        assert_eq!((log(0), log(1)), (0x80, 1));
    }
}
