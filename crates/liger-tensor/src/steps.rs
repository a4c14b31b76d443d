//! Decoding steps in few operations, for devices where starting an operation costs as much as running it.

use crate::{DeviceMemory, FeatureSpec, KeyValueCache, Result, Sequences, Tensor};

/// The recurrent branch of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StepForm {
    /// None: the window alone.
    Off,
    /// One gated recurrence behind feature maps.
    Features(FeatureSpec),
    /// gsa's two, with so many memory slots.
    Slots(usize),
    /// The keys that the cache keeps; the state is the sum of the keys' directions.
    Kept,
}

/// Sizes and settings of Liger Attention in a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSpec {
    /// Query heads H.
    pub heads: usize,
    /// Key/value heads K.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// The recurrent branch.
    pub form: StepForm,
    /// Weight of the recurrent branch.
    pub alpha: f32,
    /// Weight of the window branch.
    pub beta: f32,
    /// Factor of RoPE's cosines and sines (yarn).
    pub rope_factor: f32,
    /// Of the head norms, where there are such.
    pub epsilon: f32,
}

/// Liger Attention for one token of each text, from the projections to what goes into o_proj.
pub struct LigerStep<'a> {
    /// Sizes and settings.
    pub spec: StepSpec,
    /// q `[n, H D]`, k and v `[n, K D]`, before head norms and RoPE.
    pub qkv: [&'a Tensor; 3],
    /// Weights `[D]` of the norms on the heads of q and k (Qwen3).
    pub head_norms: Option<[&'a Tensor; 2]>,
    /// Frequencies of RoPE in revolutions a token, `[2, D/2]`: the float32 nearest to each, and what is missing to its float64
    /// value.
    pub frequencies: &'a Tensor,
    /// Takes the new keys and values; has a window.
    pub cache: &'a KeyValueCache,
    /// Recurrent states: none, one, or gsa's two.
    pub states: &'a [Tensor],
}

/// A linear layer and where its output goes.
pub struct StepLinear<'a> {
    /// `[n, out]`.
    pub out: &'a mut Tensor,
    /// `[out, in]`.
    pub weight: &'a Tensor,
    /// `[out]`.
    pub bias: Option<&'a Tensor>,
}

/// Work that was recorded and can be done again: the same operations on the same memory.
pub trait Recording: Send + Sync {
    /// Does it again, with what the memory holds now.
    ///
    /// # Errors
    /// If the device failed.
    fn replay(&self) -> Result<()>;
}

/// What a device offers for steps of up to [`StepOps::most_texts`] texts, in bfloat16. Tensors are those of
/// [`Ops`](crate::Ops); errors too. Tokens are read from memory of [`StepOps::tokens`], so that a recorded step sees the new
/// ones.
pub trait StepOps {
    /// Texts that a step can have.
    fn most_texts(&self) -> usize;
    /// Whether [`StepOps::liger`] takes these sizes.
    fn takes(&self, spec: &StepSpec, cache: &KeyValueCache) -> bool;
    /// Memory for the tokens of a step.
    fn tokens(&self, texts: usize) -> Result<Box<dyn DeviceMemory>>;
    /// Puts one token of each sequence there.
    fn place(&self, tokens: &dyn DeviceMemory, ids: &[u32], sequences: &Sequences) -> Result<()>;
    /// Rows of `table [V, d]`.
    fn embedding(&self, out: &mut Tensor, table: &Tensor, tokens: &dyn DeviceMemory) -> Result<()>;
    /// Up to three linear layers of `x [n, in]`, or of its RMS norm (weight and epsilon); with `add`, what `out` holds is
    /// added and there is no bias. An output is of activations, or float32.
    fn linears(&self, layers: &mut [StepLinear<'_>], x: &Tensor, norm: Option<(&Tensor, f32)>, add: bool)
    -> Result<()>;
    /// `silu(h gate^T) (h up^T)` with h the RMS norm of `x`.
    fn swiglu(&self, out: &mut Tensor, x: &Tensor, norm: (&Tensor, f32), gate: &Tensor, up: &Tensor) -> Result<()>;
    /// See [`LigerStep`]; `mixed [n, H D]`.
    fn liger(&self, mixed: &mut Tensor, step: LigerStep<'_>, tokens: &dyn DeviceMemory) -> Result<()>;
    /// Records what `run` asks for, without doing it; `None` if that is not possible now.
    fn record(&self, run: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Recording>>>;
}
