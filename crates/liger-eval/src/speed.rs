//! Time and memory of a decoding step after a text of some length.

use std::time::Instant;

use liger_model::{Decoder, Result};
use serde::{Deserialize, Serialize};

/// What one step costs.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct StepCost {
    /// Tokens before it.
    pub context: usize,
    /// Median time of a step.
    pub milliseconds: f64,
    /// Bytes of the decoding state: window and recurrent state, or keys and values.
    pub state_bytes: usize,
}

/// Times greedy steps of `texts` texts side by side after `context` tokens each. The state is filled without running the
/// text: what it holds does not change how long a step takes.
///
/// # Errors
/// If the device fails.
pub fn step_cost(decoder: &Decoder, context: usize, texts: usize, steps: usize) -> Result<StepCost> {
    let mut state = decoder.new_state(texts)?;
    let tokens: Vec<(usize, u32)> = (0..texts).map(|slot| (slot, 0)).collect();
    state.pretend_position(context, decoder.ops())?;
    let mut times = Vec::with_capacity(steps);
    for _ in 0..steps + 2 {
        let start = Instant::now();
        let logits = decoder.step(&mut state, &tokens, None)?;
        decoder.ops().argmax(logits)?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.drain(..2); // they take memory, and record the step where the device can
    times.sort_by(f64::total_cmp);
    Ok(StepCost { context, milliseconds: times[times.len() / 2], state_bytes: state.bytes() })
}
