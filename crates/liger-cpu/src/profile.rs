//! Where the time goes, operation by operation.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Runs and time by operation, while a profile is taken.
#[derive(Default)]
pub(crate) struct Profile {
    is_on: AtomicBool,
    spent: Mutex<HashMap<&'static str, (usize, Duration)>>,
}

impl Profile {
    pub(crate) fn start(&self) {
        self.spent.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.is_on.store(true, Relaxed);
    }

    /// Name, number of runs and milliseconds, longest first.
    pub(crate) fn finish(&self) -> Vec<(String, usize, f64)> {
        self.is_on.store(false, Relaxed);
        let spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut list: Vec<_> =
            spent.iter().map(|(name, (runs, time))| ((*name).to_owned(), *runs, time.as_secs_f64() * 1e3)).collect();
        list.sort_by(|a, b| b.2.total_cmp(&a.2));
        list
    }

    /// Does the work of an operation.
    pub(crate) fn time<T>(&self, name: &'static str, work: impl FnOnce() -> T) -> T {
        if !self.is_on.load(Relaxed) {
            return work();
        }
        let start = Instant::now();
        let out = work();
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let (runs, time) = spent.entry(name).or_default();
        (*runs, *time) = (*runs + 1, *time + start.elapsed());
        out
    }
}
