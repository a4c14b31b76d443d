use std::path::PathBuf;

use anyhow::{Result, bail};
use liger_eval::{Subject, Table, Task, TaskScores, evaluate};
use liger_model::files;
use serde_json::json;

use crate::common::{DeviceArgs, Loaded, print};
use crate::progress::Progress;

/// Score benchmarks by lm-evaluation-harness's definitions.
#[derive(clap::Args)]
#[command(after_help = "Example: liger eval smollm2-liger --tasks arc_easy,piqa --data-dir benchmarks --limit 300")]
pub struct Args {
    /// Model folder or GGUF file, base or Liger
    model: PathBuf,
    /// piqa, arc_easy, arc_challenge, hellaswag, winogrande, openbookqa, boolq, lambada_openai, or task files of your own
    /// (.toml)
    #[arg(long, value_delimiter = ',', required = true)]
    tasks: Vec<String>,
    /// Folder of the records: NAME.jsonl or NAME.jsonl.zst
    #[arg(long)]
    data_dir: PathBuf,
    /// Only the first items of each task
    #[arg(long)]
    limit: Option<usize>,
    /// Write every item to this file, one JSON object a line: task, item, gold, log-likelihood of each choice
    #[arg(long)]
    log_samples: Option<PathBuf>,
    /// Adapter folder
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: &Args) -> Result<()> {
    if args.limit == Some(0) {
        bail!("--limit: found 0, expected at least 1");
    }
    // All mistakes come up before the model is loaded.
    let mut work = Vec::new();
    for name in &args.tasks {
        let task = Task::open(name)?;
        let items = task.items(&args.data_dir, args.limit.unwrap_or(usize::MAX))?;
        if items.is_empty() {
            bail!("{}: no records for {}", args.data_dir.display(), task.name);
        }
        work.push((task, items));
    }
    let loaded = Loaded::open(&args.model, args.adapter.as_deref(), &args.device)?;
    let config = loaded.decoder.config();
    let first = config.bos_token_id.or(config.eos_token_ids.first().copied()).unwrap_or(0);
    let name = args.model.display().to_string();
    let subject = Subject { name: name.clone(), decoder: &loaded.decoder, adapter: loaded.adapter.as_ref() };
    let mut results = Vec::new();
    for (task, items) in &work {
        let requests: usize = items.iter().map(|item| item.pairs.len()).sum();
        let mut progress = Progress::new("eval", "requests", requests as u64);
        let tell = &mut |done: usize| progress.update(done as u64, &task.name);
        let scores = evaluate(&subject, &loaded.checkpoint.tokenizer, first, task, items, tell)?;
        progress.finish(&format!("{}, {} items, {requests} requests", task.name, items.len()));
        if scores.cut > 0 {
            eprintln!("{}: {} contexts did not fit and lost their beginning", task.name, scores.cut);
        }
        results.push(scores);
    }
    if let Some(path) = &args.log_samples {
        let mut lines = String::new();
        for ((_, items), result) in work.iter().zip(&results) {
            for (i, (item, own)) in items.iter().zip(&result.likelihoods).enumerate() {
                let logs: Vec<f64> = own.iter().map(|x| x.log).collect();
                let greedy: Vec<bool> = own.iter().map(|x| x.greedy).collect();
                let object = json!({"task": result.task, "item": i, "gold": item.gold, "log_likelihoods": logs,
                    "greedy": greedy, "prompts": item.pairs});
                lines.push_str(&format!("{object}\n"));
            }
        }
        files::write_whole(path, lines.as_bytes())?;
    }
    if args.json {
        let object = json!({"model": name, "device": loaded.decoder.ops().describe(), "limit": args.limit,
            "tasks": results});
        return print(&format!("{object}\n"));
    }
    print(&table(&results).to_text())
}

/// Accuracies in percent.
fn table(results: &[TaskScores]) -> Table {
    let mut table = Table::new(["task", "items", "metric", "value", "standard error"]);
    for result in results {
        for score in &result.scores {
            let scale = if score.metric == "perplexity" { 1.0 } else { 100.0 };
            table.row([
                result.task.clone(),
                result.items.to_string(),
                score.metric.to_owned(),
                format!("{:.2}", scale * score.value),
                score.standard_error.map_or(String::new(), |e| format!("{:.2}", scale * e)),
            ]);
        }
    }
    table
}
