//! The agent's connection to the edge: dialled for ever, and everything that the edge must know is
//! told again after each loss. One thread writes, one reads.

use super::{Core, LinkState, Shared, server::spawn};
use crate::{
    book::{EdgeView, Place, Record, Wait},
    datapath::MachineKey,
    sys,
    wire::{self, EdgeSays, HostSays},
};
use identity::{HostName, Reader, Security, Stream, Writer};
use std::{
    collections::BTreeMap,
    io::{self, BufReader},
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const DIAL_LIMIT: Duration = Duration::from_secs(3);
const WRITE_LIMIT: Duration = Duration::from_secs(3);
/// A ping goes out this often; a connection that is silent for [`SILENCE_LIMIT`] is dead.
const PING_EVERY: Duration = Duration::from_millis(100);
const SILENCE_LIMIT: Duration = Duration::from_secs(2);
/// Wait before dialling again: the first, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// What was said and not answered yet, by id.
type Asked = Arc<Mutex<BTreeMap<u64, (MachineKey, u64)>>>;

/// Keeps a connection to the edge from now on.
pub(super) fn keep(edge: SocketAddr, name: HostName, security: Security, shared: Arc<Shared>) {
    spawn("agent-edge", move || {
        let mut backoff = BACKOFF.0;
        loop {
            let started = Instant::now();
            let error = match Stream::connect(edge, &name, &security, DIAL_LIMIT) {
                Ok(stream) => converse(stream, &shared).err().map_or_else(
                    || "the edge ended the connection".to_owned(),
                    |e| format!("connection lost: {e}"),
                ),
                Err(e) => e.to_string(),
            };
            if started.elapsed() > BACKOFF.1 * 2 {
                backoff = BACKOFF.0;
            }
            tracing::warn!(%edge, error, again_in = ?backoff, "no edge");
            shared.set_link(LinkState::Connecting { last_error: error });
            thread::sleep(backoff);
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    });
}

fn converse(stream: Stream, shared: &Arc<Shared>) -> io::Result<()> {
    let control = stream.control();
    control.set_read_timeout(Some(SILENCE_LIMIT));
    control.set_write_timeout(Some(WRITE_LIMIT));
    sys::repeat_steadily(control.as_fd())?;
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader);
    let hello = HostSays::Hello {
        version: wire::VERSION,
        host: shared.name.to_string(),
        peer: shared.this,
        path: shared.host.path(),
    };
    wire::send(&mut writer, &hello)?;
    match wire::receive::<EdgeSays>(&mut reader)? {
        Some(EdgeSays::Welcome { version: wire::VERSION, edge, peers }) => {
            shared.set_fleet(Some(edge), &peers).map_err(io::Error::other)?;
        }
        Some(EdgeSays::Welcome { version, .. }) => {
            return Err(io::Error::other(format!(
                "the edge speaks version {version}, this agent {}; update the older one",
                wire::VERSION
            )));
        }
        Some(EdgeSays::Refused { error, .. }) => return Err(io::Error::other(error)),
        other => return Err(io::Error::other(format!("no welcome but {other:?}"))),
    }
    shared.core().book.edge_reconnected();
    shared.set_link(LinkState::Up);
    tracing::info!("connected to the edge");

    let asked = Asked::default();
    let dead = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicU64::new(0));
    let listener = {
        let (shared, asked, dead) = (shared.clone(), asked.clone(), dead.clone());
        let answered = answered.clone();
        thread::Builder::new().name("agent-edge-in".into()).spawn(move || {
            let end = listen(&mut reader, &shared, &asked, &answered);
            dead.store(true, Ordering::Release);
            shared.changed.notify_all();
            end
        })?
    };
    let said = speak(&mut writer, shared, &asked, &answered, &dead);
    control.shutdown();
    let heard = listener.join().unwrap_or_else(|_| Err(io::Error::other("its reader failed")));
    // What the reader met is the cause, unless we ended the connection ourselves.
    if dead.load(Ordering::Acquire) { heard.and(said) } else { said }
}

