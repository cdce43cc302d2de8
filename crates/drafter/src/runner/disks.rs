//! The servers of a machine's disks, of the kind that the machine has for life, and what differs
//! between the kinds.
//!
//! | | NBD | vhost-user-blk |
//! |---|---|---|
//! | a disk fails | QEMU stops the machine and keeps the request | the server holds the request ([`Policied`]), the rest of the machine goes on |
//! | at a pause | QEMU waits for requests in hand, then flushes | QEMU stops the rings; [`DiskServers::after_pause`] makes sure of it, and flushes |
//! | a request waits at a pause | it is in QEMU's state, which does it again | it is put back into the guest's ring, where the next server finds it |
//! | guest memory | QEMU's own mapping | [`Pages`]: brought through the pager, writes reported to the tracking |
//! | the monitor frozen | its requests stay where they are | what is in hand goes on, to a disk that nobody else sees |

use super::hosted::fail;
use crate::{
    checkpoint::capture::DiskCopies,
    driver::{DiskKind, UrgentHelpers},
    migrate::source::MachineError,
};
use silo::{
    block::{BLOCK_SIZE, BlockRange},
    device::Device as _,
    disk::{Disk, DiskError, FlushPolicy},
    expose::vhost::{GuestPages, GuestRange, MemoryId, VhostOptions, VhostServer},
    filter::{ErrorPolicy, OnError, Policied, Trouble},
    io::BlockDevice,
    memory::Memory,
    nbd::{NbdOptions, NbdServer},
};
use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long requests in hand may take when a server ends.
const SERVER_LIMIT: Duration = Duration::from_secs(5);
/// How long the monitor may take to find its servers before a pause; it looks every second.
const FOUND_LIMIT: Duration = Duration::from_secs(10);
/// How long a server may take, after a pause, for what the monitor said last: it does not wait for
/// that itself. Microseconds, but for a computer without a processor to spare.
const REST_LIMIT: Duration = Duration::from_secs(1);
/// How long a pause waits for requests in hand before those that wait for room, or for a block, are
/// put back into the guest's ring. All others end by themselves.
const PUT_BACK_AFTER: Duration = Duration::from_millis(10);
/// How long a request waits for a page of the guest, and for room: as long as a disk waits for a
/// block. Ending the machine ends these waits.
const PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// The servers of all disks of a machine, in the order of its shape.
pub(super) enum DiskServers {
    Nbd(Vec<NbdServer>),
    VhostUser(Vec<VhostDisk>),
}

/// A disk on a vhost-user socket.
pub(super) struct VhostDisk {
    name: String,
    server: VhostServer,
    device: Arc<Policied>,
    trouble: Arc<Mutex<Option<Trouble>>>,
}

/// What the guest is served of a disk, and the disk.
type Served<'a> = (Arc<dyn BlockDevice>, &'a Arc<Disk>);

/// A request that cannot be done until somebody helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DiskTrouble {
    pub(super) disk: String,
    pub(super) operation: String,
    pub(super) detail: String,
}

impl DiskServers {
    /// Serves each disk, as `copies` has it, on a socket of its own in `run_dir`. `memory`: the
    /// machine's, for the servers that touch it.
    pub(super) fn start(
        kind: DiskKind,
        disks: &[Arc<Disk>],
        copies: &DiskCopies,
        memory: &Arc<Memory>,
        vcpus: u32,
        run_dir: &Path,
    ) -> Result<Self, MachineError> {
        let served = |at| Arc::new(copies.served(at)) as Arc<dyn BlockDevice>;
        let served: Vec<_> = (0..disks.len()).map(served).zip(disks).collect();
        match kind {
            DiskKind::Nbd => Self::start_nbd(&served, run_dir),
            DiskKind::VhostUserBlk => Self::start_vhost_user(&served, memory, vcpus, run_dir),
        }
    }

    fn start_nbd(disks: &[Served<'_>], run_dir: &Path) -> Result<Self, MachineError> {
        let start = |(device, disk): &Served<'_>| {
            ready(disk)?;
            let socket = socket(disk, run_dir).map_err(fail)?;
            NbdServer::start(&socket, Arc::clone(device), NbdOptions::default()).map_err(fail)
        };
        disks.iter().map(start).collect::<Result<_, _>>().map(Self::Nbd)
    }

