//! Addresses of stores that are elsewhere: `scheme://[user@]hosts[/path][?name=value&…]`.
//!
//! No password is ever part of one: addresses stand in lists of processes, in configurations and in
//! messages. Values are taken as they stand, without %-encoding.

use std::{fs, path::Path};

/// An address in parts.
#[derive(Debug)]
pub(crate) struct Address<'a> {
    pub(crate) user: Option<&'a str>,
    pub(crate) hosts: Vec<&'a str>,
    /// Without slashes around it.
    pub(crate) path: &'a str,
    pub(crate) options: Options<'a>,
}

/// What follows the question mark.
#[derive(Debug)]
pub(crate) struct Options<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Options<'a> {
    pub(crate) fn parse(text: &'a str) -> Result<Self, String> {
        let pairs = text.split('&').filter(|pair| !pair.is_empty());
        let pairs = pairs
            .map(|pair| pair.split_once('=').ok_or_else(|| format!("\"{pair}\" has no value")));
        let options: Vec<_> = pairs.collect::<Result<_, _>>()?;
        if options.iter().any(|(name, _)| *name == "password") {
            return Err(NO_PASSWORDS.to_owned());
        }
        Ok(Self(options))
    }

    /// Takes one out; the last one counts.
    pub(crate) fn take(&mut self, name: &str) -> Option<&'a str> {
        let found = self.0.iter().rfind(|(n, _)| *n == name).map(|(_, value)| *value);
        self.0.retain(|(n, _)| *n != name);
        found
    }

    /// Those that nobody took.
    pub(crate) fn rest(&self) -> &[(&'a str, &'a str)] {
        &self.0
    }

    /// Nobody knows what is left.
    pub(crate) fn finish(&self, known: &str) -> Result<(), String> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => Err(format!("\"{name}=\" is not known here; it takes {known}")),
        }
    }
}

pub(crate) const NO_PASSWORDS: &str = "a password does not belong into an address, which everybody on \
    this host can read: name a file that has it, by password_file=";

impl<'a> Address<'a> {
    /// Reads what follows the scheme and its colon.
    pub(crate) fn parse(rest: &'a str) -> Result<Self, String> {
        let rest = rest.strip_prefix("//").ok_or("after the scheme comes //")?;
        let (place, options) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = place.split_once('/').unwrap_or((place, ""));
        let (user, hosts) = match authority.rsplit_once('@') {
            Some((user, hosts)) => (Some(user), hosts),
            None => (None, authority),
        };
        if user.is_some_and(|user| user.contains(':')) {
            return Err(NO_PASSWORDS.to_owned());
        }
        let hosts: Vec<&str> = hosts.split(',').collect();
        if hosts.iter().any(|host| host.is_empty()) {
            return Err("it names no host, or an empty one".to_owned());
        }
        Ok(Self { user, hosts, path: path.trim_matches('/'), options: Options::parse(options)? })
    }
}

/// Hides what may be a password: for messages about addresses that were refused.
pub(crate) fn without_secrets(address: &str) -> String {
    let mut shown = address.to_owned();
    if let Some(start) = shown.find("://").map(|at| at + 3) {
        let end = shown[start..].find(['/', '?']).map_or(shown.len(), |at| start + at);
        // A password with a slash in it ends behind that.
        let at = shown[start..end].rfind('@').or_else(|| shown[start..].rfind('@'));
        if let Some(at) = at.map(|at| start + at)
            && let Some(colon) = shown[start..at].find(':')
        {
            shown.replace_range(start + colon..at, ":…");
        }
    }
    if let Some(start) = shown.find("password=").map(|at| at + "password=".len()) {
        let end = shown[start..].find('&').map_or(shown.len(), |at| start + at);
        shown.replace_range(start..end, "…");
    }
    shown
}

/// A secret in a file: its content without the end of the line.
pub(crate) fn secret(path: &Path) -> Result<String, String> {
    let text =
        fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_apart() {
        let mut address = Address::parse("//me@a:1,b:2/some/where?ca=/x&tls=yes").unwrap();
        assert_eq!((address.user, address.path), (Some("me"), "some/where"));
        assert_eq!(address.hosts, ["a:1", "b:2"]);
        assert_eq!(address.options.take("ca"), Some("/x"));
        assert!(address.options.finish("ca=").unwrap_err().contains("tls="));
        assert_eq!(address.options.take("tls"), Some("yes"));
        address.options.finish("ca=").unwrap();
        for bad in ["a:1", "//", "//a,,b", "//me:hush@a", "//a?x", "//a?password=hush"] {
            assert!(!Address::parse(bad).unwrap_err().contains("hush"), "{bad}");
        }
    }

    #[test]
    fn passwords_are_not_shown() {
        for (secret, shown) in [
            ("postgres://me:hush@a/b", "postgres://me:…@a/b"),
            ("postgres://me:hush/x@a/b", "postgres://me:…@a/b"),
            ("postgres://me:hu@sh@a/b", "postgres://me:…@a/b"),
            ("etcd://a?password=hush&ca=x", "etcd://a?password=…&ca=x"),
            ("etcd://a:1/b", "etcd://a:1/b"),
            ("/a/directory", "/a/directory"),
        ] {
            assert_eq!(without_secrets(secret), shown);
        }
    }
}
