//! The decoding state: what a model remembers of a text. Of a Liger model it has one size, whatever the length.

use std::collections::HashMap;
use std::path::Path;

use liger_tensor::{KeptKeys, KeyValueCache, Ops, Tensor};
use safetensors::tensor::{SafeTensors, TensorView};

use crate::attention::Mixer;
use crate::config::ModelConfig;
use crate::error::{Error, Result, io};
use crate::files;
use crate::step::Steps;

/// The state of `slots` texts that are decoded side by side.
#[derive(Debug)]
pub struct State {
    pub(crate) layers: Vec<LayerState>,
    /// Tokens seen, by slot.
    positions: Vec<usize>,
    /// Steps that work on this state's memory, by model.
    pub(crate) steps: Vec<Steps>,
    /// Logits of the last step, where it was none of `steps`.
    pub(crate) logits: Option<Tensor>,
}

/// The state of one layer.
#[derive(Debug)]
pub(crate) struct LayerState {
    pub(crate) cache: KeyValueCache,
    /// Float32 recurrent states `[slots, K, Dk, Dv]`: none, one, or gsa's two.
    pub(crate) recurrent: Vec<Tensor>,
}

/// Elements of a text's state after `tokens` tokens, all layers together.
pub fn state_elements(config: &ModelConfig, tokens: usize) -> usize {
    let (kv, d) = (config.num_kv_heads, config.head_dim);
    let of_layer = |mixer: &Mixer| {
        let spec = mixer.spec();
        let rows = if spec.window.is_some() { spec.cache_rows() } else { tokens };
        // Of the base model's own sliding window, only what there is.
        let rows = if let Mixer::Softmax(_) = mixer { rows.min(tokens) } else { rows };
        let recurrent = match mixer {
            Mixer::Liger(liger) => liger.state_shapes(config).iter().map(|shape| shape.iter().product::<usize>()).sum(),
            Mixer::Softmax(_) => 0,
        };
        let kept = if spec.kept > 0 { kv * (rows + spec.slots()) + config.num_heads * d } else { 0 };
        2 * kv * rows * d + kept + recurrent
    };
    Mixer::of(config).iter().map(of_layer).sum()
}

impl State {
    pub(crate) fn new(mixers: &[Mixer], config: &ModelConfig, ops: &dyn Ops, slots: usize) -> Result<Self> {
        // Written to, so that all of it is there from the start: fresh zeros would come page by page, when they are first needed.
        let zeros = |shape: &[usize]| -> Result<Tensor> {
            let mut tensor = ops.empty_f32(shape)?;
            ops.clear(&mut tensor)?;
            Ok(tensor)
        };
        let mut layers = Vec::with_capacity(mixers.len());
        for mixer in mixers {
            let spec = mixer.spec();
            let (kv, rows) = (config.num_kv_heads, spec.cache_rows());
            let cached = [slots, kv, rows, config.head_dim];
            let kept = match spec.kept {
                0 => None,
                _ => Some(KeptKeys {
                    scores: zeros(&[slots, kv, rows])?,
                    positions: zeros(&[slots, kv, spec.slots()])?,
                    queries: zeros(&[slots, config.num_heads, config.head_dim])?,
                }),
            };
            let mut recurrent = Vec::new();
            if let Mixer::Liger(liger) = mixer {
                for [kv, dk, dv] in liger.state_shapes(config) {
                    recurrent.push(zeros(&[slots, kv, dk, dv])?);
                }
            }
            let rows = || match spec.window {
                Some(_) => ops.zeros(&cached),
                None => ops.upload(Vec::new(), &cached, ops.growing_cache()),
            };
            let cache = KeyValueCache { spec, keys: rows()?, values: rows()?, kept };
            layers.push(LayerState { cache, recurrent });
        }
        Ok(Self { layers, positions: vec![0; slots], steps: Vec::new(), logits: None })
    }

    /// Number of texts.
    pub fn slots(&self) -> usize {
        self.positions.len()
    }

    /// Tokens that a slot has seen.
    pub fn position(&self, slot: usize) -> usize {
        self.positions.get(slot).copied().unwrap_or(0)
    }

    pub(crate) fn advance(&mut self, slot: usize, tokens: usize) {
        if let Some(position) = self.positions.get_mut(slot) {
            *position += tokens;
        }
    }

