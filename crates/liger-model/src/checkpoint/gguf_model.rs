//! A GGUF file as a model: its metadata as a configuration, its tensors under Hugging Face's names.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use liger_tensor::{DType, Ops, Tensor};
use rayon::prelude::*;
use serde_json::{Map, Value};

use super::gguf::{Directory, MetadataValue, TensorEntry};
use crate::config::{Family, GEMMA_PATTERN, LOCAL_THETA, ModelConfig, RopeConfig, RopeScaling};
use crate::error::{Error, Result, io};
use crate::tokenizer::Tokenizer;
use crate::weights::{TensorSource, expected_tensors};

/// An opened file.
pub(crate) struct GgufSource {
    path: PathBuf,
    directory: Directory,
    /// llama.cpp stores the rows of q and k of the llama architecture with the halves of each head interleaved.
    permuted_heads: Option<(usize, usize)>,
    family: Family,
}

/// Architecture of this program's own files, and what they hold as texts: `config.json`, `tokenizer.json` and
/// `tokenizer_config.json`.
pub(crate) const ARCHITECTURE: &str = "liger";
/// Architectures of llama.cpp that can be read.
const FAMILIES: [(&str, Family); 4] =
    [("llama", Family::Llama), ("qwen2", Family::Qwen2), ("qwen3", Family::Qwen3), ("gemma3", Family::Gemma3)];
pub(crate) const CONFIG: &str = "liger.config";
pub(crate) const TOKENIZER: &str = "tokenizer.huggingface.json";
pub(crate) const TOKENIZER_CONFIG: &str = "liger.tokenizer_config";

pub(crate) fn open(path: &Path) -> Result<(GgufSource, ModelConfig, Map<String, Value>, Tokenizer)> {
    let file = File::open(path).map_err(io(path, "read"))?;
    let length = file.metadata().map_err(io(path, "read"))?.len();
    let directory = Directory::read(BufReader::new(file), length, path)?;
    let mut source = GgufSource { path: path.to_owned(), directory, permuted_heads: None, family: Family::Llama };
    let is_own = source.text("general.architecture") == Some(ARCHITECTURE);
    let (config, config_json, tokenizer) = if is_own { source.own()? } else { source.foreign()? };
    source.family = config.family;
    if config.family == Family::Llama && !is_own {
        source.permuted_heads = Some((config.num_heads, config.num_kv_heads));
    }
    for (name, shape) in expected_tensors(&config) {
        match source.shape(&name) {
            Some(found) if found == shape => {}
            Some(found) => {
                return Err(source.error(format!("tensor of `{name}` has shape {found:?}, not {shape:?}")));
            }
            None => return Err(source.error(format!("the tensor of `{name}` is missing"))),
        }
    }
    Ok((source, config, config_json, tokenizer))
}

type Described = (ModelConfig, Map<String, Value>, Tokenizer);

impl GgufSource {
    fn value(&self, key: &str) -> Option<&MetadataValue> {
        self.directory.metadata.get(key)
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.value(key).and_then(MetadataValue::as_text)
    }

    /// Of a file that [`save_gguf`](super::save_gguf) wrote.
    fn own(&self) -> Result<Described> {
        let required = |key: &str| self.text(key).ok_or_else(|| Error::field(&self.path, key, "nothing", "a text"));
        let text = required(CONFIG)?;
        let mut config = ModelConfig::parse(text, &self.path)?;
        config.tie_word_embeddings = !self.directory.tensors.contains_key("output.weight");
        let Ok(config_json) = serde_json::from_str(text) else {
            return Err(Error::field(&self.path, CONFIG, "no JSON object", "the text of config.json"));
        };
        let tokenizer = match self.text(TOKENIZER) {
            Some(json) => {
                let template = self.text("tokenizer.chat_template");
                Tokenizer::from_texts(json, required(TOKENIZER_CONFIG)?, template, &self.path)?
            }
            None => Tokenizer::bytes(),
        };
        Ok((config, config_json, tokenizer))
    }

