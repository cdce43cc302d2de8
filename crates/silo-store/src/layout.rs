//! Names of objects in a store. Only this file knows them.
//!
//! ```text
//! silo-store                                   marker: the format's version
//! packs/3f/3f…                                 content; named by BLAKE3 of the object
//! maps/a0/a0…                                  where blocks are; named likewise
//! lines/<tenant>/<line>/<!number>              log of a line: numbered, created if absent, never changed
//! keys/<tenant>/<number>/<tenant key>          data key, wrapped by a tenant key ("first": by whichever was first)
//! pins/<tenant>/<line>/<!number>-<lease>-<random> somebody reads that generation
//! collections/<number>/{began,tombs,swept,done} garbage collection
//! probe/<random>                               does create-if-absent have one winner?
//! ```
//!
//! Numbers of log entries are written as 16 hexadecimal digits of their complement, so that a
//! listing, which stores give in ascending order, has the newest first: one request finds it.

use crate::{StoreError, error::Result};
use std::{fmt, time::Duration};

pub(crate) const MARKER: &str = "silo-store";
pub(crate) const FORMAT: &str = "silo-store 1";
pub(crate) const PACKS: &str = "packs";
pub(crate) const MAPS: &str = "maps";
pub(crate) const LINES: &str = "lines";
pub(crate) const COLLECTIONS: &str = "collections";
pub(crate) const PINS: &str = "pins";
pub(crate) const PROBES: &str = "probe";

/// Names an immutable object: BLAKE3 of its bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ObjectId(pub(crate) [u8; 32]);

impl ObjectId {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    pub(crate) fn pack(&self) -> String {
        self.path(PACKS)
    }

    pub(crate) fn map(&self) -> String {
        self.path(MAPS)
    }

    fn path(&self, folder: &str) -> String {
        format!("{folder}/{:02x}/{self}", self.0[0])
    }

    /// The id in the name of a pack or a map.
    pub(crate) fn parse(object: &str) -> Option<Self> {
        let name = object.rsplit('/').next()?;
        blake3::Hash::from_hex(name).ok().map(|hash| Self(*hash.as_bytes()))
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Whether a text can be part of an object's name.
pub(crate) fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

pub(crate) fn check_name(what: &'static str, name: &str) -> Result<()> {
    if is_name(name) {
        return Ok(());
    }
    Err(StoreError::Name { what, name: name.chars().take(80).collect() })
}

/// A line of generations: of whom, and which.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LineName {
    tenant: String,
    line: String,
}

impl LineName {
    /// `tenant` owns the keys; `line` is the history of one device group.
    ///
    /// # Errors
    /// If one of them is no name.
    pub fn new(tenant: &str, line: &str) -> Result<Self> {
        check_name("tenant", tenant)?;
        check_name("line", line)?;
        Ok(Self { tenant: tenant.to_owned(), line: line.to_owned() })
    }

    /// Reads `tenant/line`.
    ///
    /// # Errors
    /// If it is not that.
    pub fn parse(text: &str) -> Result<Self> {
        let (tenant, line) = text.split_once('/').ok_or_else(|| StoreError::Name {
            what: "line (write tenant/line)",
            name: text.chars().take(80).collect(),
        })?;
        Self::new(tenant, line)
    }

    /// Who owns the keys.
    #[must_use]
    pub fn tenant(&self) -> &str {
        &self.tenant
    }

    /// Which line of the tenant.
    #[must_use]
    pub fn line(&self) -> &str {
        &self.line
    }

    pub(crate) fn prefix(&self) -> String {
        format!("{LINES}/{}/{}", self.tenant, self.line)
    }

    pub(crate) fn entry(&self, number: u64) -> String {
        format!("{}/{:016x}", self.prefix(), !number)
    }
}

impl fmt::Display for LineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.line)
    }
}

impl fmt::Debug for LineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Line and number of a log entry, from its object's name.
pub(crate) fn parse_entry(object: &str) -> Option<(LineName, u64)> {
    let mut parts = object.split('/');
    if parts.next()? != LINES {
        return None;
    }
    let line = LineName::new(parts.next()?, parts.next()?).ok()?;
    let number = !parse_hex(parts.next()?)?;
    parts.next().is_none().then_some((line, number))
}

