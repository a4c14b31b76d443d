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
    /// gla, hgrn2, gsa, retnet, mamba2, rwkv6 or mean
    #[arg(long, default_value = "gla")]
    structure: String,
    /// Keys that the softmax window sees
    #[arg(long, default_value_t = 64)]
    window: usize,
    /// First tokens that stay visible
    #[arg(long, default_value_t = 0)]
    sinks: usize,
    /// Weight of the recurrent branch
    #[arg(long, default_value_t = 0.5)]
    alpha: f32,
    /// Weight of the window branch
    #[arg(long, default_value_t = 0.5)]
    beta: f32,
    /// Memory slots of gsa [default: the head size]
    #[arg(long)]
    slots: Option<usize>,
    /// Layers that keep softmax attention
    #[arg(long, value_delimiter = ',')]
    softmax_layers: Vec<usize>,
}

impl FormArgs {
    fn config(&self, layers: usize) -> Result<LigerConfig> {
        let Self { window, sinks, alpha, beta, slots, ref softmax_layers, .. } = *self;
        let Some(structure) = Structure::from_name(&self.structure) else {
            let known = Structure::ALL.map(Structure::name).join(", ");
            bail!("--structure: found `{}`, expected one of {known}", self.structure);
        };
        if window == 0 {
            bail!("--window: found 0, expected at least 1");
        }
        if slots.is_some() && structure != Structure::Gsa || slots == Some(0) {
            bail!("--slots: only gsa has slots, at least one");
        }
        if let Some(layer) = softmax_layers.iter().find(|&&layer| layer >= layers) {
            bail!("--softmax-layers: found {layer}, expected layers below {layers}");
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
    let device = DeviceArgs { device: "cpu".into(), dtype: Precision::F32, threads: None };
    let decoder = checkpoint.load(device.open()?, DType::F32)?.with_attention(Some(form));
    let dtype = args.dtype.map_or(checkpoint.stored_dtype, DType::from);
    save_model(&args.out.out, &decoder, None, &checkpoint, dtype, SaveFormat::Liger)?;
    print(&format!("wrote {}\n", args.out.out.display()))
}
