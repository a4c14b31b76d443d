//! Keys that stay when they leave the window: sizes and order of the kernels of `kernels/kept.cu`.

use std::sync::Arc;

use liger_tensor::checks::Heads;
use liger_tensor::{
    Attention, AttentionSpec, DType, Error, Keeping, KeptKeys, KeyValueCache, Result, Sequences, Tensor,
};

use crate::batch::{CHUNK, Stretches};
use crate::compile::{Source, Variant};
use crate::driver::{Arg, Block, Launch};
use crate::{Cuda, typed};

/// Threads of a block, and its warps.
const THREADS: u32 = 256;
const WARPS: usize = 8;
/// Threads of the one block that chooses for a sequence and head.
const SELECT_THREADS: u32 = 768;

/// What the slots hold for every stretch of a batch.
pub(crate) struct Kept {
    pub(crate) stretches: Arc<Stretches>,
    /// `[stretches, K, 2, slots]`: what they hold, and its positions.
    pub(crate) lists: Block,
    /// Address of RoPE's frequencies.
    pub(crate) frequencies: u64,
    /// Sums of the queries `[stretches, H, D]`.
    sums: Block,
    spec: AttentionSpec,
    heads: Heads,
}

/// How far before the window keys count as they are: `EVERYTHING` of the kernels where there is no limit.
pub(crate) fn reach_word(spec: AttentionSpec) -> i32 {
    spec.reach.and_then(|reach| i32::try_from(reach).ok()).unwrap_or(i32::MAX)
}

/// `KeptSizes` of the kernels.
fn words(heads: Heads, spec: AttentionSpec, cache_rows: usize) -> [i32; 9] {
    let window = spec.window.unwrap_or(0);
    let scale = 1.0 / ((heads.dim as f32).sqrt() * window.max(1) as f32);
    let [q, kv, by_score] = [heads.query, heads.kv, spec.kept_by_score()].map(|x| x as i32);
    let [window, sinks, slots, rows] = [window, spec.sinks, spec.slots(), cache_rows].map(|x| x as i32);
    [q, kv, window, sinks, slots, rows, by_score, reach_word(spec), scale.to_bits() as i32]
}

impl Kept {
    /// Chooses, of the keys of a batch and those that a cache holds; the cache's scores move on, its keys do not yet.
    pub(crate) fn select(
        cuda: &Cuda,
        inputs: &Attention<'_>,
        Keeping { scores, frequencies }: Keeping<'_>,
        (window, heads): (usize, Heads),
        per_block: usize,
        cache: Option<&KeyValueCache>,
    ) -> Result<Self> {
        const NAME: &str = "kept_select";
        let spec = inputs.spec;
        let stretches = cuda.batch(inputs.sequences)?.stretches(&cuda.gpu, window, per_block)?;
        let slots = spec.slots();
        let lists = cuda.gpu.allocate(stretches.count * heads.kv * 2 * slots * 4)?;
        let sums = cuda.gpu.allocate(stretches.count * heads.query * heads.dim * 4)?;
        let (remembered, held_keys, cache_rows) = match cache {
            Some(cache) => (Remembered::of(cache)?, cuda.act(NAME, &cache.keys)?, spec.cache_rows()),
            None => (Remembered::default(), Arg::Pointer(0), 0),
        };
        let words = words(heads, spec, cache_rows);
        let frequencies = typed(NAME, frequencies, DType::F32)?;
        let kept = Self { stretches, lists, frequencies, sums, spec, heads };
        let [lists, sums, starts, sequences, bases] =
            [&kept.lists, &kept.sums, &kept.stretches.starts, &kept.stretches.sequences, &kept.stretches.bases]
                .map(|block| Arg::Pointer(block.pointer));
        let (queries, sizes) = (Arg::Pointer(remembered.queries), Arg::Words(&words));
        let grid = (kept.stretches.count as u32, heads.query as u32, 1);
        let threads = (heads.dim.next_multiple_of(32) as u32).min(THREADS);
        let launch = Launch { grid, block: (threads, 1), shared: 0 };
        kept.run(cuda, "query_sums", launch, &[sums, cuda.act(NAME, inputs.q)?, queries, starts, sizes])?;
        let scores = Arg::Pointer(typed(NAME, scores, DType::F32)?);
        let (k, frequencies) = (cuda.act(NAME, inputs.k)?, Arg::Pointer(frequencies));
        let mut args = vec![lists, Arg::Pointer(remembered.scores), Arg::Pointer(remembered.positions)];
        args.extend([scores, sums, queries, k, held_keys, frequencies, sequences, bases, sizes]);
        // A `Choice` of the kernels.
        let shared = 20 * (slots + window) + 4 * heads.group() * heads.dim;
        let grid = (kept.stretches.sequence_count as u32, heads.kv as u32, 1);
        kept.run(cuda, NAME, Launch { grid, block: (SELECT_THREADS, 1), shared }, &args)?;
        Ok(kept)
    }

