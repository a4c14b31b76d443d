//! Writing a model as a Hugging Face folder.

use std::borrow::Cow;
use std::path::Path;

use half::bf16;
use liger_tensor::{DType, Gemm, Ops, Tensor};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::Checkpoint;
use crate::adapter::{Adapter, Target};
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::files;

/// How `config.json` says what the model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaveFormat {
    /// The base model's `model_type` and a `liger` object.
    Liger,
    /// The authors' `model_type`, for their code.
    Authors,
}

/// Elements of one tensor, made when the file asks for them, so that one is in memory at a time.
struct Lazy<'a> {
    tensor: &'a Tensor,
    dtype: DType,
    /// Low-rank product to add: B, A and its scale.
    fused: Option<(&'a Tensor, &'a Tensor, f32)>,
    /// What the file holds less.
    offset: f32,
    ops: &'a dyn Ops,
    failed: &'a std::cell::RefCell<Option<liger_tensor::Error>>,
}

impl Lazy<'_> {
    fn values(&self) -> liger_tensor::Result<Vec<f32>> {
        let mut values = self.ops.download(self.tensor)?;
        if let Some((b, a, scale)) = self.fused {
            let mut sum = self.ops.upload(values, self.tensor.shape(), DType::F32)?;
            self.ops.gemm(&mut sum, b, a, Gemm::INPUT_GRADIENT.accumulated().scaled(scale))?;
            values = self.ops.download(&sum)?;
        }
        if self.offset != 0.0 {
            values.iter_mut().for_each(|x| *x -= self.offset);
        }
        Ok(values)
    }
}

impl safetensors::View for &Lazy<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            DType::F32 => Dtype::F32,
            _ => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.values().unwrap_or_else(|error| {
            *self.failed.borrow_mut() = Some(error);
            vec![0.0; self.tensor.len()]
        });
        Cow::Owned(match self.dtype {
            DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            _ => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        })
    }

    fn data_len(&self) -> usize {
        self.tensor.len() * if self.dtype == DType::F32 { 4 } else { 2 }
    }
}

/// Writes `decoder`, with `adapter` merged into its weights, to a folder, with the tokenizer and the unknown fields of
/// `origin`. Matrices are written in `dtype` (float32, or else bfloat16), norms and biases in float32 if it is that, else in bfloat16 too.
/// `config.json` is written last: a folder that has one is complete.
///
/// # Errors
/// [`Error::Io`] if the disk is full or the folder cannot be written; [`Error::Refused`] if the format cannot express
/// the model.
pub fn save_model(
    folder: &Path,
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    origin: &Checkpoint,
    dtype: DType,
    format: SaveFormat,
) -> Result<()> {
    let config = decoder.config();
    let mut object = origin.config_json.clone();
    config.write_liger(&mut object);
    let name = match dtype {
        DType::F32 => "float32",
        _ => "bfloat16",
    };
    object.remove("torch_dtype");
    object.insert("dtype".into(), json!(name));
    object.insert("tie_word_embeddings".into(), json!(config.tie_word_embeddings));
    object.insert("model_type".into(), json!(config.family.name()));
    if format == SaveFormat::Authors {
        object.insert("model_type".into(), json!(config.authors_model_type()?));
        object.remove("liger");
    }

    let failed = std::cell::RefCell::new(None);
    let ops = decoder.ops();
    let lazy: Vec<(String, Lazy<'_>)> = decoder
        .weights()
        .named()
        .into_iter()
        .map(|(name, tensor)| {
            let fused = adapter.and_then(|adapter| fused(adapter, &name));
            // Vectors that are no biases are norms.
            let is_norm = tensor.shape().len() == 1 && !name.ends_with(".bias");
            let offset = if is_norm { config.family.norm_offset() } else { 0.0 };
            (name, Lazy { tensor, dtype, fused, offset, ops, failed: &failed })
        })
        .collect();
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let path = folder.join("model.safetensors");
    let temporary = files::temporary_name(&path);
    let views = lazy.iter().map(|(name, lazy)| (name, lazy));
    let written = safetensors::serialize_to_file(views, Some(metadata), &temporary);
    let finish = || -> std::io::Result<()> {
        std::fs::File::open(&temporary)?.sync_all()?;
        std::fs::rename(&temporary, &path)
    };
    let outcome = match (written, failed.take()) {
        (_, Some(error)) => Err(error.into()),
        (Err(safetensors::SafeTensorError::IoError(source)), _) => {
            Err(Error::Io { path: path.clone(), doing: "write", source })
        }
        (Err(error), _) => Err(Error::corrupt(&path, error.to_string())),
        (Ok(()), None) => finish().map_err(|source| Error::Io { path: path.clone(), doing: "write", source }),
    };
    if outcome.is_err() {
        let _ = std::fs::remove_file(&temporary);
        return outcome;
    }
    origin.tokenizer.save(folder)?;
    files::write_whole(&folder.join("config.json"), format!("{:#}\n", Value::Object(object)).as_bytes())
}

/// The low-rank product that belongs to a weight.
fn fused<'a>(adapter: &'a Adapter, name: &str) -> Option<(&'a Tensor, &'a Tensor, f32)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let target = Target::from_name(rest.strip_prefix("self_attn.")?.strip_suffix(".weight")?)?;
    let lora = adapter.layers.get(layer.parse::<usize>().ok()?)?[target as usize].as_ref()?;
    Some((&lora.b, &lora.a, adapter.config.scale()))
}
