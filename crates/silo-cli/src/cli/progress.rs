//! How far something is: a bar with rate and time left, on a terminal only.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal};

/// A bar on stderr; nothing at all where nobody looks at it.
#[derive(Clone)]
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// A bar of bytes; a total of 0 is one that is not known yet.
    pub(crate) fn bytes(what: &'static str, total: u64, json: bool) -> Self {
        let template = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left";
        Self::new(what, total, json, template)
    }

    fn new(what: &'static str, total: u64, json: bool, template: &str) -> Self {
        let seen = !json && io::stderr().is_terminal();
        let target =
            if seen { ProgressDrawTarget::stderr_with_hz(5) } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let style = ProgressStyle::with_template(template).expect("the templates are tried");
        bar.set_style(style);
        bar.set_message(what);
        Self(bar)
    }

    /// So much is done altogether, of so much.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    /// Takes the bar away; what is printed next stands in its place.
    pub(crate) fn end(&self) {
        self.0.finish_and_clear();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_understood() {
        let progress = Progress::bytes("reading", 0, true);
        progress.set(1, 10);
        assert_eq!(progress.0.position(), 1);
    }
}
