//! One QEMU machine's life.
//!
//! ```text
//!            start(Incoming)            start(Boot)
//!                  │                        │
//!                Empty ──prepare_load──▶ Ready ──load──▶ Paused ◀──pause── Running
//!                                                          │ ▲ └────run──────▶ ▲
//!                                                         save                  │
//!                                                          ▼                    │
//!                                                        Saved ───────run───────┘
//! ```
//!
//! `Saved` keeps the state that was saved: QEMU gives it out only once, and an aborted move may
//! want it again.

use super::{
    command, disks,
    halt::Halt,
    held, launch, memory_map,
    process::{Ended, Process, tail},
    qmp::{Event, First, Mark, Pending, Qmp, QmpError},
    record::{Files, Record},
};
use crate::driver::{
    DiskKind, DriverError, Exit, Fence, MemoryHandle, Start, Vm, VmEvent,
    urgent::{Class, set_class},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout},
    sys::socket::{setsockopt, sockopt},
};
use serde_json::{Value, json};
use std::{
    io,
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// For what QEMU answers at once. Generous: an answer waits for QEMU's main thread, and that for a
/// processor.
const COMMAND_LIMIT: Duration = Duration::from_secs(5);
/// Pausing waits for disk requests in flight, and for a page that a processor waits for.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);
const SAVE_LIMIT: Duration = Duration::from_secs(10);
const LOAD_LIMIT: Duration = Duration::from_secs(10);
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Most bytes of device state: 83 KB for a machine without network and disks.
const MOST_STATE: usize = 64 << 20;
/// So that QEMU never waits for us while it writes state.
const SOCKET_BUFFER: usize = 1 << 20;
const SAVE_NAME: &str = "save";
const LOAD_NAME: &str = "load";

enum Phase {
    /// Waits for state.
    Empty,
    /// Reads state from this socket as soon as it comes.
    Ready(UnixStream),
    Paused,
    Running,
    /// Paused, and its state has left QEMU. `None`: another runner took it.
    Saved(Option<Vec<u8>>),
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Self::Empty | Self::Ready(_) => "empty, waiting to be loaded",
            Self::Paused => "paused",
            Self::Running => "running",
            Self::Saved(_) => "paused and saved",
        }
    }
}

/// Which of QEMU's threads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Processors,
    /// All others, and our own that reads what they say.
    Control,
}

/// A socket that QEMU holds the other end of, to write its next state to.
struct SaveChannel {
    ours: UnixStream,
    passed: Pending,
}

/// A machine under QEMU.
pub(super) struct QemuVm {
    machine: String,
    files: Files,
    record: Record,
    process: Process,
    halt: Arc<Halt>,
    qmp: Qmp,
    userfaultfd: Option<OwnedFd>,
    phase: Phase,
    channel: Option<SaveChannel>,
    told: Mark,
    ended: Option<Exit>,
}

impl QemuVm {
    pub(super) fn new(
        files: Files,
        record: Record,
        process: Process,
        qmp: Qmp,
        userfaultfd: Option<OwnedFd>,
    ) -> Self {
        let machine = record.shape.name.clone();
        let halt = Arc::new(Halt::of(&record, &process));
        let told = qmp.mark();
        Self {
            machine,
            files,
            record,
            process,
            halt,
            qmp,
            userfaultfd,
            phase: Phase::Paused,
            channel: None,
            told,
            ended: None,
        }
    }

    #[cfg(test)]
    pub(super) fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// After a start.
    pub(super) fn started(&mut self, start: Start) -> Result<(), DriverError> {
        self.phase = match start {
            Start::Boot => Phase::Paused,
            Start::Incoming => Phase::Empty,
        };
        if start == Start::Boot { self.arm_save() } else { Ok(()) }
    }

    /// After another runner.
    pub(super) fn find_phase(&mut self) -> Result<(), DriverError> {
        self.hurry(Who::Control, Class::Usual);
        self.hurry(Who::Processors, Class::Usual);
        let status = self.call("query-status", Value::Null, "asking for its status")?;
        self.phase = match status["status"].as_str() {
            Some("running") => Phase::Running,
            Some("inmigrate") => Phase::Empty,
            Some("postmigrate" | "finish-migrate") => Phase::Saved(None),
            _ => Phase::Paused,
        };
        Ok(())
    }

