//! The whole decoder: embedding, blocks, final norm, output layer; inference, and the two passes of training.

use std::sync::{Arc, Mutex, PoisonError};

use liger_tensor::{DType, Gemm, Ops, Sequences, Tensor};

use crate::adapter::{Adapter, Tuning};
use crate::attention::Mixer;
use crate::block::{Branches, Context, Kept};
use crate::config::{LigerConfig, ModelConfig, RopeConfig};
use crate::error::{Error, Result};
use crate::state::State;
use crate::weights::Weights;

/// A model on a device. Models made from one another share the frozen weights.
#[derive(Clone)]
pub struct Decoder {
    ops: Arc<dyn Ops>,
    config: ModelConfig,
    weights: Arc<Weights>,
    mixers: Vec<Mixer>,
    /// One for all layers, or a second one for those with a sliding window.
    rotations: Arc<Vec<Rotation>>,
    last_angles: Arc<Mutex<Option<Arc<RowAngles>>>>,
}

/// RoPE as the layers of one kind have it.
pub(crate) struct Rotation {
    /// Radians a token, `[D/2]`.
    frequencies: Vec<f64>,
    /// Of cosines and sines.
    pub(crate) factor: f64,
}

impl Rotation {
    fn new(rope: &RopeConfig, head_dim: usize) -> Self {
        let (frequencies, factor) = rope.frequencies(head_dim);
        Self { frequencies, factor }
    }

    /// The frequencies in revolutions a token, `[2, D/2]`: the float32 nearest to each, and what is missing to its float64
    /// value.
    pub(crate) fn revolutions(&self, ops: &dyn Ops) -> Result<Tensor> {
        let revolutions = self.frequencies.iter().map(|radians| radians / std::f64::consts::TAU);
        let nearest = revolutions.clone().map(|f| f as f32);
        let missing = revolutions.map(|f| (f - f64::from(f as f32)) as f32);
        Ok(ops.upload(nearest.chain(missing).collect(), &[2, self.frequencies.len()], DType::F32)?)
    }
}

/// RoPE's angles of some rows, for every [`Rotation`] of the model.
struct RowAngles {
    sequences: Sequences,
    of_rotations: Vec<Angles>,
}

/// RoPE's angles of some rows.
pub(crate) struct Angles {
    /// Cosines `[N, D/2]` of the rows' positions.
    pub(crate) cos: Tensor,
    /// Sines `[N, D/2]`.
    pub(crate) sin: Tensor,
    /// See [`Rotation::revolutions`].
    pub(crate) frequencies: Arc<Tensor>,
}

impl Angles {
    /// Cosines and sines.
    pub(crate) fn pair(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }
}

/// What a training forward keeps for the backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recompute {
    /// Everything: fastest.
    None,
    /// The input of every block; a block's forward runs again in its backward: half as much work more, little memory.
    Layer,
}

/// What a training forward leaves for the backward.
pub struct Pass {
    layers: Vec<Kept>,
    last: Tensor,
    sequences: Sequences,
    dropout_seed: Option<u64>,
    /// Output of the final norm, `[N, d]`.
    pub hidden: Tensor,
}

impl Decoder {
    /// Puts a model together.
    pub fn new(ops: Arc<dyn Ops>, config: ModelConfig, weights: Weights) -> Self {
        let ropes = [Some(&config.rope), config.local_rope.as_ref()].into_iter().flatten();
        let rotations = Arc::new(ropes.map(|rope| Rotation::new(rope, config.head_dim)).collect());
        let last_angles = Arc::default();
        Self { ops, mixers: Mixer::of(&config), config, weights: Arc::new(weights), rotations, last_angles }
    }

    /// The same weights with another attention: `None` for the softmax attention of the base model.
    #[must_use]
    pub fn with_attention(&self, liger: Option<LigerConfig>) -> Self {
        let config = ModelConfig { liger, ..self.config.clone() };
        Self { mixers: Mixer::of(&config), config, ..self.clone() }
    }

    /// The device.
    pub fn ops(&self) -> &dyn Ops {
        &*self.ops
    }

