use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::ValueEnum;
use liger_eval::{Axis, Line, Plot, Table, step_cost};
use liger_model::{
    Adapter, Decoder, LigerConfig, LoraConfig, ModelConfig, RandomWeights, Recompute, SHAPES, Structure, Target,
    Weights, files,
};
use liger_tensor::{
    DType, FeatureMap, FeatureSpec, Features, Gate, GateAxis, Gemm, Ops, Recurrence, RecurrenceGradients, Sequences,
};
use liger_train::{Optimizer, Recipe, next_token_gradient};
use serde_json::json;

use crate::common::{DeviceArgs, Loaded, RecomputeArg, mebibytes, print};

/// Measure decoding, prefill, training, or the recurrence alone.
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
    /// Structure of the student; `none` measures softmax attention [default: the model's own, gla where it has none]
    #[arg(long)]
    structure: Option<String>,
    /// Lengths in tokens [default: 512,4096,16384 for decode, 1024,4096,16384 for prefill, 1024 for train,
    /// 1024,4096,16384,65536 for recurrence]
    #[arg(long, value_delimiter = ',')]
    lengths: Vec<usize>,
    /// Texts side by side
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// What of a training step's forward is kept [default: auto, what fits]
    #[arg(long, value_enum, default_value = "auto")]
    recompute: RecomputeArg,
    /// Print where the time goes, kernel by kernel or (on the CPU) operation by operation
    #[arg(long)]
    profile: bool,
    /// Draw the figures to this SVG file
    #[arg(long)]
    svg: Option<PathBuf>,
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
    /// The chunked recurrence alone, of 8,192 tokens or one longer text
    Recurrence,
}

/// The same weights with a structure as in the paper, or with softmax attention.
fn with_structure(base: Decoder, name: &str) -> Result<Decoder> {
    match Structure::from_name(name) {
        Some(structure) => Ok(base.with_attention(Some(LigerConfig { sinks: 4, ..LigerConfig::paper(structure) }))),
        None if name == "none" => Ok(base.with_attention(None)),
        None => {
            bail!("--structure: found `{name}`, expected none or {}", Structure::ALL.map(Structure::name).join(", "))
        }
    }
}

pub fn run(args: &Args) -> Result<()> {
    let ops = args.device.open()?;
    let base = match &args.model {
        Some(path) if args.what == What::Train => crate::hub::open(path)?.load(ops.clone(), args.device.dtype())?,
        Some(path) => Loaded::load_on(ops.clone(), crate::hub::open(path)?, None, &args.device)?.decoder,
        None => {
            if !SHAPES.contains(&args.shape.as_str()) {
                bail!("--shape: found `{}`, expected one of {}", args.shape, SHAPES.join(", "));
            }
            let config = ModelConfig::shape(&args.shape)?;
            let weights = Weights::load(&RandomWeights::new(&config, 0), &config, &*ops, args.device.dtype())?;
            Decoder::new(ops.clone(), config, weights)
        }
    };
    let own = base.config().liger.as_ref().map(|liger| liger.structure.name());
    let structure = args.structure.as_deref().or(own).unwrap_or("gla");
    let keeps_its_form = own.is_some() && args.structure.is_none();
    let decoder = if keeps_its_form { base } else { with_structure(base, structure)? };
    let defaults: &[usize] = match args.what {
        What::Decode => &[512, 4096, 16_384],
        What::Prefill => &[1024, 4096, 16_384],
        What::Train => &[1024],
        What::Recurrence => &[1024, 4096, 16_384, 65_536],
    };
    let lengths = if args.lengths.is_empty() { defaults.to_vec() } else { args.lengths.clone() };
    if lengths.contains(&0) || args.repeat == 0 || args.batch == 0 {
        bail!("--lengths, --batch and --repeat: found 0, expected at least 1");
    }
    let bench = Bench { decoder: &decoder, ops: &*ops, args };
    let (table, rows, bound) = match args.what {
        What::Decode => bench.decode(&lengths)?,
        What::Prefill => bench.prefill(&lengths)?,
        What::Train => bench.train(&lengths)?,
        What::Recurrence => bench.recurrence(&lengths)?,
    };
    if let Some(path) = &args.svg {
        let points =
            rows.iter().filter_map(|r| Some((r.get("tokens")?.as_f64()?, r.get("tokens_per_second")?.as_f64()?)));
        let plot = Plot {
            title: format!("{} {}, batch {}, {}", args.shape, structure, args.batch, ops.describe()),
            x: Axis::logarithmic("tokens"),
            y: Axis::linear("tokens per second"),
            lines: vec![Line { name: structure.to_owned(), points: points.collect() }],
        };
        let svg = plot.to_svg().unwrap_or_default();
        files::write_whole(path, svg.as_bytes())?;
    }
    if args.json {
        let object = json!({"device": ops.describe(), "shape": args.shape, "structure": structure,
            "batch": args.batch, "bound": bound, "rows": rows});
        return print(&format!("{object}\n"));
    }
    print(&format!("{}; {bound}\n{}", ops.describe(), table.to_text()))
}

