//! One front end: what it negotiated, its memory, its rings. The messages are read by the `vhost`
//! crate; this is what each of them does.
//!
//! A ring runs when it has a kick, an address and memory, and is enabled. It is paused and drained
//! before anything that it uses changes.

use super::{
    config,
    inflight::{self, Inflight},
    memory::{DirtyLog, GuestMemory, MAX_REGIONS, Place as RegionPlace},
    queue::{Doorbell, Queue, Setup, Work},
    request::{ID_BYTES, Manner},
    ring::Place,
    server::VhostOptions,
    sys::{self, Shared},
};
use std::{
    fs::File,
    io,
    sync::Arc,
    time::{Duration, Instant},
};
use vhost::{
    VhostUserMemoryRegionBase,
    vhost_user::{
        Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
        message::{
            VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
            VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures,
            VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion,
            VhostUserVringAddrFlags, VhostUserVringState,
        },
    },
};
use virtio_bindings::{virtio_blk::VIRTIO_BLK_F_FLUSH, virtio_ring::VIRTIO_RING_F_EVENT_IDX};

/// Entries of the largest queue (QEMU's limit).
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;

#[derive(Default)]
struct Vring {
    size: u16,
    base: u16,
    /// Descriptors, available ring, used ring: the guest's addresses.
    addresses: Option<[u64; 3]>,
    kick: Option<File>,
    call: Arc<Doorbell>,
    err: Arc<Doorbell>,
    enabled: bool,
    queue: Option<Queue>,
}

