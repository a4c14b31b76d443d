//! A decayed mean, which no text length makes grow: retnet's gate, slowed down to half-lives from 256 tokens for the first
//! key/value head to 4,096 for the last, and writes of `1 - gate`. Formula: `mean` in `tests/golden/reference.py`.

use liger_tensor::{FeatureMap, FeatureSpec, Gate};

pub(super) const FEATURES: FeatureSpec = FeatureSpec {
    query: FeatureMap::Softmax,
    key: FeatureMap::Share,
    gate: Gate::MeanLogSigmoidOver { shortest: 256.0, longest: 4096.0 },
};
