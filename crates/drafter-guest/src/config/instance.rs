//! The `drafter.*` words of the kernel command line: facts of one instance of a package.
//!
//! The driver appends [`InstanceConfig::to_command_line`] to the package's own command line; the
//! init reads `/proc/cmdline` with [`InstanceConfig::parse`]. Words without the prefix belong to
//! the kernel or the package; words with it that this version does not know are kept by name, so
//! that the init can say so, and otherwise ignored.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

/// The gateway of every machine, on every host: link-local, so that nothing changes inside the
/// guest when it moves.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// The same for IPv6.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Longest host name that Linux takes.
pub const MAX_HOST_NAME: usize = 64;

/// Smallest MTU that IPv4 allows.
const MIN_MTU: u16 = 576;

const DEFAULT_MTU: u16 = 1400;

const MAX_NAME_SERVERS: usize = 8;

/// Facts of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceConfig {
    /// `drafter.host`: the guest's host name.
    pub host: Option<String>,
    /// `drafter.ip`: the machine's address, a /32. None: no network but the loopback.
    pub address: Option<Ipv4Addr>,
    /// `drafter.ip6`: its IPv6 address, a /128, by [`GATEWAY_V6`]. Only together with the other.
    pub address_v6: Option<Ipv6Addr>,
    /// `drafter.gw`: the next hop, reached on-link.
    pub gateway: Ipv4Addr,
    /// `drafter.mtu`: MTU of the interface.
    pub mtu: u16,
    /// `drafter.dns`: name servers, separated by commas.
    pub name_servers: Vec<Ipv4Addr>,
    /// Names of `drafter.*` words that this version does not know.
    pub unknown: Vec<String>,
}

impl Default for InstanceConfig {
    fn default() -> Self {
        Self {
            host: None,
            address: None,
            address_v6: None,
            gateway: GATEWAY,
            mtu: DEFAULT_MTU,
            name_servers: Vec::new(),
            unknown: Vec::new(),
        }
    }
}

/// A word of the kernel command line that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel command line: {name}={value}: {problem}")]
pub struct InstanceError {
    /// The word's name, as in `drafter.ip`.
    pub name: String,
    /// What it was set to.
    pub value: String,
    /// What would be right.
    pub problem: String,
}

impl InstanceConfig {
    /// Reads the content of `/proc/cmdline`. Of a word that comes twice the last one counts, as
    /// with the kernel's own.
    ///
    /// # Errors
    /// Names the first `drafter.*` word whose value cannot be used.
    pub fn parse(command_line: &str) -> Result<Self, InstanceError> {
        let mut config = Self::default();
        for word in command_line.split_ascii_whitespace() {
            let Some(rest) = word.strip_prefix("drafter.") else { continue };
            let (name, value) = rest.split_once('=').unwrap_or((rest, ""));
            config.set(name, value).map_err(|problem| InstanceError {
                name: format!("drafter.{name}"),
                value: value.to_owned(),
                problem,
            })?;
        }
        Ok(config)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "host" => self.host = Some(host_name(value)?),
            "ip" => self.address = Some(address(value)?),
            "ip6" => self.address_v6 = Some(address_v6(value)?),
            "gw" => self.gateway = address(value)?,
            "mtu" => {
                self.mtu = value.parse().ok().filter(|mtu| *mtu >= MIN_MTU).ok_or_else(|| {
                    format!("an MTU is a number between {MIN_MTU} and {}", u16::MAX)
                })?;
            }
            "dns" => {
                self.name_servers = value.split(',').map(address).collect::<Result<_, _>>()?;
                if self.name_servers.len() > MAX_NAME_SERVERS {
                    return Err(format!("at most {MAX_NAME_SERVERS} name servers"));
                }
            }
            other => self.unknown.push(format!("drafter.{other}")),
        }
        Ok(())
    }

    /// The words for the kernel command line, separated by spaces; what [`InstanceConfig::parse`]
    /// reads back. Empty for an instance without name and network.
    #[must_use]
    pub fn to_command_line(&self) -> String {
        let mut words = Vec::new();
        if let Some(host) = &self.host {
            words.push(format!("drafter.host={host}"));
        }
        if let Some(address) = self.address {
            words.push(format!("drafter.ip={address}"));
            if let Some(v6) = self.address_v6 {
                words.push(format!("drafter.ip6={v6}"));
            }
            words.push(format!("drafter.gw={}", self.gateway));
            words.push(format!("drafter.mtu={}", self.mtu));
        }
        if !self.name_servers.is_empty() {
            let list: Vec<String> = self.name_servers.iter().map(ToString::to_string).collect();
            words.push(format!("drafter.dns={}", list.join(",")));
        }
        words.join(" ")
    }
}

