//! Weights in ggml's blocks of 32 elements, little-endian: `Q8_0` is a float16 scale and 32 signed bytes; `Q4_1` a float16
//! scale, a float16 minimum and 16 bytes, the low halves of which are elements 0 to 15, the high halves 16 to 31.

use half::f16;

use crate::DType;

/// Elements of a block.
pub const BLOCK: usize = 32;
/// Elements that share a scale of `Q4_K` and `Q6_K`, in blocks with scales relative to it.
pub const SUPER_BLOCK: usize = 256;

/// Packs whole blocks of `values` as `Q8_0` or `Q4_1`; nothing for other types. A block's scale is what brings its largest element
/// to 127 (`Q8_0`), or its span to 15 (`Q4_1`).
pub fn quantize(values: &[f32], dtype: DType) -> Vec<u8> {
    let mut out = Vec::with_capacity(dtype.bytes(values.len()));
    let (blocks, _) = values.as_chunks::<BLOCK>();
    for block in blocks {
        match dtype {
            DType::Q8_0 => eight_bits(&mut out, block),
            DType::Q4_1 => four_bits(&mut out, block),
            DType::F32 | DType::Bf16 | DType::Q4K | DType::Q6K => {}
        }
    }
    out
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

fn eight_bits(out: &mut Vec<u8>, block: &[f32; BLOCK]) {
    let largest = block.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let scale = largest / 127.0;
    let inverse = inverse(scale);
    out.extend(f16::from_f32(scale).to_le_bytes());
    out.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
}

fn four_bits(out: &mut Vec<u8>, block: &[f32; BLOCK]) {
    let (low, high) = block.iter().fold((f32::MAX, f32::MIN), |(low, high), x| (low.min(*x), high.max(*x)));
    let scale = (high - low) / 15.0;
    let inverse = inverse(scale);
    out.extend(f16::from_f32(scale).to_le_bytes());
    out.extend(f16::from_f32(low).to_le_bytes());
    let nibble = |x: f32| ((x - low) * inverse).round().clamp(0.0, 15.0) as u8;
    out.extend((0..BLOCK / 2).map(|i| nibble(block[i]) | nibble(block[i + BLOCK / 2]) << 4));
}
