//! Our server against other people's clients, and our client against other people's servers:
//! libnbd, nbdkit and QEMU as Debian ships them.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod nbd_support;

use identity::{PeerCheck, TlsClient, TlsServer};
use nbd_support::{Process, Ram, Random, Rig, have, noise, text, tool, try_tool};
use silo_block::io::{Allocation, BlockDevice};
use silo_expose::nbd::{
    Access, Endpoint, ExportOptions, Exports, NbdClient, NbdClientOptions, NbdOptions, NbdSecurity,
};
use std::{fs, path::Path, process::Command, sync::Arc};

const MIB: usize = 1 << 20;

fn defaults() -> NbdClientOptions {
    NbdClientOptions::default()
}

/// A device with data, a long hole, and data again.
fn patchy() -> Arc<Ram> {
    let ram = Arc::new(Ram::new(16 * MIB));
    ram.write_at(MIB as u64, &noise(1, MIB)).unwrap();
    ram.write_at(9 * MIB as u64 + 4096, &noise(2, 3 * MIB)).unwrap();
    ram
}

#[test]
fn nbdinfo_shows_every_export_and_where_its_data_is() {
    if !have("nbdinfo", "libnbd-bin") {
        return;
    }
    let exports = Arc::new(Exports::new());
    let described = |text: &str, access| ExportOptions {
        description: text.to_owned(),
        access,
        ..ExportOptions::default()
    };
    exports.add("root", patchy(), described("the root disk", Access::ReadWrite)).unwrap();
    exports.add("base", patchy(), described("", Access::ReadOnly)).unwrap();
    let rig = Rig::serving(exports, NbdOptions::default());
    let list = tool("nbdinfo", &["--list", "--json", &rig.uri("")]);
    for expected in ["\"root\"", "\"base\"", "the root disk", "base:allocation", "\"structured\""] {
        assert!(list.contains(expected), "{expected} in {list}");
    }
    let one = tool("nbdinfo", &["--json", &rig.uri("root")]);
    for can in [
        "read_only\": false",
        "can_df\": true",
        "can_fua\": true",
        "can_multi_conn\": true",
        "can_trim\": true",
        "can_zero\": true",
        "can_fast_zero\": true",
        "can_cache\": true",
        "can_flush\": true",
        "export-size\": 16777216",
    ] {
        assert!(one.contains(can), "{can} in {one}");
    }
    assert!(tool("nbdinfo", &["--json", &rig.uri("base")]).contains("read_only\": true"));
    let map = tool("nbdinfo", &["--map", &rig.uri("root")]);
    let runs: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    let expected = [
        ["0", "1048576", "3", "hole,zero"],
        ["1048576", "1048576", "0", "data"],
        ["2097152", "7344128", "3", "hole,zero"],
        ["9441280", "3145728", "0", "data"],
        ["12587008", "4190208", "3", "hole,zero"],
    ];
    assert_eq!(runs, expected, "{map}");
    let (fine, said) = try_tool("nbdinfo", &[&rig.uri("nothing")]);
    assert!(!fine && said.contains("No such file"), "{said}");
}

#[test]
fn nbdcopy_copies_in_and_out_and_between_two_of_ours() {
    if !have("nbdcopy", "libnbd-bin") {
        return;
    }
    let (from, to) = (patchy(), Arc::new(Ram::new(16 * MIB)));
    let (source, target) = (Rig::new(from.clone()), Rig::new(to.clone()));
    tool("nbdcopy", &["--flush", &source.uri(""), &target.uri("")]);
    assert!(to.durable() == from.now());
    let holes = to.extents(0, 16 * MIB as u64).unwrap();
    assert!(holes.iter().any(|run| run.allocation == Allocation::Hole), "{holes:?}");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    tool("nbdcopy", &[&source.uri(""), text(&file)]);
    assert!(fs::read(&file).unwrap() == from.now());
    let fresh = noise(3, 16 * MIB);
    fs::write(&file, &fresh).unwrap();
    tool("nbdcopy", &["--connections=4", "--requests=32", text(&file), &target.uri("")]);
    assert!(to.now() == fresh);
}

