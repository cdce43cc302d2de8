//! Unix sockets of whole messages (`SOCK_SEQPACKET`) that carry descriptors along (`SCM_RIGHTS`).

use nix::{
    cmsg_space,
    sys::socket::{
        AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
        UnixAddr, accept4, bind, connect, listen, recvmsg, sendmsg, socket,
    },
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
};

/// Descriptors in one message, at most.
pub(crate) const DESCRIPTORS: usize = 2;

/// Listens at `path`, which must not exist.
pub(crate) fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&listener, Backlog::new(64)?)?;
    Ok(listener)
}

/// A connection to who listens at `path`.
pub(crate) fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let stream = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(stream.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(stream)
}

/// The next one who has connected.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let raw = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    Ok(own(raw))
}

/// Sends one message whole.
pub(crate) fn send(
    to: BorrowedFd<'_>,
    message: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &[][..] } else { &rights };
    let parts = [IoSlice::new(message)];
    sendmsg::<()>(to.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives one message: its size, and the descriptors that came with it. A message that is longer
/// than the buffer is an error. Size 0 is the end.
pub(crate) fn receive(
    from: BorrowedFd<'_>,
    message: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = cmsg_space!([RawFd; DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(message)];
    let received =
        recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            descriptors.extend(raw.into_iter().map(own));
        }
    }
    if received.flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
    }
    Ok((received.bytes, descriptors))
}

fn own(raw: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs::File,
        io::{Read, Write},
        os::fd::AsFd,
    };

    #[test]
    fn a_descriptor_crosses_and_works_at_the_other_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = listen_at(&path).unwrap();
        let here = connect_to(&path).unwrap();
        let there = accept(listener.as_fd()).unwrap();
        let (mut read, write) = io::pipe().unwrap();
        send(here.as_fd(), b"take this", &[write.as_fd()]).unwrap();
        drop(write);
        let mut buffer = [0; 64];
        let (size, mut descriptors) = receive(there.as_fd(), &mut buffer).unwrap();
        assert_eq!((&buffer[..size], descriptors.len()), (&b"take this"[..], 1));
        File::from(descriptors.remove(0)).write_all(b"through it").unwrap();
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through it");
        send(here.as_fd(), &[7; 65], &[]).unwrap();
        assert!(receive(there.as_fd(), &mut buffer).is_err(), "not cut short in silence");
        drop(here);
        assert_eq!(receive(there.as_fd(), &mut buffer).unwrap().0, 0);
    }
}
