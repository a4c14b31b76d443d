//! Matrix products on the CPU, measured as `peers/cpu_products.py` measures PyTorch's: the middle and the best of single calls, with
//! weights as training has them.
//!
//! ```sh
//! cargo run --release -p liger-benches --example products
//! cargo run --release -p liger-benches --example products -- 1024x576x1536 bfloat16 20
//! ```
//!
//! The second line is one product of bfloat16 activations for 20 seconds, as `peers/turns.py` wants it.
#![allow(clippy::print_stdout)]

use std::time::{Duration, Instant};

use liger_cpu::Cpu;
use liger_tensor::{DType, Gemm, Ops};

const USAGE: &str = "usage: products [1024x576x1536 float32|bfloat16 SECONDS]";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => {
            for size in ["1024x576x1536", "1024x4096x14336"] {
                for activations in ["float32", "bfloat16"] {
                    measure(size, activations, 2.0)?;
                }
            }
        }
        [size, activations, seconds] => measure(size, activations, seconds.parse()?)?,
        _ => return Err(USAGE.into()),
    }
    Ok(())
}

fn measure(size: &str, activations: &str, seconds: f64) -> Result<()> {
    let sizes: Vec<usize> = size.split('x').filter_map(|n| n.parse().ok()).collect();
    let [m, k, n] = sizes[..] else {
        return Err(USAGE.into());
    };
    let cpu = Cpu::with_bfloat16();
    let dtype = match activations {
        "float32" => DType::F32,
        "bfloat16" => DType::Bf16,
        _ => return Err(USAGE.into()),
    };
    // As a model has them: memory that begins with a line.
    let empty = |shape: &[usize]| if dtype == DType::Bf16 { cpu.empty_operand(shape) } else { cpu.empty(shape) };
    let (w, mut x, mut y) = (cpu.random(&[n, k], 1.0, 0, DType::Bf16)?, empty(&[m, k])?, empty(&[m, n])?);
    // As in training: weights of this size are packed once.
    cpu.keep_packed(&w);
    cpu.copy_rows(&mut x, &cpu.random(&[m, k], 1.0, 1, dtype)?, 0)?;
    let (begin, mut times) = (Instant::now(), Vec::new());
    while times.len() < 5 || begin.elapsed() < Duration::from_secs_f64(seconds) {
        let start = Instant::now();
        cpu.gemm(&mut y, &x, &w, Gemm::LINEAR)?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let (middle, best) = (times[times.len() / 2], times[0]);
    let rate = (2 * m * n * k) as f64 / middle / 1e9;
    println!(
        "linear {size}, {activations} activations: {:.2} ms, {rate:.0} GFLOP/s, best {:.2} ms",
        1e3 * middle,
        1e3 * best
    );
    Ok(())
}