    fn start_vhost_user(
        disks: &[Served<'_>],
        memory: &Arc<Memory>,
        vcpus: u32,
        run_dir: &Path,
    ) -> Result<Self, MachineError> {
        let pages: Arc<dyn GuestPages> = Arc::new(Pages::of(memory).map_err(fail)?);
        let start = |(served, disk): &Served<'_>| {
            ready(disk)?;
            let trouble = Arc::new(Mutex::new(None));
            let told = Arc::clone(&trouble);
            let name = disk.name().as_str().to_owned();
            let tell = {
                let name = name.clone();
                move |trouble: &Trouble| {
                    let mut place = told.lock().unwrap_or_else(PoisonError::into_inner);
                    if place.as_ref().is_none_or(|known: &Trouble| known.error != trouble.error) {
                        tracing::error!(
                            disk = name,
                            operation = trouble.operation,
                            error = trouble.error,
                            "a request waits"
                        );
                    }
                    *place = Some(trouble.clone());
                }
            };
            // The guest must not see what only concerns this host: another host may do better.
            let policy = ErrorPolicy {
                read: OnError::Pause,
                write: OnError::Pause,
                full: OnError::Pause,
                patience: PATIENCE,
            };
            let device = Arc::new(Policied::new(Arc::clone(served), policy, tell));
            let options = VhostOptions {
                serial: name.clone(),
                queues: u16::try_from(vcpus).unwrap_or(u16::MAX),
                put_back_after: Some(PUT_BACK_AFTER),
                pages: Some(Arc::clone(&pages)),
                // A machine's memory is a few regions, and its monitor must be able to go on with
                // another server.
                memory_slots: false,
                ..VhostOptions::default()
            };
            let served: Arc<dyn BlockDevice> = device.clone();
            let socket = socket(disk, run_dir).map_err(fail)?;
            let server = VhostServer::start(&socket, served, options).map_err(fail)?;
            Ok::<_, MachineError>(VhostDisk { name, server, device, trouble })
        };
        disks.iter().map(start).collect::<Result<_, _>>().map(Self::VhostUser)
    }

    /// Their threads that the monitor waits for when it stops and starts rings.
    pub(super) fn helpers(&self) -> UrgentHelpers {
        match self {
            Self::Nbd(_) => UrgentHelpers::default(),
            // As silo names the threads of its vhost-user servers.
            Self::VhostUser(_) => UrgentHelpers::named("silo-vhost"),
        }
    }

    /// Where the monitor finds them.
    pub(super) fn sockets(&self) -> Vec<PathBuf> {
        match self {
            Self::Nbd(servers) => servers.iter().map(|s| s.path().to_owned()).collect(),
            Self::VhostUser(disks) => disks.iter().map(|d| d.server.path().to_owned()).collect(),
        }
    }

    /// Before a pause, while the guest runs: waits until the monitor has found its servers, which
    /// after a take-over takes it a second.
    ///
    /// # Errors
    /// If a read of a vhost-user disk waits for help: what this host cannot read, it cannot send, save
    /// or back up. If the monitor does not find a server.
    pub(super) fn before_pause(&self) -> Result<(), MachineError> {
        if let Some(trouble) = self.reads_in_trouble() {
            return Err(fail(format!(
                "a {} of disk \"{}\" waits on this host ({}); mend it, then try again",
                trouble.operation, trouble.disk, trouble.detail
            )));
        }
        self.wait_for_monitor(FOUND_LIMIT)
    }

    /// After the monitor has paused the machine: makes sure that nothing touches its memory and
    /// disks any more, and flushes what the monitor does not flush by itself.
    ///
    /// # Errors
    /// If a ring still runs, or its monitor is not connected; then the machine must go on here.
    pub(super) fn after_pause(&self, disks: &[Arc<Disk>]) -> Result<(), MachineError> {
        if matches!(self, Self::Nbd(_)) {
            return Ok(());
        }
        self.at_rest()?;
        // What the guest wrote and did not flush: as QEMU does it at a stop where it has the disk.
        // Under the policy of a switchover this begins the sync and does not wait for it.
        disks.iter().try_for_each(|disk| unless_full(disk, disk.flush()))
    }

    /// After a pause: makes sure that no vhost-user disk touches memory or disk any more. (The monitor
    /// has waited for requests of NBD disks itself.)
    ///
    /// # Errors
    /// If a ring still runs, or its monitor is not connected.
    pub(super) fn at_rest(&self) -> Result<(), MachineError> {
        let Self::VhostUser(disks) = self else { return Ok(()) };
        match disks.iter().find(|disk| !disk.server.comes_to_rest(REST_LIMIT)) {
            None => Ok(()),
            Some(disk) => {
                Err(fail(format!("requests of disk \"{}\" did not end at the pause", disk.name)))
            }
        }
    }

    /// Before the machine goes on after a pause: waits until its monitor is connected, `limit` at most.
    ///
    /// # Errors
    /// If it is not in time.
    pub(super) fn before_run(&self, limit: Duration) -> Result<(), MachineError> {
        self.wait_for_monitor(limit)
    }

    /// Whether the monitor is connected to every server, and waits for no answer of one.
    pub(super) fn are_answering(&self) -> bool {
        match self {
            Self::Nbd(_) => true,
            Self::VhostUser(disks) => disks.iter().all(|disk| disk.server.is_answering()),
        }
    }

    /// Whether the monitor takes one of them for the server before it, or has just found it: see
    /// [`VhostServer::is_mistaken`].
    pub(super) fn are_mistaken(&self) -> bool {
        match self {
            Self::Nbd(_) => false,
            Self::VhostUser(disks) => disks.iter().any(|disk| disk.server.is_mistaken()),
        }
    }