pub(super) struct Session {
    work: Arc<Work>,
    options: Arc<VhostOptions>,
    /// As the front end said; it may have said that it wants none.
    features: Option<u64>,
    memory: Arc<GuestMemory>,
    log: Arc<DirtyLog>,
    inflight: Option<Inflight>,
    vrings: Vec<Vring>,
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

impl Session {
    pub(super) fn new(work: Arc<Work>, options: Arc<VhostOptions>) -> Self {
        let log = Arc::new(DirtyLog::default());
        let memory = Arc::new(GuestMemory::new(options.pages.clone(), log.clone()));
        let vrings = (0..options.queues).map(|_| Vring::default()).collect();
        Self { work, options, features: None, memory, log, inflight: None, vrings }
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    fn read_only(&self) -> bool {
        self.options.read_only || self.work.device().is_read_only()
    }

    /// Starts a ring that has all it needs.
    fn start(&mut self, index: usize) -> Result<()> {
        let features = self.features.unwrap_or_default();
        let by_message = features & config::PROTOCOL_FEATURES != 0;
        let read_only = self.read_only();
        let vring = &mut self.vrings[index];
        let (Some(kick), Some(addresses), None) = (&vring.kick, vring.addresses, &vring.queue)
        else {
            return Ok(());
        };
        if self.memory.is_empty() || vring.size == 0 || (by_message && !vring.enabled) {
            return Ok(());
        }
        let event_idx = config::has(features, VIRTIO_RING_F_EVENT_IDX);
        let place = Place::new(&self.memory, vring.size, addresses, event_idx).map_err(broken)?;
        let inflight = match &self.inflight {
            None => None,
            Some(region) => Some(region.queue(index, vring.size).ok_or(Error::InvalidParam)?),
        };
        let mut id = [0; ID_BYTES];
        let serial = self.options.serial.as_bytes();
        let length = serial.len().min(ID_BYTES);
        id[..length].copy_from_slice(&serial[..length]);
        let setup = Setup {
            index,
            work: self.work.clone(),
            memory: self.memory.clone(),
            place,
            inflight,
            manner: Manner {
                read_only,
                write_through: !config::has(features, VIRTIO_BLK_F_FLUSH),
                id,
            },
            kick: kick.try_clone().map_err(Error::ReqHandlerError)?,
            call: vring.call.clone(),
            err: vring.err.clone(),
            base: vring.base,
        };
        vring.queue = Some(Queue::start(setup).map_err(Error::ReqHandlerError)?);
        Ok(())
    }

    /// Stops a ring once its requests are done, or put back.
    fn stop(&mut self, index: usize) -> Result<()> {
        let limit = self.options.drain_limit;
        let put_back_after = self.options.put_back_after;
        let vring = &mut self.vrings[index];
        let Some(queue) = &mut vring.queue else { return Ok(()) };
        vring.base = queue.pause();
        if !drained(queue, put_back_after, Instant::now() + limit) {
            return Err(broken(format!(
                "queue {index}: {} requests were still in hand after {limit:?}",
                queue.in_hand()
            )));
        }
        vring.base = queue.put_back();
        vring.queue = None;
        Ok(())
    }

    /// Does something that the rings must not see half done.
    fn between<T>(&mut self, change: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let running: Vec<_> =
            (0..self.vrings.len()).filter(|&index| self.vrings[index].queue.is_some()).collect();
        for &index in &running {
            self.stop(index)?;
        }
        let result = change(self)?;
        for index in running {
            self.start(index)?;
        }
        Ok(result)
    }

    /// Takes no more requests.
    pub(super) fn pause(&mut self) {
        for vring in &mut self.vrings {
            if let Some(queue) = &mut vring.queue {
                vring.base = queue.pause();
            }
        }
    }

    /// Whether no ring runs; one whose requests are not done yet counts as running.
    pub(super) fn is_at_rest(&self) -> bool {
        self.vrings.iter().all(|vring| vring.queue.is_none())
    }

    /// Requests in hand, of all rings.
    pub(super) fn in_hand(&self) -> u32 {
        self.vrings.iter().filter_map(|vring| vring.queue.as_ref()).map(Queue::in_hand).sum()
    }

    /// After [`Session::pause`]: waits a while; true when nothing is in hand any more. What was set
    /// aside stays in the record for the front end's next session.
    pub(super) fn drain(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        self.vrings
            .iter()
            .filter_map(|vring| vring.queue.as_ref())
            .all(|queue| drained(queue, self.options.put_back_after, deadline))
    }

    /// What is still in hand does not reach the guest any more.
    pub(super) fn abandon(&self) {
        for queue in self.vrings.iter().filter_map(|vring| vring.queue.as_ref()) {
            queue.abandon();
        }
    }

    fn add_region(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<GuestMemory> {
        let place = place_of(region);
        self.memory.with(place, file).map_err(Error::ReqHandlerError)
    }
}

/// Waits until nothing of a queue is in hand, if need be by ending waits.
fn drained(queue: &Queue, put_back_after: Option<Duration>, deadline: Instant) -> bool {
    match put_back_after {
        None => queue.drain(deadline),
        Some(grace) => queue.drain_or_call_off(grace, deadline),
    }
}

fn place_of(region: &VhostUserMemoryRegion) -> RegionPlace {
    RegionPlace {
        guest: region.guest_phys_addr,
        user: region.user_addr,
        length: region.memory_size,
        offset: region.mmap_offset,
    }
}

fn unsupported<T>() -> Result<T> {
    Err(Error::InvalidOperation("not offered"))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated, and by the specification ignored or an end of all rings.
        for index in 0..self.vrings.len() {
            self.stop(index)?;
        }
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config::features(self.read_only()))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !config::features(self.read_only()) != 0 {
            return Err(Error::InvalidParam);
        }
        // Only the log may change under running rings: a migration begins or ends.
        let changed = (self.features.unwrap_or_default() ^ features) & !config::LOG_ALL;
        self.log.set_wanted(features & config::LOG_ALL != 0);
        if changed == 0 {
            self.features = Some(features);
            return Ok(());
        }
        self.between(|session| {
            session.features = Some(features);
            Ok(())
        })?;
        if features & config::PROTOCOL_FEATURES == 0 {
            for index in 0..self.vrings.len() {
                self.start(index)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut memory = GuestMemory::new(self.options.pages.clone(), self.log.clone());
        for (region, file) in regions.iter().zip(files) {
            memory = memory
                .with_known(place_of(region), file, &self.memory)
                .map_err(Error::ReqHandlerError)?;
        }
        self.between(|session| {
            session.memory = Arc::new(memory);
            Ok(None)
        })
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        if size == 0 || size > MAX_QUEUE_SIZE || !size.is_power_of_two() {
            return Err(Error::InvalidParam);
        }
        self.vring(index)?;
        self.stop(index as usize)?;
        self.vring(index)?.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let mut addresses = [0; 3];
        for (guest, user) in addresses.iter_mut().zip([descriptor, available, used]) {
            *guest = self.memory.guest_address(user).ok_or(Error::InvalidParam)?;
        }
        let vring = self.vring(index)?;
        if vring.addresses == Some(addresses) {
            return Ok(()); // the log's flag changes under a running ring
        }
        self.stop(index as usize)?;
        self.vring(index)?.addresses = Some(addresses);
        self.start(index as usize)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.vring(index)?;
        self.stop(index as usize)?;
        self.vring(index)?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        if self.features.is_none() {
            // It takes us for the server before us; any answer would be believed.
            return Err(Error::InvalidOperation("a ring that nobody has told us of"));
        }
        self.stop(index as usize)?;
        let vring = self.vring(index)?;
        vring.kick = None;
        vring.call.replace(None);
        Ok(VhostUserVringState::new(index, vring.base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.vring(index.into())?;
        self.stop(index.into())?;
        // Without a descriptor we would have to poll for ever: such a ring does not start.
        self.vring(index.into())?.kick = file;
        self.start(index.into())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let call = &self.vring(index.into())?.call;
        call.replace(file);
        // A ring runs before it comes: what was handed back meanwhile was told to nobody, and a
        // driver with nothing else under way would wait for ever.
        call.ring();
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.vring(index.into())?.err.replace(file);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(config::protocol_features(self.options.memory_slots))
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = config::protocol_features(self.options.memory_slots);
        if features & !offered.bits() != 0 {
            return Err(Error::InvalidParam);
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.options.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?;
        if !enable {
            self.stop(index as usize)?;
        }
        self.vring(index)?.enabled = enable;
        self.start(index as usize)
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let space = config::space(self.work.device().size(), self.options.queues);
        Ok(config::part(&space, offset, size))
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        unsupported() // the write-back switch is not offered
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (asked.num_queues, asked.queue_size);
        if queues == 0 || queues > self.options.queues || size == 0 || size > MAX_QUEUE_SIZE {
            return Err(Error::InvalidParam);
        }
        let bytes = inflight::queue_bytes(size) * usize::from(queues);
        let file = sys::scratch(&vec![0; bytes]).map_err(Error::ReqHandlerError)?;
        Ok((VhostUserInflight::new(bytes as u64, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (given.num_queues, given.queue_size);
        if queues == 0 || queues > self.options.queues || size == 0 || size > MAX_QUEUE_SIZE {
            return Err(Error::InvalidParam);
        }
        let map = Shared::map(file, given.mmap_offset, given.mmap_size)
            .map_err(Error::ReqHandlerError)?;
        let region = Inflight::new(map, queues, size).map_err(Error::ReqHandlerError)?;
        self.between(|session| {
            session.inflight = Some(region);
            Ok(())
        })
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let memory = self.add_region(region, file)?;
        self.between(|session| {
            session.memory = Arc::new(memory);
            Ok(None)
        })
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self
            .memory
            .without(region.guest_phys_addr, region.memory_size)
            .ok_or(Error::InvalidParam)?;
        self.between(|session| {
            session.memory = Arc::new(memory);
            Ok(())
        })
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let map =
            Shared::map(file, log.mmap_offset, log.mmap_size).map_err(Error::ReqHandlerError)?;
        self.log.replace(map);
        Ok(())
    }
}
