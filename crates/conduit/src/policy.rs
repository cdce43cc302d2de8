//! What the edge lets through to a machine and out of it: whole public addresses, who may open flows
//! to which port, and how much. Part of a [`crate::MachineNet`], so it moves with the machine; the edge
//! makes rules of it ([`crate::edge`]).

use crate::datapath::Protocol;
use serde::{Deserialize, Serialize};
use std::{fmt, net::IpAddr, str::FromStr};

/// See the module. The default: every mapped port is open to everybody, without limits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Public addresses that lead to the machine whole, every port of them; what it says to the
    /// outside by itself comes from there. At most one of each family, of those that the edge has to
    /// give ([`crate::edge::EdgeConfig::spare`]).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub public: Vec<IpAddr>,
    /// Who may open flows to the machine from outside. A port that no rule speaks of is open to all;
    /// any other only to those that a rule names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Allow>,
    /// How much.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
}

/// Sources that may open flows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allow {
    /// To which public port; to all of the machine if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<PublicPort>,
    /// From where.
    pub from: Vec<Prefix>,
}

/// A port of the public address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PublicPort {
    /// `tcp` or `udp`.
    pub protocol: Protocol,
    /// Port on the edge; on a whole address, of the machine.
    pub port: u16,
}

/// Upper bounds at the edge; what is beyond is dropped and counted. A bucket holds one second's worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes a second to the machine from outside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_in: Option<u64>,
    /// Bytes a second from the machine to the outside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_out: Option<u64>,
    /// New flows a second to the machine from outside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows_in: Option<u32>,
}

impl Policy {
    /// Nothing that an edge must do.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Limits {
    /// No bound at all.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// Addresses that start with the same bits, as in `198.51.100.0/24` or `2001:db8::/32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Prefix {
    address: IpAddr,
    bits: u8,
}

/// Text that is no [`Prefix`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no network like 198.51.100.0/24 or 2001:db8::/32")]
pub struct BadPrefix(String);

impl Prefix {
    /// The network of the first `bits` of `address`; `None` if it has not that many.
    #[must_use]
    pub fn new(address: IpAddr, bits: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(v4) if bits <= 32 => {
                let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
                IpAddr::V4((u32::from(v4) & mask).into())
            }
            IpAddr::V6(v6) if bits <= 128 => {
                let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
                IpAddr::V6((u128::from(v6) & mask).into())
            }
            _ => return None,
        };
        Some(Self { address, bits })
    }

    /// Its first address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Its length in bits.
    #[must_use]
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Whether an address is in it.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        Self::new(address, self.bits).is_some_and(|p| p.address == self.address)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl FromStr for Prefix {
    type Err = BadPrefix;

    /// A bare address is a network of one.
    fn from_str(text: &str) -> Result<Self, BadPrefix> {
        let parse = || {
            let (address, bits) = match text.split_once('/') {
                Some((address, bits)) => (address.parse().ok()?, bits.parse().ok()?),
                None => {
                    let address: IpAddr = text.parse().ok()?;
                    (address, if address.is_ipv4() { 32 } else { 128 })
                }
            };
            Self::new(address, bits)
        };
        parse().ok_or_else(|| BadPrefix(text.to_owned()))
    }
}

impl TryFrom<String> for Prefix {
    type Error = BadPrefix;

    fn try_from(text: String) -> Result<Self, BadPrefix> {
        text.parse()
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> Self {
        prefix.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_with_their_host_bits_cleared_or_refused() {
        let read = |text: &str| text.parse::<Prefix>().map(|p| p.to_string());
        assert_eq!(read("198.51.100.7/24").unwrap(), "198.51.100.0/24");
        assert_eq!(read("2001:db8::1/32").unwrap(), "2001:db8::/32");
        assert_eq!(read("198.51.100.7").unwrap(), "198.51.100.7/32");
        assert_eq!(read("::/0").unwrap(), "::/0");
        for bad in ["", "1.2.3.4/33", "::/129", "1.2.3.4/", "x/8", "1.2.3.4/-1"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_network_contains_its_addresses_and_none_of_another_family() {
        let network: Prefix = "10.77.0.0/16".parse().unwrap();
        assert!(network.contains("10.77.255.1".parse().unwrap()));
        assert!(!network.contains("10.78.0.1".parse().unwrap()));
        assert!(!network.contains("::ffff:10.77.0.1".parse().unwrap()));
    }
}
