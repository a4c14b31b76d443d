//! ggml's blocks in the order in which products take them.

use std::io::{Error, Result};
use std::sync::{Mutex, PoisonError};

use half::f16;
use liger_tensor::quantize::{BLOCK, SUPER_BLOCK};
use liger_tensor::{BlockRows, DType};

use super::{Fine, LANES, Line, Quantized, STEP, Sixteen};
use crate::pages::Pages;
use crate::parallel::{Disjoint, for_tasks};

/// Blocks that have a float16 scale together.
const OF_SUPER: usize = SUPER_BLOCK / BLOCK;
/// Bytes that are read at once: what a core's cache holds.
const READ: usize = 256 << 10;

/// Lines of quants of a block of 32 terms, one for each of their bits.
pub(super) fn lines(dtype: DType) -> usize {
    match dtype {
        DType::Q4_1 | DType::Q4K => 4,
        DType::Q6K => 6,
        DType::Q8_0 | DType::F32 | DType::Bf16 => 8,
    }
}

/// Where a group of 16 outputs is written.
struct Group<'a> {
    quants: &'a mut [Line],
    scales: &'a mut [Sixteen],
    offsets: &'a mut [Sixteen],
    fine: &'a mut [Fine],
}

impl Quantized {
    /// Out of ggml's blocks; `columns` is a multiple of what is packed together. `rows` reads the blocks of some rows.
    pub(crate) fn pack(source: &BlockRows<'_>, (rows, columns): (usize, usize), dtype: DType) -> Result<Self> {
        let (lines, of_row) = (lines(dtype), columns / BLOCK);
        let is_fine = dtype.block() == SUPER_BLOCK;
        let numbers = columns / dtype.block();
        let groups = rows.div_ceil(LANES);
        let has_offsets = matches!(dtype, DType::Q4_1 | DType::Q4K);
        let mut quants = Pages::<Line>::zeroed(groups * of_row * lines)?;
        let mut scales = Pages::<Sixteen>::zeroed(groups * numbers)?;
        let mut offsets = Pages::<Sixteen>::zeroed(if has_offsets { groups * numbers } else { 0 })?;
        let mut fine = Pages::<Fine>::zeroed(if is_fine { groups * of_row } else { 0 })?;
        let row_bytes = dtype.bytes(columns);
        let together = (READ / row_bytes.max(1) / LANES).max(1);
        let failed = Mutex::new(None::<Error>);
        let all = (
            Disjoint::new(&mut quants),
            Disjoint::new(&mut scales),
            Disjoint::new(&mut offsets),
            Disjoint::new(&mut fine),
        );
        for_tasks(groups.div_ceil(together), |task| {
            let first = task * together;
            let here = first..groups.min(first + together);
            let blocks = match source(first * LANES..rows.min(here.end * LANES)) {
                Ok(blocks) => blocks,
                Err(error) => {
                    *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return;
                }
            };
            assert_eq!(blocks.len(), (rows.min(here.end * LANES) - first * LANES) * row_bytes, "bytes of some rows");
            for (group, blocks) in here.zip(blocks.chunks(LANES * row_bytes)) {
                let of = |len: usize, width: usize| if len == 0 { (0, 0) } else { (group * width, width) };
                let (scale, offset) = (of(all.1.len(), numbers), of(all.2.len(), numbers));
                let fine = of(all.3.len(), of_row);
                // SAFETY: groups have distinct lines and numbers.
                let to = unsafe {
                    Group {
                        quants: all.0.slice(group * of_row * lines, of_row * lines),
                        scales: all.1.slice(scale.0, scale.1),
                        offsets: all.2.slice(offset.0, offset.1),
                        fine: all.3.slice(fine.0, fine.1),
                    }
                };
                to.fill(blocks, row_bytes, dtype);
            }
        });
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        if dtype == DType::Q4_1 && scales.iter().zip(&*offsets).all(is_symmetric) {
            offsets = Pages::zeroed(0)?;
        }
        Ok(Self { rows, columns, dtype, quants, scales, offsets, fine })
    }
}

