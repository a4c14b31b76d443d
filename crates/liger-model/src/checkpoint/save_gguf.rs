//! Writing a model as one GGUF file with packed weights, in this program's own form: architecture `liger`, the whole
//! `config.json` and the tokenizer's files as texts, tensors under ggml's names. See docs/formats.md.

use std::io::{BufWriter, Write};
use std::path::Path;

use liger_tensor::quantize::{BLOCK, quantize};
use liger_tensor::{DType, Tensor};
use serde_json::Value;

use super::Checkpoint;
use super::gguf::ALIGNMENT;
use super::gguf_blocks::BlockType;
use super::gguf_model::{ARCHITECTURE, CONFIG, TOKENIZER, TOKENIZER_CONFIG, ggml_name};
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::files;

/// Metadata types of the format.
const TEXT: u32 = 8;
const UNSIGNED: u32 = 4;

/// Writes `decoder` to a file, with the tokenizer and the unknown fields of `origin`: matrices in `dtype`, which is one of the
/// quantised types, norms and biases in float32.
///
/// # Errors
/// [`Error::Refused`] if a matrix is not as wide as a number of whole blocks; [`Error::Io`] if the disk is full or the file
/// cannot be written, and then an older file of that name stays.
pub fn save_gguf(path: &Path, decoder: &Decoder, origin: &Checkpoint, dtype: DType) -> Result<()> {
    let config = decoder.config();
    let mut object = origin.config_json.clone();
    config.write_liger(&mut object);
    object.insert("tie_word_embeddings".into(), Value::Bool(config.tie_word_embeddings));
    object.insert("model_type".into(), Value::String(config.family.name().into()));

    let mut tensors: Vec<(String, &Tensor, BlockType)> = Vec::new();
    for (name, tensor) in decoder.weights().named() {
        let ggml =
            ggml_name(&name, config.family).ok_or_else(|| Error::Refused(format!("GGUF has no name for `{name}`")))?;
        let block = match (tensor.shape().len(), dtype) {
            (2, DType::Q8_0) => BlockType::Q8_0,
            (2, DType::Q4_1) => BlockType::Q4_1,
            _ => BlockType::F32,
        };
        if block != BlockType::F32 && !tensor.dim(1).is_multiple_of(BLOCK) {
            let (found, name) = (tensor.dim(1), dtype.name());
            return Err(Error::Refused(format!("`{ggml}` has rows of {found}: {name} needs a multiple of {BLOCK}")));
        }
        tensors.push((ggml, tensor, block));
    }

    let mut texts =
        vec![("general.architecture", ARCHITECTURE.to_owned()), (CONFIG, Value::Object(object).to_string())];
    if let Some([json, tokenizer_config, template]) = origin.tokenizer.texts() {
        texts.extend([(TOKENIZER, json), (TOKENIZER_CONFIG, tokenizer_config)]);
        texts.extend((!template.is_empty()).then_some(("tokenizer.chat_template", template)));
    }
    let mut head = Vec::new();
    head.extend(b"GGUF");
    head.extend(3u32.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((texts.len() as u64 + 1).to_le_bytes());
    for (key, text) in texts {
        put_text(&mut head, key);
        head.extend(TEXT.to_le_bytes());
        put_text(&mut head, &text);
    }
    put_text(&mut head, "general.quantization_version");
    head.extend(UNSIGNED.to_le_bytes());
    head.extend(2u32.to_le_bytes());
    let mut offset = 0u64;
    for (name, tensor, block) in &tensors {
        put_text(&mut head, name);
        head.extend((tensor.shape().len() as u32).to_le_bytes());
        tensor.shape().iter().rev().for_each(|&length| head.extend((length as u64).to_le_bytes()));
        head.extend(block.id().to_le_bytes());
        head.extend(offset.to_le_bytes());
        offset += block.bytes(tensor.len() as u64).unwrap_or(0).next_multiple_of(ALIGNMENT);
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT as usize), 0);

    let mut failed = None;
    files::write_with(path, |file| {
        let mut out = BufWriter::new(file);
        out.write_all(&head)?;
        for (_, tensor, block) in &tensors {
            let values = match decoder.ops().download(tensor) {
                Ok(values) => values,
                Err(error) => {
                    failed = Some(error);
                    return Err(std::io::Error::other("the weights cannot be read"));
                }
            };
            let mut bytes = match block {
                BlockType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                _ => quantize(&values, dtype),
            };
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
            out.write_all(&bytes)?;
        }
        out.flush()
    })
    .map_err(|error| failed.map_or(error, Error::from))
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