    /// Of a file of llama.cpp's kind.
    fn foreign(&self) -> Result<Described> {
        let config = self.config()?;
        let Value::Object(config_json) = config.to_json() else {
            return Err(Error::corrupt(&self.path, "no metadata"));
        };
        let tokenizer = Tokenizer::from_gguf(&self.directory.metadata, &self.path)?;
        Ok((config, config_json, tokenizer))
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        // A few files give one number a layer; they must agree.
        let value = match value {
            MetadataValue::Array(list) => match list.first() {
                Some(first) if list.iter().all(|v| v == first) => first,
                _ => {
                    return Err(Error::field(&self.path, key, "different numbers by layer", "one number"));
                }
            },
            one => one,
        };
        match value.as_u64().filter(|&n| n > 0 && n < 1 << 31) {
            Some(n) => Ok(Some(n as usize)),
            None => Err(Error::field(&self.path, key, format!("{value:?}"), "a positive whole number")),
        }
    }

    fn required(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| Error::field(&self.path, key, "nothing", "a positive whole number"))
    }

    fn float(&self, key: &str) -> Option<f64> {
        self.value(key).and_then(MetadataValue::as_f64)
    }

    fn config(&self) -> Result<ModelConfig> {
        let architecture = self.value("general.architecture").and_then(MetadataValue::as_text).unwrap_or("nothing");
        let (_, family) = FAMILIES.into_iter().find(|(name, _)| *name == architecture).ok_or_else(|| {
            let (found, known) = (format!("`{architecture}`"), FAMILIES.map(|(name, _)| name).join(", "));
            Error::field(&self.path, "general.architecture", found, format!("{known} or {ARCHITECTURE}"))
        })?;
        let key = |name: &str| format!("{architecture}.{name}");
        let embedding = self.directory.tensors.get("token_embd.weight");
        let embedding = embedding.ok_or_else(|| self.error("tensor `token_embd.weight` is missing".into()))?;
        let vocab_size = embedding.shape.first().copied().unwrap_or(0);
        let (hidden_size, num_layers) = (self.required(&key("embedding_length"))?, self.required(&key("block_count"))?);
        if num_layers > self.directory.tensors.len() {
            return Err(Error::field(&self.path, &key("block_count"), num_layers, "no more layers than tensors"));
        }
        let num_heads = self.required(&key("attention.head_count"))?;
        let num_kv_heads = self.size(&key("attention.head_count_kv"))?.unwrap_or(num_heads);
        let head_dim = self.size(&key("attention.key_length"))?.unwrap_or(hidden_size / num_heads);
        if !num_heads.is_multiple_of(num_kv_heads) || head_dim == 0 || !head_dim.is_multiple_of(2) {
            let found = format!("{num_heads} heads of {head_dim} over {num_kv_heads}");
            return Err(Error::field(&self.path, &key("attention.head_count"), found, "heads in whole groups"));
        }
        let context = self.required(&key("context_length"))?;
        let id = |name: &str| {
            let id = self.value(&format!("tokenizer.ggml.{name}_token_id")).and_then(MetadataValue::as_u64);
            id.and_then(|id| u32::try_from(id).ok())
        };
        let mut eos: Vec<u32> = ["eos", "eot"].into_iter().filter_map(id).collect();
        eos.dedup();
        let window = self.size(&key("attention.sliding_window"))?;
        let is_gemma = family == Family::Gemma3;
        let local_theta = || self.float(&key("rope.freq_base_swa")).unwrap_or(LOCAL_THETA);
        Ok(ModelConfig {
            family,
            vocab_size,
            hidden_size,
            intermediate_size: self.required(&key("feed_forward_length"))?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            max_position_embeddings: context,
            rms_norm_eps: self.float(&key("attention.layer_norm_rms_epsilon")).unwrap_or(1e-5) as f32,
            rope: RopeConfig {
                theta: self.float(&key("rope.freq_base")).unwrap_or(10_000.0),
                scaling: self.rope_scaling(&key, context, head_dim)?,
            },
            tie_word_embeddings: !self.directory.tensors.contains_key("output.weight"),
            local_rope: is_gemma.then(|| RopeConfig { theta: local_theta(), scaling: RopeScaling::Default }),
            sliding_windows: (1..=num_layers)
                .map(|n| window.filter(|_| !is_gemma || !n.is_multiple_of(GEMMA_PATTERN)))
                .collect(),
            bos_token_id: id("bos"),
            eos_token_ids: eos,
            liger: None,
        })
    }

    fn rope_scaling(&self, key: &dyn Fn(&str) -> String, context: usize, head_dim: usize) -> Result<RopeScaling> {
        if self.directory.tensors.contains_key("rope_freqs.weight") {
            let divisors = self.unpack("rope_freqs.weight")?;
            if divisors.len() != head_dim / 2 || divisors.iter().any(|d| d.is_nan() || *d <= 0.0) {
                return Err(self.error(format!("`rope_freqs.weight` is not {} positive numbers", head_dim / 2)));
            }
            return Ok(RopeScaling::Divisors(divisors));
        }
        let kind = self.value(&key("rope.scaling.type")).and_then(MetadataValue::as_text).unwrap_or("none");
        let factor = self.float(&key("rope.scaling.factor")).filter(|f| *f > 0.0);
        match (kind, factor) {
            ("none", _) => Ok(RopeScaling::Default),
            ("linear", Some(factor)) => Ok(RopeScaling::Linear { factor }),
            ("yarn", Some(factor)) => Ok(RopeScaling::Yarn {
                factor,
                original: self.float(&key("rope.scaling.original_context_length")).unwrap_or(context as f64),
                beta_fast: self.float(&key("rope.scaling.yarn_beta_fast")).unwrap_or(32.0),
                beta_slow: self.float(&key("rope.scaling.yarn_beta_slow")).unwrap_or(1.0),
                attention_factor: if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 },
            }),
            (other, _) => {
                let found = format!("`{other}` with factor {factor:?}");
                Err(Error::field(&self.path, &key("rope.scaling.type"), found, "none, linear or yarn with a factor"))
            }
        }
    }

    /// Whether the matrices are packed in blocks.
    pub(crate) fn is_quantized(&self) -> bool {
        self.directory.tensors.values().any(|entry| entry.block.stored().is_some_and(DType::is_quantized))
    }

    fn entry(&self, name: &str) -> Result<&TensorEntry> {
        self.directory.tensors.get(name).ok_or_else(|| self.error(format!("tensor `{name}` is missing")))
    }

    /// A tensor's elements as they are in the file, some whole blocks at a time on every thread.
    fn unpack(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.entry(name)?;
        let count: usize = entry.shape.iter().product();
        let mut values = vec![0.0; count];
        const TOGETHER: usize = 1 << 18;
        let pieces = values.par_chunks_mut(TOGETHER).enumerate();
        let read = pieces.try_for_each(|(i, values)| {
            let bytes = |elements: usize| entry.block.bytes(elements as u64).unwrap_or(0);
            let packed = self.bytes(entry.start + bytes(i * TOGETHER), bytes(values.len()))?;
            values.copy_from_slice(&entry.block.unpack(&packed));
            Ok(())
        });
        read.map_err(io(&self.path, "read"))?;
        Ok(values)
    }

    fn bytes(&self, start: u64, count: u64) -> std::io::Result<Vec<u8>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::with_capacity(count as usize);
        file.take(count).read_to_end(&mut bytes)?;
        if bytes.len() as u64 == count { Ok(bytes) } else { Err(ErrorKind::UnexpectedEof.into()) }
    }

    /// The blocks of some rows of a matrix, as [`BlockType::stored`] has them. `order` says which row of the file each of them is.
    fn rows(&self, entry: &TensorEntry, rows: Range<usize>, order: Option<RowOrder>) -> std::io::Result<Vec<u8>> {
        let width = entry.bytes as usize / entry.shape[0].max(1);
        let read =
            |rows: &Range<usize>| self.bytes(entry.start + (rows.start * width) as u64, (rows.len() * width) as u64);
        let Some(order) = order else {
            return Ok(entry.block.repacked(read(&rows)?));
        };
        let in_file: Vec<usize> = rows.map(|row| order.in_file(row)).collect();
        let first = in_file.iter().min().copied().unwrap_or(0);
        let last = in_file.iter().max().copied().unwrap_or(0);
        let found = read(&(first..last + 1))?;
        let mut picked = Vec::with_capacity(in_file.len() * width);
        in_file
            .iter()
            .for_each(|row| picked.extend_from_slice(&found[(row - first) * width..(row - first + 1) * width]));
        Ok(entry.block.repacked(picked))
    }

    fn ggml_name(&self, name: &str) -> Result<String> {
        ggml_name(name, self.family).ok_or_else(|| self.error(format!("GGUF has no name for `{name}`")))
    }

    /// Order of the rows of a tensor whose heads are interleaved.
    fn permuted(&self, name: &str, rows: usize) -> Option<RowOrder> {
        let (heads, kv_heads) = self.permuted_heads?;
        let of_heads = |heads: usize| Some(RowOrder { head_dim: rows / heads });
        match name {
            _ if name.contains("self_attn.q_proj.") => of_heads(heads),
            _ if name.contains("self_attn.k_proj.") => of_heads(kv_heads),
            _ => None,
        }
    }
}

