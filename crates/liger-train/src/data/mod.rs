//! Text for tuning: read from files or written by the teacher, then packed into rows of one length.

mod own;
mod packing;
mod read;
mod render;

use std::path::Path;

use liger_model::Tokenizer;

pub use own::{OwnText, write_conversations};
pub(crate) use packing::shuffle;
pub use packing::{Row, pack};
pub use read::{Record, Records, parquet_rows, read_records, records_from_jsonl};
pub use render::Renderer;

use crate::error::{Result, unusable};
use crate::recipe::DataRecipe;

/// One tokenized text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Line or row in its file, from 1.
    pub line: usize,
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Which of them belong to an answer.
    pub answer: Vec<bool>,
    /// What the model wants before a text, and so before a row that goes on with this one.
    pub begin: Option<u32>,
}

/// A record that could not be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Line or row in its file, from 1.
    pub line: usize,
    /// Why.
    pub reason: String,
}

/// The documents of a file, and what was left out.
#[derive(Debug)]
pub struct Documents {
    /// The usable ones.
    pub list: Vec<Document>,
    /// The others.
    pub skipped: Vec<Skipped>,
}

impl Documents {
    /// Reads and tokenizes a file.
    ///
    /// # Errors
    /// If the file cannot be read, a line is not JSON, or no record can be used.
    pub fn read(path: &Path, tokenizer: &Tokenizer, eos: Option<u32>, recipe: &DataRecipe) -> Result<Self> {
        let records = read_records(path)?;
        let renderer = Renderer { tokenizer, eos, template: recipe.template };
        let mut documents = Self { list: Vec::new(), skipped: records.skipped };
        for (line, record) in &records.list {
            match renderer.document(*line, record) {
                Ok(document) => documents.list.push(document),
                Err(reason) => documents.skipped.push(Skipped { line: *line, reason }),
            }
        }
        documents.skipped.sort_by_key(|s| s.line);
        if documents.list.is_empty() {
            let why =
                documents.skipped.first().map_or("it is empty".into(), |s| format!("line {}: {}", s.line, s.reason));
            return Err(unusable(path, format!("no record can be used; {why}")));
        }
        Ok(documents)
    }

    /// Takes a share of the documents, at least one if there are two, for validation; chosen by `seed`.
    pub fn split(mut self, share: f64, seed: u64) -> (Vec<Document>, Vec<Document>) {
        shuffle(&mut self.list, seed);
        let count = (self.list.len() as f64 * share).round() as usize;
        let count = if share > 0.0 { count.max(1) } else { 0 };
        let validation = self.list.split_off(self.list.len() - count.min(self.list.len() - 1));
        (self.list, validation)
    }

    /// "3 of 100 records left out: line 4: no answer; line 9: ..." or nothing.
    pub fn skipped_summary(&self) -> Option<String> {
        let total = self.list.len() + self.skipped.len();
        if self.skipped.is_empty() {
            return None;
        }
        let shown: Vec<_> = self.skipped.iter().take(5).map(|s| format!("line {}: {}", s.line, s.reason)).collect();
        let more = if self.skipped.len() > 5 { "; ..." } else { "" };
        Some(format!("{} of {total} records left out: {}{more}", self.skipped.len(), shown.join("; ")))
    }
}
