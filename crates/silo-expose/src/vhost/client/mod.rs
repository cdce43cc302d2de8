//! The other end: a front end and a driver in one, on the `vhost` crate's front end. It measures
//! vhost-user-blk servers (ours and QEMU's) with the same work, and tests ours without a guest.
//!
//! A [`VhostClient`] has memory of its own with the rings and a slot of data for each request that
//! can be under way. [`VhostClient::reconnect`] does what QEMU does when its server was killed: the
//! same memory and the same record of requests in hand go to the next server.

mod queue;

pub use queue::ClientQueue;

use super::sys::{self, Shared};
use std::{
    fs::File,
    io::{self, Read},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
    time::Duration,
};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{
            VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight,
            VhostUserProtocolFeatures, VhostUserVirtioFeatures,
        },
    },
};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_WRITE_ZEROES,
    },
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The guest address of the client's memory: not 0, as it is with most guests.
const GUEST_BASE: u64 = 1 << 32;
/// An address that stands for the client's own mapping; only differences to it matter.
const USER_BASE: u64 = 0x7f00_0000_0000;
/// How long an answer to a message may take.
const ANSWER: Duration = Duration::from_secs(30);

/// How a client asks.
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    /// Queues.
    pub queues: u16,
    /// Entries of each; a power of two. A third of it can be under way.
    pub entries: u16,
    /// Most bytes of data of a request.
    pub slot_bytes: usize,
    /// Use event indices instead of flags.
    pub event_idx: bool,
    /// Put descriptors in tables of their own, as guests do.
    pub indirect: bool,
    /// Know FLUSH; a driver that does not expects each write to be durable.
    pub flush: bool,
    /// Have requests in hand recorded, where the server can.
    pub inflight: bool,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            queues: 1,
            entries: 128,
            slot_bytes: 1 << 20,
            event_idx: true,
            indirect: false,
            flush: true,
            inflight: true,
        }
    }
}

/// What can be asked for; `sector` and data are given apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Reads into the slot's data.
    Read,
    /// Writes the slot's data.
    Write,
    /// Makes everything durable.
    Flush,
    /// The serial number.
    Id,
    /// The slot's data are ranges of 16 bytes.
    Discard,
    /// As [`Ask::Discard`].
    WriteZeroes,
    /// A type of the caller's own, with data that is read from the slot.
    Raw(u32),
}

impl Ask {
    fn number(self) -> u32 {
        match self {
            Self::Read => VIRTIO_BLK_T_IN,
            Self::Write => VIRTIO_BLK_T_OUT,
            Self::Flush => VIRTIO_BLK_T_FLUSH,
            Self::Id => VIRTIO_BLK_T_GET_ID,
            Self::Discard => VIRTIO_BLK_T_DISCARD,
            Self::WriteZeroes => VIRTIO_BLK_T_WRITE_ZEROES,
            Self::Raw(number) => number,
        }
    }
}

