//! Losses over rows of logits, sums of squares and the optimizer: sizes for `kernels/loss.cu`.

use liger_tensor::checks::{logit_rows, same_length};
use liger_tensor::{AdamwStep, Error, Result, Tensor};

use crate::compile::{Source, Variant};
use crate::driver::{Arg, Launch, int, long};
use crate::{Cuda, pointer, rows_of, typed};

/// Runs a loss kernel over rows of logits of either type; `marks` is a label or a flag a row.
fn loss(
    cuda: &Cuda,
    name: &'static str,
    logits: &mut Tensor,
    teacher: Option<&Tensor>,
    marks: &[i32],
    scale: Option<f32>,
) -> Result<Vec<f32>> {
    let rows = marks.len();
    let vocabulary = logit_rows(name, logits, rows)?;
    let losses = cuda.gpu.allocate(rows * 4)?;
    let uploaded = crate::batch::upload(&cuda.gpu, marks)?;
    let mut args = vec![Arg::Pointer(losses.pointer), Arg::Pointer(pointer(name, logits)?)];
    if let Some(teacher) = teacher {
        args.push(Arg::Pointer(typed(name, teacher, logits.dtype())?));
    }
    args.extend([
        Arg::Pointer(uploaded.pointer),
        int(vocabulary),
        Arg::Int(i32::from(scale.is_some())),
        Arg::Float(scale.unwrap_or(0.0)),
    ]);
    let launch = Launch { grid: (rows as u32, 1, 1), block: (512, 1), ..Launch::default() };
    cuda.gpu.launch((Source::Loss, name), Variant::of(logits.dtype()), launch, &args)?;
    cuda.gpu.read(losses.pointer, rows)
}

pub(crate) fn cross_entropy(cuda: &Cuda, logits: &mut Tensor, labels: &[i64], scale: Option<f32>) -> Result<Vec<f32>> {
    let vocabulary = rows_of(logits).0;
    if let Some(&id) = labels.iter().find(|&&id| id >= vocabulary as i64) {
        return Err(Error::TokenOutOfRange { id, vocabulary });
    }
    let labels: Vec<i32> = labels.iter().map(|&id| id.max(-1) as i32).collect();
    loss(cuda, "cross_entropy", logits, None, &labels, scale)
}

pub(crate) fn kl_divergence(
    cuda: &Cuda,
    student: &mut Tensor,
    teacher: &Tensor,
    count: &[bool],
    scale: Option<f32>,
) -> Result<Vec<f32>> {
    same_length("kl_divergence", student, teacher)?;
    let count: Vec<i32> = count.iter().map(|&c| i32::from(c)).collect();
    loss(cuda, "kl_divergence", student, Some(teacher), &count, scale)
}

pub(crate) fn argmax(cuda: &Cuda, logits: &Tensor) -> Result<Vec<u32>> {
    let (vocabulary, rows) = rows_of(logits);
    let found = cuda.gpu.allocate(rows * 8)?;
    cuda.gpu.clear(found.pointer, rows * 8)?;
    let args = [Arg::Pointer(found.pointer), Arg::Pointer(pointer("argmax", logits)?), int(vocabulary)];
    let shares = vocabulary.div_ceil(4096) as u32;
    let launch = Launch { grid: (shares, rows as u32, 1), block: (256, 1), ..Launch::default() };
    cuda.gpu.launch((Source::Loss, "argmax"), Variant::of(logits.dtype()), launch, &args)?;
    Ok(cuda.gpu.read::<u64>(found.pointer, rows)?.into_iter().map(|key| key as u32).collect())
}

/// All parts are read back at once: one wait, however many tensors.
pub(crate) fn sum_of_squares(cuda: &Cuda, tensors: &[&Tensor]) -> Result<f64> {
    let blocks = |x: &Tensor| x.len().div_ceil(4096).clamp(1, 256);
    let total: usize = tensors.iter().map(|x| blocks(x)).sum();
    let parts = cuda.gpu.allocate(total * 8)?;
    let mut at = 0;
    for x in tensors {
        let launch = Launch { grid: (blocks(x) as u32, 1, 1), block: (256, 1), ..Launch::default() };
        let args = [Arg::Pointer(parts.pointer + at as u64 * 8), cuda.f32("sum_of_squares", x)?, long(x.len())];
        cuda.launch((Source::Loss, "sum_of_squares"), launch, &args)?;
        at += blocks(x);
    }
    Ok(cuda.gpu.read::<f64>(parts.pointer, total)?.iter().sum())
}

pub(crate) fn adamw(
    cuda: &Cuda,
    parameter: &mut Tensor,
    gradient: &Tensor,
    first: &mut Tensor,
    second: &mut Tensor,
    step: AdamwStep,
) -> Result<()> {
    for other in [gradient, &*first, &*second] {
        same_length("adamw", parameter, other)?;
    }
    let correction = |beta: f32| (1.0 / (1.0 - f64::from(beta).powf(step.step as f64))) as f32;
    let n = parameter.len();
    let tensor = |t: &Tensor| cuda.f32("adamw", t);
    let args = [
        tensor(parameter)?,
        tensor(gradient)?,
        tensor(first)?,
        tensor(second)?,
        Arg::Float(step.learning_rate),
        Arg::Float(step.beta1),
        Arg::Float(step.beta2),
        Arg::Float(step.epsilon),
        Arg::Float(step.weight_decay),
        Arg::Float(correction(step.beta1)),
        Arg::Float(correction(step.beta2)),
        Arg::Float(step.gradient_scale),
        long(n),
    ];
    cuda.launch((Source::Loss, "adamw"), Launch::over(n, 1), &args)
}
