//! A record as bytes: what a store keeps and what travels in a token.

use super::{
    AttemptId, Beat, BeatName, BeatRef, Epoch, HandingTo, HostName, LONGEST_TERM, MachineName,
    Nonce, Record,
};
use std::time::Duration;

/// Written into a record without a beat, and into beats; what a program without beats can read.
const VERSION: u32 = 1;
/// Written into a record with a beat, so that a program without beats refuses it by name.
const VERSION_WITH_BEAT: u32 = 2;

/// Bytes that are no record of this version, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a lease record: {0}")]
pub struct BadRecord(pub String);

/// The content. Numbers that JSON tools would round are text.
#[derive(serde::Serialize, serde::Deserialize)]
struct Stored {
    version: u32,
    machine: String,
    epoch: u64,
    owner: String,
    handing_to: Option<StoredHanding>,
    attempt: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    beat: Option<StoredBeatRef>,
    nonce: String,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct StoredBeatRef {
    name: String,
    incarnation: u64,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct StoredBeat {
    version: u32,
    beat: String,
    incarnation: u64,
    serial: u64,
    term_ms: u64,
    fenced_by: Option<String>,
    nonce: String,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct StoredHanding {
    attempt: String,
    to: String,
}

/// Only the version, so that another version is named before its fields confuse.
#[derive(serde::Deserialize)]
struct StoredVersion {
    version: u32,
}

impl Record {
    /// As it is kept in files and sent to another host: JSON, with a version.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let record = self;
        let stored = Stored {
            version: if record.beat.is_some() { VERSION_WITH_BEAT } else { VERSION },
            machine: record.machine.to_string(),
            epoch: record.epoch.0,
            owner: record.owner.to_string(),
            handing_to: record.handing_to.as_ref().map(|handing| StoredHanding {
                attempt: handing.attempt.to_string(),
                to: handing.to.to_string(),
            }),
            attempt: record.attempt.to_string(),
            beat: record
                .beat
                .as_ref()
                .map(|of| StoredBeatRef { name: of.name.to_string(), incarnation: of.incarnation }),
            nonce: format!("{:032x}", record.nonce.0),
        };
        written(&stored)
    }

    /// Reads what [`Record::encode`] wrote, from a file or from a peer.
    ///
    /// # Errors
    /// Says what is wrong: no JSON, another version, a bad name or number.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRecord> {
        decode(bytes).map_err(BadRecord)
    }
}

impl Beat {
    /// As it is kept: JSON, with a version.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        written(&StoredBeat {
            version: VERSION,
            beat: self.of.name.to_string(),
            incarnation: self.of.incarnation,
            serial: self.serial,
            term_ms: u64::try_from(self.term.as_millis()).unwrap_or(u64::MAX),
            fenced_by: self.fenced_by.as_ref().map(HostName::to_string),
            nonce: format!("{:032x}", self.nonce.0),
        })
    }

    /// Reads what [`Beat::encode`] wrote.
    ///
    /// # Errors
    /// As [`Record::decode`].
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRecord> {
        decode_beat(bytes).map_err(BadRecord)
    }
}

fn written(stored: &impl serde::Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(stored)
        .expect("a struct of numbers and strings always serializes");
    bytes.push(b'\n');
    bytes
}

fn nonce(text: &str) -> Result<Nonce, String> {
    u128::from_str_radix(text, 16).map(Nonce).map_err(|_| format!("\"{text}\" is no nonce"))
}

fn check_version(bytes: &[u8], newest: u32) -> Result<u32, String> {
    let version: StoredVersion = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if (VERSION..=newest).contains(&version.version) {
        return Ok(version.version);
    }
    Err(format!(
        "it has version {}, this program knows versions up to {newest}; use the version that wrote it",
        version.version
    ))
}

fn decode_beat(bytes: &[u8]) -> Result<Beat, String> {
    check_version(bytes, VERSION)?;
    let stored: StoredBeat = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let term = Duration::from_millis(stored.term_ms);
    if term.is_zero() || term > LONGEST_TERM {
        return Err(format!("a term of {term:?} is none"));
    }
    let by = stored.fenced_by.as_deref().map(HostName::new).transpose();
    Ok(Beat {
        of: BeatRef { name: BeatName::parse(&stored.beat)?, incarnation: stored.incarnation },
        serial: stored.serial,
        term,
        fenced_by: by.map_err(|e| e.to_string())?,
        nonce: nonce(&stored.nonce)?,
    })
}

