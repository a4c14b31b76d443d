//! Losses over rows of logits, sums of squares and the optimizer: sizes for `kernels/loss.cu`.

use liger_tensor::checks::{logit_rows, same_length};
use liger_tensor::{AdamwParameter, AdamwStep, DType, Error, Result, Tensor};

use crate::compile::{Source, Variant};
use crate::driver::{Arg, Block, Launch, int};
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
    let launch = Launch { grid: (rows as u32, 1, 1), block: (512, 1), shared: 0 };
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

/// Addresses and lengths as a table on the GPU.
fn table(cuda: &Cuda, words: &[u64]) -> Result<Block> {
    let block = cuda.gpu.allocate(words.len() * 8)?;
    cuda.gpu.write(&block, words)?;
    Ok(block)
}

/// One launch over all tensors, a grid of shares of the longest for each.
fn over_tensors(longest: usize, tensors: usize) -> Launch {
    let shares = longest.div_ceil(4096).clamp(1, 256) as u32;
    Launch { grid: (shares, tensors as u32, 1), block: (256, 1), shared: 0 }
}

/// All parts are read back at once: one wait, however many tensors.
pub(crate) fn sum_of_squares(cuda: &Cuda, tensors: &[&Tensor]) -> Result<f64> {
    const NAME: &str = "sum_of_squares";
    let mut words = Vec::with_capacity(2 * tensors.len());
    for x in tensors {
        words.extend([typed(NAME, x, DType::F32)?, x.len() as u64]);
    }
    let table = table(cuda, &words)?;
    let launch = over_tensors(tensors.iter().map(|x| x.len()).max().unwrap_or(0), tensors.len());
    let total = tensors.len() * launch.grid.0 as usize;
    let parts = cuda.gpu.allocate(total * 8)?;
    cuda.launch((Source::Loss, NAME), launch, &[Arg::Pointer(parts.pointer), Arg::Pointer(table.pointer)])?;
    Ok(cuda.gpu.read::<f64>(parts.pointer, total)?.iter().sum())
}

pub(crate) fn adamw(cuda: &Cuda, parameters: &mut [AdamwParameter<'_>], step: AdamwStep) -> Result<()> {
    let mut words = Vec::with_capacity(5 * parameters.len());
    for p in parameters.iter() {
        for tensor in [&*p.value, p.gradient, &*p.first_moment, &*p.second_moment] {
            same_length("adamw", p.value, tensor)?;
            words.push(typed("adamw", tensor, DType::F32)?);
        }
        words.push(p.value.len() as u64);
    }
    let table = table(cuda, &words)?;
    let correction = |beta: f32| (1.0 / (1.0 - f64::from(beta).powf(step.step as f64))) as f32;
    let args = [
        Arg::Pointer(table.pointer),
        Arg::Float(step.learning_rate),
        Arg::Float(step.beta1),
        Arg::Float(step.beta2),
        Arg::Float(step.epsilon),
        Arg::Float(step.weight_decay),
        Arg::Float(correction(step.beta1)),
        Arg::Float(correction(step.beta2)),
        Arg::Float(step.gradient_scale),
    ];
    let longest = parameters.iter().map(|p| p.value.len()).max().unwrap_or(0);
    cuda.launch((Source::Loss, "adamw"), over_tensors(longest, parameters.len()), &args)
}
