//! A stand-in: a runner that waits for the machine's host to fall silent, and runs the machine then from
//! its newest generation.
//!
//! ```text
//!   before    newest generation ─ package, disks, monitor: all built, its guest empty
//!             beats of the owner, seen on this host's own clock               (`crate::tenure`)
//!   silent    fence its beat ─ take the lease ─ take the history ─ open its last generation
//!             ─ load ─ network ─ run; what is touched comes first, the rest follows
//! ```
//!
//! What must hold:
//! - The lease is taken before anything else that others see, the history next: from then on the old
//!   host stores no generation and lets out nothing that waits for one. Only then is it known which
//!   generation is the last.
//! - The machine runs here within this host's own term from its first instruction.
//! - A store that does not answer is asked again for as long as the lease is ours.

use super::{
    Runner, State,
    backup::hex,
    config::ProtectConfig,
    hosted::{self, Content, Hosted},
    protected_move::Arrived,
    protection::Protection,
    restore::{Aside, CACHE},
    saved::{Elsewhere, fresh},
    signs::{Signs, Waited, sentence},
    tenure::{Known, Tenure},
};
use crate::{
    checkpoint::{
        MACHINE, MEMORY,
        description::{self, Description},
        disk_device,
        fill::StoreFill,
        restore::DiskTarget,
    },
    driver::{Start, qemu},
    lease::{BootClock, Clock as _, Record},
    migrate::{destination::DestinationMachine as _, messages::BackupMark, switchover::Holding},
    package::Package,
    tenure::{
        Answer, Call, OperationId, Taker, TakerAction, TakerEvent, TakerParts, random_nonces,
    },
};
use silo::{
    block::BlockSet,
    device::Device,
    io::BlockDevice as _,
    store::{
        Access, Environment, Generation, GenerationDevice, KeyRing, Limits, LineName, LineWriter,
        Store, StoreUrl, Which, WriterOptions,
    },
};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    time::{Duration, Instant},
};

/// Pause before what could not be prepared is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// Pause before a lease that could not be taken is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Longest time without a look at whether this runner ends.
const LOOK: Duration = Duration::from_millis(250);
/// Pause before a store that did not answer is asked again for the machine's generation.
const STORE_AGAIN: Duration = Duration::from_millis(200);

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The history and its keys.
struct History {
    url: StoreUrl,
    line: LineName,
    keys: KeyRing,
    environment: Environment,
}

impl History {
    fn of(config: &ProtectConfig) -> Result<Self, String> {
        let keys = match &config.keys {
            Some(path) => KeyRing::from_file(path),
            None => KeyRing::from_env("SILO_KEYS"),
        };
        Ok(Self {
            url: config.store.parse().map_err(text)?,
            line: LineName::parse(&config.line).map_err(text)?,
            keys: keys.map_err(text)?,
            environment: Environment::of_process(),
        })
    }

    fn store(&self, access: Access) -> Result<Arc<Store>, String> {
        Store::open(&self.url, access, &self.environment, Limits::default()).map_err(text)
    }

    fn open(&self, which: Which) -> Result<Arc<Generation>, String> {
        let store = self.store(Access::Read)?;
        Generation::open(&store, &self.keys, &self.line, which, CACHE).map_err(text)
    }

    /// From here on nobody else writes it; the number of its last generation.
    fn take(&self) -> Result<u64, String> {
        let store = self.store(Access::Write)?;
        let writer = LineWriter::open(store, &self.keys, &self.line, WriterOptions::default())
            .map_err(text)?;
        Ok(writer.newest())
    }
}

/// A generation, as whoever goes on with its history knows it again.
fn began_as(generation: &Generation) -> BackupMark {
    BackupMark {
        line: generation.line().to_string(),
        number: generation.number(),
        writer: hex(&generation.writer()),
        first_touch: BTreeMap::new(),
    }
}

fn describe(generation: &Arc<Generation>) -> Result<(Description, Vec<u8>), String> {
    let device = GenerationDevice::new(generation, MACHINE, 0).map_err(text)?;
    description::decode(&device).map_err(text)
}

/// What is built before it is needed; its monitor is the runner's body.
struct Prepared {
    content: Content,
    package: String,
    shape: crate::driver::MachineShape,
    network: Option<conduit::MachineNet>,
    /// Of each disk, the blocks that are zeros here.
    zeros: Vec<BlockSet>,
}

