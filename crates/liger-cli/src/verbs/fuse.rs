use std::path::PathBuf;

use anyhow::Result;
use liger_model::checkpoint::{SaveFormat, save_model};
use liger_tensor::DType;

use crate::common::{DeviceArgs, Loaded, OutArgs, Precision, print};

/// Merge an adapter into the weights of its model.
#[derive(clap::Args)]
#[command(after_help = "Example: liger fuse llama-liger --adapter run/adapter --out llama-tuned")]
pub struct Args {
    /// Model folder or GGUF file
    model: PathBuf,
    /// Adapter folder as PEFT writes it
    #[arg(long)]
    adapter: PathBuf,
    /// Element type on disk [default: the model's own; bf16 for quantised files]
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    #[command(flatten)]
    out: OutArgs,
}

pub fn run(args: &Args) -> Result<()> {
    let device = DeviceArgs::cpu();
    let Loaded { checkpoint, decoder, adapter } = Loaded::open(&args.model, Some(&args.adapter), &device)?;
    args.out.prepare()?;
    let dtype = args.dtype.map_or(checkpoint.stored_dtype, DType::from);
    save_model(&args.out.out, &decoder, adapter.as_ref(), &checkpoint, dtype, SaveFormat::Liger)?;
    print(&format!("wrote {}\n", args.out.out.display()))
}
