//! LoRA: low-rank additions to the frozen projections (arXiv 2106.09685).

use liger_tensor::{DType, Gemm, Ops, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::config::ModelConfig;
use crate::error::Result;
use crate::weights::Linear;

/// A projection of the attention that LoRA may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Queries.
    Q,
    /// Keys, and with them the gates.
    K,
    /// Values.
    V,
    /// Output.
    O,
}

impl Target {
    /// In the order of a block's projections.
    pub const ALL: [Self; 4] = [Self::Q, Self::K, Self::V, Self::O];

    /// As PEFT's `target_modules` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
        }
    }

    /// The target of that name; `q` and `q_proj` are the same.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name || t.name().strip_suffix("_proj") == Some(name))
    }

    /// `[out, in]` of the projection.
    pub fn shape(self, config: &ModelConfig) -> [usize; 2] {
        let (d, q, kv) =
            (config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        match self {
            Self::Q => [q, d],
            Self::K | Self::V => [kv, d],
            Self::O => [d, q],
        }
    }
}

/// Settings of an adapter, as PEFT's `adapter_config.json` has them.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank r.
    pub rank: usize,
    /// The product counts `alpha / rank` times.
    pub alpha: f32,
    /// Probability that an input of A is dropped while training.
    pub dropout: f32,
    /// The projections that have one.
    pub targets: Vec<Target>,
}

impl LoraConfig {
    /// The factor of the low-rank product.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }
}

/// The two matrices of one projection.
#[derive(Debug)]
pub struct Lora {
    /// `[r, in]`.
    pub a: Tensor,
    /// `[out, r]`.
    pub b: Tensor,
}

/// An adapter, or the gradients of one.
#[derive(Debug)]
pub struct Adapter {
    /// Its settings.
    pub config: LoraConfig,
    /// By layer, then by [`Target::ALL`].
    pub layers: Vec<[Option<Lora>; 4]>,
}

/// How LoRA takes part in one pass.
#[derive(Clone, Copy)]
pub(crate) struct Tuning<'a> {
    pub(crate) adapter: &'a Adapter,
    /// Seed of the dropout masks while training.
    pub(crate) dropout_seed: Option<u64>,
}

impl Adapter {
    /// A fresh adapter: B zero, A uniform in ±1/sqrt(in) as PEFT draws it (Kaiming with a = sqrt 5).
    ///
    /// # Errors
    /// If the device has no memory.
    pub fn new(config: LoraConfig, model: &ModelConfig, ops: &dyn Ops, seed: u64) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Self::build(config, model, |[out, input], rank| {
            let bound = 1.0 / (input as f32).sqrt();
            let a = (0..rank * input).map(|_| rng.random_range(-bound..bound)).collect();
            let a = ops.upload(a, &[rank, input], DType::F32)?;
            Ok(Lora { a, b: ops.upload(vec![0.0; out * rank], &[out, rank], DType::F32)? })
        })
    }

    /// An adapter of the same form filled with zeros: gradients, moments.
    ///
    /// # Errors
    /// If the device has no memory.
    pub fn zeros_like(&self, model: &ModelConfig, ops: &dyn Ops) -> Result<Self> {
        Self::build(self.config.clone(), model, |[out, input], rank| {
            let zeros = |shape: &[usize]| ops.upload(vec![0.0; shape.iter().product()], shape, DType::F32);
            Ok(Lora { a: zeros(&[rank, input])?, b: zeros(&[out, rank])? })
        })
    }

    pub(crate) fn build(
        config: LoraConfig,
        model: &ModelConfig,
        mut lora: impl FnMut([usize; 2], usize) -> Result<Lora>,
    ) -> Result<Self> {
        let mut layers = Vec::with_capacity(model.num_layers);
        for _ in 0..model.num_layers {
            let mut layer = [None, None, None, None];
            for (slot, target) in layer.iter_mut().zip(Target::ALL) {
                if config.targets.contains(&target) {
                    *slot = Some(lora(target.shape(model), config.rank)?);
                }
            }
            layers.push(layer);
        }
        Ok(Self { config, layers })
    }

    /// Every matrix under its name without PEFT's prefix: `model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub fn named(&self) -> Vec<(String, &Tensor)> {
        let name = |layer: usize, target: Target, matrix: char| {
            format!("model.layers.{layer}.self_attn.{}.lora_{matrix}.weight", target.name())
        };
        let mut list = Vec::new();
        for (layer, loras) in self.layers.iter().enumerate() {
            for (lora, target) in loras.iter().zip(Target::ALL) {
                if let Some(lora) = lora {
                    list.push((name(layer, target, 'A'), &lora.a));
                    list.push((name(layer, target, 'B'), &lora.b));
                }
            }
        }
        list
    }

    /// All matrices in the order of [`Adapter::named`], to write.
    pub fn matrices_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.layers.iter_mut().flatten().flatten().flat_map(|lora| [&mut lora.a, &mut lora.b])
    }

    /// Number of trained values.
    pub fn parameter_count(&self) -> usize {
        self.named().iter().map(|(_, tensor)| tensor.len()).sum()
    }
}

