//! The file that an evaluation leaves, and that reports are made of.

use std::path::Path;

use liger_model::{Error, Result, files};
use serde::{Deserialize, Serialize};

use crate::position::{Bucket, PositionScores};
use crate::speed::StepCost;
use crate::{BranchScores, GreedyAgreement, RecallScores, TaskScores};

/// Everything that `liger eval` measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EvaluationRun {
    /// Version of this file's form: 1.
    pub liger_eval: u32,
    /// The command.
    pub command: String,
    /// Device, precision and version.
    pub machine: String,
    /// Items of each task at most.
    pub limit: Option<usize>,
    /// Teacher first, where there is one.
    pub models: Vec<ModelScores>,
    /// Scores by position, where a text was given.
    pub long_text: Option<LongText>,
}

/// What one model scored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelScores {
    /// Its name in the tables.
    pub name: String,
    /// Its file or folder.
    pub path: String,
    /// Hash of its files.
    pub hash: String,
    /// Its `liger` object; null for softmax attention.
    pub liger: Option<serde_json::Value>,
    /// Tokens that it was tuned on, where its folder says so.
    pub tokens_tuned: Option<u64>,
    /// Benchmarks.
    pub tasks: Vec<TaskScores>,
    /// Recall probes.
    pub recall: Vec<RecallScores>,
    /// Its branches, layer by layer.
    pub branches: Vec<BranchScores>,
    /// Time and memory of a step.
    pub costs: Vec<StepCost>,
}

/// Scores on a long text.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LongText {
    /// What it is.
    pub description: String,
    /// Where positions are put together.
    pub buckets: Vec<Bucket>,
    /// By model; the first is compared with.
    pub scores: Vec<PositionScores>,
    /// Greedy texts compared with the first model's.
    pub greedy: Vec<GreedyAgreement>,
}

impl EvaluationRun {
    /// Reads the file.
    ///
    /// # Errors
    /// If it cannot be read, or is not such a file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            doing: "read",
            source,
        })?;
        Self::parse(&text, path)
    }

    /// The run of a file's text; `path` is for messages.
    ///
    /// # Errors
    /// If it is not such a file.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let corrupt = |problem| Error::Corrupt { path: path.to_owned(), problem };
        let run: Self =
            serde_json::from_str(text).map_err(|e| corrupt(format!("not a file of `liger eval --out`: {e}")))?;
        if run.liger_eval != 1 {
            return Err(corrupt(format!("field `liger_eval`: found {}, expected 1", run.liger_eval)));
        }
        if run.models.is_empty() {
            return Err(corrupt("field `models`: found an empty list, expected at least one".into()));
        }
        if run.long_text.as_ref().is_some_and(|long| long.scores.is_empty()) {
            return Err(corrupt("field `long_text.scores`: found an empty list, expected at least one".into()));
        }
        Ok(run)
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|e| Error::Refused(e.to_string()))?;
        files::write_whole(path, text.as_bytes())
    }

    /// Whether the first model is the one that the others are compared with: softmax attention before Liger Attention.
    pub fn has_teacher(&self) -> bool {
        self.models.len() > 1 && self.models[0].liger.is_none()
    }
}
