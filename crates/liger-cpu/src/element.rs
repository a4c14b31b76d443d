//! Element types that loops compute with in float32.

use half::bf16;

use crate::parallel::vectorized;

/// float32, or bfloat16: weights, keys and values in a cache, and what lies between two products.
pub(crate) trait Element: Copy + Send + Sync {
    fn widen(self) -> f32;
    /// Rounded to the nearest, as the instructions do it.
    fn narrow(x: f32) -> Self;
    /// All of them as float32, in `scratch` if they have to be widened.
    fn widened<'a>(data: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32];
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }

    fn widened<'a>(data: &'a [Self], _: &'a mut Vec<f32>) -> &'a [f32] {
        data
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    // Without branches, so that loops become vector code.
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
        Self::from_bits(if x.is_nan() { 0x7fc0 } else { rounded })
    }

    fn widened<'a>(data: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        vectorized!(|| {
            scratch.clear();
            scratch.extend(data.iter().map(|x| x.widen()));
        },);
        scratch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_half() {
        let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE, 1e-45];
        let many = (0..200_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761)));
        for x in special.into_iter().chain(many) {
            let (found, expected) = (<bf16 as Element>::narrow(x), bf16::from_f32(x));
            let same = found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan());
            assert!(same, "{x}: {found}, not {expected}");
            assert!(x.is_nan() || found.widen() == expected.to_f32());
        }
    }
}
