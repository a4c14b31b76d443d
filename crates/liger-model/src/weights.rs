//! The frozen weights of a model, loaded from any source of named tensors.

use liger_tensor::{DType, Ops, Tensor};

use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// Named tensors of a checkpoint, under Hugging Face's names.
pub trait TensorSource {
    /// Shape of a tensor, if it is there.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// Its elements.
    ///
    /// # Errors
    /// If the file is damaged or holds an element type that is not supported.
    fn read(&self, name: &str) -> Result<Vec<f32>>;
    /// The tensor on a device, in `dtype` or as it is stored.
    ///
    /// # Errors
    /// As [`TensorSource::read`], or if the device has no memory.
    fn load(&self, name: &str, shape: &[usize], ops: &dyn Ops, dtype: Option<DType>) -> Result<Tensor> {
        Ok(ops.upload(self.read(name)?, shape, dtype.unwrap_or(DType::F32))?)
    }
    /// Whether norms are as the formulas have them, whatever Hugging Face's files of the family hold.
    fn has_plain_norms(&self) -> bool {
        false
    }
    /// An error about this checkpoint.
    fn error(&self, problem: String) -> Error;
}

/// A frozen linear layer.
#[derive(Debug)]
pub(crate) struct Linear {
    /// `[out, in]`.
    pub(crate) weight: Tensor,
    /// `[out]`.
    pub(crate) bias: Option<Tensor>,
}

/// Weights of one block.
#[derive(Debug)]
pub(crate) struct BlockWeights {
    pub(crate) input_norm: Tensor,
    pub(crate) feed_forward_norm: Tensor,
    /// Norms on the outputs of attention and feed-forward layer (Gemma 3).
    pub(crate) output_norms: Option<[Tensor; 2]>,
    /// q, k, v, o in the order of [`Target::ALL`](crate::Target::ALL).
    pub(crate) attention: [Linear; 4],
    /// Norms on the heads of q and k (Qwen3, Gemma 3).
    pub(crate) head_norms: Option<[Tensor; 2]>,
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

/// All frozen weights. Teacher and student share one copy.
#[derive(Debug)]
pub struct Weights {
    pub(crate) embedding: Tensor,
    pub(crate) blocks: Vec<BlockWeights>,
    pub(crate) final_norm: Tensor,
    /// `None` where the embedding table is the output layer too.
    pub(crate) lm_head: Option<Tensor>,
}

/// Names of a block's norms: before attention and feed-forward layer, and those on their outputs. What most families call
/// post-attention comes after attention's output was added, in Gemma before.
fn norm_names(has_output_norms: bool) -> ([&'static str; 2], Option<[&'static str; 2]>) {
    match has_output_norms {
        false => (["input_layernorm", "post_attention_layernorm"], None),
        true => (
            ["input_layernorm", "pre_feedforward_layernorm"],
            Some(["post_attention_layernorm", "post_feedforward_layernorm"]),
        ),
    }
}

/// Name and shape of every tensor that a model of this configuration has; biases of q, k, v, o may be absent in some
/// families and are not listed.
pub(crate) fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (d, ff) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let mut list = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, d])];
    for layer in 0..config.num_layers {
        let mut add = |name: &str, shape: &[usize]| list.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        let (before, after) = norm_names(config.family.has_output_norms());
        for name in before.into_iter().chain(after.into_iter().flatten()) {
            add(&format!("{name}.weight"), &[d]);
        }
        for (name, out, input) in [("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)] {
            add(&format!("self_attn.{name}_proj.weight"), &[out, input]);
        }
        if config.family.has_head_norms() {
            add("self_attn.q_norm.weight", &[config.head_dim]);
            add("self_attn.k_norm.weight", &[config.head_dim]);
        }
        add("mlp.gate_proj.weight", &[ff, d]);
        add("mlp.up_proj.weight", &[ff, d]);
        add("mlp.down_proj.weight", &[d, ff]);
    }
    list.push(("model.norm.weight".to_owned(), vec![d]));
    if !config.tie_word_embeddings {
        list.push(("lm_head.weight".to_owned(), vec![config.vocab_size, d]));
    }
    list
}

