//! What Liger Attention makes of query and key before its branches: feature maps and gates, and where they go.

use crate::Tensor;

/// What becomes of a query or a key before the recurrence, over its head dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureMap {
    /// `softmax(x)`.
    Softmax,
    /// `1 - sigmoid(x)`.
    OneMinusSigmoid,
    /// `D (1 - a) softmax(x)`, of keys whose gate a is one a head: what the state holds is then a mean.
    Share,
}

/// How the log gate comes out of the key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gate {
    /// `log sigmoid(k) / divisor`.
    LogSigmoid {
        /// 16 for gla, 1 for hgrn2.
        divisor: f32,
    },
    /// `log sigmoid(mean of k over the head)`, one a head.
    MeanLogSigmoid,
    /// The same divided by a number for each key/value head, from `shortest` for the first to `longest` for the last one,
    /// evenly in their logarithms: the half-life in tokens where the mean is 0.
    MeanLogSigmoidOver {
        /// Of the first head.
        shortest: f32,
        /// Of the last head.
        longest: f32,
    },
    /// `-softplus(mean of k over the head)`, one a head.
    MeanNegativeSoftplus,
    /// `-exp(k)`.
    NegativeExp,
    /// 0: nothing is forgotten, and the gate has no gradient.
    None,
}

impl Gate {
    /// What [`Gate::MeanLogSigmoidOver`] divides by for a head of `heads`; 1 for others.
    pub fn head_divisor(self, head: usize, heads: usize) -> f32 {
        let Self::MeanLogSigmoidOver { shortest, longest } = self else { return 1.0 };
        let place = if heads > 1 { head as f32 / (heads - 1) as f32 } else { 0.5 };
        shortest * (longest / shortest).powf(place)
    }
}

/// The front of a recurrent structure: feature maps of query and key, and the gate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FeatureSpec {
    /// f(q).
    pub query: FeatureMap,
    /// The write key w.
    pub key: FeatureMap,
    /// The log gate.
    pub gate: Gate,
}

/// Where [`Ops::features_forward`](crate::Ops::features_forward) puts what it makes of q and k, each overwritten.
pub struct Features<'a> {
    /// q after RoPE, `[N, H, D]`.
    pub rope_q: &'a mut Tensor,
    /// k after RoPE, `[N, K, D]`.
    pub rope_k: &'a mut Tensor,
    /// f(q), `[N, H, D]`.
    pub query: &'a mut Tensor,
    /// The write key, `[N, K, D]`.
    pub key: &'a mut Tensor,
    /// The log gate, `[N, K, D]` in float32.
    pub log_gate: &'a mut Tensor,
}

/// Gradients of what [`Features`] holds, and where those of q and k go:
/// `recurrent` times what comes through f(q), write key and gate, and `window` times what comes through RoPE.
pub struct FeatureGradients<'a> {
    /// In: of f(q). Out: of q.
    pub q: &'a mut Tensor,
    /// In: of the write key. Out: of k.
    pub k: &'a mut Tensor,
    /// Of the log gate.
    pub log_gate: &'a Tensor,
    /// Of q after RoPE.
    pub rope_q: &'a Tensor,
    /// Of k after RoPE.
    pub rope_k: &'a Tensor,
    /// Weight of the recurrent branch.
    pub recurrent: f32,
    /// Weight of the window branch.
    pub window: f32,
}
