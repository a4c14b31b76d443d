//! What the server counts, in Prometheus's text form.

use std::fmt::Write;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bounds of the histograms, in seconds.
const BOUNDS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// Durations by size.
#[derive(Default)]
pub(crate) struct Histogram {
    counts: [AtomicU64; BOUNDS.len() + 1],
    microseconds: AtomicU64,
}

impl Histogram {
    pub(crate) fn add(&self, duration: Duration) {
        let place = BOUNDS.iter().position(|&bound| duration.as_secs_f64() <= bound).unwrap_or(BOUNDS.len());
        self.counts[place].fetch_add(1, Ordering::Relaxed);
        self.microseconds.fetch_add(duration.as_micros() as u64, Ordering::Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut total = 0;
        for (count, bound) in
            self.counts.iter().zip(BOUNDS.map(|bound| bound.to_string()).iter().chain([&"+Inf".to_owned()]))
        {
            total += count.load(Ordering::Relaxed);
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {total}");
        }
        let sum = self.microseconds.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(out, "{name}_sum {sum}\n{name}_count {total}");
    }
}

/// Counted by the handlers and the engine.
#[derive(Default)]
pub(crate) struct Metrics {
    pub(crate) requests: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) cached_tokens: AtomicU64,
    pub(crate) written_tokens: AtomicU64,
    pub(crate) slots: AtomicU64,
    pub(crate) slots_in_use: AtomicU64,
    pub(crate) waiting: AtomicU64,
    pub(crate) state_bytes: AtomicU64,
    pub(crate) first_token: Histogram,
    pub(crate) between_tokens: Histogram,
    rate: Mutex<Option<(Instant, u64, f64)>>,
}

impl Metrics {
    pub(crate) fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Tokens written a second, over the time since this was last asked, a second at least.
    pub(crate) fn tokens_per_second(&self) -> f64 {
        let written = self.written_tokens.load(Ordering::Relaxed);
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, before, last) = rate.unwrap_or((Instant::now(), written, 0.0));
        let seconds = since.elapsed().as_secs_f64();
        let now = if seconds >= 1.0 {
            (Instant::now(), written, written.saturating_sub(before) as f64 / seconds)
        } else {
            (since, before, last)
        };
        *rate = Some(now);
        now.2
    }

    /// The page of `/metrics`.
    pub(crate) fn page(&self) -> String {
        let counters = [
            ("liger_requests_total", "Texts asked for.", &self.requests),
            ("liger_refused_total", "Texts refused because too many wait.", &self.refused),
            ("liger_failed_total", "Texts that could not be written.", &self.failed),
            ("liger_prompt_tokens_total", "Tokens of prompts.", &self.prompt_tokens),
            ("liger_cached_tokens_total", "Of those, not read again.", &self.cached_tokens),
            ("liger_written_tokens_total", "Tokens written.", &self.written_tokens),
        ];
        let gauges = [
            ("liger_slots", "Texts that can be written side by side.", &self.slots),
            ("liger_slots_in_use", "Texts at work.", &self.slots_in_use),
            ("liger_waiting", "Texts that wait for a slot.", &self.waiting),
            ("liger_state_bytes", "Memory of states, taken at the start.", &self.state_bytes),
        ];
        let mut out = String::new();
        for (kind, list) in [("counter", &counters[..]), ("gauge", &gauges[..])] {
            for (name, help, value) in list {
                let value = value.load(Ordering::Relaxed);
                let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
            }
        }
        self.first_token.write(&mut out, "liger_first_token_seconds", "From request to first token.");
        self.between_tokens.write(&mut out, "liger_between_tokens_seconds", "From token to token of a text.");
        out
    }
}
