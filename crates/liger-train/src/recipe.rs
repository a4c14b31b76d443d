//! Every setting of a tuning, as a TOML file has them.

use std::path::Path;

use liger_model::{GateSource, LigerConfig, LoraConfig, ModelConfig, Structure, Target};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, io, unusable};

/// All settings. `Recipe::named("paper")` is the paper's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The form that the attention takes.
    pub liger: LigerRecipe,
    /// The adapter.
    pub lora: LoraRecipe,
    /// The text.
    pub data: DataRecipe,
    /// The steps.
    pub train: TrainRecipe,
}

/// `[liger]`: as in `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LigerRecipe {
    /// gla, hgrn2, gsa, retnet, mamba2, rwkv6, mean or kept.
    pub structure: String,
    /// What gla's gate is made of: key, query, value or none.
    #[serde(default = "key", skip_serializing_if = "is_key")]
    pub gate: String,
    /// Keys that the softmax window sees.
    #[serde(default = "default_window")]
    pub window: usize,
    /// First tokens that stay visible.
    #[serde(default)]
    pub sinks: usize,
    /// Weight of the recurrent branch.
    #[serde(default = "half")]
    pub alpha: f32,
    /// Weight of the window branch.
    #[serde(default = "half")]
    pub beta: f32,
    /// Memory slots of gsa and kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<usize>,
    /// Layers that keep their softmax attention; `None` for [`ModelConfig::bounded_layers`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub softmax_layers: Option<Vec<usize>>,
}

/// `[lora]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraRecipe {
    /// Rank of the two matrices.
    pub rank: usize,
    /// Their product counts `alpha / rank` times.
    pub alpha: f32,
    /// Probability that an input is dropped.
    #[serde(default)]
    pub dropout: f32,
    /// q_proj, k_proj, v_proj, o_proj.
    pub targets: Vec<String>,
}

/// Tokens that count in the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossOn {
    /// Those of answers.
    Answers,
    /// All.
    All,
}

/// How records with an instruction become text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Template {
    /// Stanford Alpaca's headings.
    Alpaca,
    /// The model's own chat template, or Alpaca's if it has none.
    Chat,
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecipe {
    /// Tokens of a packed row.
    pub length: usize,
    /// Whether a document sees nothing of the one before it in its row.
    pub reset_at_documents: bool,
    /// Tokens that count.
    pub loss_on: LossOn,
    /// Form of instruction records.
    pub template: Template,
    /// Share of the documents kept for validation.
    #[serde(default = "default_validation")]
    pub validation: f64,
}

/// What the student is drawn to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// The next token of the text: cross-entropy.
    NextToken,
    /// The teacher's distribution: KL(teacher || student).
    Distillation,
}

/// Course of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls to a tenth along half a cosine.
    Cosine,
}

/// `[train]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainRecipe {
    /// The loss.
    pub objective: Objective,
    /// Tokens in all.
    pub tokens: u64,
    /// Rows of a step.
    pub batch: usize,
    /// Rows that are run at once; their gradients add up to the step's. The same result, less memory.
    #[serde(default = "one")]
    pub micro_batch: usize,
    /// Highest learning rate.
    pub learning_rate: f32,
    /// Its course.
    pub schedule: Schedule,
    /// Steps over which it rises from 0.
    #[serde(default)]
    pub warmup_steps: u64,
    /// AdamW's weight decay.
    #[serde(default)]
    pub weight_decay: f32,
    /// AdamW's moments.
    #[serde(default = "default_betas")]
    pub betas: [f32; 2],
    /// AdamW's epsilon.
    #[serde(default = "default_epsilon")]
    pub epsilon: f32,
    /// Gradients of a larger norm are scaled down to this one; 0 leaves them.
    pub clip: f32,
    /// Seed of the adapter, the order of the data and dropout.
    #[serde(default)]
    pub seed: u64,
    /// Steps between checkpoints; 0 for none but the last.
    #[serde(default = "default_checkpoint_every")]
    pub checkpoint_every: u64,
    /// Steps between validations.
    #[serde(default = "default_validate_every")]
    pub validate_every: u64,
}

fn default_window() -> usize {
    64
}
fn key() -> String {
    GateSource::Key.name().into()
}

fn is_key(gate: &str) -> bool {
    gate == GateSource::Key.name()
}

