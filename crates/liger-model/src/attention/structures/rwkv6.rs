//! RWKV6: softmax feature maps, gate exp(-exp(k)); the log gate falls below -1e3 on real keys.
//! Formula: `rwkv6` in `tests/golden/reference.py`.

use liger_tensor::{FeatureMap, FeatureSpec, Gate};

pub(super) const FEATURES: FeatureSpec =
    FeatureSpec { query: FeatureMap::Softmax, key: FeatureMap::Softmax, gate: Gate::NegativeExp };
