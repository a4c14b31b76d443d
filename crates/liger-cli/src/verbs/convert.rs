use std::path::PathBuf;

use anyhow::{Result, bail};
use liger_model::checkpoint::{SaveFormat, save_gguf, save_model};
use liger_model::{GateSource, LigerConfig, ModelConfig, Structure};
use liger_tensor::DType;

use crate::common::{DeviceArgs, OutArgs, Precision, prepare_file, print};

/// Write the Liger form of a model without tuning it, or a Liger model with quantised weights
#[derive(clap::Args)]
#[command(
    after_help = "Example: liger convert Llama-3.2-1B --structure gla --sinks 4 --out llama-liger\n\nWith --quantize q8_0 --out FILE.gguf one file is written; a tuned model keeps its form."
)]
pub struct Args {
    /// Model folder or GGUF file
    model: PathBuf,
    #[command(flatten)]
    form: FormArgs,
    /// Element type on disk [default: the model's own; bf16 for quantised files]
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// Write one GGUF file, FILE.gguf, with weights of 8 or 4 bits
    #[arg(long, value_enum, conflicts_with = "dtype")]
    quantize: Option<Quantization>,
    #[command(flatten)]
    out: OutArgs,
}

/// Element type of a quantised file.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Quantization {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_1")]
    Q4_1,
}

impl From<Quantization> for DType {
    fn from(quantization: Quantization) -> Self {
        match quantization {
            Quantization::Q8_0 => Self::Q8_0,
            Quantization::Q4_1 => Self::Q4_1,
        }
    }
}

/// The form that the attention takes.
#[derive(clap::Args)]
pub struct FormArgs {
    /// gla, hgrn2, gsa, retnet, mamba2, rwkv6, mean or kept [default: gla]
    #[arg(long)]
    structure: Option<String>,
    /// Keys that the softmax window sees
    #[arg(long, default_value_t = 64)]
    window: usize,
    /// First tokens that stay visible [default: 0; mean and kept: 4]
    #[arg(long)]
    sinks: Option<usize>,
    /// Weight of the recurrent branch [default: 0.5; mean: 0.1; kept: 1]
    #[arg(long)]
    alpha: Option<f32>,
    /// Weight of the window branch [default: 0.5; mean and kept: 1]
    #[arg(long)]
    beta: Option<f32>,
    /// Memory slots of gsa [default: the head size] and of kept [default: as many as twice the bytes of the paper's form hold]
    #[arg(long)]
    slots: Option<usize>,
    /// Layers that keep softmax attention, or none [default: where a model has both, those whose own window bounds it]
    #[arg(long, value_name = "LAYERS")]
    softmax_layers: Option<String>,
}

impl FormArgs {
    fn config(&self, model: &ModelConfig) -> Result<LigerConfig> {
        let Self { window, slots, ref softmax_layers, .. } = *self;
        let layers = model.num_layers;
        let softmax_layers = match softmax_layers.as_deref() {
            None => model.bounded_layers(),
            Some("none") => Vec::new(),
            Some(list) => match list.split(',').map(str::parse).collect() {
                Ok(layers) => layers,
                Err(_) => bail!("--softmax-layers: found `{list}`, expected layers with commas between, or none"),
            },
        };
        let name = self.structure.as_deref().unwrap_or("gla");
        let Some(structure) = Structure::from_name(name) else {
            let known = Structure::ALL.map(Structure::name).join(", ");
            bail!("--structure: found `{name}`, expected one of {known}");
        };
        if window == 0 {
            bail!("--window: found 0, expected at least 1");
        }
        if slots.is_some() && !matches!(structure, Structure::Gsa | Structure::Kept) || slots == Some(0) {
            bail!("--slots: only gsa and kept have slots, at least one");
        }
        if let Some(layer) = softmax_layers.iter().find(|&&layer| layer >= layers) {
            bail!("--softmax-layers: found {layer}, expected layers below {layers}");
        }
        let own = LigerConfig::paper(structure);
        let (sinks, alpha) = (self.sinks.unwrap_or(own.sinks), self.alpha.unwrap_or(own.alpha));
        let beta = self.beta.unwrap_or(own.beta);
        if structure == Structure::Kept && (alpha, beta) != (own.alpha, own.beta) {
            bail!(
                "--alpha, --beta: found {alpha} and {beta}, expected 1 and 1: kept has one softmax over window and memory"
            );
        }
        let gate = GateSource::Key;
        Ok(LigerConfig { structure, gate, window, sinks, alpha, beta, slots, softmax_layers })
    }
}

pub fn run(args: &Args) -> Result<()> {
    let checkpoint = crate::hub::open(&args.model)?;
    let form = match &checkpoint.config.liger {
        None => args.form.config(&checkpoint.config)?,
        Some(own) if args.quantize.is_some() && args.form.structure.is_none() => own.clone(),
        Some(own) => {
            let name = own.structure.name();
            bail!("{}: already a Liger model, {name}; --quantize alone keeps its form", args.model.display());
        }
    };
    let out = &args.out.out;
    match args.quantize {
        Some(_) => prepare_file(out, "gguf", args.out.force)?,
        None => args.out.prepare()?,
    }
    let decoder = checkpoint.load(DeviceArgs::cpu().open()?, DType::F32)?.with_attention(Some(form));
    match args.quantize {
        Some(quantization) => save_gguf(out, &decoder, &checkpoint, quantization.into())?,
        None => {
            let dtype = args.dtype.map_or(checkpoint.stored_dtype, DType::from);
            save_model(out, &decoder, None, &checkpoint, dtype, SaveFormat::Liger)?;
        }
    }
    print(&format!("wrote {}\n", out.display()))
}