/// Says what the edge does not know yet, as soon as there is something, until the reader is done.
fn speak(
    writer: &mut Writer,
    shared: &Shared,
    asked: &Asked,
    answered: &AtomicU64,
    dead: &AtomicBool,
) -> io::Result<()> {
    let (mut id, mut ping) = (0, 0);
    let mut ping_at = Instant::now() + PING_EVERY;
    // Keys that were last told.
    let mut tunnel = None;
    // The epoch that was last told, per address: not told again over this connection.
    let mut told = BTreeMap::<MachineKey, Record>::new();
    // A new connection looks at all of them, later only at what has changed.
    {
        let mut core = shared.core();
        core.news = core.book.records().map(|r| r.net.key()).collect();
    }
    loop {
        let news: Vec<Record> = {
            let mut core = shared.wait(shared.core(), ping_at, |core| {
                dead.load(Ordering::Acquire) || !core.news.is_empty()
            });
            let changed = std::mem::take(&mut core.news);
            let records = changed.into_iter().filter_map(|key| core.book.get(key));
            let untold = records.filter(|r| {
                let news = matches!(r.edge, EdgeView::Pending | EdgeView::Held)
                    || r.place == Place::Candidate;
                news && told.get(&r.net.key()) != Some(*r)
            });
            untold.cloned().collect()
        };
        if dead.load(Ordering::Acquire) {
            return Ok(());
        }
        let now = shared.secure.as_ref().map(|secure| secure.this());
        if let Some(end) = &now
            && now != tunnel
        {
            id += 1;
            wire::send(writer, &HostSays::Tunnel { id, tunnel: end.clone() })?;
            tunnel = now;
        }
        for record in news {
            id += 1;
            let key = record.net.key();
            // What is answered to an announcement is no confirmation.
            if record.edge == EdgeView::Pending {
                let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
                asked.insert(id, (key, record.epoch));
            }
            wire::send(writer, &message(id, &record, shared.this.overlay))?;
            // An announcement is not the word that somebody waits for.
            if record.edge != EdgeView::Held {
                shared.core().said.insert(key, record.epoch);
                shared.changed.notify_all();
            }
            told.insert(key, record);
        }
        if Instant::now() >= ping_at {
            // One at a time: with little under way, the kernel repeats it soon.
            if answered.load(Ordering::Acquire) >= ping {
                id += 1;
                ping = id;
                wire::send(writer, &HostSays::Ping { id })?;
            }
            ping_at = Instant::now() + PING_EVERY;
            let forgotten: Vec<Record> = {
                let mut core = shared.core();
                let Core { book, said, .. } = &mut *core;
                said.retain(|key, _| book.get(*key).is_some());
                told.extract_if(.., |key, _| book.get(*key).is_none())
                    .map(|(_, record)| record)
                    .collect()
            };
            for record in forgotten.into_iter().filter(|r| r.place == Place::Candidate) {
                // It was announced, and will not come.
                id += 1;
                let Record { net, epoch, .. } = record;
                wire::send(writer, &HostSays::Release { id, net, epoch })?;
            }
        }
    }
}

fn message(id: u64, record: &Record, this: Ipv4Addr) -> HostSays {
    let (net, epoch) = (record.net.clone(), record.epoch);
    match record.place {
        Place::Away { to } if record.edge == EdgeView::Held => {
            HostSays::Candidate { id, net, host: to, long: false }
        }
        Place::Away { to } => HostSays::Claim { id, net, owner: to, epoch },
        Place::Here if record.retiring => HostSays::Release { id, net, epoch },
        Place::Here => HostSays::Claim { id, net, owner: this, epoch },
        Place::Candidate => {
            let long = record.wait == Wait::Hold;
            HostSays::Candidate { id, net, host: this, long }
        }
    }
}

fn listen(
    reader: &mut BufReader<Reader>,
    shared: &Shared,
    asked: &Asked,
    answered: &AtomicU64,
) -> io::Result<()> {
    while let Some(message) = wire::receive::<EdgeSays>(reader)? {
        let (id, answer) = match message {
            EdgeSays::Done { id } => (id, Ok(())),
            EdgeSays::Refused { id, error } => (id, Err(error)),
            EdgeSays::Peers { peers } => {
                shared.set_fleet(None, &peers).map_err(io::Error::other)?;
                continue;
            }
            EdgeSays::Tunnels { tunnels } => {
                if let Some(secure) = &shared.secure {
                    secure.set_peers(tunnels).map_err(io::Error::other)?;
                }
                continue;
            }
            EdgeSays::Welcome { .. } => return Err(io::Error::other("a second welcome")),
        };
        answered.fetch_max(id, Ordering::AcqRel);
        let question = asked.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        if let Some((key, epoch)) = question {
            shared.edge_answered(key, epoch, answer);
        }
    }
    Ok(())
}
