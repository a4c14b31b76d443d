//! What replaces softmax attention, and softmax attention itself.

mod gate_source;
mod liger;
mod structures;

use liger_tensor::AttentionSpec;

pub use gate_source::GateSource;
pub(crate) use liger::{Liger, LigerActivations, MixerGradients, Projected, SoftmaxActivations};
pub use structures::Structure;
pub(crate) use structures::{Form, kept};

use crate::config::ModelConfig;

/// The attention of one layer.
#[derive(Debug, Clone)]
pub(crate) enum Mixer {
    /// Softmax over everything before, or over the model's own sliding window.
    Softmax(AttentionSpec),
    /// Liger Attention: window plus recurrence.
    Liger(Liger),
}

impl Mixer {
    /// The attention of every layer of a model.
    pub(crate) fn of(config: &ModelConfig) -> Vec<Self> {
        let softmax = |layer: usize| {
            Self::Softmax(AttentionSpec { window: config.sliding_windows[layer], ..AttentionSpec::EVERYTHING })
        };
        (0..config.num_layers)
            .map(|layer| match &config.liger {
                Some(liger) if !liger.softmax_layers.contains(&layer) => Self::Liger(Liger::new(liger, config, layer)),
                _ => softmax(layer),
            })
            .collect()
    }

    pub(crate) fn spec(&self) -> AttentionSpec {
        match self {
            Self::Softmax(spec) => *spec,
            Self::Liger(liger) => liger.spec,
        }
    }
}
