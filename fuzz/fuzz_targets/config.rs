//! `config.json`, and the frequencies that follow from it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use liger_model::ModelConfig;

fuzz_target!(|text: &str| {
    if let Ok(config) = ModelConfig::parse(text, "config.json".as_ref()) {
        let _ = config.to_json().to_string();
        if config.head_dim < 4096 {
            let _ = config.rope.frequencies(config.head_dim);
        }
    }
});
