//! Records of a JSONL file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use liger_train::data::records_from_jsonl;

fuzz_target!(|data: &[u8]| {
    let _ = records_from_jsonl(data, "fuzz.jsonl".as_ref());
});
