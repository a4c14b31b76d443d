//! ggml's packed blocks of weights, unpacked to float32. Layouts as in ggml's `ggml-common.h`.

use half::{bf16, f16};
use liger_tensor::DType;
use liger_tensor::quantize::{BLOCK, quantize};

/// How elements are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BlockType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl BlockType {
    pub(crate) fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    /// ggml's number of the type.
    pub(crate) fn id(self) -> u32 {
        let is_it = |id: &u32| Self::from_id(*id) == Some(self);
        (0..32).find(is_it).unwrap_or_default()
    }

    /// Elements and bytes of one block.
    fn size(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }

    /// Bytes of `count` elements, if they fill whole blocks.
    pub(crate) fn bytes(self, count: u64) -> Option<u64> {
        let (elements, bytes) = self.size();
        if !count.is_multiple_of(elements as u64) {
            return None;
        }
        (count / elements as u64).checked_mul(bytes as u64)
    }

    /// The element type in which weights of this type are kept without unpacking them: exactly, or for Q5_1 and Q5_K rounded to eight
    /// bits. `None` for float16, which has no such type.
    pub(crate) fn stored(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::F16 => None,
            Self::Bf16 => Some(DType::Bf16),
            Self::Q4_0 | Self::Q4_1 => Some(DType::Q4_1),
            Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Q5K => Some(DType::Q8_0),
            Self::Q4K => Some(DType::Q4K),
            Self::Q6K => Some(DType::Q6K),
        }
    }

    /// Whole blocks as those of [`BlockType::stored`], where that has blocks.
    pub(crate) fn repacked(self, bytes: Vec<u8>) -> Vec<u8> {
        match self {
            Self::Q8_0 | Self::Q4_1 | Self::Q4K | Self::Q6K | Self::F32 | Self::F16 | Self::Bf16 => bytes,
            Self::Q4_0 => {
                let mut out = Vec::with_capacity(bytes.len() / 18 * 20);
                for block in bytes.as_chunks::<18>().0 {
                    out.extend_from_slice(&block[..2]);
                    out.extend_from_slice(&f16::from_f32(-8.0 * half_at(block, 0)).to_le_bytes());
                    out.extend_from_slice(&block[2..]);
                }
                out
            }
            Self::Q5_0 => {
                let mut out = Vec::with_capacity(bytes.len() / 22 * 34);
                for block in bytes.as_chunks::<22>().0 {
                    out.extend_from_slice(&block[..2]);
                    out.extend_from_slice(&widened_five_bits(block));
                }
                out
            }
            Self::Q5_1 | Self::Q5K => quantize(&self.unpack(&bytes), DType::Q8_0),
        }
    }

    /// Unpacks whole blocks.
    pub(crate) fn unpack(self, bytes: &[u8]) -> Vec<f32> {
        let (elements, size) = self.size();
        let mut out = Vec::with_capacity(bytes.len() / size * elements);
        for block in bytes.chunks_exact(size) {
            match self {
                Self::F32 => out.push(f32::from_le_bytes([block[0], block[1], block[2], block[3]])),
                Self::F16 => out.push(half_at(block, 0)),
                Self::Bf16 => out.push(bf16::from_le_bytes([block[0], block[1]]).to_f32()),
                Self::Q4_0 => nibbles(&mut out, &block[2..], None, -8.0 * half_at(block, 0), half_at(block, 0)),
                Self::Q4_1 => nibbles(&mut out, &block[4..], None, half_at(block, 2), half_at(block, 0)),
                Self::Q5_0 => {
                    let (scale, high) = (half_at(block, 0), word_at(block, 2));
                    nibbles(&mut out, &block[6..], Some(high), -16.0 * scale, scale);
                }
                Self::Q5_1 => {
                    nibbles(&mut out, &block[8..], Some(word_at(block, 4)), half_at(block, 2), half_at(block, 0));
                }
                Self::Q8_0 => out.extend(block[2..].iter().map(|&q| half_at(block, 0) * f32::from(q as i8))),
                Self::Q4K => k_nibbles(&mut out, block, None, &block[16..]),
                Self::Q5K => k_nibbles(&mut out, block, Some(&block[16..48]), &block[48..]),
                Self::Q6K => six_bits(&mut out, block),
            }
        }
        out
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn word_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// 32 values `offset + scale q`: the low nibbles of 16 bytes, then the high ones, with fifth bits from `high`.
fn nibbles(out: &mut Vec<f32>, packed: &[u8], high: Option<u32>, offset: f32, scale: f32) {
    for i in 0..32 {
        let byte = packed[i % 16];
        let low = if i < 16 { byte & 15 } else { byte >> 4 };
        let fifth = high.map_or(0, |bits| (bits >> i & 1) as u8) << 4;
        out.push(offset + scale * f32::from(low | fifth));
    }
}

/// Six-bit scale and minimum of sub-block `i` of 8, out of 12 bytes.
fn scale_min(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// 256 values in 8 sub-blocks of 32: pairs of sub-blocks share 32 bytes, low nibbles first.
fn k_nibbles(out: &mut Vec<f32>, block: &[u8], high: Option<&[u8]>, packed: &[u8]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for sub in 0..8 {
        let (scale, min) = scale_min(&block[4..16], sub);
        for i in 0..32 {
            let byte = packed[sub / 2 * 32 + i];
            let low = if sub % 2 == 0 { byte & 15 } else { byte >> 4 };
            let fifth = high.map_or(0, |bits| bits[i] >> sub & 1) << 4;
            out.push(d * scale * f32::from(low | fifth) - dmin * min);
        }
    }
}

/// The signed quants `q - 16` of a block of Q5_0, as Q8_0 has them with the same scale.
fn widened_five_bits(block: &[u8; 22]) -> [u8; BLOCK] {
    let high = word_at(block, 2);
    std::array::from_fn(|i| {
        let nibble = block[6 + i % 16] >> (i / 16 * 4) & 15;
        (nibble | ((high >> i & 1) << 4) as u8).wrapping_sub(16)
    })
}

/// 256 values of six bits: two halves of 128, four runs of 32 in each.
fn six_bits(out: &mut Vec<f32>, block: &[u8]) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half_at(block, 208));
    for half in 0..2 {
        for run in 0..4 {
            for i in 0..32 {
                let byte = low[half * 64 + run % 2 * 32 + i];
                let nibble = if run < 2 { byte & 15 } else { byte >> 4 };
                let top = high[half * 32 + i] >> (2 * run) & 3;
                let scale = f32::from(scales[half * 8 + run * 2 + i / 16] as i8);
                out.push(d * scale * (f32::from(nibble | top << 4) - 32.0));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use liger_tensor::Ops;

    use super::*;

    /// Packed bytes and what the `gguf` Python package unpacks them to, by type:
    /// `python tests/fixtures/make_gguf_blocks.py`.
    #[test]
    fn every_type_unpacks_as_gguf_py_does() {
        let json = include_str!("../../tests/fixtures/gguf_blocks.json");
        let cases: Vec<(u32, Vec<u8>, Vec<f32>)> = serde_json::from_str(json).unwrap();
        assert_eq!(cases.len(), 11);
        for (id, bytes, expected) in cases {
            let block = BlockType::from_id(id).unwrap();
            let found = block.unpack(&bytes);
            assert_eq!(found.len(), expected.len(), "type {id}");
            assert_eq!(block.bytes(expected.len() as u64), Some(bytes.len() as u64));
            for (x, y) in found.iter().zip(&expected) {
                assert!((x - y).abs() <= 1e-6 * y.abs().max(1e-3), "type {id}: {x}, expected {y}");
            }
            // What is kept packed stands for the same numbers.
            let Some(dtype) = block.stored().filter(|dtype| dtype.is_quantized()) else { continue };
            let (kept, ops) = (block.repacked(bytes), liger_cpu::Cpu::new());
            let shape = [1, expected.len()];
            let kept = ops.upload_blocks(&|_| Ok(kept.clone()), &shape, dtype).unwrap();
            let largest = expected.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            let bound = if matches!(block, BlockType::Q5_1 | BlockType::Q5K) { 5e-3 } else { 1e-6 };
            for (x, y) in ops.download(&kept).unwrap().iter().zip(&expected) {
                assert!(
                    (x - y).abs() <= bound * largest,
                    "type {id} kept packed: {x}, expected {y} of up to {largest}"
                );
            }
        }
    }
}
