//! The recurrent structures, one file each: how feature maps, write key and gate come out of query and key.

mod gla;
mod gsa;
mod hgrn2;
pub(crate) mod kept;
mod mamba2;
mod mean;
mod retnet;
mod rwkv6;

use liger_tensor::FeatureSpec;

/// A gated linear recurrence that the pretrained projections are turned into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Structure {
    /// Gated linear attention.
    Gla,
    /// HGRN2.
    Hgrn2,
    /// Gated slot attention.
    Gsa,
    /// Gated RetNet, also the mLSTM row of the paper's table.
    Retnet,
    /// Mamba2's scalar gate.
    Mamba2,
    /// RWKV6's double exponential gate.
    Rwkv6,
    /// A decayed mean with long half-lives; not the paper's.
    Mean,
    /// Slots that keep the keys least like the others, read by the window's softmax; not the paper's.
    Kept,
}

/// What a structure runs.
pub(crate) enum Form {
    /// One gated recurrence behind feature maps.
    Features(FeatureSpec),
    /// Two gated recurrences around a softmax over memory slots.
    Slots,
    /// Slots that hold one key and value each, or let it go: a gate of 1 or 0. They are part of the window's softmax.
    Kept,
}

impl Structure {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Gla, Self::Hgrn2, Self::Gsa, Self::Retnet, Self::Mamba2, Self::Rwkv6, Self::Mean, Self::Kept];

    /// The name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gla => "gla",
            Self::Hgrn2 => "hgrn2",
            Self::Gsa => "gsa",
            Self::Retnet => "retnet",
            Self::Mamba2 => "mamba2",
            Self::Rwkv6 => "rwkv6",
            Self::Mean => "mean",
            Self::Kept => "kept",
        }
    }

    /// The structure of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.name() == name)
    }

    pub(crate) fn form(self) -> Form {
        match self {
            Self::Gla => Form::Features(gla::FEATURES),
            Self::Hgrn2 => Form::Features(hgrn2::FEATURES),
            Self::Gsa => Form::Slots,
            Self::Retnet => Form::Features(retnet::FEATURES),
            Self::Mamba2 => Form::Features(mamba2::FEATURES),
            Self::Rwkv6 => Form::Features(rwkv6::FEATURES),
            Self::Mean => Form::Features(mean::FEATURES),
            Self::Kept => Form::Kept,
        }
    }
}

pub(crate) use gsa::{Slots, SlotsGradients};
