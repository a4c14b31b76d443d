use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use liger_eval::{
    Answer, Bucket, Cache, EvaluationRun, Item, LongText, ModelScores, PositionScores, Probe, RecallScores, Subject,
    Surroundings, Table, Task, TaskScores, branch_scores, evaluate, greedy_agreement, hash_files, position_table,
    recall, recall_table, recovery_table, scores_by_position, shown, step_cost,
};
use liger_model::{Checkpoint, Decoder, LigerConfig, ModelConfig, Structure, files};
use liger_train::data::Documents;
use serde_json::json;

use crate::common::{DeviceArgs, Loaded, cache_folder, parse_count, print};
use crate::progress::Progress;

/// Score models: benchmarks by lm-evaluation-harness's definitions, long texts by position, recall.
#[derive(clap::Args)]
#[command(
    after_help = "Example: liger eval smollm2-liger --teacher SmolLM2-135M-Instruct --tasks arc_easy,passkey --out run.json\n\n\
    liger report run.json makes a page of it."
)]
pub struct Args {
    /// Model folder or GGUF file, base or Liger
    model: PathBuf,
    /// Model to compare with: it is scored first
    #[arg(long)]
    teacher: Option<PathBuf>,
    /// Names, comma-separated: piqa, arc_easy, arc_challenge, hellaswag, winogrande, mmlu, mmlu_cloze, openbookqa, boolq,
    /// lambada_openai, wikitext; passkey, needle, mqar; task files of your own (.toml); `all` for those that come with
    /// the program
    #[arg(long, value_delimiter = ',')]
    tasks: Vec<String>,
    /// Text to score by position, as `linearize --data`
    #[arg(long)]
    text: Option<PathBuf>,
    /// Tokens of a piece of that text
    #[arg(long, default_value = "2048", value_parser = parse_count)]
    piece: u64,
    /// Pieces of that text
    #[arg(long, default_value_t = 4)]
    pieces: usize,
    /// The model with other attention: as-is; base (softmax); window, sinks (a window of 64 alone, with 4 sinks); gla, hgrn2,
    /// gsa, retnet, mamba2, rwkv6 (the paper's form); mean; kept; no-recurrence, no-window, no-sinks
    #[arg(long, value_delimiter = ',', default_value = "as-is")]
    variants: Vec<String>,
    /// Tokens of the texts of passkey, needle and mqar
    #[arg(long, value_delimiter = ',', value_parser = parse_count, default_value = "256,1024,4096")]
    lengths: Vec<u64>,
    /// Folder of the records, NAME.jsonl or NAME.jsonl.zst [default: fetched to the user's cache]
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Only the first items of each task
    #[arg(long)]
    limit: Option<usize>,
    /// Write the results to this file, for `liger report`
    #[arg(long, short)]
    out: Option<PathBuf>,
    /// Write every item to this file, one JSON object a line: task, model, item, gold, log-likelihood of each choice
    #[arg(long)]
    log_samples: Option<PathBuf>,
    /// Adapter folder
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Seed of passkey, needle and mqar
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Neither take answers from the cache nor keep them
    #[arg(long)]
    no_cache: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Questions of a probe at each length and depth, without `--limit`.
const QUESTIONS: usize = 10;
/// Lengths after which a step is timed.
const CONTEXTS: [usize; 3] = [512, 4096, 16_384];

/// What was asked for, read and checked.
struct Work {
    benchmarks: Vec<(Task, Vec<Item>)>,
    probes: Vec<Probe>,
}

impl Work {
    fn read(args: &Args) -> Result<Self> {
        let (mut benchmarks, mut probes) = (Vec::new(), Vec::new());
        let all: Vec<String> = Task::names().map(str::to_owned).collect();
        let names = args.tasks.iter().flat_map(|name| if name == "all" { all.clone() } else { vec![name.clone()] });
        for name in names {
            if let Some(probe) = Probe::from_name(&name) {
                probes.push(probe);
                continue;
            }
            let task = Task::open(&name)?;
            let folder = match &args.data_dir {
                Some(folder) => folder.clone(),
                None => crate::fetch::benchmarks(task.data())?,
            };
            let items = task.items(&folder, args.limit.unwrap_or(usize::MAX))?;
            if items.is_empty() {
                bail!("{}: no records for {}", folder.display(), task.name);
            }
            benchmarks.push((task, items));
        }
        Ok(Self { benchmarks, probes })
    }
}

/// A model to score and where it came from.
struct Candidate<'a> {
    name: String,
    path: &'a Path,
    hash: String,
    loaded: &'a Loaded,
    decoder: Decoder,
}