fn other(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

/// A front end with its memory.
pub struct VhostClient {
    options: ClientOptions,
    frontend: Frontend,
    file: File,
    // Spans of the queues point into it.
    _memory: Shared,
    memory_bytes: u64,
    /// The record of requests in hand, if the server keeps one.
    record: Option<(VhostUserInflight, File)>,
    /// Messages from the server.
    channel: Option<UnixStream>,
    /// What was agreed on.
    features: u64,
    /// The queues.
    pub queues: Vec<ClientQueue>,
}

impl VhostClient {
    /// Connects to a server and starts all queues.
    ///
    /// # Errors
    /// If the server is not there, refuses something, or does not answer.
    pub fn connect(path: &Path, options: ClientOptions) -> io::Result<Self> {
        let bytes = ClientQueue::bytes(&options) * usize::from(options.queues);
        let file = sys::scratch(&[])?;
        file.set_len(bytes as u64)?;
        Self::connect_with(path, options, file)
    }

    /// As [`VhostClient::connect`], with memory from the caller: see [`VhostClient::bytes`].
    ///
    /// # Errors
    /// As [`VhostClient::connect`].
    pub fn connect_with(path: &Path, options: ClientOptions, file: File) -> io::Result<Self> {
        let each = ClientQueue::bytes(&options);
        let bytes = each * usize::from(options.queues);
        let memory = Shared::map(file.try_clone()?, 0, bytes as u64)?;
        let mut queues = Vec::new();
        for index in 0..usize::from(options.queues) {
            queues.push(ClientQueue {
                index,
                options,
                span: memory.span().part(index * each, each),
                guest: GUEST_BASE + (index * each) as u64,
                kick: EventFd::new(EFD_NONBLOCK)?,
                call: EventFd::new(EFD_NONBLOCK)?,
                next_available: 0,
                kicked: 0,
                next_used: 0,
                free: (0..ClientQueue::slots(options.entries)).rev().collect(),
            });
        }
        let mut client = Self {
            options,
            frontend: dial(path, options.queues)?,
            file,
            _memory: memory,
            memory_bytes: bytes as u64,
            record: None,
            channel: None,
            features: 0,
            queues,
        };
        client.shake()?;
        Ok(client)
    }

    /// The same machine on another host: its rings as they stand, in memory that is mapped already
    /// and is not touched here before the server is asked.
    #[cfg(test)]
    pub(super) fn moved_to(&self, path: &Path, file: File, memory: &Shared) -> io::Result<Self> {
        let each = ClientQueue::bytes(&self.options);
        let mut queues = Vec::new();
        for (index, queue) in self.queues.iter().enumerate() {
            queues.push(ClientQueue {
                span: memory.span().part(index * each, each),
                kick: EventFd::new(EFD_NONBLOCK)?,
                call: EventFd::new(EFD_NONBLOCK)?,
                free: queue.free.clone(),
                ..*queue
            });
        }
        let mut client = Self {
            options: self.options,
            frontend: dial(path, self.options.queues)?,
            _memory: Shared::map(file.try_clone()?, 0, self.memory_bytes)?,
            file,
            memory_bytes: self.memory_bytes,
            record: None,
            channel: None,
            features: 0,
            queues,
        };
        client.shake()?;
        Ok(client)
    }

    /// Bytes of memory that a client with these options needs.
    #[must_use]
    pub fn bytes(options: &ClientOptions) -> u64 {
        (ClientQueue::bytes(options) * usize::from(options.queues)) as u64
    }

    /// Connects again after the server ended: the same memory, the same record of requests in
    /// hand. What was under way is answered by the next server.
    ///
    /// # Errors
    /// As [`VhostClient::connect`].
    pub fn reconnect(&mut self, path: &Path) -> io::Result<()> {
        self.frontend = dial(path, self.options.queues)?;
        self.shake()
    }

    /// Connects to a server as [`sys::replace`] says, and says nothing: as QEMU does that lost the server
    /// before while its machine stood still.
    #[cfg(test)]
    pub(super) fn connect_silently(&mut self, path: &Path) -> io::Result<()> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        sys::replace(&self.frontend, &stream)
    }

    /// Begins on a connection that was made so, in QEMU's order: with all but what was agreed on.
    #[cfg(test)]
    pub(super) fn go_on(&mut self) -> io::Result<()> {
        self.frontend.set_features(self.features).map_err(other)?;
        if let Some((record, file)) = &self.record {
            self.frontend.set_inflight_fd(record, file.as_raw_fd()).map_err(other)?;
        }
        self.begin()
    }

    fn shake(&mut self) -> io::Result<()> {
        let options = self.options;
        let frontend = &mut self.frontend;
        frontend.set_owner().map_err(other)?;
        let offered = frontend.get_features().map_err(other)?;
        let mut wanted = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_RO,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
            VIRTIO_BLK_F_MQ,
        ];
        for (wish, bit) in [
            (options.event_idx, VIRTIO_RING_F_EVENT_IDX),
            (options.indirect, VIRTIO_RING_F_INDIRECT_DESC),
            (options.flush, VIRTIO_BLK_F_FLUSH),
        ] {
            if wish {
                wanted.push(bit);
            }
        }
        let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.features = offered & wanted.iter().fold(protocol_bit, |all, bit| all | 1 << bit);
        let needed = wanted.iter().filter(|bit| {
            [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC].contains(bit)
        });
        for bit in needed {
            if offered & (1 << bit) == 0 {
                return Err(other(format!("the server does not offer feature {bit}")));
            }
        }
        let protocol = frontend.get_protocol_features().map_err(other)?
            & (VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        frontend.set_protocol_features(protocol).map_err(other)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair()?;
            frontend.set_backend_request_fd(&theirs).map_err(other)?;
            self.channel = Some(ours);
        }
        if options.inflight && protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            if self.record.is_none() {
                let asked = VhostUserInflight::new(0, 0, options.queues, options.entries);
                self.record = Some(frontend.get_inflight_fd(&asked).map_err(other)?);
            }
            if let Some((record, file)) = &self.record {
                frontend.set_inflight_fd(record, file.as_raw_fd()).map_err(other)?;
            }
        }
        self.begin()
    }

    fn begin(&mut self) -> io::Result<()> {
        self.frontend.set_features(self.features).map_err(other)?;
        self.share_memory()?;
        for index in 0..self.queues.len() {
            self.start_queue(index)?;
        }
        Ok(())
    }

    fn share_memory(&self) -> io::Result<()> {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: self.memory_bytes,
            userspace_addr: USER_BASE,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).map_err(other).map(drop)
    }

    fn start_queue(&mut self, index: usize) -> io::Result<()> {
        let queue = &self.queues[index];
        let frontend = &mut self.frontend;
        let user = USER_BASE + (queue.guest - GUEST_BASE);
        let place = VringConfigData {
            queue_max_size: self.options.entries,
            queue_size: self.options.entries,
            flags: 0,
            desc_table_addr: user,
            avail_ring_addr: user + queue.available_at() as u64,
            used_ring_addr: user + queue.used_at() as u64,
            log_addr: None,
        };
        frontend.set_vring_num(index, self.options.entries).map_err(other)?;
        // As QEMU after the loss of a server: what is not in the used ring was not taken.
        frontend.set_vring_base(index, queue.used_index()).map_err(other)?;
        frontend.set_vring_addr(index, &place).map_err(other)?;
        frontend.set_vring_call(index, &queue.call).map_err(other)?;
        frontend.set_vring_kick(index, &queue.kick).map_err(other)?;
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            frontend.set_vring_enable(index, true).map_err(other)?;
        }
        Ok(())
    }

    /// Stops a queue; the server answers once nothing of it is in hand. Gives the server's index.
    ///
    /// # Errors
    /// If the server does not answer.
    pub fn stop_queue(&mut self, index: usize) -> io::Result<u16> {
        self.frontend.get_vring_base(index).map(|base| base as u16).map_err(other)
    }

    /// Starts a queue that was stopped.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn restart_queue(&mut self, index: usize) -> io::Result<()> {
        self.start_queue(index)
    }

    /// Gives the server the same memory once more, under running queues.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn share_memory_again(&mut self) -> io::Result<()> {
        self.share_memory()
    }

    /// The front end itself, for messages that this client does not send.
    pub fn frontend(&mut self) -> &mut Frontend {
        &mut self.frontend
    }

    /// Agrees on the dirty log too, which only a monitor that migrates has a use for.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn enable_log(&mut self) -> io::Result<()> {
        let protocol = self.frontend.get_protocol_features().map_err(other)?;
        let without = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        self.frontend.set_protocol_features(protocol & !without).map_err(other)
    }

    /// What was agreed on.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The device's configuration: `struct virtio_blk_config`.
    ///
    /// # Errors
    /// If the server does not answer.
    pub fn config(&mut self) -> io::Result<[u8; 60]> {
        let mut out = [0; 60];
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) = self.frontend.get_config(0, 60, flags, &out).map_err(other)?;
        let length = bytes.len().min(60);
        out[..length].copy_from_slice(&bytes[..length]);
        Ok(out)
    }

    /// The device's size in bytes.
    ///
    /// # Errors
    /// As [`VhostClient::config`].
    pub fn capacity(&mut self) -> io::Result<u64> {
        let config = self.config()?;
        Ok(u64::from_le_bytes(config[..8].try_into().map_err(other)?) * 512)
    }

    /// Waits for the server to say that the configuration has changed.
    ///
    /// # Errors
    /// If it does not, or says something else.
    pub fn await_config_change(&mut self, limit: Duration) -> io::Result<()> {
        let channel = self.channel.as_mut().ok_or_else(|| other("no channel was agreed on"))?;
        channel.set_read_timeout(Some(limit))?;
        let mut message = [0; 12];
        channel.read_exact(&mut message)?;
        let request = u32::from_le_bytes([message[0], message[1], message[2], message[3]]);
        if request == 2 { Ok(()) } else { Err(other(format!("request {request} came"))) }
    }
}

fn dial(path: &Path, queues: u16) -> io::Result<Frontend> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    Ok(Frontend::from_stream(stream, queues.into()))
}
