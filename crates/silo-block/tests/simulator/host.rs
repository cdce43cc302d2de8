//! A host: what it has in memory, what it has on its disk, and the two ends that may run on it.

use crate::random::Random;
use silo_block::{
    block::{BlockIndex, BlockRange, BlockSet},
    device::DeviceName,
    geometry::Geometry,
    model::{Record, Replica},
    rounds::Epoch,
    session::{
        destination::{Destination, DestinationDevice},
        messages::{BlockHash, DeviceIndex, SessionId},
        source::{Source, SourceDevice},
    },
};
use std::collections::BTreeMap;

/// The content of a device: two halves a block.
pub(crate) type Content = Vec<[u64; 2]>;

/// What survives a crash. On a host with a journal, exactly what was made durable last. Elsewhere
/// content is written in place: what lies on the disk after a crash is, half by half, either what
/// was made durable last or what was in memory.
#[derive(Clone)]
pub(crate) struct Disk {
    pub(crate) content: Vec<Content>,
    pub(crate) records: Vec<Record>,
    /// It may run the guest.
    pub(crate) owner: bool,
    /// Authority has left by this session.
    pub(crate) handed: Option<(SessionId, Vec<Epoch>)>,
    /// It receives by this session, or has received.
    pub(crate) received: Option<(SessionId, Option<u32>)>,
    /// What a store has of the blocks that are not here.
    pub(crate) promised: Vec<(DeviceIndex, Vec<(BlockIndex, BlockHash)>)>,
    /// Blocks that were written since the records were made, noted before they were.
    pub(crate) intent: Vec<BlockSet>,
    /// The rounds that were open when somebody began to share with others.
    pub(crate) shared: Option<Vec<Epoch>>,
}

pub(crate) struct Host {
    pub(crate) up: bool,
    pub(crate) journal: bool,
    /// Counts crashes: what was begun before is void.
    pub(crate) life: u64,
    pub(crate) disk: Disk,
    pub(crate) content: Vec<Content>,
    /// The devices, when no destination has them.
    pub(crate) replicas: Vec<Replica>,
    pub(crate) source: Option<Source>,
    pub(crate) destination: Option<Destination>,
    /// Content on its way to the device.
    pub(crate) slots: BTreeMap<u64, (DeviceIndex, BlockRange, Content)>,
    pub(crate) storing: BTreeMap<u64, Storing>,
    /// Rounds to be closed, or a pause to be made, once writers let it.
    pub(crate) closing: bool,
    /// When it is woken next.
    pub(crate) wakes: u64,
    pub(crate) pausing: Option<u32>,
}

pub(crate) fn geometry(blocks: u64) -> Geometry {
    Geometry::new(blocks * 512, 512).unwrap()
}

pub(crate) fn name(device: usize) -> DeviceName {
    DeviceName::new(&format!("disk-{device}")).unwrap()
}

impl Host {
    pub(crate) fn new(sizes: &[u64], journal: bool) -> Self {
        let content: Vec<Content> = sizes.iter().map(|b| vec![[0; 2]; *b as usize]).collect();
        let replicas: Vec<Replica> =
            sizes.iter().map(|b| Replica::untouched(geometry(*b))).collect();
        let disk = Disk {
            content: content.clone(),
            records: replicas.iter().map(Replica::record).collect(),
            owner: false,
            handed: None,
            received: None,
            promised: Vec::new(),
            intent: sizes.iter().map(|blocks| BlockSet::new(*blocks)).collect(),
            shared: None,
        };
        Self {
            up: true,
            journal,
            life: 0,
            disk,
            content,
            replicas,
            source: None,
            destination: None,
            slots: BTreeMap::new(),
            storing: BTreeMap::new(),
            closing: false,
            wakes: u64::MAX,
            pausing: None,
        }
    }

    pub(crate) fn replica(&self, device: DeviceIndex) -> &Replica {
        match &self.destination {
            Some(destination) => destination.replica(device).unwrap(),
            None => &self.replicas[device.0 as usize],
        }
    }

