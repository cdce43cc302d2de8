//! Names of hosts.

use crate::{Error, Result};
use std::{fmt, net::IpAddr, str::FromStr};

/// A host's name: what its certificate says, what a lease records and what messages show. At most
/// 253 bytes of DNS labels (`[a-z0-9-]`, 1 to 63 bytes, no hyphen at either end), and never an
/// address, so that it is safe in certificates, file names and messages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostName(String);

impl HostName {
    /// Checks and takes a name.
    ///
    /// # Errors
    /// [`Error::BadName`] says which rule the name breaks.
    pub fn new(name: &str) -> Result<Self> {
        let bad = |rule| Err(Error::BadName { name: name.to_owned(), rule });
        if name.is_empty() || name.len() > 253 {
            return bad("it must have 1 to 253 characters");
        }
        if name.parse::<IpAddr>().is_ok() {
            return bad("it must be a name, not an address");
        }
        if name == "ca" {
            return bad("\"ca\" is the authority itself");
        }
        let label_fits = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        if !name.split('.').all(label_fits) {
            return bad(
                "use lowercase letters, digits and inner hyphens, in parts of 1 to 63 characters \
                 separated by dots",
            );
        }
        Ok(Self(name.to_owned()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for HostName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::new(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_safe_in_a_certificate_and_in_a_path() {
        for good in ["a", "host-a", "ip-10-0-0-1.ec2.internal", "7", "h1.example"] {
            assert_eq!(HostName::new(good).unwrap().as_str(), good);
        }
        let long = "a".repeat(64);
        for bad in ["", "A", "a/b", "..", ".a", "a.", "-a", "a-", "a b", "ca", "10.0.0.1", "::1"] {
            assert!(HostName::new(bad).is_err(), "{bad}");
        }
        assert!(HostName::new(&long).is_err());
    }
}
