//! The keeper's process: one thread for all that it knows, one for each runner's words, two that ask the
//! lease store.

use super::{
    Settings, lock_file, socket,
    wire::{FromKeeper, Life, ToKeeper, hear, say},
};
use crate::{
    lease::{
        self, BeatName, BootClock, BootTime, Clock as _, Epoch, HostName, LeaseStore, MachineName,
    },
    tenure::{
        self, Answer, Call, OperationId, Pulse, PulseAction, PulseEvent, PulseParts, Surrender,
        SurrenderAction, SurrenderEvent, SurrenderParts, Times, View,
    },
};
use anyhow::{Context as _, bail};
use nix::fcntl::{Flock, FlockArg};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufReader},
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

/// How long another host may hold the lock of the lease store.
const LEASE_LIMIT: Duration = Duration::from_secs(5);
/// Longest time in which a runner is told nothing.
const SAY: Duration = Duration::from_secs(1);
/// Between looks at a runner that has not taken what is over.
const LOOK: Duration = Duration::from_millis(20);
/// How long whoever connects may take to say who it is.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// Runners at once, and some that are being replaced.
const MOST: usize = 4096;

pub(super) enum Input {
    Pulse(OperationId, Answer),
    /// The answer to a question of the surrender with this number.
    Surrender(MachineName, u64, OperationId, Answer),
    Connected(UnixStream),
    Said(u64, ToKeeper),
    Gone(u64),
}

/// A runner that is connected.
struct Served {
    stream: UnixStream,
    since: Instant,
    /// Once it has said so.
    machine: Option<MachineName>,
    number: u64,
    /// It took what it was told last.
    took: bool,
    /// There is more to tell.
    behind: bool,
    said: Instant,
}

/// The name under which runners find this process. Removes the socket, if it is this one's still.
pub(super) struct Named {
    path: PathBuf,
    /// Device and inode.
    own: (u64, u64),
}

