use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use liger_model::checkpoint::{SaveFormat, save_model};
use liger_tensor::DType;

use crate::common::{DeviceArgs, Loaded, OutArgs, Precision, print};

/// Write a model in another program's form.
#[derive(clap::Args)]
#[command(after_help = "Example: liger export llama-liger --format authors --out llama-authors")]
pub struct Args {
    /// Model folder or GGUF file
    model: PathBuf,
    /// authors: the paper's code (`model_type` liger_gla and the like); liger: this program's folder
    #[arg(long, value_enum)]
    format: Format,
    /// Element type on disk [default: the model's own; bf16 for quantised files]
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    #[command(flatten)]
    out: OutArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Authors,
    Liger,
}

pub fn run(args: &Args) -> Result<()> {
    let device = DeviceArgs::cpu();
    let Loaded { checkpoint, decoder, .. } = Loaded::open(&args.model, None, &device)?;
    let format = match args.format {
        Format::Authors => SaveFormat::Authors,
        Format::Liger => SaveFormat::Liger,
    };
    if format == SaveFormat::Authors {
        decoder.config().authors_model_type()?;
    }
    args.out.prepare()?;
    let dtype = args.dtype.map_or(checkpoint.stored_dtype, DType::from);
    save_model(&args.out.out, &decoder, None, &checkpoint, dtype, format)?;
    print(&format!("wrote {}\n", args.out.out.display()))
}