    /// Waits until the monitor is connected to every server, and waits for no answer of one.
    fn wait_for_monitor(&self, limit: Duration) -> Result<(), MachineError> {
        let Self::VhostUser(disks) = self else { return Ok(()) };
        let deadline = Instant::now() + limit;
        while let Some(disk) = disks.iter().find(|disk| !disk.server.is_answering()) {
            if Instant::now() >= deadline {
                return Err(fail(format!(
                    "the monitor is not ready to use disk \"{}\" after {limit:?}; try again",
                    disk.name
                )));
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        Ok(())
    }

    /// What a request waits for; only vhost-user disks wait here.
    pub(super) fn trouble(&self) -> Option<DiskTrouble> {
        self.find_trouble(Policied::waiting)
    }

    /// The same, if a read waits.
    fn reads_in_trouble(&self) -> Option<DiskTrouble> {
        self.find_trouble(Policied::waiting_reads)
    }

    fn find_trouble(&self, waiting: fn(&Policied) -> usize) -> Option<DiskTrouble> {
        let Self::VhostUser(disks) = self else { return None };
        disks.iter().find_map(|disk| {
            if waiting(&disk.device) == 0 {
                return None;
            }
            let trouble = disk.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
            Some(DiskTrouble {
                disk: disk.name.clone(),
                operation: trouble.operation.to_owned(),
                detail: trouble.error,
            })
        })
    }

    /// Requests that wait are tried again.
    pub(super) fn try_again(&self) {
        let Self::VhostUser(disks) = self else { return };
        disks.iter().for_each(|disk| disk.device.resume());
    }

    /// Ends them, once the monitor has ended: nothing touches disks and memory after this.
    pub(super) fn stop(&mut self) {
        let failed = |error: &dyn std::fmt::Display| {
            tracing::error!(%error, "ending a block server failed");
        };
        match self {
            Self::Nbd(servers) => {
                for server in servers.drain(..) {
                    if let Err(error) = server.stop(SERVER_LIMIT) {
                        failed(&error);
                    }
                }
            }
            Self::VhostUser(disks) => {
                for disk in disks.drain(..) {
                    if let Err(error) = disk.server.stop(SERVER_LIMIT) {
                        failed(&error);
                    }
                }
            }
        }
    }
}

/// A flush or sync around a pause, where lack of room is no reason to keep the machine: flushes that
/// were answered are durable here already, and what was not flushed goes where the machine goes.
pub(super) fn unless_full(disk: &Disk, done: Result<(), DiskError>) -> Result<(), MachineError> {
    match done {
        Err(error) if error.is_full() => {
            tracing::warn!(disk = disk.name().as_str(), %error, "there is no room to flush it here");
            Ok(())
        }
        done => done.map_err(fail),
    }
}

/// Makes a disk ready to be served, whatever an earlier stay left.
fn ready(disk: &Disk) -> Result<(), MachineError> {
    if disk.is_frozen() {
        disk.thaw().map_err(fail)?;
    }
    disk.set_flush_policy(FlushPolicy::Normal);
    Ok(())
}

/// In a folder with nothing else in it: the machine's monitor sees all of that. A monitor that an earlier
/// version started looks for its disks where that had them.
fn socket(disk: &Disk, run_dir: &Path) -> io::Result<PathBuf> {
    let earlier = run_dir.join(format!("disk-{}.sock", disk.name()));
    if earlier.exists() {
        return Ok(earlier);
    }
    let folder = run_dir.join("disk");
    fs::create_dir_all(&folder)?;
    Ok(folder.join(format!("{}.sock", disk.name())))
}

/// A machine's memory as the servers of its disks touch it.
struct Pages {
    memory: Arc<Memory>,
    /// Its file.
    id: MemoryId,
}

impl Pages {
    fn of(memory: &Arc<Memory>) -> io::Result<Self> {
        let facts = memory.file().metadata()?;
        let id = MemoryId { device: facts.dev(), inode: facts.ino() };
        Ok(Self { memory: Arc::clone(memory), id })
    }

    /// The blocks of a range; `None` if it is of another file.
    fn blocks(&self, range: GuestRange) -> Option<BlockRange> {
        let block = BLOCK_SIZE as u64;
        let end = range.offset.checked_add(range.length)?.div_ceil(block);
        let start = range.offset / block;
        (range.memory == self.id).then(|| BlockRange::new(start, end - start))
    }
}

impl GuestPages for Pages {
    fn is_present(&self, range: GuestRange) -> bool {
        self.blocks(range).is_some_and(|blocks| self.memory.is_present(blocks))
    }

    fn make_present(&self, range: GuestRange) -> io::Result<()> {
        let blocks = self.blocks(range).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("{range} is not the machine's"))
        })?;
        self.memory.make_present(blocks, PATIENCE).map_err(io::Error::other)
    }

    fn wrote(&self, range: GuestRange) {
        if let Some(blocks) = self.blocks(range) {
            self.memory.note_written(blocks);
        }
    }

    fn interrupt(&self) {
        self.memory.interrupt();
    }
}
