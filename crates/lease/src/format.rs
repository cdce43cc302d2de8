//! A record as bytes: what a store keeps and what travels in a token.

use super::{AttemptId, Epoch, HandingTo, HostName, MachineName, Nonce, Record};

/// Written into each record; another number is refused by name.
const VERSION: u32 = 1;

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
            version: VERSION,
            machine: record.machine.to_string(),
            epoch: record.epoch.0,
            owner: record.owner.to_string(),
            handing_to: record.handing_to.as_ref().map(|handing| StoredHanding {
                attempt: handing.attempt.to_string(),
                to: handing.to.to_string(),
            }),
            attempt: record.attempt.to_string(),
            nonce: format!("{:032x}", record.nonce.0),
        };
        let mut bytes = serde_json::to_vec_pretty(&stored)
            .expect("a struct of numbers and strings always serializes");
        bytes.push(b'\n');
        bytes
    }

    /// Reads what [`Record::encode`] wrote, from a file or from a peer.
    ///
    /// # Errors
    /// Says what is wrong: no JSON, another version, a bad name or number.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadRecord> {
        decode(bytes).map_err(BadRecord)
    }
}

fn decode(bytes: &[u8]) -> Result<Record, String> {
    let version: StoredVersion = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if version.version != VERSION {
        return Err(format!(
            "it has version {}, this program knows version {VERSION}; use the version that wrote it",
            version.version
        ));
    }
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
    Ok(Record {
        machine: MachineName::new(&stored.machine).map_err(|e| e.to_string())?,
        epoch: Epoch(stored.epoch),
        owner: host(&stored.owner)?,
        handing_to,
        attempt: attempt(&stored.attempt)?,
        nonce: u128::from_str_radix(&stored.nonce, 16)
            .map(Nonce)
            .map_err(|_| format!("\"{}\" is no nonce", stored.nonce))?,
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
