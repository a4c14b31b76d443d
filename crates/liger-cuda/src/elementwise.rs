//! Norms, RoPE, SwiGLU, embedding, dropout and sums: sizes for `kernels/elementwise.cu`.

use liger_tensor::checks::{self, same_length, whole_rows};
use liger_tensor::{Activation, DType, Result, Tensor};

use crate::compile::{Source, Variant};
use crate::driver::{Arg, Block, Launch, int, long};
use crate::{Cuda, pointer, rows_of, typed};

pub(crate) fn add_bias(cuda: &Cuda, x: &mut Tensor, bias: &Tensor) -> Result<()> {
    whole_rows("add_bias", x, bias.len())?;
    let args = [cuda.act("add_bias", x)?, cuda.f32("add_bias", bias)?, int(bias.len()), long(x.len())];
    cuda.launch((Source::Elementwise, "add_bias"), Launch::over(x.len(), 1), &args)
}

pub(crate) fn axpby(cuda: &Cuda, y: &mut Tensor, a: f32, x: &Tensor, b: f32) -> Result<()> {
    same_length("axpby", y, x)?;
    let n = x.len();
    let args = [
        Arg::Pointer(pointer("axpby", y)?),
        Arg::Pointer(typed("axpby", x, y.dtype())?),
        Arg::Float(a),
        Arg::Float(b),
        long(n),
    ];
    cuda.gpu.launch((Source::Elementwise, "axpby"), Variant::of(y.dtype()), Launch::over(n, 4), &args)
}

/// A short row is a warp's work, a long one a block's.
fn norm_launch(width: usize, rows: usize) -> Launch {
    if width <= 256 {
        return Launch::warp_rows(rows);
    }
    Launch { grid: (rows as u32, 1, 1), block: (256, 1), shared: 0 }
}

