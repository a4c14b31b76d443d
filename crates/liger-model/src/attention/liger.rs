//! Liger Attention: `alpha * recurrent + beta * window` (arXiv 2503.01496, equation 9).

use liger_tensor::{
    Attention, AttentionGradients, AttentionSpec, FeatureGradients, Features, GateAxis, Keeping, KeyValueCache, Ops,
    Recurrence, RecurrenceGradients, Sequences, Tensor,
};

use super::GateSource;
use super::structures::{Form, Slots, SlotsGradients, Structure};
use crate::config::{LigerConfig, ModelConfig};
use crate::decoder::Angles;
use crate::error::Result;

/// The settings of one layer.
#[derive(Debug, Clone)]
pub(crate) struct Liger {
    pub(crate) structure: Structure,
    pub(crate) gate: GateSource,
    pub(crate) spec: AttentionSpec,
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
    /// Memory slots, for gsa.
    pub(crate) slots: usize,
}

/// q, k, v of a layer before RoPE, and its angles.
#[derive(Clone, Copy)]
pub(crate) struct Projected<'a> {
    pub(crate) q: &'a Tensor,
    pub(crate) k: &'a Tensor,
    pub(crate) v: &'a Tensor,
    pub(crate) angles: &'a Angles,
}

impl Projected<'_> {
    /// q and k after RoPE.
    pub(crate) fn rotated(&self, ops: &dyn Ops) -> Result<[Tensor; 2]> {
        let rotated = |x: &Tensor| -> Result<Tensor> {
            let mut out = ops.empty(x.shape())?;
            ops.rope_forward(&mut out, x, self.angles.pair())?;
            Ok(out)
        };
        Ok([rotated(self.q)?, rotated(self.k)?])
    }
}

/// What the backward of a softmax over everything or over a window needs again.
pub(crate) struct SoftmaxActivations {
    /// q and k after RoPE.
    pub(crate) rotated: [Tensor; 2],
    pub(crate) statistics: Option<Tensor>,
}

/// What the backward needs again besides.
pub(crate) struct LigerActivations {
    pub(crate) window: Tensor,
    /// Of the keys, `[N, K]`, where some are kept.
    scores: Option<Tensor>,
    /// `None` where alpha is 0: the branch is not run.
    pub(crate) recurrent: Option<Tensor>,
    pub(crate) branch: Branch,
}

pub(crate) enum Branch {
    Off,
    Features { query: Tensor, key: Tensor, log_gate: Tensor, states: Option<Tensor> },
    Slots(Slots),
}

impl Branch {
    pub(crate) fn into_log_gate(self) -> Option<Tensor> {
        match self {
            Self::Off => None,
            Self::Features { log_gate, .. } => Some(log_gate),
            Self::Slots(slots) => Some(slots.log_gate),
        }
    }
}

impl Liger {
    pub(crate) fn new(liger: &LigerConfig, config: &ModelConfig, layer: usize) -> Self {
        let &LigerConfig { window, sinks, structure, gate, .. } = liger;
        // No key is farther from a query than the layer has seen: the window is up to two stretches long.
        let reach = config.trained_reach(layer).saturating_sub(2 * window);
        let kept = liger.kept(config);
        let reach = (kept > 0).then_some(reach);
        Self {
            structure,
            gate,
            spec: AttentionSpec { kept, reach, ..AttentionSpec::window(window, sinks) },
            alpha: liger.alpha,
            beta: liger.beta,
            slots: liger.slots.unwrap_or(config.head_dim),
        }
    }

    /// Whether there is a recurrent branch beside the window's: what is kept is part of the window's softmax.
    pub(crate) fn has_branch(&self) -> bool {
        self.alpha != 0.0 && self.structure != Structure::Kept
    }