impl fmt::Display for InstanceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_command_line())
    }
}

fn address(value: &str) -> Result<Ipv4Addr, String> {
    let address: Ipv4Addr =
        value.parse().map_err(|_| "an IPv4 address, as in 10.90.0.5".to_owned())?;
    if address.is_unspecified() || address.is_broadcast() || address.is_multicast() {
        return Err("an address of one host".to_owned());
    }
    Ok(address)
}

fn address_v6(value: &str) -> Result<Ipv6Addr, String> {
    let address: Ipv6Addr =
        value.parse().map_err(|_| "an IPv6 address, as in fd77::5".to_owned())?;
    if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
        return Err("an address of one host".to_owned());
    }
    Ok(address)
}

/// Checks a host name: labels of letters, digits and inner hyphens, separated by dots.
fn host_name(value: &str) -> Result<String, String> {
    let label_is_good = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if value.len() > MAX_HOST_NAME || !value.split('.').all(label_is_good) {
        return Err(format!(
            "a host name of at most {MAX_HOST_NAME} letters, digits, inner hyphens and dots"
        ));
    }
    Ok(value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_documented_command_line_is_understood() {
        let line = "console=ttyS0 quiet drafter.host=redis-1 drafter.ip=10.90.0.5 \
                    drafter.ip6=fd90::5 drafter.gw=169.254.1.1 drafter.mtu=1400 drafter.dns=10.0.0.53,10.0.1.53 panic=-1\n";
        let config = InstanceConfig::parse(line).unwrap();
        assert_eq!(config.host.as_deref(), Some("redis-1"));
        assert_eq!(config.address, Some(Ipv4Addr::new(10, 90, 0, 5)));
        assert_eq!(config.address_v6, Some(Ipv6Addr::new(0xfd90, 0, 0, 0, 0, 0, 0, 5)));
        assert_eq!((config.gateway, config.mtu), (GATEWAY, 1400));
        assert_eq!(config.name_servers.len(), 2);
        assert_eq!(InstanceConfig::parse(&config.to_command_line()).unwrap(), config);
    }

    #[test]
    fn without_words_there_is_no_network_and_nothing_to_say() {
        let config = InstanceConfig::parse("console=ttyS0 root=/dev/vda").unwrap();
        assert_eq!(config, InstanceConfig::default());
        assert_eq!(config.to_command_line(), "");
    }

    #[test]
    fn unknown_words_are_kept_by_name_and_do_no_harm() {
        let config =
            InstanceConfig::parse("drafter.colour=green drafter.host=a drafter.fast").unwrap();
        assert_eq!(config.unknown, ["drafter.colour", "drafter.fast"]);
        assert_eq!(config.host.as_deref(), Some("a"));
    }

    #[test]
    fn a_value_that_cannot_be_used_is_refused_by_its_name() {
        for word in [
            "drafter.ip=10.90.0",
            "drafter.ip=0.0.0.0",
            "drafter.ip6=10.90.0.5",
            "drafter.ip6=ff02::1",
            "drafter.gw=224.0.0.1",
            "drafter.mtu=100",
            "drafter.mtu=65536",
            "drafter.dns=10.0.0.1,",
            "drafter.host=",
            "drafter.host=-a",
            "drafter.host=a_b",
            "drafter.host",
        ] {
            let error = InstanceConfig::parse(word).unwrap_err();
            let name = word.split('=').next().unwrap();
            assert_eq!(error.name, name, "{word}");
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_command_line_makes_the_parser_panic(line in ".{0,200}") {
            drop(InstanceConfig::parse(&line));
        }
    }
}
