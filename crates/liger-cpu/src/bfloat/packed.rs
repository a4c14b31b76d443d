//! Weights that are packed once, for products that come again and again: a product of few panels otherwise waits until all threads have
//! packed them. The price is their memory once more for products with `w^T`, and once more for those with `w`.

use std::ops::Range;
use std::sync::OnceLock;

use half::bf16;
use liger_tensor::Lines;

use super::pack::{Blocks, Pair};
use super::{Kernel, STEP, pack_panels};
use crate::gemm::Matrix;
use crate::parallel::threads;

/// Most elements of a matrix for which it pays: larger ones are cut into so many groups of panels that each of a few threads packs and
/// multiplies its own, in its caches, and a large model's memory is not to be taken three times (docs/experiments.md).
const MOST: usize = 8 << 20;

/// Panels of a matrix `w [out, in]`, packed when they are first wanted.
#[derive(Default)]
pub(crate) struct Panels {
    /// For products with `w^T`: outputs are its rows.
    of_rows: OnceLock<Packed>,
    /// For products with `w`: outputs are its columns.
    of_columns: OnceLock<Packed>,
}

impl Panels {
    pub(crate) fn pay_for(elements: usize) -> bool {
        elements <= MOST
    }

    /// Those of `b [outputs, terms]`, which is the matrix if it is transposed in the product, else its transpose.
    pub(crate) fn of(
        &self,
        kernel: Kernel,
        b: Matrix<'_, bf16>,
        sizes: (usize, usize),
        is_transposed: bool,
    ) -> &Packed {
        let place = if is_transposed { &self.of_rows } else { &self.of_columns };
        place.get_or_init(|| Packed::new(kernel, b, sizes))
    }
}

/// A matrix `[outputs, terms]` in panels: of each stretch of terms all of them.
pub(crate) struct Packed {
    kernel: Kernel,
    outputs: usize,
    terms: usize,
    lines: Lines,
}

impl Packed {
    pub(crate) fn new(kernel: Kernel, b: impl Blocks, (outputs, terms): (usize, usize)) -> Self {
        let (panel, depth) = (kernel.panel(outputs), kernel.depth_and_cached().0);
        let width = outputs.next_multiple_of(panel);
        let mut lines = Lines::zeroed::<Pair>(width * terms.next_multiple_of(STEP) / 2);
        for from in (0..terms).step_by(depth) {
            let terms = from..terms.min(from + depth);
            let to = &mut lines.as_mut_slice::<Pair>()[width * from / 2..];
            let to = &mut to[..width * terms.len().next_multiple_of(STEP) / 2];
            pack_panels(panel, to, b, 0..outputs, terms, 4 * threads());
        }
        Self { kernel, outputs, terms, lines }
    }

    /// Those of a stretch of terms, from the one on that begins with this output.
    pub(super) fn panels(&self, output: usize, terms: Range<usize>) -> &[Pair] {
        let width = self.outputs.next_multiple_of(self.kernel.panel(self.outputs));
        let first = width * terms.start + output * terms.len().next_multiple_of(STEP);
        &self.lines.as_slice::<Pair>()[first / 2..]
    }
}

/// The weights of a product.
#[derive(Clone, Copy)]
pub(crate) enum Weights<'a, B> {
    /// Packed by the product.
    AsTheyLie(B),
    /// Packed before.
    Packed(&'a Packed),
}

impl<B: Blocks> Weights<'_, B> {
    /// Whether they are packed as `[outputs, terms]` in this kernel's order, or cover that as they lie.
    pub(super) fn fit(self, kernel: Kernel, (outputs, terms): (usize, usize)) -> bool {
        match self {
            Self::AsTheyLie(b) => b.covers(outputs, terms),
            Self::Packed(b) => (b.kernel, b.outputs, b.terms) == (kernel, outputs, terms),
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use liger_tensor::{DType, Gemm, Ops, Result, Tensor};

    use crate::Cpu;

    /// Forward and input gradient of weights `[64, 96]`, 48 rows each.
    fn products(cpu: &Cpu, w: &Tensor) -> Result<[Vec<f32>; 2]> {
        let (x, dy) = (cpu.random(&[48, 96], 1.0, 1, DType::F32)?, cpu.random(&[48, 64], 1.0, 2, DType::F32)?);
        let (mut y, mut dx) = (cpu.empty(&[48, 64])?, cpu.empty(&[48, 96])?);
        cpu.gemm(&mut y, &x, w, Gemm::LINEAR)?;
        cpu.gemm(&mut dx, &dy, w, Gemm::INPUT_GRADIENT)?;
        Ok([cpu.download(&y)?, cpu.download(&dx)?])
    }

    #[test]
    fn packed_weights_give_the_same_products_and_are_packed_again_when_they_change() -> Result<()> {
        let cpu = Cpu::with_bfloat16();
        let (mut plain, mut kept) =
            (cpu.random(&[64, 96], 1.0, 0, DType::Bf16)?, cpu.random(&[64, 96], 1.0, 0, DType::Bf16)?);
        cpu.keep_packed(&kept);
        let before = products(&cpu, &plain)?;
        assert_eq!(products(&cpu, &kept)?, before);
        assert_eq!(products(&cpu, &kept)?, before);
        for w in [&mut plain, &mut kept] {
            w.as_bf16_mut()?.fill(bf16::ONE);
        }
        let after = products(&cpu, &plain)?;
        assert_ne!(after, before);
        assert_eq!(products(&cpu, &kept)?, after);
        Ok(())
    }
}