const GLA_GATE: Gate = Gate::LogSigmoid { divisor: 16.0 };

struct Bench<'a> {
    decoder: &'a Decoder,
    ops: &'a dyn Ops,
    args: &'a Args,
}

/// The table, the rows as JSON, and the bound that the machine was measured to have.
type Measured = (Table, Vec<serde_json::Value>, String);

impl Bench<'_> {
    /// Greedy steps, against the time of reading weights and state once (and writing the state) at the speed of a copy.
    fn decode(&self, lengths: &[usize]) -> Result<Measured> {
        let (batch, bandwidth) = (self.args.batch, self.bandwidth()?);
        let mut table = Table::new(["decode after", "ms/step", "tokens/s", "state", "share of the copy's speed"]);
        let mut rows = Vec::new();
        for &length in lengths {
            let cost = step_cost(self.decoder, length, batch, self.args.repeat.max(3) * 4)?;
            self.profile("in some steps", || {
                step_cost(self.decoder, length, batch, 8)?;
                Ok(())
            })?;
            let bytes = self.weight_bytes_read() + cost.state_bytes;
            let share = bytes as f64 / (cost.milliseconds / 1e3) / bandwidth;
            let rate = batch as f64 * 1e3 / cost.milliseconds;
            table.row([
                format!("{length} tokens"),
                format!("{:.2}", cost.milliseconds),
                format!("{rate:.1}"),
                mebibytes(cost.state_bytes),
                format!("{:.0} %", 100.0 * share),
            ]);
            rows.push(json!({"tokens": length, "milliseconds": cost.milliseconds, "tokens_per_second": rate,
                "state_bytes": cost.state_bytes, "share": share}));
        }
        Ok((table, rows, format!("a copy moves {:.1} GB/s", bandwidth / 1e9)))
    }

    /// All weights but the embedding table, of which a step reads a row, unless it is the output layer too.
    fn weight_bytes_read(&self) -> usize {
        let config = self.decoder.config();
        let table = config.vocab_size * config.hidden_size * self.ops.activations().bytes(1);
        self.decoder.weights().bytes() - if config.tie_word_embeddings { 0 } else { table }
    }

    fn prefill(&self, lengths: &[usize]) -> Result<Measured> {
        let mut table = Table::new(["prefill of", "s", "tokens/s", "ms/token", "share of the products' rate"]);
        let mut rows = Vec::new();
        let vocabulary = self.decoder.config().vocab_size as u32;
        let bound = self.product_rate(lengths[0].min(4096), 0)?;
        for &length in lengths {
            let ids: Vec<u32> = (0..length as u32).map(|i| i * 7919 % vocabulary).collect();
            let mut run = || {
                let mut state = self.decoder.new_state(1)?;
                liger_model::Generator { decoder: self.decoder, adapter: None }.prefill(&mut state, 0, &ids)?;
                Ok(())
            };
            let seconds = self.median(self.args.repeat.min(3), &mut run)?;
            self.profile("in a prefill", &mut run)?;
            let config = self.decoder.config();
            let head = config.vocab_size * config.hidden_size * if config.tie_word_embeddings { 1 } else { 2 };
            let rate = 2.0 * (config.parameter_count() - head) as f64 * length as f64 / seconds;
            table.row([
                format!("{length} tokens"),
                format!("{seconds:.3}"),
                format!("{:.0}", length as f64 / seconds),
                format!("{:.4}", seconds * 1e3 / length as f64),
                format!("{:.0} %", 100.0 * rate / bound),
            ]);
            rows.push(json!({"tokens": length, "seconds": seconds, "tokens_per_second": length as f64 / seconds}));
        }
        Ok((table, rows, format!("the model's matrix products alone run at {:.2} TFLOP/s", bound / 1e12)))
    }

    /// A whole LoRA step (rank 8 on q, k, v; next-token loss on all tokens; clipping; AdamW) of `batch` texts, against
    /// the rate of the bare matrix products of the same sizes.
    fn train(&self, lengths: &[usize]) -> Result<Measured> {
        let (ops, config, batch) = (self.ops, self.decoder.config(), self.args.batch);
        let targets = vec![Target::Q, Target::K, Target::V];
        let lora = LoraConfig { rank: 8, alpha: 8.0, dropout: 0.0, targets };
        let recipe = Recipe::load("paper")?.train;
        let mut adapter = Adapter::new(lora, config, ops, 0)?;
        let mut gradients = adapter.zeros_like(config, ops)?;
        let mut optimizer = Optimizer::new(&adapter, config, ops)?;
        self.decoder.keep_packed();
        let columns = ["LoRA step of", "s", "tokens/s", "TFLOP/s", "share of the products'", "memory"];
        let (mut table, mut rows) = (Table::new(columns), Vec::new());
        let bound = self.product_rate(lengths[0] * batch, 1)?;
        for &length in lengths {
            let tokens = length * batch;
            let ids: Vec<u32> = (0..tokens as u32).map(|i| i * 7919 % config.vocab_size as u32).collect();
            let labels: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
            let recompute = self.args.recompute.choose(self.decoder, tokens);
            ops.trim();
            let mut step = 0;
            let mut run = || {
                step += 1;
                gradients.matrices_mut().try_for_each(|matrix| ops.clear(matrix))?;
                let sequences = Sequences::fresh(vec![length; batch]);
                let pass = self.decoder.train_forward(&ids, sequences, &adapter, 0, recompute)?;
                let dhidden = next_token_gradient(self.decoder, &pass.hidden, labels.clone())?;
                self.decoder.train_backward(pass, &dhidden, &adapter, &mut gradients)?;
                let norm = Optimizer::norm(&gradients, ops)?;
                Ok(optimizer.step(&mut adapter, &gradients, ops, (step, 1e-3, norm), &recipe)?)
            };
            let seconds = self.median(self.args.repeat, &mut run)?;
            self.profile("in a step", &mut run)?;
            // Forward and input gradients are 4 FLOP a parameter and token, 6 where the forward runs again.
            let flop = if recompute == Recompute::Layer { 6.0 } else { 4.0 };
            let rate = flop * config.parameter_count() as f64 * tokens as f64 / seconds;
            let peak = ops.peak_bytes();
            table.row([
                format!("{batch} x {length}"),
                format!("{seconds:.4}"),
                format!("{:.0}", tokens as f64 / seconds),
                format!("{:.3} ({flop} x P)", rate / 1e12),
                format!("{:.0} %", 100.0 * rate / bound),
                peak.map_or("not counted".into(), mebibytes),
            ]);
            rows.push(json!({"tokens": length, "seconds": seconds, "tokens_per_second": tokens as f64 / seconds,
                "flops": rate, "share": rate / bound, "peak_bytes": peak, "recompute": format!("{recompute:?}")}));
        }
        Ok((table, rows, format!("the model's matrix products alone run at {:.2} TFLOP/s", bound / 1e12)))
    }

    /// One layer's recurrence of gla, forward and backward, without projections and feature maps.
    fn recurrence(&self, lengths: &[usize]) -> Result<Measured> {
        let (ops, config) = (self.ops, self.decoder.config());
        let (heads, kv, d) = (config.num_heads, config.num_kv_heads, config.head_dim);
        let mut table = Table::new(["texts", "forward ms", "forward and backward ms"]);
        let mut rows = Vec::new();
        for &length in lengths {
            let batch = (8192 / length).max(1);
            let n = batch * length;
            let random = |h: usize, seed: u64| ops.random(&[n, h, d], 1.0, seed, ops.activations());
            let (mut q, mut k, v) = (random(heads, 1)?, random(kv, 2)?, random(kv, 3)?);
            let spec = FeatureSpec { query: FeatureMap::Softmax, key: FeatureMap::Softmax, gate: GLA_GATE };
            let (mut query, mut key) = (ops.empty(q.shape())?, ops.empty(k.shape())?);
            let mut log_gate = ops.empty_f32(k.shape())?;
            let (mut rope_q, mut rope_k) = (ops.empty(q.shape())?, ops.empty(k.shape())?);
            let [cos, sin] = [1.0, 0.0].map(|x| ops.upload(vec![x; n * d / 2], &[n, d / 2], DType::F32));
            let (rope_q, rope_k) = (&mut rope_q, &mut rope_k);
            let (query_out, key_out, gate_out) = (&mut query, &mut key, &mut log_gate);
            let features = Features { rope_q, rope_k, query: query_out, key: key_out, log_gate: gate_out };
            ops.features_forward(features, &q, &k, (&cos?, &sin?), spec)?;
            let (mut out, mut dv, mut dgate) =
                (ops.empty(q.shape())?, ops.empty(v.shape())?, ops.empty_f32(k.shape())?);
            let sequences = Sequences::fresh(vec![length; batch]);
            let inputs = || Recurrence {
                q: &query,
                k: &key,
                v: &v,
                log_gate: &log_gate,
                axis: GateAxis::Key,
                sequences: &sequences,
            };
            let dout = random(heads, 4)?;
            let mut kept = ops.recurrence_states(inputs())?;
            let forward = self.median(20, || Ok(ops.gated_recurrence_forward(&mut out, inputs(), None, None)?))?;
            let mut both = || {
                ops.gated_recurrence_forward(&mut out, inputs(), None, kept.as_mut())?;
                let (q, k, v, log_gate) = (&mut q, &mut k, &mut dv, &mut dgate);
                let gradients = RecurrenceGradients { q, k, v, log_gate, state: None };
                Ok(ops.gated_recurrence_backward(gradients, inputs(), None, kept.as_ref(), &dout)?)
            };
            let total = self.median(20, &mut both)?;
            self.profile("in both passes", &mut both)?;
            table.row([format!("{batch} x {length}"), format!("{:.3}", forward * 1e3), format!("{:.3}", total * 1e3)]);
            rows.push(json!({"tokens": length, "batch": batch, "forward_ms": forward * 1e3, "both_ms": total * 1e3,
                "tokens_per_second": n as f64 / total}));
        }
        Ok((table, rows, format!("{heads} query and {kv} key/value heads of {d}")))
    }

    /// Bytes a second that copying a large tensor reads and writes.
    fn bandwidth(&self) -> Result<f64> {
        let n = if self.ops.memory().is_some() { 1 << 30 } else { 1 << 26 };
        let (mut y, x) = (self.ops.empty(&[n])?, self.ops.random(&[n], 1.0, 0, self.ops.activations())?);
        let seconds = self.median(5, || Ok(self.ops.axpby(&mut y, 1.0, &x, 0.0)?))?;
        Ok(2.0 * x.bytes() as f64 / seconds)
    }

    /// FLOP/s of the model's own matrix products on `tokens` rows, with `backward` input gradients for each forward,
    /// weighted as a pass has them.
    fn product_rate(&self, tokens: usize, backward: usize) -> Result<f64> {
        let (ops, config) = (self.ops, self.decoder.config());
        let (d, ff) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let (mut work, mut time) = (0.0, 0.0);
        for (out, input, count) in [(q, d, 1), (kv, d, 2), (d, q, 1), (ff, d, 2), (d, ff, 1)] {
            // No numbers are rounded to what only files have: their nearest types.
            let weights = match self.decoder.weights().dtype() {
                DType::Q4K => DType::Q4_1,
                DType::Q6K => DType::Q8_0,
                other => other,
            };
            let tensor = |rows: usize| ops.random(&[tokens, rows], 1.0, 1, ops.activations());
            let (x, w, y) = (tensor(input)?, ops.random(&[out, input], 1.0, 1, weights)?, tensor(out)?);
            let (mut forward, mut gradient) = (ops.empty(&[tokens, out])?, ops.empty(&[tokens, input])?);
            // As in training.
            if backward > 0 {
                ops.keep_packed(&w);
            }
            let mut seconds = self.median(self.args.repeat, || Ok(ops.gemm(&mut forward, &x, &w, Gemm::LINEAR)?))?;
            if backward > 0 {
                seconds +=
                    self.median(self.args.repeat, || Ok(ops.gemm(&mut gradient, &y, &w, Gemm::INPUT_GRADIENT)?))?;
            }
            work += f64::from(count) * (1 + backward) as f64 * 2.0 * (tokens * out * input) as f64;
            time += f64::from(count) * seconds;
        }
        ops.trim();
        Ok(work / time)
    }

    fn median(&self, repeat: usize, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
        f()?; // takes its memory
        self.ops.synchronize()?;
        let mut times = Vec::with_capacity(repeat);
        for _ in 0..repeat {
            let start = Instant::now();
            f()?;
            self.ops.synchronize()?;
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    /// Runs `f` once more and prints what ran, if `--profile` asks for it.
    fn profile(&self, what: &str, mut f: impl FnMut() -> Result<()>) -> Result<()> {
        if !self.args.profile {
            return Ok(());
        }
        let any = self.ops.as_any();
        let (spent, end) = if let Some(gpu) = any.downcast_ref::<liger_cuda::Cuda>() {
            gpu.start_profile();
            let before = gpu.blocks_taken();
            f()?;
            let taken = gpu.blocks_taken() - before;
            (gpu.finish_profile()?, format!("blocks of memory taken from the driver: {taken}\n"))
        } else if let Some(cpu) = any.downcast_ref::<liger_cpu::Cpu>() {
            cpu.start_profile();
            let start = Instant::now();
            f()?;
            (cpu.finish_profile(), format!("{:.3} ms in all\n", start.elapsed().as_secs_f64() * 1e3))
        } else {
            return Ok(());
        };
        let mut table = Table::new([what, "runs", "ms"]);
        for (name, runs, time) in spent.into_iter().take(40) {
            table.row([name, runs.to_string(), format!("{time:.3}")]);
        }
        print(&format!("{}{end}\n", table.to_text()))
    }
}
