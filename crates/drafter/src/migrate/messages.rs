//! What the two ends tell each other in JSON payloads. Fields may be added; unknown ones are
//! ignored, missing ones have defaults where an older peer may lack them.

use super::switchover::Token;
use crate::{
    driver::{HostFacts, MachineShape},
    lease::{
        AttemptId, BeatName, BeatRef, Epoch, HandingTo, HostName, MachineName, Nonce, OfferSerial,
        Record,
    },
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Identifies the frozen content that a machine left on a host when it moved away. A machine that
/// comes back sends only what changed since, if both ends name the same stay.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StayId {
    /// Epoch of the authority that took over from that stay.
    pub epoch: u64,
    /// The session that moved the machine, hex: an epoch number alone could repeat after a lost
    /// lease store.
    pub session: String,
}

/// How to move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Everything is sent before the switchover; fails if the guest writes faster than the link.
    PreCopy,
    /// Nothing is sent before the switchover; blocks follow on demand and in bulk.
    PostCopy,
    /// A few rounds, then the switchover; what is still dirty follows.
    #[default]
    Hybrid,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::PreCopy => "pre-copy",
            Self::PostCopy => "post-copy",
            Self::Hybrid => "hybrid",
        })
    }
}

/// A device of the group, in the order of its number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceDescription {
    /// Name in the group.
    pub name: String,
    /// Size in blocks.
    pub blocks: u64,
    /// BLAKE3 root of the read-only base under a disk, hex.
    pub base: Option<String>,
}

/// The source's request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareRequest {
    /// Number of this attempt, unique among the machine's attempts (it is in the lease).
    pub attempt: u64,
    /// The machine.
    pub shape: MachineShape,
    /// Identity of its package, hex.
    pub package: String,
    /// Package name, for messages.
    pub package_name: String,
    /// The device group.
    pub devices: Vec<DeviceDescription>,
    /// The network, if any.
    pub network: Option<conduit::MachineNet>,
    /// Name of the source host.
    pub host: String,
    /// What the source runs on.
    pub facts: HostFacts,
    /// The source's boot id: equal on both ends means one clock, and exact blackouts.
    pub boot_id: String,
    /// Epoch of the source's authority.
    pub epoch: u64,
    /// The stay since which the source knows what changed.
    pub since: Option<StayId>,
    /// Only check.
    pub dry_run: bool,
    /// After the token the source connects again if a connection breaks.
    #[serde(default)]
    pub resumes: bool,
    /// How long the machine may stand still, milliseconds, as far as is known before the first round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_blackout_ms: Option<u64>,
    /// Of a machine that survives the loss of its host: what must be so at the destination too. Its
    /// lease is then bound to the destination's sign of life from the switchover on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protected: Option<Protected>,
    /// The source names its blocks if the destination compares ([`names`](super::names)).
    #[serde(default)]
    pub names: bool,
    /// A history of which the destination may bring the newest generation, if it was given the store:
    /// blocks that are still the same then need not be sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_as: Option<StoredAs>,
    /// Everything else about the machine that must go on at the destination.
    pub machine: serde_json::Value,
}

/// A history that a destination may bring a machine's newest generation of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredAs {
    /// `tenant/line`.
    pub line: String,
    /// How long whoever moves the machine would wait for it, milliseconds; the destination's own limit may
    /// be shorter.
    pub within_ms: u64,
}

impl StoredAs {
    /// A history, for which a move waits at most this long.
    #[must_use]
    pub fn within(line: String, limit: std::time::Duration) -> Self {
        Self { line, within_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX) }
    }
}

/// How a machine is protected that moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protected {
    /// What it sends waits for the generation that it is of.
    pub output_commit: bool,
}

/// Where the history of a protected machine is when it has left its source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupMark {
    /// The history, `tenant/line`. Its store has an address of its own on each host.
    pub line: String,
    /// The last generation that the source knows to be durable.
    pub number: u64,
    /// The writer that stored it, hex.
    pub writer: String,
    /// What the machine's last start from a store touched first, as a generation's description has it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub first_touch: BTreeMap<String, String>,
}

/// The destination's answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Reasons against; empty means ready.
    pub refusals: Vec<String>,
    /// Name of the destination host.
    pub host: String,
    /// Its boot id.
    pub boot_id: String,
    /// It still holds the stay that the source named: only changes need to be sent.
    pub holds_stay: bool,
    /// Where frames for the machine go there.
    pub endpoint: Option<conduit::HostEndpoint>,
    /// How long building everything took there, milliseconds.
    pub prepared_ms: u64,
    /// It answers a source that connects again, and its pings on the fault connection.
    #[serde(default)]
    pub resumes: bool,
    /// It has content that may be the machine's, and compares it with names.
    #[serde(default)]
    pub compares: bool,
}

/// A source that connects again: which move goes on. Who asks is proved by the connection (mutual
/// TLS); the session is 128 random bits that only the two ends of the move have seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeRequest {
    /// The machine.
    pub machine: String,
    /// Name of the source host.
    pub host: String,
    /// The attempt that moved it.
    pub attempt: u64,
    /// The session that moved it, hex.
    pub session: String,
    /// Drawn at random by each runner that serves the move.
    pub life: u64,
    /// Counts that runner's connections, from 1.
    pub serial: u32,
}

/// How a move stands at its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// The machine runs there and lacks blocks.
    Missing,
    /// Everything is durable there.
    Durable,
    /// It will never run there by this attempt.
    Refused,
    /// Nothing is known there of this move, or the asker is not its source.
    Unknown,
}

/// The answer to a source that connects again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeAnswer {
    /// How it stands.
    pub standing: Standing,
    /// For people.
    #[serde(default)]
    pub reason: String,
    /// What was confirmed, if it was.
    #[serde(default)]
    pub confirmation: Option<Confirmation>,
    /// What was released, if it was.
    #[serde(default)]
    pub durable: Option<DurableReport>,
}

