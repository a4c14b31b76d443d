//! One block, forward and backward side by side:
//! `x + attention(norm(x))`, then `x + down(activation(gate(h)) up(h))` with `h = norm(x)`. Gemma 3 has norms around both
//! outputs, too.

use liger_tensor::{Attention, AttentionGradients, AttentionSpec, Gemm, KeyValueCache, Ops, Sequences, Tensor};

use crate::adapter::{Adapter, Lows, Target, Tuning, linear};
use crate::attention::{LigerActivations, Mixer, MixerGradients, Projected, SoftmaxActivations};
use crate::config::ModelConfig;
use crate::decoder::Angles;
use crate::error::Result;
use crate::weights::BlockWeights;

/// What a block works with besides its input.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) ops: &'a dyn Ops,
    pub(crate) config: &'a ModelConfig,
    pub(crate) weights: &'a BlockWeights,
    pub(crate) mixer: &'a Mixer,
    pub(crate) layer: usize,
    pub(crate) tuning: Option<Tuning<'a>>,
    pub(crate) sequences: &'a Sequences,
    pub(crate) angles: &'a Angles,
}

/// The two branches of a Liger layer before the mix, `[N, H, D]` each.
#[derive(Debug)]
pub struct Branches {
    /// The layer they belong to.
    pub layer: usize,
    /// The window branch.
    pub window: Tensor,
    /// The recurrent branch, `None` where alpha is 0.
    pub recurrent: Option<Tensor>,
    /// Its log gates `[N, K, D]` (for gsa `[N, K, slots]`).
    pub log_gate: Option<Tensor>,
    /// Weight of the recurrent branch.
    pub alpha: f32,
    /// Weight of the window branch.
    pub beta: f32,
}

/// Everything that the forward computed and the backward needs.
struct Activations {
    /// Norm of the input, `[N, d]`.
    normed: Tensor,
    /// q and k before the head norms, where there are such.
    raw_qk: Option<[Tensor; 2]>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// x A^T of the adapter for q, k, v, o.
    low: Lows,
    /// Attention's output before o_proj, `[N, H * D]`.
    mixed: Tensor,
    /// o_proj's output, where a norm comes after it.
    output: Option<Tensor>,
    softmax: SoftmaxActivations,
    /// `None` for softmax attention, whose output `mixed` is.
    liger: Option<LigerActivations>,
}

impl Activations {
    fn projected<'a>(&'a self, angles: &'a Angles) -> Projected<'a> {
        let Self { q, k, v, .. } = self;
        Projected { q, k, v, angles }
    }
}

/// What a block's forward leaves for its backward.
pub(crate) enum Kept {
    /// The input alone; the rest is computed again.
    Input(Tensor),
    /// Everything.
    All(Box<KeptAll>),
}

pub(crate) struct KeptAll {
    input: Tensor,
    attention: Activations,
    /// The residual between the halves.
    middle: Tensor,
    gate: Tensor,
    up: Tensor,
    /// down's output, where a norm comes after it.
    output: Option<Tensor>,
}

/// The halves of a block, by the number of their output's norm.
#[derive(Clone, Copy)]
enum Half {
    Attention,
    FeedForward,
}

type LayerState<'a> = Option<(&'a mut KeyValueCache, &'a mut [Tensor])>;

