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

    /// The seed of the dropout masks, if there is dropout now.
    fn dropout(&self) -> Option<u64> {
        self.dropout_seed.filter(|_| self.adapter.config.dropout > 0.0)
    }

    /// `x` with dropout.
    fn dropped(&self, ops: &dyn Ops, x: &Tensor, seed: u64, layer: usize, target: Target) -> Result<Tensor> {
        let mut dropped = ops.empty(x.shape())?;
        ops.axpby(&mut dropped, 1.0, x, 0.0)?;
        ops.dropout(&mut dropped, self.adapter.config.dropout, mask_seed(seed, layer, target))?;
        Ok(dropped)
    }
}

fn mask_seed(seed: u64, layer: usize, target: Target) -> u64 {
    seed.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add((layer * 4 + target as usize) as u64 + 1)
}

/// x A^T `[N, r]` by target, of those that have an adapter.
pub(crate) type Lows = [Option<Tensor>; 4];

impl Tuning<'_> {
    /// Adds `scale (x A^T) B^T` to the outputs of projections of one layer that share the input `x`, and puts x A^T, which the
    /// backward needs again, into `lows`.
    pub(crate) fn forward(
        &self,
        ops: &dyn Ops,
        layer: usize,
        x: &Tensor,
        outputs: &mut [(Target, &mut Tensor)],
        lows: &mut Lows,
    ) -> Result<()> {
        let rank = self.adapter.config.rank;
        let mut adapted: Vec<_> =
            outputs.iter_mut().filter_map(|(target, out)| Some((*target, out, self.lora(layer, *target)?))).collect();
        let empty = |_| ops.empty(&[x.dim(0), rank]).map_err(Into::into);
        let mut low = (0..adapted.len()).map(empty).collect::<Result<Vec<Tensor>>>()?;
        if let Some(seed) = self.dropout() {
            for (low, (target, _, lora)) in low.iter_mut().zip(&adapted) {
                let dropped = self.dropped(ops, x, seed, layer, *target)?;
                ops.gemm(low, &dropped, &lora.a, Gemm::LINEAR)?;
            }
        } else {
            let a: Vec<_> = adapted.iter().map(|(_, _, lora)| &lora.a).collect();
            ops.low_rank_forward(&mut low, x, &a)?;
        }
        for (low, (target, out, lora)) in low.into_iter().zip(&mut adapted) {
            ops.gemm(out, &low, &lora.b, Gemm::LINEAR.accumulated().scaled(self.adapter.config.scale()))?;
            lows[*target as usize] = Some(low);
        }
        Ok(())
    }

    /// Adds the gradients of A and B to `gradients`, and what flows through them to `dx` unless nobody needs it, given the
    /// gradients `dy` of the outputs of projections that share the input `x`.
    ///
    /// With t = x A^T and s the scale: dB = s dy^T t, dt = s dy B, dA = dt^T x, dx += dt A. No product is of the size of the
    /// frozen matrix.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        ops: &dyn Ops,
        layer: usize,
        mut dx: Option<&mut Tensor>,
        x: &Tensor,
        dy: &[(Target, &Tensor)],
        lows: &Lows,
        gradients: &mut Adapter,
    ) -> Result<()> {
        let config = &self.adapter.config;
        let Some(gradients) = gradients.layers.get_mut(layer) else { return Ok(()) };
        let (mut targets, mut dlows, mut a) = (Vec::new(), Vec::new(), Vec::new());
        for (target, dy) in dy {
            let (Some(lora), Some(low), Some(gradient)) =
                (self.lora(layer, *target), &lows[*target as usize], &mut gradients[*target as usize])
            else {
                continue;
            };
            let mut dlow = ops.empty(low.shape())?;
            ops.gemm(&mut dlow, dy, &lora.b, Gemm::INPUT_GRADIENT.scaled(config.scale()))?;
            ops.gemm(&mut gradient.b, dy, low, Gemm::WEIGHT_GRADIENT.accumulated().scaled(config.scale()))?;
            targets.push(*target);
            dlows.push(dlow);
            a.push(&lora.a);
        }
        let Some(seed) = self.dropout() else {
            let adapted = gradients.iter_mut().zip(Target::ALL).filter(|(_, target)| targets.contains(target));
            let mut da: Vec<_> = adapted.filter_map(|(lora, _)| lora.as_mut().map(|lora| &mut lora.a)).collect();
            return Ok(ops.low_rank_backward(dx, &mut da, &dlows, x, &a)?);
        };
        for ((target, dlow), a) in targets.into_iter().zip(dlows).zip(a) {
            let Some(gradient) = &mut gradients[target as usize] else { continue };
            let mut dropped = self.dropped(ops, x, seed, layer, target)?;
            ops.gemm(&mut gradient.a, &dlow, &dropped, Gemm::WEIGHT_GRADIENT.accumulated())?;
            // The mask and its factor apply to the gradient as they did to the input.
            let Some(dx) = dx.as_deref_mut() else { continue };
            ops.gemm(&mut dropped, &dlow, a, Gemm::INPUT_GRADIENT)?;
            ops.dropout(&mut dropped, config.dropout, mask_seed(seed, layer, target))?;
            ops.axpby(dx, 1.0, &dropped, 1.0)?;
        }
        Ok(())
    }
}

/// `out = x W^T + bias`, plus `base` if there is one.
pub(crate) fn linear(
    ops: &dyn Ops,
    out: &mut Tensor,
    x: &Tensor,
    linear: &Linear,
    base: Option<&Tensor>,
) -> Result<()> {
    match base {
        Some(base) => ops.gemm_onto(out, base, x, &linear.weight, Gemm::LINEAR)?,
        None => ops.gemm(out, x, &linear.weight, Gemm::LINEAR)?,
    }
    linear.bias.as_ref().map_or(Ok(()), |bias| Ok(ops.add_bias(out, bias)?))
}