fn half() -> f32 {
    0.5
}
fn one() -> usize {
    1
}
fn default_validation() -> f64 {
    0.02
}
fn default_betas() -> [f32; 2] {
    [0.9, 0.999]
}
fn default_epsilon() -> f32 {
    1e-8
}
fn default_checkpoint_every() -> u64 {
    200
}
fn default_validate_every() -> u64 {
    50
}

const NAMED: [(&str, &str); 3] = [
    ("default", include_str!("../recipes/default.toml")),
    ("paper", include_str!("../recipes/paper.toml")),
    ("quickstart", include_str!("../recipes/quickstart.toml")),
];

impl Recipe {
    /// Names of the recipes that come with the program.
    pub fn names() -> impl Iterator<Item = &'static str> {
        NAMED.iter().map(|(name, _)| *name)
    }

    /// A recipe by name, or from a TOML file.
    ///
    /// # Errors
    /// If there is no such name or file, or a field is unknown, missing or senseless; the message names the line.
    pub fn load(name_or_path: &str) -> Result<Self> {
        let path = Path::new(name_or_path);
        if let Some((_, text)) = NAMED.iter().find(|(name, _)| *name == name_or_path) {
            return Self::parse(text, path);
        }
        if !path.exists() {
            let names: Vec<_> = Self::names().collect();
            return Err(unusable(path, format!("no such recipe; give a TOML file or one of {}", names.join(", "))));
        }
        Self::parse(&std::fs::read_to_string(path).map_err(io(path, "read"))?, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self> {
        let recipe: Self = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count());
            unusable(path, format!("line {line}: {}", e.message()))
        })?;
        recipe.check()?;
        Ok(recipe)
    }

    /// Settings that make no sense.
    ///
    /// # Errors
    /// [`Error::Setting`] with the first.
    pub fn check(&self) -> Result<()> {
        let fail = |field, found: String, expected| Err(Error::Setting { field, found, expected });
        let t = &self.train;
        if Structure::from_name(&self.liger.structure).is_none() {
            let expected = "gla, hgrn2, gsa, retnet, mamba2, rwkv6, mean or kept";
            return fail("liger.structure", format!("`{}`", self.liger.structure), expected);
        }
        let gate = GateSource::from_name(&self.liger.gate);
        if gate.is_none_or(|gate| gate != GateSource::Key && self.liger.structure != Structure::Gla.name()) {
            let expected = "key; for gla also query, value or none";
            return fail("liger.gate", format!("`{}`", self.liger.gate), expected);
        }
        for (field, size) in [
            ("liger.window", self.liger.window),
            ("lora.rank", self.lora.rank),
            ("train.batch", t.batch),
            ("train.micro_batch", t.micro_batch),
        ] {
            if size == 0 || size > 1 << 24 {
                return fail(field, size.to_string(), "a positive number");
            }
        }
        if self.data.length < 2 || self.data.length > 1 << 24 {
            return fail("data.length", self.data.length.to_string(), "at least 2 tokens");
        }
        if !(0.0..1.0).contains(&self.lora.dropout) {
            return fail("lora.dropout", self.lora.dropout.to_string(), "from 0 to below 1");
        }
        if !(0.0..1.0).contains(&self.data.validation) {
            return fail("data.validation", self.data.validation.to_string(), "from 0 to below 1");
        }
        if !(t.learning_rate >= 0.0 && t.learning_rate.is_finite()) {
            return fail("train.learning_rate", t.learning_rate.to_string(), "a number that is not negative");
        }
        let (alpha, beta) = (self.liger.alpha, self.liger.beta);
        if self.liger.structure == Structure::Kept.name() && (alpha, beta) != (1.0, 1.0) {
            let expected = "1 and 1: kept has one softmax over window and memory";
            return fail("liger.alpha and liger.beta", format!("{alpha} and {beta}"), expected);
        }
        if self.lora.targets.is_empty() {
            return fail("lora.targets", "nothing".into(), "some of q_proj, k_proj, v_proj, o_proj");
        }
        if let Some(name) = self.lora.targets.iter().find(|name| Target::from_name(name).is_none()) {
            return fail("lora.targets", format!("`{name}`"), "some of q_proj, k_proj, v_proj, o_proj");
        }
        Ok(())
    }

    /// Another structure, with the sinks and weights that it has of its own; a name that is none is for [`Recipe::check`].
    pub fn set_structure(&mut self, name: &str) {
        if name == self.liger.structure {
            return;
        }
        name.clone_into(&mut self.liger.structure);
        if let Some(structure) = Structure::from_name(name) {
            let LigerConfig { sinks, alpha, beta, .. } = LigerConfig::paper(structure);
            self.liger = LigerRecipe { gate: key(), sinks, alpha, beta, slots: None, ..self.liger.clone() };
        }
    }

    /// The settings of the attention of a model.
    pub fn liger_config(&self, model: &ModelConfig) -> LigerConfig {
        let LigerRecipe { window, sinks, alpha, beta, slots, ref softmax_layers, .. } = self.liger;
        let softmax_layers = softmax_layers.clone().unwrap_or_else(|| model.bounded_layers());
        let structure = Structure::from_name(&self.liger.structure).unwrap_or(Structure::Gla);
        let gate = GateSource::from_name(&self.liger.gate).unwrap_or_default();
        LigerConfig { structure, gate, window, sinks, alpha, beta, slots, softmax_layers }
    }

    /// The settings of the adapter.
    pub fn lora_config(&self) -> LoraConfig {
        let LoraRecipe { rank, alpha, dropout, ref targets } = self.lora;
        let named: Vec<_> = targets.iter().filter_map(|name| Target::from_name(name)).collect();
        let targets = Target::ALL.into_iter().filter(|t| named.contains(t)).collect();
        LoraConfig { rank, alpha, dropout, targets }
    }

    /// Steps that the tokens make.
    pub fn steps(&self) -> u64 {
        self.train.tokens.div_ceil((self.train.batch * self.data.length) as u64).max(1)
    }

    /// As TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).unwrap_or_default()
    }
}