    /// Moves what stays in the end into the cache's slots.
    pub(crate) fn store(&self, cuda: &Cuda, cache: &KeyValueCache, k: &Tensor, v: &Tensor) -> Result<()> {
        const NAME: &str = "kept_store";
        let words = words(self.heads, self.spec, self.spec.cache_rows());
        let args = [
            cuda.act(NAME, &cache.keys)?,
            cuda.act(NAME, &cache.values)?,
            Arg::Pointer(Remembered::of(cache)?.queries),
            cuda.act(NAME, k)?,
            cuda.act(NAME, v)?,
            Arg::Pointer(self.sums.pointer),
            Arg::Pointer(self.lists.pointer),
            Arg::Pointer(self.stretches.sequences.pointer),
            Arg::Pointer(self.stretches.bases.pointer),
            Arg::Words(&words),
        ];
        let grid = (self.stretches.sequence_count as u32, self.heads.kv as u32, 1);
        self.run(cuda, NAME, Launch { grid, block: (THREADS, 1), shared: 0 }, &args)
    }

    /// Adds the gradients of what the slots held, `[stretches, K, 2, slots, D]`, to those of all keys and values.
    pub(crate) fn add_gradients(&self, cuda: &Cuda, dk: Arg<'static>, dv: Arg<'static>, parts: &Block) -> Result<()> {
        let words = words(self.heads, self.spec, 0);
        let args = [
            dk,
            dv,
            Arg::Pointer(parts.pointer),
            Arg::Pointer(self.lists.pointer),
            Arg::Pointer(self.frequencies),
            Arg::Pointer(self.stretches.sequences.pointer),
            Arg::Pointer(self.stretches.bases.pointer),
            Arg::Words(&words),
        ];
        let grid = (self.stretches.sequence_count as u32, self.heads.kv as u32, self.spec.slots() as u32);
        let threads = (self.heads.dim.next_multiple_of(32) as u32).min(THREADS);
        self.run(cuda, "kept_add_gradients", Launch { grid, block: (threads, 1), shared: 0 }, &args)
    }

    fn run(&self, cuda: &Cuda, name: &'static str, launch: Launch, args: &[Arg<'_>]) -> Result<()> {
        launch_kept(cuda, name, self.heads.dim, launch, args)
    }
}

fn launch_kept(cuda: &Cuda, name: &'static str, dim: usize, launch: Launch, args: &[Arg<'_>]) -> Result<()> {
    let variant = Variant { activations: cuda.activations, sizes: [dim, 0, 0, 0, 0] };
    cuda.gpu.launch((Source::Kept, name), variant, launch, args)
}

/// Addresses of what a cache remembers to choose keys, see [`KeptKeys`]; 0 without a cache.
#[derive(Default, Clone, Copy)]
pub(crate) struct Remembered {
    pub(crate) scores: u64,
    pub(crate) positions: u64,
    pub(crate) queries: u64,
}

impl Remembered {
    pub(crate) fn of(cache: &KeyValueCache) -> Result<Self> {
        const NAME: &str = "attention_forward";
        let missing =
            Error::Storage { operation: NAME, found: "no scores", expected: "a cache with scores and queries" };
        let KeptKeys { scores, positions, queries } = cache.kept.as_ref().ok_or(missing)?;
        let at = |tensor| typed(NAME, tensor, DType::F32);
        Ok(Self { scores: at(scores)?, positions: at(positions)?, queries: at(queries)? })
    }
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
    let words = words(heads, AttentionSpec::EVERYTHING, 0);
    let (scores, k) = (Arg::Pointer(typed(NAME, scores, DType::F32)?), cuda.act(NAME, k)?);
    let state = state.map_or(Ok(0), |state| typed(NAME, state, DType::F32))?;
    let [slots, chunks, firsts] = [&batch.slots, &batch.chunks, &batch.firsts].map(|b| Arg::Pointer(b.pointer));
    let (sums_at, sizes) = (Arg::Pointer(sums.pointer), Arg::Words(&words));
    let run = |name: &'static str, blocks: usize, rows: usize, args: &[Arg<'_>]| {
        let grid = (blocks as u32, heads.kv as u32, 1);
        let launch = Launch { grid, block: (THREADS, 1), shared: rows * heads.dim * 4 };
        launch_kept(cuda, name, heads.dim, launch, args)
    };
    run("key_sums", batch.chunk_count, WARPS, &[sums_at, k, chunks, sizes])?;
    let args = [scores, k, sums_at, Arg::Pointer(state), slots, chunks, sizes];
    run("key_scores", batch.chunk_count, CHUNK, &args)?;
    if state == 0 {
        return Ok(());
    }
    run("key_state", sequences.list().len(), 0, &[Arg::Pointer(state), sums_at, slots, firsts, sizes])
}