impl Runner {
    /// Waits, on a thread of its own.
    pub(super) fn stand_in(self: &Arc<Self>) -> Result<(), String> {
        let config = self.config.protect.clone().ok_or("a stand-in needs to know the store")?;
        if let Some(pid) = qemu::monitor_without_runner(&self.dir.run()) {
            return Err(format!(
                "its monitor runs on this host without a runner (process {pid}): end it with \
                 `drafter stop`"
            ));
        }
        let runner = Arc::clone(self);
        let waiting = std::thread::Builder::new().name("stand-in".into()).spawn(move || {
            if let Err(why) = runner.wait_and_take(&config) {
                runner.set_state(State::Failed, why);
            }
        });
        waiting.map(drop).map_err(text)
    }

    fn wait_and_take(self: &Arc<Self>, config: &ProtectConfig) -> Result<(), String> {
        let history = History::of(config)?;
        let tenure = self.tenure(config.pace())?;
        let mut prepared = None;
        let Some((record, signs, waited)) =
            self.wait_for_silence(config, &history, &tenure, &mut prepared)?
        else {
            return Ok(());
        };
        let prepared = prepared.ok_or("the machine was taken before it was prepared")?;
        self.start_taken(config, &history, &tenure, &prepared, &record, &signs, &waited)
    }

    /// Until the machine is this host's; `None` if this runner ends before.
    fn wait_for_silence(
        self: &Arc<Self>,
        config: &ProtectConfig,
        history: &History,
        tenure: &Arc<Tenure>,
        prepared: &mut Option<Prepared>,
    ) -> Result<Option<(Record, Signs, Waited)>, String> {
        let (calls, answers) = asker(self)?;
        let mut signs = Signs::default();
        let mut waited = Waited::default();
        let mut told = (None, 0);
        let (mut prepare_at, mut aside) = (Instant::now(), true);
        let mut taker: Option<Taker> = None;
        let mut look_at = Instant::now();
        loop {
            if self.lock().state.over() {
                return Ok(None);
            }
            if prepared.is_some() && !self.is_prepared() {
                *prepared = None;
            }
            if prepared.is_none() && Instant::now() >= prepare_at {
                match self.prepare_stand_in(history, &mut aside) {
                    Ok(ready) => {
                        self.say_stand_in(format!("waits for {}", waits_for(config)));
                        *prepared = Some(ready);
                        taker = None;
                    }
                    Err(why) => {
                        self.say_stand_in(format!("is not ready yet: {why}"));
                        prepare_at = Instant::now() + AGAIN;
                    }
                }
            }
            let now = BootClock.now();
            let mut actions = VecDeque::new();
            if taker.is_none() && Instant::now() >= look_at {
                let parts = TakerParts {
                    machine: self.name.clone(),
                    here: self.host.clone(),
                    attempt: fresh()?.0,
                    times: tenure.pace().times(),
                    nonces: random_nonces(),
                };
                let (new, first) = Taker::start(now, parts);
                actions.extend(first);
                let new = taker.insert(new);
                if prepared.is_some() {
                    actions.extend(new.on(now, TakerEvent::Prepared));
                }
                told = (None, 0);
            }
            if let Some(taker) = &mut taker {
                let view = tenure.view();
                if view != told {
                    actions.extend(taker.on(now, TakerEvent::View(view.0.clone())));
                    told = view;
                }
                let wake = taker.wake_at().map_or(LOOK, |at| at.since(now).min(LOOK));
                let rest = if actions.is_empty() { wake } else { Duration::ZERO };
                if let Ok((operation, answer)) = answers.recv_timeout(rest) {
                    let now = BootClock.now();
                    if let Answer::Beat(Some(beat)) = &answer {
                        signs.saw(beat, now);
                    }
                    actions.extend(taker.on(now, TakerEvent::Answer { operation, answer }));
                }
                let now = BootClock.now();
                if taker.wake_at().is_some_and(|at| now >= at) {
                    actions.extend(taker.on(now, TakerEvent::Tick));
                }
            } else {
                std::thread::park_timeout(LOOK_AGAIN);
            }
            while let Some(action) = actions.pop_front() {
                match action {
                    TakerAction::Store(call) => {
                        if matches!(call.content, crate::tenure::Content::ReadBeat(_)) {
                            signs.ask(BootClock.now());
                        }
                        let _ = calls.send(call);
                    }
                    TakerAction::Report(words) => tracing::info!("{words}"),
                    TakerAction::Orphaned(record) => {
                        waited.silent = Some(BootClock.now());
                        waited.from = record.owner.to_string();
                        tracing::warn!(
                            machine = %self.name.as_str(),
                            "host \"{}\" is silent: the machine is taken over", record.owner
                        );
                    }
                    TakerAction::Taken(record) => {
                        waited.taken = Some(BootClock.now());
                        return Ok(Some((record, signs, waited)));
                    }
                    TakerAction::Done(why) => {
                        if prepared.is_some() {
                            self.say_stand_in(format!("waits: {why}"));
                        }
                        taker = None;
                        look_at = Instant::now() + LOOK_AGAIN;
                        break;
                    }
                }
            }
        }
    }

