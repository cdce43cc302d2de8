//! The messages of the control and demand connections as frames: one kind each, everything in the
//! payload. Kinds from 32 are said by the source, from 64 by the destination.

use super::{
    Frame, FrameWriter, Header, WireError,
    bytes::{Put, Take},
};
use silo_block::{
    block::{BlockIndex, BlockRange},
    device::DeviceName,
    geometry::Geometry,
    hash::RootHash,
    order::Class,
    rounds::Epoch,
    session::messages::{
        BlockHash, Custom, DeviceIndex, DeviceInfo, Held, LastRound, MAX_CUSTOM, MAX_DEVICES,
        MAX_PROMISES, MAX_RANGES, MAX_STATE, MAX_TERMS, MAX_TEXT, MAX_TOKEN_RANGES, Reason,
        SessionId, Term, ToDestination, ToSource, Token, Wait,
    },
};
use std::{
    io::{self, Write},
    time::Duration,
};

mod kind {
    pub(super) const HELLO: u8 = 32;
    pub(super) const GROUP: u8 = 33;
    pub(super) const ROUND: u8 = 34;
    pub(super) const PROMISE: u8 = 35;
    pub(super) const EXPECT: u8 = 36;
    pub(super) const TOKEN: u8 = 37;
    pub(super) const CUSTOM: u8 = 38;
    pub(super) const CUSTOM_DONE: u8 = 39;
    pub(super) const RELEASED: u8 = 40;
    pub(super) const ABORT: u8 = 41;
    pub(super) const ALIVE: u8 = 42;
    pub(super) const KEPT: u8 = 43;

    pub(super) const BACK_HELLO: u8 = 64;
    pub(super) const MISSING: u8 = 65;
    pub(super) const HAVE: u8 = 66;
    pub(super) const APPLIED: u8 = 67;
    pub(super) const RECEIPT: u8 = 68;
    pub(super) const NEED: u8 = 69;
    pub(super) const DONT_NEED: u8 = 70;
    pub(super) const RUNNING: u8 = 71;
    pub(super) const REFUSED: u8 = 72;
    pub(super) const DURABLE: u8 = 73;
    pub(super) const BACK_CUSTOM: u8 = 74;
    pub(super) const BACK_CUSTOM_DONE: u8 = 75;
    pub(super) const BACK_ABORT: u8 = 76;
    pub(super) const BACK_ALIVE: u8 = 77;
}

/// Flushes in flight of one device at most.
const MAX_FLUSHES: usize = 4096;
/// Bytes of a range.
const RANGE: usize = 8;

/// Sends a message of the source.
///
/// # Errors
/// Those of the stream.
pub fn write_to_destination<W: Write>(
    to: &mut FrameWriter<W>,
    message: &ToDestination,
) -> io::Result<()> {
    let mut put = Put::default();
    let kind = put_to_destination(&mut put, message);
    to.write(Header { kind, class: 0, device: 0, a: 0, b: 0 }, &[&put.0])
}

/// Sends a message of the destination.
///
/// # Errors
/// Those of the stream.
pub fn write_to_source<W: Write>(to: &mut FrameWriter<W>, message: &ToSource) -> io::Result<()> {
    let mut put = Put::default();
    let kind = put_to_source(&mut put, message);
    to.write(Header { kind, class: 0, device: 0, a: 0, b: 0 }, &[&put.0])
}

/// Reads a message of the source; none for a kind that this version does not know.
///
/// # Errors
/// A message that breaks a rule of the format.
pub fn read_to_destination(frame: &Frame<'_>) -> Result<Option<ToDestination>, WireError> {
    let mut take = Take(frame.payload);
    let message = take_to_destination(&mut take, frame.header.kind)?;
    if message.is_some() {
        take.end()?;
    }
    Ok(message)
}

/// Reads a message of the destination; none for a kind that this version does not know.
///
/// # Errors
/// A message that breaks a rule of the format.
pub fn read_to_source(frame: &Frame<'_>) -> Result<Option<ToSource>, WireError> {
    let mut take = Take(frame.payload);
    let message = take_to_source(&mut take, frame.header.kind)?;
    if message.is_some() {
        take.end()?;
    }
    Ok(message)
}

