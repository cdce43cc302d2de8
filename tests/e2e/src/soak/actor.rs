//! One machine of a soak: its clients, where it is, and what is done to it. Whatever a deed comes to, the
//! machine must run in one place and serve afterwards.

mod forks;
mod sleeps;

use super::{
    PATIENCE, World,
    history::{Life, Operation, Part},
    plan::{Deed, Deeds, HOSTS, Harm, Kind, Next},
    registers::{Connect, Registers},
};
use crate::{
    Stage,
    command::say,
    copies::Copies,
    gate::{Gate, Step},
};
use architect::fleet::{FleetError, MachineSpec, RunnerId};
use drafter::{
    driver::qemu,
    migrate::{messages::Mode, planner::Budgets},
    runner::{
        api::{Client, MigrateRequest, Request, Status},
        state::MachineDir,
    },
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs, io,
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// Memory of a machine: Redis, its kernel and not much more.
const MEMORY_MIB: u64 = 96;
/// How long a runner may take to say how it is.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a move may take to come to a step; one that has no such step goes on.
const STEP: Duration = Duration::from_secs(20);

/// Bytes a second of a move during which the source is lost.
const SLOW: u64 = 20_000_000;

/// What went wrong, for people.
type Done<T = ()> = Result<T, String>;

/// What a runner on another host is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// It takes the machine when it is moved.
    Standby,
    /// It takes the machine when its host is lost.
    StandIn,
}

/// See the module.
pub(super) struct Actor<'a> {
    world: &'a World,
    number: u8,
    kind: Kind,
    spec: MachineSpec,
    at: RunnerId,
    other: Option<(RunnerId, Role)>,
    /// Which other host is meant: so many on from the machine's own.
    way: usize,
    clients: Registers,
    copies: Copies,
    suspended: u64,
    sleeps: sleeps::Sleeps,
    forks: forks::Forks,
    /// What the machine remembers: whole parts, and since when it goes on.
    past: Vec<Part>,
    since: u64,
    /// Lives that are over.
    lives: Vec<Life>,
    /// Deeds done.
    pub(super) deeds: u64,
}

/// A machine of this kind.
pub(super) fn spec(stage: &Stage, folder: &Path, number: u8, kind: Kind) -> MachineSpec {
    let mut spec = stage.spec(&format!("m{number}"), number);
    spec.memory_mib = Some(MEMORY_MIB);
    // What the gates at a move's steps understand.
    spec.tls = kind == Kind::Protected;
    if kind == Kind::Forked {
        spec.extra_boot = ["--disk-kind", "nbd"].map(String::from).into();
    }
    if kind.is_protected() {
        let store = format!("file://{}", folder.join("store").display());
        let keys = folder.join("keys").display().to_string();
        let words = ["--protect", &store, "--protect-keys", &keys, "--every", "400ms"];
        spec.extra = words.map(String::from).into();
        spec.extra.extend(["--term", "2s", "--output-commit"].map(String::from));
    }
    spec
}

