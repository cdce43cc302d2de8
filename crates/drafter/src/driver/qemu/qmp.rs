//! A client for QMP, QEMU's control protocol: JSON objects, one a line, over a unix socket.
//!
//! A thread reads; it tells events from replies, and matches replies to commands by their ids, so
//! that the late answer to a command that was given up cannot be taken for the answer to the next.
//! Every wait has a deadline. QEMU may be in a guest's hands: what it sends is bounded and never
//! trusted to be well formed.

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Map, Value, json};
use std::{
    collections::{BTreeMap, VecDeque},
    io::{IoSlice, Read},
    net::Shutdown,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Longest line that QEMU may send.
const LONGEST_LINE: usize = 8 << 20;
/// Events kept for those who have not asked yet.
const MOST_EVENTS: usize = 512;
/// A full socket means a hung QEMU: commands are a few hundred bytes.
const WRITE_LIMIT: Duration = Duration::from_secs(2);

/// What went wrong with a command.
#[derive(Debug, thiserror::Error)]
pub(super) enum QmpError {
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("{0}")]
    Refused(String),
    /// The connection ended: QEMU has ended or is about to.
    #[error("the connection to QEMU ended: {0}")]
    Closed(String),
}

/// Something that QEMU says without being asked.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Event {
    /// As in `MIGRATION`.
    pub(super) name: String,
    /// Its data; null if it has none.
    pub(super) data: Value,
}

impl Event {
    /// A text in the event's data.
    pub(super) fn text(&self, key: &str) -> &str {
        self.data.get(key).and_then(Value::as_str).unwrap_or_default()
    }
}

/// A command whose answer has not been taken. Dropped, its answer is thrown away.
pub(super) struct Pending {
    id: u64,
    shared: Arc<Shared>,
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.shared.lock().replies.remove(&self.id);
    }
}

/// A place in the stream of events: what comes after it is new.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mark(u64);

/// What came first.
pub(super) enum First {
    Reply,
    Event,
}

