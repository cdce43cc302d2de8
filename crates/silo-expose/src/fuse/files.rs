//! The file system: a folder with one file. Called by `fuser`'s threads, which never wait here for
//! more than a file: what may take longer goes to the pool.

use super::Caching;
use crate::pool::Pool;
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use silo_block::io::{Allocation, BlockDevice};
use std::{
    ffi::OsStr,
    io,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

const FILE: INodeNo = INodeNo(2);
/// Nothing but this server changes what it says of its files.
const FOREVER: Duration = Duration::from_secs(3600);
/// Longest read or write that the kernel sends; its own limit is 1 MiB by default.
const MAX_REQUEST: u32 = 1 << 20;
/// Requests that the kernel sends ahead: read-ahead, write-back.
const BACKGROUND: u16 = 64;
const BLOCK: u64 = 4096;

/// Counts requests on their way to the device, and keeps further ones out once it is closed.
#[derive(Default)]
pub(super) struct Gate {
    state: Mutex<(bool, usize)>,
    left: Condvar,
}

/// A request on its way.
struct Pass(Arc<Gate>);

impl Gate {
    fn enter(self: &Arc<Self>) -> Option<Pass> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0 {
            return None;
        }
        state.1 += 1;
        Some(Pass(self.clone()))
    }

    pub(super) fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0 = true;
    }

    /// Waits until nobody is on the way; false if the deadline came first.
    pub(super) fn wait(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.1 > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.left.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner).1 -= 1;
        self.0.left.notify_all();
    }
}

/// What a client sees of an error.
fn errno(error: &io::Error) -> Errno {
    match error.kind() {
        io::ErrorKind::InvalidInput => Errno::EINVAL,
        io::ErrorKind::StorageFull => Errno::ENOSPC,
        io::ErrorKind::PermissionDenied => Errno::EPERM,
        io::ErrorKind::Unsupported => Errno::EOPNOTSUPP,
        // As on a device that was pulled out.
        io::ErrorKind::NotConnected => Errno::ENODEV,
        _ => Errno::EIO,
    }
}

/// See the [module](self).
pub(super) struct File {
    name: String,
    device: Arc<dyn BlockDevice>,
    pool: Arc<Pool>,
    gate: Arc<Gate>,
    read_only: bool,
    caching: Caching,
    made: SystemTime,
    owner: (u32, u32),
    /// Buffers of reads, kept for the next.
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl File {
    pub(super) fn new(
        name: &str,
        device: Arc<dyn BlockDevice>,
        pool: Arc<Pool>,
        gate: Arc<Gate>,
        read_only: bool,
        caching: Caching,
    ) -> Self {
        let owner = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let (name, made, buffers) = (name.to_owned(), SystemTime::now(), Mutex::default());
        Self { name, device, pool, gate, read_only, caching, made, owner, buffers }
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let size = self.device.size();
        let (size, kind, mode, links) = match inode {
            INodeNo::ROOT => (0, FileType::Directory, 0o500, 2),
            FILE if self.read_only => (size, FileType::RegularFile, 0o400, 1),
            FILE => (size, FileType::RegularFile, 0o600, 1),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: self.made,
            mtime: self.made,
            ctime: self.made,
            crtime: self.made,
            kind,
            perm: mode,
            nlink: links,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: BLOCK as u32,
            flags: 0,
        })
    }

    /// Has it done by the pool; the reply is made there.
    fn later(&self, pass: Pass, act: impl FnOnce(&dyn BlockDevice, &mut Vec<u8>) + Send + 'static) {
        let device = self.device.clone();
        let job = Box::new(move |buffer: &mut Vec<u8>| {
            act(&*device, buffer);
            drop(pass);
        });
        if let Err(error) = self.pool.submit(job) {
            // The reply was dropped with the job, which answers with an I/O error.
            tracing::error!(%error, "no thread for a FUSE request");
        }
    }

    /// How much of a range lies within the device.
    fn within(&self, offset: u64, length: u64) -> u64 {
        self.device.size().saturating_sub(offset).min(length)
    }
}

/// Whether writes through a file that was opened so are durable when they return.
fn is_synchronous(flags: OpenFlags) -> bool {
    flags.0 & libc::O_DSYNC != 0
}

