//! Capabilities that a test could not use, by name, so that a run which skipped something says so.
//!
//! `make test` names a file in `ARCHITECT_MISSING`, prints what gathered there after the tests,
//! and a test that lacks something appends one line instead of passing in silence. Without the
//! variable the note goes to standard error only.

use std::{fs::OpenOptions, io::Write};

/// The environment variable that names the file.
pub const VARIABLE: &str = "ARCHITECT_MISSING";

/// Notes that `capability` is not there, and `why`, with what to do about it.
pub fn note(capability: &str, why: &str) {
    let line = format!("{capability}: {}\n", why.replace('\n', " "));
    eprint!("missing capability: {line}");
    let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) else { return };
    // One write of one line, so that tests in parallel do not mix theirs.
    let written = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .and_then(|mut file| file.write_all(line.as_bytes()));
    if let Err(error) = written {
        eprintln!("cannot note it in {}: {error}", path.display());
    }
}