#[derive(Default)]
struct State {
    /// Commands awaiting an answer, and answers awaiting their taker.
    replies: BTreeMap<u64, Option<Result<Value, String>>>,
    events: VecDeque<(u64, Event)>,
    next_event: u64,
    greeted: bool,
    closed: Option<String>,
    reader: Option<u32>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that holds this lock leaves the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready` gives something, the connection ends or the deadline passes.
    fn wait<T>(
        &self,
        limit: Duration,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, QmpError> {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if let Some(found) = ready(&mut state) {
                return Ok(found);
            }
            if let Some(why) = &state.closed {
                return Err(QmpError::Closed(why.clone()));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QmpError::Timeout(limit));
            }
            (state, _) =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes in one line.
    fn accept(&self, line: &[u8]) -> Result<(), String> {
        let message: Map<String, Value> =
            serde_json::from_slice(line).map_err(|error| format!("not a QMP message: {error}"))?;
        let mut state = self.lock();
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            let data = message.get("data").cloned().unwrap_or_default();
            let number = state.next_event;
            state.events.push_back((number, Event { name: name.to_owned(), data }));
            state.next_event += 1;
            if state.events.len() > MOST_EVENTS {
                state.events.pop_front();
            }
        } else if message.contains_key("QMP") {
            state.greeted = true;
        } else {
            let answer = if let Some(error) = message.get("error") {
                let words = error.get("desc").and_then(Value::as_str).unwrap_or("unknown error");
                Err(words.to_owned())
            } else {
                Ok(message.get("return").cloned().unwrap_or_default())
            };
            // An answer without an id is QEMU's complaint about something it could not parse.
            let id = message.get("id").and_then(Value::as_u64);
            if let Some(place) = id.and_then(|id| state.replies.get_mut(&id)) {
                *place = Some(answer);
            }
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn read_all(&self, mut stream: &UnixStream) {
        self.lock().reader = Some(nix::unistd::gettid().as_raw().cast_unsigned());
        let mut line = Vec::new();
        let mut chunk = [0; 16 << 10];
        let why = loop {
            let count = match stream.read(&mut chunk) {
                Ok(0) => break "end of stream".to_owned(),
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => break error.to_string(),
            };
            let mut rest = &chunk[..count];
            let mut broken = None;
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                line.extend_from_slice(&rest[..end]);
                rest = &rest[end + 1..];
                if !line.trim_ascii().is_empty() {
                    broken = self.accept(&line).err();
                }
                line.clear();
                if broken.is_some() {
                    break;
                }
            }
            line.extend_from_slice(rest);
            if let Some(broken) = broken {
                break broken;
            }
            if line.len() > LONGEST_LINE {
                break format!("a line of more than {LONGEST_LINE} bytes");
            }
        };
        // A QEMU that talks nonsense must not hang on a full socket either.
        let _ = stream.shutdown(Shutdown::Both);
        self.lock().closed = Some(why);
        self.changed.notify_all();
    }
}

/// A connection to one QEMU.
pub(super) struct Qmp {
    stream: UnixStream,
    shared: Arc<Shared>,
    next_id: u64,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        // Ends the reading thread.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Qmp {
    /// Connects and negotiates. QEMU talks to one client at a time: while another one is there,
    /// this waits until the limit.
    pub(super) fn connect(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path).map_err(|error| {
            QmpError::Closed(format!("connecting to {}: {error}", path.display()))
        })?;
        Self::new(stream, limit)
    }

    fn new(stream: UnixStream, limit: Duration) -> Result<Self, QmpError> {
        let closed = |error: std::io::Error| QmpError::Closed(error.to_string());
        stream.set_write_timeout(Some(WRITE_LIMIT)).map_err(closed)?;
        let reader = stream.try_clone().map_err(closed)?;
        let shared = Arc::new(Shared::default());
        let for_reader = Arc::clone(&shared);
        thread::Builder::new()
            .name("qmp".into())
            .spawn(move || for_reader.read_all(&reader))
            .map_err(closed)?;
        let mut qmp = Self { stream, shared, next_id: 1 };
        let end = Instant::now() + limit;
        qmp.shared.wait(limit, |state| state.greeted.then_some(()))?;
        let left = end.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
        qmp.call("qmp_capabilities", Value::Null, left)?;
        Ok(qmp)
    }

    /// Sends a command, with a descriptor if it takes one.
    pub(super) fn send(
        &mut self,
        command: &str,
        arguments: Value,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<Pending, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut message = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(b'\n');
        self.shared.lock().replies.insert(id, None);
        let pending = Pending { id, shared: Arc::clone(&self.shared) };

        let numbers = descriptor.map(|d| [d.as_raw_fd()]);
        let mut rest = bytes.as_slice();
        let mut control: Vec<_> = numbers.iter().map(|n| ControlMessage::ScmRights(n)).collect();
        while !rest.is_empty() {
            let iov = [IoSlice::new(rest)];
            let flags = MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(self.stream.as_raw_fd(), &iov, &control, flags, None) {
                Ok(sent) => {
                    rest = &rest[sent..];
                    control.clear();
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => return Err(QmpError::Timeout(WRITE_LIMIT)),
                Err(errno) => return Err(QmpError::Closed(errno.desc().to_owned())),
            }
        }
        Ok(pending)
    }

    /// The answer to a command.
    pub(super) fn answer(&self, pending: &Pending, limit: Duration) -> Result<Value, QmpError> {
        self.shared
            .wait(limit, |state| state.replies.get_mut(&pending.id).and_then(Option::take))?
            .map_err(QmpError::Refused)
    }

    /// Sends a command and waits for its answer.
    pub(super) fn call(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let pending = self.send(command, arguments, None)?;
        self.answer(&pending, limit)
    }

    /// The thread that reads.
    pub(super) fn reader(&self) -> Option<u32> {
        self.shared.lock().reader
    }

    /// Now, in the stream of events.
    pub(super) fn mark(&self) -> Mark {
        Mark(self.shared.lock().next_event)
    }

    /// The first event after `mark` that `wanted` takes.
    pub(super) fn event(
        &self,
        mark: Mark,
        limit: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event, QmpError> {
        self.shared.wait(limit, |state| find(state, mark, &wanted))
    }

    /// Waits for an event after `mark`, or for the answer to a command if that is first. An
    /// answer that is an error is an error; another one is left for [`Qmp::answer`].
    pub(super) fn event_or_answer(
        &self,
        mark: Mark,
        pending: &Pending,
        limit: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<First, QmpError> {
        self.shared.wait(limit, |state| {
            if find(state, mark, &wanted).is_some() {
                return Some(Ok(First::Event));
            }
            match state.replies.get(&pending.id) {
                Some(Some(Ok(_))) => Some(Ok(First::Reply)),
                Some(Some(Err(words))) => Some(Err(QmpError::Refused(words.clone()))),
                _ => None,
            }
        })?
    }

    /// The events since `mark`, which moves to now.
    pub(super) fn events_since(&self, mark: &mut Mark) -> Vec<Event> {
        let state = self.shared.lock();
        let new = state.events.iter().filter(|(number, _)| *number >= mark.0);
        let events = new.map(|(_, event)| event.clone()).collect();
        *mark = Mark(state.next_event);
        events
    }

    /// Waits until the connection has ended and everything in it was read.
    pub(super) fn drained(&self, limit: Duration) {
        let _ = self.shared.wait(limit, |state| state.closed.is_some().then_some(()));
    }

    /// The newest event that `wanted` takes, however old.
    pub(super) fn newest(&self, wanted: impl Fn(&Event) -> bool) -> Option<Event> {
        let state = self.shared.lock();
        state.events.iter().rev().find(|(_, event)| wanted(event)).map(|(_, event)| event.clone())
    }
}

fn find(state: &State, mark: Mark, wanted: &impl Fn(&Event) -> bool) -> Option<Event> {
    let new = state.events.iter().filter(|(number, _)| *number >= mark.0);
    new.map(|(_, event)| event).find(|event| wanted(event)).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};

    const SOON: Duration = Duration::from_secs(10);

    /// A connected client, and the server's end after the negotiation.
    fn connected() -> (Qmp, BufReader<UnixStream>) {
        let (client, server) = UnixStream::pair().unwrap();
        let negotiation = thread::spawn(move || {
            let mut server = BufReader::new(server);
            say(&mut server, r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#);
            assert_eq!(heard(&mut server)["execute"], "qmp_capabilities");
            say(&mut server, r#"{"return": {}, "id": 1}"#);
            server
        });
        let qmp = Qmp::new(client, SOON).unwrap();
        (qmp, negotiation.join().unwrap())
    }

    fn say(server: &mut BufReader<UnixStream>, line: &str) {
        server.get_mut().write_all(format!("{line}\r\n").as_bytes()).unwrap();
    }

    fn heard(server: &mut BufReader<UnixStream>) -> Value {
        let mut line = String::new();
        server.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn a_command_on_the_wire_is_these_bytes() {
        let (mut qmp, mut server) = connected();
        let _a = qmp.send("stop", Value::Null, None).unwrap();
        let _b = qmp.send("getfd", json!({ "fdname": "x" }), None).unwrap();
        let mut text = String::new();
        server.read_line(&mut text).unwrap();
        server.read_line(&mut text).unwrap();
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines[0], json!({ "execute": "stop", "id": 2 }));
        assert_eq!(
            lines[1],
            json!({ "execute": "getfd", "id": 3, "arguments": { "fdname": "x" } })
        );
    }

    #[test]
    fn the_late_answer_to_a_command_that_was_given_up_is_not_taken_for_the_next_ones() {
        let (mut qmp, mut server) = connected();
        let short = Duration::from_millis(20);
        let error = qmp.call("slow", Value::Null, short).unwrap_err();
        assert!(matches!(error, QmpError::Timeout(limit) if limit == short));
        let pending = qmp.send("quick", Value::Null, None).unwrap();
        say(&mut server, r#"{"return": "late", "id": 2}"#);
        say(&mut server, r#"{"return": "right", "id": 3}"#);
        assert_eq!(qmp.answer(&pending, SOON).unwrap(), json!("right"));
        drop(pending);
        assert!(qmp.shared.lock().replies.is_empty(), "nothing piles up");
    }

    #[test]
    fn events_between_command_and_answer_are_kept_in_order_and_found_by_mark() {
        let (mut qmp, mut server) = connected();
        say(&mut server, r#"{"event": "STOP", "timestamp": {}}"#);
        qmp.event(Mark(0), SOON, |e| e.name == "STOP").unwrap();
        let mut mark = qmp.mark();
        let pending = qmp.send("migrate", Value::Null, None).unwrap();
        say(&mut server, r#"{"event": "MIGRATION", "data": {"status": "active"}}"#);
        say(&mut server, r#"{"return": {}, "id": 2}"#);
        say(&mut server, r#"{"event": "MIGRATION", "data": {"status": "completed"}}"#);
        let wanted = |e: &Event| e.text("status") == "completed";
        qmp.event(mark, SOON, wanted).unwrap();
        qmp.answer(&pending, SOON).unwrap();
        let all: Vec<_> =
            qmp.events_since(&mut mark).iter().map(|e| e.text("status").to_owned()).collect();
        assert_eq!(all, ["active", "completed"]);
        assert!(qmp.events_since(&mut mark).is_empty());
        qmp.event(mark, Duration::from_millis(1), |_| true).unwrap_err();
    }

    #[test]
    fn an_error_is_qemus_own_words_whether_an_event_is_waited_for_or_not() {
        let (mut qmp, mut server) = connected();
        let a = qmp.send("x", Value::Null, None).unwrap();
        let b = qmp.send("y", Value::Null, None).unwrap();
        say(&mut server, r#"{"error": {"class": "GenericError", "desc": "No such fd"}, "id": 2}"#);
        say(&mut server, r#"{"error": {"desc": "No"}, "id": 3}"#);
        assert_eq!(qmp.answer(&a, SOON).unwrap_err().to_string(), "No such fd");
        let first = qmp.event_or_answer(qmp.mark(), &b, SOON, |_| true);
        assert!(matches!(first, Err(QmpError::Refused(words)) if words == "No"));
    }

    #[test]
    fn nonsense_or_an_endless_line_ends_the_connection_and_every_wait() {
        for bytes in [&b"{\"event\": \n"[..], &vec![b'x'; LONGEST_LINE + (1 << 20)]] {
            let (mut qmp, mut server) = connected();
            let pending = qmp.send("query-status", Value::Null, None).unwrap();
            // The client may close while we still write.
            let _ = server.get_mut().write_all(bytes);
            assert!(matches!(qmp.answer(&pending, SOON), Err(QmpError::Closed(_))));
        }
    }

    #[test]
    fn no_more_events_are_kept_than_the_bound() {
        let (qmp, mut server) = connected();
        for n in 0..=MOST_EVENTS {
            say(&mut server, &format!(r#"{{"event": "E", "data": {{"status": "{n}"}}}}"#));
        }
        let last = MOST_EVENTS.to_string();
        qmp.event(Mark(0), SOON, |e| e.text("status") == last).unwrap();
        assert_eq!(qmp.shared.lock().events.len(), MOST_EVENTS);
    }
}