fn put_to_destination(put: &mut Put, message: &ToDestination) -> u8 {
    match message {
        ToDestination::Hello { version, session } => {
            put_hello(put, *version, session);
            kind::HELLO
        }
        ToDestination::Group(devices) => {
            put.list(devices, put_info);
            kind::GROUP
        }
        ToDestination::Round { device, epoch, blocks, last } => {
            put.u16(device.0);
            put.u32(epoch.0);
            put.u8(u8::from(*last));
            put_ranges(put, blocks);
            kind::ROUND
        }
        ToDestination::Promise { device, epoch, blocks } => {
            put.u16(device.0);
            put.u32(epoch.0);
            put.list(blocks, |put, (block, hash)| {
                put.u32(block.0 as u32);
                put.raw(&hash.0);
            });
            kind::PROMISE
        }
        ToDestination::Expect { device, order } => {
            put.u16(device.0);
            put_ranges(put, order);
            kind::EXPECT
        }
        ToDestination::Kept { device, epoch, blocks } => {
            put.u16(device.0);
            put.u32(epoch.0);
            put_ranges(put, blocks);
            kind::KEPT
        }
        ToDestination::Token { attempt, devices, state } => {
            put.u32(*attempt);
            put.list(devices, |put, last| {
                put.u32(last.epoch.0);
                put_ranges(put, &last.blocks);
                put.list(&last.flushes, |put, number| put.u64(*number));
            });
            put.bytes(state);
            kind::TOKEN
        }
        ToDestination::Custom(custom) => {
            put_custom(put, custom);
            kind::CUSTOM
        }
        ToDestination::CustomDone { serial } => {
            put.u32(*serial);
            kind::CUSTOM_DONE
        }
        ToDestination::Released => kind::RELEASED,
        ToDestination::Abort(reason) => {
            put_reason(put, reason);
            kind::ABORT
        }
        ToDestination::Alive => kind::ALIVE,
    }
}

fn take_to_destination(take: &mut Take<'_>, kind: u8) -> Result<Option<ToDestination>, WireError> {
    Ok(Some(match kind {
        kind::HELLO => {
            let (version, session) = take_hello(take)?;
            ToDestination::Hello { version, session }
        }
        kind::GROUP => ToDestination::Group(take.list(MAX_DEVICES, 22, take_info)?),
        kind::ROUND => {
            let (device, epoch, last) =
                (DeviceIndex(take.u16()?), Epoch(take.u32()?), take.flag()?);
            ToDestination::Round { device, epoch, blocks: take_ranges(take, MAX_RANGES)?, last }
        }
        kind::PROMISE => {
            let (device, epoch) = (DeviceIndex(take.u16()?), Epoch(take.u32()?));
            let blocks = take.list(MAX_PROMISES, 36, |take| {
                Ok((BlockIndex(u64::from(take.u32()?)), BlockHash(take.hash()?)))
            })?;
            ToDestination::Promise { device, epoch, blocks }
        }
        kind::EXPECT => {
            let device = DeviceIndex(take.u16()?);
            ToDestination::Expect { device, order: take_ranges(take, MAX_RANGES)? }
        }
        kind::KEPT => {
            let (device, epoch) = (DeviceIndex(take.u16()?), Epoch(take.u32()?));
            ToDestination::Kept { device, epoch, blocks: take_ranges(take, MAX_RANGES)? }
        }
        kind::TOKEN => {
            let attempt = take.u32()?;
            let devices = take.list(MAX_DEVICES, 12, |take| {
                let epoch = Epoch(take.u32()?);
                let blocks = take_ranges(take, MAX_TOKEN_RANGES)?;
                let flushes = take.list(MAX_FLUSHES, 8, Take::u64)?;
                Ok(LastRound { epoch, blocks, flushes })
            })?;
            if devices.iter().map(|last| last.blocks.len()).sum::<usize>() > MAX_TOKEN_RANGES {
                return Err(WireError::Invalid("a token with too long lists".to_owned()));
            }
            ToDestination::Token { attempt, devices, state: take.bytes(MAX_STATE)?.to_vec() }
        }
        kind::CUSTOM => ToDestination::Custom(take_custom(take)?),
        kind::CUSTOM_DONE => ToDestination::CustomDone { serial: take.u32()? },
        kind::RELEASED => ToDestination::Released,
        kind::ABORT => ToDestination::Abort(take_reason(take)?),
        kind::ALIVE => ToDestination::Alive,
        _ => return Ok(None),
    }))
}

