//! What is wrong with a config file, and where.

use super::values::SECRET_REFUSED;
use std::{
    fmt, io,
    ops::Range,
    path::{Path, PathBuf},
};
use toml::de::{DeTable, DeValue};

/// Why a config file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// It cannot be read.
    #[error("could not read {}: {source}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It says something that is not understood or cannot be.
    #[error("{}", lines(.0))]
    Wrong(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// One thing that is wrong, for people.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// The file, if there is one.
    path: Option<PathBuf>,
    /// Line and column, from 1.
    place: Option<(usize, usize)>,
    /// What is wrong there, and what to do.
    message: String,
    /// The line, unless it may hold a secret.
    source: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(path) = &self.path else { return f.write_str(&self.message) };
        write!(f, "{}:", path.display())?;
        let Some((line, column)) = self.place else { return write!(f, " {}", self.message) };
        write!(f, "{line}:{column}: {}", self.message)?;
        let Some(source) = &self.source else { return Ok(()) };
        let marker = " ".repeat(column - 1);
        write!(f, "\n  {line:>4} | {source}\n       | {marker}^")
    }
}

/// Something that [`check`](super::check) found: keys from the root of the file, and a message.
pub(super) struct Finding {
    /// Keys down to the value.
    pub(super) keys: Vec<String>,
    /// What is wrong, and what to do.
    pub(super) message: String,
}

/// The parser's error.
pub(super) fn of_parser(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let message = error.message();
    let (place, source) = match error.span() {
        Some(span) => {
            let (place, source) = position(text, &span);
            let secret = may_hold_a_secret(&source, message);
            (Some(place), (!secret).then_some(source))
        }
        None => (None, None),
    };
    let message = suggestion(message).unwrap_or_else(|| message.trim_end().to_owned());
    ConfigError::Wrong(vec![Problem { path: Some(path.to_owned()), place, message, source }])
}

/// Whether a line is better not shown: errors end up in logs and in questions, and a secret that is
/// written where it does not belong often stands at a key that is misspelt.
fn may_hold_a_secret(line: &str, message: &str) -> bool {
    let line = line.to_ascii_lowercase();
    message.contains(SECRET_REFUSED)
        || message.contains("expected `env` or `file`")
        || ["key", "secret", "token", "passw", "credential", "@"]
            .iter()
            .any(|word| line.contains(word))
}

/// What the checks found, in the order of the file.
pub(super) fn of_checks(path: &Path, text: &str, findings: Vec<Finding>) -> ConfigError {
    let table = DeTable::parse(text).ok();
    let mut problems: Vec<Problem> = findings
        .into_iter()
        .map(|Finding { keys, message }| {
            let span = table.as_ref().and_then(|table| span_of(table.get_ref(), &keys));
            let place = span.map(|span| position(text, &span).0);
            let message = format!("{}: {message}", keys.join("."));
            Problem { path: Some(path.to_owned()), place, message, source: None }
        })
        .collect();
    problems.sort_by_key(|problem| problem.place);
    ConfigError::Wrong(problems)
}

/// What the checks found in flags: there is no file, and no place in it.
pub(super) fn of_flags(findings: Vec<Finding>) -> ConfigError {
    let problems = findings.into_iter().map(|Finding { keys, message }| {
        let key = keys.last().map_or("", String::as_str);
        Problem { path: None, place: None, message: format!("{key}: {message}"), source: None }
    });
    ConfigError::Wrong(problems.collect())
}

/// Where a value stands, or the last of its parents that is there.
fn span_of(table: &DeTable<'_>, keys: &[String]) -> Option<Range<usize>> {
    let (first, rest) = keys.split_first()?;
    let (key, value) = table.iter().find(|(key, _)| key.get_ref() == first)?;
    let deeper = match value.get_ref() {
        DeValue::Table(inner) => span_of(inner, rest),
        _ => None,
    };
    deeper.or_else(|| Some(key.span()))
}

/// Line and column of a span's beginning, and the line.
fn position(text: &str, span: &Range<usize>) -> ((usize, usize), String) {
    let mut at = span.start.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    let before = &text[..at];
    let begin = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = before.matches('\n').count() + 1;
    let column = before[begin..].chars().count() + 1;
    let source = text[begin..].lines().next().unwrap_or_default().to_owned();
    ((line, column), source)
}

/// What serde and the parser say of unknown names, in our words, with the nearest name.
fn suggestion(message: &str) -> Option<String> {
    let (what, name, known) = unknown_name(message)?;
    let hint = match nearest(name, &known) {
        Some(meant) => format!("did you mean \"{meant}\"?"),
        None if known.is_empty() => "there is none here".to_owned(),
        None => format!("there are {}", known.join(", ")),
    };
    Some(format!("unknown {what} \"{name}\"; {hint}"))
}

/// Serde says "unknown field `x`, expected one of `a`, `b`", of variants the same, and toml of the
/// keys of a variant "unexpected keys in table: x, available keys: a, b".
fn unknown_name(message: &str) -> Option<(&'static str, &str, Vec<&str>)> {
    if let Some(rest) = message.strip_prefix("unexpected keys in table: ") {
        let (names, known) = rest.split_once(", available keys: ")?;
        return Some(("key", names.split(", ").next()?, known.trim_end().split(", ").collect()));
    }
    let (what, rest) = match message.strip_prefix("unknown field `") {
        Some(rest) => ("key", rest),
        None => ("choice", message.strip_prefix("unknown variant `")?),
    };
    let (name, rest) = rest.split_once('`')?;
    Some((what, name, rest.split('`').skip(1).step_by(2).collect()))
}

/// The name that was perhaps meant.
pub(super) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    // Underscores for dashes are not a mistake of spelling.
    let plain = name.replace('_', "-").to_ascii_lowercase();
    known
        .iter()
        .map(|&candidate| (strsim::jaro_winkler(&plain, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|one, two| one.0.total_cmp(&two.0))
        .map(|(_, candidate)| candidate)
}
