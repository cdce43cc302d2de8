//! The agent's connection to the edge: dialled for ever, and everything that the edge must know is
//! told again after each loss. One thread writes, one reads.

use super::{Core, Link, LinkState, Shared, server::spawn};
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
        mpsc,
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

/// Questions that may wait for the edge; what comes after is not asked.
const QUESTIONS: usize = 1024;

/// What is asked of the edge, and what is done with the answer (on the thread that reads: it waits for
/// nothing).
pub(super) struct Question {
    ask: Box<dyn FnOnce(u64) -> HostSays + Send>,
    answer: Answer,
}

type Answer = Box<dyn FnOnce(EdgeSays) + Send>;

/// What is done with answers, by id.
type Waiting = Arc<Mutex<BTreeMap<u64, Answer>>>;

impl Shared {
    /// Asks the edge; false if there is none. An answer may never come.
    pub(super) fn put_to_edge(
        &self,
        ask: impl FnOnce(u64) -> HostSays + Send + 'static,
        answer: impl FnOnce(EdgeSays) + Send + 'static,
    ) -> bool {
        {
            let mut core = self.core();
            // The first that can be reached: each edge answers for all of the fleet.
            let Some(link) = core.links.iter_mut().find(|link| link.is_up()) else { return false };
            if link.questions.len() >= QUESTIONS {
                return false;
            }
            link.questions.push_back(Question { ask: Box::new(ask), answer: Box::new(answer) });
        }
        self.changed.notify_all();
        true
    }

    /// Asks the edge, and waits for its answer; `None` if there is none in time, or no edge.
    pub(super) fn ask_edge(
        &self,
        ask: impl FnOnce(u64) -> HostSays + Send + 'static,
        limit: Duration,
    ) -> Option<EdgeSays> {
        let (answer, answered) = mpsc::sync_channel(1);
        let asked = self.put_to_edge(ask, move |said| drop(answer.try_send(said)));
        asked.then(|| answered.recv_timeout(limit).ok()).flatten()
    }
}