fn put_to_source(put: &mut Put, message: &ToSource) -> u8 {
    match message {
        ToSource::Hello { version, session } => {
            put_hello(put, *version, session);
            kind::BACK_HELLO
        }
        ToSource::Missing { device, blocks } => {
            put.u16(device.0);
            put_ranges(put, blocks);
            kind::MISSING
        }
        ToSource::Have { devices, token } => {
            put.list(devices, |put, held| {
                put.u32(held.clock.0);
                put_ranges(put, &held.missing);
            });
            let (state, attempt) = match token {
                Token::Awaited => (0, 0),
                Token::Taken(attempt) => (1, *attempt),
                Token::Runs(attempt) => (2, *attempt),
            };
            put.u8(state);
            put.u32(attempt);
            kind::HAVE
        }
        ToSource::Applied { device, epoch } => {
            put.u16(device.0);
            put.u32(epoch.0);
            kind::APPLIED
        }
        ToSource::Receipt { device, range, epoch, retry } => {
            put.u16(device.0);
            put_range(put, range);
            put.u32(epoch.0);
            put_ranges(put, retry);
            kind::RECEIPT
        }
        ToSource::Need { device, range, class } => {
            put.u16(device.0);
            put_range(put, range);
            put.u8(class_number(*class));
            kind::NEED
        }
        ToSource::DontNeed { device, range, epoch } => {
            put.u16(device.0);
            put_range(put, range);
            put.u32(epoch.0);
            kind::DONT_NEED
        }
        ToSource::Running { attempt } => {
            put.u32(*attempt);
            kind::RUNNING
        }
        ToSource::Refused { attempt, reason } => {
            put.u32(*attempt);
            put_reason(put, reason);
            kind::REFUSED
        }
        ToSource::Durable { epochs } => {
            put.list(epochs, |put, epoch| put.u32(epoch.0));
            kind::DURABLE
        }
        ToSource::Custom(custom) => {
            put_custom(put, custom);
            kind::BACK_CUSTOM
        }
        ToSource::CustomDone { serial } => {
            put.u32(*serial);
            kind::BACK_CUSTOM_DONE
        }
        ToSource::Abort(reason) => {
            put_reason(put, reason);
            kind::BACK_ABORT
        }
        ToSource::Alive => kind::BACK_ALIVE,
    }
}

fn take_to_source(take: &mut Take<'_>, kind: u8) -> Result<Option<ToSource>, WireError> {
    Ok(Some(match kind {
        kind::BACK_HELLO => {
            let (version, session) = take_hello(take)?;
            ToSource::Hello { version, session }
        }
        kind::MISSING => {
            let device = DeviceIndex(take.u16()?);
            ToSource::Missing { device, blocks: take_ranges(take, MAX_RANGES)? }
        }
        kind::HAVE => {
            let devices = take.list(MAX_DEVICES, 8, |take| {
                let clock = Epoch(take.u32()?);
                Ok(Held { clock, missing: take_ranges(take, MAX_RANGES)? })
            })?;
            let token = match (take.u8()?, take.u32()?) {
                (0, _) => Token::Awaited,
                (1, attempt) => Token::Taken(attempt),
                (2, attempt) => Token::Runs(attempt),
                (other, _) => return Err(WireError::Invalid(format!("state {other} of a token"))),
            };
            ToSource::Have { devices, token }
        }
        kind::APPLIED => {
            ToSource::Applied { device: DeviceIndex(take.u16()?), epoch: Epoch(take.u32()?) }
        }
        kind::RECEIPT => {
            let (device, range) = (DeviceIndex(take.u16()?), take_range(take)?);
            let epoch = Epoch(take.u32()?);
            ToSource::Receipt { device, range, epoch, retry: take_ranges(take, MAX_RANGES)? }
        }
        kind::NEED => {
            let (device, range) = (DeviceIndex(take.u16()?), take_range(take)?);
            ToSource::Need { device, range, class: class_of(take.u8()?)? }
        }
        kind::DONT_NEED => {
            let (device, range) = (DeviceIndex(take.u16()?), take_range(take)?);
            ToSource::DontNeed { device, range, epoch: Epoch(take.u32()?) }
        }
        kind::RUNNING => ToSource::Running { attempt: take.u32()? },
        kind::REFUSED => {
            let attempt = take.u32()?;
            ToSource::Refused { attempt, reason: take_reason(take)? }
        }
        kind::DURABLE => {
            ToSource::Durable { epochs: take.list(MAX_DEVICES, 4, |take| take.u32().map(Epoch))? }
        }
        kind::BACK_CUSTOM => ToSource::Custom(take_custom(take)?),
        kind::BACK_CUSTOM_DONE => ToSource::CustomDone { serial: take.u32()? },
        kind::BACK_ABORT => ToSource::Abort(take_reason(take)?),
        kind::BACK_ALIVE => ToSource::Alive,
        _ => return Ok(None),
    }))
}

