//! `silo serve` by config and by flags, as processes.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{
    Client, FLUSH,
    silo::{Running, silo},
};
use std::{fs, path::Path};

const MIB: usize = 1 << 20;

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A config file with this text.
fn config(dir: &Path, text: &str) -> String {
    let file = dir.join("silo.toml");
    fs::write(&file, text).unwrap();
    path(&file).to_owned()
}

#[test]
fn devices_of_a_config_are_served_each_on_its_own_and_keep_what_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let file = config(
        dir.path(),
        "[device.one]\nsize = \"1M\"\nsource = { file = { path = \"one.raw\", create = true } }\n\
         expose = { nbd = { unix = \"one.sock\" } }\n\
         [device.two]\nsize = 5000\nsource = \"memory\"\nexpose = { nbd = { unix = \"two.sock\" } }\n",
    );
    let running = Running::start(["serve", "--config", &file]);
    let devices = running.ready["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 2);
    assert_eq!(devices[1]["bytes"], 5000);
    assert_eq!(devices[1]["protocol"], "nbd");
    let (mut one, size) = Client::go(&dir.path().join("one.sock")).unwrap();
    assert_eq!(size, MIB as u64);
    let (mut two, size) = Client::go(&dir.path().join("two.sock")).unwrap();
    assert_eq!(size, 5000);
    assert_eq!(one.write(1000, &[1; 9000], 0).unwrap(), 0);
    assert_eq!(two.write(4000, &[2; 1000], 0).unwrap(), 0);
    assert_eq!(one.call(FLUSH, 0, 0, 0).unwrap(), 0);
    assert_eq!(two.read(3999, 1001).unwrap(), [&[0][..], &[2; 1000]].concat());

    let raw = dir.path().join("one.raw");
    let other = ["serve", "--file", path(&raw), "--socket", "s"];
    silo(other).failed(1, "is open in another process");
    drop((one, two));
    running.stop().good();
    let mut wanted = vec![0; MIB];
    wanted[1000..10_000].fill(1);
    assert_eq!(fs::read(&raw).unwrap(), wanted);
}

#[test]
fn an_image_with_another_hash_or_size_is_refused_before_anything_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("image"), dir.path().join("s"));
    let content: Vec<u8> = (0..MIB + 100).map(|at| (at % 251) as u8).collect();
    fs::write(&image, &content).unwrap();
    let hash = blake3::hash(&content).to_hex().to_string();
    let serve = |hash: &str, more: &[&str]| {
        let image = path(&image).to_owned();
        let mut arguments =
            vec!["serve", "--file", &image, "--socket", path(&socket), "--read-only"];
        arguments.extend(["--hash", hash]);
        arguments.extend(more);
        arguments.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let wrong = hash.replace(|c: char| c.is_ascii_digit(), "0");
    silo(serve(&wrong, &[])).failed(1, "device \"disk\": the content has hash");
    silo(serve("abc", &[])).failed(2, "hash: a root hash is 64 hexadecimal digits");
    silo(serve(&hash, &["--size", "1M"])).failed(1, "correct `size` or leave it out");
    assert!(!socket.exists());

    let running = Running::start(serve(&hash, &[]));
    let (mut client, size) = Client::go(&socket).unwrap();
    assert_eq!(size, content.len() as u64);
    assert_eq!(client.read(1 << 20, 100).unwrap(), content[1 << 20..]);
    // EPERM
    assert_eq!(client.write(0, &[1], 0).unwrap(), 1);
    drop(client);
    running.stop().good();
    assert_eq!(fs::read(&image).unwrap(), content);
}

#[test]
fn flags_that_make_no_sense_together_are_refused() {
    silo(["serve", "--memory", "1M"]).failed(1, "nobody could reach it; add --socket");
    silo(["serve", "--memory", "1M", "--tcp", "127.0.0.1:0"]).failed(2, "tcp: needs TLS");
    silo(["serve", "--memory", "1M", "--file", "x", "--socket", "s"]).failed(2, "cannot be used");
    silo(["serve", "--memory", "0", "--socket", "s"]).failed(2, "size: a device has at least one");
    silo(["serve", "--config", "x", "--socket", "s"]).failed(2, "cannot be used with");
}

#[test]
fn layers_over_a_verified_base_keep_what_was_flushed_across_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let (base, socket) = (dir.path().join("base"), dir.path().join("s"));
    let layers = [dir.path().join("golden"), dir.path().join("mine")];
    let content: Vec<u8> = (0..MIB).map(|at| (at / 4096 % 250 + 1) as u8).collect();
    fs::write(&base, &content).unwrap();
    let arguments = [
        ["serve", "--file", path(&base)],
        ["--create", "--layer", path(&layers[0])],
        ["--layer", path(&layers[1]), "--socket"],
    ];
    let arguments = || arguments.iter().flatten().copied().chain([path(&socket)]);
    let running = Running::start(arguments());
    let (mut client, _) = Client::go(&socket).unwrap();
    assert_eq!(client.write(10_000, &[0xaa; 5000], 0).unwrap(), 0);
    assert_eq!(client.call(FLUSH, 0, 0, 0).unwrap(), 0);
    running.signal(nix::sys::signal::Signal::SIGKILL);
    assert_eq!(running.wait().code, 128 + 9);

    let running = Running::start(arguments());
    let (mut client, _) = Client::go(&socket).unwrap();
    let mut wanted = content.clone();
    wanted[10_000..15_000].fill(0xaa);
    assert!(client.read(0, MIB as u32).unwrap() == wanted);
    drop(client);
    running.stop().good();
    assert!(fs::read(&base).unwrap() == content);

    // Another base under the same layers is found out, also without a hash on the command line.
    fs::write(&base, vec![1; MIB]).unwrap();
    silo(arguments()).failed(1, "nothing of it is used");
}

