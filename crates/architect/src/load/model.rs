//! What the server must hold, and the judgement of its every answer. No I/O: the client feeds it
//! answers, tests feed it lies.
//!
//! Three kinds of keys, because each catches what the others cannot:
//!
//! | kind | written by | an answer proves |
//! |---|---|---|
//! | counter | `INCR` | every earlier increment was applied exactly once |
//! | value | `SET` of a value that names its key and sequence number | the last write is there, whole, and no older one came back |
//! | log | `APPEND` of numbered records | each record is there once and in order |
//!
//! A key has at most one operation in flight, so after a broken connection exactly two states of
//! it are right: with that operation and without. Anything else is a lost write (an acknowledged
//! one is missing), a doubled one, or a wrong answer (content that nobody wrote).

use super::resp::{Reply, encode};

/// Records in a log before it is emptied and begun again.
const LOG_RECORDS: u64 = 64;
const RECORD: usize = 32;
/// Problems kept as sentences; the counts go on.
const SENTENCES: usize = 16;

/// What was found wrong so far, and how much was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Findings {
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) refused: u64,
    pub(super) lost: u64,
    pub(super) doubled: u64,
    pub(super) wrong: u64,
    pub(super) sentences: Vec<String>,
}

impl Findings {
    pub(super) fn say(&mut self, sentence: String) {
        if self.sentences.len() < SENTENCES {
            self.sentences.push(sentence);
        }
    }
}

/// The reply does not belong to the command: the stream of replies is out of step.
#[derive(Debug, thiserror::Error)]
#[error("key \"{key}\": {operation:?} was answered by {reply}: replies are out of step")]
pub(super) struct OutOfStep {
    key: String,
    operation: Operation,
    reply: String,
}

/// One command on one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// `DEL`
    Clear,
    /// `INCR`
    Increment,
    /// `SET` of the value with this sequence number.
    Write(u64),
    /// `APPEND` of the next record.
    Append,
    /// `SET` of a log to the empty string.
    Empty,
    /// `GET`
    Read,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Counter { value: i64 },
    Value { sequence: u64 },
    Log { first: u64, count: u64, trusted: bool },
}

impl State {
    fn after(self, operation: Operation) -> State {
        match (self, operation) {
            (State::Counter { .. }, Operation::Clear) => State::Counter { value: 0 },
            (State::Counter { value }, Operation::Increment) => {
                State::Counter { value: value.saturating_add(1) }
            }
            (State::Value { .. }, Operation::Clear) => State::Value { sequence: 0 },
            (State::Value { .. }, Operation::Write(sequence)) => State::Value { sequence },
            (State::Log { first, count, .. }, Operation::Clear | Operation::Empty) => {
                State::Log { first: first + count, count: 0, trusted: true }
            }
            (State::Log { first, count, trusted }, Operation::Append) => {
                State::Log { first, count: count + 1, trusted }
            }
            (state, _) => state,
        }
    }
}

struct Key {
    name: String,
    state: State,
    in_flight: Option<Operation>,
    /// An operation whose answer was lost with its connection: it may or may not have happened.
    perhaps: Option<Operation>,
}

/// Keys, what they must hold, and what was found.
pub(super) struct Model {
    keys: Vec<Key>,
    value_bytes: usize,
    random: u64,
    pub(super) findings: Findings,
}

impl Model {
    /// `count` keys whose names begin with `prefix`; values of at least `value_bytes`.
    pub(super) fn new(prefix: &str, count: usize, value_bytes: usize, seed: u64) -> Model {
        let keys = (0..count)
            .map(|index| {
                let (kind, state) = match index % 3 {
                    0 => ("counter", State::Counter { value: 0 }),
                    1 => ("value", State::Value { sequence: 0 }),
                    _ => ("log", State::Log { first: 0, count: 0, trusted: true }),
                };
                let name = format!("{prefix}{kind}:{index}");
                Key { name, state, in_flight: None, perhaps: None }
            })
            .collect();
        Model { keys, value_bytes, random: seed, findings: Findings::default() }
    }

    /// Number of keys.
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// Puts `operation` for key `index` in flight and appends its command to `out`.
    pub(super) fn send(&mut self, index: usize, operation: Operation, out: &mut Vec<u8>) {
        let key = &mut self.keys[index];
        debug_assert!(key.in_flight.is_none(), "one operation per key at a time");
        let name = key.name.as_bytes();
        match operation {
            Operation::Clear => encode(out, &[b"DEL", name]),
            Operation::Increment => encode(out, &[b"INCR", name]),
            Operation::Write(sequence) => {
                encode(out, &[b"SET", name, &value(&key.name, sequence, self.value_bytes)]);
            }
            Operation::Append => {
                let State::Log { first, count, .. } = key.state else {
                    unreachable!("only logs are appended to")
                };
                encode(out, &[b"APPEND", name, &record(&key.name, first + count)]);
            }
            Operation::Empty => encode(out, &[b"SET", name, b""]),
            Operation::Read => encode(out, &[b"GET", name]),
        }
        key.in_flight = Some(operation);
    }