fn put_hello(put: &mut Put, version: u16, session: &SessionId) {
    put.u16(version);
    put.raw(&session.0);
}

fn take_hello(take: &mut Take<'_>) -> Result<(u16, SessionId), WireError> {
    Ok((take.u16()?, SessionId(take.id()?)))
}

fn put_info(put: &mut Put, info: &DeviceInfo) {
    put.bytes(info.name.as_str().as_bytes());
    put.u64(info.geometry.bytes());
    put.u32(info.geometry.block() as u32);
    put.u8(u8::from(info.base.is_some()));
    info.base.iter().for_each(|root| put.raw(root.as_bytes()));
    put.list(&info.history, |put, term| {
        put.raw(&term.id.0);
        put.u32(term.first.0);
    });
    put.u32(info.clock.0);
}

fn take_info(take: &mut Take<'_>) -> Result<DeviceInfo, WireError> {
    let invalid = |text: String| WireError::Invalid(text);
    let name = std::str::from_utf8(take.bytes(64)?).ok().and_then(DeviceName::new);
    let name = name.ok_or_else(|| invalid("a device with an invalid name".to_owned()))?;
    let (bytes, block) = (take.u64()?, take.u32()?);
    let geometry = Geometry::new(bytes, block).map_err(|error| invalid(error.to_string()))?;
    let base = if take.flag()? { Some(RootHash::from(take.hash()?)) } else { None };
    let history = take.list(MAX_TERMS, 20, |take| {
        Ok(Term { id: SessionId(take.id()?), first: Epoch(take.u32()?) })
    })?;
    Ok(DeviceInfo { name, geometry, base, history, clock: Epoch(take.u32()?) })
}

fn put_range(put: &mut Put, range: &BlockRange) {
    put.u32(range.start.0 as u32);
    put.u32(range.count as u32);
}

fn take_range(take: &mut Take<'_>) -> Result<BlockRange, WireError> {
    let (start, count) = (take.u32()?, take.u32()?);
    if count == 0 || start.checked_add(count).is_none() {
        return Err(WireError::Invalid(format!("a range of {count} blocks from {start}")));
    }
    Ok(BlockRange::new(u64::from(start), u64::from(count)))
}

fn put_ranges(put: &mut Put, ranges: &[BlockRange]) {
    put.list(ranges, put_range);
}

fn take_ranges(take: &mut Take<'_>, most: usize) -> Result<Vec<BlockRange>, WireError> {
    take.list(most, RANGE, take_range)
}

fn put_custom(put: &mut Put, custom: &Custom) {
    put.u32(custom.serial);
    put.u32(custom.kind);
    put.bytes(&custom.payload);
}

fn take_custom(take: &mut Take<'_>) -> Result<Custom, WireError> {
    let (serial, kind) = (take.u32()?, take.u32()?);
    Ok(Custom { serial, kind, payload: take.bytes(MAX_CUSTOM)?.to_vec() })
}

/// A class as a byte of a header.
pub(super) fn class_number(class: Class) -> u8 {
    match class {
        Class::Demand => 0,
        Class::Prefetch => 1,
        Class::Dirty => 2,
        Class::Bulk => 3,
    }
}

/// The class that a byte means.
pub(super) fn class_of(number: u8) -> Result<Class, WireError> {
    let class = Class::ALL.into_iter().find(|class| class_number(*class) == number);
    class.ok_or_else(|| WireError::Invalid(format!("class {number}")))
}

const WAITS: [Wait; 8] = [
    Wait::Connection,
    Wait::Handshake,
    Wait::Applied,
    Wait::Round,
    Wait::Quiesce,
    Wait::Running,
    Wait::Blocks,
    Wait::Durable,
];

