//! A file of `liger eval --out`, and the page made of it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use liger_eval::{EvaluationRun, comparison};

fuzz_target!(|text: &str| {
    if let Ok(run) = EvaluationRun::parse(text, "fuzz.json".as_ref()) {
        let _ = comparison(&[run], &[]);
    }
});