    /// Shapes `[K, Dk, Dv]` of the recurrent states of one slot.
    pub(crate) fn state_shapes(&self, config: &ModelConfig) -> Vec<[usize; 3]> {
        let (kv, d) = (config.num_kv_heads, config.head_dim);
        match self.structure.form() {
            _ if self.alpha == 0.0 => Vec::new(),
            Form::Features(_) => vec![[kv, d, d]],
            Form::Slots => vec![[kv, d, self.slots], [kv, self.slots, d]],
            Form::Kept => vec![[kv, 1, d]],
        }
    }

    /// The mixed output `[N, H, D]` and the activations; all of them if it `trains`.
    pub(crate) fn forward(
        &self,
        ops: &dyn Ops,
        x: &Projected<'_>,
        sequences: &Sequences,
        state: Option<(&mut KeyValueCache, &mut [Tensor])>,
        trains: bool,
    ) -> Result<(Tensor, SoftmaxActivations, LigerActivations)> {
        let (cache, mut recurrent_state) = match state {
            Some((cache, recurrent)) => (Some(cache), Some(recurrent)),
            None => (None, None),
        };
        let mut scores = None;
        if self.spec.kept > 0 {
            let scores = scores.insert(ops.empty_f32(&[x.k.dim(0), x.k.dim(1)])?);
            let state = recurrent_state.as_deref_mut().and_then(|states| states.first_mut());
            ops.key_novelty(scores, x.k, sequences, state)?;
        }
        let mut recurrent = if self.has_branch() { Some(ops.empty(x.q.shape())?) } else { None };
        let (rotated, branch) = match (&mut recurrent, self.structure.form()) {
            (Some(recurrent), Form::Features(spec)) => {
                let (mut rope_q, mut rope_k) = (ops.empty(x.q.shape())?, ops.empty(x.k.shape())?);
                let (mut query, mut key) = (ops.empty(x.q.shape())?, ops.empty(x.k.shape())?);
                let mut log_gate = ops.empty_f32(x.k.shape())?;
                let out = Features {
                    rope_q: &mut rope_q,
                    rope_k: &mut rope_k,
                    query: &mut query,
                    key: &mut key,
                    log_gate: &mut log_gate,
                };
                ops.features_forward(out, x.q, x.k, x.angles.pair(), self.gate.of_key(spec))?;
                self.gate.forward(ops, &mut log_gate, x, spec)?;
                let inputs = recurrence(&query, &key, x.v, &log_gate, sequences);
                let state = recurrent_state.and_then(|states| states.first_mut());
                let mut states = if trains { ops.recurrence_states(inputs)? } else { None };
                ops.gated_recurrence_forward(recurrent, inputs, state, states.as_mut())?;
                ([rope_q, rope_k], Branch::Features { query, key, log_gate, states })
            }
            (Some(recurrent), Form::Slots) => {
                let qkv = (x.q, x.k, x.v);
                let slots = Slots::forward(ops, recurrent, qkv, self.slots, sequences, recurrent_state, trains)?;
                (x.rotated(ops)?, Branch::Slots(slots))
            }
            (_, Form::Kept) | (None, _) => (x.rotated(ops)?, Branch::Off),
        };
        let mut window = ops.empty(x.q.shape())?;
        let mut statistics = if trains { ops.attention_statistics(x.q)? } else { None };
        let inputs = self.windowed(x, &rotated, scores.as_ref(), sequences);
        ops.attention_forward(&mut window, inputs, cache, statistics.as_mut())?;
        let mut mixed = ops.empty(x.q.shape())?;
        match &recurrent {
            Some(recurrent) => ops.combine(&mut mixed, self.alpha, recurrent, self.beta, &window)?,
            None => ops.axpby(&mut mixed, self.beta, &window, 0.0)?,
        }
        let softmax = SoftmaxActivations { rotated, statistics };
        Ok((mixed, softmax, LigerActivations { window, scores, recurrent, branch }))
    }