fn put_reason(put: &mut Put, reason: &Reason) {
    match reason {
        Reason::Version { ours, theirs } => {
            put.u8(0);
            put.u16(*ours);
            put.u16(*theirs);
        }
        Reason::UnknownSession(session) => {
            put.u8(1);
            put.raw(&session.0);
        }
        Reason::Group { device, what } => {
            put.u8(2);
            put.text(device, MAX_TEXT);
            put.text(what, MAX_TEXT);
        }
        Reason::Read { device, range, what } => {
            put.u8(3);
            put_failure(put, *device, range, what);
        }
        Reason::Store { device, range, what } => {
            put.u8(4);
            put_failure(put, *device, range, what);
        }
        Reason::Deadline { what, after } => {
            put.u8(5);
            put.u8(WAITS.iter().position(|wait| wait == what).unwrap_or(0) as u8);
            put.u64(u64::try_from(after.as_nanos()).unwrap_or(u64::MAX));
        }
        Reason::Outpaced { round, left } => {
            put.u8(6);
            put.u32(*round);
            put.u64(*left);
        }
        Reason::Cancelled(text) => {
            put.u8(7);
            put.text(text, MAX_TEXT);
        }
        Reason::Lost { device, kept } => {
            put.u8(8);
            put.u16(device.0);
            put.u32(kept.0);
        }
        Reason::Protocol(text) => {
            put.u8(9);
            put.text(text, MAX_TEXT);
        }
    }
}

fn put_failure(put: &mut Put, device: DeviceIndex, range: &BlockRange, what: &str) {
    put.u16(device.0);
    put_range(put, range);
    put.text(what, MAX_TEXT);
}

fn take_reason(take: &mut Take<'_>) -> Result<Reason, WireError> {
    Ok(match take.u8()? {
        0 => Reason::Version { ours: take.u16()?, theirs: take.u16()? },
        1 => Reason::UnknownSession(SessionId(take.id()?)),
        2 => Reason::Group { device: take.text(MAX_TEXT)?, what: take.text(MAX_TEXT)? },
        tag @ (3 | 4) => {
            let (device, range) = (DeviceIndex(take.u16()?), take_range(take)?);
            let what = take.text(MAX_TEXT)?;
            if tag == 3 {
                Reason::Read { device, range, what }
            } else {
                Reason::Store { device, range, what }
            }
        }
        5 => {
            let number = take.u8()?;
            let what = WAITS.get(usize::from(number)).copied();
            let what = what.ok_or_else(|| WireError::Invalid(format!("wait {number}")))?;
            Reason::Deadline { what, after: Duration::from_nanos(take.u64()?) }
        }
        6 => Reason::Outpaced { round: take.u32()?, left: take.u64()? },
        7 => Reason::Cancelled(take.text(MAX_TEXT)?),
        8 => Reason::Lost { device: DeviceIndex(take.u16()?), kept: Epoch(take.u32()?) },
        9 => Reason::Protocol(take.text(MAX_TEXT)?),
        other => return Err(WireError::Invalid(format!("reason {other}"))),
    })
}

/// For fuzzing: the first byte is the kind; what is read is written back the same.
pub fn fuzz_to_destination(bytes: &[u8]) {
    let Some((kind, mut payload)) = bytes.split_first().map(|(k, p)| (*k, Take(p))) else { return };
    if let Ok(Some(message)) = take_to_destination(&mut payload, kind) {
        let mut put = Put::default();
        assert_eq!(put_to_destination(&mut put, &message), kind);
        let again = take_to_destination(&mut Take(&put.0), kind);
        assert!(again.is_ok_and(|again| again.as_ref() == Some(&message)), "{message:?}");
    }
}

/// For fuzzing: the first byte is the kind; what is read is written back the same.
pub fn fuzz_to_source(bytes: &[u8]) {
    let Some((kind, mut payload)) = bytes.split_first().map(|(k, p)| (*k, Take(p))) else { return };
    if let Ok(Some(message)) = take_to_source(&mut payload, kind) {
        let mut put = Put::default();
        assert_eq!(put_to_source(&mut put, &message), kind);
        let again = take_to_source(&mut Take(&put.0), kind);
        assert!(again.is_ok_and(|again| again.as_ref() == Some(&message)), "{message:?}");
    }
}
