//! RoPE, feature maps and gates of query and key in one pass: sizes for `kernels/features.cu`.

use liger_tensor::checks::{self, same_length};
use liger_tensor::{FeatureGradients, FeatureMap, FeatureSpec, Features, Gate, Result, Tensor};

use crate::Cuda;
use crate::compile::Source;
use crate::driver::{Arg, Launch, int, long};

/// `GATE_...` of the kernels, the divisor (of the first head), and that of the last head, 0 where all have the same.
pub(crate) fn gate_words(gate: Gate) -> (i32, f32, f32) {
    match gate {
        Gate::LogSigmoid { divisor } => (0, divisor, 0.0),
        Gate::MeanLogSigmoid => (1, 1.0, 0.0),
        Gate::MeanNegativeSoftplus => (2, 1.0, 0.0),
        Gate::NegativeExp => (3, 1.0, 0.0),
        Gate::MeanLogSigmoidOver { shortest, longest } => (4, shortest, longest),
        Gate::None => (5, 1.0, 0.0),
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

/// Sizes of a pass over query and key, and its launch.
struct Pass {
    words: [i32; 11],
    launch: Launch,
    fours: bool,
}

impl Pass {
    fn new(q: &Tensor, k: &Tensor, spec: FeatureSpec, (recurrent, window): (f32, f32)) -> Self {
        let (tokens, heads, kv, dim) = (q.dim(0), q.dim(1), k.dim(1), q.dim(2));
        let (kind, divisor, longest) = gate_words(spec.gate);
        let float = |x: f32| x.to_bits() as i32;
        let maps = [map_word(spec.query), map_word(spec.key), kind];
        let sizes = [heads, kv, dim, tokens].map(|x| x as i32);
        let mut words = [0; 11];
        let all =
            maps.into_iter().chain([divisor, longest].map(float)).chain(sizes).chain([recurrent, window].map(float));
        words.iter_mut().zip(all).for_each(|(word, value)| *word = value);
        // A quarter of the head in threads, where that divides a warp.
        let counted = (q.len() + k.len()) / 4 < u32::MAX as usize / 2;
        let fours = (dim / 4).is_power_of_two() && dim % 8 == 0 && dim <= 128 && counted;
        // Query and key begin in blocks of their own, of eight warps.
        let warps = |elements: usize| elements.div_ceil(128).next_multiple_of(8);
        let rows = if fours { warps(q.len()) + warps(k.len()) } else { tokens * (heads + kv) };
        Self { words, launch: Launch::warp_rows(rows), fours }
    }
}

/// Tensors like query and key, and angles for their rows.
fn check(
    name: &'static str,
    like_q: [&Tensor; 2],
    like_k: [&Tensor; 3],
    (q, k): (&Tensor, &Tensor),
    angles: (&Tensor, &Tensor),
) -> Result<()> {
    checks::rope(q, angles.0, angles.1)?;
    checks::rope(k, angles.0, angles.1)?;
    like_q.into_iter().try_for_each(|x| same_length(name, x, q))?;
    like_k.into_iter().try_for_each(|x| same_length(name, x, k))
}

pub(crate) fn forward(
    cuda: &Cuda,
    out: Features<'_>,
    (q, k): (&Tensor, &Tensor),
    angles: (&Tensor, &Tensor),
    spec: FeatureSpec,
) -> Result<()> {
    const NAME: &str = "features_forward";
    let Features { rope_q, rope_k, query, key, log_gate } = out;
    check(NAME, [rope_q, query], [rope_k, key, log_gate], (q, k), angles)?;
    let pass = Pass::new(q, k, spec, (1.0, 1.0));
    let args = [
        cuda.act(NAME, rope_q)?,
        cuda.act(NAME, query)?,
        cuda.act(NAME, q)?,
        cuda.act(NAME, rope_k)?,
        cuda.act(NAME, key)?,
        cuda.f32(NAME, log_gate)?,
        cuda.act(NAME, k)?,
        cuda.f32(NAME, angles.0)?,
        cuda.f32(NAME, angles.1)?,
        Arg::Words(&pass.words),
    ];
    let name = if pass.fours { "features_forward_fours" } else { NAME };
    cuda.launch((Source::Features, name), pass.launch, &args)
}

pub(crate) fn backward(
    cuda: &Cuda,
    gradients: FeatureGradients<'_>,
    (q, k): (&Tensor, &Tensor),
    angles: (&Tensor, &Tensor),
    spec: FeatureSpec,
) -> Result<()> {
    const NAME: &str = "features_backward";
    let FeatureGradients { q: dq, k: dk, log_gate, rope_q, rope_k, recurrent, window } = gradients;
    check(NAME, [dq, rope_q], [dk, rope_k, log_gate], (q, k), angles)?;
    let pass = Pass::new(q, k, spec, (recurrent, window));
    let args = [
        cuda.act(NAME, dq)?,
        cuda.act(NAME, rope_q)?,
        cuda.act(NAME, q)?,
        cuda.act(NAME, dk)?,
        cuda.f32(NAME, log_gate)?,
        cuda.act(NAME, rope_k)?,
        cuda.act(NAME, k)?,
        cuda.f32(NAME, angles.0)?,
        cuda.f32(NAME, angles.1)?,
        Arg::Words(&pass.words),
    ];
    let name = if pass.fours { "features_backward_fours" } else { NAME };
    cuda.launch((Source::Features, name), pass.launch, &args)
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