#[test]
fn a_flush_through_cache_and_filter_is_durable_across_kill_9_and_their_figures_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = config(
        dir.path(),
        "[device.d]\nsize = \"4M\"\nsource = { directory = { path = \"pieces\", piece = \"64K\" } }\n\
         write-cache = { limit = \"8M\", max-age = \"1h\" }\nfilter = { allowance = 8 }\n\
         expose = { nbd = { unix = \"s\" } }\n[metrics]\nlisten = \"127.0.0.1:0\"\n",
    );
    let socket = dir.path().join("s");
    let running = Running::start(["serve", "--config", &file]);
    let (mut client, _) = Client::go(&socket).unwrap();
    assert_eq!(client.write(100_000, &vec![5; 200_000], 0).unwrap(), 0);
    assert_eq!(client.call(FLUSH, 0, 0, 0).unwrap(), 0);
    // The same again changes nothing.
    assert_eq!(client.write(100_000, &vec![5; 200_000], 0).unwrap(), 0);
    let metrics = running.ready["metrics"].as_str().unwrap();
    let (_, text) = common::silo::http(metrics, "GET", "/metrics");
    for line in [
        "silo_filter_dropped_bytes_total{device=\"d\"} 200000",
        "silo_filter_forwarded_bytes_total{device=\"d\"} 200000",
    ] {
        assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
    }
    running.signal(nix::sys::signal::Signal::SIGKILL);
    running.wait();

    let running = Running::start(["serve", "--config", &file]);
    let (mut client, _) = Client::go(&socket).unwrap();
    let mut wanted = vec![0; 4 * MIB];
    wanted[100_000..300_000].fill(5);
    let have: Vec<u8> = (0..4).flat_map(|at| client.read(at << 20, MIB as u32).unwrap()).collect();
    assert!(have == wanted);
    drop(client);
    running.stop().good();
}

#[test]
fn one_device_is_exposed_in_each_way_that_this_kernel_has() {
    let dir = tempfile::tempdir().unwrap();
    let (image, mount) = (dir.path().join("image"), dir.path().join("mnt"));
    fs::create_dir(&mount).unwrap();
    let content: Vec<u8> = (0..MIB).map(|at| (at % 253) as u8).collect();
    fs::write(&image, &content).unwrap();
    let file = ["--file", path(&image)];
    let fuse = Running::start(["expose", "fuse", path(&mount)].iter().chain(&file));
    let shown = fuse.ready["devices"][0]["at"].as_str().unwrap().to_owned();
    assert_eq!(fuse.ready["devices"][0]["protocol"], "fuse");
    assert!(fs::read(&shown).unwrap() == content);
    fuse.stop().good();
    assert!(!Path::new(&shown).exists());

    let socket = dir.path().join("s");
    let nbd = ["expose", "nbd", "--socket", path(&socket)];
    let nbd = Running::start(nbd.iter().chain(&file));
    let (mut client, _) = Client::go(&socket).unwrap();
    assert_eq!(client.read(1000, 100).unwrap(), content[1000..1100]);
    drop(client);
    nbd.stop().good();

    let vhost = ["expose", "vhost-user-blk", path(&socket)];
    let vhost = Running::start(vhost.iter().chain(&file));
    assert_eq!(vhost.ready["devices"][0]["protocol"], "vhost-user-blk");
    vhost.stop().good();

    let attach = ["expose", "attach", "/dev/sda", "--socket", path(&socket)];
    silo(attach.iter().chain(&file)).failed(1, "/dev/nbd0");

    if !Path::new("/dev/ublk-control").exists() {
        silo(["expose", "ublk"].iter().chain(&file)).failed(1, "modprobe ublk_drv");
        silo(["serve", "--ublk"].iter().chain(&file)).failed(1, "this kernel has no ublk");
    }
}

#[test]
fn hostile_paths_are_errors_that_touch_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let folder = path(dir.path());
    for source in [
        ["--file", folder],
        ["--file", "/dev/null"],
        ["--file", "/proc/self/mem"],
        ["--overlay", "/dev/null"],
        ["--nbd", "nbd+unix:///?socket=/nowhere"],
    ] {
        let said = silo(["serve", "--socket", "never"].iter().chain(&source));
        assert_eq!(said.code, 1, "{source:?}: {said:?}");
        assert!(said.err.starts_with("silo: ") && !said.err.contains("panicked"), "{said:?}");
    }
    // A file where a socket is wanted stays as it is.
    let precious = dir.path().join("precious");
    fs::write(&precious, "x").unwrap();
    let said = silo(["serve", "--memory", "1M", "--socket", path(&precious)]);
    assert_eq!(said.code, 1, "{said:?}");
    assert_eq!(fs::read(&precious).unwrap(), b"x");
    let long = dir.path().join("x".repeat(200));
    assert_eq!(silo(["serve", "--memory", "1M", "--socket", path(&long)]).code, 1);
}