impl Weights {
    /// Loads a model; matrices are kept in `dtype` (`None`: as they are stored), norms and biases in float32.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape than the configuration says, or cannot be read.
    pub fn load(
        source: &dyn TensorSource,
        config: &ModelConfig,
        ops: &dyn Ops,
        dtype: impl Into<Option<DType>>,
    ) -> Result<Self> {
        let dtype = dtype.into();
        for (name, shape) in expected_tensors(config) {
            check_shape(source, &name, &shape)?;
        }
        let tensor = |name: &str, dtype: Option<DType>| -> Result<Tensor> {
            let shape = source.shape(name).ok_or_else(|| missing(source, name))?;
            source.load(name, &shape, ops, dtype)
        };
        let linear = |name: &str| -> Result<Linear> {
            let weight = tensor(&format!("{name}.weight"), dtype)?;
            let bias_name = format!("{name}.bias");
            let bias = match source.shape(&bias_name) {
                Some(_) => {
                    check_shape(source, &bias_name, &[weight.dim(0)])?;
                    Some(tensor(&bias_name, Some(DType::F32))?)
                }
                None => None,
            };
            Ok(Linear { weight, bias })
        };
        let offset = if source.has_plain_norms() { 0.0 } else { config.family.norm_offset() };
        let load_norm = |name: &str| -> Result<Tensor> {
            let values: Vec<f32> = source.read(name)?.iter().map(|x| x + offset).collect();
            let length = values.len();
            Ok(ops.upload(values, &[length], DType::F32)?)
        };
        let (before, after) = norm_names(config.family.has_output_norms());
        let mut blocks = Vec::with_capacity(config.num_layers);
        for layer in 0..config.num_layers {
            let p = format!("model.layers.{layer}");
            let norm = |name: &str| load_norm(&format!("{p}.{name}.weight"));
            let projection = |name: &str| linear(&format!("{p}.self_attn.{name}_proj"));
            blocks.push(BlockWeights {
                input_norm: norm(before[0])?,
                feed_forward_norm: norm(before[1])?,
                output_norms: match after {
                    Some([attention, feed_forward]) => Some([norm(attention)?, norm(feed_forward)?]),
                    None => None,
                },
                attention: [projection("q")?, projection("k")?, projection("v")?, projection("o")?],
                head_norms: match config.family.has_head_norms() {
                    true => Some([norm("self_attn.q_norm")?, norm("self_attn.k_norm")?]),
                    false => None,
                },
                gate: linear(&format!("{p}.mlp.gate_proj"))?,
                up: linear(&format!("{p}.mlp.up_proj"))?,
                down: linear(&format!("{p}.mlp.down_proj"))?,
            });
        }
        Ok(Self {
            embedding: tensor("model.embed_tokens.weight", dtype)?,
            blocks,
            final_norm: load_norm("model.norm.weight")?,
            lm_head: match config.tie_word_embeddings {
                true => None,
                false => Some(tensor("lm_head.weight", dtype)?),
            },
        })
    }

    /// Every tensor under its Hugging Face name.
    pub(crate) fn named(&self) -> Vec<(String, &Tensor)> {
        let mut list = vec![("model.embed_tokens.weight".to_owned(), &self.embedding)];
        for (layer, block) in self.blocks.iter().enumerate() {
            let p = format!("model.layers.{layer}");
            let linear = |name: &str, linear: &'_ Linear| -> [Option<String>; 2] {
                [Some(format!("{p}.{name}.weight")), linear.bias.as_ref().map(|_| format!("{p}.{name}.bias"))]
            };
            let mut pairs = Vec::new();
            for (name, l) in ["q", "k", "v", "o"].iter().zip(&block.attention) {
                pairs.push((linear(&format!("self_attn.{name}_proj"), l), l));
            }
            for (name, l) in [("gate", &block.gate), ("up", &block.up), ("down", &block.down)] {
                pairs.push((linear(&format!("mlp.{name}_proj"), l), l));
            }
            for ([weight, bias], l) in pairs {
                list.extend(weight.map(|name| (name, &l.weight)));
                list.extend(bias.zip(l.bias.as_ref()));
            }
            let (before, after) = norm_names(block.output_norms.is_some());
            let norms = before.into_iter().zip([&block.input_norm, &block.feed_forward_norm]);
            let output_norms = after.into_iter().flatten().zip(block.output_norms.iter().flatten());
            list.extend(norms.chain(output_norms).map(|(name, norm)| (format!("{p}.{name}.weight"), norm)));
            if let Some([q, k]) = &block.head_norms {
                list.push((format!("{p}.self_attn.q_norm.weight"), q));
                list.push((format!("{p}.self_attn.k_norm.weight"), k));
            }
        }
        list.push(("model.norm.weight".to_owned(), &self.final_norm));
        list.extend(self.lm_head.as_ref().map(|head| ("lm_head.weight".to_owned(), head)));
        list
    }

    /// Element type of most of the matrices: that of the feed-forward layers.
    pub fn dtype(&self) -> DType {
        self.blocks.first().map_or(self.embedding.dtype(), |block| block.up.weight.dtype())
    }

    /// Bytes that the weights take on the device.
    pub fn bytes(&self) -> usize {
        self.named().iter().map(|(_, tensor)| tensor.bytes()).sum()
    }
}

fn missing(source: &dyn TensorSource, name: &str) -> Error {
    source.error(format!("tensor `{name}` is missing; the checkpoint is not complete or not of this config.json"))
}

fn check_shape(source: &dyn TensorSource, name: &str, expected: &[usize]) -> Result<()> {
    match source.shape(name) {
        None => Err(missing(source, name)),
        Some(found) if found != expected => {
            Err(source.error(format!("tensor `{name}` has shape {found:?}, config.json says {expected:?}")))
        }
        Some(_) => Ok(()),
    }
}
