//! Liger-HGRN2: gate sigmoid(k), and what the gate forgets is what the key writes, 1 - sigmoid(k).
//! Formula: `hgrn2` in `tests/golden/reference.py`.

use liger_tensor::{FeatureMap, FeatureSpec, Gate};

pub(super) const FEATURES: FeatureSpec = FeatureSpec {
    query: FeatureMap::Softmax,
    key: FeatureMap::OneMinusSigmoid,
    gate: Gate::LogSigmoid { divisor: 1.0 },
};
