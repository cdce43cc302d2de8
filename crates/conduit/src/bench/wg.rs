//! One TCP stream through the encrypted tunnel in user space, next to Debian's wireguard-go: both
//! ends of both on this computer, over the same veth pair, in turns.

use super::{Group, wire::transfer};
use crate::{
    exec,
    lab::{
        Space,
        tunnel::{Outer, Pair, inner, outer},
        wait_for,
    },
    sys::{self, CardOffload},
};
use anyhow::{Context, ensure};
use bench::{Row, Target};
use std::{
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
    time::Duration,
};

pub(super) const GROUPS: &[Group] = &[Group {
    name: "wg",
    about: "one TCP stream through the tunnel in user space, next to wireguard-go",
    bars: &["conduit.wg."],
    run: streams,
}];

/// What the tunnel is to reach with both ends on two cores.
const LINE: f64 = 3.0;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn streams(quick: bool) -> anyhow::Result<Vec<Row>> {
    let (runs, time) = if quick { (1, 300) } else { (7, 1000) };
    let time = Duration::from_millis(time);
    let pair = Pair::new(&std::env::current_exe()?, Outer::V4)?;
    let go = Go::start(&pair)?;
    let ways = [inner(2).0, Go::address(2)];
    let plain = outer(2).0;
    let run = |to: Ipv4Addr, time| transfer(&pair.a.space, &pair.b.space, to, time);
    for way in ways {
        run(way, Duration::from_millis(100))?;
    }
    let in_turns = || -> anyhow::Result<[f64; 2]> {
        let mut rates = [const { Vec::new() }; 2];
        for turn in 0..runs {
            for at in 0..2 {
                let at = (at + turn) % 2;
                rates[at].push(run(ways[at], time).with_context(|| format!("to {}", ways[at]))?);
            }
        }
        Ok(rates.map(median))
    };
    let [ours, theirs] = in_turns()?;
    let counts = pair.a.status()?.counts;
    let sent = |name| counts.get(name).copied().unwrap_or_default() as f64;
    let per_call = sent("packets_sent") / sent("send_calls").max(1.0);
    let veth = run(plain, time)?;
    let vxlan = overlay(&pair)?;
    run(vxlan, Duration::from_millis(100))?;
    let vxlan = (0..runs).map(|_| run(vxlan, time)).collect::<anyhow::Result<Vec<_>>>()?;
    for end in [&pair.a, &pair.b] {
        as_on_a_wire(&end.space)?;
    }
    let [ours_wire, theirs_wire] = in_turns()?;
    drop(go);
    Ok(vec![
        Row::judged(
            "conduit.wg.tcp | both ends on this computer",
            ours,
            "Gb/s",
            None,
            Some(Target::AtLeast(LINE)),
        ),
        Row::judged(
            "conduit.wg.tcp | next to wireguard-go",
            ours,
            "Gb/s",
            Some(theirs),
            Some(Target::RatioAtLeast(1.0)),
        ),
        Row::judged(
            "conduit.wg.wire.tcp | next to wireguard-go",
            ours_wire,
            "Gb/s",
            Some(theirs_wire),
            Some(Target::RatioAtLeast(1.0)),
        ),
        Row::judged("conduit.wg.tcp | next to the veth itself", ours, "Gb/s", Some(veth), None),
        Row::judged(
            "conduit.wg.vxlan.tcp | vxlan over the tunnel",
            median(vxlan),
            "Gb/s",
            None,
            None,
        ),
        Row::judged("conduit.wg.batch | packets in a send call", per_call, "packets", None, None),
    ])
}

/// vxlan over the tunnel, as agents have it; where its other end is.
fn overlay(pair: &Pair) -> anyhow::Result<Ipv4Addr> {
    for (number, end) in [(1_u8, &pair.a), (2, &pair.b)] {
        let other = 3 - number;
        let (own, its) = (inner(number).0, inner(other).0);
        end.space.ip(&format!(
            "link add vx0 type vxlan id 100 local {own} remote {its} dstport 4789 nolearning
            link set vx0 mtu 1370 up
            address add 10.97.0.{number}/24 dev vx0\n"
        ))?;
    }
    Ok(Ipv4Addr::new(10, 97, 0, 2))
}

/// Packets of wire size between the ends, put together again where they arrive: what a network card
/// does that cuts nothing itself.
fn as_on_a_wire(space: &Space) -> anyhow::Result<()> {
    space.ip("link set dev under0 gso_max_segs 1\n")?;
    space
        .run(|| {
            sys::set_card("under0", CardOffload::Tso, false)?;
            sys::set_card("under0", CardOffload::Gro, true)
        })
        .context("set the offloads of under0")
}

/// wireguard-go at both ends, over the same pair.
struct Go {
    children: Vec<(String, Child)>,
}

impl Go {
    fn address(number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 98, 0, number)
    }

    fn start(pair: &Pair) -> anyhow::Result<Self> {
        let mut go = Self { children: Vec::new() };
        let folder = tempfile::tempdir()?;
        let mut publics = Vec::new();
        for number in [1_u8, 2] {
            let key = conduit_wg::PrivateKey::generate()?;
            std::fs::write(folder.path().join(format!("key{number}")), key.text())?;
            publics.push(key.public().to_string());
        }
        for (number, end) in [(1_u8, &pair.a), (2, &pair.b)] {
            let other = 3 - number;
            // Its control socket is named by the interface, whatever the namespace.
            let name = format!("cdgo{}-{number}", std::process::id() % 100_000);
            let mut command = Command::new("wireguard-go");
            command
                .args(["-f", &name])
                .env("WG_PROCESS_FOREGROUND", "1")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            let child = end.space.run(|| command.spawn()).context(
                "start wireguard-go, which this is measured next to (apt install wireguard-go \
                 wireguard-tools)",
            )?;
            go.children.push((name.clone(), child));
            let ready = || set(&end.space, &["show", &name]).is_ok();
            ensure!(wait_for(Duration::from_secs(20), ready), "wireguard-go did not start");
            let key = folder.path().join(format!("key{number}")).display().to_string();
            let endpoint = format!("{}:7452", outer(other).0);
            let allowed = format!("{}/32", Self::address(other));
            let peer = &publics[usize::from(other) - 1];
            #[rustfmt::skip]
            set(&end.space, &[
                "set", &name, "listen-port", "7452", "private-key", &key,
                "peer", peer, "endpoint", &endpoint, "allowed-ips", &allowed,
            ])?;
            end.space.ip(&format!(
                "address add {}/24 dev {name}\nlink set dev {name} mtu 1420 up\n",
                Self::address(number)
            ))?;
        }
        Ok(go)
    }
}

fn set(space: &Space, args: &[&str]) -> anyhow::Result<()> {
    space.run(|| exec::run("wg", args, "")).map(drop).context("run wg")
}

impl Drop for Go {
    fn drop(&mut self) {
        for (name, child) in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
            // Which it leaves behind.
            let _ = std::fs::remove_file(format!("/var/run/wireguard/{name}.sock"));
        }
    }
}
