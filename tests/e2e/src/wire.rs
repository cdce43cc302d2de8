//! All frames that pass a host, as somebody on the line would read them, and what must not be in them.

use architect::rig::Namespace;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket,
        sockopt,
    },
};
use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

/// Longest frame of a veth with offloads.
const LONGEST: usize = 1 << 16;
/// How much may wait while this computer is busy.
const WAITING: usize = 64 << 20;

/// Reads along on all interfaces of a namespace until it is asked what it has.
pub struct Tap {
    end: Arc<AtomicBool>,
    reader: JoinHandle<Vec<u8>>,
}

impl Tap {
    /// From now on.
    #[must_use]
    pub fn on(namespace: &Namespace) -> Self {
        let open = || -> nix::Result<OwnedFd> {
            let all = SockProtocol::EthAll;
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, all)?;
            setsockopt(&socket, sockopt::RcvBufForce, &WAITING)?;
            Ok(socket)
        };
        let socket = namespace.run(open).unwrap().unwrap();
        let end = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&end);
        let reader = std::thread::spawn(move || {
            let (mut all, mut frame) = (Vec::new(), vec![0; LONGEST]);
            loop {
                let mut wanted = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                match poll(&mut wanted, PollTimeout::from(100u16)) {
                    Ok(0) if asked.load(Ordering::Acquire) => return all,
                    Ok(0) | Err(nix::Error::EINTR) => continue,
                    Ok(_) => {}
                    Err(error) => panic!("waiting for frames: {error}"),
                }
                match recv(socket.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT) {
                    Ok(length) => all.extend(&frame[..length]),
                    Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
                    Err(error) => panic!("reading frames: {error}"),
                }
            }
        });
        Self { end, reader }
    }

    /// What has passed, frame after frame.
    #[must_use]
    pub fn bytes(self) -> Vec<u8> {
        self.end.store(true, Ordering::Release);
        self.reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Things that nobody may read, each with a name for people.
#[derive(Default)]
pub struct Secrets {
    pieces: Vec<(String, Vec<u8>)>,
}

/// How much of a secret is looked for at once: a frame may end anywhere within it.
const PIECE: usize = 16;

impl Secrets {
    /// Adds the bytes of a secret, piece by piece, and as text in hexadecimal digits.
    pub fn bytes(&mut self, name: &str, secret: &[u8]) {
        assert!(secret.len() >= PIECE, "{name} has {} bytes only", secret.len());
        let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        for form in [secret, hex.as_bytes()] {
            let pieces = form.chunks_exact(PIECE).map(|piece| (name.to_owned(), piece.to_vec()));
            self.pieces.extend(pieces);
        }
    }

    /// Adds a private key in PEM, as bytes and as the text between its lines. Only the number that nobody
    /// may know: the public key beside it is in every certificate.
    pub fn pem(&mut self, name: &str, text: &str) {
        let digits: String = text.lines().filter(|line| !line.starts_with("-----")).collect();
        let meant = from_base64(&digits);
        // OCTET STRING of 32 bytes: the private number of Ed25519 and of the curves of 256 bits.
        let at = meant.windows(2).position(|pair| pair == [0x04, 0x20]).map(|at| at + 2);
        let at = at.filter(|at| at + 32 <= meant.len());
        let at = at.unwrap_or_else(|| panic!("{name} holds no key of 256 bits"));
        self.bytes(name, &meant[at..at + 32]);
        // Three bytes are four digits.
        let piece = &digits.as_bytes()[at.div_ceil(3) * 4..(at + 32) / 3 * 4];
        self.pieces.extend(piece.chunks_exact(PIECE).map(|p| (name.to_owned(), p.to_vec())));
    }

    /// The names of those that are in `haystack`.
    #[must_use]
    pub fn found_in(&self, haystack: &[u8]) -> Vec<&str> {
        let mut found: Vec<&str> = Vec::new();
        // By their first four bytes, so that a long text is read once.
        let mut by_start: std::collections::HashMap<[u8; 4], Vec<&(String, Vec<u8>)>> =
            std::collections::HashMap::new();
        for piece in &self.pieces {
            let start = *piece.1.first_chunk::<4>().expect("a piece has sixteen bytes");
            by_start.entry(start).or_default().push(piece);
        }
        let mut starts = vec![false; 1 << 16];
        for start in by_start.keys() {
            starts[usize::from(u16::from_le_bytes([start[0], start[1]]))] = true;
        }
        for at in 0..haystack.len().saturating_sub(PIECE - 1) {
            if !starts[usize::from(u16::from_le_bytes([haystack[at], haystack[at + 1]]))] {
                continue;
            }
            let start = *haystack[at..].first_chunk::<4>().expect("sixteen bytes follow");
            for (name, piece) in by_start.get(&start).into_iter().flatten() {
                if haystack[at..].starts_with(piece) && !found.contains(&name.as_str()) {
                    found.push(name);
                }
            }
        }
        found
    }
}

fn from_base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut out, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for byte in text.bytes().filter(|byte| *byte != b'=') {
        let digit = DIGITS.iter().position(|d| *d == byte).expect("a digit of base64");
        bits = bits << 6 | digit as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    out
}

/// All files below a folder but those below `without`.
#[must_use]
pub fn files_below(folder: &Path, without: &[PathBuf]) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        // What went away meanwhile holds nothing.
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let (path, Ok(kind)) = (entry.path(), entry.file_type()) else { continue };
            if without.iter().any(|other| path.starts_with(other)) {
                continue;
            }
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() {
                files.push(path);
            }
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_found_in_any_form_and_wherever_a_frame_ends_and_nothing_else_is() {
        let secret: Vec<u8> = (100..164).collect();
        let mut secrets = Secrets::default();
        secrets.bytes("key", &secret);
        assert!(secrets.found_in(&[0; 4096]).is_empty());
        assert!(secrets.found_in(&secret[..15]).is_empty());
        let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        for text in [&secret[..], hex.as_bytes(), &[&[1; 999][..], &secret[..20], &[2; 9]].concat()]
        {
            assert_eq!(secrets.found_in(text), ["key"]);
        }
        assert_eq!(from_base64("aGVsbG8gd29ybGQ="), b"hello world");
    }
}
