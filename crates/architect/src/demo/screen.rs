//! What the demonstration shows while it works: one line for each step that is done, and on a
//! terminal a line below that moves.

use crate::table::Style;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    cell::Cell,
    io::Write,
    time::{Duration, Instant},
};

/// Where nothing can move, a step that takes long says so this often.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);

/// The screen, or a file.
pub(super) struct Screen {
    style: Style,
    bar: ProgressBar,
    /// When the step began, and when a line about it was last written.
    step: Cell<(Instant, Instant)>,
}

impl Screen {
    pub(super) fn new(style: Style) -> Self {
        let bar = ProgressBar::new_spinner();
        bar.set_draw_target(match style {
            Style::Terminal => ProgressDrawTarget::stdout(),
            Style::Plain => ProgressDrawTarget::hidden(),
        });
        if let Ok(look) = ProgressStyle::with_template("{spinner:.cyan} {wide_msg}") {
            bar.set_style(look);
        }
        let now = Instant::now();
        Self { style, bar, step: Cell::new((now, now)) }
    }

    pub(super) fn style(&self) -> Style {
        self.style
    }

    /// A line that stays.
    pub(super) fn line(&self, text: &str) {
        self.bar.suspend(|| {
            // A closed pipe ends nothing: the exit status is what counts.
            let _ = writeln!(std::io::stdout(), "{text}");
        });
    }

    /// A step begins.
    pub(super) fn begin(&self, what: &str) {
        let now = Instant::now();
        self.step.set((now, now));
        self.bar.reset_elapsed();
        self.bar.enable_steady_tick(Duration::from_millis(100));
        self.bar.set_message(format!("{what} …"));
    }

    /// How far the step is.
    pub(super) fn update(&self, what: &str) {
        let (begun, told) = self.step.get();
        self.bar.set_message(what.to_owned());
        if self.style == Style::Plain && told.elapsed() >= SIGN_OF_LIFE {
            self.step.set((begun, Instant::now()));
            self.line(&format!("   … {what}"));
        }
    }

    /// The step is done.
    pub(super) fn done(&self, what: &str, detail: &str) {
        let seconds = self.step.get().0.elapsed().as_secs_f64();
        let line = match self.style {
            Style::Terminal => {
                format!(
                    "\x1b[32m✔\x1b[0m \x1b[1m{what:<16}\x1b[0m {detail}  \x1b[2m{seconds:.1} s\x1b[0m"
                )
            }
            Style::Plain => format!("ok {what:<16} {detail}  ({seconds:.1} s)"),
        };
        self.bar.disable_steady_tick();
        self.bar.set_message("");
        self.line(&line);
    }

    /// Something that deserves attention and is no failure.
    pub(super) fn note(&self, text: &str) {
        let mark = match self.style {
            Style::Terminal => "\x1b[33m!\x1b[0m",
            Style::Plain => "! ",
        };
        self.line(&format!("{mark} {text}"));
    }

    /// Nothing moves any more.
    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.end();
    }
}