    /// The same, for another model beside this one.
    pub fn shared_ops(&self) -> Arc<dyn Ops> {
        self.ops.clone()
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The frozen weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    pub(crate) fn shared_weights(&self) -> &Arc<Weights> {
        &self.weights
    }

    pub(crate) fn mixers(&self) -> &[Mixer] {
        &self.mixers
    }

    /// RoPE of the layers: that of all but the sliding ones first.
    pub(crate) fn rotations(&self) -> &[Rotation] {
        &self.rotations
    }

    /// A fresh decoding state for `slots` texts.
    ///
    /// # Errors
    /// If the device has no memory.
    pub fn new_state(&self, slots: usize) -> Result<State> {
        State::new(&self.mixers, &self.config, &*self.ops, slots)
    }

    /// Tokens that the model may see: what it was trained for where some layer attends to everything, else any number.
    pub fn context_limit(&self) -> Option<usize> {
        let unbounded = self.mixers.iter().any(|m| m.spec().window.is_none());
        unbounded.then_some(self.config.max_position_embeddings)
    }

    /// The angles of every row. Training steps and the models that share weights ask for the same ones again and again.
    fn angles(&self, sequences: &Sequences) -> Result<Arc<RowAngles>> {
        let mut last = self.last_angles.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(angles) = last.as_ref().filter(|angles| angles.sequences == *sequences) {
            return Ok(angles.clone());
        }
        let mut of_rotations = Vec::with_capacity(self.rotations.len());
        for (i, rotation) in self.rotations.iter().enumerate() {
            // The same for all rows: uploaded once.
            let frequencies = match last.as_ref() {
                Some(angles) => angles.of_rotations[i].frequencies.clone(),
                None => Arc::new(rotation.revolutions(&*self.ops)?),
            };
            let (cos, sin) = self.turn(rotation, sequences)?;
            of_rotations.push(Angles { cos, sin, frequencies });
        }
        let angles = Arc::new(RowAngles { sequences: sequences.clone(), of_rotations });
        *last = Some(angles.clone());
        Ok(angles)
    }

    /// Cosines and sines of the rows.
    fn turn(&self, Rotation { frequencies, factor }: &Rotation, sequences: &Sequences) -> Result<(Tensor, Tensor)> {
        let shape = [sequences.rows(), frequencies.len()];
        let mut cos = Vec::with_capacity(shape[0] * shape[1]);
        let mut sin = Vec::with_capacity(shape[0] * shape[1]);
        for position in sequences.positions() {
            for frequency in frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push((c * factor) as f32);
                sin.push((s * factor) as f32);
            }
        }
        let upload = |values| self.ops.upload(values, &shape, DType::F32);
        Ok((upload(cos)?, upload(sin)?))
    }