impl Context<'_> {
    /// Turns `x [N, d]` into the block's output.
    pub(crate) fn forward(&self, x: &mut Tensor, state: LayerState<'_>) -> Result<Option<Branches>> {
        let (middle, attention) = self.attention_forward(x, state, false)?;
        let (gate, up) = self.gate_up(&middle)?;
        *x = self.down(&middle, &gate, &up)?.0;
        let Mixer::Liger(mixer) = self.mixer else { return Ok(None) };
        Ok(attention.liger.map(|liger| Branches {
            layer: self.layer,
            log_gate: liger.branch.into_log_gate(),
            window: liger.window,
            recurrent: liger.recurrent,
            alpha: mixer.alpha,
            beta: mixer.beta,
        }))
    }

    /// The same without a state, keeping what [`Context::backward`] needs: the input alone, or everything.
    pub(crate) fn forward_keeping(&self, x: &mut Tensor, everything: bool) -> Result<Kept> {
        let (middle, mut attention) = self.attention_forward(x, None, everything)?;
        if let Some(liger) = &mut attention.liger {
            liger.recurrent = None; // only the mix needed it
        }
        let (gate, up) = self.gate_up(&middle)?;
        let (out, output) = self.down(&middle, &gate, &up)?;
        let input = std::mem::replace(x, out);
        if !everything {
            return Ok(Kept::Input(input));
        }
        Ok(Kept::All(Box::new(KeptAll { input, attention, middle, gate, up, output })))
    }

    /// `x` plus the attention's output, and what the backward needs; all that it can use again if it `trains`.
    fn attention_forward(&self, x: &Tensor, state: LayerState<'_>, trains: bool) -> Result<(Tensor, Activations)> {
        let Self { ops, config, weights, .. } = *self;
        let n = x.dim(0);
        let mut normed = ops.empty_operand(x.shape())?;
        ops.rms_norm_forward(&mut normed, x, &weights.input_norm, config.rms_norm_eps)?;
        let project = |target: Target, heads: usize| -> Result<Tensor> {
            let mut out = ops.empty(&[n, heads, config.head_dim])?;
            linear(ops, &mut out, &normed, &weights.attention[target as usize], None)?;
            Ok(out)
        };
        let mut q = project(Target::Q, config.num_heads)?;
        let mut k = project(Target::K, config.num_kv_heads)?;
        let mut v = project(Target::V, config.num_kv_heads)?;
        let mut low = Lows::default();
        if let Some(tuning) = self.tuning {
            let outputs = &mut [(Target::Q, &mut q), (Target::K, &mut k), (Target::V, &mut v)];
            tuning.forward(ops, self.layer, &normed, outputs, &mut low)?;
        }
        let mut raw_qk = None;
        if let Some(norms) = &weights.head_norms {
            let normalize = |x: &Tensor, weight: &Tensor| -> Result<Tensor> {
                let mut out = ops.empty(x.shape())?;
                ops.rms_norm_forward(&mut out, x, weight, config.rms_norm_eps)?;
                Ok(out)
            };
            let (normed_q, normed_k) = (normalize(&q, &norms[0])?, normalize(&k, &norms[1])?);
            raw_qk = Some([std::mem::replace(&mut q, normed_q), std::mem::replace(&mut k, normed_k)]);
        }
        let projected = Projected { q: &q, k: &k, v: &v, angles: self.angles };
        let (mixed, softmax, liger) = match self.mixer {
            Mixer::Softmax(spec) => {
                let mut out = ops.empty(q.shape())?;
                let rotated = projected.rotated(ops)?;
                let cache = state.map(|(cache, _)| cache);
                let mut statistics = if trains { ops.attention_statistics(&q)? } else { None };
                let inputs = softmax_inputs(&rotated, &v, self.sequences, *spec);
                ops.attention_forward(&mut out, inputs, cache, statistics.as_mut())?;
                (out, SoftmaxActivations { rotated, statistics }, None)
            }
            Mixer::Liger(liger) => {
                let (mixed, softmax, liger) = liger.forward(ops, &projected, self.sequences, state, trains)?;
                (mixed, softmax, Some(liger))
            }
        };
        let mixed = mixed.reshaped(&[n, config.num_heads * config.head_dim]);
        let mut out = ops.empty(x.shape())?;
        linear(ops, &mut out, &mixed, &weights.attention[Target::O as usize], self.addend(x))?;
        if let Some(tuning) = self.tuning {
            tuning.forward(ops, self.layer, &mixed, &mut [(Target::O, &mut out)], &mut low)?;
        }
        let (middle, output) = self.add_normed(x, out, Half::Attention)?;
        let activations = Activations { normed, raw_qk, q, k, v, low, mixed, output, softmax, liger };
        Ok((middle, activations))
    }

    /// What the last product of a half adds its output to: `x`, where no norm comes between.
    fn addend<'x>(&self, x: &'x Tensor) -> Option<&'x Tensor> {
        if self.weights.output_norms.is_none() { Some(x) } else { None }
    }

    /// `x + norm(out)` and `out`, or `out` alone where there is no norm: it has `x` in it already.
    fn add_normed(&self, x: &Tensor, out: Tensor, half: Half) -> Result<(Tensor, Option<Tensor>)> {
        let Some(norms) = &self.weights.output_norms else { return Ok((out, None)) };
        let (mut normed, mut sum) = (self.ops.empty(x.shape())?, self.ops.empty(x.shape())?);
        self.ops.rms_norm_forward(&mut normed, &out, &norms[half as usize], self.config.rms_norm_eps)?;
        self.ops.combine(&mut sum, 1.0, x, 1.0, &normed)?;
        Ok((sum, Some(out)))
    }

    /// The gradient of a half's output before its norm, given that of the sum; `None` where there is no norm and they are
    /// the same.
    fn output_gradient(&self, output: Option<&Tensor>, dx: &Tensor, half: Half) -> Result<Option<Tensor>> {
        let (Some(norms), Some(output)) = (&self.weights.output_norms, output) else { return Ok(None) };
        let mut doutput = self.ops.zeros(dx.shape())?;
        self.ops.rms_norm_backward(&mut doutput, output, &norms[half as usize], self.config.rms_norm_eps, dx)?;
        Ok(Some(doutput))
    }

    /// Gate and up of the feed-forward layer for `x`.
    fn gate_up(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let Self { ops, config, weights, .. } = *self;
        let mut normed = ops.empty_operand(x.shape())?;
        ops.rms_norm_forward(&mut normed, x, &weights.feed_forward_norm, config.rms_norm_eps)?;
        let mut gate = ops.empty_operand(&[x.dim(0), config.intermediate_size])?;
        let mut up = ops.empty_operand(&[x.dim(0), config.intermediate_size])?;
        linear(ops, &mut gate, &normed, &weights.gate, None)?;
        linear(ops, &mut up, &normed, &weights.up, None)?;
        Ok((gate, up))
    }

    /// `x` plus the feed-forward layer's output, and that output where a norm comes after it.
    fn down(&self, x: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let mut inner = self.ops.empty_operand(gate.shape())?;
        self.ops.glu_forward(&mut inner, gate, up, self.config.family.activation())?;
        let mut out = self.ops.empty(x.shape())?;
        linear(self.ops, &mut out, &inner, &self.weights.down, self.addend(x))?;
        self.add_normed(x, out, Half::FeedForward)
    }

    /// Given what the forward kept and the gradient `dx` of the block's output, adds to the adapter's gradients and
    /// turns `dx` into the gradient of the input, unless `input_gradient` says nobody needs it.
    pub(crate) fn backward(
        &self,
        kept: Kept,
        dx: &mut Tensor,
        gradients: &mut Adapter,
        input_gradient: bool,
    ) -> Result<()> {
        let KeptAll { input, attention, middle, gate, up, output } = match kept {
            Kept::All(all) => *all,
            Kept::Input(input) => {
                let (middle, attention) = self.attention_forward(&input, None, true)?;
                let (gate, up) = self.gate_up(&middle)?;
                let output = match &self.weights.output_norms {
                    Some(_) => self.down(&middle, &gate, &up)?.1,
                    None => None,
                };
                KeptAll { input, attention, middle, gate, up, output }
            }
        };
        self.feed_forward_backward(&middle, dx, gate, up, output)?;
        drop(middle);
        self.attention_backward(input_gradient.then_some(&input), dx, &attention, gradients)
    }

    fn feed_forward_backward(
        &self,
        x: &Tensor,
        dx: &mut Tensor,
        mut gate: Tensor,
        mut up: Tensor,
        output: Option<Tensor>,
    ) -> Result<()> {
        let Self { ops, config, weights, .. } = *self;
        let doutput = self.output_gradient(output.as_ref(), dx, Half::FeedForward)?;
        let mut dinner = ops.empty_operand(gate.shape())?;
        ops.gemm(&mut dinner, doutput.as_ref().unwrap_or(dx), &weights.down.weight, Gemm::INPUT_GRADIENT)?;
        ops.glu_backward(&mut gate, &mut up, &dinner, config.family.activation())?;
        let mut dnormed = ops.empty(x.shape())?;
        ops.gemm(&mut dnormed, &gate, &weights.gate.weight, Gemm::INPUT_GRADIENT)?;
        ops.gemm(&mut dnormed, &up, &weights.up.weight, Gemm::INPUT_GRADIENT.accumulated())?;
        Ok(ops.rms_norm_backward(dx, x, &weights.feed_forward_norm, config.rms_norm_eps, &dnormed)?)
    }

    fn attention_backward(
        &self,
        input: Option<&Tensor>,
        dx: &mut Tensor,
        activations: &Activations,
        gradients: &mut Adapter,
    ) -> Result<()> {
        let Self { ops, config, weights, .. } = *self;
        let n = dx.dim(0);
        let width = config.num_heads * config.head_dim;
        let mut dmixed = ops.empty(&[n, width])?;
        let weight = |target: Target| &weights.attention[target as usize].weight;
        let normed_gradient = self.output_gradient(activations.output.as_ref(), dx, Half::Attention)?;
        let doutput = normed_gradient.as_ref().unwrap_or(dx);
        ops.gemm(&mut dmixed, doutput, weight(Target::O), Gemm::INPUT_GRADIENT)?;
        if let Some(tuning) = self.tuning {
            let (x, dy, lows) = (&activations.mixed, &[(Target::O, doutput)], &activations.low);
            tuning.backward(ops, self.layer, Some(&mut dmixed), x, dy, lows, gradients)?;
        }
        let dmixed = dmixed.reshaped(activations.q.shape());
        let MixerGradients { q: mut dq, k: mut dk, v: dv } = self.mixer_backward(activations, &dmixed)?;
        if let (Some(raw), Some(norms)) = (&activations.raw_qk, &weights.head_norms) {
            for ((dy, raw), weight) in [&mut dq, &mut dk].into_iter().zip(raw).zip(norms) {
                let mut draw = ops.zeros(raw.shape())?;
                ops.rms_norm_backward(&mut draw, raw, weight, config.rms_norm_eps, dy)?;
                *dy = draw;
            }
        }
        let mut dnormed = match input {
            Some(input) => Some(ops.empty(input.shape())?),
            None => None,
        };
        let dy = [(Target::Q, &dq), (Target::K, &dk), (Target::V, &dv)];
        if let Some(dnormed) = &mut dnormed {
            for (target, dy) in dy {
                let accumulate = target != Target::Q;
                ops.gemm(dnormed, dy, weight(target), Gemm { accumulate, ..Gemm::INPUT_GRADIENT })?;
            }
        }
        if let Some(tuning) = self.tuning {
            let (x, lows) = (&activations.normed, &activations.low);
            tuning.backward(ops, self.layer, dnormed.as_mut(), x, &dy, lows, gradients)?;
        }
        if let (Some(input), Some(dnormed)) = (input, &dnormed) {
            ops.rms_norm_backward(dx, input, &weights.input_norm, config.rms_norm_eps, dnormed)?;
        }
        Ok(())
    }

    fn mixer_backward(&self, activations: &Activations, dmixed: &Tensor) -> Result<MixerGradients> {
        let ops = self.ops;
        let SoftmaxActivations { rotated, statistics } = &activations.softmax;
        match (self.mixer, &activations.liger) {
            (Mixer::Liger(liger), Some(inner)) => {
                let projected = activations.projected(self.angles);
                liger.backward(ops, &projected, &activations.softmax, inner, self.sequences, dmixed)
            }
            (mixer, _) => {
                let like = |x: &Tensor| ops.empty(x.shape());
                let (mut rope_q, mut rope_k) = (like(&activations.q)?, like(&activations.k)?);
                let mut v = like(&activations.v)?;
                let gradients = AttentionGradients { q: &mut rope_q, k: &mut rope_k, v: &mut v };
                let inputs = softmax_inputs(rotated, &activations.v, self.sequences, mixer.spec());
                ops.attention_backward(gradients, inputs, &activations.mixed, statistics.as_ref(), dmixed)?;
                let (mut q, mut k) = (like(&rope_q)?, like(&rope_k)?);
                ops.rope_backward(&mut q, 0.0, 1.0, &rope_q, self.angles.pair())?;
                ops.rope_backward(&mut k, 0.0, 1.0, &rope_k, self.angles.pair())?;
                Ok(MixerGradients { q, k, v })
            }
        }
    }
}

fn softmax_inputs<'a>(
    [q, k]: &'a [Tensor; 2],
    v: &'a Tensor,
    sequences: &'a Sequences,
    spec: AttentionSpec,
) -> Attention<'a> {
    Attention { q, k, v, keeping: None, sequences, spec }
}