fn found_at(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

impl Named {
    /// Listens at `path`, in place of whatever is there; a thread tells who connects.
    pub(super) fn at(path: PathBuf, inputs: &Sender<Input>) -> io::Result<Self> {
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        let named = Self { own: found_at(&path)?, path };
        fs::set_permissions(&named.path, fs::Permissions::from_mode(0o600))?;
        let connected = inputs.clone();
        std::thread::Builder::new().name("accept".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                if connected.send(Input::Connected(stream)).is_err() {
                    return;
                }
            }
        })?;
        Ok(named)
    }

    pub(super) fn is_there(&self) -> bool {
        found_at(&self.path).is_ok_and(|found| found == self.own)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        if self.is_there() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Keeps the host's sign of life until nobody has needed it for long enough. If another process does so
/// already: ends, unless it is to `insist`.
///
/// # Errors
/// The settings are no good, or this host does not give what is needed.
pub(crate) fn serve(settings: &Settings, insist: bool) -> anyhow::Result<()> {
    let host = HostName::new(&settings.host)?;
    let (term, renewal) = (settings.term(), settings.renewal());
    if term < Duration::from_millis(500) || term > lease::LONGEST_TERM {
        bail!("a term is half a second to a day, not {term:?}");
    }
    if renewal.is_zero() || renewal > term / 2 {
        bail!("a sign of life that holds for {term:?} cannot be renewed every {renewal:?}");
    }
    fs::create_dir_all(&settings.state)?;
    let path = lock_file(&settings.state);
    let file = File::options().create(true).append(true).open(&path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        if insist {
            bail!("a keeper for {} runs already", settings.state.display());
        }
        return Ok(());
    };
    let store = lease::open(&settings.leases, LEASE_LIMIT)?;
    let path = socket(&settings.state);
    let (inputs, receiver) = mpsc::channel();
    let calls = Callers::begin(&store, &inputs)?;
    let words = path.display().to_string();
    let named = Named::at(path, &inputs).with_context(|| words)?;
    tracing::info!(%host, ?term, ?renewal, "keeps the sign of life of this host");
    let times = Times::of(term, renewal);
    let parts = PulseParts {
        name: BeatName::of_host(host.clone()),
        times: times.clone(),
        nonces: tenure::random_nonces(),
    };
    let now = BootClock.now();
    let (pulse, first) = Pulse::start(now, parts);
    let mut keeper = Keeper {
        settings: settings.clone(),
        host,
        times,
        inputs,
        named,
        looked: Instant::now(),
        calls,
        pulse,
        // What an earlier keeper told may hold until then.
        floor: now + term,
        served: BTreeMap::new(),
        next: 0,
        told: BTreeMap::new(),
        surrenders: BTreeMap::new(),
        given: BTreeMap::new(),
        life: None,
        serial: 0,
        renewed: now,
        trouble: None,
        alone_since: Instant::now(),
    };
    keeper.beat(first);
    keeper.run(&receiver);
    Ok(())
}

/// A thread for each kind of question: one that hangs does not keep the other from being asked.
struct Callers {
    pulse: Sender<Call>,
    surrender: Sender<(MachineName, u64, Call)>,
}

impl Callers {
    fn begin(store: &Arc<dyn LeaseStore>, inputs: &Sender<Input>) -> io::Result<Self> {
        let (pulse, asked) = mpsc::channel::<Call>();
        let (answers, other) = (inputs.clone(), Arc::clone(store));
        std::thread::Builder::new().name("beat".into()).spawn(move || {
            for call in asked {
                let answer = call.perform(&*other);
                if answers.send(Input::Pulse(call.operation, answer)).is_err() {
                    return;
                }
            }
        })?;
        let (surrender, asked) = mpsc::channel::<(MachineName, u64, Call)>();
        let (answers, store) = (inputs.clone(), Arc::clone(store));
        std::thread::Builder::new().name("surrender".into()).spawn(move || {
            for (machine, number, call) in asked {
                let answer = call.perform(&*store);
                let answer = Input::Surrender(machine, number, call.operation, answer);
                if answers.send(answer).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { pulse, surrender })
    }
}

struct Keeper {
    settings: Settings,
    host: HostName,
    times: Times,
    inputs: Sender<Input>,
    named: Named,
    /// When it was seen that runners find this.
    looked: Instant,
    calls: Callers,
    pulse: Pulse,
    /// Nothing is given up before.
    floor: BootTime,
    served: BTreeMap<u64, Served>,
    next: u64,
    /// Of each machine, the latest end that its runner was told.
    told: BTreeMap<MachineName, BootTime>,
    /// Each with a number of its own: an answer to an earlier one's question is nobody's.
    surrenders: BTreeMap<MachineName, (u64, Surrender)>,
    /// Up to which epoch a machine was given up, or may have been.
    given: BTreeMap<MachineName, Epoch>,
    life: Option<u64>,
    /// Of the newest renewal; the first beat of a life has 0.
    serial: u64,
    /// When the store was known to have the newest renewal.
    renewed: BootTime,
    trouble: Option<String>,
    /// Nobody is served since then.
    alone_since: Instant,
}

impl Keeper {
    fn run(&mut self, inputs: &Receiver<Input>) {
        loop {
            let input = match inputs.recv_timeout(self.rest(BootClock.now())) {
                Ok(input) => Some(input),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if let Some(input) = input {
                self.take(input);
            }
            self.do_what_is_due(BootClock.now());
            if self.looked.elapsed() >= SAY {
                self.looked = Instant::now();
                self.be_found();
            }
            // Who was not taken does not count, however often it comes: it may be one that waits for
            // this to end.
            if self.served.values().any(|served| served.machine.is_some()) {
                self.alone_since = Instant::now();
            }
            let linger = self.settings.linger_ms.map(Duration::from_millis);
            if linger.is_some_and(|linger| self.alone_since.elapsed() >= linger) {
                // What is still to be given up is taken from a host that is silent.
                tracing::info!("nobody needs the sign of life of this host any more");
                return;
            }
        }
    }

    /// Somebody may have removed the socket: runners that come must find this process, since no other may
    /// be started while it runs.
    fn be_found(&mut self) {
        if self.named.is_there() {
            return;
        }
        match Named::at(self.named.path.clone(), &self.inputs) {
            Ok(named) => {
                tracing::warn!("its socket was gone, and is there again");
                self.named = named;
            }
            Err(error) => tracing::error!(%error, "its socket is gone: no further runner finds it"),
        }
    }

    /// Until the next thing is due.
    fn rest(&self, now: BootTime) -> Duration {
        let surrenders = self.surrenders.values().filter_map(|(_, surrender)| surrender.wake_at());
        let silent = self.served.values().filter(|served| !served.took);
        let silent = silent.filter_map(|served| self.told.get(served.machine.as_ref()?).copied());
        // What is over already is looked at now and then.
        let silent = silent.map(|at| at.max(now + LOOK));
        let next = surrenders.chain(silent).chain(self.pulse.wake_at()).min();
        next.map_or(SAY, |at| at.since(now)).min(SAY / 4)
    }

    fn take(&mut self, input: Input) {
        let now = BootClock.now();
        match input {
            Input::Pulse(operation, answer) => {
                let actions = self.pulse.on(now, PulseEvent::Answer { operation, answer });
                self.beat(actions);
            }
            Input::Surrender(machine, number, operation, answer) => {
                if self.surrenders.get(&machine).is_some_and(|(ours, _)| *ours == number) {
                    self.surrender(&machine, SurrenderEvent::Answer { operation, answer });
                }
            }
            Input::Connected(stream) => {
                if let Err(error) = self.connected(stream) {
                    tracing::warn!(%error, "a runner is not served");
                }
            }
            Input::Said(from, words) => self.hears(from, words),
            Input::Gone(which) => self.lost(which, "its runner is gone"),
        }
    }

    fn do_what_is_due(&mut self, now: BootTime) {
        if self.pulse.wake_at().is_some_and(|at| now >= at) {
            let actions = self.pulse.on(now, PulseEvent::Tick);
            self.beat(actions);
        }
        let due = self
            .surrenders
            .iter()
            .filter(|(_, (_, surrender))| surrender.wake_at().is_some_and(|at| now >= at));
        for machine in due.map(|(machine, _)| machine.clone()).collect::<Vec<_>>() {
            self.surrender(&machine, SurrenderEvent::Tick);
        }
        let mut late = Vec::new();
        for (which, served) in &self.served {
            match &served.machine {
                None if served.since.elapsed() > HELLO_LIMIT => late.push(*which),
                Some(machine) if !served.took => {
                    // All that it was told is over, and it has not taken it in.
                    let until = self.told.get(machine).copied().unwrap_or_default();
                    let said = served.said.elapsed() > self.settings.term();
                    if now >= until && said {
                        late.push(*which);
                    }
                }
                _ => {}
            }
        }
        for which in late {
            self.lost(which, "its runner takes nothing in");
        }
        let quiet = self.served.iter().filter(|(_, served)| {
            served.machine.is_some()
                && served.took
                && (served.behind || served.said.elapsed() >= SAY)
        });
        for which in quiet.map(|(which, _)| *which).collect::<Vec<_>>() {
            self.say_view(which);
        }
    }

    // ---- the host's life

    fn beat(&mut self, actions: Vec<PulseAction>) {
        for action in actions {
            match action {
                PulseAction::Store(call) => {
                    let _ = self.calls.pulse.send(call);
                }
                PulseAction::Report(text) => {
                    tracing::warn!("{text}");
                    self.trouble = Some(text);
                    self.everyone_is_behind();
                }
                PulseAction::Tell(view) => self.tell(view.as_ref()),
            }
        }
    }

    fn tell(&mut self, view: Option<&View>) {
        let life = view.map(|view| view.of.incarnation);
        if view.is_some() {
            self.trouble = None;
        }
        self.serial = if life == self.life { self.serial + 1 } else { 0 };
        self.life = life;
        self.renewed = BootClock.now();
        self.everyone_is_behind();
    }

    fn everyone_is_behind(&mut self) {
        for served in self.served.values_mut() {
            served.behind = true;
        }
    }

    // ---- runners

    fn connected(&mut self, stream: UnixStream) -> io::Result<()> {
        if self.served.len() >= MOST {
            return Err(io::Error::other("there are too many"));
        }
        let which = self.next;
        self.next += 1;
        let (inputs, reader) = (self.inputs.clone(), stream.try_clone()?);
        std::thread::Builder::new().name("runner".into()).spawn(move || {
            let mut reader = BufReader::new(reader);
            while let Ok(Some(words)) = hear(&mut reader) {
                if inputs.send(Input::Said(which, words)).is_err() {
                    return;
                }
            }
            let _ = inputs.send(Input::Gone(which));
        })?;
        let (since, said) = (Instant::now(), Instant::now());
        let served =
            Served { stream, since, machine: None, number: 0, took: true, behind: true, said };
        self.served.insert(which, served);
        Ok(())
    }

    fn hears(&mut self, from: u64, words: ToKeeper) {
        let Some(served) = self.served.get_mut(&from) else { return };
        match words {
            ToKeeper::Hello { host, leases, machine, term_ms } if served.machine.is_none() => {
                if let Err((why, again)) = self.welcome(from, &host, &leases, &machine, term_ms)
                    && let Some(served) = self.served.remove(&from)
                {
                    let _ = say(&served.stream, &FromKeeper::Refused { why, again });
                    let _ = served.stream.shutdown(std::net::Shutdown::Both);
                }
            }
            // Said twice, it is no runner of ours.
            ToKeeper::Hello { .. } => self.lost(from, "its runner says what it should not"),
            ToKeeper::Took { number } => served.took |= number == served.number,
            ToKeeper::Goodbye => {
                if let Some(served) = self.served.remove(&from) {
                    let _ = served.stream.shutdown(std::net::Shutdown::Both);
                }
            }
        }
    }

    /// Takes a runner, or says why not and whether that passes.
    fn welcome(
        &mut self,
        from: u64,
        host: &str,
        leases: &str,
        machine: &str,
        term_ms: u64,
    ) -> Result<(), (String, bool)> {
        let Settings { host: ours, leases: our_leases, term_ms: our_term, .. } = &self.settings;
        if host != ours {
            let why = format!("it keeps that of host \"{ours}\", not of \"{host}\"");
            return Err((why, false));
        }
        if leases != our_leases {
            let why = "it keeps that in another lease store: a state directory is of one host, whose \
                       machines that share a sign of life share their lease store too";
            return Err((why.to_owned(), false));
        }
        if term_ms != *our_term {
            let why = format!(
                "it keeps terms of {our_term} ms, not of {term_ms}: machines that share a sign of life \
                 have the same --term"
            );
            return Err((why, false));
        }
        let machine = MachineName::new(machine).map_err(|error| (error.to_string(), false))?;
        match self.surrenders.get(&machine) {
            Some((_, surrender)) if !surrender.may_be_dropped() => {
                return Err(("its lease is being given up just now".to_owned(), true));
            }
            _ => drop(self.surrenders.remove(&machine)),
        }
        // A runner that comes after another: of the one before no end was told that this one need know.
        let other = |(_, served): &(&u64, &Served)| served.machine.as_ref() == Some(&machine);
        if let Some((&before, _)) = self.served.iter().find(other)
            && let Some(before) = self.served.remove(&before)
        {
            // Were it there after all, it had to hear that it is told nothing more.
            let _ = before.stream.shutdown(std::net::Shutdown::Both);
        }
        let Some(served) = self.served.get_mut(&from) else { return Ok(()) };
        served.machine = Some(machine.clone());
        let welcome = FromKeeper::Welcome {
            renewal_us: self.settings.renewal().as_micros() as u64,
            given_up: self.given.get(&machine).map(|epoch| epoch.0),
        };
        if say(&served.stream, &welcome).is_err() {
            self.lost(from, "its runner is gone");
            return Ok(());
        }
        self.say_view(from);
        Ok(())
    }

    /// Tells a runner how the host's life is.
    fn say_view(&mut self, which: u64) {
        let view = self.pulse.view();
        let life = view.map(|view| Life {
            incarnation: view.of.incarnation,
            until_ns: view.until.0.as_nanos() as u64,
            serial: self.serial,
            told_ns: self.renewed.0.as_nanos() as u64,
        });
        let Some(served) = self.served.get_mut(&which) else { return };
        let Some(machine) = &served.machine else { return };
        if let Some(view) = view {
            let told = self.told.entry(machine.clone()).or_default();
            *told = (*told).max(view.until);
        }
        served.number += 1;
        (served.took, served.behind, served.said) = (false, false, Instant::now());
        let (number, trouble) = (served.number, self.trouble.clone());
        if say(&served.stream, &FromKeeper::View { number, life, trouble }).is_err() {
            self.lost(which, "its runner is gone");
        }
    }

    /// A runner that is gone, or as good as that: its machine is given up when all is over that it was told.
    fn lost(&mut self, which: u64, why: &str) {
        let Some(served) = self.served.remove(&which) else { return };
        let _ = served.stream.shutdown(std::net::Shutdown::Both);
        let Some(machine) = served.machine else { return };
        let told = self.told.get(&machine).copied().unwrap_or_default();
        tracing::warn!(%machine, "{why}: unless one comes in time, the machine is given up");
        let parts = SurrenderParts {
            machine: machine.clone(),
            here: self.host.clone(),
            not_before: told.max(self.floor),
            times: self.times.clone(),
            nonces: tenure::random_nonces(),
        };
        self.next += 1;
        self.surrenders.insert(machine, (self.next, Surrender::new(parts)));
    }

    fn surrender(&mut self, machine: &MachineName, event: SurrenderEvent) {
        let Some((number, surrender)) = self.surrenders.get_mut(machine) else { return };
        let number = *number;
        let mut over = false;
        for action in surrender.on(BootClock.now(), event) {
            match action {
                SurrenderAction::Store(call) => {
                    let _ = self.calls.surrender.send((machine.clone(), number, call));
                }
                SurrenderAction::GivingUp(epoch) => {
                    let given = self.given.entry(machine.clone()).or_insert(epoch);
                    *given = (*given).max(epoch);
                }
                SurrenderAction::Done(what) => {
                    tracing::warn!(%machine, "{what}");
                    over = true;
                }
                SurrenderAction::Report(text) => tracing::warn!("{text}"),
            }
        }
        if over {
            self.surrenders.remove(machine);
        }
    }
}
