//! Checkpoints of a run: `OUT/checkpoints/step-000200/` with the adapter, AdamW's moments and the counters. Each is
//! written under a temporary name and renamed, so that a crash leaves the one before.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use liger_model::checkpoint::{SafetensorsFiles, load_adapter, save_adapter};
use liger_model::{Adapter, ModelConfig, TensorSource, files};
use liger_tensor::{DType, Ops, Tensor};
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};

use crate::error::{Result, io, unusable};
use crate::optimizer::Optimizer;
use crate::recipe::Recipe;

/// Checkpoints that are kept besides the best adapter.
const KEPT: usize = 2;

/// The counters of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Steps done.
    pub(crate) step: u64,
    /// Tokens seen.
    pub(crate) tokens: u64,
    /// Lowest validation loss and its step.
    pub(crate) best: Option<(f64, u64)>,
    /// The settings that the run began with.
    pub(crate) recipe: Recipe,
    /// Sum over the packed rows: the data must be the same when the run goes on.
    pub(crate) data_sum: u64,
}

/// `run`'s newest checkpoint.
pub fn latest_checkpoint(run: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(run.join("checkpoints")).ok()?;
    let mut steps: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| is_complete(p)).collect();
    steps.sort();
    steps.pop()
}

fn is_complete(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.starts_with("step-") && !name.ends_with(".partial")
}

/// Writes a checkpoint and removes the oldest ones.
pub(crate) fn save(
    run: &Path,
    adapter: &Adapter,
    optimizer: &Optimizer,
    progress: &Progress,
    ops: &dyn Ops,
) -> Result<PathBuf> {
    let folder = run.join("checkpoints");
    let last = folder.join(format!("step-{:08}", progress.step));
    let partial = last.with_extension("partial");
    if partial.exists() {
        std::fs::remove_dir_all(&partial).map_err(io(&partial, "write"))?;
    }
    save_adapter(adapter, &partial, "", ops)?;
    let path = partial.join("optimizer.safetensors");
    let mut data = Vec::new();
    for (moment, form) in [("first", &optimizer.first), ("second", &optimizer.second)] {
        for (name, tensor) in form.named() {
            let bytes: Vec<u8> = ops.download(tensor)?.iter().flat_map(|x| x.to_le_bytes()).collect();
            data.push((format!("{moment}.{name}"), tensor.shape().to_vec(), bytes));
        }
    }
    let broken = |e: safetensors::SafeTensorError| unusable(&path, e.to_string());
    let mut views = Vec::new();
    for (name, shape, bytes) in &data {
        views.push((name, TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).map_err(broken)?));
    }
    let bytes = safetensors::serialize(views, None::<HashMap<String, String>>).map_err(broken)?;
    files::write_whole(&path, &bytes)?;
    let json = serde_json::to_string_pretty(progress).map_err(|e| unusable(&path, e.to_string()))?;
    files::write_whole(&partial.join("progress.json"), json.as_bytes())?;
    if last.exists() {
        std::fs::remove_dir_all(&last).map_err(io(&last, "write"))?;
    }
    std::fs::rename(&partial, &last).map_err(io(&last, "write"))?;

    let entries = std::fs::read_dir(&folder).map_err(io(&folder, "read"))?;
    let mut all: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| is_complete(p)).collect();
    all.sort();
    for old in all.iter().rev().skip(KEPT) {
        std::fs::remove_dir_all(old).map_err(io(old, "write"))?;
    }
    Ok(last)
}

/// Reads a checkpoint back.
pub(crate) fn load(folder: &Path, model: &ModelConfig, ops: &dyn Ops) -> Result<(Adapter, Optimizer, Progress)> {
    let adapter = load_adapter(folder, model, ops)?;
    let mut optimizer = Optimizer::new(&adapter, model, ops)?;
    let path = folder.join("optimizer.safetensors");
    let tensors = SafetensorsFiles::open_files(&path, vec![path.clone()])?;
    for (moment, form) in [("first", &mut optimizer.first), ("second", &mut optimizer.second)] {
        let names: Vec<String> = form.named().into_iter().map(|(name, _)| name).collect();
        for (name, tensor) in names.into_iter().zip(form.matrices_mut()) {
            let name = format!("{moment}.{name}");
            if tensors.shape(&name).as_deref() != Some(tensor.shape()) {
                return Err(unusable(&path, format!("tensor `{name}` is missing or of another shape")));
            }
            *tensor = upload(&tensors.read(&name)?, tensor.shape(), ops)?;
        }
    }
    let path = folder.join("progress.json");
    let text = std::fs::read_to_string(&path).map_err(io(&path, "read"))?;
    let progress = serde_json::from_str(&text).map_err(|e| unusable(&path, format!("damaged: {e}")))?;
    Ok((adapter, optimizer, progress))
}

fn upload(values: &[f32], shape: &[usize], ops: &dyn Ops) -> Result<Tensor> {
    Ok(ops.upload(values.to_vec(), shape, DType::F32)?)
}
