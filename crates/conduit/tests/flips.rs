//! A flip that was answered is known whoever is killed next: agents and an edge as processes, each in
//! a namespace of its own, killed before their files follow. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use conduit::{
    AgentDataPath, DataPath, HostEndpoint, MachineNet, NetError,
    lab::{Space, wait_for},
    wire::Status,
};
use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

const SOON: Duration = Duration::from_secs(30);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 5);

fn net() -> MachineNet {
    MachineNet::new("m", ADDRESS, [2, 0, 0, 0, 0, 5], 1400)
}

/// An agent or edge that can be killed and started again.
struct Daemon {
    space: Space,
    args: Vec<String>,
    socket: PathBuf,
    state: PathBuf,
    child: Option<Child>,
}

impl Daemon {
    fn new(space: Space, folder: &Path, role: &str, name: &str, own: &[&str]) -> Self {
        let (socket, state) = (folder.join(format!("{name}.sock")), folder.join(name));
        let mut args: Vec<String> = [role].iter().chain(own).map(ToString::to_string).collect();
        let shared =
            ["--plaintext", "--encrypt", "off", "--path", "bpf", "--remove-on-exit", "--socket"];
        args.extend(shared.map(str::to_owned));
        args.extend([socket.display().to_string(), "--state".into(), state.display().to_string()]);
        let mut daemon = Self { space, args, socket, state, child: None };
        daemon.start();
        daemon
    }

    fn start(&mut self) {
        let args = &self.args;
        let child = self.space.run(|| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_conduit"));
            command.args(args).env("CONDUIT_LOG", "warn").stdin(Stdio::null()).spawn().unwrap()
        });
        self.child = Some(child);
        assert!(wait_for(SOON, || self.status().is_some()), "{:?} answers", self.args);
    }

    fn status(&self) -> Option<Status> {
        conduit::status(&self.socket).ok()
    }

    /// `kill -9`.
    fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn machine(&self) -> Option<(String, u64)> {
        let machine = self.status()?.machines.into_iter().find(|m| m.net.address == ADDRESS)?;
        Some((machine.place, machine.epoch))
    }

    /// The epoch that its state file says.
    fn written(&self) -> u64 {
        let path = self.state.join("machines").join(format!("{ADDRESS}.json"));
        let text = std::fs::read_to_string(path).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["epoch"].as_u64().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = child.wait();
    }
}

struct Rig {
    edge: Daemon,
    hosts: Vec<Daemon>,
    paths: Vec<AgentDataPath>,
    _folder: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let space = Space::new().expect("these tests make namespaces: run them as root");
        space.ip("link add under0 type bridge\naddress add 10.88.0.1/24 dev under0\nlink set under0 up\n")
            .unwrap();
        let nodes = [2, 3].map(|at| {
            let node = Space::new().unwrap();
            node.join("eth0", &space, &format!("to{at}")).unwrap();
            space.ip(&format!("link set to{at} master under0\n")).unwrap();
            node.ip(&format!("address add 10.88.0.{at}/24 dev eth0\n")).unwrap();
            (at, node)
        });
        let own = ["--public", "10.88.0.1", "--underlay", "10.88.0.1"];
        let edge = Daemon::new(space, folder.path(), "edge", "edge", &own);
        let hosts: Vec<Daemon> = nodes
            .into_iter()
            .map(|(at, node)| {
                let name = format!("host{at}");
                let (overlay, underlay) = (format!("100.64.0.{at}"), format!("10.88.0.{at}"));
                #[rustfmt::skip]
                let own = [
                    "--host", &name, "--overlay", &overlay, "--underlay", &underlay,
                    "--edge", "10.88.0.1:7450",
                ];
                Daemon::new(node, folder.path(), "agent", &name, &own)
            })
            .collect();
        for host in &hosts {
            let other = || host.status().is_some_and(|s| s.peers.len() == 2);
            assert!(wait_for(SOON, other), "it knows edge and other host");
        }
        let paths = hosts.iter().map(|h| AgentDataPath::connect(&h.socket).unwrap()).collect();
        Self { edge, hosts, paths, _folder: folder }
    }
}

#[test]
fn an_agent_that_is_killed_right_after_a_flip_knows_it_though_its_file_does_not() {
    let mut rig = Rig::new();
    let _tap = rig.hosts[0].space.run(|| rig.paths[0].prepare(&net())).unwrap();
    rig.paths[0].resume(&net(), 1).unwrap();
    rig.paths[0].settled(&net(), 1, SOON).unwrap();
    let to = HostEndpoint(Ipv4Addr::new(100, 64, 0, 3));
    let mut behind = 0;
    for n in 0..6 {
        let (away, back) = (2 + 2 * n, 3 + 2 * n);
        rig.paths[0].divert(&net(), &to, away).unwrap();
        rig.hosts[0].kill();
        behind += u32::from(rig.hosts[0].written() < away);
        rig.hosts[0].start();
        assert_eq!(rig.hosts[0].machine(), Some(("100.64.0.3".into(), away)));
        // What the map has seen is never gone back behind.
        let late = rig.paths[0].resume(&net(), away - 1).unwrap_err();
        assert!(matches!(late, NetError::StaleEpoch { .. }), "{late}");
        let taken = rig.paths[0].resume(&net(), away).unwrap_err();
        assert!(matches!(taken, NetError::EpochTaken { .. }), "{taken}");
        rig.paths[0].resume(&net(), back).unwrap();
        rig.hosts[0].kill();
        behind += u32::from(rig.hosts[0].written() < back);
        rig.hosts[0].start();
        assert_eq!(rig.hosts[0].machine(), Some(("here".into(), back)));
        rig.paths[0].settled(&net(), back, SOON).unwrap();
        assert_eq!(rig.edge.machine(), Some(("100.64.0.2".into(), back)));
    }
    assert!(behind > 0, "no kill was before its file: the map was not needed");
    // In the end the files follow.
    assert!(wait_for(SOON, || rig.hosts[0].written() == 13));
}

#[test]
fn an_edge_that_is_killed_right_after_a_flip_knows_who_has_the_machine() {
    let mut rig = Rig::new();
    let _tap = rig.hosts[0].space.run(|| rig.paths[0].prepare(&net())).unwrap();
    let other = rig.hosts[1].space.run(|| rig.paths[1].prepare(&net())).unwrap();
    rig.paths[0].resume(&net(), 1).unwrap();
    rig.paths[0].settled(&net(), 1, SOON).unwrap();
    let mut behind = 0;
    for epoch in 2..8 {
        let at = usize::from(epoch % 2 == 0);
        rig.paths[at].resume(&net(), epoch).unwrap();
        let host = format!("100.64.0.{}", 2 + at);
        let known = || rig.edge.machine() == Some((host.clone(), epoch));
        assert!(wait_for(SOON, known), "the edge hears of it");
        rig.edge.kill();
        // Nobody can tell it again.
        for host in &mut rig.hosts {
            host.kill();
        }
        behind += u32::from(rig.edge.written() < epoch);
        rig.edge.start();
        assert_eq!(rig.edge.machine(), Some((host, epoch)));
        for host in &mut rig.hosts {
            host.start();
        }
        rig.paths[at].settled(&net(), epoch, SOON).unwrap();
    }
    assert!(behind > 0, "no kill was before its file: the map was not needed");
    drop(other);
}
