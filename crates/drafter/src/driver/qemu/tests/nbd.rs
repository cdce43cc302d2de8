//! A disk for tests: an NBD server whose flushes can be slow and whose writes can fail. Only what
//! QEMU's client asks of it (nbd/doc/proto.md: fixed newstyle, no structured replies).

use std::{
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// HAS_FLAGS, SEND_FLUSH, SEND_FUA, CAN_MULTI_CONN.
const TRANSMISSION_FLAGS: u16 = 1 | 4 | 8 | 256;

/// A disk in memory and its misbehaviour.
#[derive(Default)]
pub(super) struct Disk {
    content: Mutex<Vec<u8>>,
    /// Milliseconds that each flush takes.
    pub(super) flush_takes: AtomicU64,
    /// Flushes that have begun.
    pub(super) flushes: AtomicU64,
    /// Whether writes fail with EIO.
    pub(super) failing: AtomicBool,
}

impl Disk {
    /// Serves a disk of `bytes` at `path` until the process ends.
    pub(super) fn serve(path: &Path, bytes: usize) -> Arc<Self> {
        let disk = Arc::new(Self { content: Mutex::new(vec![0x5a; bytes]), ..Self::default() });
        let listener = UnixListener::bind(path).unwrap();
        let served = Arc::clone(&disk);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let disk = Arc::clone(&served);
                thread::spawn(move || disk.talk(client));
            }
        });
        disk
    }

    fn talk(&self, mut client: UnixStream) -> io::Result<()> {
        client.write_all(b"NBDMAGIC")?;
        client.write_all(&OPTION_MAGIC.to_be_bytes())?;
        client.write_all(&3u16.to_be_bytes())?; // fixed newstyle, no zeroes
        take::<4>(&mut client)?;
        while !self.option(&mut client)? {}
        while self.request(&mut client)? {}
        Ok(())
    }

    /// Answers one option; true when transmission begins.
    fn option(&self, client: &mut UnixStream) -> io::Result<bool> {
        take::<8>(client)?;
        let option = u32::from_be_bytes(take(client)?);
        let mut data = vec![0; u32::from_be_bytes(take(client)?) as usize];
        client.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| {
            client.write_all(&REPLY_MAGIC.to_be_bytes())?;
            client.write_all(&option.to_be_bytes())?;
            client.write_all(&kind.to_be_bytes())?;
            client.write_all(&(data.len() as u32).to_be_bytes())?;
            client.write_all(data)
        };
        if option != 7 {
            reply(0x8000_0001, b"")?; // not supported
            return Ok(false);
        }
        // GO: NBD_INFO_EXPORT, then acknowledge.
        let size = self.content.lock().unwrap().len() as u64;
        let mut info = vec![0, 0];
        info.extend(size.to_be_bytes());
        info.extend(TRANSMISSION_FLAGS.to_be_bytes());
        reply(3, &info)?;
        reply(1, b"")?;
        Ok(true)
    }

    /// Answers one request; false when the client takes its leave.
    fn request(&self, client: &mut UnixStream) -> io::Result<bool> {
        let head: [u8; 28] = take(client)?;
        let number = |at: usize, len: usize| {
            head[at..at + len].iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte))
        };
        let (kind, offset, length) = (number(6, 2), number(16, 8) as usize, number(24, 4) as usize);
        let mut error = 0u32;
        let mut data = Vec::new();
        match kind {
            0 => data.extend(&self.content.lock().unwrap()[offset..offset + length]),
            1 => {
                let mut written = vec![0; length];
                client.read_exact(&mut written)?;
                if self.failing.load(Ordering::SeqCst) {
                    error = 5;
                } else {
                    self.content.lock().unwrap()[offset..offset + length].copy_from_slice(&written);
                }
            }
            2 => return Ok(false),
            3 => {
                self.flushes.fetch_add(1, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(self.flush_takes.load(Ordering::SeqCst)));
            }
            _ => error = 22,
        }
        client.write_all(&0x6744_6698u32.to_be_bytes())?;
        client.write_all(&error.to_be_bytes())?;
        client.write_all(&head[8..16])?;
        client.write_all(&data)?;
        Ok(true)
    }
}

fn take<const N: usize>(client: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    client.read_exact(&mut bytes)?;
    Ok(bytes)
}