#[test]
fn nbdsh_gets_holes_pieces_and_errors_as_the_protocol_says() {
    if !have("nbdsh", "python3-libnbd") {
        return;
    }
    let ram = patchy();
    let rig = Rig::new(ram.clone());
    let script = r"
import errno
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(URI)
assert h.get_structured_replies_negotiated()
assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)

chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data), status))
h.pread_structured(512 * 1024, 1024 * 1024 - 256 * 1024, chunk)
assert chunks == [(768 * 1024, 256 * 1024, nbd.READ_HOLE),
                  (1024 * 1024, 256 * 1024, nbd.READ_DATA)], chunks
chunks.clear()
h.pread_structured(512 * 1024, 768 * 1024, chunk, nbd.CMD_FLAG_DF)
assert [c[2] for c in chunks] == [nbd.READ_DATA], chunks

extents = []
h.block_status(16 << 20, 0, lambda m, o, e, err: extents.append((m, o, e)), nbd.CMD_FLAG_REQ_ONE)
assert extents == [('base:allocation', 0, [1 << 20, 3])], extents

def fails(number, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == number, error
    else:
        raise AssertionError('it worked')
h.set_strict_mode(0)
size = h.get_size()
fails(errno.EINVAL, lambda: h.pread(1, size))
fails(errno.ENOSPC, lambda: h.pwrite(b'x', size))
fails(errno.EINVAL, lambda: h.trim(1, size))
fails(errno.EINVAL, lambda: h.block_status(0, 0, lambda *a: 0))
h.zero(8192, 1024 * 1024, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA)
h.zero(8192, 2048 * 1024, nbd.CMD_FLAG_NO_HOLE)
h.cache(8192, 0)
h.trim(4096, 12 << 20, nbd.CMD_FLAG_FUA)
h.pwrite(b'abc', 5)
assert h.pread(5, 4) == b'\0abc\0'
h.flush()
h.shutdown()
"
    .replace("URI", &format!("'{}'", rig.uri("")));
    tool("nbdsh", &["-c", &script]);
    assert_eq!(ram.durable()[4..9], *b"\0abc\0");
    assert!(ram.durable()[MIB..MIB + 8192] == [0; 8192]);
    // Without structured replies everything still works, in the old way.
    let script = "h.set_request_structured_replies(False); h.connect_uri(URI);
assert not h.get_structured_replies_negotiated()
assert h.pread(4, 5)[:3] == b'abc'
assert h.pread(1 << 20, 2 << 20) == b'\\0' * (1 << 20)"
        .replace("URI", &format!("'{}'", rig.uri("")));
    tool("nbdsh", &["-c", &script]);
}

#[test]
fn libnbd_speaks_tls_with_our_server_or_is_sent_away() {
    if !have("nbdinfo", "libnbd-bin") || !have("openssl", "openssl") {
        return;
    }
    let pem = tempfile::tempdir().unwrap();
    certificates(pem.path());
    let check = [PeerCheck::Required, PeerCheck::Off];
    for (peers, required) in check.into_iter().zip([true, false]) {
        let tls = TlsServer::load_pem(pem.path(), peers).unwrap();
        let security =
            if required { NbdSecurity::Required(tls) } else { NbdSecurity::Optional(tls) };
        let options = NbdOptions { security, ..NbdOptions::default() };
        let rig = Rig::with(patchy(), options);
        let socket = rig.socket();
        let uri = format!(
            "nbds+unix:///?socket={}&tls-certificates={}&tls-verify-peer=false",
            text(&socket),
            text(pem.path())
        );
        assert!(tool("nbdinfo", &["--json", &uri]).contains("\"TLS\": true"));
        let plain = try_tool("nbdinfo", &["--json", &rig.uri("")]);
        assert_eq!(plain.0, !required, "{}", plain.1);
        if have("nbdcopy", "libnbd-bin") {
            let file = pem.path().join("copy");
            tool("nbdcopy", &[&uri, text(&file)]);
            assert!(fs::read(&file).unwrap() == patchy().now());
        }
    }
}

