//! Feature maps of query and key, and the gates that come out of the key: sizes for `kernels/features.cu`.

use liger_tensor::checks::{self, same_length};
use liger_tensor::{FeatureMap, FeatureSpec, Gate, Result, Tensor};

use crate::compile::Source;
use crate::driver::{Arg, Launch, int, long};
use crate::{Cuda, rows_of};

/// `GATE_...` of the kernels, the divisor (of the first head), and that of the last head, 0 where all have the same.
pub(crate) fn gate_words(gate: Gate) -> (i32, f32, f32) {
    match gate {
        Gate::LogSigmoid { divisor } => (0, divisor, 0.0),
        Gate::MeanLogSigmoid => (1, 1.0, 0.0),
        Gate::MeanNegativeSoftplus => (2, 1.0, 0.0),
        Gate::NegativeExp => (3, 1.0, 0.0),
        Gate::MeanLogSigmoidOver { shortest, longest } => (4, shortest, longest),
    }
}

/// `MAP_...` of the kernels.
pub(crate) fn map_word(map: FeatureMap) -> i32 {
    match map {
        FeatureMap::Softmax => 0,
        FeatureMap::OneMinusSigmoid => 1,
        FeatureMap::Share => 2,
    }
}

/// One map; with gates for the key. The same kernel arguments serve both directions.
fn feature(
    cuda: &Cuda,
    name: &'static str,
    y: &Tensor,
    gates: Option<&Tensor>,
    x: &Tensor,
    how: (FeatureMap, Gate),
) -> Result<()> {
    same_length(name, y, x)?;
    let gates = match gates {
        Some(gates) => {
            same_length(name, gates, x)?;
            cuda.f32(name, gates)?
        }
        None => Arg::Pointer(0),
    };
    let ((kind, divisor, longest), map) = (gate_words(how.1), map_word(how.0));
    let (width, rows) = rows_of(x);
    let heads = x.dim(1);
    let (y, x) = (cuda.act(name, y)?, cuda.act(name, x)?);
    let [map, kind] = [map, kind].map(Arg::Int);
    let [divisor, longest] = [divisor, longest].map(Arg::Float);
    let args = [y, gates, x, map, kind, divisor, longest, int(heads), int(width), int(rows)];
    // A quarter of the head in threads, where that divides a warp.
    let fours = width % 4 == 0 && (width / 4).is_power_of_two() && width <= 128;
    let (kernel, launch) = match (name, fours) {
        ("features_forward", true) => ("features_forward_fours", Launch::warp_rows((rows * width).div_ceil(128))),
        (_, true) => ("features_backward_fours", Launch::warp_rows((rows * width).div_ceil(128))),
        (_, false) => (name, Launch::warp_rows(rows)),
    };
    cuda.launch((Source::Features, kernel), launch, &args)
}

pub(crate) fn forward(
    cuda: &Cuda,
    query: &mut Tensor,
    key: &mut Tensor,
    log_gate: &mut Tensor,
    (q, k): (&Tensor, &Tensor),
    spec: FeatureSpec,
) -> Result<()> {
    feature(cuda, "features_forward", query, None, q, (spec.query, spec.gate))?;
    feature(cuda, "features_forward", key, Some(log_gate), k, (spec.key, spec.gate))
}

pub(crate) fn backward(
    cuda: &Cuda,
    dquery: &mut Tensor,
    dkey: &mut Tensor,
    dlog_gate: &Tensor,
    (q, k): (&Tensor, &Tensor),
    spec: FeatureSpec,
) -> Result<()> {
    feature(cuda, "features_backward", dquery, None, q, (spec.query, spec.gate))?;
    feature(cuda, "features_backward", dkey, Some(dlog_gate), k, (spec.key, spec.gate))
}

pub(crate) fn slot_gates_forward(cuda: &Cuda, log_gate: &mut Tensor, write: &mut Tensor, k: &Tensor) -> Result<()> {
    const NAME: &str = "slot_gates_forward";
    same_length(NAME, write, log_gate)?;
    let (dim, slots) = checks::slots(NAME, log_gate, k)?;
    let n = log_gate.len();
    let args = [cuda.f32(NAME, log_gate)?, cuda.act(NAME, write)?, cuda.act(NAME, k)?, int(dim), int(slots), long(n)];
    cuda.launch((Source::Features, NAME), Launch::over(n, 1), &args)
}

pub(crate) fn slot_gates_backward(
    cuda: &Cuda,
    dk: &mut Tensor,
    dgate: &Tensor,
    dwrite: &Tensor,
    k: &Tensor,
) -> Result<()> {
    const NAME: &str = "slot_gates_backward";
    same_length(NAME, dk, k)?;
    same_length(NAME, dwrite, dgate)?;
    let (dim, slots) = checks::slots(NAME, dgate, k)?;
    let args = [
        cuda.act(NAME, dk)?,
        cuda.f32(NAME, dgate)?,
        cuda.act(NAME, dwrite)?,
        cuda.act(NAME, k)?,
        int(dim),
        int(slots),
        long(dk.len()),
    ];
    cuda.launch((Source::Features, NAME), Launch::over(dk.len(), 1), &args)
}