    fn say_stand_in(&self, detail: String) {
        let same = {
            let inner = self.lock();
            inner.state != State::StandIn || inner.detail == detail
        };
        if !same {
            self.set_state(State::StandIn, detail);
        }
    }

    /// Builds everything that does not depend on which generation is the last.
    /// `aside`: what this host had of the machine is put aside first; not what was prepared before.
    fn prepare_stand_in(
        self: &Arc<Self>,
        history: &History,
        aside: &mut bool,
    ) -> Result<Prepared, String> {
        let generation = history.open(Which::Newest)?;
        let (saved, _) = describe(&generation)?;
        let (package, _) = self.check_saved(&saved, &self.config.machine)?;
        if std::mem::take(aside) {
            Aside::put(&self.dir.disks(), &self.dir.root().join("disks.replaced"))
                .map_err(|error| format!("putting this host's disks of it aside: {error}"))?
                .keep();
        }
        self.build_stand_in(&generation, saved, &package)
    }

    fn build_stand_in(
        &self,
        generation: &Arc<Generation>,
        saved: Description,
        package: &Package,
    ) -> Result<Prepared, String> {
        let paths = self.site();
        let site = paths.site(&*self.driver, &self.path);
        let content =
            hosted::new_content(&saved.shape, package, &paths.disks, false).map_err(text)?;
        let mut zeros = Vec::new();
        for disk in &content.disks {
            let data = generation.data_blocks(&disk_device(disk.name().as_str())).map_err(text)?;
            let mut none = BlockSet::full(disk.blocks());
            none.subtract(&data);
            let target = DiskTarget(Arc::clone(disk));
            for range in none.ranges() {
                target.zero(range.start.offset(), range.bytes(), false).map_err(text)?;
            }
            zeros.push(none);
        }
        let (shape, network) = (saved.shape.clone(), saved.network.clone());
        // It stands still for long, however long.
        let expected = Some(Duration::MAX);
        let mut body = Hosted::build(
            saved.shape,
            package.clone(),
            saved.network,
            content,
            &site,
            Start::Incoming,
            expected,
        )
        .map_err(text)?;
        let prepared = Prepared {
            content: body.content.clone(),
            package: package.id().to_string(),
            shape,
            network,
            zeros,
        };
        let mut inner = self.lock();
        if inner.state.over() {
            drop(inner);
            body.tear_down();
            return Err("this runner ends".into());
        }
        inner.monitor_pid = Some(body.monitor_pid());
        inner.body = Some(Box::new(body));
        Ok(prepared)
    }

    /// Whether what was prepared is still there; what is left of it goes.
    fn is_prepared(&self) -> bool {
        let mut inner = self.lock();
        let Some(body) = &mut inner.body else { return false };
        if body.vm().exit().is_none() {
            return true;
        }
        let gone = inner.body.take();
        inner.monitor_pid = None;
        drop(inner);
        if let Some(mut body) = gone {
            body.tear_down();
        }
        false
    }