    fn context<'a>(
        &'a self,
        layer: usize,
        tuning: Option<Tuning<'a>>,
        sequences: &'a Sequences,
        angles: &'a RowAngles,
    ) -> Context<'a> {
        let is_local = self.config.local_rope.is_some() && self.config.sliding_windows[layer].is_some();
        let angles = &angles.of_rotations[usize::from(is_local)];
        let (weights, mixer) = (&self.weights.blocks[layer], &self.mixers[layer]);
        Context { ops: &*self.ops, config: &self.config, weights, mixer, layer, tuning, sequences, angles }
    }

    fn embed(&self, ids: &[u32], sequences: &Sequences) -> Result<Tensor> {
        if ids.len() != sequences.rows() {
            return Err(Error::Refused(format!("{} tokens for {} rows", ids.len(), sequences.rows())));
        }
        let mut x = self.ops.empty(&[ids.len(), self.config.hidden_size])?;
        self.ops.embedding(&mut x, &self.weights.embedding, ids)?;
        let Some(scale) = self.config.embedding_scale() else { return Ok(x) };
        let mut scaled = self.ops.empty(x.shape())?;
        self.ops.axpby(&mut scaled, scale, &x, 0.0)?;
        Ok(scaled)
    }

    fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        let mut hidden = self.ops.empty(x.shape())?;
        self.ops.rms_norm_forward(&mut hidden, x, &self.weights.final_norm, self.config.rms_norm_eps)?;
        Ok(hidden)
    }

    /// Final hidden states `[N, d]` of the rows; `state` is read and moved on.
    ///
    /// # Errors
    /// [`Error::Device`] with a token that the model does not have.
    pub fn forward(
        &self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<&mut State>,
        adapter: Option<&Adapter>,
    ) -> Result<Tensor> {
        self.run(ids, sequences, state, adapter, &mut |_| {})
    }

    /// The same, handing the branches of every Liger layer to `look`.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn forward_with_branches(
        &self,
        ids: &[u32],
        sequences: &Sequences,
        state: Option<&mut State>,
        adapter: Option<&Adapter>,
        look: &mut dyn FnMut(Branches),
    ) -> Result<Tensor> {
        self.run(ids, sequences, state, adapter, look)
    }

    fn run(
        &self,
        ids: &[u32],
        sequences: &Sequences,
        mut state: Option<&mut State>,
        adapter: Option<&Adapter>,
        look: &mut dyn FnMut(Branches),
    ) -> Result<Tensor> {
        let mut x = self.embed(ids, sequences)?;
        let angles = self.angles(sequences)?;
        let tuning = adapter.map(|adapter| Tuning { adapter, dropout_seed: None });
        for layer in 0..self.config.num_layers {
            let layer_state = state.as_deref_mut().and_then(|s| s.layers.get_mut(layer));
            let layer_state = layer_state.map(|s| (&mut s.cache, &mut s.recurrent[..]));
            if let Some(branches) = self.context(layer, tuning, sequences, &angles).forward(&mut x, layer_state)? {
                look(branches);
            }
        }
        if let Some(state) = state {
            sequences.list().iter().for_each(|s| state.advance(s.slot, s.len));
        }
        self.final_norm(&x)
    }

    /// Logits `[N, V]` of hidden states in the type of activations: for a loss and its gradient, where the rounding is
    /// noise and the memory traffic counts.
    ///
    /// # Errors
    /// If the device fails.
    pub fn training_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.output(hidden, self.ops.empty(&[hidden.dim(0), self.config.vocab_size])?)
    }

    /// Logits `[N, V]` of hidden states, in float32.
    ///
    /// # Errors
    /// If the device fails.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.output(hidden, self.ops.empty_f32(&[hidden.dim(0), self.config.vocab_size])?)
    }

    fn output(&self, hidden: &Tensor, mut logits: Tensor) -> Result<Tensor> {
        self.ops.gemm(&mut logits, hidden, self.output_weight(), Gemm::LINEAR)?;
        Ok(logits)
    }

    /// Adds the gradient of `hidden` given that of its logits: `dlogits W`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn logits_backward(&self, dhidden: &mut Tensor, dlogits: &Tensor) -> Result<()> {
        Ok(self.ops.gemm(dhidden, dlogits, self.output_weight(), Gemm::INPUT_GRADIENT)?)
    }

    /// Many products of many rows will come: training, or scoring texts. The device may spend memory on having the weights in the order in
    /// which it multiplies ([`Ops::keep_packed`]).
    pub fn keep_packed(&self) {
        for block in &self.weights.blocks {
            let linears = block.attention.iter().chain([&block.gate, &block.up, &block.down]);
            linears.for_each(|linear| self.ops.keep_packed(&linear.weight));
        }
        self.ops.keep_packed(self.output_weight());
    }

    fn output_weight(&self) -> &Tensor {
        self.weights.lm_head.as_ref().unwrap_or(&self.weights.embedding)
    }

    /// The forward of training: whole sequences from their beginning.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn train_forward(
        &self,
        ids: &[u32],
        sequences: Sequences,
        adapter: &Adapter,
        dropout_seed: u64,
        recompute: Recompute,
    ) -> Result<Pass> {
        let mut x = self.embed(ids, &sequences)?;
        let angles = self.angles(&sequences)?;
        let dropout_seed = Some(dropout_seed);
        let tuning = Some(Tuning { adapter, dropout_seed });
        let mut layers = Vec::with_capacity(self.config.num_layers);
        for layer in 0..self.config.num_layers {
            let context = self.context(layer, tuning, &sequences, &angles);
            layers.push(context.forward_keeping(&mut x, recompute == Recompute::None)?);
        }
        let hidden = self.final_norm(&x)?;
        Ok(Pass { layers, last: x, sequences, dropout_seed, hidden })
    }

    /// Bytes that a training pass over `tokens` tokens takes besides the weights: what [`Decoder::train_forward`] keeps, and
    /// what lives inside the backward, which is about one layer in full and four times the hidden states.
    pub fn training_bytes(&self, tokens: usize, recompute: Recompute) -> usize {
        let c = &self.config;
        let (d, q, kv) = (c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let size = self.ops.activations().bytes(1);
        // Input, norm and residual, and both halves' outputs where those have norms; q, its rotated and feature forms, window
        // and mix; k, v and k's forms; gate and up; gates and the window's statistics in float32.
        // One state of every head for 64 tokens.
        let states = kv * c.head_dim * 4 / 64;
        let residuals = if c.family.has_output_norms() { 5 } else { 3 };
        let whole = (residuals * d + 5 * q + 4 * kv + 2 * c.intermediate_size) * size + 4 * (kv + c.num_heads) + states;
        let layer = if recompute == Recompute::None { whole } else { d * size };
        (layer * c.num_layers + whole + 4 * d * size) * tokens
    }

    /// [`Recompute::None`] where everything fits, for `tokens` tokens at once.
    pub fn choose_recompute(&self, tokens: usize) -> Recompute {
        match self.ops.available_memory() {
            // A tenth for logits, adapter and optimizer.
            Some(free) if self.training_bytes(tokens, Recompute::None) < free / 10 * 9 => Recompute::None,
            _ => Recompute::Layer,
        }
    }

    /// Adds the adapter's gradients to `gradients`, given that of [`Pass::hidden`].
    ///
    /// # Errors
    /// If the device fails.
    pub fn train_backward(
        &self,
        pass: Pass,
        dhidden: &Tensor,
        adapter: &Adapter,
        gradients: &mut Adapter,
    ) -> Result<()> {
        let angles = self.angles(&pass.sequences)?;
        let tuning = Some(Tuning { adapter, dropout_seed: pass.dropout_seed });
        let mut dx = self.ops.zeros(pass.last.shape())?;
        let (norm, epsilon) = (&self.weights.final_norm, self.config.rms_norm_eps);
        self.ops.rms_norm_backward(&mut dx, &pass.last, norm, epsilon, dhidden)?;
        for (layer, kept) in pass.layers.into_iter().enumerate().rev() {
            // The embedding is frozen: nothing asks for the gradient of the first block's input.
            self.context(layer, tuning, &pass.sequences, &angles).backward(kept, &mut dx, gradients, layer > 0)?;
        }
        Ok(())
    }
}