    fn call(
        &mut self,
        command: &'static str,
        arguments: Value,
        operation: &'static str,
    ) -> Result<Value, DriverError> {
        let result = self.qmp.call(command, arguments, COMMAND_LIMIT);
        result.map_err(|error| self.failed(operation, error))
    }

    /// An error of the control connection as one of the machine.
    fn failed(&mut self, operation: &'static str, error: QmpError) -> DriverError {
        let machine = self.machine.clone();
        match error {
            QmpError::Timeout(limit) => DriverError::Timeout { machine, operation, limit },
            QmpError::Refused(detail) => DriverError::Refused { machine, operation, detail },
            QmpError::Closed(why) => {
                let ended = self.process.wait(Duration::from_secs(1));
                let detail = ended.map_or(why, |ended| self.describe(ended));
                DriverError::Gone { machine, operation, detail }
            }
        }
    }

    fn refused(&self, operation: &'static str, detail: String) -> DriverError {
        DriverError::Refused { machine: self.machine.clone(), operation, detail }
    }

    fn wrong_phase(&self, operation: &'static str, wanted: &str) -> DriverError {
        self.refused(operation, format!("it is {}; it must be {wanted}", self.phase.name()))
    }

    fn describe(&self, ended: Ended) -> String {
        let mut text = ended.to_string();
        if self.record.cgroup.out_of_memory() {
            text += "; the kernel ended it because it reached its memory limit";
        }
        let errors = tail(&self.files.stderr, 2000);
        if !errors.is_empty() {
            text += &format!("; its last words: {errors}");
        }
        text
    }

    fn host(&self, operation: &str, source: io::Error) -> DriverError {
        DriverError::Host {
            operation: format!("{operation} of machine \"{}\"", self.machine),
            source,
        }
    }

    /// Gives QEMU one end of a new socket under a name, and does not wait for the answer.
    fn pass_socket(&mut self, name: &'static str) -> Result<SaveChannel, DriverError> {
        const OPERATION: &str = "passing a socket for its state";
        let pair = UnixStream::pair().and_then(|(ours, theirs)| {
            setsockopt(&ours, sockopt::SndBuf, &SOCKET_BUFFER)?;
            setsockopt(&theirs, sockopt::SndBuf, &SOCKET_BUFFER)?;
            Ok((ours, theirs))
        });
        let (ours, theirs) =
            pair.map_err(|error| self.host("making a socket for the state", error))?;
        let arguments = json!({ "fdname": name });
        let sent = self.qmp.send("getfd", arguments, Some(theirs.as_fd()));
        match sent {
            Ok(passed) => Ok(SaveChannel { ours, passed }),
            Err(error) => Err(self.failed(OPERATION, error)),
        }
    }

    /// From just before a pause until it runs again, here or elsewhere, a machine's control
    /// threads go first; they have little to do while it stands still. See [`Urgent`].
    ///
    /// [`Urgent`]: crate::driver::Urgent
    fn hurry(&self, who: Who, class: Class) {
        let is_processor = |name: &str| name.starts_with("CPU ");
        let mut threads = self.process.threads();
        threads.retain(|(_, name)| is_processor(name) == (who == Who::Processors));
        let reader = self.qmp.reader().filter(|_| who == Who::Control);
        for thread in threads.into_iter().map(|(id, _)| id).chain(reader) {
            // One that ended meanwhile needs nothing; without the right to it, all stays as usual.
            if let Err(error) = set_class(thread, class) {
                tracing::trace!(thread, %error, "thread keeps its place");
            }
        }
    }

    /// Prepares the next save, ahead of the pause.
    fn arm_save(&mut self) -> Result<(), DriverError> {
        self.channel = Some(self.pass_socket(SAVE_NAME)?);
        Ok(())
    }

