use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::ValueEnum;
use liger_eval::{Table, step_cost};
use liger_model::{
    Adapter, Decoder, Generator, LigerConfig, LoraConfig, ModelConfig, RandomWeights, SHAPES, Structure, Target,
    Weights,
};
use liger_tensor::{DType, Gemm, Ops, Sequences};
use serde_json::json;

use crate::common::{DeviceArgs, mebibytes, print};

/// Measure decoding, prefill or training.
#[derive(clap::Args)]
#[command(after_help = "Example: liger bench decode --shape smollm2-135m --lengths 512,4096,16384")]
pub struct Args {
    /// What to measure
    #[arg(value_enum)]
    what: What,
    /// Model folder or GGUF file
    #[arg(long, conflicts_with = "shape")]
    model: Option<PathBuf>,
    /// Random weights of a known shape: tiny, smollm2-135m, llama-3.2-1b, llama-3-8b
    #[arg(long, default_value = "smollm2-135m")]
    shape: String,
    /// Structure of the student; `none` measures softmax attention
    #[arg(long, default_value = "gla")]
    structure: String,
    /// Lengths in tokens [default: 512,4096,16384 for decode, 1024,4096,16384 for prefill, 1024 for train]
    #[arg(long, value_delimiter = ',')]
    lengths: Vec<usize>,
    /// Repetitions of each measurement; the median counts
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    Decode,
    Prefill,
    Train,
}

pub fn run(args: &Args) -> Result<()> {
    let ops = args.device.open()?;
    let base = match &args.model {
        Some(path) => crate::hub::open(path)?.load(ops.clone(), args.device.dtype.into())?,
        None => {
            if !SHAPES.contains(&args.shape.as_str()) {
                bail!("--shape: found `{}`, expected one of {}", args.shape, SHAPES.join(", "));
            }
            let config = ModelConfig::shape(&args.shape)?;
            let weights = Weights::load(&RandomWeights::new(&config, 0), &config, &*ops, args.device.dtype.into())?;
            Decoder::new(ops.clone(), config, weights)
        }
    };
    let decoder = match Structure::from_name(&args.structure) {
        Some(structure) => base.with_attention(Some(LigerConfig { sinks: 4, ..LigerConfig::paper(structure) })),
        None if args.structure == "none" => base.with_attention(None),
        None => bail!(
            "--structure: found `{}`, expected none or {}",
            args.structure,
            Structure::ALL.map(Structure::name).join(", ")
        ),
    };
    let defaults: &[usize] = match args.what {
        What::Decode => &[512, 4096, 16_384],
        What::Prefill => &[1024, 4096, 16_384],
        What::Train => &[1024],
    };
    let lengths = if args.lengths.is_empty() { defaults.to_vec() } else { args.lengths.clone() };
    if lengths.contains(&0) || args.repeat == 0 {
        bail!("--lengths and --repeat: found 0, expected at least 1");
    }
    let (table, rows) = match args.what {
        What::Decode => decode(&decoder, &lengths, args.repeat)?,
        What::Prefill => prefill(&decoder, &lengths, args.repeat)?,
        What::Train => train(&decoder, &ops, &lengths, args.repeat)?,
    };
    if args.json {
        return print(&format!("{}\n", json!({"device": ops.describe(), "rows": rows})));
    }
    print(&format!("{}\n{}", ops.describe(), table.to_text()))
}

type Measured = (Table, Vec<serde_json::Value>);

fn decode(decoder: &Decoder, lengths: &[usize], repeat: usize) -> Result<Measured> {
    let mut table = Table::new(["decode after", "ms/token", "tokens/s", "state"]);
    let mut rows = Vec::new();
    for &length in lengths {
        let cost = step_cost(decoder, None, length, repeat.max(3) * 4)?;
        let rate = 1e3 / cost.milliseconds;
        table.row([
            format!("{length} tokens"),
            format!("{:.1}", cost.milliseconds),
            format!("{rate:.1}"),
            mebibytes(cost.state_bytes),
        ]);
        rows.push(json!(cost));
    }
    Ok((table, rows))
}

fn prefill(decoder: &Decoder, lengths: &[usize], repeat: usize) -> Result<Measured> {
    let mut table = Table::new(["prefill of", "s", "tokens/s", "ms/token"]);
    let mut rows = Vec::new();
    let vocabulary = decoder.config().vocab_size as u32;
    for &length in lengths {
        let ids: Vec<u32> = (0..length as u32).map(|i| i * 7919 % vocabulary).collect();
        let seconds = median(repeat.min(3), || {
            let mut state = decoder.new_state(1)?;
            Generator { decoder, adapter: None }.prefill(&mut state, 0, &ids)?;
            Ok(())
        })?;
        let per_token = seconds * 1e3 / length as f64;
        table.row([
            format!("{length} tokens"),
            format!("{seconds:.2}"),
            format!("{:.0}", length as f64 / seconds),
            format!("{per_token:.3}"),
        ]);
        rows.push(json!({"tokens": length, "seconds": seconds}));
    }
    Ok((table, rows))
}