    /// Bytes of all slots: of a Liger model always the same, of a Transformer growing with the text.
    pub fn bytes(&self) -> usize {
        let recurrent = |layer: &LayerState| layer.recurrent.iter().map(Tensor::bytes).sum::<usize>();
        self.layers.iter().map(|layer| layer.cache.bytes() + recurrent(layer)).sum()
    }

    /// Recurrent states of a layer, `[slots, K, Dk, Dv]` each.
    pub fn recurrent(&self, layer: usize) -> &[Tensor] {
        self.layers.get(layer).map_or(&[], |l| &l.recurrent)
    }

    fn named(&self) -> Vec<(String, &Tensor)> {
        let mut list = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            list.push((format!("layers.{i}.window.keys"), &layer.cache.keys));
            list.push((format!("layers.{i}.window.values"), &layer.cache.values));
            if let Some(KeptKeys { scores, positions, queries }) = &layer.cache.kept {
                list.push((format!("layers.{i}.window.scores"), scores));
                list.push((format!("layers.{i}.window.positions"), positions));
                list.push((format!("layers.{i}.window.queries"), queries));
            }
            for (j, tensor) in layer.recurrent.iter().enumerate() {
                list.push((format!("layers.{i}.recurrent.{j}"), tensor));
            }
        }
        list
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flat_map(|layer| {
            let kept = layer.cache.kept.iter().flat_map(|kept| [&kept.scores, &kept.positions, &kept.queries]);
            [&layer.cache.keys, &layer.cache.values].into_iter().chain(kept).chain(&layer.recurrent)
        })
    }

    fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.layers.iter_mut().flat_map(|layer| {
            let KeyValueCache { keys, values, kept, .. } = &mut layer.cache;
            let kept = kept.iter_mut().flat_map(|kept| [&mut kept.scores, &mut kept.positions, &mut kept.queries]);
            [keys, values].into_iter().chain(kept).chain(&mut layer.recurrent)
        })
    }

    /// Copies the text of a slot into `one`, a state of one slot of the same model.
    ///
    /// # Errors
    /// If the states are not alike: those that grow with the text are only so at the same length.
    pub fn take(&self, slot: usize, one: &mut Self, ops: &dyn Ops) -> Result<()> {
        for (to, from) in one.tensors_mut().zip(self.tensors()) {
            ops.copy_rows(to, from, slot)?;
        }
        one.positions.fill(self.position(slot));
        Ok(())
    }

    /// Puts the text of `one`, a state of one slot of the same model, into a slot.
    ///
    /// # Errors
    /// As [`State::take`].
    pub fn put(&mut self, slot: usize, one: &Self, ops: &dyn Ops) -> Result<()> {
        for (to, from) in self.tensors_mut().zip(one.tensors()) {
            ops.write_rows(to, from, slot)?;
        }
        if let Some(position) = self.positions.get_mut(slot) {
            *position = one.position(0);
        }
        Ok(())
    }

    /// Writes the state to a safetensors file; `fingerprint` names the model that it belongs to, `about` is given back by
    /// [`State::load`].
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written; an older file of that name stays then.
    pub fn save(&self, path: &Path, fingerprint: &str, about: &str, ops: &dyn Ops) -> Result<()> {
        let mut data = Vec::new();
        for (name, tensor) in self.named() {
            let bytes: Vec<u8> = ops.download(tensor)?.iter().flat_map(|x| x.to_le_bytes()).collect();
            data.push((name, tensor.shape().to_vec(), bytes));
        }
        let mut views = Vec::new();
        for (name, shape, bytes) in &data {
            let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
            views.push((name, view.map_err(|e| Error::corrupt(path, e.to_string()))?));
        }
        let positions = serde_json::json!(self.positions).to_string();
        let metadata = HashMap::from([
            ("format".to_owned(), "liger-state-1".to_owned()),
            ("positions".to_owned(), positions),
            ("model".to_owned(), fingerprint.to_owned()),
            ("about".to_owned(), about.to_owned()),
        ]);
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| Error::corrupt(path, e.to_string()))?;
        files::write_whole(path, &bytes)
    }

    /// Reads a state back into one of the same model and number of slots; what was said about it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the file is damaged, of another model, or of another number of slots.
    pub fn load(&mut self, path: &Path, fingerprint: &str, ops: &dyn Ops) -> Result<String> {
        let bytes = std::fs::read(path).map_err(io(path, "read"))?;
        let damaged = |e: safetensors::SafeTensorError| Error::corrupt(path, format!("not a state file: {e}"));
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if metadata.get("format").map(String::as_str) != Some("liger-state-1") {
            return Err(Error::corrupt(path, "not a state file of this program"));
        }
        if metadata.get("model").map(String::as_str) != Some(fingerprint) {
            return Err(Error::corrupt(path, "the state of another model, structure or adapter"));
        }
        let positions = metadata.get("positions").and_then(|p| serde_json::from_str::<Vec<usize>>(p).ok());
        let positions = positions.filter(|p| p.len() == self.positions.len());
        let positions = positions.ok_or_else(|| Error::corrupt(path, "the state of another number of texts"))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(damaged)?;
        let read = |name: &str, like: &Tensor, any_rows: bool| -> Result<Tensor> {
            let view = tensors.tensor(name).map_err(damaged)?;
            let mut expected = like.shape().to_vec();
            if let (true, Some(rows)) = (any_rows, view.shape().get(2)) {
                expected[2] = *rows;
            }
            if view.shape() != expected || view.dtype() != safetensors::Dtype::F32 {
                return Err(Error::corrupt(path, format!("`{name}` is {:?}, expected {expected:?}", view.shape())));
            }
            let (chunks, _) = view.data().as_chunks::<4>();
            let values = chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            Ok(ops.upload(values, &expected, like.dtype())?)
        };
        let mut layers = Vec::with_capacity(self.layers.len());
        let longest = positions.iter().copied().max().unwrap_or(0);
        for (i, layer) in self.layers.iter().enumerate() {
            let spec = layer.cache.spec;
            let growing = spec.window.is_none();
            let keys = read(&format!("layers.{i}.window.keys"), &layer.cache.keys, growing)?;
            let values = read(&format!("layers.{i}.window.values"), &layer.cache.values, growing)?;
            if keys.shape() != values.shape() || (growing && keys.dim(2) < longest) {
                return Err(Error::corrupt(path, format!("layer {i} holds fewer keys than the text is long")));
            }
            let kept = match &layer.cache.kept {
                None => None,
                Some(like) => Some(KeptKeys {
                    scores: read(&format!("layers.{i}.window.scores"), &like.scores, false)?,
                    positions: read(&format!("layers.{i}.window.positions"), &like.positions, false)?,
                    queries: read(&format!("layers.{i}.window.queries"), &like.queries, false)?,
                }),
            };
            let mut recurrent = Vec::new();
            for (j, like) in layer.recurrent.iter().enumerate() {
                recurrent.push(read(&format!("layers.{i}.recurrent.{j}"), like, false)?);
            }
            layers.push(LayerState { cache: KeyValueCache { spec, keys, values, kept }, recurrent });
        }
        (self.layers, self.positions) = (layers, positions);
        self.steps.clear();
        Ok(metadata.get("about").cloned().unwrap_or_default())
    }

    /// Empties a slot for another text.
    ///
    /// # Errors
    /// If the device fails.
    pub fn reset(&mut self, slot: usize, ops: &dyn Ops) -> Result<()> {
        if let Some(position) = self.positions.get_mut(slot) {
            *position = 0;
        }
        for tensor in self.layers.iter_mut().flat_map(|layer| &mut layer.recurrent) {
            let mut shape = tensor.shape().to_vec();
            shape[0] = 1;
            let mut zeros = ops.empty_f32(&shape)?;
            ops.clear(&mut zeros)?;
            ops.write_rows(tensor, &zeros, slot)?;
        }
        Ok(())
    }

    /// Pretends that every slot has seen `tokens` tokens, whatever it holds: for measuring the time of a step.
    ///
    /// # Errors
    /// If the device fails.
    pub fn pretend_position(&mut self, tokens: usize, ops: &dyn Ops) -> Result<()> {
        for layer in &mut self.layers {
            if layer.cache.spec.window.is_none() {
                let [slots, kv, _, d] = <[usize; 4]>::try_from(layer.cache.keys.shape()).unwrap_or([0; 4]);
                let rows = tokens + 64;
                for tensor in [&mut layer.cache.keys, &mut layer.cache.values] {
                    let shape = [slots, kv, rows, d];
                    *tensor = ops.upload(vec![0.01; slots * kv * rows * d], &shape, ops.growing_cache())?;
                }
            }
        }
        self.positions.fill(tokens);
        Ok(())
    }
}
