//! Entry points for fuzzing: whatever a stranger can send to a server or to a client. They panic
//! only if something is wrong.

use super::{
    BlockDevice, ExportOptions, Exports, client,
    line::Socket,
    protocol::{
        OPTION_BYTES, OPTION_REPLY_BYTES, REQUEST_BYTES, Reply, Request, decode_context,
        decode_error, decode_go, decode_info, decode_meta_context, decode_option,
        decode_option_reply, decode_status,
    },
    server,
};
use std::{
    io::{self, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

/// More does not fit into a socket at once.
const MOST: usize = 64 << 10;
const DEVICE_BYTES: usize = 64 << 10;

/// A few bytes of memory.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn with<T>(
        &self,
        offset: u64,
        length: usize,
        work: impl FnOnce(&mut [u8]) -> T,
    ) -> io::Result<T> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let start = offset as usize;
        // The server has checked it; that is what is tried here.
        let place = bytes.get_mut(start..start + length).expect("only what is there is asked for");
        Ok(work(place))
    }
}

impl BlockDevice for Memory {
    fn size(&self) -> u64 {
        DEVICE_BYTES as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.with(offset, buf.len(), |bytes| buf.copy_from_slice(bytes))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with(offset, data.len(), |bytes| bytes.copy_from_slice(data))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length, false)
    }

    fn zero(&self, offset: u64, length: u64, _allocate: bool) -> io::Result<()> {
        self.with(offset, length as usize, |bytes| bytes.fill(0))
    }
}

/// A pair of sockets, of which one has sent `data` and nothing more.
fn sent(data: &[u8]) -> Option<(UnixStream, UnixStream)> {
    let (ours, mut theirs) = UnixStream::pair().ok()?;
    theirs.write_all(&data[..data.len().min(MOST)]).ok()?;
    theirs.shutdown(Shutdown::Write).ok()?;
    Some((ours, theirs))
}

/// A client that sends `data` to a server with one export.
pub fn fuzz_nbd_server(data: &[u8]) {
    let Some((ours, mut theirs)) = sent(data) else { return };
    let exports = Exports::new();
    let device = Arc::new(Memory(Mutex::new(vec![7; DEVICE_BYTES])));
    let _ = exports.add("disk", device, ExportOptions::default());
    // Answers have to go somewhere.
    let drain = thread::spawn(move || io::copy(&mut theirs, &mut io::sink()));
    server::serve_one(Socket::from(ours), &exports);
    drop(drain.join());
}

/// A server that sends `data` to a client which asks for an export, reads it and flushes it.
pub fn fuzz_nbd_client(data: &[u8]) {
    let Some((ours, _theirs)) = sent(data) else { return };
    drop(client::meet(Socket::from(ours)));
}

/// Every message of the protocol by itself.
pub fn fuzz_nbd_messages(data: &[u8]) {
    if let Some(header) = data.first_chunk::<REQUEST_BYTES>()
        && let Some(request) = Request::decode(header)
    {
        assert_eq!(&request.encode(), header);
    }
    if let Some(header) = data.first_chunk::<OPTION_BYTES>() {
        decode_option(header);
    }
    if let Some(header) = data.first_chunk::<OPTION_REPLY_BYTES>() {
        decode_option_reply(header);
    }
    Reply::decode(data);
    decode_error(data);
    decode_info(data);
    decode_context(data);
    if let Some((name, infos)) = decode_go(data) {
        assert!(name.len() + infos.count() * 2 <= data.len());
    }
    for listing in [false, true] {
        decode_meta_context(data, listing);
    }
    let length = u64::from(u32::MAX);
    if let Some(extents) = decode_status(data, 1, length) {
        assert!(extents.iter().all(|extent| extent.length > 0));
        assert!(extents.iter().map(|extent| extent.length).sum::<u64>() <= length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a fuzzer would find by itself after a while: whole messages, cut and changed.
    fn session() -> Vec<u8> {
        let mut bytes = b"\0\0\0\x03IHAVEOPT\0\0\0\x08\0\0\0\0".to_vec();
        bytes.extend(b"IHAVEOPT\0\0\0\x0a\0\0\0\x1b\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation");
        bytes.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0");
        for command in [0, 1, 3, 4, 5, 6, 7, 2u16] {
            let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
            request.extend(0u16.to_be_bytes());
            request.extend(command.to_be_bytes());
            request.extend(u64::from(command).to_be_bytes());
            request.extend(4096u64.to_be_bytes());
            request.extend(if command == 3 { 0 } else { 512u32 }.to_be_bytes());
            bytes.extend(request);
            if command == 1 {
                bytes.extend([9; 512]);
            }
        }
        bytes
    }

    fn answers() -> Vec<u8> {
        let mut bytes = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
        let reply = |option: u8, kind: u8, data: &[u8]| {
            let head = [0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9, 0, 0, 0, option];
            [&head[..], &[0, 0, 0, kind, 0, 0, 0, data.len() as u8], data].concat()
        };
        bytes.extend(reply(8, 1, b""));
        bytes.extend(reply(10, 4, b"\0\0\0\x01base:allocation"));
        bytes.extend(reply(10, 1, b""));
        bytes.extend(reply(7, 3, b"\0\0\0\0\0\0\0\x01\0\0\x0d\xff"));
        bytes.extend(reply(7, 1, b""));
        let chunk = |kind: u8, cookie: u8, data: &[u8]| {
            let head = [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, kind, 0, 0, 0, 0, 0, 0, 0, cookie];
            [&head[..], &(data.len() as u32).to_be_bytes(), data].concat()
        };
        bytes.extend(chunk(2, 1, b"\0\0\0\0\0\0\x10\0\0\0\x10\0"));
        bytes.extend(chunk(1, 2, &[&100u64.to_be_bytes()[..], &[5; 904]].concat()));
        bytes.extend(chunk(5, 3, b"\0\0\0\x01\0\0\x10\0\0\0\0\x03"));
        bytes.extend(b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x04");
        bytes
    }

    #[test]
    fn what_the_fuzzer_starts_from_is_understood() {
        let (ours, _theirs) = sent(&answers()).unwrap();
        client::meet(Socket::from(ours)).unwrap();
        fuzz_nbd_server(&session());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn check_30_nothing_that_a_peer_sends_breaks_a_server_or_a_client(
            cut in 0usize..2000,
            changes in proptest::collection::vec((0usize..2000, any::<u8>()), 0..6),
            tail in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            for start in [session(), answers()] {
                let mut bytes = start;
                for (at, byte) in &changes {
                    let at = at % bytes.len();
                    bytes[at] = *byte;
                }
                bytes.truncate(cut.max(1));
                bytes.extend(&tail);
                fuzz_nbd_server(&bytes);
                fuzz_nbd_client(&bytes);
                fuzz_nbd_messages(&bytes);
                fuzz_nbd_messages(&tail);
            }
        }
    }
}
