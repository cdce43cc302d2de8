//! The connections of a source that serves pages: the threads that live as long as they do, and how
//! new ones are made when they break.

use super::pages::PageServer;
use crate::migrate::{
    again::{Answered, Roll},
    link::{self, Arrival, Channel, Outgoing},
    messages::{ResumeAnswer, ResumeRequest},
    protocol::{Frame, SessionId},
};
use identity::{Control, HostName, Security};
use silo::{block::BlockSet, device::Device};
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError, TryLockError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

/// Time between two pings on the fault connection.
const PULSE: Duration = Duration::from_millis(250);
/// A destination that answers none for so long, and some round trips, is not reached any more.
const SILENCE: Duration = Duration::from_secs(2);
/// How long one try to connect again may take on a short line.
const DIAL_LIMIT: Duration = Duration::from_secs(1);
/// Frames of an answer, at most: more than the lists of the largest machine take.
const ANSWER_FRAMES: usize = 1 << 16;

/// Which move it is, and where its destination is found.
#[derive(Clone)]
pub struct Place {
    /// The machine.
    pub machine: String,
    /// This host.
    pub host: String,
    /// The attempt.
    pub attempt: u64,
    /// The session that moved it, as the destination knows it.
    pub session: SessionId,
    /// Where the destination listens.
    pub to: SocketAddr,
    /// The name in its certificate.
    pub peer: HostName,
    /// How the connections are protected.
    pub security: Security,
    /// Of the line, as measured.
    pub round_trip: Duration,
    /// The destination answers pings, and a source that connects again.
    pub resumes: bool,
}

/// Open connections, and the threads on them.
pub(super) struct Line {
    pub(super) main: Outgoing,
    pub(super) arrivals: mpsc::Receiver<Arrival>,
    controls: [Control; 2],
    over: Arc<AtomicBool>,
    silent: Arc<AtomicBool>,
}

