//! Arguments and steps that several verbs share.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use liger_model::checkpoint::load_adapter;
use liger_model::{Adapter, Checkpoint, Decoder, Recompute, Sampling};
use liger_tensor::{DType, Ops};

/// Where to run.
#[derive(Args, Clone)]
pub struct DeviceArgs {
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Element type of the weights in memory; q8_0 and q4_1 only on the CPU [default: f32; where nothing is tuned, quantised
    /// files stay as they are on the CPU]
    #[arg(long, value_enum)]
    pub dtype: Option<WeightType>,
    /// Threads of the CPU [default: all cores]
    #[arg(long)]
    pub threads: Option<usize>,
}

/// Element type of weights in memory.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightType {
    F32,
    Bf16,
    /// 8 bits, in blocks of 32.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4 bits, in blocks of 32.
    #[value(name = "q4_1")]
    Q4_1,
}

impl From<WeightType> for DType {
    fn from(weights: WeightType) -> Self {
        match weights {
            WeightType::F32 => Self::F32,
            WeightType::Bf16 => Self::Bf16,
            WeightType::Q8_0 => Self::Q8_0,
            WeightType::Q4_1 => Self::Q4_1,
        }
    }
}

/// Element type of weights on disk.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    F32,
    Bf16,
}

impl From<Precision> for DType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
        }
    }
}

impl DeviceArgs {
    /// The CPU.
    pub fn cpu() -> Self {
        Self { device: "cpu".into(), dtype: None, threads: None }
    }

    /// Element type of the weights where nothing else was asked for.
    pub fn dtype(&self) -> DType {
        self.dtype.map_or(DType::F32, DType::from)
    }

    /// The device.
    pub fn open(&self) -> Result<Arc<dyn Ops>> {
        if let Some(threads) = self.threads {
            if threads == 0 {
                bail!("--threads: found 0, expected at least 1");
            }
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("--threads")?;
        }
        let cpu = || -> Arc<dyn Ops> {
            Arc::new(if self.dtype() == DType::Bf16 { liger_cpu::Cpu::with_bfloat16() } else { liger_cpu::Cpu::new() })
        };
        let device = self.device.as_str();
        let number = match device.strip_prefix("cuda:") {
            Some(number) => number.parse().ok(),
            None => matches!(device, "auto" | "cuda").then_some(0),
        };
        match (device, number) {
            ("cpu", _) => Ok(cpu()),
            (_, Some(_)) if self.dtype().is_quantized() && device != "auto" => {
                bail!("--dtype: quantised weights are for the CPU; use bf16 on a GPU, or --device cpu")
            }
            (_, Some(_)) if self.dtype().is_quantized() => Ok(cpu()),
            (_, Some(number)) => match liger_cuda::Cuda::open(number, self.dtype()) {
                Ok(gpu) => Ok(Arc::new(gpu)),
                Err(why) if device == "auto" => {
                    // Without an NVIDIA card nobody waits for one.
                    if liger_cuda::is_card_there() {
                        eprintln!("on the CPU; the NVIDIA GPU cannot be used: {why}");
                    }
                    Ok(cpu())
                }
                Err(why) => bail!("--device {device}: {why}; or use --device cpu"),
            },
            (other, None) => bail!("--device: found `{other}`, expected auto, cpu, cuda or cuda:N"),
        }
    }
}

/// What of a training step's forward is kept.
#[derive(Clone, Copy, ValueEnum)]
pub enum RecomputeArg {
    /// Everything if it fits.
    Auto,
    /// Everything.
    None,
    /// Layer inputs.
    Layer,
}

impl RecomputeArg {
    /// For `tokens` tokens at once.
    pub fn choose(self, decoder: &Decoder, tokens: usize) -> Recompute {
        match self {
            Self::Auto => decoder.choose_recompute(tokens),
            Self::None => Recompute::None,
            Self::Layer => Recompute::Layer,
        }
    }
}

/// A model on a device, with its adapter.
pub struct Loaded {
    pub checkpoint: Checkpoint,
    pub decoder: Decoder,
    pub adapter: Option<Adapter>,
}

impl Loaded {
    pub fn open(model: &Path, adapter: Option<&Path>, device: &DeviceArgs) -> Result<Self> {
        let checkpoint = crate::hub::open(model)?;
        Self::load(checkpoint, adapter, device)
    }

    pub fn load(checkpoint: Checkpoint, adapter: Option<&Path>, device: &DeviceArgs) -> Result<Self> {
        Self::load_on(device.open()?, checkpoint, adapter, device)
    }

    /// The same on a device that is open already.
    pub fn load_on(
        ops: Arc<dyn Ops>,
        checkpoint: Checkpoint,
        adapter: Option<&Path>,
        device: &DeviceArgs,
    ) -> Result<Self> {
        let as_stored = device.dtype.is_none() && checkpoint.is_quantized && ops.takes_blocks();
        let dtype = if as_stored { None } else { Some(device.dtype()) };
        let decoder = checkpoint.load(ops, dtype)?;
        let adapter = match adapter {
            Some(folder) => Some(load_adapter(folder, decoder.config(), decoder.ops())?),
            None => None,
        };
        Ok(Self { checkpoint, decoder, adapter })
    }
}

