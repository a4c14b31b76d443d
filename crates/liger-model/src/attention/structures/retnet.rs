//! Gated RetNet / mLSTM: softmax feature maps, one gate a head, sigmoid(mean of the key).
//! Formula: `retnet` in `tests/golden/reference.py`.

use liger_tensor::{FeatureMap, FeatureSpec, Gate};

pub(super) const FEATURES: FeatureSpec =
    FeatureSpec { query: FeatureMap::Softmax, key: FeatureMap::Softmax, gate: Gate::MeanLogSigmoid };
