//! One file a verb.

pub mod bench;
pub mod chat;
pub mod convert;
pub mod eval;
pub mod export;
pub mod fuse;
pub mod generate;
pub mod info;
pub mod linearize;
pub mod logits;
pub mod report;
pub mod serve;
