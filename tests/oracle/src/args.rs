//! `--name value` words of the command line.

use std::{collections::BTreeMap, str::FromStr};

/// Options that stand alone.
const FLAGS: &[&str] = &["background"];

/// The options of one command; each is taken once, and what nobody took is an error.
pub(crate) struct Args(BTreeMap<String, String>);

impl Args {
    pub(crate) fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = BTreeMap::new();
        while let Some(word) = words.next() {
            let Some(name) = word.strip_prefix("--") else {
                return Err(format!("\"{word}\" is not an option; see oracle --help"));
            };
            let value = if FLAGS.contains(&name) {
                String::new()
            } else {
                words.next().ok_or_else(|| format!("--{name} needs a value"))?
            };
            if options.insert(name.to_owned(), value).is_some() {
                return Err(format!("--{name} is given twice"));
            }
        }
        Ok(Self(options))
    }

    pub(crate) fn flag(&mut self, name: &str) -> bool {
        self.0.remove(name).is_some()
    }

    pub(crate) fn optional<T: FromStr>(&mut self, name: &str) -> Result<Option<T>, String> {
        let Some(value) = self.0.remove(name) else { return Ok(None) };
        value.parse().map(Some).map_err(|_| format!("--{name} {value}: not a value for this"))
    }

    pub(crate) fn or<T: FromStr>(&mut self, name: &str, default: T) -> Result<T, String> {
        Ok(self.optional(name)?.unwrap_or(default))
    }

    pub(crate) fn required<T: FromStr>(&mut self, name: &str) -> Result<T, String> {
        self.optional(name)?.ok_or_else(|| format!("--{name} is missing; see oracle --help"))
    }

    /// All options have been taken.
    pub(crate) fn end(self) -> Result<(), String> {
        match self.0.keys().next() {
            Some(name) => Err(format!("--{name} is unknown here; see oracle --help")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Result<Args, String> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_are_taken_once_and_leftovers_are_named() {
        let mut some = args("--memory-mib 64 --background --colour green").unwrap();
        assert_eq!(some.required::<usize>("memory-mib"), Ok(64));
        assert_eq!(some.or("rate-mb-s", 7u64), Ok(7));
        assert!(some.flag("background") && !some.flag("background"));
        assert!(some.end().unwrap_err().contains("--colour"));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert!(args("64").is_err());
        assert!(args("--memory-mib").is_err());
        assert!(args("--rate 1 --rate 2").is_err());
        assert!(args("--rate x").unwrap().required::<u64>("rate").is_err());
        assert!(args("").unwrap().required::<u64>("rate").is_err());
    }
}