impl Line {
    /// Serves faults on the fault connection from now on, and watches whether anybody is there.
    pub(super) fn open(
        main: Outgoing,
        control: Control,
        arrivals: mpsc::Receiver<Arrival>,
        fault: Channel,
        pages: &Arc<PageServer>,
        place: &Place,
    ) -> Self {
        let controls = [control, fault.control];
        let (over, silent) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let to = Arc::new(Mutex::new(fault.outgoing));
        let heard = Arc::new(Mutex::new(Instant::now()));
        let server = {
            let (pages, to, heard) = (Arc::clone(pages), Arc::clone(&to), Arc::clone(&heard));
            let controls = controls.clone();
            let incoming = fault.incoming;
            move || {
                let _urgent = crate::driver::Urgent::this_thread();
                let hear =
                    || *heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
                if let Err(error) = pages.serve(incoming, &to, hear) {
                    tracing::debug!(%error, "the fault connection ended");
                }
                // That this happened shows on the main connection.
                controls.iter().for_each(Control::shutdown);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("source-faults".into()).spawn(server) {
            // Bulk still brings every block; only faults wait for it.
            tracing::error!(%error, "no thread for the fault connection");
        }
        if place.resumes {
            let pulse = Pulse {
                to,
                heard,
                controls: controls.clone(),
                over: Arc::clone(&over),
                silent: Arc::clone(&silent),
                limit: SILENCE + place.round_trip * 4,
            };
            let watched =
                std::thread::Builder::new().name("source-pulse".into()).spawn(move || pulse.run());
            if let Err(error) = watched {
                tracing::error!(%error, "no thread to watch the line");
            }
        }
        Self { main, arrivals, controls, over, silent }
    }

    /// Whether the watch has ended it, because nobody answered.
    pub(super) fn was_silent(&self) -> bool {
        self.silent.load(Ordering::Acquire)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        self.controls.iter().for_each(Control::shutdown);
    }
}

/// Pings on the fault connection, where no bulk is before them, and ends both if no answer comes:
/// whoever writes to a line that leads nowhere would not notice for minutes.
struct Pulse {
    to: Arc<Mutex<Outgoing>>,
    heard: Arc<Mutex<Instant>>,
    controls: [Control; 2],
    over: Arc<AtomicBool>,
    silent: Arc<AtomicBool>,
    limit: Duration,
}

impl Pulse {
    fn run(self) {
        let mut nonce = 0;
        let mut looked = Instant::now();
        while !self.over.load(Ordering::Acquire) {
            {
                let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
                // Whoever was stopped itself has listened to nobody.
                if looked.elapsed() > PULSE * 3 {
                    *heard = Instant::now();
                }
                looked = Instant::now();
                if heard.elapsed() > self.limit {
                    self.silent.store(true, Ordering::Release);
                    self.controls.iter().for_each(Control::shutdown);
                    return;
                }
            }
            nonce += 1;
            match self.to.try_lock() {
                Ok(mut to) => {
                    // That it failed shows at the reader.
                    let _ = to.write(&Frame::Ping(nonce)).and_then(|()| to.flush());
                }
                // A fault is being answered, or cannot be.
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Poisoned(_)) => return,
            }
            std::thread::park_timeout(PULSE);
        }
    }
}

/// New connections, and what is missing.
pub(super) struct Reopened {
    pub(super) main: Channel,
    pub(super) fault: Channel,
    pub(super) missing: Vec<BlockSet>,
}

/// What a try to connect again came to.
pub(super) enum Dialed {
    /// The destination lacks these blocks and waits for them.
    Open(Box<Reopened>),
    /// It has an answer, and needs no connection.
    Over(ResumeAnswer),
}

/// Connects again and asks what is missing; one try, on a thread of its own.
pub(super) fn dial(
    place: &Place,
    devices: &[Arc<dyn Device>],
    life: u64,
    serial: u32,
) -> mpsc::Receiver<Result<Dialed, String>> {
    let (tell, told) = mpsc::channel();
    let (place, sizes) = (place.clone(), devices.iter().map(|d| d.blocks()).collect::<Vec<_>>());
    let trial = move || {
        // Nobody listens any more if the move has ended meanwhile.
        let _ = tell.send(try_once(&place, &sizes, life, serial));
    };
    if let Err(error) = std::thread::Builder::new().name("source-dial".into()).spawn(trial) {
        tracing::error!(%error, "no thread to connect again");
    }
    told
}

fn try_once(place: &Place, sizes: &[u64], life: u64, serial: u32) -> Result<Dialed, String> {
    // TCP, TLS and the greeting: four round trips.
    let limit = DIAL_LIMIT.max(place.round_trip * 8);
    let name = link::new_session().map_err(|e| e.to_string())?;
    let (mut main, fault) =
        link::connect_both(place.to, &place.peer, &place.security, name, limit)?;
    main.control.set_read_timeout(Some(limit * 2));
    let request = ResumeRequest {
        machine: place.machine.clone(),
        host: place.host.clone(),
        attempt: place.attempt,
        session: link::session_hex(place.session),
        life,
        serial,
    };
    let json = serde_json::to_vec(&request).map_err(|e| e.to_string())?;
    let failed = |error: std::io::Error| format!("the connection broke again: {error}");
    main.outgoing.write(&Frame::Resume(json)).map_err(failed)?;
    main.outgoing.flush().map_err(failed)?;
    let mut roll = Roll::new(sizes.iter().copied());
    for _ in 0..ANSWER_FRAMES {
        let frame = main.incoming.read().map_err(|e| e.to_string())?;
        match roll.take(frame)? {
            Answered::Goes => {}
            Answered::Over(answer) => {
                main.control.shutdown();
                return Ok(Dialed::Over(answer));
            }
            Answered::Missing { missing, nonce, .. } => {
                main.outgoing.write(&Frame::RoundApplied(nonce)).map_err(failed)?;
                main.outgoing.flush().map_err(failed)?;
                main.control.set_read_timeout(None);
                return Ok(Dialed::Open(Box::new(Reopened { main, fault, missing })));
            }
        }
    }
    Err("its lists do not end".into())
}
