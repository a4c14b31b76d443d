use std::path::Path;

use serde_json::{Value, json};

use super::ModelConfig;
use crate::attention::{GateSource, Structure, kept};
use crate::error::{Error, Result};
use crate::fields::Fields;

/// The `liger` object of `config.json`: how the attention of a model was replaced.
#[derive(Debug, Clone, PartialEq)]
pub struct LigerConfig {
    /// The recurrence.
    pub structure: Structure,
    /// What gla's gate is made of.
    pub gate: GateSource,
    /// Keys that the softmax window sees, the query's own counted.
    pub window: usize,
    /// First tokens of the text that stay visible beside the window.
    pub sinks: usize,
    /// Weight of the recurrent branch.
    pub alpha: f32,
    /// Weight of the window branch.
    pub beta: f32,
    /// Memory slots of gsa (if `None` as many as the head has elements) and of kept (as twice the paper's bytes have room for).
    pub slots: Option<usize>,
    /// Layers that keep their softmax attention over everything.
    pub softmax_layers: Vec<usize>,
}

const KEYS: [&str; 8] = ["structure", "gate", "window", "sinks", "alpha", "beta", "slots", "softmax_layers"];

impl LigerConfig {
    /// The paper's form of a structure: window 64, no sinks, half and half. Those that are not the paper's have four sinks;
    /// `mean` adds a tenth of its memory to the whole window, `kept` has window and memory in one softmax.
    pub fn paper(structure: Structure) -> Self {
        let (sinks, alpha, beta) = match structure {
            Structure::Mean => (4, 0.1, 1.0),
            Structure::Kept => (4, 1.0, 1.0),
            _ => (0, 0.5, 0.5),
        };
        let gate = GateSource::Key;
        Self { structure, gate, window: 64, sinks, alpha, beta, slots: None, softmax_layers: Vec::new() }
    }

    pub(crate) fn authors(structure: &str, window: usize, path: &Path) -> Result<Self> {
        Ok(Self { window, ..Self::paper(structure_named(structure, path)?) })
    }

    /// Reads the object; unknown keys are an error, for a setting that is not obeyed would change the model silently.
    pub(crate) fn from_json(value: &Value, num_layers: usize, path: &Path) -> Result<Self> {
        let object = value.as_object().ok_or_else(|| Error::field(path, "liger", value, "an object"))?;
        if let Some(key) = object.keys().find(|key| !KEYS.contains(&key.as_str())) {
            let expected = format!("one of {}", KEYS.join(", "));
            return Err(Error::field(path, &format!("liger.{key}"), "an unknown key", expected));
        }
        let f = Fields::new(object, path);
        let weight = |name: &str| Ok::<_, Error>(f.optional_float(name)?.unwrap_or(0.5) as f32);
        let count = |name: &str| {
            let value = object.get(name).unwrap_or(&Value::Null);
            let size = value.as_u64().filter(|&n| n < 1 << 20).map(|n| n as usize);
            match (value.is_null(), size) {
                (true, _) => Ok(0),
                (false, Some(n)) => Ok(n),
                _ => Err(Error::field(path, &format!("liger.{name}"), value, "a whole number")),
            }
        };
        let mut softmax_layers = Vec::new();
        if let Some(value) = object.get("softmax_layers").filter(|v| !v.is_null()) {
            let expected = format!("a list of layers below {num_layers}");
            let wrong = || Error::field(path, "liger.softmax_layers", value, expected.clone());
            for layer in value.as_array().ok_or_else(wrong)? {
                let layer = layer.as_u64().filter(|&n| n < num_layers as u64).ok_or_else(wrong)?;
                softmax_layers.push(layer as usize);
            }
        }
        let gate = match object.get("gate").filter(|v| !v.is_null()) {
            Some(_) => gate_named(&f.text("gate")?, path)?,
            None => GateSource::Key,
        };
        let config = Self {
            structure: structure_named(&f.text("structure")?, path)?,
            gate,
            window: f.size("window")?,
            sinks: count("sinks")?,
            alpha: weight("alpha")?,
            beta: weight("beta")?,
            slots: f.optional_size("slots")?,
            softmax_layers,
        };
        config.check(path)?;
        Ok(config)
    }

    /// Keys that stay besides window and sinks in a layer of `model`; 0 for every structure but `kept`.
    pub fn kept(&self, model: &ModelConfig) -> usize {
        if self.structure != Structure::Kept || self.alpha == 0.0 {
            return 0;
        }
        let group = model.num_heads / model.num_kv_heads;
        self.slots.unwrap_or_else(|| kept::slots(model.head_dim, group, self.window, self.sinks))
    }

    /// Settings that do not go together.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        let Self { structure, alpha, beta, .. } = *self;
        if let (Some(slots), false) = (self.slots, matches!(structure, Structure::Gsa | Structure::Kept)) {
            return Err(Error::field(path, "liger.slots", slots, "null: only gsa and kept have slots"));
        }
        if self.gate != GateSource::Key && structure != Structure::Gla {
            let expected = "key: only gla's gate can come from elsewhere";
            return Err(Error::field(path, "liger.gate", self.gate.name(), expected));
        }
        if structure == Structure::Kept && !([0.0, 1.0].contains(&alpha) && beta == 1.0) {
            let expected = "1 and 1, or 0 and 1: kept keys are part of the window's softmax, or not there";
            return Err(Error::field(path, "liger.alpha and liger.beta", format!("{alpha} and {beta}"), expected));
        }
        Ok(())
    }

    /// As `config.json` has it.
    pub fn to_json(&self) -> Value {
        let mut object = json!({
            "structure": self.structure.name(), "window": self.window, "sinks": self.sinks,
            "alpha": super::round_trip(self.alpha), "beta": super::round_trip(self.beta),
            "slots": self.slots, "softmax_layers": self.softmax_layers,
        });
        if self.gate != GateSource::Key {
            object["gate"] = self.gate.name().into();
        }
        object
    }
}

fn structure_named(name: &str, path: &Path) -> Result<Structure> {
    let known = || Structure::ALL.map(Structure::name).join(", ");
    Structure::from_name(name).ok_or_else(|| Error::field(path, "liger.structure", format!("`{name}`"), known()))
}

fn gate_named(name: &str, path: &Path) -> Result<GateSource> {
    let known = || GateSource::ALL.map(GateSource::name).join(", ");
    GateSource::from_name(name).ok_or_else(|| Error::field(path, "liger.gate", format!("`{name}`"), known()))
}
