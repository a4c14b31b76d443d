//! A task file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use liger_eval::Task;

fuzz_target!(|text: &str| {
    let _ = Task::parse(text, "fuzz.toml".as_ref());
});
