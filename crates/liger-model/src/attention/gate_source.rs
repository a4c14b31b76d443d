//! Where gla's gate comes from: the key, or what the paper compares it with.

use liger_tensor::{DType, FeatureGradients, FeatureSpec, Features, Gate, Gemm, Ops, Tensor};

use super::{MixerGradients, Projected};
use crate::error::Result;

/// What the gate of a head is made of, `[N, K, D]`. Formula: `attention` in `tests/golden/reference.py`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GateSource {
    /// The key: Liger's own choice.
    #[default]
    Key,
    /// The mean of the queries that share a key.
    Query,
    /// The value.
    Value,
    /// Nothing: the recurrence never forgets.
    None,
}

impl GateSource {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Key, Self::Query, Self::Value, Self::None];

    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Query => "query",
            Self::Value => "value",
            Self::None => "none",
        }
    }

    /// The source of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.name() == name)
    }

    /// The features of query and key, without a gate where it comes from elsewhere.
    pub(crate) fn of_key(self, spec: FeatureSpec) -> FeatureSpec {
        if self == Self::Key { spec } else { FeatureSpec { gate: Gate::None, ..spec } }
    }

    /// Overwrites the log gate that [`GateSource::of_key`] left open.
    pub(super) fn forward(
        self,
        ops: &dyn Ops,
        log_gate: &mut Tensor,
        x: &Projected<'_>,
        spec: FeatureSpec,
    ) -> Result<()> {
        let Some(source) = self.source(ops, x)? else { return Ok(()) };
        // The same pass with the source in the place of the key; only its gate is wanted.
        let (mut rope_q, mut query) = (ops.empty(x.q.shape())?, ops.empty(x.q.shape())?);
        let (mut rope_k, mut key) = (ops.empty(x.k.shape())?, ops.empty(x.k.shape())?);
        let (rope_q, rope_k, query, key) = (&mut rope_q, &mut rope_k, &mut query, &mut key);
        let out = Features { rope_q, rope_k, query, key, log_gate };
        Ok(ops.features_forward(out, x.q, &source, x.angles.pair(), spec)?)
    }

    /// Adds what flows through the log gate, times `weight`, to the gradients of its source.
    pub(super) fn backward(
        self,
        ops: &dyn Ops,
        gradients: &mut MixerGradients,
        dlog_gate: &Tensor,
        weight: f32,
        x: &Projected<'_>,
        spec: FeatureSpec,
    ) -> Result<()> {
        let Some(source) = self.source(ops, x)? else { return Ok(()) };
        let (mut of_query, mut of_source) = (ops.zeros(x.q.shape())?, ops.zeros(x.k.shape())?);
        let (rope_q, rope_k) = (&ops.zeros(x.q.shape())?, &ops.zeros(x.k.shape())?);
        let (q, k) = (&mut of_query, &mut of_source);
        let passed = FeatureGradients { q, k, log_gate: dlog_gate, rope_q, rope_k, recurrent: weight, window: 0.0 };
        ops.features_backward(passed, x.q, &source, x.angles.pair(), spec)?;
        if self == Self::Value {
            return Ok(ops.axpby(&mut gradients.v, 1.0, &of_source, 1.0)?);
        }
        let [of_group, of_head] = group_shapes(x);
        let mut spread = ops.empty(&of_group)?;
        ops.gemm(&mut spread, &of_source.reshaped(&of_head), &average(ops, x)?, Gemm::INPUT_GRADIENT)?;
        Ok(ops.axpby(&mut gradients.q, 1.0, &spread.reshaped(x.q.shape()), 1.0)?)
    }

    fn source(self, ops: &dyn Ops, x: &Projected<'_>) -> Result<Option<Tensor>> {
        let copy = |x: &Tensor| -> Result<Tensor> {
            let mut out = ops.empty(x.shape())?;
            ops.axpby(&mut out, 1.0, x, 0.0)?;
            Ok(out)
        };
        match self {
            Self::Key | Self::None => Ok(None),
            Self::Value => Ok(Some(copy(x.v)?)),
            Self::Query => {
                let [of_group, of_head] = group_shapes(x);
                let mut mean = ops.empty(&of_head)?;
                ops.gemm(&mut mean, &copy(x.q)?.reshaped(&of_group), &average(ops, x)?, Gemm::LINEAR)?;
                Ok(Some(mean.reshaped(x.k.shape())))
            }
        }
    }
}

/// `[N K, G D]` of queries by group, and `[N K, D]` of one head of each.
fn group_shapes(x: &Projected<'_>) -> [[usize; 2]; 2] {
    let rows = x.k.dim(0) * x.k.dim(1);
    [[rows, x.q.len() / rows.max(1)], [rows, x.k.dim(2)]]
}

/// The matrix `[D, G D]` that takes the mean of a group.
fn average(ops: &dyn Ops, x: &Projected<'_>) -> Result<Tensor> {
    let (dim, group) = (x.k.dim(2), x.q.dim(1) / x.k.dim(1));
    let weight = |i: usize| if i % dim == i / (group * dim) { 1.0 / group as f32 } else { 0.0 };
    Ok(ops.upload((0..dim * group * dim).map(weight).collect(), &[dim, group * dim], DType::F32)?)
}
