//! Takes guests' questions for names to the edge, and its answers back. A guest asks its gateway, which every
//! host is; the edge is told the network of the tap that the question came in by, so that it answers with
//! that tenant's machines. Nothing is kept here: a host that a machine has just come to answers like the last.
//!
//! By UDP nothing waits: the answer is sent by the thread that hears it from the edge. By TCP each connection
//! has a thread for as long as it is in use, and each tap a listener of its own, because two tenants' machines
//! on one host may have the same address and port.

use super::{LONGEST, Shared, pause_if_broken, receive, spawn};
use crate::{
    book::Place,
    datapath::{MachineKey, NetworkId},
    exec::KernelError,
    netlink::interface_index,
    tap::{self, GATEWAY},
    wire::{EdgeSays, HostSays, from_text, to_text},
};
use hickory_proto::op::ResponseCode;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, SockaddrIn,
        SockaddrStorage, bind, listen, sendmsg, setsockopt, socket, sockopt,
    },
};
use std::{
    collections::BTreeMap,
    io::{self, IoSlice, Read, Write},
    net::{SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

const PORT: u16 = 53;
/// The edge asks others for so long, and each of several.
const PATIENCE: Duration = Duration::from_secs(5);
/// A connection that says nothing for so long is ended.
const IDLE: Duration = Duration::from_secs(10);
/// Connections of all machines, and of one.
const CONNECTIONS: (usize, usize) = (256, 8);
/// How soon a machine that has come here is heard by TCP as well.
const LOOK_EVERY: Duration = Duration::from_millis(300);

/// Starts to answer; an error says why nobody is answered.
pub(super) fn serve(shared: &Arc<Shared>) -> Result<(), KernelError> {
    let fail = |e: io::Error| {
        let detail = format!("{e}; another name server of this host may have the port");
        KernelError::new(format!("answer names at {GATEWAY}:{PORT}"), detail)
    };
    let udp = Arc::new(UdpSocket::from(open(SockType::Datagram, None).map_err(fail)?));
    setsockopt(&udp, sockopt::Ipv4PacketInfo, &true).map_err(|e| fail(e.into()))?;
    shared.answers_names.store(true, Ordering::Relaxed);
    let by_udp = shared.clone();
    spawn("agent-names", move || {
        let mut bytes = [0; LONGEST];
        loop {
            if let Err(error) = take(&udp, &by_udp, &mut bytes) {
                tracing::debug!(%error, "a question for a name was not taken");
                pause_if_broken(&error);
            }
        }
    });
    let shared = shared.clone();
    spawn("agent-names-tcp", move || listen_at_taps(&shared));
    Ok(())
}

/// A socket at the gateway's address, which comes and goes with taps.
fn open(kind: SockType, tap: Option<&str>) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::IpFreebind, &true)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    if let Some(tap) = tap {
        setsockopt(&socket, sockopt::BindToDevice, &tap.into())?;
    }
    bind(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(GATEWAY, PORT)))?;
    Ok(socket)
}

fn ask(
    shared: &Shared,
    network: NetworkId,
    question: &[u8],
    stream: bool,
    answer: impl FnOnce(Option<Vec<u8>>) + Send + 'static,
) -> bool {
    let question = to_text(question);
    let ask = move |id| HostSays::Resolve { id, network, question, stream };
    shared.put_to_edge(ask, move |said| {
        answer(match said {
            EdgeSays::Resolved { answer, .. } => from_text(&answer),
            _ => None,
        });
    })
}

fn take(udp: &Arc<UdpSocket>, shared: &Shared, bytes: &mut [u8]) -> io::Result<()> {
    let (size, index, from) = receive::<SockaddrStorage>(udp.as_ref(), bytes)?;
    let (Some(index), Some(from)) = (index, from) else { return Ok(()) };
    let Some(net) = shared.behind(index) else { return Ok(()) };
    let (question, back) = (&bytes[..size], udp.clone());
    let asked = ask(shared, net.network, question, false, move |answer| {
        // A host that lost its edge meanwhile has nothing to say; the guest asks again.
        if let Some(answer) = answer {
            give_back(&back, index, &from, &answer);
        }
    });
    if !asked && let Some(said) = failure(question) {
        give_back(udp, index, &from, &said);
    }
    Ok(())
}

