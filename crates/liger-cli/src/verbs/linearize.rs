use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use liger_eval::{Answers, Bucket, ConversionReport, Subject, scores_by_position, step_cost};
use liger_model::checkpoint::{SaveFormat, load_adapter, save_model};
use liger_model::{
    Adapter, Checkpoint, Decoder, GenerateOptions, Generator, LigerConfig, Message, Recompute, Sampling, files,
};
use liger_train::data::{Document, Documents, OwnText, write_conversations};
use liger_train::{Event, Finished, Recipe, StepRecord, Trainer, logit_bytes};

use crate::common::{DeviceArgs, RecomputeArg, mebibytes, parse_count, prepare_folder, print};
use crate::interrupt::{self, Interrupted};
use crate::progress::Progress;

/// Convert a model, tune it, measure it, and write a report.
#[derive(clap::Args)]
#[command(
    after_help = "Example: liger linearize Llama-3.2-1B --data alpaca.jsonl --recipe paper --out llama-liger\n\n\
    With --data self the model writes the tuning text itself. --resume goes on where a run was cut off."
)]
pub struct Args {
    /// Model folder or GGUF file
    model: PathBuf,
    /// Tuning text: .jsonl (Alpaca, chat, ShareGPT, {"text"}), .txt, .parquet, also .zst and .gz; or `self`
    #[arg(long, default_value = "self")]
    data: String,
    /// A recipe by name (default, paper, quickstart) or a TOML file
    #[arg(long, default_value = "default")]
    recipe: String,
    /// gla, hgrn2, gsa, retnet, mamba2, rwkv6, mean or kept, with its own sinks and weights [default: the recipe's]
    #[arg(long)]
    structure: Option<String>,
    /// Tokens to tune on, such as 50K or 20M [default: the recipe's]
    #[arg(long, value_parser = parse_count)]
    tokens: Option<u64>,
    /// Seed of adapter, data order and dropout [default: the recipe's]
    #[arg(long)]
    seed: Option<u64>,
    /// Tokens that the model writes with `--data self`; they are gone through again if the run is longer
    #[arg(long, value_parser = parse_count, default_value = "1M")]
    self_tokens: u64,
    /// Conversations that it writes side by side
    #[arg(long, default_value_t = 24)]
    self_batch: usize,
    /// Text to measure on, as --data [default: text that the model writes, or the validation documents]
    #[arg(long)]
    eval_data: Option<PathBuf>,
    /// Pieces of 2,048 tokens to measure on; text that the model writes itself is at most twice as long as a training row
    #[arg(long, default_value_t = 4)]
    eval_pieces: usize,
    /// Question put to teacher and student
    #[arg(long, default_value = "What is gravity? Explain it to a child.")]
    question: String,
    /// Folder of the run [default: MODEL-liger]
    #[arg(long, short)]
    out: Option<PathBuf>,
    /// Go on from the newest checkpoint in the folder
    #[arg(long)]
    resume: bool,
    /// Write into a folder that is not empty, from the beginning
    #[arg(long)]
    force: bool,
    /// What of a step's forward is kept: `none` computes nothing again, `layer` keeps memory small [default: auto, what
    /// fits]
    #[arg(long, value_enum, default_value = "auto")]
    recompute: RecomputeArg,
    /// Print the scores as one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Length of the pieces that are measured on.
const PIECE: usize = 2048;
/// Lengths after which a step is timed.
const CONTEXTS: [usize; 3] = [512, 4096, 16_384];

impl Args {
    fn recipe(&self) -> Result<Recipe> {
        let mut recipe = Recipe::load(&self.recipe)?;
        if let Some(structure) = &self.structure {
            recipe.set_structure(structure);
        }
        recipe.train.tokens = self.tokens.unwrap_or(recipe.train.tokens);
        recipe.train.seed = self.seed.unwrap_or(recipe.train.seed);
        recipe.check()?;
        Ok(recipe)
    }