    /// The machine is ours: runs it from its last generation.
    #[expect(clippy::too_many_arguments, reason = "what the waiting has brought, all of it once")]
    fn start_taken(
        self: &Arc<Self>,
        config: &ProtectConfig,
        history: &History,
        tenure: &Arc<Tenure>,
        prepared: &Prepared,
        record: &Record,
        signs: &Signs,
        waited: &Waited,
    ) -> Result<(), String> {
        let fence = {
            let mut inner = self.lock();
            inner.holding = Some(Holding::new(record.clone()));
            let body = inner.body.as_mut().ok_or("its monitor has just ended")?;
            body.fence()
        };
        let commit = config.output_commit;
        let protection = self.install_protection(fence, tenure.pace(), commit)?;
        tenure.hold(record.clone(), Known::Surely, self.hands(&protection));
        let number = self.patiently(&protection, || history.take())?;
        if number == 0 {
            return Err("its history has no generation".into());
        }
        let (generation, saved, state) = self.patiently(&protection, || {
            let generation = history.open(Which::Number(number))?;
            let (saved, state) = describe(&generation)?;
            Ok((generation, saved, state))
        })?;
        let same = saved.shape == prepared.shape
            && saved.network == prepared.network
            && saved.package == prepared.package;
        if !same {
            return Err(
                "its last generation is of another shape than it was prepared for; restore \
                        it with `drafter restore`"
                    .into(),
            );
        }
        let elsewhere =
            self.patiently(&protection, || Self::elsewhere(&generation, prepared, &saved))?;
        let fill = Arc::clone(&elsewhere.fill);
        let holding = Holding::new(record.clone());
        let mut body = self.lock().body.take().ok_or("its monitor has just ended")?;
        let started = Self::load_saved(&mut body, &state, Some(&elsewhere))
            .and_then(|()| {
                if !commit {
                    return Ok(());
                }
                // What it does from here on may be lost once more, until there is a generation.
                protection.hold_output();
                body.commit_output(true).map_err(text)
            })
            .and_then(|()| Self::run_saved(&mut body, &holding))
            .and_then(|()| body.release_output().map_err(text));
        if let Err(why) = started {
            fill.end();
            self.lock().body = Some(body);
            return Err(format!("generation {number} does not run here: {why}"));
        }
        let taken = waited.report(number, BootClock.now(), &saved, signs, tenure.pace().renewal);
        let sentence = sentence(&taken, record);
        tracing::warn!(machine = %self.name.as_str(), "{sentence}");
        {
            let mut inner = self.lock();
            // Its next generation looks at what it writes from here on, and at nothing else.
            inner.arrived = Some(Arrived::Began(began_as(&generation)));
            inner.first_touches = saved.first_touches();
            inner.taken_over = Some(taken);
            inner.filling = Some(Arc::clone(&fill));
        }
        let noted = super::take_over::Noted::of(&body, true);
        super::take_over::forget(&self.dir);
        if let Some(guest) = &body.guest {
            guest.speak_in(Duration::ZERO);
        }
        self.install(body, holding, None);
        self.set_state(State::Running, sentence);
        self.fill(fill, noted)?;
        self.refresh();
        Ok(())
    }

    /// Asks a store until it answers, for as long as the lease is ours.
    fn patiently<T>(
        &self,
        protection: &Protection,
        ask: impl Fn() -> Result<T, String>,
    ) -> Result<T, String> {
        loop {
            let why = match ask() {
                Ok(answer) => return Ok(answer),
                Err(why) => why,
            };
            if protection.is_over() || self.lock().state.over() {
                return Err(format!("another host has the machine, or this runner ends; {why}"));
            }
            tracing::warn!("the machine is ours and its generation is not to be had: {why}; again");
            std::thread::park_timeout(STORE_AGAIN);
        }
    }

    /// What of the machine is in the store, and who brings it. What the generation has as zeros is made
    /// so, where that was not done before.
    fn elsewhere(
        generation: &Arc<Generation>,
        prepared: &Prepared,
        saved: &Description,
    ) -> Result<Elsewhere, String> {
        let content = &prepared.content;
        let mut devices: Vec<(String, Arc<dyn Device>)> =
            vec![(MEMORY.to_owned(), content.memory.clone())];
        for disk in &content.disks {
            devices.push((disk_device(disk.name().as_str()), disk.clone()));
        }
        let touches = saved.first_touches();
        let fill = StoreFill::new(Arc::clone(generation), devices, &touches).map_err(text)?;
        let mut missing = Vec::new();
        for at in 0..=content.disks.len() {
            let data = fill.missing(at).map_err(text)?;
            if let Some(number) = at.checked_sub(1) {
                let target = DiskTarget(Arc::clone(&content.disks[number]));
                let mut zeros = BlockSet::full(data.device_blocks());
                zeros.subtract(&data);
                zeros.subtract(&prepared.zeros[number]);
                for range in zeros.ranges() {
                    target.zero(range.start.offset(), range.bytes(), false).map_err(text)?;
                }
            }
            missing.push(data);
        }
        fill.serve().map_err(|error| format!("no threads to bring it: {error}"))?;
        Ok(Elsewhere { fill, missing, early: None })
    }
}

fn waits_for(config: &ProtectConfig) -> String {
    format!("the machine's host to fall silent; its generations are in {}", config.store)
}

/// Who asks the lease store for the taker.
type Answers = Receiver<(OperationId, Answer)>;

fn asker(runner: &Arc<Runner>) -> Result<(Sender<Call>, Answers), String> {
    let (calls, asked) = mpsc::channel::<Call>();
    let (answer, answers) = mpsc::channel();
    let store = Arc::clone(&runner.store);
    let asking = std::thread::Builder::new().name("taker".into()).spawn(move || {
        for call in asked {
            if answer.send((call.operation, call.perform(&*store))).is_err() {
                return;
            }
        }
    });
    asking.map_err(text)?;
    Ok((calls, answers))
}
