//! Connections from other hosts: sessions of machines that arrive.

use super::{
    Runner, State,
    guard::Guard,
    hosted::{self, Hosted},
    protected_move::{Arrived, Arriving},
    stay::Found,
    take_over::{MoveNote, Noted},
};
use crate::{
    driver::Start,
    lease::AttemptId,
    migrate::{
        destination::{self, Arrival, Door, Ended, Fate},
        link::{CONNECT_LIMIT, Channel, session_hex},
        messages::{PrepareRequest, ResumeAnswer, ResumeRequest, Standing, StayId, Verdict},
        protocol::{Frame, Role, SessionId},
        switchover::{DestinationParts, Terms},
    },
    tenure::random_nonces,
};
use conduit::DataPath as _;
use identity::{HostName, Stream};
use std::{
    collections::HashMap,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

/// How long a guest that has just arrived has its processor to itself: until its clients have
/// their answers the agent need not be asked to refresh the clock (off by one blackout) and entropy.
const GUEST_PAUSE: Duration = Duration::from_millis(250);

/// How long a source that asks for its move waits for a runner that has just come back.
const LOOK_LIMIT: Duration = Duration::from_secs(4);

/// Moves to this runner of which a source may ask how they ended.
const DOORS: usize = 8;

/// A machine that arrives.
struct Built {
    body: Box<Hosted>,
    /// What holds it to its term if it is protected.
    arriving: Option<Arriving>,
    /// What it left here, of which nothing was overwritten yet.
    stay: Option<StayId>,
}

/// Connections of sessions whose other connection has not come yet.
type Halves = Mutex<HashMap<[u8; 16], mpsc::Sender<Channel>>>;

/// Listens for peers on a thread of its own.
pub(super) fn listen(runner: &Arc<Runner>, address: SocketAddr) -> Result<(), String> {
    let wrong = |e| format!("listening for other hosts on {address}: {e}");
    let listener = TcpListener::bind(address).map_err(wrong)?;
    // The kernel chooses the port if it was 0.
    let _ = runner.listens.set(listener.local_addr().map_err(wrong)?);
    let runner = Arc::clone(runner);
    let halves: Arc<Halves> = Arc::default();
    std::thread::Builder::new()
        .name("peers".into())
        .spawn(move || {
            for socket in listener.incoming() {
                let Ok(socket) = socket else { continue };
                let (runner, halves) = (Arc::clone(&runner), Arc::clone(&halves));
                let taken = std::thread::Builder::new().name("peer".into()).spawn(move || {
                    match Stream::server(socket, &runner.security, CONNECT_LIMIT) {
                        Ok(stream) => runner.take_connection(stream, &halves),
                        Err(error) => tracing::warn!(%error, "a peer was turned away"),
                    }
                });
                if let Err(error) = taken {
                    tracing::error!(%error, "no thread for a peer");
                }
            }
        })
        .map(drop)
        .map_err(|e| e.to_string())
}

impl Runner {
    fn take_connection(self: &Arc<Self>, stream: Stream, halves: &Halves) {
        let peer = stream.peer_name().cloned();
        let (channel, preamble) = match Channel::accept(stream, &self.security) {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a peer was turned away");
                return;
            }
        };
        let waiting = || halves.lock().unwrap_or_else(PoisonError::into_inner);
        match preamble.role {
            Role::Fault => {
                // The main connection was opened first; its thread may still be on its way here.
                let deadline = Instant::now() + CONNECT_LIMIT;
                loop {
                    if let Some(main) = waiting().remove(&preamble.session.0) {
                        let _ = main.send(channel);
                        return;
                    }
                    if Instant::now() > deadline {
                        tracing::warn!("a fault connection without a session was dropped");
                        return;
                    }
                    std::thread::park_timeout(Duration::from_millis(1));
                }
            }
            Role::Main => {
                let (sender, receiver) = mpsc::channel();
                waiting().insert(preamble.session.0, sender);
                let fault = receiver.recv_timeout(CONNECT_LIMIT);
                waiting().remove(&preamble.session.0);
                match fault {
                    Ok(fault) => self.take_session(channel, fault, preamble.session, peer),
                    Err(_) => tracing::warn!("a session without its fault connection was dropped"),
                }
            }
        }
    }

    fn take_session(
        self: &Arc<Self>,
        mut main: Channel,
        fault: Channel,
        session: SessionId,
        peer: Option<HostName>,
    ) {
        main.control.set_read_timeout(Some(CONNECT_LIMIT));
        let request = match main.incoming.read() {
            Ok(Frame::Prepare(json)) => serde_json::from_slice::<PrepareRequest>(&json),
            Ok(Frame::Resume(json)) => return self.readmit(&json, peer.as_ref(), main, fault),
            _ => {
                tracing::warn!("a peer did not begin with a request");
                return;
            }
        };
        main.control.set_read_timeout(None);
        let started = Instant::now();
        let mut verdict = Verdict {
            host: self.config.host.clone(),
            boot_id: super::state::boot_id(),
            endpoint: Some(self.path.endpoint()),
            resumes: true,
            ..Verdict::default()
        };
        let built = request.map_err(|e| format!("the request cannot be read: {e}")).and_then(|r| {
            let from = self.who_asks(&r, peer)?;
            self.config.accepts(&from)?;
            Ok((self.prepare(&r, &mut verdict)?, r, from))
        });
        verdict.prepared_ms = started.elapsed().as_millis() as u64;
        let (built, request, from) = match built {
            Ok(built) => built,
            Err(why) => {
                verdict.refusals.push(why);
                tracing::info!(reasons = ?verdict.refusals, "refused a machine");
                send_verdict(&mut main, &verdict);
                return;
            }
        };
        let Some(built) = built else {
            send_verdict(&mut main, &verdict);
            answer_pings(&mut main);
            return; // a dry run
        };
        send_verdict(&mut main, &verdict);
        self.arrive(main, fault, session, built, &request, &from);
    }

    /// A source takes a move up again.
    fn readmit(&self, json: &[u8], peer: Option<&HostName>, main: Channel, fault: Channel) {
        main.control.set_read_timeout(None);
        let unknown = |why: &str| ResumeAnswer::of(Standing::Unknown, why);
        let Ok(request) = serde_json::from_slice::<ResumeRequest>(json) else {
            return destination::turn_away(main, &unknown("the greeting cannot be read"));
        };
        match self.door_for(&request) {
            Some(door) => door.knock(&request, peer, main, fault),
            None => destination::turn_away(
                main,
                &unknown(
                    "nothing is known here of this move; if its runner was restarted, it must take its machine over",
                ),
            ),
        }
    }

    /// The door of that move. A runner that has just come back may still be looking at what there is.
    fn door_for(&self, request: &ResumeRequest) -> Option<Arc<Door>> {
        let find =
            |doors: &[Arc<Door>]| doors.iter().rev().find(|door| door.knows(request)).cloned();
        let looks = |inner: &mut super::Inner| {
            inner.state == State::Booting && find(&inner.doors).is_none()
        };
        let waited = self.changed.wait_timeout_while(self.lock(), LOOK_LIMIT, looks);
        find(&waited.unwrap_or_else(PoisonError::into_inner).0.doors)
    }

    /// Keeps a door for sources that come back, even after its move has ended.
    pub(super) fn keep_door(&self, door: &Arc<Door>) {
        let mut inner = self.lock();
        if inner.doors.len() == DOORS {
            inner.doors.remove(0);
        }
        inner.doors.push(Arc::clone(door));
        drop(inner);
        self.changed.notify_all();
    }

    /// The name that the peer has proved; in plaintext, the one it claims.
    fn who_asks(
        &self,
        request: &PrepareRequest,
        peer: Option<HostName>,
    ) -> Result<HostName, String> {
        let claimed = HostName::new(&request.host).map_err(|e| e.to_string())?;
        match peer {
            Some(proved) if proved != claimed => Err(format!(
                "the peer says it is \"{claimed}\", but its certificate is \"{proved}\"'s"
            )),
            Some(proved) => Ok(proved),
            None => Ok(claimed),
        }
    }

    /// Checks and builds. `None` for a dry run.
    fn prepare(
        self: &Arc<Self>,
        request: &PrepareRequest,
        verdict: &mut Verdict,
    ) -> Result<Option<Built>, String> {
        let state = self.lock().state;
        if state != State::Standby {
            return Err(not_waiting(state));
        }
        let facts = self.driver.facts().map_err(|e| e.to_string())?;
        let package = self.find_package(&request.package);
        verdict.refusals =
            hosted::objections(request, &self.config.machine, &facts, package.as_ref());
        verdict.refusals.extend(self.objects_to_protected(request));
        let Some(package) = package.filter(|_| verdict.refusals.is_empty()) else {
            return Err("this host cannot take it".into());
        };
        package.verify(&self.cache).map_err(|e| e.to_string())?;
        verdict.holds_stay = self.holds_stay(request);
        if request.dry_run {
            return Ok(None);
        }
        self.begin_to_receive(&request.host)?;
        let stay = request.since.clone().filter(|_| verdict.holds_stay);
        let built = self.build_for(request, package, verdict).and_then(|mut body| {
            match self.expect_protected(request, &mut body) {
                Ok(arriving) => Ok(Built { body: Box::new(body), arriving, stay }),
                Err(why) => {
                    body.give_up(request.epoch);
                    Err(why)
                }
            }
        });
        if built.is_err() {
            self.set_state(State::Standby, "");
        }
        built.map(Some)
    }

    /// From here on it waits for no other: of two who passed the checks at once, one comes here first.
    fn begin_to_receive(&self, from: &str) -> Result<(), String> {
        {
            let mut inner = self.lock();
            if inner.state != State::Standby {
                return Err(not_waiting(inner.state));
            }
            inner.state = State::Receiving;
        }
        // Of an earlier stay: what arrives is noted when it may become this host's, and a runner that comes
        // after this one must not take it for that machine.
        super::take_over::forget(&self.dir);
        self.set_state(State::Receiving, format!("from {from}"));
        Ok(())
    }

    fn build_for(
        &self,
        request: &PrepareRequest,
        package: crate::package::Package,
        verdict: &mut Verdict,
    ) -> Result<Hosted, String> {
        let paths = self.site();
        let Found { content, compares } =
            self.content_for(request, &package, verdict.holds_stay)?;
        verdict.compares = compares;
        let site = paths.site(&*self.driver, &self.path);
        // Its process starts beside the monitor's.
        let guard = Guard::begin(site.run_dir)
            .map_err(|error| format!("no guard for an unconfirmed machine: {error}"))?;
        let mut body = Hosted::build(
            request.shape.clone(),
            package,
            request.network.clone(),
            content,
            &site,
            Start::Incoming,
            request.expected_blackout_ms.map(Duration::from_millis),
        )
        .map_err(|e| e.to_string())?;
        let guard = Arc::new(guard);
        if let Err(error) = body.guarded(&guard) {
            body.give_up(request.epoch);
            return Err(error.to_string());
        }
        self.lock().guard = Arc::downgrade(&guard);
        Ok(body)
    }

    fn arrive(
        self: &Arc<Self>,
        main: Channel,
        fault: Channel,
        session: SessionId,
        built: Built,
        request: &PrepareRequest,
        from: &HostName,
    ) {
        let Built { body, arriving, stay } = built;
        let since = move |epoch: u64| StayId { epoch, session: session_hex(session) };
        {
            let mut inner = self.lock();
            inner.monitor_pid = Some(body.monitor_pid());
            inner.devices = body.content.devices();
            inner.arrived = arriving.as_ref().map(|_| Arrived::Expected);
        }
        let life = arriving.as_ref().map(|arriving| arriving.life.clone());
        let arriving = Arc::new(arriving);
        let noted = Noted::of(&body, true);
        let by = MoveNote {
            attempt: request.attempt,
            session: session_hex(session),
            peer: from.as_str().to_owned(),
            to: None,
            offers_hold_ms: 0,
            flips: 0,
        };
        // Before it can become this host's: whoever comes after this runner asks the lease.
        if let Err(error) = noted.arriving(by.clone()).write(&self.dir) {
            tracing::error!(%error, "a later runner could not go on with this arrival");
        }
        let door = match self.open_door(&by) {
            Ok(door) => door,
            Err(error) => return tracing::error!(error, "no way back for the source"),
        };
        let arrival = Arrival {
            main,
            fault,
            machine: body,
            door,
            parts: DestinationParts {
                machine: self.name.clone(),
                here: self.host.clone(),
                from: from.clone(),
                attempt: AttemptId(request.attempt),
                beat: life,
                terms: Terms::default(),
                nonces: random_nonces(),
            },
            store: Arc::clone(&self.store),
            on_report: Box::new(|_| {}),
            on_token: {
                let (runner, arriving) = (Arc::clone(self), Arc::clone(&arriving));
                Box::new(move |handed| {
                    arriving.as_ref().as_ref().map_or(Ok(()), |it| it.hold(&runner, handed))
                })
            },
            on_history: {
                let runner = Arc::clone(self);
                Box::new(move |told| runner.history_told(told))
            },
            on_complete: {
                let (runner, noted) = (Arc::clone(self), noted.settled(Some(by)));
                Box::new(move || runner.complete(&noted))
            },
            on_owner: {
                let runner = Arc::clone(self);
                Box::new(move |body: Box<Hosted>, holding| {
                    let since = since(holding.record.epoch.0);
                    let record = holding.record.clone();
                    if let Some(guest) = &body.guest {
                        guest.speak_in(GUEST_PAUSE);
                    }
                    runner.install(body, holding, Some(since));
                    if let Some(arriving) = arriving.as_ref() {
                        arriving.own(&record);
                        arriving.watch_source(&runner);
                    }
                    // The guest's clock and entropy, once it has answered its clients.
                    runner.refresh();
                })
            },
        };
        let Ended { machine, fate } = destination::run(arrival);
        match (fate, machine) {
            (Fate::Settled(_), None) => {}
            (Fate::Incomplete { missing, reason, .. }, None) => {
                let mut inner = self.lock();
                inner.detail =
                    format!("{missing} blocks are missing and their source is gone: {reason}");
                tracing::error!("{}", inner.detail);
            }
            (Fate::Discard { reason, touched }, Some(mut body)) => {
                self.leave_protection();
                let tenure = self.lock().tenure.take();
                drop(tenure);
                body.give_up(request.epoch);
                super::take_over::forget(&self.dir);
                tracing::info!(touched, "an arrival ended: {reason}");
                {
                    let mut inner = self.lock();
                    inner.monitor_pid = None;
                    inner.devices.clear();
                }
                // What has come need not come again.
                let stay = stay.filter(|_| !touched);
                self.keep_stay(&body.content, &body.package, stay);
                self.set_state(State::Standby, format!("the last arrival ended: {reason}"));
            }
            (fate, Some(body)) => {
                let detail =
                    format!("the arrival is not decided; the lease store must answer: {fate:?}");
                self.give_back(body, State::Paused, detail);
            }
            (fate, None) => {
                self.set_state(State::Standby, format!("the last arrival ended: {fate:?}"));
            }
        }
    }

    /// Tells the guest's agent that it has been moved, on a thread of its own.
    pub(super) fn refresh(&self) {
        let Some(guest) = self.lock().guest.clone() else { return };
        let told = std::thread::Builder::new().name("refresh".into()).spawn(move || {
            let limit = Duration::from_secs(30);
            if !guest.greeted_within(limit) {
                tracing::debug!("the guest's agent was not there to be refreshed");
                return;
            }
            if let Err(error) = guest.after_resume(None, limit) {
                tracing::warn!(%error, "the guest's clock was not refreshed");
            }
        });
        if let Err(error) = told {
            tracing::error!(%error, "no thread to refresh the guest");
        }
    }
}

fn not_waiting(state: State) -> String {
    format!("this runner is {}, not waiting for a machine", state.word())
}

fn send_verdict(main: &mut Channel, verdict: &Verdict) {
    if let Ok(json) = serde_json::to_vec(verdict) {
        let _ = main.outgoing.write(&Frame::Verdict(json)).and_then(|()| main.outgoing.flush());
    }
}

/// All that a dry run needs after the verdict.
fn answer_pings(main: &mut Channel) {
    main.control.set_read_timeout(Some(CONNECT_LIMIT));
    while let Ok(Frame::Ping(nonce)) = main.incoming.read() {
        let answered = main.outgoing.write(&Frame::Pong(nonce));
        if answered.and_then(|()| main.outgoing.flush()).is_err() {
            return;
        }
    }
}