/// A training step against the rate of the bare matrix products of the same sizes, measured first.
fn train(decoder: &Decoder, ops: &Arc<dyn Ops>, lengths: &[usize], repeat: usize) -> Result<Measured> {
    let lora = LoraConfig { rank: 8, alpha: 8.0, dropout: 0.0, targets: Target::ALL.to_vec() };
    let config = decoder.config();
    let adapter = Adapter::new(lora, config, &**ops, 0)?;
    let mut table =
        Table::new(["LoRA step of", "s", "tokens/s", "GFLOP/s at 6 x P", "matrix products alone", "share of it"]);
    let mut rows = Vec::new();
    for &length in lengths {
        let ids: Vec<u32> = (0..length as u32).map(|i| i * 7919 % config.vocab_size as u32).collect();
        let labels: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let mut gradients = adapter.zeros_like(config, &**ops)?;
        let seconds = median(repeat, || {
            let pass = decoder.train_forward(&ids, Sequences::fresh([length]), &adapter, 0)?;
            let mut dhidden = ops.zeros(pass.hidden.shape())?;
            for first in (0..length).step_by(256) {
                let count = 256.min(length - first);
                let mut rows = ops.empty(&[count, config.hidden_size])?;
                ops.copy_rows(&mut rows, &pass.hidden, first)?;
                let mut logits = decoder.logits(&rows)?;
                ops.cross_entropy(&mut logits, &labels[first..first + count], Some(1.0 / length as f32))?;
                let mut part = ops.zeros(&[count, config.hidden_size])?;
                decoder.logits_backward(&mut part, &logits)?;
                ops.write_rows(&mut dhidden, &part, first)?;
            }
            decoder.train_backward(pass, &dhidden, &adapter, &mut gradients)?;
            Ok(())
        })?;
        // Layer inputs are kept and the rest computed again: 2 forward, 2 recomputed, 2 backward. The output layer is
        // not computed again, which this count does not take off.
        let rate = 6.0 * config.parameter_count() as f64 * length as f64 / seconds / 1e9;
        let alone = product_rate(config, &**ops, length, repeat)?;
        table.row([
            format!("{length} tokens"),
            format!("{seconds:.2}"),
            format!("{:.0}", length as f64 / seconds),
            format!("{rate:.1}"),
            format!("{alone:.1} GFLOP/s"),
            format!("{:.0} %", 100.0 * rate / alone),
        ]);
        rows.push(json!({"tokens": length, "seconds": seconds, "gflops": rate, "products_gflops": alone}));
    }
    Ok((table, rows))
}

/// GFLOP/s of the model's own matrix products, forward and input gradient, weighted as a step has them.
fn product_rate(config: &ModelConfig, ops: &dyn Ops, tokens: usize, repeat: usize) -> Result<f64> {
    let (d, ff) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let (mut work, mut time) = (0.0, 0.0);
    for (out, input, count) in [(q, d, 1), (kv, d, 2), (d, q, 1), (ff, d, 2), (d, ff, 1)] {
        let tensor = |rows: usize, columns: usize| ops.upload(vec![0.5; rows * columns], &[rows, columns], DType::F32);
        let (x, w, y) = (tensor(tokens, input)?, tensor(out, input)?, tensor(tokens, out)?);
        let (mut forward, mut backward) = (ops.empty(&[tokens, out])?, ops.empty(&[tokens, input])?);
        let forward = median(repeat, || Ok(ops.gemm(&mut forward, &x, &w, Gemm::LINEAR)?))?;
        let backward = median(repeat, || Ok(ops.gemm(&mut backward, &y, &w, Gemm::INPUT_GRADIENT)?))?;
        let flop = 2.0 * (tokens * out * input) as f64;
        // Two forward products (one computed again) and one backward a step.
        work += f64::from(count) * 3.0 * flop;
        time += f64::from(count) * (2.0 * forward + backward);
    }
    Ok(work / time / 1e9)
}

fn median(repeat: usize, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    f()?; // takes its memory
    let mut times = Vec::with_capacity(repeat);
    for _ in 0..repeat {
        let start = Instant::now();
        f()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