/// How the next token is chosen.
#[derive(Args, Clone)]
pub struct SamplingArgs {
    /// Divides the logits; 0 always takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Only the K most likely tokens; 0 for all
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Only tokens of at least this share of the most likely one's probability
    #[arg(long, default_value_t = 0.0)]
    pub min_p: f32,
    /// Above 1: tokens that were there before become less likely
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// The same seed gives the same text
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Tokens at most
    #[arg(long, short = 'n', default_value_t = 256)]
    pub max_tokens: usize,
    /// Ends the text, which does not contain it; may be given several times
    #[arg(long)]
    pub stop: Vec<String>,
}

impl SamplingArgs {
    pub fn sampling(&self) -> Result<Sampling> {
        let Self { temperature, top_k, top_p, min_p, repetition_penalty, .. } = *self;
        if !(temperature >= 0.0 && temperature.is_finite()) {
            bail!("--temperature: found {temperature}, expected a number that is not negative");
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            bail!("--top-p: found {top_p}, expected above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&min_p) {
            bail!("--min-p: found {min_p}, expected from 0 to 1");
        }
        if !(repetition_penalty > 0.0 && repetition_penalty.is_finite()) {
            bail!("--repetition-penalty: found {repetition_penalty}, expected a number above 0");
        }
        Ok(Sampling { temperature, top_k, top_p, min_p, repetition_penalty })
    }
}

/// Where to write.
#[derive(Args, Clone)]
pub struct OutArgs {
    /// Folder (or, where the verb says so, file) to write to
    #[arg(long, short)]
    pub out: PathBuf,
    /// Write even if the folder is not empty
    #[arg(long)]
    pub force: bool,
}

impl OutArgs {
    /// Makes the folder; refuses one that holds something.
    pub fn prepare(&self) -> Result<()> {
        prepare_folder(&self.out, self.force)
    }
}

pub fn prepare_folder(folder: &Path, force: bool) -> Result<()> {
    if folder.exists() && !folder.is_dir() {
        bail!("{}: a file; give a folder to write to", folder.display());
    }
    let filled = folder.read_dir().is_ok_and(|mut entries| entries.next().is_some());
    if filled && !force {
        bail!("{}: the folder is not empty; give another one, or --force to write into it", folder.display());
    }
    std::fs::create_dir_all(folder).with_context(|| format!("{}: cannot make the folder", folder.display()))
}

/// Refuses a file that is there already, that would have no folder, or of another ending.
pub fn prepare_file(path: &Path, ending: &str, force: bool) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if path.extension().is_none_or(|found| found != ending) {
        bail!("--out {}: expected a name that ends in .{ending}", path.display());
    }
    if path.is_dir() || !folder.is_dir() {
        bail!("--out {}: expected a file in a folder that is there", path.display());
    }
    if path.exists() && !force {
        bail!("{}: the file is there already; give another one, or --force to replace it", path.display());
    }
    Ok(())
}

/// The user's cache for one kind of thing: `XDG_CACHE_HOME` or `~/.cache`, `liger/NAME`.
pub fn cache_folder(name: &str) -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    cache.unwrap_or_else(std::env::temp_dir).join("liger").join(name)
}

/// Text to standard output; a closed pipe is an error that `main` takes for success.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// A number with K, M or G.
pub fn parse_count(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.trim_end_matches(['k', 'K', 'm', 'M', 'g', 'G']) {
        digits if digits.len() + 1 == text.len() => {
            let factor = match text.as_bytes()[digits.len()].to_ascii_lowercase() {
                b'k' => 1e3,
                b'm' => 1e6,
                _ => 1e9,
            };
            (digits, factor)
        }
        _ => (text, 1.0),
    };
    let number: f64 = digits.parse().map_err(|_| "expected a number such as 4096, 50K or 20M".to_owned())?;
    let count = number * factor;
    if !(1.0..1e15).contains(&count) {
        return Err("expected a number of at least 1".into());
    }
    Ok(count.round() as u64)
}

/// "134.5 M", "7.1 MiB" and the like for people.
pub fn mebibytes(bytes: usize) -> String {
    let mib = bytes as f64 / (1024.0 * 1024.0);
    if mib >= 1024.0 { format!("{:.2} GiB", mib / 1024.0) } else { format!("{mib:.2} MiB") }
}

#[cfg(test)]
mod tests {
    #[test]
    fn counts() {
        let found = ["4096", "50K", "1.5m", "2G"].map(|t| super::parse_count(t).unwrap());
        assert_eq!(found, [4096, 50_000, 1_500_000, 2_000_000_000]);
        for wrong in ["", "K", "x", "-1", "0", "1KK"] {
            assert!(super::parse_count(wrong).is_err(), "{wrong}");
        }
    }
}