    fn out(&self) -> PathBuf {
        let stem = self.model.file_stem().unwrap_or_default().to_string_lossy();
        self.out.clone().unwrap_or_else(|| format!("{stem}-liger").into())
    }
}

pub fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let recipe = args.recipe()?;
    let checkpoint = crate::hub::open(&args.model)?;
    if checkpoint.config.liger.is_some() {
        bail!("{}: already a Liger model; linearize its base model", args.model.display());
    }
    if let Some(layer) = recipe.liger.softmax_layers.iter().flatten().find(|&&l| l >= checkpoint.config.num_layers) {
        bail!("recipe: `liger.softmax_layers`: found {layer}, the model has {} layers", checkpoint.config.num_layers);
    }
    // Everything that may be the user's mistake comes before the first file is written.
    let ops = args.device.open()?;
    let given = Given::read(args, &recipe, &checkpoint)?;
    let out = args.out();
    prepare_folder(&out, args.force || args.resume)?;
    if args.force && !args.resume && out.join("checkpoints").exists() {
        std::fs::remove_dir_all(out.join("checkpoints")).with_context(|| out.display().to_string())?;
    }
    let stop = interrupt::flag()?;
    let teacher = checkpoint.load(ops, args.device.dtype())?;
    let student = teacher.with_attention(Some(recipe.liger_config(&checkpoint.config)));
    eprintln!(
        "{}: {:.1} M parameters on {}",
        args.model.display(),
        checkpoint.config.parameter_count() as f64 / 1e6,
        teacher.ops().describe()
    );
    files::write_whole(&out.join("recipe.toml"), recipe.to_toml().as_bytes())?;

    let stopped = || stop.load(std::sync::atomic::Ordering::Relaxed);
    let texts = Texts::prepare(args, &recipe, &checkpoint, &teacher, given, &out, &stopped)?;
    teacher.ops().trim();
    let (adapter, records) = tune(args, &recipe, &student, &texts, &out, &stop)?;
    teacher.ops().trim();

