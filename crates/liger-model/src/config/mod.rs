//! `config.json`: what a model is.

mod liger;
mod rope;

use std::path::Path;

use liger_tensor::Activation;
use serde_json::{Map, Value, json};

pub use liger::LigerConfig;
pub(crate) use rope::LOCAL_THETA;
pub use rope::{RopeConfig, RopeScaling};

use crate::error::{Error, Result};
use crate::fields::Fields;

/// The families of models that can be read; they differ in biases, norms, windows and what goes with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 2, 3, SmolLM2 and their kin.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2, 2.5: biases on q, k, v.
    Qwen2,
    /// Qwen3: norms on the heads of q and k.
    Qwen3,
    /// Gemma 3, text alone: norms also on the outputs of a block's halves, GELU, a sliding window in five layers of six.
    Gemma3,
}

impl Family {
    const ALL: [Self; 5] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::Gemma3];

    /// `model_type` of Hugging Face.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3_text",
        }
    }

    /// The family of a `model_type`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }

    /// Of the feed-forward layer's gate.
    pub fn activation(self) -> Activation {
        if self == Self::Gemma3 { Activation::GeluTanh } else { Activation::Silu }
    }

    /// Whether the heads of q and k have norms.
    pub(crate) fn has_head_norms(self) -> bool {
        matches!(self, Self::Qwen3 | Self::Gemma3)
    }

    /// Whether the outputs of attention and feed-forward layer have norms before they are added.
    pub(crate) fn has_output_norms(self) -> bool {
        self == Self::Gemma3
    }

    /// What Hugging Face's files hold less than a norm's weight.
    pub(crate) fn norm_offset(self) -> f32 {
        if self == Self::Gemma3 { 1.0 } else { 0.0 }
    }
}

/// Everything that decides the shape and the mathematics of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub family: Family,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Query heads, H.
    pub num_heads: usize,
    /// Key/value heads, K.
    pub num_kv_heads: usize,
    /// Elements of a head, D.
    pub head_dim: usize,
    /// Tokens that the base model was trained for.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// That of layers with a sliding window, where it is another one.
    pub local_rope: Option<RopeConfig>,
    /// Whether the output layer is the embedding table.
    pub tie_word_embeddings: bool,
    /// Sliding window of each softmax layer.
    pub sliding_windows: Vec<Option<usize>>,
    /// First token of a text, if the model wants one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The Liger form, if the model has been converted.
    pub liger: Option<LigerConfig>,
}

/// The authors' model types: base family and structure.
const AUTHORS: [(&str, Family, &str); 6] = [
    ("liger_gla", Family::Llama, "gla"),
    ("liger_gsa", Family::Llama, "gsa"),
    ("liger_hgrn2", Family::Llama, "hgrn2"),
    ("liger_mistral_gla", Family::Mistral, "gla"),
    ("liger_qwen25_gla", Family::Qwen2, "gla"),
    ("liger_qwen3_gla", Family::Qwen3, "gla"),
];

/// The authors' code asks for 64 keys and sees 65: 64 to the left and the query's own.
const AUTHORS_WINDOW: usize = 65;

