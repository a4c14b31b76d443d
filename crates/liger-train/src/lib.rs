//! Tuning a Liger model: data in, a LoRA adapter out.
//!
//! [`Recipe`] holds every setting; [`data`] reads or makes the text and packs it; [`Trainer`] runs the steps, keeps the
//! best adapter, writes checkpoints that resume bit for bit, and stops cleanly.

mod checkpoints;
pub mod data;
mod error;
mod metrics;
mod objective;
mod optimizer;
mod recipe;
mod tensorboard;
mod trainer;

pub use checkpoints::latest_checkpoint;
pub use error::{Error, Result};
pub use metrics::StepRecord;
pub use objective::{logit_bytes, next_token_gradient};
pub use optimizer::Optimizer;
pub use recipe::{DataRecipe, LigerRecipe, LoraRecipe, LossOn, Objective, Recipe, Schedule, Template, TrainRecipe};
pub use trainer::{Event, Finished, Outcome, Trainer};
