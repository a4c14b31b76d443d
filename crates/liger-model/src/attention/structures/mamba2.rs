//! Mamba2: softmax feature maps, one gate a head, exp(-softplus(mean of the key)).
//! Formula: `mamba2` in `tests/golden/reference.py`.

use liger_tensor::{FeatureMap, FeatureSpec, Gate};

pub(super) const FEATURES: FeatureSpec =
    FeatureSpec { query: FeatureMap::Softmax, key: FeatureMap::Softmax, gate: Gate::MeanNegativeSoftplus };
