//! `tokenizer.json` and `tokenizer_config.json` rebuilt from a GGUF file's metadata.
//!
//! Two kinds: byte-level BPE ("gpt2"), whose merges are listed and whose pre-tokenizer is named, and SentencePiece BPE
//! ("llama"), whose merges follow from the scores of the pieces.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoint::gguf::MetadataValue;
use crate::error::{Error, Result};

struct Metadata<'a> {
    values: &'a HashMap<String, MetadataValue>,
    path: &'a Path,
}

const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

impl Metadata<'_> {
    fn get(&self, key: &str) -> Option<&MetadataValue> {
        self.values.get(&format!("tokenizer.{key}"))
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(MetadataValue::as_text)
    }

    fn flag(&self, key: &str, otherwise: bool) -> bool {
        match self.get(key) {
            Some(MetadataValue::Bool(flag)) => *flag,
            _ => otherwise,
        }
    }

    fn list<'b, T>(&'b self, key: &str, read: impl Fn(&'b MetadataValue) -> Option<T>) -> Result<Vec<T>> {
        let wrong = |found: &str| Error::field(self.path, &format!("tokenizer.{key}"), found, "a list");
        let Some(MetadataValue::Array(list)) = self.get(key) else {
            return Err(wrong("nothing"));
        };
        list.iter().map(|v| read(v).ok_or_else(|| wrong("an element of another type"))).collect()
    }

    fn token(&self, name: &str, tokens: &[&str]) -> Option<(usize, String)> {
        let id = self.get(&format!("ggml.{name}_token_id")).and_then(MetadataValue::as_u64)? as usize;
        tokens.get(id).map(|token| (id, (*token).to_owned()))
    }
}

pub(super) fn rebuild(values: &HashMap<String, MetadataValue>, path: &Path) -> Result<(Value, Map<String, Value>)> {
    let m = Metadata { values, path };
    let tokens = m.list("ggml.tokens", MetadataValue::as_text)?;
    let types = match m.get("ggml.token_type") {
        Some(_) => m.list("ggml.token_type", MetadataValue::as_u64)?,
        None => vec![NORMAL; tokens.len()],
    };
    let kind = m.text("ggml.model").unwrap_or("nothing");
    let (model, front) = match kind {
        "gpt2" => (byte_level_model(&m, &tokens)?, byte_level_front(&m)?),
        "llama" => (sentencepiece_model(&m, &tokens)?, sentencepiece_front(&m)),
        other => {
            let key = "tokenizer.ggml.model";
            return Err(Error::field(
                path,
                key,
                format!("`{other}`"),
                "gpt2 (byte-level BPE) or llama (SentencePiece)",
            ));
        }
    };
    let mut added = Vec::new();
    for (id, (token, kind)) in tokens.iter().zip(&types).enumerate() {
        let special = matches!(*kind, CONTROL | UNKNOWN);
        if special || *kind == USER_DEFINED {
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            }));
        }
    }
    let bos = m.token("bos", &tokens);
    let add_bos = m.flag("ggml.add_bos_token", kind == "llama");
    let post_processor = match (&bos, add_bos) {
        (Some((id, token)), true) => json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
        }),
        _ => Value::Null,
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": front.normalizer, "pre_tokenizer": front.pre_tokenizer,
        "post_processor": post_processor, "decoder": front.decoder, "model": model,
    });

    let mut config = Map::new();
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    config.insert("add_bos_token".into(), json!(add_bos));
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    for (field, name) in
        [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        if let Some((_, token)) = m.token(name, &tokens) {
            config.insert(field.into(), json!(token));
        }
    }
    if let Some(template) = m.text("chat_template") {
        config.insert("chat_template".into(), json!(template));
    }
    Ok((tokenizer, config))
}

/// What comes before and after the merges.
struct Front {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
}

fn vocabulary(tokens: &[&str]) -> Map<String, Value> {
    tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect()
}

fn byte_level_model(m: &Metadata<'_>, tokens: &[&str]) -> Result<Value> {
    let merges = m.list("ggml.merges", MetadataValue::as_text)?;
    let mut pairs = Vec::with_capacity(merges.len());
    for merge in merges {
        let Some((left, right)) = merge.split_once(' ') else {
            return Err(Error::field(m.path, "tokenizer.ggml.merges", format!("`{merge}`"), "two pieces and a space"));
        };
        pairs.push(json!([left, right]));
    }
    let ignore_merges = m.text("ggml.pre") == Some("llama-bpe");
    Ok(json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
        "vocab": vocabulary(tokens), "merges": pairs,
    }))
}

/// The words of Llama 3 and Qwen2, which differ in how many digits go together.
fn words(digits: &str) -> String {
    format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}

fn byte_level_front(m: &Metadata<'_>) -> Result<Front> {
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |pattern: String| {
        let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
    };
    let (normalizer, pre_tokenizer) = match m.text("ggml.pre").unwrap_or("gpt-2") {
        "gpt-2" | "default" => (Value::Null, byte_level(true)),
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            (Value::Null, json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]}))
        }
        "llama-bpe" => (Value::Null, split(words(r"\p{N}{1,3}"))),
        "qwen2" => (json!({"type": "NFC"}), split(words(r"\p{N}"))),
        other => {
            let known = "gpt-2, smollm, llama-bpe or qwen2";
            return Err(Error::field(m.path, "tokenizer.ggml.pre", format!("`{other}`"), known));
        }
    };
    Ok(Front { normalizer, pre_tokenizer, decoder: byte_level(true) })
}

/// SentencePiece merges the pair whose joined piece has the best score. As a list of merges, that is: for every piece,
/// each way to cut it into two pieces, ordered by the piece's score.
fn sentencepiece_model(m: &Metadata<'_>, tokens: &[&str]) -> Result<Value> {
    let scores = m.list("ggml.scores", MetadataValue::as_f64)?;
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
    let mut merges = Vec::new();
    for (id, (token, score)) in tokens.iter().zip(&scores).enumerate() {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                merges.push((*score, id, *l, *r, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    let pairs: Vec<_> = merges.iter().map(|m| json!([m.4, m.5])).collect();
    let unknown = m.token("unknown", tokens).map(|(_, token)| token);
    Ok(json!({
        "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
        "vocab": vocabulary(tokens), "merges": pairs,
    }))
}

fn sentencepiece_front(m: &Metadata<'_>) -> Front {
    let prefix = m.flag("ggml.add_space_prefix", true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let mut normalizers = vec![replace];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Front {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
    }
}