fn decode(bytes: &[u8]) -> Result<Record, String> {
    let version = check_version(bytes, VERSION_WITH_BEAT)?;
    let stored: Stored = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let attempt = |text: &str| {
        let number = u64::from_str_radix(text, 16);
        number.map(AttemptId).map_err(|_| format!("\"{text}\" is no attempt number"))
    };
    let host = |text: &str| HostName::new(text).map_err(|e| e.to_string());
    let handing_to = match stored.handing_to {
        Some(h) => Some(HandingTo { attempt: attempt(&h.attempt)?, to: host(&h.to)? }),
        None => None,
    };
    if stored.beat.is_some() != (version == VERSION_WITH_BEAT) {
        return Err(format!("a record of version {version} with a beat, or without its beat"));
    }
    let beat = match stored.beat {
        Some(of) => Some(BeatRef { name: BeatName::parse(&of.name)?, incarnation: of.incarnation }),
        None => None,
    };
    Ok(Record {
        machine: MachineName::new(&stored.machine).map_err(|e| e.to_string())?,
        epoch: Epoch(stored.epoch),
        owner: host(&stored.owner)?,
        handing_to,
        attempt: attempt(&stored.attempt)?,
        beat,
        nonce: nonce(&stored.nonce)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let (machine, owner) = (MachineName::new("redis-1").unwrap(), HostName::new("a").unwrap());
        Record::first(machine, owner, AttemptId(7), Nonce(0xabc))
    }

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    #[test]
    fn version_1_reads_like_this() {
        let record = record().handing(AttemptId(0x1234), host("b.example"), Nonce(1 << 100));
        let golden = r#"{
  "version": 1,
  "machine": "redis-1",
  "epoch": 1,
  "owner": "a",
  "handing_to": {
    "attempt": "0000000000001234",
    "to": "b.example"
  },
  "attempt": "0000000000001234",
  "nonce": "00000010000000000000000000000000"
}
"#;
        assert_eq!(String::from_utf8(record.encode()).unwrap(), golden);
        assert_eq!(Record::decode(golden.as_bytes()).unwrap(), record);
    }

    #[test]
    fn version_2_and_a_beat_read_like_this() {
        let name = BeatName::of_runner(host("a.example"), MachineName::new("redis-1").unwrap());
        let of = BeatRef { name: name.clone(), incarnation: 3 };
        let bound = record().rebound(Some(of.clone()), Nonce(5));
        let golden = r#"{
  "version": 2,
  "machine": "redis-1",
  "epoch": 1,
  "owner": "a",
  "handing_to": null,
  "attempt": "0000000000000007",
  "beat": {
    "name": "a.example/redis-1",
    "incarnation": 3
  },
  "nonce": "00000000000000000000000000000005"
}
"#;
        assert_eq!(String::from_utf8(bound.encode()).unwrap(), golden);
        assert_eq!(Record::decode(golden.as_bytes()).unwrap(), bound);
        let old = golden.replace("\"version\": 2", "\"version\": 1");
        assert!(Record::decode(old.as_bytes()).is_err());

        let term = Duration::from_millis(3000);
        let beat = Beat::begun(name, Some(2), term, Nonce(1)).renewed(term, Nonce(2));
        let beat = beat.fenced(host("b"), Nonce(3));
        assert!(beat.ends(&of));
        let golden = r#"{
  "version": 1,
  "beat": "a.example/redis-1",
  "incarnation": 3,
  "serial": 1,
  "term_ms": 3000,
  "fenced_by": "b",
  "nonce": "00000000000000000000000000000003"
}
"#;
        assert_eq!(String::from_utf8(beat.encode()).unwrap(), golden);
        assert_eq!(Beat::decode(golden.as_bytes()).unwrap(), beat);
        for (from, to) in
            [("3000", "0"), ("a.example/", "a.example/../"), (": 1,\n  \"beat", ": 2,\n  \"beat")]
        {
            let bad = golden.replacen(from, to, 1);
            assert!(Beat::decode(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn bytes_from_a_peer_are_refused_with_a_reason_and_never_a_panic() {
        let good = record().handing(AttemptId(2), host("b"), Nonce(3)).encode();
        for cut in 0..good.len() - 2 {
            assert!(Record::decode(&good[..cut]).is_err());
        }
        for (from, to) in [
            ("\"a\"", "\"../a\""),
            ("redis-1", "redis/1"),
            ("\"version\": 1", "\"version\": 9"),
            ("0000000000000002", "zz"),
            ("\"epoch\": 1", "\"epoch\": -1"),
        ] {
            let bad = String::from_utf8(good.clone()).unwrap().replace(from, to);
            assert!(Record::decode(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
