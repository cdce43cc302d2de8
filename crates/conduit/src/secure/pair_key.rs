//! The preshared key of two ends of the kernel's tunnel: how both make the same one of what they tell each
//! other, and how it is written down. Used by [`super::pairs`] alone.
//!
//! ```text
//!  HKDF-SHA256(DH(static, static) ‖ DH(once, once); who they are, generation, all four public keys)
//!    = preshared key ‖ the leader's proof ‖ the follower's proof
//! ```
//!
//! The keys made for once are thrown away, so that nobody can make the key again later. The static ones are
//! those that WireGuard itself goes by: whoever passes the notes on, and changes them, can keep two ends from
//! agreeing, and learns nothing. A proof is of one key and one end, and says nothing of the key.

use base64::prelude::{BASE64_STANDARD, Engine as _};
use conduit_wg::{PrivateKey, PublicKey};
use ring::hkdf;
use serde::{Deserialize, Serialize};
use std::{fmt, net::Ipv4Addr};

/// What is hashed with every key; another version of the derivation has another.
const SALT: &[u8] = b"conduit: preshared key of a pair, 1";
/// Version of the files.
const VERSION: u32 = 1;

/// 32 bytes in base64. Never printed: a preshared key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Secret([u8; 32]);

/// 32 bytes in base64 that show which key their sender has. Anybody may know them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Proof([u8; 32]);

impl Secret {
    /// As `wg` takes it.
    pub(super) fn text(&self) -> String {
        BASE64_STANDARD.encode(self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a preshared key")
    }
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64_STANDARD.encode(self.0))
    }
}

fn read(text: &str) -> Result<[u8; 32], &'static str> {
    let bytes = BASE64_STANDARD.decode(text).ok();
    bytes.and_then(|b| b.try_into().ok()).ok_or("these are not 32 bytes in base64")
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.text())
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        read(&String::deserialize(from)?).map(Self).map_err(serde::de::Error::custom)
    }
}

impl Serialize for Proof {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&BASE64_STANDARD.encode(self.0))
    }
}

impl<'de> Deserialize<'de> for Proof {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        read(&String::deserialize(from)?).map(Self).map_err(serde::de::Error::custom)
    }
}

/// A key that two ends have agreed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Key {
    /// Counts the keys of the pair.
    pub(crate) generation: u64,
    /// The preshared key.
    pub(crate) secret: Secret,
    /// What shows that the leader has it, and that the follower has.
    pub(crate) leader: Proof,
    pub(crate) follower: Proof,
    /// Since when it is in use here, in milliseconds since 1970.
    pub(crate) since: u64,
}

/// One of two ends: where it is, and its public keys.
#[derive(Clone, Copy)]
pub(crate) struct End {
    pub(crate) at: Ipv4Addr,
    /// By which the tunnel knows it.
    pub(crate) fixed: PublicKey,
    /// Made for this agreement.
    pub(crate) once: PublicKey,
}

/// What only one of the two knows.
pub(crate) struct Own<'a> {
    pub(crate) fixed: &'a PrivateKey,
    pub(crate) once: &'a PrivateKey,
}

struct Length;

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        96
    }
}

/// The key of one generation, by one of its ends: `other` is the one that it is not. `None` if the other's
/// public keys are no points to agree with.
pub(crate) fn derive(
    own: &Own<'_>,
    other: &End,
    (leader, follower): (&End, &End),
    generation: u64,
    now: u64,
) -> Option<Key> {
    let fixed = own.fixed.agree(&other.fixed)?;
    let once = own.once.agree(&other.once)?;
    let mut shared = [0; 64];
    shared[..32].copy_from_slice(&fixed);
    shared[32..].copy_from_slice(&once);
    let number = generation.to_be_bytes();
    let (l, f) = (leader.at.octets(), follower.at.octets());
    let info: [&[u8]; 7] = [
        &number,
        &l,
        &f,
        leader.fixed.bytes(),
        follower.fixed.bytes(),
        leader.once.bytes(),
        follower.once.bytes(),
    ];
    let mut made = [0; 96];
    hkdf::Salt::new(hkdf::HKDF_SHA256, SALT)
        .extract(&shared)
        .expand(&info, Length)
        .and_then(|made_of| made_of.fill(&mut made))
        .ok()?;
    let part = |at: usize| -> Option<[u8; 32]> { made[at..at + 32].try_into().ok() };
    let (secret, leader, follower) = (Secret(part(0)?), Proof(part(32)?), Proof(part(64)?));
    Some(Key { generation, secret, leader, follower, since: now })
}

