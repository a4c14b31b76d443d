use std::path::PathBuf;

use anyhow::Result;
use liger_eval::Table;
use liger_model::LigerConfig;
use serde_json::json;

use crate::common::{mebibytes, print};

/// Show what a model is: parameters, bytes of its state, what fits in memory.
#[derive(clap::Args)]
#[command(after_help = "Example: liger info smollm2-liger --memory 16")]
pub struct Args {
    /// Model folder or GGUF file
    model: PathBuf,
    /// GiB of memory to fill with conversations
    #[arg(long, default_value_t = 16.0)]
    memory: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let checkpoint = crate::hub::open(&args.model)?;
    let config = &checkpoint.config;
    let parameters = config.parameter_count();
    let lengths = [512, 4096, 16_384, 131_072];
    let memory = args.memory * 1024.0 * 1024.0 * 1024.0;
    let fits = |tokens: usize| {
        let left = memory - (parameters * 4) as f64;
        (left.max(0.0) / (liger_model::state_elements(config, tokens) * 4) as f64).floor() as u64
    };
    if args.json {
        let states: Vec<_> = lengths
            .iter()
            .map(|&n| json!({"tokens": n, "bytes": liger_model::state_elements(config, n) * 4, "texts_that_fit": fits(n)}))
            .collect();
        let info = json!({
            "family": config.family.name(), "parameters": parameters, "layers": config.num_layers,
            "heads": config.num_heads, "kv_heads": config.num_kv_heads, "head_dim": config.head_dim,
            "hidden_size": config.hidden_size, "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
            "liger": config.liger.as_ref().map(LigerConfig::to_json), "state": states,
        });
        return print(&format!("{info}\n"));
    }
    let form = match &config.liger {
        None => "softmax attention (not converted)".to_owned(),
        Some(l) => format!(
            "Liger {}: window {}, {} sinks, {}{}",
            l.structure.name(),
            l.window,
            l.sinks,
            match l.kept(config) {
                0 => format!("{} x recurrent + {} x window", l.alpha, l.beta),
                kept => format!("{kept} keys that stay"),
            },
            if l.softmax_layers.is_empty() { String::new() } else { format!(", softmax in {:?}", l.softmax_layers) }
        ),
    };
    let mut table = Table::new(["after", "state of a text", &format!("texts in {} GiB", args.memory)]);
    for tokens in lengths {
        let bytes = liger_model::state_elements(config, tokens) * 4;
        table.row([format!("{tokens} tokens"), mebibytes(bytes), fits(tokens).to_string()]);
    }
    print(&format!(
        "{}, {:.1} M parameters, {} layers of width {}, {} query and {} key/value heads of {}\n{form}\n\n{}\nWeights \
         and state counted in float32.\n",
        config.family.name(),
        parameters as f64 / 1e6,
        config.num_layers,
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        table.to_text()
    ))
}
