//! Time and memory of a decoding step after a text of some length.

use std::time::Instant;

use liger_model::{Adapter, Decoder, Result};
use liger_tensor::Sequences;
use serde::Serialize;

/// What one step costs.
#[derive(Debug, Clone, Copy, Serialize)]
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
pub fn step_cost(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    context: usize,
    texts: usize,
    steps: usize,
) -> Result<StepCost> {
    let mut state = decoder.new_state(texts)?;
    let ids = vec![0; texts];
    state.pretend_position(context, decoder.ops())?;
    let mut times = Vec::with_capacity(steps);
    for _ in 0..steps + 1 {
        let mut sequences = Sequences::default();
        (0..texts).for_each(|slot| sequences.push(1, state.position(slot), slot));
        let start = Instant::now();
        let hidden = decoder.forward(&ids, &sequences, Some(&mut state), adapter)?;
        decoder.ops().argmax(&decoder.logits(&hidden)?)?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.remove(0); // the first takes its memory
    times.sort_by(f64::total_cmp);
    Ok(StepCost { context, milliseconds: times[times.len() / 2], state_bytes: state.bytes() })
}
