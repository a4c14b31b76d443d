//! Tokenizers rebuilt from GGUF metadata against Python's on 200 strings; see `tests/tokenizers/make.py`, also for the
//! step that cuts digits apart, which `transformers` leaves out when it reads a GGUF file.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use liger_model::Tokenizer;
use liger_model::checkpoint::gguf::Directory;
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    text: String,
    smollm2: Vec<u32>,
    mistral: Option<Vec<u32>>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/tokenizers")
}

fn tokenizer(name: &str) -> Tokenizer {
    let path = folder().join(format!("{name}.gguf.zst"));
    let bytes = zstd::decode_all(std::fs::File::open(&path).unwrap()).unwrap();
    let directory = Directory::read(&bytes[..], bytes.len() as u64, &path).unwrap();
    Tokenizer::from_gguf(&directory.metadata, &path).unwrap()
}

fn cases() -> Vec<Case> {
    let cases: Vec<Case> =
        serde_json::from_str(&std::fs::read_to_string(folder().join("strings.json")).unwrap()).unwrap();
    assert_eq!(cases.len(), 200);
    cases
}

#[test]
fn smollm2_equals_python() {
    let tokenizer = tokenizer("smollm2");
    for case in cases() {
        assert_eq!(tokenizer.encode(&case.text, true).unwrap(), case.smollm2, "{:?}", case.text);
        assert_eq!(tokenizer.decode(&case.smollm2, false).unwrap(), case.text);
    }
    let chat = tokenizer.chat.as_ref().unwrap();
    let text = chat.render(&[liger_model::Message::new("user", "Hi")], true).unwrap();
    assert!(text.starts_with("<|im_start|>system\nYou are a helpful AI assistant named SmolLM"), "{text}");
    assert!(text.ends_with("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"), "{text}");
}

#[test]
fn mistral_equals_sentencepiece() {
    let tokenizer = tokenizer("mistral");
    let mut compared = 0;
    for case in cases() {
        let Some(expected) = case.mistral else { continue };
        assert_eq!(tokenizer.encode(&case.text, false).unwrap(), expected, "{:?}", case.text);
        let whole = tokenizer.encode(&case.text, true).unwrap();
        assert_eq!((whole[0], &whole[1..]), (1, &expected[..]), "a first token where the model wants one");
        compared += 1;
    }
    assert!(compared >= 195, "{compared}");
}

#[test]
fn a_saved_tokenizer_is_the_same() {
    let tokenizer = tokenizer("smollm2");
    let folder = tempfile::tempdir().unwrap();
    tokenizer.save(folder.path()).unwrap();
    let again = Tokenizer::from_folder(folder.path()).unwrap();
    for case in cases() {
        assert_eq!(again.encode(&case.text, true).unwrap(), case.smollm2);
    }
    let chat = |t: &Tokenizer| t.chat.as_ref().unwrap().source().to_owned();
    assert_eq!(chat(&again), chat(&tokenizer));
}

/// Text comes out of a stream as it does all at once, whole characters only.
#[test]
fn streams_of_tokens_give_the_text() {
    let mut compared = 0;
    for name in ["smollm2", "mistral"] {
        let tokenizer = tokenizer(name);
        for case in cases() {
            let ids = tokenizer.encode(&case.text, false).unwrap();
            let (prompt, rest) = ids.split_at(ids.len() / 2);
            let before = tokenizer.decode(prompt, true).unwrap();
            if before.contains('\u{fffd}') {
                continue; // the prompt ends inside a character
            }
            let mut stream = liger_model::TextStream::new(&tokenizer, prompt);
            let text: String = rest.iter().map(|&id| stream.push(id).unwrap()).collect();
            let whole = tokenizer.decode(&ids, true).unwrap();
            assert!(
                whole.ends_with(&text) && whole.len() <= before.len() + text.len() + 1,
                "{name}: {text:?} of {whole:?}"
            );
            compared += 1;
        }
    }
    assert!(compared > 350, "{compared}");
}
