//! Models on disk: Hugging Face folders and GGUF files in, folders out, PEFT adapters both ways.

pub mod gguf;
mod gguf_blocks;
mod gguf_model;
mod peft;
mod safetensors_files;
mod save;
mod save_gguf;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use liger_tensor::{DType, Ops};
use serde_json::{Map, Value};

pub use peft::{load_adapter, save_adapter};
pub use safetensors_files::{SafetensorsFiles, WeightMap, read_safetensors_header};
pub use save::{SaveFormat, save_model};
pub use save_gguf::save_gguf;

use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::error::{Error, Result, io};
use crate::tokenizer::Tokenizer;
use crate::weights::{TensorSource, Weights};

/// A model on disk, opened: everything but the weights is read.
pub struct Checkpoint {
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub config: ModelConfig,
    /// The `config.json` that it came with, so that what this program does not know survives.
    pub config_json: Map<String, Value>,
    /// The tokenizer and chat template.
    pub tokenizer: Tokenizer,
    /// Element type of its matrices on disk; bfloat16 for quantised files.
    pub stored_dtype: DType,
    /// Whether its matrices are packed in blocks on disk.
    pub is_quantized: bool,
    source: Box<dyn TensorSource>,
}

impl Checkpoint {
    /// Opens a folder with `config.json`, or a GGUF file.
    ///
    /// # Errors
    /// If it is not there, not complete, damaged, or of a kind that is not supported.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, Tokenizer::from_folder)
    }

    /// The same for a folder without a tokenizer, as test fixtures are.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_without_tokenizer(path: &Path) -> Result<Self> {
        Self::open_with(path, |_| Ok(Tokenizer::bytes()))
    }

    fn open_with(path: &Path, tokenizer: impl FnOnce(&Path) -> Result<Tokenizer>) -> Result<Self> {
        if path.is_dir() {
            return Self::open_folder(path, tokenizer);
        }
        if !path.exists() {
            return Err(Error::Missing {
                path: path.to_owned(),
                what: "model".into(),
                remedy: "give a folder with config.json or a .gguf file".into(),
            });
        }
        let (source, config, config_json, tokenizer) = gguf_model::open(path)?;
        let is_quantized = source.is_quantized();
        let (path, source) = (path.to_owned(), Box::new(source));
        Ok(Self { path, config, config_json, tokenizer, stored_dtype: DType::Bf16, is_quantized, source })
    }

    fn open_folder(path: &Path, tokenizer: impl FnOnce(&Path) -> Result<Tokenizer>) -> Result<Self> {
        let config_path = path.join("config.json");
        if !config_path.exists() {
            return Err(Error::Missing {
                path: path.to_owned(),
                what: "config.json".into(),
                remedy: "give a model folder as Hugging Face lays it out, or a .gguf file".into(),
            });
        }
        let text = std::fs::read_to_string(&config_path).map_err(io(&config_path, "read"))?;
        let mut config = ModelConfig::parse(&text, &config_path)?;
        let config_json = serde_json::from_str(&text).unwrap_or_default();
        let files = SafetensorsFiles::open(path)?;
        // Old exports leave the word out; the tensor itself decides.
        if !config.tie_word_embeddings && files.shape("lm_head.weight").is_none() {
            config.tie_word_embeddings = true;
        }
        let stored_dtype = match files.is_f32("model.embed_tokens.weight") {
            true => DType::F32,
            false => DType::Bf16,
        };
        let tokenizer = tokenizer(path)?;
        let (path, source) = (path.to_owned(), Box::new(files));
        Ok(Self { path, config, config_json, tokenizer, stored_dtype, is_quantized: false, source })
    }

    /// Reads the weights onto a device, in `dtype` (`None`: as they are stored).
    ///
    /// # Errors
    /// If a tensor is missing, misshapen or cannot be read.
    pub fn load(&self, ops: Arc<dyn Ops>, dtype: impl Into<Option<DType>>) -> Result<Decoder> {
        let weights = Weights::load(&*self.source, &self.config, &*ops, dtype)?;
        Ok(Decoder::new(ops, self.config.clone(), weights))
    }

    /// A short text that tells this model's states from others': architecture, Liger form and a sample of the weights.
    ///
    /// # Errors
    /// If the sampled tensor cannot be read.
    pub fn fingerprint(&self) -> Result<String> {
        let norm = self.source.read("model.norm.weight")?;
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for byte in norm.iter().flat_map(|x| x.to_le_bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        let liger = self.config.liger.as_ref().map(crate::config::LigerConfig::to_json);
        Ok(serde_json::json!({"layers": self.config.num_layers, "norm": hash, "liger": liger}).to_string())
    }
}