/// ggml's name of a tensor.
pub(crate) fn ggml_name(name: &str, family: Family) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.')?;
    let stem = match stem {
        "model.embed_tokens" => "token_embd".to_owned(),
        "model.norm" => "output_norm".to_owned(),
        "lm_head" => "output".to_owned(),
        other => {
            let (layer, part) = other.strip_prefix("model.layers.")?.split_once('.')?;
            let part = match part {
                "input_layernorm" => "attn_norm",
                "post_attention_layernorm" if family.has_output_norms() => "post_attention_norm",
                "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
                "post_feedforward_layernorm" => "post_ffw_norm",
                "self_attn.q_proj" => "attn_q",
                "self_attn.k_proj" => "attn_k",
                "self_attn.v_proj" => "attn_v",
                "self_attn.o_proj" => "attn_output",
                "self_attn.q_norm" => "attn_q_norm",
                "self_attn.k_norm" => "attn_k_norm",
                "mlp.gate_proj" => "ffn_gate",
                "mlp.up_proj" => "ffn_up",
                "mlp.down_proj" => "ffn_down",
                _ => return None,
            };
            format!("blk.{layer}.{part}")
        }
    };
    Some(format!("{stem}.{kind}"))
}

/// Rows `[head][D/2][2]` in the file that are `[head][2][D/2]` here.
#[derive(Clone, Copy)]
struct RowOrder {
    head_dim: usize,
}