    /// Reads the state that QEMU writes after `migrate`, until it closes its end. QEMU writes
    /// while it holds its big lock, so the answer to `migrate` may come only after the state was
    /// read; but an error must be noticed while nothing comes.
    fn read_state(
        &mut self,
        ours: &mut UnixStream,
        mark: Mark,
        migrate: &Pending,
    ) -> Result<Vec<u8>, DriverError> {
        const OPERATION: &str = "saving its state";
        let end = Instant::now() + SAVE_LIMIT;
        ours.set_nonblocking(true).map_err(|error| self.host("reading the state", error))?;
        let mut state = Vec::with_capacity(256 << 10);
        loop {
            match ours.take((MOST_STATE - state.len()) as u64).read_to_end(&mut state) {
                Ok(_) if state.len() >= MOST_STATE => {
                    return Err(
                        self.refused(OPERATION, format!("more than {MOST_STATE} bytes of state"))
                    );
                }
                Ok(_) => return Ok(state),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(self.host("reading the state", error)),
            }
            let mut wanted = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
            let rest =
                PollTimeout::try_from(Duration::from_millis(20)).unwrap_or(PollTimeout::ZERO);
            if nix::poll::poll(&mut wanted, rest).is_ok_and(|ready| ready > 0) {
                continue;
            }
            let news = self.qmp.event_or_answer(mark, migrate, Duration::ZERO, has_failed);
            match news {
                Ok(First::Event) => return Err(self.migration_failed(OPERATION)),
                Ok(First::Reply) | Err(QmpError::Timeout(_)) => {}
                Err(error) => return Err(self.failed(OPERATION, error)),
            }
            if Instant::now() >= end {
                return Err(self.failed(OPERATION, QmpError::Timeout(SAVE_LIMIT)));
            }
        }
    }

    /// QEMU's words for a migration that failed.
    fn migration_failed(&mut self, operation: &'static str) -> DriverError {
        match self.qmp.call("query-migrate", Value::Null, COMMAND_LIMIT) {
            Ok(answer) => {
                let words = answer["error-desc"].as_str().unwrap_or("QEMU does not say why");
                self.refused(operation, words.to_owned())
            }
            Err(error) => self.failed(operation, error),
        }
    }

    fn migration_completed(
        &mut self,
        mark: Mark,
        limit: Duration,
        operation: &'static str,
    ) -> Result<(), DriverError> {
        let done = |event: &Event| is_migration(event, "completed") || has_failed(event);
        let event = self.qmp.event(mark, limit, done);
        match event {
            Ok(event) if has_failed(&event) => Err(self.migration_failed(operation)),
            Ok(_) => Ok(()),
            Err(error) => Err(self.failed(operation, error)),
        }
    }
}

fn is_migration(event: &Event, status: &str) -> bool {
    event.name == "MIGRATION" && event.text("status") == status
}

fn has_failed(event: &Event) -> bool {
    is_migration(event, "failed") || is_migration(event, "cancelled")
}

impl QemuVm {
    /// Has one of the buffers of outgoing frames hold them, or pass on what it has and all that comes.
    fn buffer(&mut self, id: &str, hold: bool) -> Result<(), DriverError> {
        if self.record.shape.network.is_none() {
            return Ok(());
        }
        let status = if hold { "on" } else { "off" };
        let path = format!("/objects/{id}");
        let arguments = json!({ "path": path, "property": "status", "value": status });
        self.call("qom-set", arguments, "holding what it sends").map(|_| ())
    }
}

impl Vm for QemuVm {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn memory(&self) -> Result<MemoryHandle, DriverError> {
        held::memory(&self.record, &self.process, self.userfaultfd.as_ref())
    }

    fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running)
    }

    fn console_log(&self) -> &Path {
        &self.files.console_log
    }

    fn guest_socket(&self) -> &Path {
        &self.files.guest
    }

    fn finds_disks(&mut self) -> Result<bool, DriverError> {
        disks::admit_to_those_there(&self.record)?;
        disks::are_found(&mut self.qmp, &self.record, COMMAND_LIMIT)
            .map_err(|error| self.failed("asking whether it has found its disks", error))
    }

    fn state_blocks(&mut self) -> Result<Vec<silo::block::BlockRange>, DriverError> {
        let bytes = self.record.shape.memory_bytes;
        let running = self.is_running();
        memory_map::virtqueue_blocks(&mut self.qmp, bytes, running, COMMAND_LIMIT)
            .map_err(|error| self.failed("finding its virtqueues", error))
    }

    fn pause(&mut self, on_stopped: &mut dyn FnMut()) -> Result<(), DriverError> {
        const OPERATION: &str = "pausing it";
        match self.phase {
            Phase::Empty | Phase::Ready(_) => {
                return Err(self.wrong_phase(OPERATION, "running"));
            }
            Phase::Saved(_) => {
                on_stopped();
                return Ok(());
            }
            Phase::Paused | Phase::Running => {}
        }
        self.hurry(Who::Control, Class::First);
        let mark = self.qmp.mark();
        let result = self.qmp.send("stop", Value::Null, None).and_then(|stop| {
            // A processor has to run to notice that it shall stop. Only now, and after those who
            // tell it: before, it would compute at everybody's expense.
            self.hurry(Who::Processors, Class::Second);
            self.qmp.event_or_answer(mark, &stop, PAUSE_LIMIT, |event| event.name == "STOP")?;
            on_stopped();
            self.qmp.answer(&stop, PAUSE_LIMIT)
        });
        self.hurry(Who::Processors, Class::Usual);
        if let Err(error) = result {
            self.hurry(Who::Control, Class::Usual);
            return Err(self.failed(OPERATION, error));
        }
        self.phase = Phase::Paused;
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, DriverError> {
        const OPERATION: &str = "saving its state";
        match &self.phase {
            Phase::Paused => {}
            Phase::Saved(Some(state)) => return Ok(state.clone()),
            Phase::Saved(None) => {
                let detail = "an earlier runner took its state; run it before it is saved again";
                return Err(self.refused(OPERATION, detail.into()));
            }
            _ => return Err(self.wrong_phase(OPERATION, "paused")),
        }
        if self.channel.is_none() {
            self.arm_save()?;
        }
        let SaveChannel { mut ours, passed } = self.channel.take().expect("armed just above");
        let accepted = self.qmp.answer(&passed, COMMAND_LIMIT);
        accepted.map_err(|error| self.failed(OPERATION, error))?;

        let mark = self.qmp.mark();
        let uri = json!({ "uri": format!("fd:{SAVE_NAME}") });
        let migrate = self.qmp.send("migrate", uri, None);
        let migrate = migrate.map_err(|error| self.failed(OPERATION, error))?;
        let state = self.read_state(&mut ours, mark, &migrate)?;
        self.migration_completed(mark, SAVE_LIMIT, OPERATION)?;
        self.phase = Phase::Saved(Some(state.clone()));
        Ok(state)
    }

    fn prepare_load(&mut self) -> Result<(), DriverError> {
        const OPERATION: &str = "getting ready to load";
        match self.phase {
            Phase::Ready(_) => return Ok(()),
            Phase::Empty => {}
            _ => return Err(self.wrong_phase(OPERATION, "started empty")),
        }
        let SaveChannel { ours, passed } = self.pass_socket(LOAD_NAME)?;
        let uri = json!({ "uri": format!("fd:{LOAD_NAME}") });
        let result = self
            .qmp
            .answer(&passed, COMMAND_LIMIT)
            .and_then(|_| self.qmp.call("migrate-incoming", uri, COMMAND_LIMIT));
        result.map_err(|error| self.failed(OPERATION, error))?;
        self.hurry(Who::Control, Class::First);
        ours.set_write_timeout(Some(LOAD_LIMIT))
            .map_err(|error| self.host("setting up the socket for the state", error))?;
        self.phase = Phase::Ready(ours);
        Ok(())
    }

    fn load(&mut self, state: &[u8]) -> Result<(), DriverError> {
        const OPERATION: &str = "loading its state";
        self.prepare_load()?;
        let Phase::Ready(channel) = &mut self.phase else {
            return Err(self.wrong_phase(OPERATION, "started empty"));
        };
        let mark = self.qmp.mark();
        match channel.write_all(state) {
            // QEMU gave up before it had read everything: its own words say more.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(self.host("writing the state", error));
            }
            _ => {}
        }
        // Closing the socket ends the stream, in case it is shorter than QEMU expects.
        self.phase = Phase::Empty;
        self.migration_completed(mark, LOAD_LIMIT, OPERATION)?;
        self.phase = Phase::Paused;
        Ok(())
    }

    fn run(&mut self) -> Result<(), DriverError> {
        const OPERATION: &str = "running it";
        if matches!(self.phase, Phase::Empty | Phase::Ready(_)) {
            return Err(self.wrong_phase(OPERATION, "booted or loaded"));
        }
        let mark = self.qmp.mark();
        // QEMU says RESUME when nothing can fail any more and the processors are about to start;
        // its answer to the command comes up to milliseconds later, and nobody needs it.
        let vhost = self.record.shape.disk_kind == DiskKind::VhostUserBlk;
        let result = self.qmp.send("cont", Value::Null, None).and_then(|cont| {
            let resume = |event: &Event| event.name == "RESUME";
            let first = self.qmp.event_or_answer(mark, &cont, COMMAND_LIMIT, resume)?;
            // Rings of vhost-user disks are started after the one and before the processors.
            if vhost && matches!(first, First::Event) {
                self.qmp.answer(&cont, COMMAND_LIMIT)?;
            }
            Ok(())
        });
        self.hurry(Who::Control, Class::Usual);
        result.map_err(|error| self.failed(OPERATION, error))?;
        self.phase = Phase::Running;
        if self.channel.is_none() { self.arm_save() } else { Ok(()) }
    }

    fn hold_output(&mut self, hold: bool) -> Result<(), DriverError> {
        self.buffer(command::HOLD, hold)
    }

    fn commit_output(&mut self, on: bool) -> Result<(), DriverError> {
        // What leaves the first goes into the second, if that holds: on in this order, off in the other.
        let order =
            if on { [command::SEALED, command::HOLD] } else { [command::HOLD, command::SEALED] };
        order.into_iter().try_for_each(|stage| self.buffer(stage, on))
    }

    fn seal_output(&mut self) -> Result<(), DriverError> {
        // The guest stands still: nothing passes between the two.
        [false, true].into_iter().try_for_each(|hold| self.buffer(command::HOLD, hold))
    }

    fn release_sealed(&mut self) -> Result<(), DriverError> {
        // The stage before it holds all that the guest sends meanwhile.
        [false, true].into_iter().try_for_each(|hold| self.buffer(command::SEALED, hold))
    }

    fn freeze(&mut self) -> Result<(), DriverError> {
        self.halt.freeze()
    }

    fn thaw(&mut self) -> Result<(), DriverError> {
        self.halt.thaw()
    }

    fn fence(&self) -> Arc<dyn Fence> {
        Arc::clone(&self.halt) as Arc<dyn Fence>
    }

    fn events(&mut self) -> Vec<VmEvent> {
        let events = self.qmp.events_since(&mut self.told);
        let disk = |event: &Event| {
            let id = [event.text("qom-path"), event.text("device"), event.text("node-name")];
            let index = id.into_iter().find_map(command::disk_index);
            let name = index.and_then(|index| self.record.shape.disks.get(index));
            name.cloned().unwrap_or_else(|| "unknown".into())
        };
        let told = events.iter().filter_map(|event| match event.name.as_str() {
            "STOP" => Some(VmEvent::Stopped),
            "RESUME" => Some(VmEvent::Resumed),
            "SHUTDOWN" => Some(VmEvent::Ending),
            "BLOCK_IO_ERROR" => Some(VmEvent::DiskError {
                disk: disk(event),
                operation: event.text("operation").to_owned(),
                detail: event.text("reason").to_owned(),
            }),
            _ => None,
        });
        told.collect()
    }

    fn kill(&mut self) -> Result<(), DriverError> {
        if self.exit().is_some() {
            return Ok(());
        }
        self.halt.kill()?;
        if self.process.wait(KILL_LIMIT).is_none() {
            let operation = "killing it";
            return Err(DriverError::Timeout {
                machine: self.machine.clone(),
                operation,
                limit: KILL_LIMIT,
            });
        }
        self.exit();
        Ok(())
    }

    fn exit(&mut self) -> Option<Exit> {
        if let Some(exit) = &self.ended {
            return Some(exit.clone());
        }
        let ended = self.process.ended()?;
        // The reason may still be on its way from the socket to the list of events.
        self.qmp.drained(Duration::from_secs(1));
        let shutdown = self.qmp.newest(|event| event.name == "SHUTDOWN");
        let exit = match shutdown.as_ref().map(|event| event.text("reason")) {
            _ if self.halt.has_killed() => Exit::Shutdown,
            Some("guest-reset" | "guest-panic") => Exit::Reset,
            Some("guest-shutdown" | "host-qmp-quit" | "host-signal" | "host-ui") => Exit::Shutdown,
            _ => Exit::Failed { detail: self.describe(ended) },
        };
        launch::clean_up(&self.record, &self.files);
        self.ended = Some(exit.clone());
        Some(exit)
    }
}