pub(crate) fn rms_norm_forward(cuda: &Cuda, out: &mut Tensor, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<()> {
    const NAME: &str = "rms_norm_forward";
    same_length(NAME, out, x)?;
    let (width, rows) = (weight.len(), whole_rows(NAME, x, weight.len())?);
    let args =
        [cuda.act(NAME, out)?, cuda.act(NAME, x)?, cuda.f32(NAME, weight)?, Arg::Float(epsilon), int(width), int(rows)];
    cuda.launch((Source::Elementwise, NAME), norm_launch(width, rows), &args)
}

pub(crate) fn rms_norm_backward(
    cuda: &Cuda,
    dx: &mut Tensor,
    x: &Tensor,
    w: &Tensor,
    epsilon: f32,
    dy: &Tensor,
) -> Result<()> {
    const NAME: &str = "rms_norm_backward";
    same_length(NAME, dx, x)?;
    same_length(NAME, dy, x)?;
    let (width, rows) = (w.len(), whole_rows(NAME, x, w.len())?);
    let args = [
        cuda.act(NAME, dx)?,
        cuda.act(NAME, x)?,
        cuda.f32(NAME, w)?,
        Arg::Float(epsilon),
        cuda.act(NAME, dy)?,
        int(width),
        int(rows),
    ];
    cuda.launch((Source::Elementwise, NAME), norm_launch(width, rows), &args)
}

pub(crate) fn combine(cuda: &Cuda, out: &mut Tensor, a: f32, x: &Tensor, b: f32, y: &Tensor) -> Result<()> {
    same_length("combine", out, x)?;
    same_length("combine", out, y)?;
    let (x, y) = (cuda.act("combine", x)?, cuda.act("combine", y)?);
    let args = [cuda.act("combine", out)?, Arg::Float(a), x, Arg::Float(b), y, long(out.len())];
    cuda.launch((Source::Elementwise, "combine"), Launch::over(out.len(), 4), &args)
}

/// `out = keep out + scale R x`, with R the rotation, or `inverse` that back.
pub(crate) fn rope(
    cuda: &Cuda,
    out: &mut Tensor,
    (keep, scale): (f32, f32),
    x: &Tensor,
    (cos, sin): (&Tensor, &Tensor),
    inverse: bool,
) -> Result<()> {
    const NAME: &str = "rope";
    let pairs = x.len() / 2;
    same_length(NAME, out, x)?;
    checks::rope(x, cos, sin)?;
    let args = [
        cuda.act(NAME, out)?,
        cuda.act(NAME, x)?,
        cuda.f32(NAME, cos)?,
        cuda.f32(NAME, sin)?,
        int(x.dim(1)),
        int(x.dim(2)),
        Arg::Float(if inverse { -1.0 } else { 1.0 }),
        Arg::Float(scale),
        Arg::Float(keep),
        long(pairs),
    ];
    // Four pairs a thread, counted in 32 bits, where that is possible.
    let fours = x.dim(2).is_multiple_of(8) && pairs / 4 < u32::MAX as usize;
    let (name, each) = if fours { ("rope_fours", 4) } else { (NAME, 1) };
    cuda.launch((Source::Elementwise, name), Launch::over(pairs, each), &args)
}

pub(crate) fn glu_forward(
    cuda: &Cuda,
    out: &mut Tensor,
    gate: &Tensor,
    up: &Tensor,
    activation: Activation,
) -> Result<()> {
    const NAME: &str = "glu_forward";
    same_length(NAME, out, gate)?;
    same_length(NAME, up, gate)?;
    let [a, b] = activation.coefficients().map(Arg::Float);
    let args = [cuda.act(NAME, out)?, cuda.act(NAME, gate)?, cuda.act(NAME, up)?, a, b, long(out.len())];
    cuda.launch((Source::Elementwise, NAME), Launch::over(out.len(), 4), &args)
}

pub(crate) fn glu_backward(
    cuda: &Cuda,
    gate: &mut Tensor,
    up: &mut Tensor,
    dout: &Tensor,
    activation: Activation,
) -> Result<()> {
    const NAME: &str = "glu_backward";
    same_length(NAME, gate, dout)?;
    same_length(NAME, up, dout)?;
    let [a, b] = activation.coefficients().map(Arg::Float);
    let args = [cuda.act(NAME, gate)?, cuda.act(NAME, up)?, cuda.act(NAME, dout)?, a, b, long(dout.len())];
    cuda.launch((Source::Elementwise, NAME), Launch::over(dout.len(), 4), &args)
}

pub(crate) fn embedding(cuda: &Cuda, out: &mut Tensor, table: &Tensor, ids: &[u32]) -> Result<()> {
    checks::embedding(out, table, ids)?;
    let uploaded = cuda.gpu.allocate(ids.len() * 4)?;
    cuda.gpu.write(&uploaded, ids)?;
    embedding_rows(cuda, out, table, &uploaded)
}

/// The rows of `table` that a block on the GPU names; as many as `out` has.
pub(crate) fn embedding_rows(cuda: &Cuda, out: &Tensor, table: &Tensor, ids: &Block) -> Result<()> {
    let width = table.dim(1);
    let args = [
        cuda.act("embedding", out)?,
        Arg::Pointer(pointer("embedding", table)?),
        Arg::Int(i32::from(table.dtype() == DType::Bf16)),
        Arg::Pointer(ids.pointer),
        int(width),
    ];
    let launch = Launch { grid: ((out.len() / width) as u32, 1, 1), block: (256, 1), shared: 0 };
    cuda.launch((Source::Elementwise, "embedding"), launch, &args)
}

pub(crate) fn dropout(cuda: &Cuda, x: &mut Tensor, p: f32, seed: u64) -> Result<()> {
    let threshold = (f64::from(p) * u64::MAX as f64) as u64;
    let args = [
        cuda.act("dropout", x)?,
        Arg::Long(threshold as i64),
        Arg::Float(1.0 / (1.0 - p)),
        Arg::Long(seed as i64),
        long(x.len()),
    ];
    cuda.launch((Source::Elementwise, "dropout"), Launch::over(x.len(), 1), &args)
}

pub(crate) fn softmax_forward(cuda: &Cuda, x: &mut Tensor) -> Result<()> {
    let (width, rows) = rows_of(x);
    let args = [cuda.act("softmax_forward", x)?, int(width), int(rows)];
    cuda.launch((Source::Elementwise, "softmax_forward"), Launch::warp_rows(rows), &args)
}

pub(crate) fn softmax_backward(cuda: &Cuda, dy: &mut Tensor, y: &Tensor) -> Result<()> {
    same_length("softmax_backward", dy, y)?;
    let (width, rows) = rows_of(y);
    let args = [cuda.act("softmax_backward", dy)?, cuda.act("softmax_backward", y)?, int(width), int(rows)];
    cuda.launch((Source::Elementwise, "softmax_backward"), Launch::warp_rows(rows), &args)
}
