//! The head of a GGUF file, and the tokenizer in its metadata.
#![no_main]

use libfuzzer_sys::fuzz_target;
use liger_model::Tokenizer;
use liger_model::checkpoint::gguf::Directory;

fuzz_target!(|data: &[u8]| {
    if let Ok(directory) = Directory::read(data, data.len() as u64, "fuzz.gguf".as_ref()) {
        let _ = Tokenizer::from_gguf(&directory.metadata, "fuzz.gguf".as_ref());
    }
});
