//! The table of tests that all devices share, on the first GPU; without one, the test says so and does nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use liger_cuda::Cuda;
use liger_tensor::DType;
use liger_testing::Part;

/// float32 within 1e-4 (no tf32 products), bfloat16 within 2e-2.
fn check(part: Part) {
    for (activations, tolerance) in [(DType::F32, 1e-4), (DType::Bf16, 2e-2)] {
        match Cuda::open(0, activations) {
            Ok(gpu) => liger_testing::check(&gpu, tolerance, part),
            Err(e) => println!("skipped: {e}"),
        }
    }
}

// Each by itself: a sanitizer takes long over them. Drawn sizes are the CPU's: here each would be compiled first.

#[test]
fn rows_agree_with_float64() {
    check(Part::Rows);
}

#[test]
fn attention_agrees_with_float64() {
    check(Part::Attention);
}

#[test]
fn kept_keys_agree_with_float64() {
    check(Part::Kept);
}

#[test]
fn the_recurrence_agrees_with_float64() {
    check(Part::Recurrence);
}

#[test]
fn steps_agree_with_float64() {
    check(Part::Steps);
}
