//! The tun device: IP frames with a `virtio_net_hdr`, large ones included.

use crate::{TunnelError, sys};
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

/// An attached tun device. The interface stays when its descriptor closes ([`Tun::remove`]), so
/// that addresses and routes outlive the process.
#[derive(Debug)]
pub(crate) struct Tun {
    file: File,
    name: String,
    datagrams: bool,
}

impl Tun {
    /// Attaches to the interface `name` in this thread's network namespace, made if need be.
    pub(crate) fn open(name: &str) -> Result<Self, TunnelError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(TunnelError::system("open /dev/net/tun (it needs root)"))?;
        let name = sys::attach(file.as_fd(), name)
            .map_err(TunnelError::system(format!("attach to interface {name}")))?;
        sys::set_persistent(file.as_fd(), true)
            .map_err(TunnelError::system(format!("keep interface {name}")))?;
        Self::with(file, name)
    }

    /// Takes over a descriptor that another process attached.
    pub(crate) fn adopt(file: OwnedFd, name: &str) -> Result<Self, TunnelError> {
        Self::with(file.into(), name.to_owned())
    }

    fn with(file: File, name: String) -> Result<Self, TunnelError> {
        let tcp = sys::TUN_F_CSUM | sys::TUN_F_TSO4 | sys::TUN_F_TSO6 | sys::TUN_F_TSO_ECN;
        let udp = sys::TUN_F_USO4 | sys::TUN_F_USO6;
        let datagrams = sys::set_offload(file.as_fd(), tcp | udp).is_ok();
        if !datagrams {
            sys::set_offload(file.as_fd(), tcp)
                .map_err(TunnelError::system(format!("ask {name} for large segments")))?;
        }
        Ok(Self { file, name, datagrams })
    }

    /// The interface's name.
    #[must_use]
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Does it take several datagrams in one frame?
    #[must_use]
    pub(crate) fn takes_datagrams(&self) -> bool {
        self.datagrams
    }

    /// Reads one frame, without waiting.
    pub(crate) fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(frame)
    }

    /// Writes one frame.
    pub(crate) fn write(&self, frame: &[u8]) -> io::Result<usize> {
        (&self.file).write(frame)
    }

    /// The interface goes when this is dropped.
    pub(crate) fn remove(self) -> Result<(), TunnelError> {
        sys::set_persistent(self.file.as_fd(), false)
            .map_err(TunnelError::system(format!("remove interface {}", self.name)))
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