impl Filesystem for File {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // What the kernel does not know it does without.
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_readahead(MAX_REQUEST);
        let _ = config.set_max_background(BACKGROUND);
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS);
        match self.caching {
            Caching::WriteThrough => {}
            Caching::WriteBack => {
                config.add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE).map_err(|_| {
                    io::Error::new(io::ErrorKind::Unsupported, "the kernel has no write-back")
                })?;
            }
            Caching::None => {
                let _ = config.add_capabilities(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP);
            }
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE) {
            Some(file) if parent == INodeNo::ROOT && name == OsStr::new(&self.name) => {
                reply.entry(&FOREVER, &file, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&FOREVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some(attributes) = self.attributes(inode) else {
            return reply.error(Errno::ENOENT);
        };
        let resized = size.is_some_and(|size| size != attributes.size);
        let owned = uid.is_some_and(|uid| uid != attributes.uid)
            || gid.is_some_and(|gid| gid != attributes.gid);
        let opened = mode.is_some_and(|mode| mode & 0o7777 != u32::from(attributes.perm));
        if resized || owned || opened {
            reply.error(Errno::EPERM);
        } else {
            // Times are not kept.
            reply.attr(&FOREVER, &attributes);
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if inode != FILE {
            return reply.error(Errno::EISDIR);
        }
        if self.read_only && flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        let how = match self.caching {
            Caching::WriteThrough | Caching::WriteBack => FopenFlags::FOPEN_KEEP_CACHE,
            Caching::None => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        };
        reply.opened(FileHandle(0), how);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let length = self.within(offset, size.min(MAX_REQUEST).into()) as usize;
        if length == 0 {
            return reply.data(&[]);
        }
        let Some(pass) = self.gate.enter() else { return reply.error(Errno::ENODEV) };
        let pop = || self.buffers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut buffer = pop().unwrap_or_default();
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        match self.device.try_read_at(offset, &mut buffer[..length]) {
            Ok(true) => reply.data(&buffer[..length]),
            Ok(false) => self.later(pass, move |device, buffer| {
                if buffer.len() < length {
                    buffer.resize(length, 0);
                }
                match device.read_at(offset, &mut buffer[..length]) {
                    Ok(()) => reply.data(&buffer[..length]),
                    Err(error) => {
                        tracing::warn!(%error, offset, length, "a read failed");
                        reply.error(errno(&error));
                    }
                }
            }),
            Err(error) => {
                tracing::warn!(%error, offset, length, "a read failed");
                reply.error(errno(&error));
            }
        }
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        // As many as there are threads that read at a time.
        if buffers.len() < 16 {
            buffers.push(buffer);
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if self.read_only {
            return reply.error(Errno::EROFS);
        }
        let length = self.within(offset, data.len() as u64) as usize;
        if length == 0 && !data.is_empty() {
            return reply.error(Errno::ENOSPC);
        }
        let Some(pass) = self.gate.enter() else { return reply.error(Errno::ENODEV) };
        let answer = move |written: io::Result<()>, reply: ReplyWrite| match written {
            Ok(()) => reply.written(length as u32),
            Err(error) => {
                tracing::warn!(%error, offset, length, "a write failed");
                reply.error(errno(&error));
            }
        };
        if is_synchronous(flags) || self.device.may_wait(offset, length as u64) {
            let data = data[..length].to_vec();
            return self.later(pass, move |device, _| {
                let mut written = device.write_at(offset, &data);
                if is_synchronous(flags) {
                    written = written.and_then(|()| device.flush());
                }
                answer(written, reply);
            });
        }
        answer(self.device.write_at(offset, &data[..length]), reply);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // The close of a file: what it wrote was handed over.
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let Some(pass) = self.gate.enter() else { return reply.error(Errno::ENODEV) };
        self.later(pass, |device, _| match device.flush() {
            Ok(()) => reply.ok(),
            Err(error) => {
                tracing::warn!(%error, "a flush failed");
                reply.error(errno(&error));
            }
        });
    }

    fn fallocate(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        if self.read_only || inode != FILE {
            return reply.error(Errno::EROFS);
        }
        // Room cannot be promised: the C library writes then, which is as good.
        let allocate = match mode & !KEEP {
            libc::FALLOC_FL_PUNCH_HOLE => false,
            libc::FALLOC_FL_ZERO_RANGE => true,
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        let inside = self.within(offset, length);
        if inside < length && mode & KEEP == 0 {
            return reply.error(Errno::EPERM);
        }
        let Some(pass) = self.gate.enter() else { return reply.error(Errno::ENODEV) };
        self.later(pass, move |device, _| {
            // Not `trim`, which may leave the old bytes: a hole reads as zeros.
            match device.zero(offset, inside, allocate) {
                Ok(()) => reply.ok(),
                Err(error) => {
                    tracing::warn!(%error, offset, inside, "zeroing failed");
                    reply.error(errno(&error));
                }
            }
        });
    }

    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let Some(pass) = self.gate.enter() else { return reply.error(Errno::ENODEV) };
        let size = self.device.size();
        let (Ok(from), data) = (u64::try_from(offset), whence == libc::SEEK_DATA) else {
            return reply.error(Errno::ENXIO);
        };
        if from >= size || !(data || whence == libc::SEEK_HOLE) {
            return reply.error(Errno::ENXIO);
        }
        self.later(pass, move |device, _| {
            let mut at = from;
            while at < size {
                let extents = match device.extents(at, size - at) {
                    Ok(extents) => extents,
                    Err(error) => return reply.error(errno(&error)),
                };
                for extent in &extents {
                    if (extent.allocation == Allocation::Data) == data {
                        return reply.offset(at as i64);
                    }
                    at = at.saturating_add(extent.length);
                }
                if extents.iter().all(|extent| extent.length == 0) {
                    return reply.error(Errno::EIO);
                }
            }
            // There is a hole at the end of every file, and no data beyond.
            if data { reply.error(Errno::ENXIO) } else { reply.offset(size as i64) }
        });
    }

    fn readdir(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if inode != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let entries = [
            (INodeNo::ROOT, FileType::Directory, "."),
            (INodeNo::ROOT, FileType::Directory, ".."),
            (FILE, FileType::RegularFile, self.name.as_str()),
        ];
        let first = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, (inode, kind, name)) in entries.into_iter().enumerate().skip(first) {
            if reply.add(inode, index as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = self.device.size().div_ceil(BLOCK);
        reply.statfs(blocks, 0, 0, 1, 0, BLOCK as u32, 255, BLOCK as u32);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS); // asked once, then never again
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }
}