    fn windowed<'a>(
        &self,
        x: &Projected<'a>,
        [q, k]: &'a [Tensor; 2],
        scores: Option<&'a Tensor>,
        sequences: &'a Sequences,
    ) -> Attention<'a> {
        let keeping = scores.map(|scores| Keeping { scores, frequencies: &x.angles.frequencies });
        Attention { q, k, v: x.v, keeping, sequences, spec: self.spec }
    }

    /// All gradients are linear in that of the output, so the branches' weights come last.
    pub(crate) fn backward(
        &self,
        ops: &dyn Ops,
        x: &Projected<'_>,
        softmax: &SoftmaxActivations,
        activations: &LigerActivations,
        sequences: &Sequences,
        dmixed: &Tensor,
    ) -> Result<MixerGradients> {
        let mut rope_q = ops.empty(x.q.shape())?;
        let mut rope_k = ops.empty(x.k.shape())?;
        let mut v = ops.empty(x.v.shape())?;
        let gradients = AttentionGradients { q: &mut rope_q, k: &mut rope_k, v: &mut v };
        let inputs = self.windowed(x, &softmax.rotated, activations.scores.as_ref(), sequences);
        ops.attention_backward(gradients, inputs, &activations.window, softmax.statistics.as_ref(), dmixed)?;
        let Self { alpha, beta, .. } = *self;
        let mut q = ops.empty(x.q.shape())?;
        let mut k = ops.empty(x.k.shape())?;
        let mut recurrent_v = ops.empty(x.v.shape())?;
        let angles = x.angles.pair();
        let mut through_gate = None;
        match (&activations.branch, self.structure.form()) {
            (Branch::Features { query, key, log_gate, states }, Form::Features(spec)) => {
                let mut dgate = ops.empty_f32(x.k.shape())?;
                let gradients = RecurrenceGradients {
                    q: &mut q,
                    k: &mut k,
                    v: &mut recurrent_v,
                    log_gate: &mut dgate,
                    state: None,
                };
                let inputs = recurrence(query, key, x.v, log_gate, sequences);
                ops.gated_recurrence_backward(gradients, inputs, None, states.as_ref(), dmixed)?;
                let (q, k) = (&mut q, &mut k);
                let (rope_q, rope_k, log_gate) = (&rope_q, &rope_k, &dgate);
                let gradients = FeatureGradients { q, k, log_gate, rope_q, rope_k, recurrent: alpha, window: beta };
                ops.features_backward(gradients, x.q, x.k, angles, self.gate.of_key(spec))?;
                through_gate = Some((dgate, spec));
            }
            (Branch::Slots(slots), _) => {
                let gradients = SlotsGradients { q: &mut q, k: &mut k, v: &mut recurrent_v };
                slots.backward(ops, gradients, (x.q, x.k, x.v), sequences, dmixed)?;
                ops.rope_backward(&mut q, alpha, beta, &rope_q, angles)?;
                ops.rope_backward(&mut k, alpha, beta, &rope_k, angles)?;
            }
            (Branch::Features { .. }, Form::Slots | Form::Kept) | (Branch::Off, _) => {
                ops.rope_backward(&mut q, 0.0, beta, &rope_q, angles)?;
                ops.rope_backward(&mut k, 0.0, beta, &rope_k, angles)?;
                ops.axpby(&mut recurrent_v, beta, &v, 0.0)?;
                return Ok(MixerGradients { q, k, v: recurrent_v });
            }
        }
        ops.axpby(&mut v, alpha, &recurrent_v, beta)?;
        let mut gradients = MixerGradients { q, k, v };
        if let Some((dgate, spec)) = through_gate {
            self.gate.backward(ops, &mut gradients, &dgate, alpha, x, spec)?;
        }
        Ok(gradients)
    }
}

/// Gradients of q, k and v before RoPE.
pub(crate) struct MixerGradients {
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
}

fn recurrence<'a>(
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    log_gate: &'a Tensor,
    sequences: &'a Sequences,
) -> Recurrence<'a> {
    Recurrence { q, k, v, log_gate, axis: GateAxis::Key, sequences }
}
