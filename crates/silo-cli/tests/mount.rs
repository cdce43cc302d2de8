//! `silo mount` and `silo serve --nbd` over a `silo serve` in its own process, under mutual TLS.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{
    Client, FLUSH,
    silo::{Running, silo},
};
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::PathBuf,
};

const SIZE: usize = 4 << 20;

struct Rig {
    dir: tempfile::TempDir,
    content: Vec<u8>,
    server: Running,
    url: String,
}

impl Rig {
    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// A server of a file, for hosts of the authority in `tls`.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        for authority in ["tls", "others"] {
            silo(["tls", "init", &path(authority)]).good();
            for host in ["server", "client"] {
                silo(["tls", "issue", &path(authority), host]).good();
            }
        }
        let content: Vec<u8> =
            (0..SIZE).map(|at| (at / 4096 % 251) as u8 ^ (at % 13) as u8).collect();
        fs::write(path("far"), &content).unwrap();
        let (far, tls) = (path("far"), path("tls"));
        let server = Running::start([
            "serve",
            "--file",
            &far,
            "--tcp",
            "127.0.0.1:0",
            "--export",
            "far",
            "--tls",
            &tls,
            "--host",
            "server",
        ]);
        let address = server.ready["devices"][0]["at"].as_str().unwrap();
        let url = format!("nbds://{address}/far");
        Self { content, server, url, dir }
    }

    fn mount(&self, more: &[&str]) -> Running {
        let (tls, socket) = (self.path("tls"), self.path("near"));
        let what = ["mount", "--nbd", &self.url, "--peer-name", "server", "--socket", &socket];
        let who = ["--tls", &tls, "--host", "client"];
        Running::start([&what[..], &who, more].concat())
    }
}

fn read_all(socket: &str) -> Vec<u8> {
    let (mut client, size) = Client::go(&PathBuf::from(socket)).unwrap();
    (0..size).step_by(1 << 20).flat_map(|at| client.read(at, 1 << 20).unwrap()).collect()
}

#[test]
fn a_managed_mount_pulls_first_reads_writes_and_writes_back_over_mutual_tls() {
    let rig = Rig::new();
    let mut wanted = rig.content.clone();
    let mount = rig.mount(&["--pull-first", "1M", "--write-back", "100ms", "--order", "2M+1M"]);
    assert!(mount.ready["here_bytes"].as_u64() >= Some(1 << 20), "{}", mount.ready);
    // Another process maps the same memory.
    let memory = File::open(mount.ready["memory"].as_str().unwrap()).unwrap();
    assert!(read_all(&rig.path("near")) == wanted);
    let mut page = [0; 4096];
    memory.read_exact_at(&mut page, 2 << 20).unwrap();
    assert_eq!(page, wanted[2 << 20..(2 << 20) + 4096]);

    let (mut client, _) = Client::go(&PathBuf::from(rig.path("near"))).unwrap();
    assert_eq!(client.write(100_000, &[0xee; 10_000], 0).unwrap(), 0);
    assert_eq!(client.call(FLUSH, 0, 0, 0).unwrap(), 0);
    wanted[100_000..110_000].fill(0xee);
    assert!(fs::read(rig.path("far")).unwrap() == wanted);
    assert_eq!(client.write(0, &[0xdd; 512], 0).unwrap(), 0);
    drop(client);
    mount.stop().good();
    wanted[..512].fill(0xdd);
    assert!(fs::read(rig.path("far")).unwrap() == wanted);
    rig.server.stop().good();
}

#[test]
fn a_direct_mount_fetches_what_is_touched_and_a_device_of_another_silo_is_served_on() {
    let rig = Rig::new();
    let mount = rig.mount(&["--direct", "--read-ahead", "0"]);
    assert_eq!(mount.ready["here_bytes"], 0);
    let (mut client, _) = Client::go(&PathBuf::from(rig.path("near"))).unwrap();
    assert!(client.read(3 << 20, 8192).unwrap() == rig.content[3 << 20..(3 << 20) + 8192]);
    drop(client);
    mount.stop().good();

    let (tls, socket) = (rig.path("tls"), rig.path("on"));
    let on = ["serve", "--nbd", &rig.url, "--peer-name", "server", "--socket", &socket];
    let running = Running::start([&on[..], &["--tls", &tls, "--host", "client"]].concat());
    assert!(read_all(&socket) == rig.content);
    running.stop().good();
}

#[test]
fn wrong_certificates_and_names_get_an_error_that_names_the_matter() {
    let rig = Rig::new();
    let (tls, others) = (rig.path("tls"), rig.path("others"));
    let mount = |tls: &str, peer: &str| {
        let what = ["mount", "--nbd", &rig.url, "--peer-name", peer, "--socket", "never"];
        silo([&what[..], &["--tls", tls, "--host", "client"]].concat())
    };
    mount(&others, "server").failed(1, "was not issued by the authority");
    mount(&tls, "client").failed(1, "certificate");
    silo(["mount", "--nbd", &rig.url, "--socket", "never"]).failed(1, "needs TLS");
    mount(&rig.path("nowhere"), "server").failed(1, "nowhere");
    let plain = rig.url.replace("nbds://", "nbd://");
    silo(["mount", "--nbd", &plain, "--socket", "never"]).failed(1, "TLS");
    silo(["mount", "--nbd", "ndb://x", "--socket", "never"]).failed(2, "it must begin with nbd");
    silo(["mount", "--memory", "1M", "--order", "5"]).failed(2, "write OFFSET+LENGTH");
    // The server goes on.
    let mount = rig.mount(&[]);
    assert!(read_all(&rig.path("near")) == rig.content);
    mount.stop().good();
}