    /// Chooses what to do with key `index` next.
    pub(super) fn choose(&mut self, index: usize) -> Operation {
        let dice = splitmix(&mut self.random);
        match self.keys[index].state {
            State::Counter { .. } if dice.is_multiple_of(8) => Operation::Read,
            State::Counter { .. } => Operation::Increment,
            State::Value { .. } if dice.is_multiple_of(4) => Operation::Read,
            State::Value { sequence } => Operation::Write(sequence + 1),
            State::Log { trusted: false, .. } => Operation::Empty,
            State::Log { count, .. } if count >= LOG_RECORDS => Operation::Empty,
            State::Log { .. } if dice.is_multiple_of(16) => Operation::Read,
            State::Log { .. } => Operation::Append,
        }
    }

    /// Judges the answer to what is in flight for key `index`. True if the server refused it.
    pub(super) fn answer(&mut self, index: usize, reply: &Reply) -> Result<bool, OutOfStep> {
        let key = &mut self.keys[index];
        let operation = key.in_flight.take().expect("an answer follows a command");
        let findings = &mut self.findings;
        if let Reply::Error(words) = reply {
            findings.refused += 1;
            findings.say(format!("key \"{}\": {operation:?} refused: {words}", key.name));
            return Ok(true);
        }
        match operation {
            Operation::Read => findings.reads += 1,
            _ => findings.writes += 1,
        }
        match (operation, key.state, reply) {
            (Operation::Read, _, Reply::Bulk(content)) => {
                judge(key, Some(content), self.value_bytes, findings);
            }
            (Operation::Read, _, Reply::Nil) => judge(key, None, self.value_bytes, findings),
            (Operation::Clear, _, Reply::Integer(_))
            | (Operation::Write(_) | Operation::Empty, _, Reply::Status(_)) => {
                key.state = key.state.after(operation);
            }
            (Operation::Increment, State::Counter { value }, &Reply::Integer(now)) => {
                compare(&key.name, "increment", value.saturating_add(1), now, findings);
                key.state = State::Counter { value: now };
            }
            (Operation::Append, State::Log { first, count, trusted }, &Reply::Integer(length)) => {
                // Rounded up: a part of a record is a record that should not be there.
                let records = length.saturating_add(RECORD as i64 - 1) / RECORD as i64;
                let before = (findings.lost, findings.doubled);
                if trusted {
                    compare(&key.name, "record", count as i64 + 1, records, findings);
                }
                let right = (findings.lost, findings.doubled) == before;
                key.state = State::Log { first, count: count + 1, trusted: trusted && right };
            }
            (operation, _, reply) => {
                return Err(OutOfStep {
                    key: key.name.clone(),
                    operation,
                    reply: format!("{reply:?}").chars().take(80).collect(),
                });
            }
        }
        Ok(false)
    }

    /// The connection is gone: what was in flight may or may not have happened.
    pub(super) fn broken(&mut self) {
        for key in &mut self.keys {
            let lost = key.in_flight.take().filter(|&operation| operation != Operation::Read);
            key.perhaps = lost.or(key.perhaps);
        }
    }
}

/// Counts what a number that should be `expected` says about writes.
fn compare(key: &str, what: &str, expected: i64, found: i64, findings: &mut Findings) {
    // An absurd answer must not make the sums overflow.
    let difference = found.abs_diff(expected).min(u64::from(u32::MAX));
    if found < expected {
        findings.lost += difference;
        findings.say(format!("key \"{key}\": {what} {expected} expected, {found} found: lost"));
    } else if found > expected {
        findings.doubled += difference;
        findings.say(format!("key \"{key}\": {what} {expected} expected, {found} found: doubled"));
    }
}