impl Group<'_> {
    fn fill(self, blocks: &[u8], row_bytes: usize, dtype: DType) {
        let bytes = dtype.bytes(dtype.block());
        let half_at = |block: &[u8], at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        for (lane, row) in blocks.chunks_exact(row_bytes).enumerate() {
            for (b, block) in row.chunks_exact(bytes).enumerate() {
                match dtype {
                    DType::Q4_1 => {
                        self.scales[b].0[lane] = half_at(block, 0);
                        self.offsets[b].0[lane] = half_at(block, 2);
                        put(&mut self.quants[4 * b..4 * (b + 1)], lane, &words::<4>(&block[4..]));
                    }
                    DType::Q4K => {
                        self.scales[b].0[lane] = half_at(block, 0);
                        self.offsets[b].0[lane] = half_at(block, 2) ^ 0x8000;
                        for sub in 0..OF_SUPER {
                            let at = b * OF_SUPER + sub;
                            let [scale, minimum] = scale_and_minimum(&block[4..16], sub);
                            self.fine[at].0[lane] = scale;
                            self.fine[at].0[LANES + lane] = minimum;
                            put(&mut self.quants[4 * at..4 * (at + 1)], lane, &nibbles(&block[16..], sub));
                        }
                    }
                    DType::Q6K => {
                        self.scales[b].0[lane] = half_at(block, 208);
                        for sub in 0..OF_SUPER {
                            let at = b * OF_SUPER + sub;
                            self.fine[at].0[lane] = block[192 + 2 * sub];
                            self.fine[at].0[LANES + lane] = block[192 + 2 * sub + 1];
                            put(&mut self.quants[6 * at..6 * (at + 1)], lane, &six_bits(block, sub));
                        }
                    }
                    DType::Q8_0 | DType::F32 | DType::Bf16 => {
                        self.scales[b].0[lane] = half_at(block, 0);
                        // Signed bytes become unsigned ones with their zero at 128.
                        let words = words::<8>(&block[2..]).map(|word| word ^ 0x8080_8080);
                        put(&mut self.quants[8 * b..8 * (b + 1)], lane, &words);
                    }
                }
            }
        }
    }
}

/// Four terms a line.
#[inline(always)]
fn put<const N: usize>(lines: &mut [Line], lane: usize, words: &[u32; N]) {
    for (line, word) in lines.iter_mut().zip(words) {
        line.0[lane * STEP..(lane + 1) * STEP].copy_from_slice(&word.to_le_bytes());
    }
}

#[inline(always)]
fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

/// Sub-block `sub` of `Q4_K`, of whose pairs of sub-blocks the file has the low and the high halves of 32 bytes: as the low and the
/// high halves of 16.
#[inline(always)]
fn nibbles(packed: &[u8], sub: usize) -> [u32; 4] {
    const LOW: u32 = 0x0f0f_0f0f;
    let pair = words::<8>(&packed[sub / 2 * BLOCK..]);
    std::array::from_fn(|i| match sub % 2 {
        0 => pair[i] & LOW | (pair[i + 4] & LOW) << 4,
        _ => pair[i] >> 4 & LOW | pair[i + 4] & !LOW,
    })
}

/// Sub-block `sub` of `Q6_K`: four words of low halves, as those of [`nibbles`], and two of top bits, of four steps each from the
/// lowest bits on.
#[inline(always)]
fn six_bits(block: &[u8], sub: usize) -> [u32; 6] {
    let (half, run) = (sub / 4, sub % 4);
    let low = words::<8>(&block[half * 64 + run % 2 * BLOCK..]).map(|word| word >> (run / 2 * 4) & 0x0f0f_0f0f);
    let top = words::<8>(&block[128 + half * BLOCK..]).map(|word| word >> (2 * run) & 0x0303_0303);
    let of_four = |at: usize| top[at] | top[at + 1] << 2 | top[at + 2] << 4 | top[at + 3] << 6;
    std::array::from_fn(|i| if i < 4 { low[i] | low[i + 4] << 4 } else { of_four(4 * (i - 4)) })
}

/// Of sub-block `sub` of `Q4_K`, six bits each, out of 12 bytes.
#[inline(always)]
fn scale_and_minimum(packed: &[u8], sub: usize) -> [u8; 2] {
    match sub {
        0..4 => [packed[sub] & 63, packed[sub + 4] & 63],
        _ => [packed[sub + 4] & 15 | packed[sub - 4] >> 6 << 4, packed[sub + 4] >> 4 | packed[sub] >> 6 << 4],
    }
}

/// Whether minima are -8 scales, as those of ggml's `Q4_0` in the form of `Q4_1` are.
fn is_symmetric((scale, offset): (&Sixteen, &Sixteen)) -> bool {
    let minimum = |scale: u16| f16::from_f32(-8.0 * f16::from_bits(scale).to_f32()).to_bits() & 0x7fff;
    scale.0.iter().zip(offset.0).all(|(s, o)| minimum(*s) == o & 0x7fff && (o == 0 || (s ^ o) >> 15 == 1))
}