    let scores = measure(args, &teacher, &student, &adapter, &recipe, &texts)?;
    let answers = ask_both(args, &checkpoint, &teacher, &student, &adapter)?;
    // The student as it is saved: with the adapter merged into the weights.
    let costs = |decoder: &Decoder| -> Result<Vec<_>> {
        Ok(CONTEXTS.iter().map(|&context| step_cost(decoder, context, 1, 8)).collect::<Result<_, _>>()?)
    };
    let costs = [costs(&teacher)?, costs(&student)?];
    save_model(&out, &student, Some(&adapter), &checkpoint, checkpoint.stored_dtype, SaveFormat::Liger)?;
    let report = ConversionReport {
        model: format!("{} as Liger {}", file_name(&args.model), recipe.liger.structure),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        machine: format!("{}, liger {}", teacher.ops().describe(), env!("CARGO_PKG_VERSION")),
        texts: texts.description.clone(),
        tuning: format!(
            "{} tokens, {} trained values ({:.2} % of the model), {:.0} s in all.",
            records.last().map_or(0, |r| r.tokens),
            adapter.parameter_count(),
            100.0 * adapter.parameter_count() as f64 / checkpoint.config.parameter_count() as f64,
            start.elapsed().as_secs_f64()
        ),
        buckets: texts.buckets(),
        scores,
        costs,
        answers,
        losses: records.iter().map(|r| (r.step, r.loss)).collect(),
        validation: records.iter().filter_map(|r| Some((r.step, r.validation_loss?))).collect(),
        recipe: recipe.to_toml(),
    };
    report.write(&out)?;
    if args.json {
        return print(&format!("{}\n", serde_json::to_string(&report)?));
    }
    print(&format!(
        "\nPerplexity by position\n{}\nKL to the teacher by position, nats\n{}\nA token's time and memory\n{}\n\
         {question}\n\nTeacher: {teacher}\n\nStudent: {student}\n\nModel, adapter and report.html are in {out}; try\n  \
         liger generate {out} --prompt 'Hello'\n",
        report.perplexity_table().to_text(),
        report.kl_table().to_text(),
        report.cost_table().to_text(),
        question = report.answers.prompt,
        teacher = report.answers.teacher,
        student = report.answers.student,
        out = out.display(),
    ))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// What is tuned on, validated on and measured on.
struct Texts {
    training: Vec<Document>,
    validation: Vec<Document>,
    pieces: Vec<Vec<u32>>,
    description: String,
}

/// The documents of the files that the user named.
struct Given {
    training: Option<Documents>,
    measured: Option<Documents>,
}

impl Given {
    fn read(args: &Args, recipe: &Recipe, checkpoint: &Checkpoint) -> Result<Self> {
        let eos = checkpoint.config.eos_token_ids.first().copied();
        let read = |path: &Path| -> Result<Documents> {
            let documents = Documents::read(path, &checkpoint.tokenizer, eos, &recipe.data)?;
            if let Some(summary) = documents.skipped_summary() {
                eprintln!("{}: {summary}", path.display());
            }
            Ok(documents)
        };
        let training = if args.data == "self" { None } else { Some(read(Path::new(&args.data))?) };
        let measured = args.eval_data.as_deref().map(read).transpose()?;
        Ok(Self { training, measured })
    }
}

impl Texts {
    fn prepare(
        args: &Args,
        recipe: &Recipe,
        checkpoint: &Checkpoint,
        teacher: &Decoder,
        given: Given,
        out: &Path,
        stopped: &dyn Fn() -> bool,
    ) -> Result<Self> {
        let own = given.training.is_none();
        let (mut pieces, mut description) = (Vec::new(), String::new());
        let (training, validation) = if let Some(documents) = given.training {
            documents.split(recipe.data.validation, recipe.train.seed)
        } else {
            let longest = teacher.context_limit().map_or(PIECE, |limit| limit.min(PIECE));
            let length = recipe.data.length.min(longest);
            let wanted = args.self_tokens.min(recipe.train.tokens).div_ceil(length as u64) as usize;
            // One conversation validates, unless the recipe wants none.
            let kept = usize::from(recipe.data.validation > 0.0);
            let measured = if args.eval_data.is_some() { 0 } else { args.eval_pieces };
            let file = out.join("self.json");
            // Past what tuning sees, but not far: who writes on when the others have ended costs as much as all of them together.
            let longest = longest.min(2 * length);
            let lengths = [vec![length; wanted + kept], vec![longest; measured]].concat();
            let mut documents = own_text(args, recipe, checkpoint, teacher, &lengths, &file, stopped)?;
            pieces = documents.split_off(wanted + kept).into_iter().map(|d| d.ids).collect();
            description = format!("{measured} conversations of {longest} tokens that the teacher wrote, held out");
            let validation = documents.split_off(wanted);
            (documents, validation)
        };
        if let (Some(documents), Some(path)) = (given.measured, &args.eval_data) {
            pieces = cut(&documents.list, args.eval_pieces);
            description = format!("{} from {}", texts_of(pieces.len()), file_name(path));
        } else if !own {
            let held_out = if validation.is_empty() { &training } else { &validation };
            pieces = cut(held_out, args.eval_pieces);
            description = format!("{} from the validation documents", texts_of(pieces.len()));
        }
        Ok(Self { training, validation, pieces, description })
    }

