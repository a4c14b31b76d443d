//! The loss of a batch and its gradient at the hidden states. Logits exist one chunk of rows at a time.

use liger_model::{Adapter, Decoder, Recompute};
use liger_tensor::{Ops, Sequences, Tensor};

use crate::data::Row;
use crate::error::Result;
use crate::recipe::Objective;

/// Rows whose logits are in memory at once: up to 512 MiB of them on a device with its own memory, 128 MiB on a CPU. The more there are,
/// the more seldom the output layer's weights are read.
fn loss_chunk(decoder: &Decoder) -> usize {
    let bytes = if decoder.ops().memory().is_some() { 512 << 20 } else { 128 << 20 };
    (bytes / (4 * decoder.config().vocab_size)).clamp(256, 8192) / 256 * 256
}

/// Bytes of the logits that are in memory at once while `tokens` tokens are trained on.
pub fn logit_bytes(decoder: &Decoder, tokens: usize, objective: Objective) -> usize {
    let models = if objective == Objective::Distillation { 2 } else { 1 };
    models * loss_chunk(decoder).min(tokens) * decoder.config().vocab_size * decoder.ops().activations().bytes(1)
}

/// Gradient `[N, d]` of the final hidden states by the mean next-token loss; `labels[i]` is the token that row i should
/// predict, -1 for none.
///
/// # Errors
/// If the device fails.
pub fn next_token_gradient(decoder: &Decoder, hidden: &Tensor, labels: Vec<i64>) -> Result<Tensor> {
    let mut dhidden = decoder.ops().zeros(hidden.shape())?;
    let scale = 1.0 / labels.len().max(1) as f32;
    let objective = Objective::NextToken;
    let models = Models { student: decoder, teacher: decoder, objective, recompute: Recompute::None };
    let batch = Batch { ids: Vec::new(), labels, sequences: Sequences::default() };
    models.losses(&batch, hidden, None, Some((&mut dhidden, scale)))?;
    Ok(dhidden)
}

/// Rows as one batch.
pub(crate) struct Batch {
    pub(crate) ids: Vec<u32>,
    pub(crate) labels: Vec<i64>,
    pub(crate) sequences: Sequences,
}

impl Batch {
    pub(crate) fn of(rows: &[&Row]) -> Self {
        Self {
            ids: rows.iter().flat_map(|row| &row.ids).copied().collect(),
            labels: rows.iter().flat_map(|row| &row.labels).copied().collect(),
            sequences: Sequences::fresh(rows.iter().flat_map(|row| &row.lengths).copied()),
        }
    }
}

/// What the losses of a batch need.
pub(crate) struct Models<'a> {
    pub(crate) student: &'a Decoder,
    pub(crate) teacher: &'a Decoder,
    pub(crate) objective: Objective,
    pub(crate) recompute: Recompute,
}

impl Models<'_> {
    fn teacher_hidden(&self, batch: &Batch) -> Result<Option<Tensor>> {
        match self.objective {
            Objective::NextToken => Ok(None),
            Objective::Distillation => Ok(Some(self.teacher.forward(&batch.ids, &batch.sequences, None, None)?)),
        }
    }

    /// Sum of the losses of the rows that count; with a gradient, `scale` times that of the hidden states is added.
    fn losses(
        &self,
        batch: &Batch,
        hidden: &Tensor,
        teacher_hidden: Option<&Tensor>,
        mut gradient: Option<(&mut Tensor, f32)>,
    ) -> Result<f64> {
        let ops = self.student.ops();
        let mut total = 0.0f64;
        let width = hidden.dim(1);
        let chunk = loss_chunk(self.student);
        for first in (0..batch.labels.len()).step_by(chunk) {
            let count = chunk.min(batch.labels.len() - first);
            let labels = &batch.labels[first..first + count];
            if labels.iter().all(|&label| label < 0) {
                continue;
            }
            let rows_of = |x: &Tensor| -> Result<Tensor> {
                let mut rows = ops.empty(&[count, width])?;
                ops.copy_rows(&mut rows, x, first)?;
                Ok(rows)
            };
            let mut logits = self.student.training_logits(&rows_of(hidden)?)?;
            let scale = gradient.as_ref().map(|(_, scale)| *scale);
            let losses = match teacher_hidden {
                None => ops.cross_entropy(&mut logits, labels, scale)?,
                Some(teacher) => {
                    let target = self.teacher.training_logits(&rows_of(teacher)?)?;
                    let counts: Vec<bool> = labels.iter().map(|&label| label >= 0).collect();
                    ops.kl_divergence(&mut logits, &target, &counts, scale)?
                }
            };
            total += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
            if let Some((dhidden, _)) = &mut gradient {
                let mut part = ops.empty(&[count, width])?;
                self.student.logits_backward(&mut part, &logits)?;
                ops.write_rows(dhidden, &part, first)?;
            }
        }
        Ok(total)
    }

    /// Adds the gradients of `scale` times the batch's loss to `gradients`; the sum of the losses.
    pub(crate) fn backward(
        &self,
        rows: &[&Row],
        adapter: &Adapter,
        gradients: &mut Adapter,
        scale: f32,
        dropout_seed: u64,
    ) -> Result<f64> {
        let batch = Batch::of(rows);
        let teacher_hidden = self.teacher_hidden(&batch)?;
        let pass =
            self.student.train_forward(&batch.ids, batch.sequences.clone(), adapter, dropout_seed, self.recompute)?;
        let ops: &dyn Ops = self.student.ops();
        let mut dhidden = ops.zeros(pass.hidden.shape())?;
        let total = self.losses(&batch, &pass.hidden, teacher_hidden.as_ref(), Some((&mut dhidden, scale)))?;
        drop(teacher_hidden);
        self.student.train_backward(pass, &dhidden, adapter, gradients)?;
        Ok(total)
    }

    /// Mean loss over the rows.
    pub(crate) fn evaluate(&self, rows: &[Row], at_once: usize, adapter: &Adapter) -> Result<f64> {
        let (mut total, mut count) = (0.0, 0usize);
        for rows in rows.chunks(at_once) {
            let rows: Vec<&Row> = rows.iter().collect();
            let batch = Batch::of(&rows);
            let teacher_hidden = self.teacher_hidden(&batch)?;
            let hidden = self.student.forward(&batch.ids, &batch.sequences, None, Some(adapter))?;
            total += self.losses(&batch, &hidden, teacher_hidden.as_ref(), None)?;
            count += counted(&rows);
        }
        Ok(total / count.max(1) as f64)
    }
}

/// Positions of the rows that count in the loss.
pub(crate) fn counted(rows: &[&Row]) -> usize {
    rows.iter().flat_map(|row| &row.labels).filter(|&&label| label >= 0).count()
}