impl<'a> Tuning<'a> {
    fn lora(&self, layer: usize, target: Target) -> Option<&'a Lora> {
        self.adapter.layers.get(layer)?.get(target as usize)?.as_ref()
    }

    /// The input of A: `x`, with dropout while training. `None` stands for `x` itself.
    fn dropped(&self, ops: &dyn Ops, x: &Tensor, layer: usize, target: Target) -> Result<Option<Tensor>> {
        let p = self.adapter.config.dropout;
        let Some(seed) = self.dropout_seed.filter(|_| p > 0.0) else {
            return Ok(None);
        };
        let mut dropped = ops.empty(x.shape())?;
        ops.axpby(&mut dropped, 1.0, x, 0.0)?;
        ops.dropout(&mut dropped, p, mask_seed(seed, layer, target))?;
        Ok(Some(dropped))
    }
}

fn mask_seed(seed: u64, layer: usize, target: Target) -> u64 {
    seed.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add((layer * 4 + target as usize) as u64 + 1)
}

/// `out = x W^T + bias + scale (x A^T) B^T`, plus `base` if there is one; returns x A^T `[N, r]`, which the backward needs
/// again.
pub(crate) fn linear_forward(
    ops: &dyn Ops,
    out: &mut Tensor,
    x: &Tensor,
    linear: &Linear,
    (layer, target): (usize, Target),
    tuning: Option<Tuning<'_>>,
    base: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    match base {
        Some(base) => ops.gemm_onto(out, base, x, &linear.weight, Gemm::LINEAR)?,
        None => ops.gemm(out, x, &linear.weight, Gemm::LINEAR)?,
    }
    if let Some(bias) = &linear.bias {
        ops.add_bias(out, bias)?;
    }
    let Some((tuning, lora)) = tuning.and_then(|t| t.lora(layer, target).map(|lora| (t, lora))) else {
        return Ok(None);
    };
    let dropped = tuning.dropped(ops, x, layer, target)?;
    let mut low = ops.empty(&[x.dim(0), tuning.adapter.config.rank])?;
    ops.gemm(&mut low, dropped.as_ref().unwrap_or(x), &lora.a, Gemm::LINEAR)?;
    ops.gemm(out, &low, &lora.b, Gemm::LINEAR.accumulated().scaled(tuning.adapter.config.scale()))?;
    Ok(Some(low))
}

/// The same for a frozen linear layer without LoRA.
pub(crate) fn frozen_forward(
    ops: &dyn Ops,
    out: &mut Tensor,
    x: &Tensor,
    linear: &Linear,
    base: Option<&Tensor>,
) -> Result<()> {
    linear_forward(ops, out, x, linear, (0, Target::Q), None, base).map(|_| ())
}

/// Adds the gradients of A and B to `gradients`; that of `x` becomes `dx`, or is added to it if the flag says so, unless
/// nobody needs it. `low` is what the forward returned.
///
/// With t = x A^T and s the scale: dB = s dy^T t, dt = s dy B, dA = dt^T x, dx = dy W + dt A. No product is of the
/// size of W but dy W itself.
#[allow(clippy::too_many_arguments)]
pub(crate) fn linear_backward(
    ops: &dyn Ops,
    mut dx: Option<(&mut Tensor, bool)>,
    dy: &Tensor,
    x: &Tensor,
    low: Option<&Tensor>,
    linear: &Linear,
    (layer, target): (usize, Target),
    tuning: Option<Tuning<'_>>,
    gradients: &mut Adapter,
) -> Result<()> {
    if let Some((dx, accumulate)) = &mut dx {
        ops.gemm(dx, dy, &linear.weight, Gemm { accumulate: *accumulate, ..Gemm::INPUT_GRADIENT })?;
    }
    let lora = tuning.and_then(|t| t.lora(layer, target).map(|lora| (t, lora)));
    let (Some((tuning, lora)), Some(low)) = (lora, low) else { return Ok(()) };
    let scale = tuning.adapter.config.scale();
    let dropped = tuning.dropped(ops, x, layer, target)?;
    let input = dropped.as_ref().unwrap_or(x);
    let mut dlow = ops.empty(low.shape())?;
    ops.gemm(&mut dlow, dy, &lora.b, Gemm::INPUT_GRADIENT.scaled(scale))?;
    let gradient = gradients.layers.get_mut(layer).and_then(|l| l[target as usize].as_mut());
    if let Some(gradient) = gradient {
        ops.gemm(&mut gradient.b, dy, low, Gemm::WEIGHT_GRADIENT.accumulated().scaled(scale))?;
        ops.gemm(&mut gradient.a, &dlow, input, Gemm::WEIGHT_GRADIENT.accumulated())?;
    }
    let Some((dx, _)) = dx else { return Ok(()) };
    match (dropped, tuning.dropout_seed) {
        (Some(mut through), Some(seed)) => {
            // The mask and its factor apply to the gradient as they did to the input.
            ops.gemm(&mut through, &dlow, &lora.a, Gemm::INPUT_GRADIENT)?;
            ops.dropout(&mut through, tuning.adapter.config.dropout, mask_seed(seed, layer, target))?;
            ops.axpby(dx, 1.0, &through, 1.0)?;
        }
        _ => ops.gemm(dx, &dlow, &lora.a, Gemm::INPUT_GRADIENT.accumulated())?,
    }
    Ok(())
}