impl ResumeAnswer {
    /// An answer without reports.
    #[must_use]
    pub fn of(standing: Standing, reason: impl Into<String>) -> Self {
        Self { standing, reason: reason.into(), confirmation: None, durable: None }
    }
}

/// What goes with the device state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenMeta {
    /// The offer that this token names.
    pub attempt: u64,
    /// See `attempt`.
    pub serial: u64,
    /// The lease as the source wrote it.
    pub handed: LeaseMessage,
    /// A FLUSH was answered early at the source: frames stay held until `SourceDurable`.
    pub flush_owed: bool,
    /// Size of the device state before zstd, bytes.
    pub state_bytes: u64,
}

/// The destination runs and owns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confirmation {
    /// The new epoch.
    pub epoch: u64,
    /// Microseconds from the token's arrival to all blocks armed.
    pub armed_us: u64,
    /// … to the state loaded.
    pub loaded_us: u64,
    /// … to the machine running.
    pub running_us: u64,
    /// … to the lease taken and frames released.
    pub released_us: u64,
    /// CLOCK_MONOTONIC at running, nanoseconds; means something on the same host only. 0: not known.
    pub running_at_ns: u64,
    /// Faults before the machine ran: must be 0.
    pub early_faults: u64,
}

/// Every block is durable at the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DurableReport {
    /// The destination's epoch.
    pub epoch: u64,
    /// Memory faults since the machine ran there.
    pub faults: silo::memory::FaultSummary,
}

/// A lease record on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseMessage {
    machine: String,
    epoch: u64,
    owner: String,
    handing_to: Option<(u64, String)>,
    attempt: u64,
    /// The owner's beat and its life, of a protected machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    beat: Option<(String, u64)>,
    nonce: String,
}

impl From<&Record> for LeaseMessage {
    fn from(record: &Record) -> Self {
        Self {
            machine: record.machine.as_str().to_owned(),
            epoch: record.epoch.0,
            owner: record.owner.as_str().to_owned(),
            handing_to: record
                .handing_to
                .as_ref()
                .map(|handing| (handing.attempt.0, handing.to.as_str().to_owned())),
            attempt: record.attempt.0,
            beat: record.beat.as_ref().map(|of| (of.name.to_string(), of.incarnation)),
            nonce: format!("{:032x}", record.nonce.0),
        }
    }
}

impl LeaseMessage {
    /// The record, if every name and number in it is valid.
    pub fn record(&self) -> Result<Record, String> {
        let host = |name: &str| HostName::new(name).map_err(|e| e.to_string());
        let handing_to = match &self.handing_to {
            None => None,
            Some((attempt, to)) => Some(HandingTo { attempt: AttemptId(*attempt), to: host(to)? }),
        };
        let beat = match &self.beat {
            None => None,
            Some((name, incarnation)) => {
                Some(BeatRef { name: BeatName::parse(name)?, incarnation: *incarnation })
            }
        };
        Ok(Record {
            machine: MachineName::new(&self.machine).map_err(|e| e.to_string())?,
            epoch: Epoch(self.epoch),
            owner: host(&self.owner)?,
            handing_to,
            attempt: AttemptId(self.attempt),
            beat,
            nonce: Nonce(u128::from_str_radix(&self.nonce, 16).map_err(|e| e.to_string())?),
        })
    }
}

impl TokenMeta {
    /// What the source sends.
    #[must_use]
    pub fn of(token: &Token, state_bytes: u64) -> Self {
        Self {
            attempt: token.attempt.0,
            serial: token.serial.0,
            handed: LeaseMessage::from(&token.handed),
            flush_owed: token.flush_owed,
            state_bytes,
        }
    }

    /// What the destination checks.
    pub fn token(&self) -> Result<Token, String> {
        Ok(Token {
            attempt: AttemptId(self.attempt),
            serial: OfferSerial(self.serial),
            handed: self.handed.record()?,
            flush_owed: self.flush_owed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_the_wire_and_its_text_is_fixed() {
        let record = Record {
            machine: MachineName::new("redis").unwrap(),
            epoch: Epoch(7),
            owner: HostName::new("a").unwrap(),
            handing_to: Some(HandingTo { attempt: AttemptId(9), to: HostName::new("b").unwrap() }),
            attempt: AttemptId(9),
            beat: None,
            nonce: Nonce(0xabc),
        };
        let token = Token {
            attempt: AttemptId(9),
            serial: OfferSerial(3),
            handed: record,
            flush_owed: true,
        };
        let text = serde_json::to_string(&TokenMeta::of(&token, 5)).unwrap();
        assert_eq!(
            text,
            r#"{"attempt":9,"serial":3,"handed":{"machine":"redis","epoch":7,"owner":"a","#
                .to_owned()
                + r#""handing_to":[9,"b"],"attempt":9,"nonce":"00000000000000000000000000000abc"},"#
                + r#""flush_owed":true,"state_bytes":5}"#
        );
        let meta: TokenMeta = serde_json::from_str(&text).unwrap();
        assert_eq!(meta.token().unwrap(), token);

        let name = BeatName::of_host(HostName::new("a").unwrap());
        let beat = Some(BeatRef { name, incarnation: 2 });
        let token = Token { handed: token.handed.bound(beat), ..token };
        let text = serde_json::to_string(&TokenMeta::of(&token, 5)).unwrap();
        assert!(text.contains(r#""attempt":9,"beat":["a",2],"nonce""#), "{text}");
        let meta: TokenMeta = serde_json::from_str(&text).unwrap();
        assert_eq!(meta.token().unwrap(), token);
    }
}
