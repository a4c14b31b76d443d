//! Keys that stay when they leave the window: sizes and order of the kernels of `kernels/kept.cu`.

use std::sync::Arc;

use liger_tensor::checks::Heads;
use liger_tensor::{AttentionSpec, DType, Error, KeyValueCache, Result, Sequences, Tensor};

use crate::batch::{Batch, CHUNK, Stretches};
use crate::compile::{Source, Variant};
use crate::driver::{Arg, Block, Launch};
use crate::{Cuda, typed};

/// Threads of a block, and its warps.
const THREADS: u32 = 256;
const WARPS: usize = 8;

/// What the slots hold for every stretch of a batch.
pub(crate) struct Kept {
    pub(crate) stretches: Arc<Stretches>,
    /// `[stretches, K, slots]`.
    pub(crate) lists: Block,
    spec: AttentionSpec,
    heads: Heads,
}

/// `KeptSizes` of the kernels.
fn words(heads: Heads, spec: AttentionSpec, cache_rows: usize) -> [i32; 6] {
    let window = spec.window.unwrap_or(0);
    [heads.kv, heads.dim, window, spec.sinks, spec.slots(), cache_rows].map(|x| x as i32)
}

impl Kept {
    /// Chooses, of the keys of a batch and those that a cache holds; the cache's scores move on, its keys do not yet.
    pub(crate) fn select(
        cuda: &Cuda,
        batch: &Batch,
        (spec, window, heads): (AttentionSpec, usize, Heads),
        per_block: usize,
        scores: &Tensor,
        cache: Option<&KeyValueCache>,
    ) -> Result<Self> {
        let stretches = batch.stretches(&cuda.gpu, window, per_block)?;
        let slots = spec.slots();
        let lists = cuda.gpu.allocate(stretches.count * heads.kv * slots * 4)?;
        let (cached, cache_rows) = match cache {
            Some(cache) => (cached_scores(cache)?, spec.cache_rows()),
            None => (0, 0),
        };
        let words = words(heads, spec, cache_rows);
        let args = [
            Arg::Pointer(lists.pointer),
            Arg::Pointer(typed("kept_select", scores, DType::F32)?),
            Arg::Pointer(cached),
            Arg::Pointer(stretches.sequences.pointer),
            Arg::Pointer(stretches.bases.pointer),
            Arg::Words(&words),
        ];
        let kept = Self { stretches, lists, spec, heads };
        kept.launch(cuda, "kept_select", 1, 12 * (slots + window), &args)?;
        Ok(kept)
    }

    /// Moves what stays in the end into the cache's slots.
    pub(crate) fn store(&self, cuda: &Cuda, cache: &KeyValueCache, k: &Tensor, v: &Tensor) -> Result<()> {
        const NAME: &str = "kept_store";
        let words = words(self.heads, self.spec, self.spec.cache_rows());
        let args = [
            cuda.act(NAME, &cache.keys)?,
            cuda.act(NAME, &cache.values)?,
            cuda.act(NAME, k)?,
            cuda.act(NAME, v)?,
            Arg::Pointer(self.lists.pointer),
            Arg::Pointer(self.stretches.sequences.pointer),
            Arg::Pointer(self.stretches.bases.pointer),
            Arg::Words(&words),
        ];
        self.launch(cuda, NAME, 1, 0, &args)
    }

    /// Adds the gradients of what the slots held, `[stretches, K, 2, slots, D]`, to those of all keys and values.
    pub(crate) fn add_gradients(&self, cuda: &Cuda, dk: Arg<'static>, dv: Arg<'static>, parts: &Block) -> Result<()> {
        let words = words(self.heads, self.spec, 0);
        let args = [
            dk,
            dv,
            Arg::Pointer(parts.pointer),
            Arg::Pointer(self.lists.pointer),
            Arg::Pointer(self.stretches.sequences.pointer),
            Arg::Pointer(self.stretches.bases.pointer),
            Arg::Words(&words),
        ];
        self.launch(cuda, "kept_add_gradients", self.spec.slots(), 0, &args)
    }

    /// A block for every sequence and head, and `deep` of them.
    fn launch(&self, cuda: &Cuda, name: &'static str, deep: usize, shared: usize, args: &[Arg<'_>]) -> Result<()> {
        let threads = if deep > 1 { (self.heads.dim.next_multiple_of(32) as u32).min(THREADS) } else { THREADS };
        let grid = (self.stretches.sequence_count as u32, self.heads.kv as u32, deep as u32);
        let launch = Launch { grid, block: (threads, 1), shared };
        cuda.gpu.launch((Source::Kept, name), Variant::of(cuda.activations), launch, args)
    }
}

/// Address of a cache's scores.
pub(crate) fn cached_scores(cache: &KeyValueCache) -> Result<u64> {
    const NAME: &str = "attention_forward";
    let missing = Error::Storage { operation: NAME, found: "no scores", expected: "a cache with scores" };
    typed(NAME, cache.scores.as_ref().ok_or(missing)?, DType::F32)
}

/// See `Ops::key_novelty`.
pub(crate) fn novelty(
    cuda: &Cuda,
    scores: &Tensor,
    k: &Tensor,
    sequences: &Sequences,
    state: Option<&Tensor>,
) -> Result<()> {
    const NAME: &str = "key_novelty";
    let heads = Heads::of(NAME, k, k, sequences)?;
    if scores.len() != sequences.rows() * heads.kv {
        let expected = format!("[{}, {}]", sequences.rows(), heads.kv);
        return Err(Error::Shape { operation: NAME, found: scores.shape().to_vec(), expected });
    }
    let batch = cuda.batch(sequences)?;
    let sums = cuda.gpu.allocate(batch.chunk_count * heads.kv * heads.dim * 4)?;
    let words = [heads.kv, heads.dim, 0, 0, 0, 0].map(|x| x as i32);
    let (scores, k) = (Arg::Pointer(typed(NAME, scores, DType::F32)?), cuda.act(NAME, k)?);
    let state = state.map_or(Ok(0), |state| typed(NAME, state, DType::F32))?;
    let [slots, chunks, firsts] = [&batch.slots, &batch.chunks, &batch.firsts].map(|b| Arg::Pointer(b.pointer));
    let (sums_at, sizes) = (Arg::Pointer(sums.pointer), Arg::Words(&words));
    let run = |name: &'static str, blocks: usize, rows: usize, args: &[Arg<'_>]| {
        let grid = (blocks as u32, heads.kv as u32, 1);
        let launch = Launch { grid, block: (THREADS, 1), shared: rows * heads.dim * 4 };
        cuda.gpu.launch((Source::Kept, name), Variant::of(cuda.activations), launch, args)
    };
    run("key_sums", batch.chunk_count, WARPS, &[sums_at, k, chunks, sizes])?;
    let args = [scores, k, sums_at, Arg::Pointer(state), slots, chunks, sizes];
    run("key_scores", batch.chunk_count, CHUNK, &args)?;
    if state == 0 {
        return Ok(());
    }
    run("key_state", sequences.list().len(), 0, &[Arg::Pointer(state), sums_at, slots, firsts, sizes])
}
