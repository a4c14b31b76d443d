//! The numbers of a run: `metrics.jsonl` for programs, TensorBoard events for eyes.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Result, io, unusable};
use crate::tensorboard::EventFile;

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Number of the step, from 1.
    pub step: u64,
    /// Tokens seen so far.
    pub tokens: u64,
    /// Mean loss over the tokens that count.
    pub loss: f64,
    /// Norm of the gradients before clipping.
    pub gradient_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Speed of the step.
    pub tokens_per_second: f64,
    /// Mean loss over the validation rows, on steps that validate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
}

pub(crate) struct Metrics {
    path: PathBuf,
    file: File,
    events: EventFile,
}

impl Metrics {
    /// Opens the files of a run; lines past `step` are from a run that was cut off later, and go.
    pub(crate) fn open(run: &Path, step: u64) -> Result<Self> {
        let path = run.join("metrics.jsonl");
        let kept: String = match File::open(&path) {
            Ok(old) => BufReader::new(old)
                .lines()
                .map_while(std::result::Result::ok)
                .filter(|line| serde_json::from_str::<StepRecord>(line).is_ok_and(|r| r.step <= step))
                .map(|line| line + "\n")
                .collect(),
            Err(_) => String::new(),
        };
        liger_model::files::write_whole(&path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(io(&path, "write"))?;
        Ok(Self { path, file, events: EventFile::create(&run.join("tensorboard"))? })
    }

    pub(crate) fn write(&mut self, record: &StepRecord) -> Result<()> {
        let line = serde_json::to_string(record).map_err(|e| unusable(&self.path, e.to_string()))?;
        writeln!(self.file, "{line}").map_err(io(&self.path, "write"))?;
        let mut scalars = vec![
            ("train/loss", record.loss),
            ("train/gradient_norm", record.gradient_norm),
            ("train/learning_rate", record.learning_rate),
            ("train/tokens_per_second", record.tokens_per_second),
        ];
        scalars.extend(record.validation_loss.map(|loss| ("validation/loss", loss)));
        self.events.write(record.step, &scalars)
    }
}
