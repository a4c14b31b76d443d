//! LoRA adapters in PEFT's form: `adapter_config.json` and `adapter_model.safetensors`.

use std::path::Path;

use liger_tensor::{DType, Ops};
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use super::safetensors_files::SafetensorsFiles;
use crate::adapter::{Adapter, Lora, LoraConfig, Target};
use crate::config::ModelConfig;
use crate::error::{Error, Result, io};
use crate::fields::Fields;
use crate::files;
use crate::weights::TensorSource;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// Loads an adapter for a model.
///
/// # Errors
/// If a file is missing or damaged, or the adapter's matrices do not fit the model.
pub fn load_adapter(folder: &Path, model: &ModelConfig, ops: &dyn Ops) -> Result<Adapter> {
    let path = folder.join(CONFIG);
    if !path.exists() {
        let remedy = "give a folder that PEFT or `liger linearize` wrote".into();
        return Err(Error::Missing { path: folder.to_owned(), what: CONFIG.into(), remedy });
    }
    let text = std::fs::read_to_string(&path).map_err(io(&path, "read"))?;
    let config = parse_config(&text, &path)?;
    let weights = folder.join(WEIGHTS);
    if !weights.exists() {
        let remedy = "the folder has its configuration only".into();
        return Err(Error::Missing { path: folder.to_owned(), what: WEIGHTS.into(), remedy });
    }
    let tensors = SafetensorsFiles::open_files(&weights, vec![weights.clone()])?;
    let layer_of = |name: &str| -> Option<usize> {
        name.strip_prefix(PREFIX)?.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
    };
    let deepest = tensors.names().filter_map(layer_of).max();
    if deepest.is_some_and(|layer| layer >= model.num_layers) {
        let problem = format!("an adapter for another model: it has layers past the {} of this one", model.num_layers);
        return Err(Error::corrupt(folder, problem));
    }
    let mut layer = 0;
    let mut seen = 0;
    Adapter::build(config.clone(), model, |[out, input], rank| {
        // `build` asks in the order of layers and targets.
        let target = config_targets(&config)[seen];
        let name = format!("{PREFIX}model.layers.{layer}.self_attn.{}", target.name());
        seen += 1;
        if seen == config.targets.len() {
            (seen, layer) = (0, layer + 1);
        }
        let read = |matrix: char, expected: [usize; 2]| {
            let name = format!("{name}.lora_{matrix}.weight");
            match tensors.shape(&name) {
                Some(shape) if shape == expected => Ok(ops.upload(tensors.read(&name)?, &expected, DType::F32)?),
                Some(shape) => Err(Error::corrupt(
                    folder,
                    format!("an adapter for another model: `{name}` is {shape:?}, this model needs {expected:?}"),
                )),
                None => Err(Error::corrupt(folder, format!("tensor `{name}` is missing"))),
            }
        };
        Ok(Lora { a: read('A', [rank, input])?, b: read('B', [out, rank])? })
    })
}

fn config_targets(config: &LoraConfig) -> Vec<Target> {
    Target::ALL.into_iter().filter(|t| config.targets.contains(t)).collect()
}

fn parse_config(text: &str, path: &Path) -> Result<LoraConfig> {
    let object: Map<String, Value> =
        serde_json::from_str(text).map_err(|e| Error::corrupt(path, format!("not a JSON object: {e}")))?;
    let f = Fields::new(&object, path);
    let kind = f.optional_text("peft_type")?.unwrap_or_else(|| "LORA".into());
    if kind != "LORA" {
        return Err(Error::field(path, "peft_type", format!("`{kind}`"), "`LORA`"));
    }
    for field in ["use_dora", "use_rslora", "fan_in_fan_out"] {
        if f.is_true(field) {
            return Err(Error::field(path, field, "true", "false: plain LoRA only"));
        }
    }
    for field in ["rank_pattern", "alpha_pattern"] {
        if f.optional_object(field)?.is_some_and(|o| !o.is_empty()) {
            return Err(Error::field(path, field, "a pattern", "nothing: one rank and alpha for all layers"));
        }
    }
    let names = f.optional_texts("target_modules")?;
    let names = names.ok_or_else(|| Error::field(path, "target_modules", "nothing", "a list of projections"))?;
    let mut targets = Vec::new();
    for name in names {
        let target = Target::from_name(&name);
        let wrong = || Error::field(path, "target_modules", format!("`{name}`"), "q_proj, k_proj, v_proj, o_proj");
        targets.push(target.ok_or_else(wrong)?);
    }
    let rank = f.size("r")?;
    Ok(LoraConfig {
        rank,
        alpha: f.positive("lora_alpha")?.unwrap_or(8.0) as f32,
        dropout: f.optional_float("lora_dropout")?.unwrap_or(0.0) as f32,
        targets,
    })
}

/// Writes an adapter that PEFT loads; `base` is what `base_model_name_or_path` says.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be written.
pub fn save_adapter(adapter: &Adapter, folder: &Path, base: &str, ops: &dyn Ops) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(io(folder, "write"))?;
    let LoraConfig { rank, alpha, dropout, targets } = &adapter.config;
    let names: Vec<_> = targets.iter().map(|t| t.name()).collect();
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none",
        "fan_in_fan_out": false, "inference_mode": true, "r": rank, "lora_alpha": alpha, "lora_dropout": dropout,
        "target_modules": names,
    });
    let mut data = Vec::new();
    for (name, tensor) in adapter.named() {
        let bytes: Vec<u8> = ops.download(tensor)?.iter().flat_map(|x| x.to_le_bytes()).collect();
        data.push((format!("{PREFIX}{name}"), tensor.shape().to_vec(), bytes));
    }
    let path = folder.join(WEIGHTS);
    let broken = |e: safetensors::SafeTensorError| Error::corrupt(&path, e.to_string());
    let mut views = Vec::new();
    for (name, shape, bytes) in &data {
        views.push((name, TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).map_err(broken)?));
    }
    files::write_whole(&path, &safetensors::serialize(views, None).map_err(broken)?)?;
    files::write_whole(&folder.join(CONFIG), format!("{config:#}\n").as_bytes())
}
