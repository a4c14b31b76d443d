//! What kernels need to know of the sequences of a batch, on the GPU. Every layer asks for the same, so it is kept.

use std::sync::{Arc, Mutex, PoisonError};

use liger_tensor::{Result, Sequences};

use crate::driver::{Block, Gpu};

/// Tokens of a chunk of the recurrence: `CHUNK` in kernels/recurrence.cuh.
pub(crate) const CHUNK: usize = 64;

/// An array of `BlockInfo` and its length.
pub(crate) type Blocks = Arc<(Block, usize)>;

/// The stretches of one window's size that a batch is cut into, where keys are kept.
pub(crate) struct Stretches {
    /// `BlockInfo` of every block of rows, none across the border of two stretches, and the stretch of each.
    pub(crate) blocks: Block,
    pub(crate) block_count: usize,
    pub(crate) of_block: Block,
    /// `BlockInfo` of every stretch.
    pub(crate) starts: Block,
    /// Number of stretches.
    pub(crate) count: usize,
    /// `BlockInfo` of every sequence, and the number of its first stretch.
    pub(crate) sequences: Block,
    pub(crate) bases: Block,
    pub(crate) sequence_count: usize,
}

/// Stretches by their size and that of a block.
type KnownStretches = ((usize, usize), Arc<Stretches>);

/// The arrays of one batch.
pub(crate) struct Batch {
    sequences: Sequences,
    /// `ChunkInfo` of every chunk of the recurrence.
    pub(crate) chunks: Block,
    pub(crate) chunk_count: usize,
    /// `ChunkInfo` of every sequence's first chunk.
    pub(crate) firsts: Block,
    /// Slot of every sequence.
    pub(crate) slots: Block,
    /// 0, 1, 2, ...: for states kept by sequence.
    pub(crate) order: Block,
    /// `BlockInfo` of every row.
    pub(crate) rows: Block,
    /// By the size of a block: `BlockInfo` of every one, and their number.
    blocks: Mutex<Vec<(usize, Blocks)>>,
    stretches: Mutex<Vec<KnownStretches>>,
}

impl Batch {
    fn new(gpu: &Arc<Gpu>, sequences: &Sequences) -> Result<Self> {
        let (mut chunks, mut firsts, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        for (index, s) in sequences.list().iter().enumerate() {
            let (first, count) = (chunks.len() / 5, s.len.div_ceil(CHUNK));
            for start in (0..s.len).step_by(CHUNK) {
                let len = CHUNK.min(s.len - start);
                chunks.extend([s.start + start, len, index, first, count].map(|x| x as i32));
            }
            firsts.extend([s.start, s.len.min(CHUNK), index, first, count].map(|x| x as i32));
            for row in 0..s.len {
                rows.extend([s.start, s.len, s.position, s.slot, row].map(|x| x as i32));
            }
        }
        let slots: Vec<i32> = sequences.list().iter().map(|s| s.slot as i32).collect();
        let order: Vec<i32> = (0..slots.len() as i32).collect();
        Ok(Self {
            sequences: sequences.clone(),
            chunk_count: chunks.len() / 5,
            chunks: upload(gpu, &chunks)?,
            firsts: upload(gpu, &firsts)?,
            slots: upload(gpu, &slots)?,
            order: upload(gpu, &order)?,
            rows: upload(gpu, &rows)?,
            blocks: Mutex::default(),
            stretches: Mutex::default(),
        })
    }

    /// `BlockInfo` of blocks of `size` tokens of every sequence, and their number.
    pub(crate) fn blocks(&self, gpu: &Arc<Gpu>, size: usize) -> Result<Blocks> {
        let mut kept = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, blocks)) = kept.iter().find(|(s, _)| *s == size) {
            return Ok(blocks.clone());
        }
        let mut list = Vec::new();
        // The first blocks of all texts come first: those with sinks take longest in the backward.
        let longest = self.sequences.list().iter().map(|s| s.len).max().unwrap_or(0);
        for first in (0..longest).step_by(size) {
            for s in self.sequences.list().iter().filter(|s| first < s.len) {
                list.extend([s.start, s.len, s.position, s.slot, first].map(|x| x as i32));
            }
        }
        let blocks = Arc::new((upload(gpu, &list)?, list.len() / 5));
        kept.push((size, blocks.clone()));
        Ok(blocks)
    }

    /// Stretches of `window` tokens, and blocks of at most `per_block`.
    pub(crate) fn stretches(&self, gpu: &Arc<Gpu>, window: usize, per_block: usize) -> Result<Arc<Stretches>> {
        let mut kept = self.stretches.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, stretches)) = kept.iter().find(|(sizes, _)| *sizes == (window, per_block)) {
            return Ok(stretches.clone());
        }
        let (mut blocks, mut of_block, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        let (mut sequences, mut bases) = (Vec::new(), Vec::new());
        for s in self.sequences.list() {
            let info = |first: usize| [s.start, s.len, s.position, s.slot, first].map(|x| x as i32);
            sequences.extend(info(0));
            bases.push((starts.len() / 5) as i32);
            let mut first = 0;
            while first < s.len {
                let left = window - (s.position + first) % window;
                if first == 0 || left == window {
                    starts.extend(info(first));
                }
                blocks.extend(info(first));
                of_block.push((starts.len() / 5 - 1) as i32);
                first += per_block.min(left);
            }
        }
        let stretches = Arc::new(Stretches {
            blocks: upload(gpu, &blocks)?,
            block_count: of_block.len(),
            of_block: upload(gpu, &of_block)?,
            starts: upload(gpu, &starts)?,
            count: starts.len() / 5,
            sequences: upload(gpu, &sequences)?,
            bases: upload(gpu, &bases)?,
            sequence_count: bases.len(),
        });
        kept.push(((window, per_block), stretches.clone()));
        Ok(stretches)
    }
}

pub(crate) fn upload(gpu: &Arc<Gpu>, data: &[i32]) -> Result<Block> {
    let block = gpu.allocate(data.len() * 4)?;
    gpu.write(&block, data)?;
    Ok(block)
}

/// The batches of the last calls.
#[derive(Default)]
pub(crate) struct Batches(Mutex<Vec<Arc<Batch>>>);

/// A training step has one batch, evaluation and self-text a few that alternate.
const KEPT: usize = 4;

impl Batches {
    pub(crate) fn get(&self, gpu: &Arc<Gpu>, sequences: &Sequences) -> Result<Arc<Batch>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(batch) = kept.iter().find(|b| b.sequences == *sequences) {
            return Ok(batch.clone());
        }
        let batch = Arc::new(Batch::new(gpu, sequences)?);
        kept.insert(0, batch.clone());
        kept.truncate(KEPT);
        Ok(batch)
    }
}
