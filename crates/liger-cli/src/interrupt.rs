//! Ctrl-C: the first asks the work to finish its step, the second ends the program.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The work stopped because the user asked.
#[derive(Debug)]
pub struct Interrupted(pub String);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "interrupted: {}", self.0)
    }
}

impl std::error::Error for Interrupted {}

/// `timeout` and the like signal the process and then its group: what comes so soon after the first is the same wish.
const SAME: Duration = Duration::from_secs(1);

/// A flag that Ctrl-C sets.
pub fn flag() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let seen = flag.clone();
    let mut first = None;
    ctrlc::set_handler(move || {
        let first = *first.get_or_insert_with(Instant::now);
        if !seen.swap(true, Ordering::Relaxed) {
            eprintln!("\nfinishing the step; press Ctrl-C again to end at once");
        } else if first.elapsed() > SAME {
            std::process::exit(i32::from(crate::INTERRUPTED));
        }
    })?;
    Ok(flag)
}
