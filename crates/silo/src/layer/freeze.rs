//! Freezing a stack by pushing a layer, looking at what was frozen, and merging it down again.
//!
//! ```text
//!            prepare                hold … swap             release, merge
//!   [A, B]  ─────────►  [A, B] + C  ───────────►  [A, B, C]  ────────────►  [A, C]
//!            manifest              view of A, B             B's blocks to A,
//!            lists C               is fixed                 manifest without B
//! ```

use super::{
    LayerError, Stack,
    content::Content,
    manifest::MAX_LAYERS,
    stack::{Layer, names},
};
use crate::{
    block::{BlockRange, BlockSet},
    io::{BlockDevice, Extent},
    map::{BlockState, Overlay, Tidy},
    range::{check, refuse_write},
};
use std::{
    io,
    sync::{
        Arc, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Bytes that are copied at once by a merge.
const MERGE_STEP: u64 = 1 << 20;
/// How many pushes of one stack may be made at the same time.
const PUSHES_AT_ONCE: u32 = 16;

/// A stack whose writers wait.
pub(super) struct Held<'a> {
    stack: &'a Stack,
    old: Content,
    spare: Arc<Layer>,
    since: Instant,
    swapped: bool,
    _exchange: MutexGuard<'a, ()>,
}

impl Held<'_> {
    /// Puts the new top in place and lets writers go. The second value: how long they were held.
    pub(super) fn swap(mut self) -> (View, Duration) {
        let view = View::new(self.old.clone());
        let mut layers = self.old.layers.to_vec();
        layers.push(self.spare.clone());
        self.stack.set_layers(layers);
        self.swapped = true;
        (view, self.since.elapsed())
    }
}

impl Drop for Held<'_> {
    /// Called off: writers go on where they were, and the new layer is kept for the next time.
    fn drop(&mut self) {
        if !self.swapped {
            self.old.top().locks.thaw();
            self.stack.structure().spare = Some(self.spare.clone());
        }
    }
}

impl Stack {
    /// Makes the layer that the next push takes, if there is none yet: what takes time.
    ///
    /// # Errors
    /// If its files cannot be written, or the stack is as deep as it may be.
    pub fn prepare(&self) -> Result<(), LayerError> {
        let mut structure = self.structure();
        if structure.spare.is_some() {
            return Ok(());
        }
        let layers = structure.manifest.layers.len();
        if layers >= MAX_LAYERS {
            return Err(LayerError::TooDeep { layers });
        }
        let id = structure.manifest.next;
        let mut manifest = structure.manifest.clone();
        manifest.next += 1;
        let layer = self.new_layer(&manifest, id)?;
        // Listed before it is used: an empty layer on top changes nothing.
        manifest.layers.push(id);
        manifest.write(&*self.folder)?;
        structure.manifest = manifest;
        structure.spare = Some(layer);
        Ok(())
    }