/// Exactly 16 lower-case hexadecimal digits.
fn parse_hex(text: &str) -> Option<u64> {
    let canonical =
        text.len() == 16 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    canonical.then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

pub(crate) fn keys(tenant: &str) -> String {
    format!("keys/{tenant}")
}

pub(crate) fn key(tenant: &str, number: u64, name: &str) -> String {
    format!("keys/{tenant}/{number:016x}/{name}")
}

/// Number and name of a wrapped data key.
pub(crate) fn parse_key(object: &str) -> Option<(u64, &str)> {
    let mut parts = object.split('/').skip(2);
    let number = parse_hex(parts.next()?)?;
    let name = parts.next()?;
    parts.next().is_none().then_some((number, name))
}

pub(crate) fn pins_of(line: &LineName) -> String {
    format!("{PINS}/{}/{}", line.tenant, line.line)
}

pub(crate) fn pin(line: &LineName, number: u64, lease: Duration, random: [u8; 8]) -> String {
    let (lease, random) = (lease.as_secs(), u64::from_be_bytes(random));
    format!("{}/{:016x}-{lease:016x}-{random:016x}", pins_of(line), !number)
}

/// Line, number of the generation and lease, from a pin's name.
pub(crate) fn parse_pin(object: &str) -> Option<(LineName, u64, Duration)> {
    let mut parts = object.split('/');
    if parts.next()? != PINS {
        return None;
    }
    let line = LineName::new(parts.next()?, parts.next()?).ok()?;
    let mut name = parts.next()?.split('-');
    let (number, lease) = (!parse_hex(name.next()?)?, parse_hex(name.next()?)?);
    parse_hex(name.next()?)?;
    let whole = name.next().is_none() && parts.next().is_none();
    whole.then_some((line, number, Duration::from_secs(lease)))
}

pub(crate) fn collection(number: u64, what: &str) -> String {
    format!("{COLLECTIONS}/{number:016x}/{what}")
}

pub(crate) fn parse_collection(object: &str) -> Option<(u64, &str)> {
    let mut parts = object.split('/').skip(1);
    let number = parse_hex(parts.next()?)?;
    let what = parts.next()?;
    parts.next().is_none().then_some((number, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_entries_list_before_older_ones_and_names_come_back() {
        let line = LineName::new("acme", "vm-1").unwrap();
        assert!(line.entry(2) < line.entry(1) && line.entry(300) < line.entry(255));
        assert_eq!(line.entry(1), "lines/acme/vm-1/fffffffffffffffe");
        assert_eq!(parse_entry(&line.entry(300)), Some((line.clone(), 300)));
        assert_eq!(parse_key(&key("acme", 5, "first")), Some((5, "first")));
        assert_eq!(parse_collection(&collection(9, "tombs")), Some((9, "tombs")));
        let lease = Duration::from_secs(600);
        let object = pin(&line, 300, lease, [1; 8]);
        assert_eq!(parse_pin(&object), Some((line.clone(), 300, lease)));
        assert!(object.starts_with(&pins_of(&line)) && parse_entry(&object).is_none());
        assert_eq!(parse_pin(&line.entry(300)), None);
        let id = ObjectId::of(b"x");
        assert_eq!(ObjectId::parse(&id.pack()), Some(id));
        for foreign in ["lines/acme/vm-1/1", "lines/acme", "lines/a/b/c/fffffffffffffffe", "x"] {
            assert_eq!(parse_entry(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn names_that_would_leave_their_folder_are_refused() {
        for bad in ["", ".", "..", ".x", "a/b", "a\\b", "a b", "ä", &"x".repeat(65), "a\0"] {
            assert!(LineName::new(bad, "x").is_err(), "{bad}");
            assert!(LineName::new("x", bad).is_err(), "{bad}");
        }
        assert!(LineName::parse("acme").is_err());
        assert!(LineName::parse("acme/vm").is_ok());
    }
}
