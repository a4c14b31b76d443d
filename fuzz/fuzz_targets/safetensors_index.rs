//! `model.safetensors.index.json`, and the header of a safetensors file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use liger_model::checkpoint::{WeightMap, read_safetensors_header};

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = WeightMap::parse(text, "index.json".as_ref());
    }
    let _ = read_safetensors_header(data, "fuzz.safetensors".as_ref());
});
