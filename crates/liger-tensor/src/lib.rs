//! Tensors, and [`Ops`]: the one list of operations that every device implements.
//!
//! The list is of *whole* operations (a norm, an attention, a gated recurrence), each with its `_forward` and, where a
//! model is trained through it, its `_backward`. There is no graph: the layers of `liger-model` call both by hand.
//!
//! Rows. Every activation is a matrix of token rows, `[N, ...]`, in which whole sequences lie one after another;
//! [`Sequences`] says where each begins, which slot of a decoding state it continues and at which position.
//! One layout so serves packed training batches, ragged prefill and one-token decoding.

mod attention;
mod buffer;
pub mod checks;
mod error;
mod features;
mod ops;
pub mod quantize;
mod sequences;
mod steps;
mod tensor;

pub use attention::{Attention, AttentionGradients, AttentionSpec, Keeping, KeptKeys, KeyValueCache};
pub use buffer::{Buffer, Lines};
pub use error::{Error, Result};
pub use features::{FeatureGradients, FeatureMap, FeatureSpec, Features, Gate};
pub use ops::{
    Activation, AdamwParameter, AdamwStep, BlockRows, Draw, GateAxis, Gemm, Ops, Recurrence, RecurrenceGradients,
    low_rank_backward_by_products, low_rank_forward_by_products,
};
pub use sequences::{Sequence, Sequences};
pub use steps::{LigerStep, Recording, StepForm, StepLinear, StepOps, StepSpec};
pub use tensor::{DType, DeviceMemory, Pool, Storage, Tensor};
