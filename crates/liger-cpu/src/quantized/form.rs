//! How weights of so many bits are written, and what the loops over them have to know of it. Of every loop there is a version a form.

use liger_tensor::quantize::{BLOCK, SUPER_BLOCK};

use super::STEP;

/// `weight = scale (quant - ZERO) + offset`; a block of 32 terms of 16 outputs has as many lines as a quant has bits.
pub(super) trait Form {
    const BITS: usize;
    const ZERO: i32;
    /// Whether a block has an offset.
    const OFFSETS: bool = false;
    /// Whether a scale (and offset) is a float16 number of 256 terms times a byte of these terms.
    const FINE: bool = false;
    /// Parts of a block that have a scale each.
    const PARTS: usize = 1;
    /// Steps of four terms in a part.
    const STEPS: usize = BLOCK / STEP / Self::PARTS;

    /// Place of a block's scale and offset: of its own, or of the 256 terms that it is among.
    #[inline(always)]
    fn number(block: usize) -> usize {
        if Self::FINE { block / (SUPER_BLOCK / BLOCK) } else { block }
    }

    /// The step that comes at place `i` of a part: of four bits two lie in the same line, which is loaded once.
    #[inline(always)]
    fn step(part: usize, i: usize) -> usize {
        if Self::PARTS == 1 { i / 2 + i % 2 * (BLOCK / STEP / 2) } else { part * Self::STEPS + i }
    }
}

pub(super) struct Q8_0;
/// What [`DType::Q4_1`](liger_tensor::DType) is where the minimum is always -8 scales.
pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q4K;
pub(super) struct Q6K;

impl Form for Q8_0 {
    const BITS: usize = 8;
    const ZERO: i32 = 128;
}

impl Form for Q4_0 {
    const BITS: usize = 4;
    const ZERO: i32 = 8;
}

impl Form for Q4_1 {
    const BITS: usize = 4;
    const ZERO: i32 = 0;
    const OFFSETS: bool = true;
}

impl Form for Q4K {
    const BITS: usize = 4;
    const ZERO: i32 = 0;
    const OFFSETS: bool = true;
    const FINE: bool = true;
}

impl Form for Q6K {
    const BITS: usize = 6;
    const ZERO: i32 = 32;
    const FINE: bool = true;
    const PARTS: usize = 2;
}

/// Calls a function of the form that a matrix has: `by_form!(w, F => all::<F>(p))`.
macro_rules! by_form {
    ($w:expr, $form:ident => $call:expr) => {{
        use liger_tensor::DType;

        use $crate::quantized::form;
        match ($w.dtype, $w.offsets.is_empty()) {
            (DType::Q4_1, true) => {
                type $form = form::Q4_0;
                $call
            }
            (DType::Q4_1, false) => {
                type $form = form::Q4_1;
                $call
            }
            (DType::Q4K, _) => {
                type $form = form::Q4K;
                $call
            }
            (DType::Q6K, _) => {
                type $form = form::Q6K;
                $call
            }
            // `pack` takes no other.
            (DType::Q8_0 | DType::F32 | DType::Bf16, _) => {
                type $form = form::Q8_0;
                $call
            }
        }
    }};
}
pub(super) use by_form;
