//! The `drafter` command as a person types it: what it printed and how it ended.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// What a command said.
#[derive(Clone, Debug)]
pub struct Said {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Said {
    /// Wants success.
    #[track_caller]
    pub fn succeeds(&self) {
        assert_eq!(self.code, Some(0), "{self:?}");
    }

    /// The document that `--json` prints.
    #[track_caller]
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        self.succeeds();
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// Wants a failure whose message holds each of `words`: the reason, in words for people.
    #[track_caller]
    pub fn fails_with(&self, words: &[&str]) {
        assert!(self.code.is_some_and(|code| code != 0), "it should have failed: {self:?}");
        for word in words {
            assert!(self.err.contains(word), "no \"{word}\" in: {}", self.err);
        }
        assert!(!self.err.contains("panicked"), "{}", self.err);
    }
}

/// Runs a command to its end, for at most `limit`.
#[track_caller]
pub fn say(command: &mut Command, limit: Duration) -> Said {
    let folder = tempfile::tempdir().unwrap();
    let (out, err) = (folder.path().join("out"), folder.path().join("err"));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(fs::File::create(&out).unwrap())
        .stderr(fs::File::create(&err).unwrap())
        .spawn()
        .unwrap();
    let code = end(&mut child, limit);
    let text = |path| String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
    let said = Said { code: code.unwrap_or(None), out: text(&out), err: text(&err) };
    assert!(code.is_some(), "{command:?} did not end within {limit:?}: {said:?}");
    said
}

/// Waits for a process; kills it at the deadline and returns `None`.
fn end(child: &mut Child, limit: Duration) -> Option<Option<i32>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status.code());
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