    /// Stops writers; those under way end first, or `limit` passes and all is as before.
    pub(super) fn hold(&self, limit: Duration) -> Result<Held<'_>, LayerError> {
        for _ in 0..PUSHES_AT_ONCE {
            self.prepare()?;
            let exchange = self.exchange.lock().unwrap_or_else(PoisonError::into_inner);
            // Another push may have taken the layer that was just made.
            let Some(spare) = self.structure().spare.take() else { continue };
            let (since, old) = (Instant::now(), self.content());
            let frozen = old.top().locks.freeze(limit);
            let held = Held { stack: self, old, spare, since, swapped: false, _exchange: exchange };
            return frozen.map(|()| held).map_err(LayerError::from);
        }
        Err(LayerError::Timeout { what: "another push of the same stack", limit })
    }

    /// Freezes the device as it is now and goes on in a new layer; writers wait for at most
    /// `limit`, and in fact for the writes that are under way.
    ///
    /// # Errors
    /// If writes do not end in time, or the new layer cannot be made; then nothing has changed.
    pub fn push(&self, limit: Duration) -> Result<View, LayerError> {
        Ok(self.hold(limit)?.swap().0)
    }

    /// Merges frozen layers down, until two are left or a view is in the way. Returns how many are
    /// gone. `stop` ends it early.
    ///
    /// # Errors
    /// If copying or a manifest fails; what was not merged stays as it was.
    pub fn merge(&self, stop: &AtomicBool) -> Result<usize, LayerError> {
        let mut merged = 0;
        while !stop.load(Ordering::Relaxed) && self.merge_one(stop)? {
            merged += 1;
        }
        Ok(merged)
    }

    /// Merges the lowest pair of frozen layers that nobody looks at; false if there is none.
    fn merge_one(&self, stop: &AtomicBool) -> Result<bool, LayerError> {
        let _one_at_a_time = self.merging.lock().unwrap_or_else(PoisonError::into_inner);
        let layers = self.content().layers;
        // Never the top. A view that has the lower layer has the upper one too if it is made from
        // now on, and then shows the same whether the merge is done or not.
        let free = |at: &usize| layers[*at].views.load(Ordering::Acquire) == 0;
        let Some(at) = (0..layers.len().saturating_sub(2)).find(free) else {
            return Ok(false);
        };
        let (lower, upper) = (&layers[at], &layers[at + 1]);
        lower.unsettle();
        if !copy_down(upper, lower, stop)? {
            return Ok(false);
        }
        // Not by way of the layer's own "settled": a flush beside us may just have set it.
        lower.overlay.sync(Tidy::Yes)?;
        let mut structure = self.structure();
        let mut manifest = structure.manifest.clone();
        manifest.layers.retain(|id| *id != upper.id);
        if manifest.saved == Some(upper.id) {
            manifest.saved = Some(lower.id);
        } else if manifest.saved.is_some_and(|saved| saved == lower.id) {
            // The lower one is no longer what the backup has.
            manifest.saved = None;
        }
        manifest.write(&*self.folder)?;
        structure.manifest = manifest;
        drop(structure);
        // Under the lock that a swap of the top takes: neither loses the other's change.
        let exchange = self.exchange.lock().unwrap_or_else(PoisonError::into_inner);
        let left = self.content().layers.iter().filter(|l| l.id != upper.id).cloned().collect();
        self.set_layers(left);
        drop(exchange);
        // Who still reads has the files open.
        if let Err(error) = Overlay::remove(&*self.folder, &names(upper.id)) {
            tracing::warn!(%error, layer = upper.id, "a merged layer's files stay until the next open");
        }
        Ok(true)
    }

    /// Notes that a backup has everything up to layer `id`.
    pub(super) fn note_saved(&self, id: u64) -> Result<(), LayerError> {
        let mut structure = self.structure();
        let mut manifest = structure.manifest.clone();
        if manifest.layers.contains(&id) && manifest.saved != Some(id) {
            manifest.saved = Some(id);
            manifest.write(&*self.folder)?;
            structure.manifest = manifest;
        }
        Ok(())
    }

    /// Blocks that were written since the backup that was noted last; `None` if none was.
    pub(super) fn unsaved(&self) -> Option<BlockSet> {
        let saved = self.structure().manifest.saved?;
        let mut set = BlockSet::new(self.geometry.blocks());
        for layer in self.content().layers.iter().filter(|layer| layer.id > saved) {
            set.union_with(&written(layer));
        }
        Some(set)
    }
}

/// The blocks that a layer changes.
pub(super) fn written(layer: &Layer) -> BlockSet {
    layer.overlay.states().select(&[BlockState::Data, BlockState::Zero])
}

/// Copies everything that `upper` has to `lower`. False if it was stopped.
fn copy_down(upper: &Layer, lower: &Layer, stop: &AtomicBool) -> Result<bool, LayerError> {
    let geometry = upper.overlay.geometry();
    let step = (MERGE_STEP / geometry.block()).max(1);
    let mut buf = vec![0; (step * geometry.block()) as usize];
    for (run, state) in upper.overlay.states().runs(BlockRange::new(0, geometry.blocks())) {
        for part in run.chunks(step) {
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            match state {
                BlockState::Base | BlockState::Missing => break,
                BlockState::Data => {
                    let bytes = &mut buf[..geometry.bytes_of(part) as usize];
                    upper.overlay.read(geometry.offset(part.start), bytes)?;
                    lower.overlay.write(geometry.offset(part.start), bytes)?;
                    lower.overlay.set_state(part, BlockState::Data)?;
                }
                BlockState::Zero => {
                    lower.overlay.set_state(part, BlockState::Zero)?;
                    lower.overlay.punch(part);
                }
            }
        }
    }
    Ok(true)
}

/// A stack as it was at one instant: read-only, and the same for as long as it lives.
pub struct View {
    content: Content,
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "View({} layers)", self.content.layers.len())
    }
}

impl View {
    fn new(content: Content) -> Self {
        for layer in content.layers.iter() {
            layer.views.fetch_add(1, Ordering::AcqRel);
        }
        Self { content }
    }

    /// Blocks that were written in the newest of its layers: since the push before.
    #[must_use]
    pub fn changed(&self) -> BlockSet {
        written(self.content.top())
    }

    pub(super) fn top_id(&self) -> u64 {
        self.content.top().id
    }
}

impl Drop for View {
    fn drop(&mut self) {
        for layer in self.content.layers.iter() {
            layer.views.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl BlockDevice for View {
    fn size(&self) -> u64 {
        self.content.geometry.bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check(self.size(), offset, buf.len() as u64)?;
        self.content.read(offset, buf)
    }

    fn may_wait(&self, offset: u64, length: u64) -> bool {
        self.content.may_wait(self.content.layers.len(), offset, length)
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        refuse_write("a view of a stack")
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, _offset: u64, _length: u64) -> io::Result<()> {
        refuse_write("a view of a stack")
    }

    fn zero(&self, _offset: u64, _length: u64, _allocate: bool) -> io::Result<()> {
        refuse_write("a view of a stack")
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        check(self.size(), offset, length)?;
        self.content.extents(offset, length)
    }

    fn is_read_only(&self) -> bool {
        true
    }
}
