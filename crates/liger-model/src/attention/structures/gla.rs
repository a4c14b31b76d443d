//! Liger-GLA: softmax feature maps, gate sigmoid(k)^(1/16); half-life at k = 0 is exactly 16 tokens.
//! Formula: `gla` in `tests/golden/reference.py`.

use liger_tensor::{FeatureMap, FeatureSpec, Gate};

pub(super) const FEATURES: FeatureSpec =
    FeatureSpec { query: FeatureMap::Softmax, key: FeatureMap::Softmax, gate: Gate::LogSigmoid { divisor: 16.0 } };