impl<'a> Candidate<'a> {
    fn subject(&'a self) -> Subject<'a> {
        Subject { name: self.name.clone(), decoder: &self.decoder, adapter: self.loaded.adapter.as_ref() }
    }

    fn around(&'a self) -> Surroundings<'a> {
        let config = self.decoder.config();
        let first = config.bos_token_id.or(config.eos_token_ids.first().copied()).unwrap_or(0);
        Surroundings { tokenizer: &self.loaded.checkpoint.tokenizer, first, last: &config.eos_token_ids }
    }
}

pub fn run(args: &Args) -> Result<()> {
    if args.limit == Some(0) {
        bail!("--limit: found 0, expected at least 1");
    }
    if args.tasks.is_empty() && args.text.is_none() {
        bail!("nothing to score: give --tasks, --text or both");
    }
    // All mistakes come up before the models are loaded.
    for (option, path) in [("--out", &args.out), ("--log-samples", &args.log_samples)] {
        let folder =
            path.as_deref().map(|path| path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")));
        if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
            bail!("{option}: no folder {}; make it first", folder.display());
        }
    }
    let work = Work::read(args)?;
    let checkpoint = crate::hub::open(&args.model)?;
    let variants = args
        .variants
        .iter()
        .map(|name| Ok((name.as_str(), variant(name, &checkpoint.config)?)))
        .collect::<Result<Vec<_>>>()?;
    let text = args.text.as_deref().map(|path| Text::read(args, path, &checkpoint)).transpose()?;
    let ops = args.device.open()?;
    let loaded = Loaded::load_on(ops.clone(), checkpoint, args.adapter.as_deref(), &args.device)?;
    let teacher = match &args.teacher {
        Some(path) => {
            let checkpoint = crate::hub::open(path)?;
            if checkpoint.tokenizer.vocab_size() != loaded.checkpoint.tokenizer.vocab_size() {
                bail!("--teacher {}: another vocabulary than {}", path.display(), args.model.display());
            }
            Some(Loaded::load_on(ops, checkpoint, None, &args.device)?)
        }
        None => None,
    };
    let mut candidates = Vec::new();
    if let (Some(loaded), Some(path)) = (&teacher, &args.teacher) {
        let (hash, decoder) = (hash_files(&loaded.checkpoint.path)?, loaded.decoder.clone());
        candidates.push(Candidate { name: "teacher".into(), path, hash, loaded, decoder });
    }
    let mut hash = hash_files(&loaded.checkpoint.path)?;
    if let Some(adapter) = &args.adapter {
        hash = format!("{hash}+{}", hash_files(adapter)?);
    }
    let stem = args.model.file_name().unwrap_or(args.model.as_os_str()).to_string_lossy();
    for (name, liger) in variants {
        let name = if name == "as-is" { stem.clone().into_owned() } else { name.to_owned() };
        let decoder = loaded.decoder.with_attention(liger);
        candidates.push(Candidate { name, path: &args.model, hash: hash.clone(), loaded: &loaded, decoder });
    }
    candidates.iter().for_each(|candidate| candidate.decoder.keep_packed());
    let run = score(args, &work, text.as_ref(), &candidates)?;
    if let Some(path) = &args.log_samples {
        log_samples(path, &work, &run)?;
    }
    if let Some(path) = &args.out {
        run.write(path)?;
        eprintln!("results are in {p}; liger report {p} makes a page of them", p = path.display());
    }
    if args.json {
        return print(&format!("{}\n", serde_json::to_string(&run)?));
    }
    print(&tables(&run))
}

/// The attention that a variant's name stands for; `None` is softmax.
fn variant(name: &str, config: &ModelConfig) -> Result<Option<LigerConfig>> {
    let own = config.liger.as_ref();
    let paper = |structure| LigerConfig { softmax_layers: config.bounded_layers(), ..LigerConfig::paper(structure) };
    let plain = paper(Structure::Gla);
    let base = own.unwrap_or(&plain);
    let window = |sinks| Some(LigerConfig { sinks, alpha: 0.0, beta: 1.0, ..base.clone() });
    let of_liger = |change: &dyn Fn(LigerConfig) -> LigerConfig| match own {
        Some(own) => Ok(Some(change(own.clone()))),
        None => bail!("--variants: `{name}` is for Liger models; this one has softmax attention"),
    };
    match name {
        "as-is" => Ok(own.cloned()),
        "base" => Ok(None),
        "window" => Ok(window(0)),
        "sinks" => Ok(window(own.map_or(4, |own| own.sinks.max(4)))),
        "no-recurrence" => of_liger(&|own| LigerConfig { alpha: 0.0, ..own }),
        "no-window" if base.structure == Structure::Kept => {
            bail!("--variants: kept has one softmax over window and memory: there is no `no-window`")
        }
        "no-window" => of_liger(&|own| LigerConfig { beta: 0.0, ..own }),
        "no-sinks" => of_liger(&|own| LigerConfig { sinks: 0, ..own }),
        _ => match Structure::from_name(name) {
            Some(structure) => Ok(Some(paper(structure))),
            None => bail!(
                "--variants: found `{name}`, expected as-is, base, window, sinks, a structure, no-recurrence, no-window or \
                 no-sinks"
            ),
        },
    }
}

/// The pieces of a long text.
struct Text {
    pieces: Vec<Vec<u32>>,
    length: usize,
    description: String,
}

impl Text {
    fn read(args: &Args, path: &Path, checkpoint: &Checkpoint) -> Result<Self> {
        let length = args.piece as usize;
        if length < 2 {
            bail!("--piece: found {length}, expected at least 2 tokens");
        }
        let documents =
            Documents::read(path, &checkpoint.tokenizer, None, &liger_train::Recipe::load("default")?.data)?;
        let all: Vec<u32> = documents.list.into_iter().flat_map(|document| document.ids).collect();
        let begin: Vec<u32> = checkpoint.tokenizer.begin().into_iter().collect();
        let rest = all.strip_prefix(&begin[..]).unwrap_or(&all);
        let cut = rest.chunks_exact(length - begin.len()).take(args.pieces);
        let pieces: Vec<Vec<u32>> = cut.map(|piece| [&begin[..], piece].concat()).collect();
        if pieces.is_empty() {
            bail!("{}: {} tokens, fewer than a piece of {length}; give --piece", path.display(), all.len());
        }
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        let description = format!("{} pieces of {length} tokens of {name}", pieces.len());
        Ok(Self { pieces, length, description })
    }
}

fn score(args: &Args, work: &Work, text: Option<&Text>, candidates: &[Candidate<'_>]) -> Result<EvaluationRun> {
    let ops = candidates[0].decoder.ops();
    let mut models = Vec::new();
    for candidate in candidates {
        let (tasks, recall) = score_tasks(args, work, candidate)?;
        let liger = candidate.decoder.config().liger.as_ref().map(LigerConfig::to_json);
        models.push(ModelScores {
            name: candidate.name.clone(),
            path: candidate.path.display().to_string(),
            hash: candidate.hash.clone(),
            liger,
            tokens_tuned: tokens_tuned(args.adapter.as_deref().and_then(Path::parent).unwrap_or(candidate.path)),
            tasks,
            recall,
            branches: Vec::new(),
            costs: Vec::new(),
        });
    }
    let mut long_text = None;
    if let Some(text) = text {
        long_text = Some(score_text(text, candidates)?);
        for (candidate, model) in candidates.iter().zip(&mut models) {
            // A page or more; the gates and norms of more text would be the same.
            let page = &text.pieces[0][..text.length.min(2048)];
            model.branches = branch_scores(&candidate.subject(), page)?;
            for context in CONTEXTS {
                model.costs.push(step_cost(&candidate.decoder, context, 1, 8)?);
            }
        }
    }
    let weights = candidates.last().map_or("no", |candidate| candidate.decoder.weights().dtype().name());
    Ok(EvaluationRun {
        liger_eval: 1,
        command: std::env::args().collect::<Vec<_>>().join(" "),
        machine: format!("{}, {} weights, liger {}", ops.describe(), weights, env!("CARGO_PKG_VERSION")),
        limit: args.limit,
        models,
        long_text,
    })
}

fn score_tasks(args: &Args, work: &Work, candidate: &Candidate<'_>) -> Result<(Vec<TaskScores>, Vec<RecallScores>)> {
    let (subject, around) = (candidate.subject(), candidate.around());
    let liger = subject.decoder.config().liger.as_ref().map(LigerConfig::to_json);
    let identity = format!(
        "{} {liger:?} {} {}",
        candidate.hash,
        subject.decoder.ops().describe(),
        subject.decoder.weights().dtype().name()
    );
    let mut cache = if args.no_cache { None } else { Some(Cache::open(&cache_folder("eval"), &identity)?) };
    let (mut tasks, mut probes) = (Vec::new(), Vec::new());
    for (task, items) in &work.benchmarks {
        let requests: usize = items.iter().map(Item::requests).sum();
        let mut progress = Progress::new("eval", "requests", requests as u64);
        let words = format!("{}, {}", subject.name, task.name);
        let tell = &mut |done: usize| progress.update(done as u64, &words);
        let scores = evaluate(&subject, &around, task, items, cache.as_mut(), tell)?;
        progress.finish(&format!("{words}, {} items, {requests} requests", items.len()));
        tell_cut(&words, scores.cut);
        tasks.push(scores);
    }
    let lengths: Vec<usize> = args.lengths.iter().map(|&n| n as usize).collect();
    let per_cell = args.limit.map_or(QUESTIONS, |limit| limit.div_ceil(liger_eval::DEPTHS.len()).min(QUESTIONS));
    for &probe in &work.probes {
        let total = lengths.len() * liger_eval::DEPTHS.len() * per_cell;
        let mut progress = Progress::new("eval", "questions", total as u64);
        let words = format!("{}, {}", subject.name, probe.name());
        let tell = &mut |done: usize| progress.update(done as u64, &words);
        let scores = recall(&subject, around.tokenizer, probe, &lengths, (per_cell, args.seed), cache.as_mut(), tell)?;
        progress.finish(&format!("{words}, {total} questions"));
        tell_cut(&words, scores.cut);
        probes.push(scores);
    }
    Ok((tasks, probes))
}

fn tell_cut(words: &str, cut: usize) {
    if cut > 0 {
        eprintln!("{words}: {cut} contexts did not fit and lost their beginning");
    }
}

fn score_text(text: &Text, candidates: &[Candidate<'_>]) -> Result<LongText> {
    let subjects: Vec<Subject<'_>> = candidates.iter().map(Candidate::subject).collect();
    let (first, others) = (&subjects[0], &subjects[1..]);
    let total = text.pieces.len() * text.length;
    let mut progress = Progress::new("eval", "tokens", total as u64);
    let buckets = Bucket::up_to(text.length);
    let tell = &mut |done: usize| progress.update(done as u64, "by position");
    let scores = scores_by_position(first, others, &text.pieces, &buckets, tell)?;
    progress.finish(&format!("{} models by position on {total} tokens", subjects.len()));
    let mut greedy = Vec::new();
    if !others.is_empty() {
        for prompt in [64, 512, 2048].into_iter().filter(|&n| n <= text.length) {
            greedy.extend(greedy_agreement(first, others, &text.pieces[..text.pieces.len().min(8)], prompt)?);
        }
    }
    Ok(LongText { description: text.description.clone(), buckets, scores, greedy })
}

/// Tokens of the tuning that a folder is the outcome of.
fn tokens_tuned(folder: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).ok()?;
    let last: serde_json::Value = serde_json::from_str(text.lines().last()?).ok()?;
    last.get("tokens")?.as_u64()
}

fn log_samples(path: &Path, work: &Work, run: &EvaluationRun) -> Result<()> {
    let mut lines = String::new();
    for model in &run.models {
        for ((_, items), result) in work.benchmarks.iter().zip(&model.tasks) {
            for (i, (item, answer)) in items.iter().zip(&result.answers).enumerate() {
                let mut object = json!({"task": result.task, "model": model.name, "item": i});
                let fields = match item {
                    Item::Choices { pairs, lengths, gold } => {
                        json!({"gold": gold, "lengths": lengths, "prompts": pairs})
                    }
                    Item::Text { words, bytes, .. } => json!({"words": words, "bytes": bytes}),
                    Item::Answer { context, answer } => json!({"gold": answer, "prompts": [context]}),
                };
                let answer = match answer {
                    Answer::Likelihoods(own) => json!({
                        "log_likelihoods": own.iter().map(|x| x.log).collect::<Vec<_>>(),
                        "greedy": own.iter().map(|x| x.greedy).collect::<Vec<_>>(),
                    }),
                    Answer::Text(text) => json!({"answer": text}),
                };
                for more in [answer, fields] {
                    if let (Some(object), serde_json::Value::Object(more)) = (object.as_object_mut(), more) {
                        object.extend(more);
                    }
                }
                lines.push_str(&format!("{object}\n"));
            }
        }
    }
    Ok(files::write_whole(path, lines.as_bytes())?)
}

/// Everything for a terminal.
fn tables(run: &EvaluationRun) -> String {
    let models: Vec<&ModelScores> = run.models.iter().collect();
    let mut parts = Vec::new();
    if let [only] = models[..] {
        if !only.tasks.is_empty() {
            parts.push(task_table(only).to_text());
        }
    } else if models.iter().any(|m| !m.tasks.is_empty()) {
        parts.push(recovery_table(&models, run.has_teacher()).to_text());
    }
    if models.iter().any(|m| !m.recall.is_empty()) {
        parts.push(format!("Recall by length, percent right\n{}", recall_table(&models).to_text()));
    }
    if let Some(long) = &run.long_text {
        let table = |value: fn(&PositionScores) -> &[Option<f64>], scores: &[PositionScores]| {
            position_table(&long.buckets, scores, value).to_text()
        };
        parts.push(format!("Perplexity by position, {}\n{}", long.description, table(|s| &s.perplexity, &long.scores)));
        if long.scores.len() > 1 {
            let first = &long.scores[0].name;
            parts.push(format!("KL to {first}, nats\n{}", table(|s| &s.kl, &long.scores[1..])));
            parts.push(format!("Same most likely token as {first}\n{}", table(|s| &s.agreement, &long.scores[1..])));
        }
    }
    parts.join("\n")
}

/// Every metric of one model.
fn task_table(model: &ModelScores) -> Table {
    let mut table = Table::new(["task", "items", "metric", "value"]);
    for result in &model.tasks {
        for score in &result.scores {
            table.row([result.task.clone(), result.items.to_string(), score.metric.clone(), shown(score)]);
        }
    }
    table
}