/// What is written down of a pair, in a file that only its owner may read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Saved {
    version: u32,
    /// The keys that the tunnel knows both by: with another one it is another pair.
    pub(crate) own: PublicKey,
    pub(crate) peer: PublicKey,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) current: Option<Key>,
    /// The leader has told the follower to use it, and has not heard that it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) next: Option<Key>,
}

impl Saved {
    pub(crate) fn new(
        (own, peer): (PublicKey, PublicKey),
        current: Option<Key>,
        next: Option<Key>,
    ) -> Self {
        Self { version: VERSION, own, peer, current, next }
    }

    /// What a file says; a newer version is refused by name.
    pub(crate) fn read(text: &str) -> Result<Self, String> {
        // What is wrong is not quoted: it may be a key.
        let saved: Self = serde_json::from_str(text)
            .map_err(|e| format!("not a pair's key (line {}, column {})", e.line(), e.column()))?;
        if saved.version != VERSION {
            return Err(format!("it is of version {}, this is {VERSION}", saved.version));
        }
        Ok(saved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends() -> ([PrivateKey; 4], End, End) {
        let keys = [0; 4].map(|_| PrivateKey::generate().unwrap());
        let end = |last, fixed: &PrivateKey, once: &PrivateKey| End {
            at: Ipv4Addr::new(100, 64, 0, last),
            fixed: fixed.public(),
            once: once.public(),
        };
        let (leader, follower) = (end(1, &keys[0], &keys[1]), end(2, &keys[2], &keys[3]));
        (keys, leader, follower)
    }

    #[test]
    fn both_ends_make_the_same_key_and_another_of_everything_that_differs() {
        let ([lf, lo, ff, fo], leader, follower) = ends();
        let ours = Own { fixed: &lf, once: &lo };
        let theirs = Own { fixed: &ff, once: &fo };
        let one = derive(&ours, &follower, (&leader, &follower), 1, 5).unwrap();
        assert_eq!(derive(&theirs, &leader, (&leader, &follower), 1, 5).unwrap(), one);
        assert_ne!(one.leader, one.follower);
        let two = derive(&ours, &follower, (&leader, &follower), 2, 5).unwrap();
        assert_ne!(one.secret, two.secret);
        // Somebody between them who changes what is made for once, and knows what he made.
        let between = PrivateKey::generate().unwrap();
        let forged = End { once: between.public(), ..follower };
        let fooled = derive(&ours, &forged, (&leader, &forged), 1, 5).unwrap();
        let his = Own { fixed: &between, once: &between };
        let made = derive(&his, &leader, (&leader, &forged), 1, 5).unwrap();
        assert_ne!(fooled.secret, made.secret, "he lacks a static key");
    }

    #[test]
    fn a_key_is_never_printed_and_a_file_comes_back_or_is_refused_by_name() {
        let ([lf, lo, ..], leader, follower) = ends();
        let own = Own { fixed: &lf, once: &lo };
        let key = derive(&own, &follower, (&leader, &follower), 1, 5).unwrap();
        assert!(!format!("{key:?}").contains(&key.secret.text()));
        let saved = Saved::new((leader.fixed, follower.fixed), Some(key.clone()), None);
        let text = serde_json::to_string(&saved).unwrap();
        assert_eq!(Saved::read(&text).unwrap().current, Some(key.clone()));
        let newer = text.replace("\"version\":1", "\"version\":2");
        assert!(Saved::read(&newer).unwrap_err().contains("version 2"));
        let broken = text.replace("secret\":\"", "secret\":\"!");
        let error = Saved::read(&broken).unwrap_err();
        assert!(!error.contains(&key.secret.text()[1..20]), "{error}");
    }
}
