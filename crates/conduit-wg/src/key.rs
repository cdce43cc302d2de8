//! Key pairs, and how they are written: base64 as WireGuard's own tools have it.

use crate::TunnelError;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use boringtun::x25519;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What others know a host by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

/// What only the host itself knows. Never printed; written to its own state folder alone.
#[derive(Clone)]
pub struct PrivateKey(x25519::StaticSecret);

impl PublicKey {
    pub(crate) fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub(crate) fn x25519(self) -> x25519::PublicKey {
        self.0.into()
    }

    /// The key's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PrivateKey {
    /// A new one, from the system's randomness.
    pub fn generate() -> Result<Self, TunnelError> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(|e| TunnelError::invalid("make a key", e))?;
        Ok(Self(bytes.into()))
    }

    /// What others may know of it.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519::PublicKey::from(&self.0).to_bytes())
    }

    /// As it is written into the state folder, and as `wg` takes it.
    #[must_use]
    pub fn text(&self) -> String {
        BASE64_STANDARD.encode(self.0.as_bytes())
    }

    /// What its owner and the owner of `other` have in common and nobody else knows (RFC 7748); `None` if
    /// `other` is a point that gives everybody the same.
    #[must_use]
    pub fn agree(&self, other: &PublicKey) -> Option<[u8; 32]> {
        let shared = self.0.diffie_hellman(&other.x25519());
        shared.was_contributory().then(|| shared.to_bytes())
    }

    pub(crate) fn x25519(&self) -> x25519::StaticSecret {
        self.0.clone()
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the private key of {}", self.public())
    }
}

fn read(text: &str) -> Result<[u8; 32], TunnelError> {
    let bytes = BASE64_STANDARD.decode(text).ok();
    bytes.and_then(|b| b.try_into().ok()).ok_or_else(|| {
        TunnelError::invalid("read a key", "a key is 32 bytes in base64 (44 characters)")
    })
}

impl TryFrom<String> for PublicKey {
    type Error = TunnelError;
    fn try_from(text: String) -> Result<Self, TunnelError> {
        read(&text).map(Self)
    }
}

impl std::str::FromStr for PublicKey {
    type Err = TunnelError;
    fn from_str(text: &str) -> Result<Self, TunnelError> {
        read(text).map(Self)
    }
}

impl std::str::FromStr for PrivateKey {
    type Err = TunnelError;
    fn from_str(text: &str) -> Result<Self, TunnelError> {
        read(text).map(|b| Self(b.into()))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64_STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for PublicKey {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        read(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_what_wireguards_tools_make_of_the_same_bytes() {
        // From the test vectors of RFC 7748, section 6.1 (Alice).
        let private = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=".parse::<PrivateKey>().unwrap();
        let public = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
        assert_eq!(private.public().to_string(), public);
        assert_eq!(private.text().parse::<PrivateKey>().unwrap().public(), private.public());
        assert!(!format!("{private:?}").contains(&private.text()));
    }

    #[test]
    fn two_agree_on_what_the_rfc_says_and_nobody_agrees_with_a_point_of_small_order() {
        // RFC 7748, section 6.1.
        let alice = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=".parse::<PrivateKey>().unwrap();
        let bob = "XasIfmJKikt54X+Lg4AO5m87sSkmGLb9HC+LJ/+I4Os=".parse::<PrivateKey>().unwrap();
        let shared = alice.agree(&bob.public()).unwrap();
        assert_eq!(BASE64_STANDARD.encode(shared), "Sl2dW6TOLeFyjjv0gDUPJeB+IclH0Z4zdvCbPB4WF0I=");
        assert_eq!(bob.agree(&alice.public()), Some(shared));
        assert_eq!(alice.agree(&PublicKey::from_bytes([0; 32])), None);
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for bad in ["", "AAAA", "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTm=", "not base64 at all!"]
        {
            assert!(bad.parse::<PublicKey>().is_err(), "{bad}");
        }
    }

    #[test]
    fn two_keys_differ() {
        let new = || PrivateKey::generate().unwrap().public();
        assert_ne!(new(), new());
    }
}
