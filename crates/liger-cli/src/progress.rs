//! Progress with rate and time left: a bar on a terminal, plain lines elsewhere. All on standard error.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a line is printed where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

pub struct Progress {
    what: &'static str,
    unit: &'static str,
    total: u64,
    bar: Option<ProgressBar>,
    start: Instant,
    first: Option<u64>,
    last_line: Instant,
}

impl Progress {
    /// Counts `total` things, called `unit`, of the work `what`.
    pub fn new(what: &'static str, unit: &'static str, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let template =
                format!("{what:<10} {{wide_bar}} {{pos}}/{{len}} {unit}  {{per_sec}}  {{eta}} left  {{msg}}");
            bar.set_style(ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        let start = Instant::now();
        Self { what, unit, total, bar, start, first: None, last_line: start }
    }

    /// `done` of the total, with a few words.
    pub fn update(&mut self, done: u64, words: &str) {
        let first = *self.first.get_or_insert(done);
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(words.to_owned());
            return;
        }
        if self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let rate = done.saturating_sub(first) as f64 / self.start.elapsed().as_secs_f64();
            let words = if words.is_empty() { String::new() } else { format!(", {words}") };
            let left = self.total.saturating_sub(done) as f64 / rate;
            let left = if rate > 0.0 { format!(", {rate:.1}/s, {left:.0} s left") } else { String::new() };
            eprintln!("{}: {done}/{} {}{left}{words}", self.what, self.total, self.unit);
        }
    }

    /// Ends with a line that stays.
    pub fn finish(self, words: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{}: {words} ({:.0} s)", self.what, self.start.elapsed().as_secs_f64());
    }
}
