//! Stock guests, which are told nothing: a DHCP client and the kernel's own IPv6, on each host that they
//! come to.

use crate::rig::{CLIENTS, CLIENTS_V6, LIMIT, Machine, Rig, SILENCE, net, translated, udp_of};
use conduit::{
    MachineNet,
    lab::{machine::Guest, wait_for},
    tap::GATEWAY,
};
use dhcproto::{
    Encodable,
    v4::{DhcpOption, Message, MessageType, Opcode},
};
use nix::{
    sys::{
        signal::{Signal, kill},
        socket::{setsockopt, sockopt},
    },
    unistd::Pid,
};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

/// What a distribution's script does with what udhcpc was told, and a line for the test.
const SCRIPT: &str = r#"#!/bin/sh
case "$1" in
bound | renew)
    ip link set dev "$interface" mtu "$mtu"
    ip -4 address replace "$ip/$mask" dev "$interface"
    set -- "$1" $staticroutes
    what=$1
    shift
    while [ $# -ge 2 ]; do
        via="via $2"
        [ "$2" != 0.0.0.0 ] || via=
        ip -4 route replace "$1" $via dev "$interface"
        shift 2
    done
    echo "$what $ip $mask $serverid $mtu $hostname $lease $dns $domain" >> "$LOG"
    ;;
esac
"#;

/// A udhcpc in a guest.
struct Client {
    process: Child,
    log: PathBuf,
}

impl Client {
    fn start(guest: &Guest, folder: &Path, name: &str) -> Self {
        let (script, log) = (folder.join(format!("{name}.sh")), folder.join(format!("{name}.log")));
        std::fs::write(&script, SCRIPT).unwrap();
        std::fs::write(&log, "").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&script, mode).unwrap();
        let process = guest.run(|| {
            Command::new("busybox")
                .args(["udhcpc", "-f", "-i", "eth0", "-t", "20", "-T", "1", "-s"])
                .arg(&script)
                .args(["-O", "staticroutes", "-O", "mtu"])
                .env("LOG", &log)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("busybox is installed (scripts/setup.sh)")
        });
        Self { process, log }
    }

    /// What it was told, and did, in order.
    fn lines(&self) -> Vec<String> {
        std::fs::read_to_string(&self.log).unwrap().lines().map(str::to_owned).collect()
    }

    /// Waits until it has been told for the `count`th time, and says what.
    fn told(&self, count: usize) -> String {
        assert!(wait_for(LIMIT, || self.lines().len() >= count), "{:?}", self.lines());
        self.lines()[count - 1].clone()
    }

    /// Has it ask again, straight whom it was told by.
    fn renew(&self) {
        kill(Pid::from_raw(self.process.id().try_into().unwrap()), Signal::SIGUSR1).unwrap();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A machine whose IPv6 address its kernel can make itself.
fn stock(name: &str, network: u16, number: u8) -> MachineNet {
    let net = net(name, network, number);
    let [a, b, c, d, e, f] = net.mac;
    let groups = [[a ^ 2, b], [c, 0xff], [0xfe, d], [e, f]].map(u16::from_be_bytes);
    let [e, f, g, h] = groups;
    MachineNet { address_v6: Some(Ipv6Addr::new(0xfd77, 0, 0, 0, e, f, g, h)), mtu: 1380, ..net }
}

/// A client outside hears the machine, by the edge.
fn speaks(rig: &Rig, machine: &Machine, port: u16, v6: bool) -> bool {
    let to: IpAddr = if v6 { CLIENTS_V6[0].into() } else { CLIENTS[0].into() };
    let outside = udp_of(&rig.clients[0], to, port);
    outside.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let any: IpAddr = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let inside = machine.guest.run(|| UdpSocket::bind((any, 0))).unwrap();
    wait_for(LIMIT, || {
        let said = inside.send_to(b"here", (to, port)).is_ok();
        said && outside.recv_from(&mut [0; 16]).is_ok()
    })
}

#[test]
fn a_stock_guest_gets_address_routes_mtu_and_name_by_dhcp_and_renews_them_wherever_it_is() {
    let rig = Rig::new(&translated());
    let mut machine = rig.boot_bare(stock("asks", 7, 5), 0);
    // Another tenant's machine with the same address is on the same host, and gets its own answers.
    let twin = rig.boot_bare(MachineNet { mtu: 1400, ..stock("twin", 9, 5) }, 0);
    let client = Client::start(&machine.guest, rig.folder.path(), "asks");
    let other = Client::start(&twin.guest, rig.folder.path(), "twin");
    let told = format!("10.77.0.5 32 {GATEWAY} 1380 asks 43200 {GATEWAY} machine.internal");
    assert_eq!(client.told(1), format!("bound {told}"));
    assert_eq!(
        other.told(1),
        format!("bound 10.77.0.5 32 {GATEWAY} 1400 twin 43200 {GATEWAY} machine.internal")
    );
    assert!(speaks(&rig, &machine, 4000, false) && speaks(&rig, &twin, 4001, false));
    for renewal in 2..4 {
        client.renew();
        assert_eq!(client.told(renewal), format!("renew {told}"));
        rig.move_machine(&mut machine, Duration::from_millis(20));
    }
    client.renew();
    assert_eq!(client.told(4), format!("renew {told}"));
    assert!(speaks(&rig, &machine, 4002, false));
}

#[test]
fn a_guests_kernel_makes_its_own_ipv6_address_and_finds_its_router_before_and_after_a_move() {
    let rig = Rig::new(&translated());
    let machine = stock("kernel", 7, 5);
    let address = machine.address_v6.unwrap();
    let mut machine = rig.boot_bare(machine, 0);
    let shown = |machine: &Machine, what: &str| {
        let words: Vec<&str> = what.split(' ').collect();
        machine.guest.run(|| {
            let out = Command::new("ip").arg("-6").args(words).output().unwrap();
            String::from_utf8(out.stdout).unwrap()
        })
    };
    let ready = |machine: &Machine| {
        let addresses = shown(machine, "address show dev eth0 scope global -tentative");
        let routes = shown(machine, "route show default");
        addresses.contains(&format!("{address}/64"))
            && routes.contains("via fe80::1 dev eth0 proto ra")
    };
    assert!(wait_for(LIMIT, || ready(&machine)), "{}", shown(&machine, "address"));
    let mtu = machine.guest.run(|| std::fs::read_to_string("/proc/sys/net/ipv6/conf/eth0/mtu"));
    assert_eq!(mtu.unwrap().trim(), "1380");
    assert!(speaks(&rig, &machine, 4000, true));
    rig.move_machine(&mut machine, Duration::from_millis(20));
    assert!(speaks(&rig, &machine, 4001, true));
    // As after its interface was down: it asks the host that it is on now.
    machine.guest.space().ip("link set eth0 down\nlink set eth0 up\n").unwrap();
    assert!(wait_for(LIMIT, || ready(&machine)), "{}", shown(&machine, "address"));
    assert!(speaks(&rig, &machine, 4002, true));
}

#[test]
fn a_guest_that_asks_all_the_time_is_bounded_and_its_neighbour_is_answered() {
    let rig = Rig::new(&translated());
    let (noisy, calm) =
        (rig.boot_bare(stock("noisy", 7, 5), 0), rig.boot_bare(stock("calm", 7, 6), 0));
    let socket = noisy.guest.run(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 68)).unwrap();
        setsockopt(&socket, sockopt::BindToDevice, &"eth0".into()).unwrap();
        socket.set_broadcast(true).unwrap();
        socket
    });
    noisy.guest.space().ip("route add default dev eth0\n").unwrap();
    let ask = |mac: &[u8], length: u8| {
        let mut question = Message::default();
        question.set_opcode(Opcode::BootRequest).set_chaddr(mac);
        question.opts_mut().insert(DhcpOption::MessageType(MessageType::Discover));
        let mut bytes = question.to_vec().unwrap();
        bytes[2] = length;
        socket.send_to(&bytes, (Ipv4Addr::BROADCAST, 67)).unwrap();
    };
    let answers = || {
        socket.set_read_timeout(Some(SILENCE)).unwrap();
        std::iter::from_fn(|| socket.recv_from(&mut [0; 1500]).ok()).count()
    };
    // What claims to be of another machine, or makes no sense, is not answered, and kills nobody.
    ask(&calm.net.mac, 6);
    ask(&noisy.net.mac, 255);
    socket.send_to(b"nonsense", (Ipv4Addr::BROADCAST, 67)).unwrap();
    assert_eq!(answers(), 0);
    let start = std::time::Instant::now();
    for _ in 0..2000 {
        ask(&noisy.net.mac, 6);
    }
    let answered = answers();
    let most = 41 + 21 * (start.elapsed().as_secs() as usize + 1);
    assert!((1..=most).contains(&answered), "{answered} of 2000 were answered");
    let client = Client::start(&calm.guest, rig.folder.path(), "calm");
    assert!(client.told(1).starts_with("bound 10.77.0.6 32"), "{:?}", client.lines());
}
