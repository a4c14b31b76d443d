//! Liger Attention: `alpha * recurrent + beta * window` (arXiv 2503.01496, equation 9).

use liger_tensor::{
    Attention, AttentionGradients, AttentionSpec, GateAxis, Keeping, KeyValueCache, Ops, Recurrence,
    RecurrenceGradients, Sequences, Tensor,
};

use super::structures::{Form, Slots, SlotsGradients, Structure};
use crate::config::{LigerConfig, ModelConfig};
use crate::error::Result;

/// The settings of one layer.
#[derive(Debug, Clone)]
pub(crate) struct Liger {
    pub(crate) structure: Structure,
    pub(crate) spec: AttentionSpec,
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
    /// Memory slots, for gsa.
    pub(crate) slots: usize,
}

/// q, k, v of a layer: before RoPE for the recurrence, after it for the window.
pub(crate) struct Projected<'a> {
    pub(crate) q: &'a Tensor,
    pub(crate) k: &'a Tensor,
    pub(crate) v: &'a Tensor,
    pub(crate) rope_q: &'a Tensor,
    pub(crate) rope_k: &'a Tensor,
    /// RoPE's, in revolutions.
    pub(crate) frequencies: &'a Tensor,
}

/// What the backward needs again.
pub(crate) struct LigerActivations {
    pub(crate) window: Tensor,
    statistics: Option<Tensor>,
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
    pub(crate) fn new(liger: &LigerConfig, config: &ModelConfig) -> Self {
        let &LigerConfig { window, sinks, structure, .. } = liger;
        // No key is farther from a query than the base model has seen: the window is up to two stretches long.
        let reach = config.max_position_embeddings.saturating_sub(2 * window);
        let kept = liger.kept();
        let reach = (kept > 0).then_some(reach);
        Self {
            structure,
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
    ) -> Result<(Tensor, LigerActivations)> {
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
        let mut window = ops.empty(x.q.shape())?;
        let mut statistics = if trains { ops.attention_statistics(x.q)? } else { None };
        let kept = statistics.as_mut();
        ops.attention_forward(&mut window, self.windowed(x, scores.as_ref(), sequences), cache, kept)?;
        let mut mixed = ops.empty(x.q.shape())?;
        if !self.has_branch() {
            ops.axpby(&mut mixed, self.beta, &window, 0.0)?;
            return Ok((mixed, LigerActivations { window, statistics, scores, recurrent: None, branch: Branch::Off }));
        }
        let mut recurrent = ops.empty(x.q.shape())?;
        let branch = match self.structure.form() {
            Form::Features(spec) => {
                let mut query = ops.empty(x.q.shape())?;
                let mut key = ops.empty(x.k.shape())?;
                let mut log_gate = ops.empty_f32(x.k.shape())?;
                ops.features_forward(&mut query, &mut key, &mut log_gate, x.q, x.k, spec)?;
                let inputs = recurrence(&query, &key, x.v, &log_gate, sequences);
                let state = recurrent_state.and_then(|states| states.first_mut());
                let mut states = if trains { ops.recurrence_states(inputs)? } else { None };
                ops.gated_recurrence_forward(&mut recurrent, inputs, state, states.as_mut())?;
                Branch::Features { query, key, log_gate, states }
            }
            Form::Slots => {
                let qkv = (x.q, x.k, x.v);
                Branch::Slots(Slots::forward(ops, &mut recurrent, qkv, self.slots, sequences, recurrent_state, trains)?)
            }
            Form::Kept => Branch::Off, // has no branch: it has left above
        };
        ops.combine(&mut mixed, self.alpha, &recurrent, self.beta, &window)?;
        Ok((mixed, LigerActivations { window, statistics, scores, recurrent: Some(recurrent), branch }))
    }

    fn windowed<'a>(&self, x: &Projected<'a>, scores: Option<&'a Tensor>, sequences: &'a Sequences) -> Attention<'a> {
        let keeping = scores.map(|scores| Keeping { scores, frequencies: x.frequencies });
        Attention { q: x.rope_q, k: x.rope_k, v: x.v, keeping, sequences, spec: self.spec }
    }

    /// Gradients of q, k (before RoPE, the recurrent branch's part), of v (both), and of q, k after RoPE.
    pub(crate) fn backward(
        &self,
        ops: &dyn Ops,
        x: &Projected<'_>,
        activations: &LigerActivations,
        sequences: &Sequences,
        dmixed: &Tensor,
    ) -> Result<LigerGradients> {
        let mut rope_q = ops.empty(x.q.shape())?;
        let mut rope_k = ops.empty(x.k.shape())?;
        let mut v = ops.empty(x.v.shape())?;
        let gradients = AttentionGradients { q: &mut rope_q, k: &mut rope_k, v: &mut v };
        let inputs = self.windowed(x, activations.scores.as_ref(), sequences);
        ops.attention_backward(gradients, inputs, &activations.window, activations.statistics.as_ref(), dmixed)?;
        let Self { alpha, beta, .. } = *self;
        if matches!(activations.branch, Branch::Off) {
            let mut scaled = ops.empty(v.shape())?;
            ops.axpby(&mut scaled, beta, &v, 0.0)?;
            return Ok(LigerGradients { plain: None, v: scaled, rope_q, rope_k, alpha, beta });
        }
        let mut q = ops.empty(x.q.shape())?;
        let mut k = ops.empty(x.k.shape())?;
        let mut recurrent_v = ops.empty(x.v.shape())?;
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
                ops.features_backward(&mut q, &mut k, &dgate, x.q, x.k, spec)?;
            }
            (Branch::Slots(slots), _) => {
                let gradients = SlotsGradients { q: &mut q, k: &mut k, v: &mut recurrent_v };
                slots.backward(ops, gradients, (x.q, x.k, x.v), sequences, dmixed)?;
            }
            (Branch::Features { .. }, Form::Slots | Form::Kept) | (Branch::Off, _) => {}
        }
        ops.axpby(&mut v, alpha, &recurrent_v, beta)?;
        Ok(LigerGradients { plain: Some((q, k)), v, rope_q, rope_k, alpha, beta })
    }
}

/// See [`Liger::backward`]. All gradients are linear in that of the output, so the branches' weights come last: `alpha` and
/// `beta` are still to be multiplied to `plain` and to `rope_q`, `rope_k`.
pub(crate) struct LigerGradients {
    pub(crate) plain: Option<(Tensor, Tensor)>,
    pub(crate) v: Tensor,
    pub(crate) rope_q: Tensor,
    pub(crate) rope_k: Tensor,
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
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
