//! One table of tests that every device runs: each operation against a plain float64 version, each backward against
//! the float64 gradient, over odd sizes and log gates down to -1e4.
//!
//! A device's test file calls [`check`] and [`check_drawn`] and nothing else. Failing checks panic with the operation
//! and the sizes.

mod attention;
mod plain;
mod recurrence;
mod rng;
mod rowwise;
mod steps;

use liger_tensor::{DType, Ops, Tensor};

pub use rng::Numbers;

/// A part of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Matrix products, and everything that takes rows one by one.
    Rows,
    /// Softmax attention over everything, windows and sinks.
    Attention,
    /// Softmax attention that keeps keys.
    Kept,
    /// The gated recurrence.
    Recurrence,
    /// Decoding steps in few operations, where the device has such.
    Steps,
}

/// Runs a part of the table; `tolerance` is the largest allowed norm of a difference, relative to the norm of what is
/// expected.
pub fn check(ops: &dyn Ops, tolerance: f64, part: Part) {
    let check = Check { ops, tolerance };
    match part {
        Part::Rows => rowwise::check(&check),
        Part::Attention => attention::check(&check),
        Part::Kept => attention::check_kept(&check),
        Part::Recurrence => recurrence::check(&check),
        Part::Steps => steps::check(&check),
    }
}

/// Draws `cases` sets of sizes, gates and splits of a text for the recurrence, and checks each as [`check`] does.
pub fn check_drawn(ops: &dyn Ops, tolerance: f64, cases: u32) {
    recurrence::check_drawn(&Check { ops, tolerance }, cases);
}

pub(crate) struct Check<'a> {
    pub(crate) ops: &'a dyn Ops,
    pub(crate) tolerance: f64,
}

impl Check<'_> {
    /// Activations.
    pub(crate) fn tensor(&self, values: &[f64], shape: &[usize]) -> Tensor {
        let values = values.iter().map(|&x| x as f32).collect();
        self.ops.upload(values, shape, self.ops.activations()).expect("upload")
    }

    /// What products read, as [`Ops::empty_operand`] has it.
    pub(crate) fn operand(&self, values: &[f64], shape: &[usize]) -> Tensor {
        let values = values.iter().map(|&x| x as f32).collect();
        self.ops.upload(values, shape, self.operands()).expect("upload")
    }

    fn operands(&self) -> DType {
        self.ops.empty_operand(&[1]).expect("empty_operand").dtype()
    }

    /// What is float32 on every device: norms, gates, states, optimizer.
    pub(crate) fn exact(&self, values: &[f64], shape: &[usize]) -> Tensor {
        let values = values.iter().map(|&x| x as f32).collect();
        self.ops.upload(values, shape, DType::F32).expect("upload")
    }

    /// Memory that holds NaN: an output that is not overwritten shows.
    pub(crate) fn poisoned(&self, shape: &[usize]) -> Tensor {
        self.ops.upload(vec![f32::NAN; shape.iter().product()], shape, self.ops.activations()).expect("upload")
    }

    /// The same for what products write.
    pub(crate) fn poisoned_operand(&self, shape: &[usize]) -> Tensor {
        self.ops.upload(vec![f32::NAN; shape.iter().product()], shape, self.operands()).expect("upload")
    }

    /// The same for what is float32 on every device.
    pub(crate) fn poisoned_exact(&self, shape: &[usize]) -> Tensor {
        self.ops.upload(vec![f32::NAN; shape.iter().product()], shape, DType::F32).expect("upload")
    }

    pub(crate) fn close(&self, what: &str, found: &Tensor, expected: &[f64]) {
        let found = self.ops.download(found).expect("download");
        assert_eq!(found.len(), expected.len(), "{what}: number of elements");
        let norm = expected.iter().map(|y| y * y).sum::<f64>().sqrt();
        let difference = found.iter().zip(expected).map(|(&x, y)| (f64::from(x) - y).powi(2)).sum::<f64>().sqrt();
        // Where everything cancels, what counts is the size of the terms, which is about 1.
        let floor = 1e-2 * (expected.len() as f64).sqrt();
        let ratio = difference / norm.max(floor);
        assert!(ratio <= self.tolerance, "{what}: relative error {ratio:.2e}");
    }
}