impl ModelConfig {
    /// Reads the text of a `config.json`; `path` is for messages.
    ///
    /// ```
    /// # use liger_model::ModelConfig;
    /// let text = r#"{"model_type": "llama", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16,
    ///     "num_hidden_layers": 1, "num_attention_heads": 2, "rms_norm_eps": 1e-5}"#;
    /// let config = ModelConfig::parse(text, "config.json".as_ref())?;
    /// assert_eq!((config.num_kv_heads, config.head_dim), (2, 4));
    /// # Ok::<(), liger_model::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it is not JSON, [`Error::Field`] if a field is missing or says what is not supported.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let json: Value = serde_json::from_str(text).map_err(|e| Error::corrupt(path, format!("not JSON: {e}")))?;
        let Value::Object(object) = json else {
            return Err(Error::corrupt(path, "not a JSON object"));
        };
        let f = Fields::new(&object, path);
        let model_type = f.text("model_type")?;
        let authors = AUTHORS.iter().find(|(name, ..)| *name == model_type);
        let family = match authors {
            Some((_, family, _)) => *family,
            None => Family::from_name(&model_type).ok_or_else(|| {
                let known = Family::ALL.map(Family::name).join(", ");
                let expected = format!("{known} (or one of the Liger authors' types)");
                Error::field(path, "model_type", format!("`{model_type}`"), expected)
            })?,
        };
        let (field, expected) = activation_field(family);
        if let Some(activation) = f.optional_text(field)?.filter(|activation| activation != expected) {
            return Err(Error::field(path, field, format!("`{activation}`"), format!("`{expected}`")));
        }
        let num_heads = f.size("num_attention_heads")?;
        let hidden_size = f.size("hidden_size")?;
        let num_layers = f.size("num_hidden_layers")?;
        let max_position_embeddings = f.optional_size("max_position_embeddings")?.unwrap_or(2048);
        let head_dim = match f.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None => hidden_size / num_heads,
        };
        let num_kv_heads = f.optional_size("num_key_value_heads")?.unwrap_or(num_heads);
        if !num_heads.is_multiple_of(num_kv_heads) {
            let expected = format!("a divisor of num_attention_heads, {num_heads}");
            return Err(Error::field(path, "num_key_value_heads", num_kv_heads, expected));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(Error::field(path, "head_dim", head_dim, "an even number"));
        }
        if family == Family::Gemma3 {
            check_gemma(&f, head_dim)?;
        }
        let (rope, local_rope) = RopeConfig::of_family(&f, family, max_position_embeddings)?;
        let liger = match (authors, object.get("liger")) {
            (Some((_, _, structure)), _) => Some(LigerConfig::authors(structure, AUTHORS_WINDOW, path)?),
            (None, None | Some(Value::Null)) => None,
            (None, Some(value)) => Some(LigerConfig::from_json(value, num_layers, path)?),
        };
        Ok(Self {
            family,
            vocab_size: f.size("vocab_size")?,
            hidden_size,
            intermediate_size: f.size("intermediate_size")?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            max_position_embeddings,
            rms_norm_eps: f.optional_float("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope,
            local_rope,
            // Gemma's exports leave the word out.
            tie_word_embeddings: f.optional_bool("tie_word_embeddings")?.unwrap_or(family == Family::Gemma3),
            sliding_windows: sliding_windows(&f, family, num_layers)?,
            bos_token_id: f.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: f.token_ids("eos_token_id")?,
            liger,
        })
    }

    /// The fields that this crate reads, as `config.json` has them.
    pub fn to_json(&self) -> Value {
        let architecture = match self.family {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
            Family::Gemma3 => "Gemma3ForCausalLM",
        };
        let mut json = json!({
            "architectures": [architecture],
            "model_type": self.family.name(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": round_trip(self.rms_norm_eps),
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": match self.eos_token_ids[..] {
                [] => Value::Null,
                [id] => json!(id),
                ref ids => json!(ids),
            },
        });
        if let Value::Object(object) = &mut json {
            let (field, activation) = activation_field(self.family);
            object.insert(field.into(), json!(activation));
            self.rope.write(object);
            if let Some(local) = &self.local_rope {
                object.insert("rope_local_base_freq".into(), json!(local.theta));
                object.insert("query_pre_attn_scalar".into(), json!(self.head_dim));
            }
            if let Some(window) = self.sliding_windows.iter().flatten().next() {
                object.insert("sliding_window".into(), json!(window));
                let types: Vec<_> = self.sliding_windows.iter().map(|w| layer_type(w.is_some())).collect();
                object.insert("layer_types".into(), json!(types));
                object.insert("use_sliding_window".into(), json!(true));
            }
            self.write_liger(object);
        }
        json
    }

    /// Puts the `liger` object into a `config.json`.
    pub fn write_liger(&self, object: &mut Map<String, Value>) {
        match &self.liger {
            Some(liger) => object.insert("liger".into(), liger.to_json()),
            None => object.remove("liger"),
        };
    }

    /// The authors' `model_type` for this model, if their code can express it.
    ///
    /// # Errors
    /// [`Error::Refused`] with the setting that it cannot express.
    pub fn authors_model_type(&self) -> Result<&'static str> {
        let refuse = |why: String| Error::Refused(format!("the authors' format cannot express {why}"));
        let liger = self.liger.as_ref().ok_or_else(|| refuse("a model that is not converted".into()))?;
        let name = liger.structure.name();
        let known = AUTHORS.iter().find(|(_, family, structure)| *family == self.family && *structure == name);
        let (model_type, ..) = known.ok_or_else(|| refuse(format!("{name} on {}", self.family.name())))?;
        let same = LigerConfig { window: liger.window, ..LigerConfig::authors(name, liger.window, Path::new(""))? };
        if *liger != same || liger.window != AUTHORS_WINDOW {
            let found = liger.to_json();
            return Err(refuse(format!("{found}: it has window {AUTHORS_WINDOW}, alpha = beta = 0.5 and no extras")));
        }
        Ok(model_type)
    }

    /// What rows of the embedding table are multiplied by.
    pub(crate) fn embedding_scale(&self) -> Option<f32> {
        (self.family == Family::Gemma3).then(|| (self.hidden_size as f32).sqrt())
    }

    /// Tokens back from a query to the farthest key that a layer was trained to see.
    pub fn trained_reach(&self, layer: usize) -> usize {
        self.sliding_windows[layer].map_or(self.max_position_embeddings, |w| w.min(self.max_position_embeddings))
    }

    /// Layers whose own window bounds their memory, in a model that has others: they can stay as they are.
    pub fn bounded_layers(&self) -> Vec<usize> {
        let bounded: Vec<usize> = (0..self.num_layers).filter(|&layer| self.sliding_windows[layer].is_some()).collect();
        if bounded.len() < self.num_layers { bounded } else { Vec::new() }
    }

    /// Weights outside the embedding and output layers, plus those that a token is multiplied by there.
    pub fn parameter_count(&self) -> usize {
        let (d, ff) = (self.hidden_size, self.intermediate_size);
        let attention = 2 * d * self.num_heads * self.head_dim + 2 * d * self.num_kv_heads * self.head_dim;
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        let norms = if self.family.has_output_norms() { 4 } else { 2 };
        self.num_layers * (attention + 3 * d * ff + norms * d) + d + tables * self.vocab_size * d
    }
}