    pub(crate) fn replica_mut(&mut self, device: DeviceIndex) -> &mut Replica {
        match &mut self.destination {
            Some(destination) => destination.replica_mut(device).unwrap(),
            None => &mut self.replicas[device.0 as usize],
        }
    }

    pub(crate) fn devices(&self) -> impl Iterator<Item = DeviceIndex> + use<> {
        (0..self.content.len()).map(|at| DeviceIndex(at as u16))
    }

    /// Notes the maps, not the content.
    pub(crate) fn note(&mut self, device: DeviceIndex) {
        self.disk.records[device.0 as usize] = self.replica(device).record();
    }

    /// Makes maps and content durable.
    pub(crate) fn persist(&mut self) {
        self.disk.content.clone_from(&self.content);
        for device in self.devices() {
            self.replica_mut(device).sync_begins();
            self.replica_mut(device).sync_ends(true);
            self.note(device);
        }
        for intent in &mut self.disk.intent {
            *intent = BlockSet::new(intent.device_blocks());
        }
    }

    pub(crate) fn note_promises(&mut self) {
        let Some(destination) = &self.destination else { return };
        let of = |device| (device, destination.promised(device));
        self.disk.promised = self.devices().map(of).collect();
    }

    pub(crate) fn take_destination(&mut self) -> Vec<DestinationDevice> {
        match self.destination.take() {
            Some(destination) => destination.into_devices(),
            None => self
                .replicas
                .drain(..)
                .enumerate()
                .map(|(at, replica)| DestinationDevice { name: name(at), base: None, replica })
                .collect(),
        }
    }

    /// The devices go back to the host: no destination has them any more.
    pub(crate) fn dissolve(&mut self) {
        if self.destination.is_some() {
            self.replicas = self.take_destination().into_iter().map(|d| d.replica).collect();
            self.slots.clear();
            self.storing.clear();
        }
    }

    pub(crate) fn source_devices(&self) -> Vec<SourceDevice> {
        self.devices()
            .map(|device| SourceDevice::new(name(device.0 as usize), None, self.replica(device)))
            .collect()
    }

    pub(crate) fn all_here(&self) -> bool {
        self.devices().all(|device| self.replica(device).absent().is_empty())
    }

    pub(crate) fn crash(&mut self, random: &mut Random) {
        self.up = false;
        self.life += 1;
        self.source = None;
        self.destination = None;
        self.replicas.clear();
        self.slots.clear();
        self.storing.clear();
        (self.closing, self.pausing, self.wakes) = (false, None, u64::MAX);
        for (durable, volatile) in self.disk.content.iter_mut().zip(&self.content) {
            for (durable, volatile) in durable.iter_mut().flatten().zip(volatile.iter().flatten()) {
                if !self.journal && random.chance(50) {
                    *durable = *volatile;
                }
            }
        }
    }

    pub(crate) fn read_records(&mut self) {
        self.up = true;
        self.content.clone_from(&self.disk.content);
        let sizes = self.content.iter().map(|content| content.len() as u64);
        let replica =
            |(size, record): (u64, &Record)| Replica::restored(geometry(size), record).unwrap();
        self.replicas = sizes.zip(&self.disk.records).map(replica).collect();
    }

    /// Everything is lost, and the host is new.
    pub(crate) fn wipe(&mut self, sizes: &[u64]) {
        let life = self.life;
        *self = Self::new(sizes, self.journal);
        self.life = life + 1;
    }
}

/// Content that is being written to a device.
pub(crate) struct Storing {
    pub(crate) device: DeviceIndex,
    pub(crate) range: BlockRange,
    pub(crate) content: Content,
    pub(crate) parts: Vec<BlockRange>,
}

impl Storing {
    /// Writes one half of every block.
    pub(crate) fn put(&self, host: &mut Host, half: usize) {
        for block in self.parts.iter().flat_map(|part| part.start.0..part.end()) {
            let value = self.content[(block - self.range.start.0) as usize][half];
            host.content[self.device.0 as usize][block as usize][half] = value;
        }
    }
}