impl<'a> Actor<'a> {
    pub(super) fn new(
        world: &'a World,
        number: u8,
        kind: Kind,
        spec: MachineSpec,
        at: RunnerId,
    ) -> Self {
        let hosts = 0..usize::from(HOSTS);
        let states: Vec<_> = world.fleet(|fleet| hosts.map(|host| fleet.state_of(host)).collect());
        let copies = Copies::watch(&states, &spec.name);
        let client = world.fleet(|fleet| fleet.rig().client().clone());
        let to: SocketAddr = Stage::public(number);
        let connect: Arc<Connect> = Arc::new(move || {
            let connected = client.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5)));
            connected.map_err(io::Error::other)?
        });
        let clients = Registers::start(number.into(), world.origin, world.seed, &connect);
        Self {
            world,
            number,
            kind,
            spec,
            at,
            other: None,
            way: 1,
            clients,
            copies,
            suspended: 0,
            sleeps: sleeps::Sleeps::default(),
            forks: forks::Forks::default(),
            past: Vec::new(),
            since: 0,
            lives: Vec::new(),
            deeds: 0,
        }
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    pub(super) fn number(&self) -> u8 {
        self.number
    }

    /// Does deeds until it is over.
    pub(super) fn play(&mut self, deeds: Deeds) -> Done {
        self.served("at first")?;
        for Next { pause, deed, way } in deeds {
            self.way = way.into();
            if !self.world.pause(pause) {
                break;
            }
            self.say(&format!("{deed:?}"));
            let begun = Instant::now();
            self.act(deed).map_err(|why| {
                format!("{} after {deed:?}: {why}\n{}", self.spec.name, self.both())
            })?;
            self.deeds += 1;
            let (answers, unknown) = self.clients.counts();
            let took = begun.elapsed().as_secs_f64();
            self.say(&format!("done in {took:.2} s; {answers} answers, {unknown} unknown"));
        }
        self.served("at the end").map_err(|why| format!("{}: {why}", self.spec.name))
    }

    /// Ends the clients; what they asked for and were told, and what of it the machine and its copies have
    /// to remember.
    pub(super) fn finish(mut self) -> (Vec<Operation>, Vec<Life>) {
        self.end_life(u64::MAX, "to the end");
        let mut history = self.clients.finish();
        history.append(&mut self.forks.history);
        (history, self.lives)
    }

    /// What the machine remembers if it goes on from an instant between the two: what was not answered by
    /// the first may not have been done by then.
    fn remembers(&self, sure: u64, to: u64) -> Vec<Part> {
        let own = Part { machine: self.number.into(), from: self.since, to, sure };
        self.past.iter().copied().chain([own]).collect()
    }

    /// Whatever comes after `at` is another life.
    fn end_life(&mut self, at: u64, why: &str) {
        let name = format!("{}, {why}", self.spec.name);
        self.lives.push(Life { name, parts: self.remembers(u64::MAX, at) });
    }

    fn say(&self, what: &str) {
        self.world.say(&self.spec.name, what);
    }

    fn dir(&self, id: RunnerId) -> MachineDir {
        self.world.fleet(|fleet| fleet.runner(id).dir())
    }

    fn host(&self, id: RunnerId) -> usize {
        let name = self.world.fleet(|fleet| fleet.runner(id).host.clone());
        self.world.hosts.iter().position(|host| host.name == name).unwrap_or_default()
    }

    fn client(&self, id: RunnerId, limit: Duration) -> Done<Client> {
        let client = Client::connect(&self.dir(id).socket());
        let client = client.map_err(|e| e.to_string())?;
        client.set_deadline(Some(limit)).map_err(|e| e.to_string())?;
        Ok(client)
    }

    fn status(&self, id: RunnerId) -> Option<Status> {
        self.client(id, ANSWER).ok()?.get(&Request::Status).ok()
    }

    fn state(&self, id: RunnerId) -> String {
        self.status(id).map(|status| status.state).unwrap_or_default()
    }

    /// Both runners, as they describe themselves.
    fn both(&self) -> String {
        let ids = [Some(self.at), self.other.map(|(id, _)| id)];
        let told = ids.into_iter().flatten().map(|id| {
            let log = self.world.fleet(|fleet| fleet.runner(id).log_tail());
            let host = self.host(id);
            match self.status(id) {
                Some(s) => format!(
                    "host {host}: {} ({}), lease {:?} {:?}, missing {:?}, protection {:?}\n{log}",
                    s.state, s.detail, s.lease_owner, s.epoch, s.missing, s.protection
                ),
                None => format!("host {host}: no answer\n{log}"),
            }
        });
        told.collect::<Vec<_>>().join("\n")
    }

    /// Waits until it is so.
    fn until(&self, what: &str, mut so: impl FnMut() -> bool) -> Done {
        let deadline = Instant::now() + PATIENCE;
        while !so() {
            if Instant::now() > deadline {
                return Err(format!("not within {PATIENCE:?}: {what}"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Tries again until it is done: the lease store may be away.
    fn insist<T>(&self, what: &str, mut work: impl FnMut() -> Result<T, FleetError>) -> Done<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match work() {
                Ok(done) => return Ok(done),
                Err(error) if Instant::now() > deadline => return Err(format!("{what}: {error}")),
                Err(error) => {
                    // The log's last line is the reason.
                    let error = error.to_string();
                    let why = error.lines().last().unwrap_or_default();
                    self.say(&format!("{what}, again: {why}"));
                }
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// The clients have answers.
    fn served(&self, when: &str) -> Done {
        if self.clients.wait_for(20, PATIENCE) {
            return Ok(());
        }
        Err(format!("no answers {when}; {:?}", self.clients.counts()))
    }

    fn act(&mut self, deed: Deed) -> Done {
        match deed {
            Deed::Move(mode, bandwidth) => self.moves(mode, bandwidth)?,
            Deed::Harmed(mode, step, harm) => self.harmed(mode, step, harm)?,
            Deed::Suspend { elsewhere } => self.suspend(elsewhere)?,
            Deed::Sleep { elsewhere } => self.sleep(elsewhere, None)?,
            Deed::GoBack(generation) => self.sleep(true, Some(generation))?,
            Deed::Fork => self.fork()?,
            Deed::LoseHost => self.lose_host()?,
            Deed::LoseSource => self.lose_source()?,
            Deed::FreezeHost => self.freeze_host()?,
        }
        self.served("after it")?;
        self.copies.seen().map_or(Ok(()), |seen| Err(format!("two copies ran: {seen}")))
    }

    /// The host that this deed means, of the others.
    fn elsewhere(&self) -> usize {
        (self.host(self.at) + self.way) % usize::from(HOSTS)
    }

    /// A runner on the other host that is meant, which is there for this.
    fn ensure(&mut self, role: Role) -> Done<RunnerId> {
        let words = |word: &str, spec: &MachineSpec| {
            let package = spec.package.display().to_string();
            vec![word.to_owned(), spec.name.clone(), "--package".into(), package]
        };
        let host = self.elsewhere();
        let id = match self.other {
            Some((id, found)) if found == role && self.host(id) == host => id,
            found => {
                if let Some((id, _)) = found {
                    self.remove(id);
                }
                self.other = None;
                let (what, words) = match role {
                    Role::Standby => ("a runner that waits", words("receive", &self.spec)),
                    Role::StandIn => ("a stand-in", words("stand-in", &self.spec)),
                };
                let spec = self.spec.clone();
                let start = || self.world.fleet(|fleet| fleet.start(host, &spec, words.clone()));
                self.insist(what, start)?
            }
        };
        self.other = Some((id, role));
        self.until("the other host is ready", || match (role, self.status(id)) {
            (Role::Standby, Some(status)) => status.state == "standby",
            (Role::StandIn, Some(status)) => {
                status.state == "stand-in" && status.monitor_pid.is_some()
            }
            (_, None) => false,
        })?;
        Ok(id)
    }

    /// Ends a runner that has nothing of the machine.
    fn remove(&self, id: RunnerId) {
        let run = self.dir(id).run();
        self.world.fleet(|fleet| fleet.runner_mut(id).kill());
        if let Err(error) = qemu::stop_without_runner(&run) {
            self.say(&format!("a monitor may be left: {error}"));
        }
    }

    /// One copy runs, with all of its blocks, and the other host waits; it is in `self.at` then.
    fn settle(&mut self) -> Done {
        let Some((other, role)) = self.other else { return Ok(()) };
        let (at, mut swapped) = (self.at, false);
        let whole = |id| {
            let status = self.status(id);
            status.is_some_and(|s| s.state == "running" && s.missing.values().all(|n| *n == 0))
        };
        self.until("one copy runs and the other host waits", || {
            if self.state(other) == "standby" && whole(at) {
                return true;
            }
            swapped = self.state(at) == "standby" && whole(other);
            swapped
        })?;
        if swapped {
            (self.at, self.other) = (other, Some((at, role)));
        }
        Ok(())
    }

    fn follow(&self, id: RunnerId, job: u64) -> Done {
        let mut client = self.client(id, PATIENCE)?;
        client.call(&Request::Follow { job }, |_| {}).map(drop).map_err(|e| e.to_string())
    }

    fn ask_to_move(&self, to: SocketAddr, budgets: Budgets, mode: Mode) -> Done<u64> {
        let peer = self.world.hosts[self.elsewhere()].name.clone();
        let request = MigrateRequest { to, peer, mode, budgets, dry_run: false, stored_as: None };
        let mut client = self.client(self.at, ANSWER)?;
        client.get(&Request::Migrate(request)).map_err(|e| e.to_string())
    }

    fn moves(&mut self, mode: Mode, bandwidth: Option<u64>) -> Done {
        if self.kind.is_protected() {
            self.is_protected()?;
        }
        let to = self.ensure(Role::Standby)?;
        let address = self.world.fleet(|fleet| fleet.runner(to).address);
        let budgets = Budgets { bandwidth, ..Budgets::default() };
        let moved =
            self.ask_to_move(address, budgets, mode).and_then(|job| self.follow(self.at, job));
        // In this weather it may fail: then the machine is where it was.
        if let Err(why) = moved {
            self.say(&format!("it did not move: {why}"));
        }
        self.settle()
    }

    fn signal(&self, id: RunnerId, signal: Signal) -> Done {
        let pid = self.world.fleet(|fleet| fleet.runner(id).pid());
        kill(Pid::from_raw(pid as i32), signal).map_err(|e| format!("{signal} to {pid}: {e}"))
    }

    fn harmed(&mut self, mode: Mode, step: Step, harm: Harm) -> Done {
        if self.kind.is_protected() {
            self.is_protected()?;
        }
        let (from, to) = (self.at, self.ensure(Role::Standby)?);
        let host = self.host(to);
        let gate = {
            let stage = self.world.stage();
            Gate::at(&stage, host, stage.fleet.runner(to).address, step)
        };
        if let Err(why) = self.ask_to_move(gate.address, Budgets::default(), mode) {
            self.say(&format!("it is not moved: {why}"));
            return self.settle();
        }
        if !gate.wait(STEP) {
            self.say("this move has no such step, or did not come to it");
        }
        match harm {
            Harm::KillSource | Harm::KillDestination => {
                let who = if harm == Harm::KillSource { from } else { to };
                self.world.fleet(|fleet| fleet.runner_mut(who).kill());
                gate.open();
                self.insist("a runner is started again", || {
                    self.world.fleet(|fleet| fleet.recover(who))
                })?;
            }
            Harm::StopSource(time) | Harm::StopDestination(time) => {
                let who = if matches!(harm, Harm::StopSource(_)) { from } else { to };
                self.signal(who, Signal::SIGSTOP)?;
                gate.open();
                thread::sleep(time);
                self.signal(who, Signal::SIGCONT)?;
            }
            Harm::Cut(time) => {
                gate.cut();
                thread::sleep(time);
                gate.mend();
            }
        }
        self.served("soon after it")?;
        let settled = self.settle();
        gate.cut();
        settled
    }

    fn suspend(&mut self, elsewhere: bool) -> Done {
        let (from, name) = (self.at, self.spec.name.clone());
        self.suspended += 1;
        let saved = self.world.folder.join("saved");
        fs::create_dir_all(&saved).map_err(|e| format!("{}: {e}", saved.display()))?;
        let to = saved.join(format!("{name}-{}", self.suspended));
        let host = self.host(from);
        let mut command = self.world.stage().drafter(host);
        command.args(["suspend", &name, "--to"]).arg(&to);
        let said = say(&mut command, PATIENCE);
        if said.code != Some(0) {
            self.say(&format!("it is not suspended: {}", said.err.trim()));
            return self.settle();
        }
        // It has nothing to do any more; waited for as a supervisor does.
        self.until("the runner of a suspended machine ends", || self.status(from).is_none())?;
        self.world.fleet(|fleet| fleet.runner_mut(from).kill());
        let host = self.wakes_at(host, elsewhere);
        let (spec, package) = (self.spec.clone(), self.spec.package.display().to_string());
        let from = to.display().to_string();
        let words: Vec<String> =
            ["resume", &name, "--from", &from, "--package", &package].map(String::from).into();
        self.at = self.insist("it is resumed", || {
            self.world.fleet(|fleet| fleet.start(host, &spec, words.clone()))
        })?;
        self.until("it runs again", || self.state(self.at) == "running")?;
        // The one before is not needed: this one has all of its blocks.
        let before = saved.join(format!("{name}-{}", self.suspended.saturating_sub(1)));
        let _ = fs::remove_dir_all(before);
        Ok(())
    }

    /// The host on which a machine is started again that was on `host` and runs nowhere; nothing else is
    /// there for it then.
    fn wakes_at(&mut self, host: usize, elsewhere: bool) -> usize {
        let host = if elsewhere { (host + self.way) % usize::from(HOSTS) } else { host };
        if let Some((id, _)) = self.other
            && self.host(id) == host
        {
            self.remove(id);
            self.other = None;
        }
        host
    }

    /// Waits until it is protected and its output waits for generations.
    fn is_protected(&self) -> Done {
        self.until("it is protected", || {
            let protection = self.status(self.at).and_then(|status| status.protection);
            protection.is_some_and(|state| state.word == "protected" && state.output_commit)
        })
    }

    /// Runner, monitor and guard of the machine.
    fn processes(&self) -> Done<[Pid; 3]> {
        let status = self.status(self.at).ok_or("its runner does not answer")?;
        let guard = status.protection.and_then(|state| state.guard_pid).ok_or("no guard")?;
        let monitor = status.monitor_pid.ok_or("no monitor")?;
        Ok([status.runner_pid, monitor, guard].map(|pid| Pid::from_raw(pid as i32)))
    }

    /// Waits until the stand-in has taken the machine.
    fn taken_over(&mut self, by: RunnerId) -> Done {
        self.until("the stand-in has taken it", || {
            let protection = self.status(by).and_then(|status| status.protection);
            protection.is_some_and(|state| state.taken_over.is_some())
        })?;
        self.at = by;
        self.other = None;
        Ok(())
    }

    fn lose_host(&mut self) -> Done {
        let next = self.ensure(Role::StandIn)?;
        self.is_protected()?;
        let (at, all) = (self.at, self.processes()?);
        for pid in all {
            let _ = kill(pid, Signal::SIGKILL);
        }
        self.world.fleet(|fleet| fleet.runner_mut(at).kill());
        self.taken_over(next)
    }

    /// What of it has not come is in its last generation, but for what changed since, which comes first.
    fn lose_source(&mut self) -> Done {
        self.is_protected()?;
        let (from, to) = (self.at, self.ensure(Role::Standby)?);
        let status = self.status(from).ok_or("its runner does not answer")?;
        let monitor = status.monitor_pid.ok_or("no monitor")?;
        let owner = self.world.hosts[self.host(to)].name.clone();
        let address = self.world.fleet(|fleet| fleet.runner(to).address);
        let budgets = Budgets { bandwidth: Some(SLOW), ..Budgets::default() };
        if let Err(why) = self.ask_to_move(address, budgets, Mode::PostCopy) {
            self.say(&format!("it is not moved: {why}"));
            return self.settle();
        }
        let (deadline, mut most) = (Instant::now() + STEP, 0);
        let half = loop {
            let status = self.status(to).filter(|s| s.lease_owner.as_deref() == Some(&owner));
            // Out of the source's reach the store gives the rest while what changed has yet to come.
            let cut = status.as_ref().is_some_and(|s| s.detail.contains("not reached"));
            let missing: u64 = status.map_or(0, |s| s.missing.values().sum());
            most = most.max(missing);
            if cut || Instant::now() > deadline {
                break None;
            }
            if missing < most / 2 {
                break Some(missing).filter(|missing| *missing > 0);
            }
            thread::sleep(Duration::from_millis(5));
        };
        let Some(missing) = half else {
            self.say("it did not move, its line was cut, or all of it came at once");
            return self.settle();
        };
        for pid in [status.runner_pid, monitor] {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
        self.remove(from);
        (self.at, self.other) = (to, None);
        self.until(&format!("{missing} of {most} blocks come from the store"), || {
            let whole = |s: Status| s.state == "running" && s.missing.values().all(|n| *n == 0);
            self.status(to).is_some_and(whole)
        })
    }

    fn freeze_host(&mut self) -> Done {
        let next = self.ensure(Role::StandIn)?;
        self.is_protected()?;
        let (at, all) = (self.at, self.processes()?);
        let all_get = |signal| all.iter().for_each(|pid| _ = kill(*pid, signal));
        all_get(Signal::SIGSTOP);
        let taken = self.taken_over(next);
        all_get(Signal::SIGCONT);
        taken?;
        self.served("where it was taken")?;
        self.until("the copy that stood still has ended", || kill(all[1], None).is_err())?;
        self.world.fleet(|fleet| fleet.runner_mut(at).kill());
        Ok(())
    }
}