/// Judges the content of a key and adopts it as the state from here on, so that one fault is
/// counted once.
fn judge(key: &mut Key, content: Option<&Vec<u8>>, value_bytes: usize, findings: &mut Findings) {
    let perhaps = key.perhaps.take();
    let candidates = [Some(key.state), perhaps.map(|operation| key.state.after(operation))];
    let content = content.map_or(&[][..], Vec::as_slice);
    for candidate in candidates.into_iter().flatten() {
        if content_of(&key.name, candidate, value_bytes) == content {
            key.state = candidate;
            return;
        }
    }
    let name = &key.name;
    match key.state {
        State::Counter { value } => {
            let text =
                if content.is_empty() { "0".into() } else { String::from_utf8_lossy(content) };
            match text.parse::<i64>() {
                Ok(found) => {
                    // A number beyond what is perhaps applied is doubled from there on.
                    let may = i64::from(perhaps == Some(Operation::Increment));
                    let highest = value.saturating_add(may);
                    let expected = if found > highest { highest } else { value };
                    compare(name, "counter", expected, found, findings);
                    key.state = State::Counter { value: found };
                }
                Err(_) => wrong(name, content, findings),
            }
        }
        State::Value { sequence } => match sequence_of(name, content, value_bytes) {
            Some(found) if found < sequence => {
                findings.lost += 1;
                findings.say(format!("key \"{name}\": write {sequence} is gone, {found} is back"));
                key.state = State::Value { sequence: found };
            }
            _ => wrong(name, content, findings),
        },
        State::Log { trusted: false, .. } => {}
        State::Log { first, count, .. } => {
            let perhaps = u64::from(perhaps == Some(Operation::Append));
            let (missing, doubled, garbled) = audit(name, first, count, perhaps, content);
            findings.lost += missing;
            findings.doubled += doubled;
            findings.wrong += garbled;
            findings.say(format!(
                "key \"{name}\": of {count} records {missing} are lost, {doubled} are doubled or \
                 unknown, {garbled} are garbled"
            ));
            key.state = State::Log { first, count, trusted: false };
        }
    }
}

fn wrong(key: &str, content: &[u8], findings: &mut Findings) {
    findings.wrong += 1;
    let start = String::from_utf8_lossy(&content[..content.len().min(48)]).into_owned();
    findings.say(format!("key \"{key}\": holds what nobody wrote: {start:?}"));
}

/// Exactly what the server must return for a key in `state`; an absent key reads as empty.
fn content_of(key: &str, state: State, value_bytes: usize) -> Vec<u8> {
    match state {
        State::Counter { value: 0 } | State::Value { sequence: 0 } => Vec::new(),
        State::Counter { value } => value.to_string().into_bytes(),
        State::Value { sequence } => value(key, sequence, value_bytes),
        State::Log { first, count, .. } => {
            (first..first + count).flat_map(|index| record(key, index)).collect()
        }
    }
}

/// A value that says which key and which write it is: `key|sequence|` and bytes derived from both.
fn value(key: &str, sequence: u64, value_bytes: usize) -> Vec<u8> {
    let mut out = format!("{key}|{sequence}|").into_bytes();
    let mut random = seed(key, sequence);
    loop {
        out.extend_from_slice(format!("{:016x}", splitmix(&mut random)).as_bytes());
        if out.len() >= value_bytes {
            return out;
        }
    }
}

/// The sequence number of an undamaged value of `key`; 0 for an absent one.
fn sequence_of(key: &str, content: &[u8], value_bytes: usize) -> Option<u64> {
    if content.is_empty() {
        return Some(0);
    }
    let text = std::str::from_utf8(content).ok()?;
    let sequence = text.strip_prefix(key)?.strip_prefix('|')?.split('|').next()?.parse().ok()?;
    (value(key, sequence, value_bytes) == content).then_some(sequence)
}

/// 16 hex digits of index, 15 of check, newline.
fn record(key: &str, index: u64) -> [u8; RECORD] {
    let check = splitmix(&mut seed(key, index)) >> 4;
    let mut out = [b'\n'; RECORD];
    out[..RECORD - 1].copy_from_slice(format!("{index:016x}{check:015x}").as_bytes());
    out
}

/// Counts records of a log that are missing, there twice (or not yet written), or garbled; `perhaps`
/// more records than `count` may be there.
fn audit(key: &str, first: u64, count: u64, perhaps: u64, content: &[u8]) -> (u64, u64, u64) {
    let mut seen = vec![0u64; (count + perhaps) as usize];
    let (mut beyond, mut garbled) = (0, 0);
    for piece in content.chunks(RECORD) {
        let index = std::str::from_utf8(&piece[..piece.len().min(16)])
            .ok()
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .filter(|&index| record(key, index) == piece);
        match index {
            Some(index) if (first..first + count + perhaps).contains(&index) => {
                seen[(index - first) as usize] += 1;
            }
            Some(_) => beyond += 1,
            None => garbled += 1,
        }
    }
    let missing = seen[..count as usize].iter().filter(|&&times| times == 0).count() as u64;
    let doubled = seen.iter().map(|times| times.saturating_sub(1)).sum::<u64>();
    (missing, doubled + beyond, garbled)
}

fn seed(key: &str, number: u64) -> u64 {
    key.bytes().fold(number ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