    /// Stretches of the pieces.
    fn buckets(&self) -> Vec<Bucket> {
        Bucket::up_to(self.pieces.iter().map(Vec::len).max().unwrap_or(PIECE))
    }
}

/// The documents laid end to end and cut; a text shorter than a piece stays as it is.
fn cut(documents: &[Document], pieces: usize) -> Vec<Vec<u32>> {
    let all: Vec<u32> = documents.iter().flat_map(|d| &d.ids).copied().collect();
    let whole: Vec<Vec<u32>> = all.chunks_exact(PIECE).take(pieces).map(<[u32]>::to_vec).collect();
    if whole.is_empty() { vec![all] } else { whole }
}

/// Writes conversations to tune on, or reads those that the run wrote before it was cut off.
fn own_text(
    args: &Args,
    recipe: &Recipe,
    checkpoint: &Checkpoint,
    teacher: &Decoder,
    lengths: &[usize],
    file: &Path,
    stopped: &dyn Fn() -> bool,
) -> Result<Vec<Document>> {
    if args.resume && file.exists() {
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let ids: Vec<(Vec<u32>, Vec<bool>)> = serde_json::from_str(&text)
            .map_err(|e| anyhow::anyhow!("{}: damaged ({e}); start anew with --force", file.display()))?;
        if ids.len() != lengths.len() {
            let (path, found, expected) = (file.display(), ids.len(), lengths.len());
            bail!(
                "{path}: found {found} conversations, these settings take {expected}; resume with those that the run began with, or start anew with --force"
            );
        }
        let document = |(i, (ids, answer))| Document { line: i + 1, ids, answer, begin: None };
        return Ok(ids.into_iter().enumerate().map(document).collect());
    }
    // A quantised file writes faster as it is than with its weights widened for tuning.
    let as_stored = checkpoint.is_quantized && teacher.ops().takes_blocks();
    let stored = if as_stored { Some(checkpoint.load(teacher.shared_ops(), None)?) } else { None };
    let writer = stored.as_ref().unwrap_or(teacher);
    let mut documents = Vec::new();
    for lengths in lengths.chunks(args.self_batch.max(1)) {
        let first = documents.len();
        let seed = recipe.train.seed.wrapping_add(first as u64);
        let plan = OwnText { lengths: lengths.to_vec(), seed };
        documents.extend(write_own(checkpoint, writer, plan, stopped)?);
        documents[first..].iter_mut().enumerate().for_each(|(i, d)| d.line = first + i + 1);
    }
    let parts: Vec<_> = documents.iter().map(|d| (&d.ids, &d.answer)).collect();
    files::write_whole(file, serde_json::to_string(&parts)?.as_bytes())?;
    Ok(documents)
}

fn write_own(
    checkpoint: &Checkpoint,
    writer: &Decoder,
    plan: OwnText,
    stopped: &dyn Fn() -> bool,
) -> Result<Vec<Document>> {
    let total: usize = plan.lengths.iter().sum();
    let mut progress = Progress::new("self text", "tokens", total as u64);
    let generator = Generator { decoder: writer, adapter: None };
    let documents = write_conversations(generator, &checkpoint.tokenizer, plan, &mut |done, _| {
        progress.update(done as u64, "");
        !stopped()
    })?;
    if stopped() {
        return Err(Interrupted("nothing was tuned yet; the same command starts again".into()).into());
    }
    progress.finish(&format!("the teacher wrote {total} tokens"));
    Ok(documents)
}

fn tune(
    args: &Args,
    recipe: &Recipe,
    student: &Decoder,
    texts: &Texts,
    out: &Path,
    stop: &std::sync::atomic::AtomicBool,
) -> Result<(Adapter, Vec<StepRecord>)> {
    let (training, validation) = (texts.training.clone(), &texts.validation);
    let tokens = recipe.train.micro_batch * recipe.data.length;
    let recompute = args.recompute.choose(student, tokens);
    tell_memory(student, recipe, recompute)?;
    let mut trainer = Trainer::new(student.clone(), recipe.clone(), training, validation, out, args.resume, recompute)?;
    let mut progress = Progress::new("tune", "steps", trainer.steps());
    if trainer.step() > 0 {
        eprintln!("going on after step {}", trainer.step());
    }
    let outcome = trainer.run(stop, &mut |event| {
        if let Event::Step(r) = event {
            let validation = r.validation_loss.map(|loss| format!(", validation {loss:.4}")).unwrap_or_default();
            progress.update(r.step, &format!("loss {:.4}{validation}, {:.0} tokens/s", r.loss, r.tokens_per_second));
        }
    })?;
    if outcome.finished == Finished::Interrupted {
        let path = out.display();
        let words = format!("step {} is saved in {path}; the same command with --resume goes on", outcome.step);
        return Err(Interrupted(words).into());
    }
    let best = outcome.best.map(|(loss, step)| format!(", lowest validation loss {loss:.4} at step {step}"));
    progress.finish(&format!("{} steps{}", outcome.step, best.unwrap_or_default()));
    let adapter = load_adapter(&trainer.best_adapter_folder(), student.config(), student.ops())?;
    let path = out.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let records = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    Ok((adapter, records))
}

fn texts_of(count: usize) -> String {
    format!("{count} text{} of up to {PIECE} tokens", if count == 1 { "" } else { "s" })
}

/// Says what a step needs of a device's own memory, and refuses what cannot fit.
fn tell_memory(student: &Decoder, recipe: &Recipe, recompute: Recompute) -> Result<()> {
    let Some((free, total)) = student.ops().memory() else { return Ok(()) };
    let tokens = recipe.train.micro_batch * recipe.data.length;
    let logits = logit_bytes(student, tokens, recipe.train.objective);
    let step = student.training_bytes(tokens, recompute) + logits;
    let needed = format!("needs {} of {}", mebibytes(student.weights().bytes() + step), mebibytes(total));
    if step > free {
        bail!(
            "tuning {needed}, of which {} are free; use --recompute layer, a smaller `train.micro_batch` or `data.length`",
            mebibytes(free)
        );
    }
    eprintln!("tuning {needed}");
    Ok(())
}

fn measure(
    args: &Args,
    teacher: &Decoder,
    student: &Decoder,
    adapter: &Adapter,
    recipe: &Recipe,
    texts: &Texts,
) -> Result<Vec<liger_eval::PositionScores>> {
    let window_only = |sinks: usize| {
        let liger = LigerConfig { sinks, alpha: 0.0, beta: 1.0, ..recipe.liger_config(teacher.config()) };
        teacher.with_attention(Some(liger))
    };
    let (window, sinks) = (window_only(0), window_only(4));
    let subject = |name: &str, decoder, adapter| Subject { name: name.into(), decoder, adapter };
    let size = recipe.liger.window;
    let students = [
        subject(&format!("window {size} only"), &window, None),
        subject(&format!("window {size} + 4 sinks"), &sinks, None),
        subject("untrained", student, None),
        subject("tuned", student, Some(adapter)),
    ];
    let total: usize = texts.pieces.iter().map(Vec::len).sum();
    let mut progress = Progress::new("measure", "tokens", total as u64);
    let scores = scores_by_position(
        &subject("teacher", teacher, None),
        &students,
        &texts.pieces,
        &texts.buckets(),
        &mut |done| {
            progress.update(done as u64, "");
        },
    )
    .with_context(|| args.model.display().to_string())?;
    progress.finish(&format!("{} models on {total} tokens", students.len() + 1));
    Ok(scores)
}

fn ask_both(
    args: &Args,
    checkpoint: &Checkpoint,
    teacher: &Decoder,
    student: &Decoder,
    adapter: &Adapter,
) -> Result<Answers> {
    let tokenizer = &checkpoint.tokenizer;
    let prompt = match &tokenizer.chat {
        Some(chat) => tokenizer.encode(&chat.render(&[Message::new("user", &args.question)], true)?, false)?,
        None => tokenizer.encode(&args.question, true)?,
    };
    let options = GenerateOptions {
        max_tokens: 80,
        sampling: Sampling::default(),
        seed: 0,
        stop_ids: checkpoint.config.eos_token_ids.clone(),
    };
    let answer = |decoder: &Decoder, adapter: Option<&Adapter>| -> Result<String> {
        let mut state = decoder.new_state(1)?;
        let ids = Generator { decoder, adapter }.generate(&mut state, &prompt, &options, &mut |_| Ok(true))?;
        Ok(tokenizer.decode(&ids, true)?)
    };
    Ok(Answers {
        prompt: args.question.clone(),
        teacher: answer(teacher, None)?,
        student: answer(student, Some(adapter))?,
    })
}