impl RowOrder {
    fn in_file(self, row: usize) -> usize {
        let (head, i, half) = (row / self.head_dim, row % self.head_dim, self.head_dim / 2);
        head * self.head_dim + 2 * (i % half) + i / half
    }
}

impl TensorSource for GgufSource {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.directory.tensors.get(&ggml_name(name, self.family)?).map(|t| t.shape.clone())
    }

    fn read(&self, name: &str) -> Result<Vec<f32>> {
        let values = self.unpack(&self.ggml_name(name)?)?;
        let shape = self.shape(name).unwrap_or_default();
        let (rows, width) = (shape.first().copied().unwrap_or(0), shape.get(1).copied().unwrap_or(1));
        Ok(match self.permuted(name, rows) {
            Some(order) => (0..rows).flat_map(|row| &values[order.in_file(row) * width..][..width]).copied().collect(),
            None => values,
        })
    }

    fn load(&self, name: &str, shape: &[usize], ops: &dyn Ops, dtype: Option<DType>) -> Result<Tensor> {
        let entry = self.entry(&self.ggml_name(name)?)?;
        let stored = entry.block.stored();
        let dtype = dtype.or(stored).unwrap_or(DType::F32);
        // As they are in the file: to unpack and round them again takes longer, and may change them.
        if dtype.is_quantized() && stored == Some(dtype) && shape.len() == 2 {
            let order = self.permuted(name, shape[0]);
            return ops.upload_blocks(&|rows| self.rows(entry, rows, order), shape, dtype).map_err(|e| match e {
                liger_tensor::Error::Read(source) => io(&self.path, "read")(source),
                other => other.into(),
            });
        }
        Ok(ops.upload(self.read(name)?, shape, dtype)?)
    }

    fn has_plain_norms(&self) -> bool {
        true
    }

    fn error(&self, problem: String) -> Error {
        Error::corrupt(&self.path, problem)
    }
}
