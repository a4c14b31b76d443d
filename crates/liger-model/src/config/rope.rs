use std::f64::consts::PI;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::Family;
use crate::error::{Error, Result};
use crate::fields::Fields;

/// Rotary position embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they were stretched for longer texts.
    pub scaling: RopeScaling,
}

/// Ways to stretch RoPE, named as Hugging Face names them.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not stretched.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// Times the trained length.
        factor: f64,
    },
    /// Llama 3.1 and later: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Times the trained length.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are kept.
        high_freq_factor: f64,
        /// The length before.
        original: f64,
    },
    /// YaRN (arXiv 2309.00071): a ramp over dimensions, and a temperature on cosines and sines.
    Yarn {
        /// Times the trained length.
        factor: f64,
        /// The length before.
        original: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which it is divided.
        beta_slow: f64,
        /// Multiplies cosines and sines.
        attention_factor: f64,
    },
    /// A divisor for each frequency, as GGUF files carry them in `rope_freqs.weight`.
    Divisors(Vec<f32>),
}

/// Gemma 3's bases, where a file does not say: of layers that attend to everything, and of those with a sliding window.
const GEMMA_THETA: f64 = 1e6;
pub(crate) const LOCAL_THETA: f64 = 1e4;

impl RopeConfig {
    /// A model's, and that of its layers with a sliding window if it is another one.
    pub(crate) fn of_family(f: &Fields<'_>, family: Family, max_positions: usize) -> Result<(Self, Option<Self>)> {
        if family != Family::Gemma3 {
            return Ok((Self::from_fields(f, max_positions)?, None));
        }
        // Newer exports have an object for each kind of layer.
        if let Some(kinds) = f.optional_object("rope_parameters")? {
            let kinds = Fields::new(kinds, f.path());
            let of_kind = |kind: &str, theta: f64| match kinds.optional_object(kind)? {
                Some(object) => {
                    Self::from_object(f.path(), &format!("rope_parameters.{kind}"), object, Some(theta), max_positions)
                }
                None => Ok(Self { theta, scaling: RopeScaling::Default }),
            };
            return Ok((of_kind("full_attention", GEMMA_THETA)?, Some(of_kind("sliding_attention", LOCAL_THETA)?)));
        }
        let theta = f.positive("rope_theta")?.unwrap_or(GEMMA_THETA);
        let rope = match f.optional_object("rope_scaling")? {
            Some(object) => Self::from_object(f.path(), "rope_scaling", object, Some(theta), max_positions)?,
            None => Self { theta, scaling: RopeScaling::Default },
        };
        let theta = f.positive("rope_local_base_freq")?.unwrap_or(LOCAL_THETA);
        Ok((rope, Some(Self { theta, scaling: RopeScaling::Default })))
    }

    /// From `rope_theta` and `rope_scaling`, or from `rope_parameters` of newer exports.
    fn from_fields(f: &Fields<'_>, max_positions: usize) -> Result<Self> {
        let path = f.path();
        let parameters = f.optional_object("rope_parameters")?;
        let scaling = match parameters {
            Some(object) => Some(("rope_parameters", object)),
            None => f.optional_object("rope_scaling")?.map(|object| ("rope_scaling", object)),
        };
        let own_theta = f.positive("rope_theta")?;
        let Some((field, object)) = scaling else {
            return Ok(Self { theta: own_theta.unwrap_or(10_000.0), scaling: RopeScaling::Default });
        };
        Self::from_object(path, field, object, own_theta, max_positions)
    }

    /// From the object of that name.
    fn from_object(
        path: &Path,
        field: &str,
        object: &Map<String, Value>,
        own_theta: Option<f64>,
        max_positions: usize,
    ) -> Result<Self> {
        let s = Fields::new(object, path);
        let theta = s.positive("rope_theta")?.or(own_theta).unwrap_or(10_000.0);
        let kind = match s.optional_text("rope_type")? {
            Some(kind) => kind,
            None => s.optional_text("type")?.unwrap_or_else(|| "default".into()),
        };
        let number = |name: &str| {
            let missing = || Error::field(path, &format!("{field}.{name}"), "nothing", "a number above 0");
            s.positive(name)?.ok_or_else(missing)
        };
        let original = s.positive("original_max_position_embeddings")?.unwrap_or(max_positions as f64);
        let scaling = match kind.as_str() {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: number("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original,
            },
            "yarn" => {
                let factor = number("factor")?;
                let scale = |m: f64| {
                    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
                };
                let by_mscale = match (s.positive("mscale")?, s.positive("mscale_all_dim")?) {
                    (Some(m), Some(all)) => scale(m) / scale(all),
                    _ => scale(1.0),
                };
                RopeScaling::Yarn {
                    factor,
                    original,
                    beta_fast: s.positive("beta_fast")?.unwrap_or(32.0),
                    beta_slow: s.positive("beta_slow")?.unwrap_or(1.0),
                    attention_factor: s.positive("attention_factor")?.unwrap_or(by_mscale),
                }
            }
            "liger_divisors" => {
                let list = object.get("divisors").and_then(Value::as_array);
                let divisors = list.and_then(|l| l.iter().map(|x| x.as_f64().map(|x| x as f32)).collect());
                let field = format!("{field}.divisors");
                let wrong = || Error::field(path, &field, "something else", "a list of numbers");
                RopeScaling::Divisors(divisors.ok_or_else(wrong)?)
            }
            other => {
                let field = format!("{field}.rope_type");
                return Err(Error::field(path, &field, format!("`{other}`"), "default, linear, llama3 or yarn"));
            }
        };
        Ok(Self { theta, scaling })
    }

    pub(crate) fn write(&self, object: &mut Map<String, Value>) {
        object.insert("rope_theta".into(), json!(self.theta));
        let scaling = match &self.scaling {
            RopeScaling::Default => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor, "original_max_position_embeddings": original,
            }),
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor } => json!({
                "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
                "beta_fast": beta_fast, "beta_slow": beta_slow, "attention_factor": attention_factor,
            }),
            RopeScaling::Divisors(divisors) => {
                json!({"rope_type": "liger_divisors", "divisors": divisors})
            }
        };
        object.insert("rope_scaling".into(), scaling);
    }

    /// Angles per position `[D/2]`, and the factor on cosines and sines.
    ///
    /// Formulas: `rope_frequencies` in `tests/golden/reference.py`; YaRN as in the paper's appendix.
    pub fn frequencies(&self, head_dim: usize) -> (Vec<f64>, f64) {
        let d = head_dim as f64;
        let plain: Vec<f64> = (0..head_dim / 2).map(|i| self.theta.powf(-2.0 * i as f64 / d)).collect();
        match &self.scaling {
            RopeScaling::Default => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original } => {
                let stretch = |&f: &f64| {
                    let wavelength = 2.0 * PI / f;
                    if wavelength > original / low {
                        f / factor
                    } else if wavelength < original / high {
                        f
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                (plain.iter().map(stretch).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor } => {
                let dimension = |turns: f64| d * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let low = dimension(*beta_fast).floor().max(0.0);
                let high = dimension(*beta_slow).ceil().min(d - 1.0);
                let width = if high == low { 0.001 } else { high - low };
                let stretch = |(i, f): (usize, &f64)| {
                    let ramp = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    f / factor * ramp + f * (1.0 - ramp)
                };
                (plain.iter().enumerate().map(stretch).collect(), *attention_factor)
            }
            RopeScaling::Divisors(divisors) => {
                (plain.iter().zip(divisors).map(|(f, &divisor)| f / f64::from(divisor)).collect(), 1.0)
            }
        }
    }
}
