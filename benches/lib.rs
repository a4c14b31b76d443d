//! What the benchmarks share: a SmolLM2-shaped model with random weights.

use std::sync::Arc;

use liger_cpu::Cpu;
use liger_model::{Decoder, LigerConfig, ModelConfig, RandomWeights, Result, Structure, Weights};
use liger_tensor::DType;

/// The student: gla, window 64, 4 sinks.
///
/// # Errors
/// If there is no memory for the weights.
pub fn smollm2() -> Result<Decoder> {
    let config = ModelConfig::shape("smollm2-135m")?;
    let ops = Arc::new(Cpu::new());
    let weights = Weights::load(&RandomWeights::new(&config, 0), &config, &*ops, DType::F32)?;
    let liger = LigerConfig { sinks: 4, ..LigerConfig::paper(Structure::Gla) };
    Ok(Decoder::new(ops, config, weights).with_attention(Some(liger)))
}
