//! Choosing the next token from rows of logits: sizes for `kernels/sampling.cu`.

use liger_tensor::{Draw, Error, Result, Tensor};

use crate::compile::{Source, Variant};
use crate::driver::{Arg, Launch, int};
use crate::{Cuda, pointer, rows_of};

pub(crate) fn argmax(cuda: &Cuda, logits: &Tensor) -> Result<Vec<u32>> {
    let (vocabulary, rows) = rows_of(logits);
    let found = cuda.gpu.allocate(rows * 8)?;
    cuda.gpu.clear(found.pointer, rows * 8)?;
    let args = [Arg::Pointer(found.pointer), Arg::Pointer(pointer("argmax", logits)?), int(vocabulary)];
    let shares = vocabulary.div_ceil(4096) as u32;
    let launch = Launch { grid: (shares, rows as u32, 1), block: (256, 1), shared: 0 };
    cuda.gpu.launch((Source::Sampling, "argmax"), Variant::of(logits.dtype()), launch, &args)?;
    Ok(cuda.gpu.read::<u64>(found.pointer, rows)?.into_iter().map(|key| key as u32).collect())
}

pub(crate) fn sample(cuda: &Cuda, logits: &Tensor, how: Draw, draws: &[f32]) -> Result<Vec<u32>> {
    let (vocabulary, rows) = rows_of(logits);
    if rows != draws.len() {
        let expected = format!("{} rows", draws.len());
        return Err(Error::Shape { operation: "sample", found: logits.shape().to_vec(), expected });
    }
    let uploaded = cuda.gpu.allocate(rows * 4)?;
    cuda.gpu.write(&uploaded, draws)?;
    let chosen = cuda.gpu.allocate(rows * 4)?;
    let [temperature, top_p, min_p] = [how.temperature, how.top_p, how.min_p].map(|x| x.to_bits() as i32);
    let words = [vocabulary as i32, how.top_k.min(vocabulary) as i32, temperature, top_p, min_p];
    let args = [
        Arg::Pointer(chosen.pointer),
        Arg::Pointer(pointer("sample", logits)?),
        Arg::Pointer(uploaded.pointer),
        Arg::Words(&words),
    ];
    let launch = Launch { grid: (rows as u32, 1, 1), block: (512, 1), shared: 0 };
    cuda.gpu.launch((Source::Sampling, "sample"), Variant::of(logits.dtype()), launch, &args)?;
    cuda.gpu.read(chosen.pointer, rows)
}