/// A float32 as the shortest float64 that prints like it.
fn round_trip(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

fn layer_type(sliding: bool) -> &'static str {
    if sliding { "sliding_attention" } else { "full_attention" }
}

/// Field and value of the activation.
fn activation_field(family: Family) -> (&'static str, &'static str) {
    match family.activation() {
        Activation::Silu => ("hidden_act", "silu"),
        Activation::GeluTanh => ("hidden_activation", "gelu_pytorch_tanh"),
    }
}

/// What larger or older Gemmas have and this program does not.
fn check_gemma(f: &Fields<'_>, head_dim: usize) -> Result<()> {
    if let Some(scalar) = f.positive("query_pre_attn_scalar")?.filter(|&scalar| scalar != head_dim as f64) {
        return Err(Error::field(f.path(), "query_pre_attn_scalar", scalar, format!("head_dim, {head_dim}")));
    }
    for field in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = f.optional_float(field)? {
            return Err(Error::field(f.path(), field, cap, "null"));
        }
    }
    for field in ["use_bidirectional_attention", "attention_bias"] {
        if f.is_true(field) {
            return Err(Error::field(f.path(), field, true, "false"));
        }
    }
    Ok(())
}

/// In how many layers of Gemma 3 one attends to everything, if the file does not say.
pub(crate) const GEMMA_PATTERN: usize = 6;

/// Mistral's and Gemma's windows are obeyed, Qwen's only with `use_sliding_window` and from layer `max_window_layers` on; newer
/// exports say it by layer.
fn sliding_windows(f: &Fields<'_>, family: Family, num_layers: usize) -> Result<Vec<Option<usize>>> {
    let window = f.optional_size("sliding_window")?;
    let window = match family {
        Family::Llama => None,
        Family::Mistral => window,
        Family::Gemma3 => Some(window.unwrap_or(4096)),
        Family::Qwen2 | Family::Qwen3 => window.filter(|_| f.is_true("use_sliding_window")),
    };
    if let (Some(types), Some(window)) = (f.optional_texts("layer_types")?, window) {
        if types.len() != num_layers {
            let expected = format!("{num_layers}, one a layer");
            return Err(Error::field(f.path(), "layer_types", format!("{} entries", types.len()), expected));
        }
        return Ok(types.iter().map(|t| (t == layer_type(true)).then_some(window)).collect());
    }
    if family == Family::Gemma3 {
        let pattern = f.optional_size("sliding_window_pattern")?.unwrap_or(GEMMA_PATTERN);
        return Ok((1..=num_layers).map(|n| window.filter(|_| !n.is_multiple_of(pattern))).collect());
    }
    let first = match family {
        Family::Qwen2 | Family::Qwen3 => f.optional_size("max_window_layers")?.unwrap_or(0),
        _ => 0,
    };
    Ok((0..num_layers).map(|layer| window.filter(|_| layer >= first)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEMMA: &str = r#"{"model_type": "gemma3_text", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 6, "num_attention_heads": 2, "head_dim": 8, "sliding_window": 4"#;

    fn parse(text: &str) -> ModelConfig {
        ModelConfig::parse(text, "config.json".as_ref()).unwrap()
    }

    #[test]
    fn gemma_in_its_old_and_its_new_words() {
        let old = parse(&format!(
            r#"{GEMMA}, "rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {{"rope_type": "linear", "factor": 8}}}}"#
        ));
        let new = parse(&format!(
            r#"{GEMMA}, "rope_parameters": {{
                "full_attention": {{"rope_type": "linear", "factor": 8, "rope_theta": 5e5}},
                "sliding_attention": {{"rope_type": "default", "rope_theta": 2e4}}}}}}"#
        ));
        assert_eq!(old, new);
        assert_eq!((old.rope.theta, &old.rope.scaling), (5e5, &RopeScaling::Linear { factor: 8.0 }));
        assert_eq!(old.local_rope.as_ref().map(|rope| rope.theta), Some(2e4));
        assert!(old.tie_word_embeddings);
        assert_eq!(old.bounded_layers(), [0, 1, 2, 3, 4], "the sixth attends to everything");
        assert_eq!((old.trained_reach(0), old.trained_reach(5)), (4, 2048));
        assert_eq!(parse(&old.to_json().to_string()), old);
        let plain = parse(&format!("{GEMMA}}}"));
        assert_eq!((plain.rope.theta, plain.local_rope.map(|rope| rope.theta)), (1e6, Some(1e4)));
    }

    #[test]
    fn a_model_of_one_kind_of_layers_has_none_that_can_stay() {
        let mistral = GEMMA.replace("gemma3_text", "mistral");
        assert!(parse(&format!("{mistral}}}")).bounded_layers().is_empty());
    }
}
