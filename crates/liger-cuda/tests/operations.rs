//! The table of tests that all devices share, on the first GPU; without one, the test says so and does nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use liger_cuda::Cuda;
use liger_tensor::DType;

/// float32 within 1e-4 (no tf32 products), bfloat16 within 2e-2.
fn with_gpu(check: impl Fn(&Cuda, f64)) {
    for (activations, tolerance) in [(DType::F32, 1e-4), (DType::Bf16, 2e-2)] {
        match Cuda::open(0, activations) {
            Ok(gpu) => check(&gpu, tolerance),
            Err(e) => println!("skipped: {e}"),
        }
    }
}

// Drawn sizes are the CPU's: here every one of them would be compiled first.
#[test]
fn every_operation_agrees_with_float64() {
    with_gpu(|gpu, tolerance| liger_testing::check_all(gpu, tolerance));
}
