use std::io::Read;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use liger_model::{GenerateOptions, Generator, Message, StopStrings, TextStream};
use serde_json::json;

use crate::common::{DeviceArgs, Loaded, SamplingArgs, print};

/// Write text after a prompt.
#[derive(clap::Args)]
#[command(after_help = "Example: liger generate smollm2-liger --prompt 'What is gravity?' --temperature 0.7")]
pub struct Args {
    /// Model folder or GGUF file
    model: PathBuf,
    /// The prompt; - reads it from standard input
    #[arg(long, short)]
    prompt: String,
    /// Adapter folder
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Take the prompt as it is, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// Go on from a state that --save-state wrote
    #[arg(long)]
    load_state: Option<PathBuf>,
    /// Write the state after the text to this file
    #[arg(long)]
    save_state: Option<PathBuf>,
    /// Print one JSON object instead of the text as it comes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: &Args) -> Result<()> {
    let sampling = args.sampling.sampling()?;
    let mut prompt = args.prompt.clone();
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt).context("standard input")?;
    }
    let Loaded { checkpoint, decoder, adapter } = Loaded::open(&args.model, args.adapter.as_deref(), &args.device)?;
    let tokenizer = &checkpoint.tokenizer;
    let ids = match &tokenizer.chat {
        Some(chat) if !args.raw => tokenizer.encode(&chat.render(&[Message::new("user", &prompt)], true)?, false)?,
        _ => tokenizer.encode(&prompt, args.load_state.is_none())?,
    };
    if ids.is_empty() {
        bail!("--prompt: it is empty");
    }
    let mut state = decoder.new_state(1)?;
    let fingerprint = checkpoint.fingerprint()?;
    if let Some(path) = &args.load_state {
        state.load(path, &fingerprint, decoder.ops())?;
    }
    let options = GenerateOptions {
        max_tokens: args.sampling.max_tokens,
        sampling,
        seed: args.sampling.seed,
        stop_ids: checkpoint.config.eos_token_ids.clone(),
    };
    let generator = Generator { decoder: &decoder, adapter: adapter.as_ref() };
    let mut stream = TextStream::new(tokenizer, &ids);
    let mut stop = StopStrings::new(&args.sampling.stop);
    let mut text = String::new();
    let mut printed: Result<()> = Ok(());
    let (start, mut first) = (Instant::now(), None);
    let produced = generator.generate(&mut state, &ids, &options, &mut |id| {
        first.get_or_insert_with(|| start.elapsed());
        let (piece, stopped) = stop.push(&stream.push(id)?);
        text.push_str(&piece);
        if !args.json {
            printed = print(&piece);
        }
        Ok(!stopped && printed.is_ok())
    })?;
    printed?;
    let rest = stop.finish();
    text.push_str(&rest);
    if let Some(path) = &args.save_state {
        state.save(path, &fingerprint, "", decoder.ops())?;
    }
    let (total, first) = (start.elapsed().as_secs_f64(), first.unwrap_or_default().as_secs_f64());
    if args.json {
        let rate = (produced.len().saturating_sub(1)) as f64 / (total - first).max(1e-9);
        let result = json!({
            "text": text, "tokens": produced, "prompt_tokens": ids.len(), "state_bytes": state.bytes(),
            "seconds_to_first_token": first, "tokens_per_second": rate,
        });
        return print(&format!("{result}\n"));
    }
    print(&format!("{rest}\n"))
}
