//! Llama-family decoders with softmax or Liger attention: loading, running, training passes, saving.
//!
//! - [`Checkpoint`] opens a Hugging Face folder or a GGUF file and loads a [`Decoder`] onto a device;
//! - [`Decoder::with_attention`] turns it into its Liger form, or back, sharing the frozen weights;
//! - [`Generator`] writes text over a [`State`] of constant size;
//! - [`Adapter`] is LoRA; [`Decoder::train_forward`] and [`Decoder::train_backward`] are the two passes of training.
//!
//! The paper is "Liger: Linearizing Large Language Models to Gated Recurrent Structures", arXiv 2503.01496.

mod adapter;
mod attention;
mod block;
pub mod checkpoint;
mod config;
mod decoder;
mod error;
mod fields;
pub mod files;
mod generate;
mod sampling;
mod shapes;
mod state;
mod step;
mod tokenizer;
mod weights;

pub use adapter::{Adapter, Lora, LoraConfig, Target};
pub use attention::{GateSource, Structure};
pub use block::Branches;
pub use checkpoint::Checkpoint;
pub use config::{Family, LigerConfig, ModelConfig, RopeConfig, RopeScaling};
pub use decoder::{Decoder, Pass, Recompute};
pub use error::{Error, Result};
pub use generate::{GenerateOptions, Generator, StopStrings};
pub use sampling::{Chooser, Sampling, choose};
pub use shapes::{RandomWeights, SHAPES};
pub use state::{State, state_elements};
pub use tokenizer::{ChatTemplate, Message, TextStream, Tokenizer};
pub use weights::{TensorSource, Weights};
