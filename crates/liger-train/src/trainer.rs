//! The loop: batches in a fixed order, steps, validation, checkpoints.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use liger_model::checkpoint::save_adapter;
use liger_model::{Adapter, Decoder, Recompute};

use crate::checkpoints::{self, Progress};
use crate::data::{Document, Row, pack};
use crate::error::{Error, Result};
use crate::metrics::{Metrics, StepRecord};
use crate::objective::{Models, counted};
use crate::optimizer::Optimizer;
use crate::recipe::Recipe;

/// Tokens of the validation documents that are looked at: more would take a third of a long run and choose no better.
const VALIDATION_TOKENS: usize = 1 << 16;

/// A tuning run in a folder.
pub struct Trainer {
    student: Decoder,
    teacher: Decoder,
    recipe: Recipe,
    documents: Vec<Document>,
    validation: Vec<Row>,
    run: PathBuf,
    adapter: Adapter,
    optimizer: Optimizer,
    progress: Progress,
    gradients: Adapter,
    recompute: Recompute,
    /// The epoch that `epoch_rows` is of, and the number of its first row.
    epoch: u64,
    epoch_start: u64,
    epoch_rows: Vec<Row>,
}

/// What happens while training.
#[derive(Debug)]
pub enum Event<'a> {
    /// A step is done.
    Step(&'a StepRecord),
    /// A checkpoint was written.
    Checkpoint(&'a Path),
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finished {
    /// All steps are done.
    Done,
    /// Somebody asked it to stop; a checkpoint was written.
    Interrupted,
}

/// A run's end.
#[derive(Debug)]
pub struct Outcome {
    /// How.
    pub finished: Finished,
    /// Steps done.
    pub step: u64,
    /// Lowest validation loss and its step.
    pub best: Option<(f64, u64)>,
}

impl Trainer {
    /// Prepares a run in folder `run`, from its newest checkpoint if `resume`.
    ///
    /// # Errors
    /// If there is nothing to train on, or the checkpoint is of another recipe or other data.
    pub fn new(
        student: Decoder,
        recipe: Recipe,
        documents: Vec<Document>,
        validation: &[Document],
        run: &Path,
        resume: bool,
        recompute: Recompute,
    ) -> Result<Self> {
        recipe.check()?;
        let teacher = student.with_attention(None);
        let (config, ops) = (student.config().clone(), student.ops());
        let rows = pack(&documents.iter().collect::<Vec<_>>(), &recipe.data);
        if rows.is_empty() {
            let expected = "documents with tokens that count in the loss";
            return Err(Error::Setting { field: "data", found: "none".into(), expected });
        }
        let data_sum = data_sum(&rows);
        let checkpoint = if resume { checkpoints::latest_checkpoint(run) } else { None };
        let (adapter, optimizer, progress) = match checkpoint {
            Some(folder) => {
                let (adapter, optimizer, progress) = checkpoints::load(&folder, &config, ops)?;
                if progress.recipe != recipe || progress.data_sum != data_sum {
                    let what = if progress.recipe == recipe { "data" } else { "settings" };
                    let problem = format!("the checkpoint is of a run with other {what}; start anew with --force");
                    return Err(Error::Unusable { path: folder, problem });
                }
                (adapter, optimizer, progress)
            }
            None => {
                let adapter = Adapter::new(recipe.lora_config(), &config, ops, recipe.train.seed)?;
                let optimizer = Optimizer::new(&adapter, &config, ops)?;
                (adapter, optimizer, Progress { step: 0, tokens: 0, best: None, recipe: recipe.clone(), data_sum })
            }
        };
        let gradients = adapter.zeros_like(&config, ops)?;
        let mut validation = pack(&validation.iter().collect::<Vec<_>>(), &recipe.data);
        validation.truncate((VALIDATION_TOKENS / recipe.data.length).max(1));
        let mut trainer = Self {
            student,
            teacher,
            recipe,
            documents,
            validation,
            run: run.to_owned(),
            adapter,
            optimizer,
            progress,
            gradients,
            recompute,
            epoch: 0,
            epoch_start: 0,
            epoch_rows: Vec::new(),
        };
        trainer.start_epoch(0, 0);
        trainer.student.keep_packed();
        Ok(trainer)
    }

    /// Steps in all.
    pub fn steps(&self) -> u64 {
        self.recipe.steps()
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.progress.step
    }

    /// The adapter as it is now.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Ends the training: the adapter.
    pub fn into_adapter(self) -> Adapter {
        self.adapter
    }

    /// Where the best adapter is kept.
    pub fn best_adapter_folder(&self) -> PathBuf {
        self.run.join("adapter")
    }

    /// Row number `index` of the endless stream of epochs, each in an order of its own.
    fn row(&mut self, index: u64) -> &Row {
        if index < self.epoch_start {
            self.start_epoch(0, 0);
        }
        // Epochs may differ by a row in length, so they are walked through.
        while index >= self.epoch_start + self.epoch_rows.len() as u64 {
            self.start_epoch(self.epoch + 1, self.epoch_start + self.epoch_rows.len() as u64);
        }
        &self.epoch_rows[(index - self.epoch_start) as usize]
    }

    fn start_epoch(&mut self, epoch: u64, start: u64) {
        let mut order: Vec<&Document> = self.documents.iter().collect();
        crate::data::shuffle(&mut order, self.recipe.train.seed.wrapping_add(epoch));
        self.epoch_rows = pack(&order, &self.recipe.data);
        (self.epoch, self.epoch_start) = (epoch, start);
    }

    fn batch(&mut self, step: u64) -> Vec<Row> {
        let batch = self.recipe.train.batch as u64;
        (0..batch).map(|i| self.row(step * batch + i).clone()).collect()
    }

    /// Runs the steps that are left. `stop` is looked at after every step.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the loss or the gradient is not a number; what the disk and the model refuse.
    pub fn run(&mut self, stop: &AtomicBool, tell: &mut dyn FnMut(Event<'_>)) -> Result<Outcome> {
        let mut metrics = Metrics::open(&self.run, self.progress.step)?;
        let steps = self.steps();
        while self.progress.step < steps {
            let record = self.one_step()?;
            metrics.write(&record)?;
            tell(Event::Step(&record));
            let step = self.progress.step;
            let interrupted = stop.load(Ordering::Relaxed) && step < steps;
            let every = self.recipe.train.checkpoint_every;
            if interrupted || step == steps || (every > 0 && step.is_multiple_of(every)) {
                let ops = self.student.ops();
                let path = checkpoints::save(&self.run, &self.adapter, &self.optimizer, &self.progress, ops)?;
                tell(Event::Checkpoint(&path));
            }
            if interrupted {
                return Ok(Outcome { finished: Finished::Interrupted, step, best: self.progress.best });
            }
        }
        if self.progress.best.is_none() {
            save_adapter(&self.adapter, &self.best_adapter_folder(), "", self.student.ops())?;
        }
        Ok(Outcome { finished: Finished::Done, step: self.progress.step, best: self.progress.best })
    }

    fn one_step(&mut self) -> Result<StepRecord> {
        let start = Instant::now();
        let step = self.progress.step + 1;
        let rows = self.batch(self.progress.step);
        let rows: Vec<&Row> = rows.iter().collect();
        let count = counted(&rows).max(1);
        let ops = self.student.ops();
        for matrix in self.gradients.matrices_mut() {
            ops.clear(matrix)?;
        }
        let (objective, recompute) = (self.recipe.train.objective, self.recompute);
        let models = Models { student: &self.student, teacher: &self.teacher, objective, recompute };
        let seed = self.recipe.train.seed.wrapping_mul(0x9e37_79b9).wrapping_add(step << 8);
        let mut total = 0.0;
        for (i, micro) in rows.chunks(self.recipe.train.micro_batch).enumerate() {
            let scale = 1.0 / count as f32;
            total += models.backward(micro, &self.adapter, &mut self.gradients, scale, seed + i as u64)?;
        }
        let loss = total / count as f64;
        let norm = Optimizer::norm(&self.gradients, ops)?;
        if !loss.is_finite() || !norm.is_finite() {
            return Err(self.not_finite(step, loss, norm, &rows));
        }
        let steps = self.recipe.steps();
        let learning_rate = self.recipe.train.learning_rate_at(step, steps);
        let now = (step, learning_rate, norm);
        self.optimizer.step(&mut self.adapter, &self.gradients, ops, now, &self.recipe.train)?;
        let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
        self.progress.step = step;
        self.progress.tokens += tokens as u64;
        let seconds = start.elapsed().as_secs_f64();

        let every = self.recipe.train.validate_every;
        let validates = (every > 0 && step.is_multiple_of(every)) || step == steps;
        let mut validation_loss = None;
        if validates && !self.validation.is_empty() {
            let loss = models.evaluate(&self.validation, self.recipe.train.micro_batch, &self.adapter)?;
            validation_loss = Some(loss);
            if self.progress.best.is_none_or(|(best, _)| loss < best) {
                self.progress.best = Some((loss, step));
                save_adapter(&self.adapter, &self.best_adapter_folder(), "", ops)?;
            }
        }
        Ok(StepRecord {
            step,
            tokens: self.progress.tokens,
            loss,
            gradient_norm: norm,
            learning_rate: f64::from(learning_rate),
            tokens_per_second: tokens as f64 / seconds,
            validation_loss,
        })
    }

    fn not_finite(&self, step: u64, loss: f64, norm: f64, rows: &[&Row]) -> Error {
        let lines: Vec<String> = rows.iter().flat_map(|row| &row.lines).take(20).map(usize::to_string).collect();
        let data = format!("documents {}", lines.join(", "));
        let last = checkpoints::latest_checkpoint(&self.run);
        let checkpoint = last.map_or("none yet".into(), |path| path.display().to_string());
        Error::NotFinite { step, loss, norm, data, checkpoint }
    }
}

/// Tells one packing of one data set from another.
fn data_sum(rows: &[Row]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for row in rows {
        for &id in &row.ids {
            hash = (hash ^ u64::from(id)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash
}