/// Keeps the connection `number`, to an edge, from now on.
pub(super) fn keep(
    number: usize,
    edge: SocketAddr,
    name: HostName,
    security: Security,
    shared: Arc<Shared>,
) {
    spawn("agent-edge", move || {
        let mut backoff = BACKOFF.0;
        loop {
            let started = Instant::now();
            let error = match Stream::connect(edge, &name, &security, DIAL_LIMIT) {
                Ok(stream) => converse(number, stream, &shared).err().map_or_else(
                    || "the edge ended the connection".to_owned(),
                    |e| format!("connection lost: {e}"),
                ),
                Err(e) => e.to_string(),
            };
            if started.elapsed() > BACKOFF.1 * 2 {
                backoff = BACKOFF.0;
            }
            if shared.ended.load(Ordering::Acquire) {
                return;
            }
            tracing::warn!(%edge, error, again_in = ?backoff, "no edge");
            shared.set_link(number, LinkState::Connecting { last_error: error });
            thread::sleep(backoff);
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    });
}

fn converse(number: usize, stream: Stream, shared: &Arc<Shared>) -> io::Result<()> {
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
        Some(EdgeSays::Welcome { version: wire::VERSION, edge, peers, domain, homes }) => {
            shared.core().links[number].edge = Some(edge.overlay);
            shared.set_fleet(Some(edge), &peers).map_err(io::Error::other)?;
            shared.hear_of_homes(homes).map_err(io::Error::other)?;
            shared.core().domain = domain;
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
    {
        // Notes of a connection that has ended are said again where they still count.
        shared.core().links[number].notes.clear();
    }
    shared.set_link(number, LinkState::Up);
    if let Some(secure) = &shared.secure {
        secure.greet(None);
    }
    tracing::info!("connected to the edge");

    let asked = Asked::default();
    let waiting = Waiting::default();
    let dead = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicU64::new(0));
    let listener = {
        let (shared, asked, dead) = (shared.clone(), asked.clone(), dead.clone());
        let (answered, waiting) = (answered.clone(), waiting.clone());
        thread::Builder::new().name("agent-edge-in".into()).spawn(move || {
            let end = listen(number, &mut reader, &shared, &asked, (&answered, &waiting));
            dead.store(true, Ordering::Release);
            shared.changed.notify_all();
            end
        })?
    };
    let said = speak(number, &mut writer, shared, (&asked, &waiting), &answered, &dead);
    control.shutdown();
    let heard = listener.join().unwrap_or_else(|_| Err(io::Error::other("its reader failed")));
    // What the reader met is the cause, unless we ended the connection ourselves.
    if dead.load(Ordering::Acquire) { heard.and(said) } else { said }
}

/// Says what the edge does not know yet, as soon as there is something, until the reader is done.
fn speak(
    number: usize,
    writer: &mut Writer,
    shared: &Shared,
    (asked, waiting): (&Asked, &Waiting),
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
        core.links[number].news = core.book.records().map(|r| r.net.key()).collect();
    }
    let over = || dead.load(Ordering::Acquire) || shared.ended.load(Ordering::Acquire);
    loop {
        let (news, questions, notes): (Vec<Record>, _, _) = {
            let mut core = shared.wait(shared.core(), ping_at, |core| {
                let Link { news, questions, notes, .. } = &core.links[number];
                over() || !(news.is_empty() && questions.is_empty() && notes.is_empty())
            });
            let changed = std::mem::take(&mut core.links[number].news);
            let records = changed.into_iter().filter_map(|key| core.book.get(key));
            let untold = records.filter(|r| {
                let news = matches!(r.edge, EdgeView::Pending | EdgeView::Held)
                    || r.place == Place::Candidate;
                news && told.get(&r.net.key()) != Some(*r)
            });
            let untold = untold.cloned().collect();
            let Link { questions, notes, .. } = &mut core.links[number];
            (untold, std::mem::take(questions), std::mem::take(notes))
        };
        if over() {
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
                shared.core().links[number].said.insert(key, record.epoch);
                shared.changed.notify_all();
            }
            told.insert(key, record);
        }
        for (to, note) in notes {
            wire::send(writer, &HostSays::Note { to, note })?;
        }
        for question in questions {
            id += 1;
            // Whoever asked has gone perhaps, and then nobody takes the answer out.
            let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            while waiting.len() >= QUESTIONS {
                waiting.pop_first();
            }
            waiting.insert(id, question.answer);
            drop(waiting);
            wire::send(writer, &(question.ask)(id))?;
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
                let Core { book, links, answers, .. } = &mut *core;
                links[number].said.retain(|key, _| book.get(*key).is_some());
                answers.retain(|key, _| book.get(*key).is_some());
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
    let (net, epoch, home) = (record.net.clone(), record.epoch, record.home);
    match record.place {
        Place::Away { to } if record.edge == EdgeView::Held => {
            HostSays::Candidate { id, net, host: to, long: false }
        }
        Place::Away { to } => HostSays::Claim { id, net, owner: to, epoch, home },
        Place::Here if record.retiring => HostSays::Release { id, net, epoch },
        Place::Here => HostSays::Claim { id, net, owner: this, epoch, home },
        Place::Candidate => {
            let long = record.wait == Wait::Hold;
            HostSays::Candidate { id, net, host: this, long }
        }
    }
}

fn listen(
    number: usize,
    reader: &mut BufReader<Reader>,
    shared: &Shared,
    asked: &Asked,
    (answered, waiting): (&AtomicU64, &Waiting),
) -> io::Result<()> {
    let waits = |id| waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    while let Some(message) = wire::receive::<EdgeSays>(reader)? {
        let (id, answer) = match message {
            EdgeSays::Given { id, .. } | EdgeSays::Resolved { id, .. } => {
                if let Some(answer) = waits(id) {
                    answer(message);
                }
                continue;
            }
            EdgeSays::Done { id } => (id, Ok(())),
            EdgeSays::Refused { id, error } => {
                if let Some(answer) = waits(id) {
                    answer(EdgeSays::Refused { id, error });
                    continue;
                }
                (id, Err(error))
            }
            EdgeSays::Peers { peers } => {
                shared.set_fleet(None, &peers).map_err(io::Error::other)?;
                continue;
            }
            EdgeSays::Tunnels { tunnels } => {
                shared.hear_of_tunnels(number, tunnels).map_err(io::Error::other)?;
                continue;
            }
            EdgeSays::Note { from, note } => {
                if let Some(secure) = &shared.secure {
                    secure.hear(from, note);
                }
                continue;
            }
            EdgeSays::Home { network, address, home } => {
                shared.at_home(MachineKey { network, address }, home);
                continue;
            }
            EdgeSays::Homes { homes } => {
                shared.hear_of_homes(homes).map_err(io::Error::other)?;
                continue;
            }
            EdgeSays::Welcome { .. } => return Err(io::Error::other("a second welcome")),
        };
        answered.fetch_max(id, Ordering::AcqRel);
        let question = asked.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        if let Some((key, epoch)) = question {
            shared.answered(number, key, epoch, answer);
        }
    }
    Ok(())
}
