use std::path::PathBuf;

use anyhow::{Result, bail};
use liger_model::checkpoint::{SaveFormat, save_model};
use liger_model::{LigerConfig, Structure};
use liger_tensor::DType;

use crate::common::{DeviceArgs, OutArgs, Precision, print};

/// Write the Liger form of a model without tuning it.
#[derive(clap::Args)]
#[command(after_help = "Example: liger convert Llama-3.2-1B --structure gla --sinks 4 --out llama-liger")]
pub struct Args {
    /// Model folder or GGUF file
    model: PathBuf,
    #[command(flatten)]
    form: FormArgs,
    /// Element type on disk [default: the model's own; bf16 for quantised files]
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    #[command(flatten)]
    out: OutArgs,
}

/// The form that the attention takes.
#[derive(clap::Args)]
pub struct FormArgs {
    /// gla, hgrn2, gsa, retnet, mamba2, rwkv6, mean or kept
    #[arg(long, default_value = "gla")]
    structure: String,
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
    /// Memory slots of gsa [default: the head size] and of kept [default: 114]
    #[arg(long)]
    slots: Option<usize>,
    /// Layers that keep softmax attention
    #[arg(long, value_delimiter = ',')]
    softmax_layers: Vec<usize>,
}

impl FormArgs {
    fn config(&self, layers: usize) -> Result<LigerConfig> {
        let Self { window, slots, ref softmax_layers, .. } = *self;
        let Some(structure) = Structure::from_name(&self.structure) else {
            let known = Structure::ALL.map(Structure::name).join(", ");
            bail!("--structure: found `{}`, expected one of {known}", self.structure);
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
        Ok(LigerConfig { structure, window, sinks, alpha, beta, slots, softmax_layers: softmax_layers.clone() })
    }
}

pub fn run(args: &Args) -> Result<()> {
    let checkpoint = crate::hub::open(&args.model)?;
    if checkpoint.config.liger.is_some() {
        bail!("{}: already a Liger model", args.model.display());
    }
    let form = args.form.config(checkpoint.config.num_layers)?;
    args.out.prepare()?;
    let device = DeviceArgs::cpu();
    let decoder = checkpoint.load(device.open()?, DType::F32)?.with_attention(Some(form));
    let dtype = args.dtype.map_or(checkpoint.stored_dtype, DType::from);
    save_model(&args.out.out, &decoder, None, &checkpoint, dtype, SaveFormat::Liger)?;
    print(&format!("wrote {}\n", args.out.out.display()))
}