impl TrainRecipe {
    /// Learning rate of step `step`, from 1, of `steps`.
    pub fn learning_rate_at(&self, step: u64, steps: u64) -> f32 {
        if step <= self.warmup_steps {
            return self.learning_rate * step as f32 / self.warmup_steps as f32;
        }
        match self.schedule {
            Schedule::Constant => self.learning_rate,
            Schedule::Cosine => {
                let done = (step - self.warmup_steps) as f32 / (steps.saturating_sub(self.warmup_steps)).max(1) as f32;
                let cosine = 0.5 * (1.0 + (std::f32::consts::PI * done.min(1.0)).cos());
                self.learning_rate * (0.1 + 0.9 * cosine)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_recipes_are_sound_and_survive_toml() {
        for name in Recipe::names() {
            let recipe = Recipe::load(name).unwrap();
            assert_eq!(toml::from_str::<Recipe>(&recipe.to_toml()).unwrap(), recipe);
        }
    }

    #[test]
    fn the_papers_recipe_is_the_papers() {
        let r = Recipe::load("paper").unwrap();
        assert_eq!((r.lora.rank, r.lora.alpha, r.liger.window, r.liger.sinks), (8, 8.0, 64, 0));
        assert_eq!((r.liger.alpha, r.liger.beta, r.train.learning_rate), (0.5, 0.5, 1e-3));
        assert_eq!((r.train.batch, r.data.length, r.steps()), (8, 1024, 2442));
        assert_eq!(r.lora.targets, ["q_proj", "k_proj", "v_proj"]);
    }

    #[test]
    fn mistakes_name_the_line() {
        let text = include_str!("../recipes/paper.toml").replace("rank = 8", "rnk = 8");
        let error = Recipe::parse(&text, "r.toml".as_ref()).unwrap_err().to_string();
        assert!(error.starts_with("r.toml: line 10: unknown field `rnk`"), "{error}");
    }

    #[test]
    fn schedules() {
        let mut t = Recipe::load("default").unwrap().train;
        t.warmup_steps = 10;
        assert_eq!(t.learning_rate_at(5, 100), 0.5 * t.learning_rate);
        assert_eq!(t.learning_rate_at(10, 100), t.learning_rate);
        assert!((t.learning_rate_at(55, 100) - 0.55 * t.learning_rate).abs() < 1e-8);
        assert!((t.learning_rate_at(100, 100) - 0.1 * t.learning_rate).abs() < 1e-8);
        t.schedule = Schedule::Constant;
        assert_eq!(t.learning_rate_at(100, 100), t.learning_rate);
    }
}
