//! A small NBD client that can also misbehave, and helpers around disks and the `silo` command.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses a part of it")]

pub mod s3;
pub mod silo;

use ::silo::{
    device::DeviceName,
    disk::{Disk, DiskOptions},
};
use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

pub const BLOCK: u64 = 4096;
pub const LIMIT: Duration = Duration::from_secs(20);

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISCONNECT: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const WRITE_ZEROES: u16 = 6;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;

pub fn options() -> DiskOptions {
    DiskOptions::new(DeviceName::new("root").unwrap())
}

/// A disk of `blocks` blocks over a base of the bytes that `base` gives.
pub fn disk(dir: &Path, base: &[u8], blocks: u64) -> Disk {
    let path = dir.join("base");
    std::fs::write(&path, base).unwrap();
    Disk::create(&dir.join("overlay"), Some(&path), blocks * BLOCK, &options()).unwrap()
}

pub struct Client {
    pub stream: UnixStream,
    cookie: u64,
}

impl Client {
    /// Connects, and reads the server's greeting.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
        Ok(Self { stream, cookie: 0 })
    }

    /// Connects and shakes hands with `GO`; gives the size too.
    pub fn go(path: &Path) -> io::Result<(Self, u64)> {
        let mut client = Self::connect(path)?;
        client.send(&3u32.to_be_bytes())?;
        client.option(7, b"\0\0\0\0\0\x01\0\x03")?;
        let mut size = 0;
        loop {
            let (reply, data) = client.option_reply(7)?;
            match (reply, data.first_chunk()) {
                (1, _) => return Ok((client, size)),
                (3, Some([0, 0])) => size = u64::from_be_bytes(data[2..10].try_into().unwrap()),
                (3, _) => {}
                other => panic!("unexpected reply to GO: {other:?}"),
            }
        }
    }

    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    pub fn option(&mut self, number: u32, data: &[u8]) -> io::Result<()> {
        let length = (data.len() as u32).to_be_bytes();
        self.send(&[b"IHAVEOPT", &number.to_be_bytes()[..], &length, data].concat())
    }

    pub fn option_reply(&mut self, number: u32) -> io::Result<(u32, Vec<u8>)> {
        let mut header = [0; 20];
        self.stream.read_exact(&mut header)?;
        assert_eq!(header[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        assert_eq!(header[8..12], number.to_be_bytes());
        let reply = u32::from_be_bytes(header[12..16].try_into().unwrap());
        let length = u32::from_be_bytes(header[16..20].try_into().unwrap());
        assert!(length < 10_000);
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        Ok((reply, data))
    }

    /// Sends a request and gives its cookie.
    pub fn request(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> io::Result<u64> {
        self.cookie += 1;
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(data);
        self.send(&bytes)?;
        Ok(self.cookie)
    }

    /// The next reply's error and cookie; its data is the caller's to read.
    pub fn reply(&mut self) -> io::Result<(u32, u64)> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header)?;
        assert_eq!(header[..4], 0x6744_6698_u32.to_be_bytes());
        Ok((
            u32::from_be_bytes(header[4..8].try_into().unwrap()),
            u64::from_be_bytes(header[8..].try_into().unwrap()),
        ))
    }

    /// One request and its reply, which must be an answer to it; the error.
    pub fn call(&mut self, command: u16, flags: u16, offset: u64, length: u32) -> io::Result<u32> {
        let cookie = self.request(command, flags, offset, length, b"")?;
        let (error, answered) = self.reply()?;
        assert_eq!(answered, cookie);
        Ok(error)
    }

    pub fn write(&mut self, offset: u64, data: &[u8], flags: u16) -> io::Result<u32> {
        let cookie = self.request(WRITE, flags, offset, data.len() as u32, data)?;
        let (error, answered) = self.reply()?;
        assert_eq!(answered, cookie);
        Ok(error)
    }

    pub fn read(&mut self, offset: u64, length: u32) -> io::Result<Vec<u8>> {
        let error = self.call(READ, 0, offset, length)?;
        assert_eq!(error, 0, "read of {length} at {offset}");
        self.read_data(length)
    }

    /// A whole device, in requests that every server takes.
    pub fn read_all(&mut self, size: usize) -> io::Result<Vec<u8>> {
        let mut content = Vec::with_capacity(size);
        while content.len() < size {
            let length = (size - content.len()).min(1 << 20);
            content.extend(self.read(content.len() as u64, length as u32)?);
        }
        Ok(content)
    }

    pub fn read_data(&mut self, length: u32) -> io::Result<Vec<u8>> {
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    /// Whether the server has hung up: nothing more comes.
    pub fn is_cut_off(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

/// A file that only its owner can read.
pub fn write_private(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// A child process that dies with the test.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `silo serve`, ready to be connected to.
pub fn serve(base: &Path, overlay: &Path, socket: &Path) -> Process {
    let child = Command::new(env!("CARGO_BIN_EXE_silo"))
        .args(["serve", "--create", "--base"])
        .arg(base)
        .arg("--overlay")
        .arg(overlay)
        .arg("--socket")
        .arg(socket)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let process = Process(child);
    let deadline = Instant::now() + LIMIT;
    while UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < deadline, "silo serve does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    process
}

/// Runs a tool of QEMU's and gives its output; it must succeed.
pub fn qemu(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| {
        panic!("cannot run {program} ({error}); install the package qemu-utils")
    });
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

/// Runs `qemu-io` with commands, and fails if any of them does.
pub fn qemu_io(target: &[&str], commands: &[String]) -> String {
    let mut arguments = target.to_vec();
    for command in commands {
        arguments.extend(["-c", command]);
    }
    let text = qemu("qemu-io", &arguments);
    // It exits with 0 when a pattern does not match.
    assert!(!text.contains("failed"), "{text}");
    text
}