/// Certificates as people make them for QEMU and nbdkit, with RSA keys.
fn certificates(dir: &Path) {
    let script = r#"
set -e; cd "$1"
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority \
  -keyout ca-key.pem -out ca-cert.pem -addext basicConstraints=critical,CA:TRUE \
  -addext keyUsage=keyCertSign
for who in server client; do
  openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout $who-key.pem -out $who.csr
  printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=%sAuth\n' $who > ext
  openssl x509 -req -in $who.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 2 \
    -extfile ext -out $who-cert.pem
done
chmod 600 ./*-key.pem
"#;
    let made = Command::new("sh").args(["-c", script, "sh", text(dir)]).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

#[test]
fn qemu_maps_converts_compares_and_writes_through_our_server() {
    if !have("qemu-img", "qemu-utils") {
        return;
    }
    let ram = patchy();
    let rig = Rig::new(ram.clone());
    let map = tool("qemu-img", &["map", "--output=json", &rig.uri("")]);
    assert_eq!(map.matches("\"zero\": true").count(), 3, "{map}");
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &rig.uri(""), text(&image)]);
    let same =
        tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &rig.uri(""), text(&image)]);
    assert!(same.contains("identical"), "{same}");
    let said = tool(
        "qemu-io",
        &[
            "-f",
            "raw",
            &rig.uri(""),
            "-c",
            "write -P 1 100 5000",
            "-c",
            "write -z -u 1M 1M",
            "-c",
            "discard 9M 4M",
            "-c",
            "aio_write -P 2 4M 2M",
            "-c",
            "aio_write -P 3 6M 2M",
            "-c",
            "aio_flush",
            "-c",
            "read -P 2 4M 2M",
            "-c",
            "read -P 3 6M 2M",
            "-c",
            "read -P 0 9M 4M",
            "-c",
            "flush",
        ],
    );
    assert!(!said.contains("failed"), "{said}");
    assert_eq!(ram.durable()[100..5100], [1; 5000]);
}

/// Random writes, zeroes, trims and reads next to a model, as fsx does with files; at the end the
/// whole is compared, also through a second client.
fn fsx(device: &dyn BlockDevice, again: impl Fn() -> NbdClient, steps: u64) {
    let size = device.size();
    let mut random = Random(11);
    let mut model = vec![0; size as usize];
    device.read_at(0, &mut model).unwrap();
    for step in 0..steps {
        let offset = random.below(size);
        let length = random.below(size.min(300_000).min(size - offset) + 1);
        let range = offset as usize..(offset + length) as usize;
        match random.below(12) {
            0..=4 => {
                let data = noise(random.next(), length as usize);
                device.write_at(offset, &data).unwrap();
                model[range].copy_from_slice(&data);
            }
            5..=8 => {
                let mut data = vec![0xee; length as usize];
                device.read_at(offset, &mut data).unwrap();
                assert!(data == model[range], "step {step}: {length} at {offset}");
            }
            9 => {
                device.zero(offset, length, random.below(2) == 0).unwrap();
                model[range].fill(0);
            }
            10 => {
                device.trim(offset, length).unwrap();
                // What is there now may be either; from here on it is what is read.
                device.read_at(offset, &mut model[range]).unwrap();
            }
            _ => {
                device.flush().unwrap();
                let extents = device.extents(offset, length).unwrap();
                let total: u64 = extents.iter().map(|extent| extent.length).sum();
                assert_eq!(total, length);
                let mut at = offset as usize;
                for extent in extents {
                    let end = at + extent.length as usize;
                    if extent.allocation != Allocation::Data {
                        assert!(model[at..end].iter().all(|byte| *byte == 0), "at {at}");
                    }
                    at = end;
                }
            }
        }
    }
    device.flush().unwrap();
    let mut whole = vec![0; size as usize];
    again().read_at(0, &mut whole).unwrap();
    assert!(whole == model);
}

#[test]
fn our_client_works_with_nbdkit_and_qemu_nbd_as_with_ours() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    let socket = dir.path().join("s");
    let client = |connections| {
        let options = NbdClientOptions { connections, ..defaults() };
        NbdClient::connect(&Endpoint::Unix(socket.clone()), options).unwrap()
    };
    let reset = || {
        let _ = fs::remove_file(&socket);
        fs::File::create(&file).unwrap().set_len(3 * MIB as u64).unwrap();
    };
    if have("nbdkit", "nbdkit") {
        let place = text(&socket);
        let plugins: [&[&str]; 3] = [
            &["-f", "-U", place, "file", text(&file)],
            &["-f", "-U", place, "memory", "3M"],
            // Requests must be multiples of 4096 there.
            &[
                "-f",
                "-U",
                place,
                "--filter=blocksize-policy",
                "memory",
                "3M",
                "blocksize-minimum=4096",
                "blocksize-preferred=4096",
                "blocksize-maximum=64K",
                "blocksize-error-policy=error",
            ],
        ];
        for arguments in plugins {
            reset();
            let _server = Process::server("nbdkit", arguments, &socket);
            let device = client(4);
            assert_eq!(device.connections(), 4);
            fsx(&device, || client(1), 300);
        }
    }
    if have("qemu-nbd", "qemu-utils") {
        reset();
        let arguments = ["-f", "raw", "-k", text(&socket), "-t", "-e", "8", text(&file)];
        let _server = Process::server("qemu-nbd", &arguments, &socket);
        fsx(&client(2), || client(1), 300);
    }
}

#[test]
fn our_client_speaks_tls_with_nbdkit() {
    if !have("nbdkit", "nbdkit") || !have("openssl", "openssl") {
        return;
    }
    let pem = tempfile::tempdir().unwrap();
    certificates(pem.path());
    let socket = pem.path().join("s");
    let folder = format!("--tls-certificates={}", text(pem.path()));
    let arguments =
        ["-f", "-U", text(&socket), "--tls=require", "--tls-verify-peer", &folder, "memory", "3M"];
    let _server = Process::server("nbdkit", &arguments, &socket);
    let tls = TlsClient::load_pem(pem.path(), "localhost").unwrap();
    let connect = || {
        let options = NbdClientOptions { tls: Some(tls.clone()), ..defaults() };
        NbdClient::connect(&Endpoint::Unix(socket.clone()), options).unwrap()
    };
    fsx(&connect(), connect, 150);
    let refused = NbdClient::connect(&Endpoint::Unix(socket.clone()), defaults()).map(drop);
    assert!(refused.unwrap_err().to_string().contains("it wants TLS"));
}

#[test]
fn a_chain_of_nbdkit_over_ours_over_our_client_over_ours_keeps_flushes() {
    if !have("nbdkit", "nbdkit") {
        return;
    }
    let ram = Arc::new(Ram::new(3 * MIB));
    let inner = Rig::new(ram.clone());
    // Our client as the device of our server.
    let middle =
        Rig::new(Arc::new(inner.client(NbdClientOptions { connections: 2, ..defaults() })));
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let below = format!("socket={}", text(&middle.socket()));
    let _nbdkit = Process::server("nbdkit", &["-f", "-U", text(&socket), "nbd", &below], &socket);
    let connect = || NbdClient::connect(&Endpoint::Unix(socket.clone()), defaults()).unwrap();
    fsx(&connect(), connect, 200);
    assert!(ram.durable() == ram.now(), "the last flush went all the way");
}