fn give_back(udp: &UdpSocket, index: u32, to: &SockaddrStorage, answer: &[u8]) {
    let Ok(ipi_ifindex) = i32::try_from(index) else { return };
    let info = libc::in_pktinfo {
        ipi_ifindex,
        ipi_spec_dst: libc::in_addr { s_addr: u32::from(GATEWAY).to_be() },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    let control = [ControlMessage::Ipv4PacketInfo(&info)];
    let pieces = [IoSlice::new(answer)];
    if let Err(error) =
        sendmsg(udp.as_raw_fd(), &pieces, &control, MsgFlags::MSG_DONTWAIT, Some(to))
    {
        tracing::debug!(%error, "an answer for a name was not sent");
    }
}

fn failure(question: &[u8]) -> Option<Vec<u8>> {
    crate::edge::names::failure(question, ResponseCode::ServFail)
}

/// A tap's listener, and the epoch that its machine was here with: with another one it has been away, and
/// its tap is another.
struct AtTap {
    epoch: u64,
    listener: TcpListener,
    open: Arc<AtomicUsize>,
}

fn listen_at_taps(shared: &Arc<Shared>) {
    let all = Arc::new(AtomicUsize::new(0));
    let mut taps: BTreeMap<MachineKey, AtTap> = BTreeMap::new();
    loop {
        follow(shared, &mut taps);
        let mut waits: Vec<PollFd<'_>> =
            taps.values().map(|t| PollFd::new(t.listener.as_fd(), PollFlags::POLLIN)).collect();
        let limit = PollTimeout::try_from(LOOK_EVERY).unwrap_or(PollTimeout::ZERO);
        if poll(&mut waits, limit).is_err() {
            std::thread::sleep(LOOK_EVERY);
            continue;
        }
        let ready: Vec<bool> = waits.iter().map(|w| w.any().unwrap_or(false)).collect();
        drop(waits);
        for ((key, tap), _) in taps.iter().zip(ready).filter(|(_, ready)| *ready) {
            let Ok((stream, _)) = tap.listener.accept() else { continue };
            let (all, own) = (all.clone(), tap.open.clone());
            let too_many = all.load(Ordering::Relaxed) >= CONNECTIONS.0
                || own.load(Ordering::Relaxed) >= CONNECTIONS.1;
            if too_many {
                continue;
            }
            let (shared, network) = (shared.clone(), key.network);
            all.fetch_add(1, Ordering::Relaxed);
            own.fetch_add(1, Ordering::Relaxed);
            spawn("agent-names-guest", move || {
                if let Err(error) = converse(stream, &shared, network) {
                    tracing::debug!(%error, "a guest's connection for names ended");
                }
                all.fetch_sub(1, Ordering::Relaxed);
                own.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }
}

/// Listens for the machines that run here, and for no others.
fn follow(shared: &Shared, taps: &mut BTreeMap<MachineKey, AtTap>) {
    let here: BTreeMap<MachineKey, u64> = {
        let core = shared.core();
        let runs = core.book.records().filter(|r| r.place == Place::Here && !r.retiring);
        runs.map(|r| (r.net.key(), r.epoch)).collect()
    };
    taps.retain(|key, tap| here.get(key) == Some(&tap.epoch));
    for (key, epoch) in here {
        if taps.contains_key(&key) {
            continue;
        }
        match at_tap(&tap::name(key)) {
            Ok(listener) => {
                let open = Arc::new(AtomicUsize::new(0));
                taps.insert(key, AtTap { epoch, listener, open });
            }
            Err(error) => tracing::debug!(%key, %error, "not heard by TCP when it asks for names"),
        }
    }
}

fn at_tap(name: &str) -> io::Result<TcpListener> {
    interface_index(name).map_err(io::Error::other)?;
    let socket = open(SockType::Stream, Some(name))?;
    listen(&socket, Backlog::new(16)?)?;
    let listener = TcpListener::from(socket);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Answers one question after the other, each with its length before it.
fn converse(mut stream: TcpStream, shared: &Shared, network: NetworkId) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    let mut bytes = [0; LONGEST];
    loop {
        let mut size = [0; 2];
        match stream.read_exact(&mut size) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            done => done?,
        }
        let size = usize::from(u16::from_be_bytes(size));
        let question = bytes.get_mut(..size).ok_or_else(|| io::Error::other("too long"))?;
        stream.read_exact(question)?;
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let asked = ask(shared, network, question, true, move |answer| drop(tell.try_send(answer)));
        let answer = asked.then(|| told.recv_timeout(PATIENCE).ok().flatten()).flatten();
        let Some(answer) = answer.or_else(|| failure(question)) else { return Ok(()) };
        let size = u16::try_from(answer.len()).map_err(io::Error::other)?;
        stream.write_all(&[&size.to_be_bytes(), answer.as_slice()].concat())?;
    }
}
