//! Matrix products on the CPU, measured as `peers/cpu_products.py` measures PyTorch's: the middle and the best of single calls.
//!
//! ```sh
//! cargo run --release -p liger-benches --example products
//! ```
#![allow(clippy::print_stdout)]

use std::time::{Duration, Instant};

use liger_cpu::Cpu;
use liger_tensor::{DType, Gemm, Ops, Result};

fn main() -> Result<()> {
    let cpu = Cpu::with_bfloat16();
    for [m, k, n] in [[1024, 576, 1536], [1024, 4096, 14336]] {
        let w = cpu.random(&[n, k], 1.0, 0, DType::Bf16)?;
        for (name, activations) in [("float32", DType::F32), ("bfloat16", DType::Bf16)] {
            // As a model has them: memory that begins with a line.
            let empty = |shape: &[usize]| match activations {
                DType::Bf16 => cpu.empty_operand(shape),
                _ => cpu.empty(shape),
            };
            let (mut x, mut y) = (empty(&[m, k])?, empty(&[m, n])?);
            cpu.copy_rows(&mut x, &cpu.random(&[m, k], 1.0, 1, activations)?, 0)?;
            let (begin, mut times) = (Instant::now(), Vec::new());
            while times.len() < 5 || begin.elapsed() < Duration::from_secs(2) {
                let start = Instant::now();
                cpu.gemm(&mut y, &x, &w, Gemm::LINEAR)?;
                times.push(start.elapsed().as_secs_f64());
            }
            times.sort_by(f64::total_cmp);
            let rate = |time: f64| (2 * m * n * k) as f64 / time / 1e9;
            let (middle, best) = (times[times.len() / 2], times[0]);
            println!(
                "linear {m}x{k}x{n}, {name} activations: {:.2} ms, {:.0} GFLOP/s, best {:.2} ms",
                1e3 * middle,
                rate(middle),
                1e3 * best
            );
        }
    }
    Ok(())
}
