//! LoRA's products of few columns: sizes for `kernels/low_rank.cu`.

use liger_tensor::checks::same_length;
use liger_tensor::{DType, Error, Result, Tensor, low_rank_backward_by_products, low_rank_forward_by_products};

use crate::compile::{Source, Variant};
use crate::driver::{Arg, Launch};
use crate::{Cuda, rows_of, shared_bytes};

/// Projections that one launch takes.
const MOST_PROJECTIONS: usize = 3;
/// Columns of all of them together, at most: a warp's sums are in registers.
const MOST_COLUMNS: usize = 40;
/// Rows and columns of a block: `ROWS` and `ACROSS` of the kernels.
const ROWS: usize = 64;
const ACROSS: usize = 128;

/// The kernels for matrices `a [r, inputs]`, if they take them; else plain products do.
fn variant(cuda: &Cuda, a: &[&Tensor], x: &Tensor) -> Option<Variant> {
    let (count, rank, (inputs, rows)) = (a.len(), a.first()?.dim(0), rows_of(x));
    let fits = cuda.activations == DType::Bf16
        && x.dtype() == DType::Bf16
        && count <= MOST_PROJECTIONS
        && rank.is_multiple_of(8)
        && rank * count <= MOST_COLUMNS
        && inputs.is_multiple_of(32)
        && rows >= ROWS
        && a.iter().all(|a| a.dtype() == DType::F32 && a.shape() == [rank, inputs]);
    fits.then_some(Variant { activations: DType::Bf16, sizes: [rank, count, 0, 0, 0] })
}

/// Addresses of up to [`MOST_PROJECTIONS`] tensors.
fn pointers<'a>(
    tensors: impl Iterator<Item = &'a Tensor>,
    of: impl Fn(&'a Tensor) -> Result<Arg<'static>>,
) -> Result<Vec<Arg<'static>>> {
    let mut list = tensors.map(of).collect::<Result<Vec<_>>>()?;
    list.resize_with(MOST_PROJECTIONS, || Arg::Pointer(0));
    Ok(list)
}

fn check(operation: &'static str, tensor: &Tensor, shape: [usize; 2]) -> Result<()> {
    if tensor.shape() == shape {
        return Ok(());
    }
    Err(Error::Shape { operation, found: tensor.shape().to_vec(), expected: format!("{shape:?}") })
}

pub(crate) fn forward(cuda: &Cuda, low: &mut [Tensor], x: &Tensor, a: &[&Tensor]) -> Result<()> {
    const NAME: &str = "low_rank_forward";
    let Some(variant) = variant(cuda, a, x) else {
        return low_rank_forward_by_products(cuda, low, x, a);
    };
    let ([rank, ..], (inputs, rows)) = (variant.sizes, rows_of(x));
    low.iter().try_for_each(|low| check(NAME, low, [rows, rank]))?;
    let mut args = pointers(low.iter(), |low| cuda.act(NAME, low))?;
    args.extend(pointers(a.iter().copied(), |a| cuda.f32(NAME, a))?);
    args.extend([cuda.act(NAME, x)?, Arg::Int(rows as i32), Arg::Int(inputs as i32)]);
    let launch = Launch { grid: (rows.div_ceil(ROWS) as u32, 1, 1), block: (256, 1), shared: 0 };
    cuda.gpu.launch((Source::LowRank, NAME), variant, launch, &args)
}

pub(crate) fn backward(
    cuda: &Cuda,
    dx: Option<&mut Tensor>,
    da: &mut [&mut Tensor],
    dlow: &[Tensor],
    x: &Tensor,
    a: &[&Tensor],
) -> Result<()> {
    const NAME: &str = "low_rank_backward";
    let Some(variant) = variant(cuda, a, x) else {
        return low_rank_backward_by_products(cuda, dx, da, dlow, x, a);
    };
    let ([rank, count, ..], (inputs, rows)) = (variant.sizes, rows_of(x));
    dlow.iter().try_for_each(|dlow| check(NAME, dlow, [rows, rank]))?;
    da.iter().try_for_each(|da| check(NAME, da, [rank, inputs]))?;
    if let Some(dx) = &dx {
        same_length(NAME, dx, x)?;
    }
    let (columns, across) = (rank * count, inputs.div_ceil(ACROSS));
    // Two blocks for each processor.
    let splits = (2 * cuda.gpu.processors / across).clamp(1, rows.div_ceil(ROWS));
    let parts = cuda.gpu.allocate(splits * columns * inputs * 4)?;
    let mut args = vec![Arg::Pointer(parts.pointer)];
    args.push(dx.map_or(Ok(Arg::Pointer(0)), |dx| cuda.act(NAME, dx))?);
    args.extend(pointers(dlow.iter(), |dlow| cuda.act(NAME, dlow))?);
    args.extend(pointers(a.iter().copied(), |a| cuda.f32(NAME, a))?);
    args.extend([cuda.act(NAME, x)?, Arg::Int(rows as i32), Arg::Int(inputs as i32)]);
    let padded = columns.next_multiple_of(16);
    let shared = shared_bytes(cuda.activations, &[(ROWS, ACROSS), (ROWS, padded), (padded, ACROSS)], &[]);
    let launch = Launch { grid: (across as u32, splits as u32, 1), block: (256, 1), shared };
    cuda.gpu.launch((Source::LowRank, NAME), variant, launch, &args)?;

    let mut args = pointers(da.iter().map(|da| &**da), |da| cuda.f32(NAME, da))?;
    args.extend([Arg::Pointer(parts.pointer), Arg::Int(splits as i32), Arg::Int(inputs as i32)]);
    let launch = Launch { grid: ((columns * inputs).div_ceil(256) as u32, 1, 1), block: (256, 1), shared: 0 };
    cuda.gpu.launch((Source::LowRank, "low_rank_add"), variant, launch, &args)
}
