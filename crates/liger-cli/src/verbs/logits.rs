use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use liger_model::{Checkpoint, files};
use liger_tensor::Sequences;
use safetensors::tensor::TensorView;

use crate::common::{DeviceArgs, Loaded, print};

/// Write the logits of given tokens: for comparing with other programs.
#[derive(clap::Args)]
#[command(
    after_help = "Example: liger logits tests/golden/fixtures/liger-gla --input-ids ids.json --out logits.safetensors --mode decode"
)]
pub struct Args {
    /// Model folder or GGUF file; needs no tokenizer
    model: PathBuf,
    /// JSON file: a list of lists of token ids, all of one length
    #[arg(long)]
    input_ids: PathBuf,
    /// Safetensors file to write: `logits`, float32 [B, T, V]
    #[arg(long)]
    out: PathBuf,
    /// Adapter folder
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// All tokens at once, or one by one through the decoding state
    #[arg(long, value_enum, default_value = "prefill")]
    mode: Mode,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Prefill,
    Decode,
}

pub fn run(args: &Args) -> Result<()> {
    let path = &args.input_ids;
    let text = std::fs::read_to_string(path).with_context(|| format!("{}: cannot read", path.display()))?;
    let ids: Vec<Vec<u32>> = serde_json::from_str(&text)
        .map_err(|e| anyhow::anyhow!("{}: expected a list of lists of token ids: {e}", path.display()))?;
    let length = ids.first().map_or(0, Vec::len);
    if length == 0 || ids.iter().any(|row| row.len() != length) {
        bail!("{}: expected at least one list, all of one length above 0", path.display());
    }
    let checkpoint = Checkpoint::open_without_tokenizer(&args.model)?;
    let loaded = Loaded::load(checkpoint, args.adapter.as_deref(), &args.device)?;
    let (decoder, adapter) = (&loaded.decoder, loaded.adapter.as_ref());
    let vocabulary = decoder.config().vocab_size;
    let mut state = decoder.new_state(ids.len())?;
    let mut logits = vec![0.0f32; ids.len() * length * vocabulary];
    let pieces: Vec<usize> = match args.mode {
        Mode::Prefill => vec![length],
        Mode::Decode => vec![1; length],
    };
    let mut done = 0;
    for piece in pieces {
        let mut sequences = Sequences::default();
        let mut tokens = Vec::new();
        for (slot, row) in ids.iter().enumerate() {
            sequences.push(piece, done, slot);
            tokens.extend_from_slice(&row[done..done + piece]);
        }
        let hidden = decoder.forward(&tokens, &sequences, Some(&mut state), adapter)?;
        let part = decoder.ops().download(&decoder.logits(&hidden)?)?;
        for (slot, rows) in part.chunks(piece * vocabulary).enumerate() {
            let at = (slot * length + done) * vocabulary;
            logits[at..at + rows.len()].copy_from_slice(rows);
        }
        done += piece;
    }
    let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = TensorView::new(safetensors::Dtype::F32, vec![ids.len(), length, vocabulary], &bytes)?;
    files::write_whole(&args.out, &safetensors::serialize([("logits", view)], None)?)?;
    print(&format!("wrote {}: logits [{}, {length}, {vocabulary}]\n", args.out.display(), ids.len()))
}
