//! Benchmarks as data: a TOML file says how a record becomes prompts and choices. `docs/evaluation.md` has the schema.

use std::io::Read;
use std::path::{Path, PathBuf};

use liger_model::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{Environment, UndefinedBehavior, Value};
use serde::Deserialize;

/// What is told of a task's items.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The most likely choice is the right one.
    Acc,
    /// The same with log-likelihoods divided by the choice's number of characters.
    AccNorm,
    /// The model's own greedy tokens are the right choice.
    Greedy,
    /// exp of the mean negative log-likelihood of the right choice.
    Perplexity,
}

/// A task file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// Its name: that of the file.
    #[serde(skip)]
    pub name: String,
    #[serde(skip)]
    file: PathBuf,
    data: String,
    context: String,
    #[serde(default = "plain_continuation")]
    continuation: String,
    choices: String,
    gold: String,
    /// What is told, in this order.
    pub metrics: Vec<Metric>,
}

fn plain_continuation() -> String {
    " {{ choice }}".into()
}

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Context and continuation of every choice.
    pub pairs: Vec<(String, String)>,
    /// Characters of every choice.
    pub lengths: Vec<usize>,
    /// Number of the right choice.
    pub gold: usize,
}

macro_rules! shipped {
    ($($name:literal),*) => { &[$(($name, include_str!(concat!("../tasks/", $name, ".toml")))),*] };
}

const SHIPPED: &[(&str, &str)] =
    shipped!("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "openbookqa", "boolq", "lambada_openai");

impl Task {
    /// Names of the tasks that come with the program.
    pub fn names() -> impl Iterator<Item = &'static str> {
        SHIPPED.iter().map(|(name, _)| *name)
    }

    /// A task of that name, or of a file whose name ends in `.toml`.
    ///
    /// # Errors
    /// An unknown name (with the nearest one), a file that cannot be read, or a field that is not right, with its line.
    pub fn open(name: &str) -> Result<Self> {
        if name.ends_with(".toml") {
            let path = PathBuf::from(name);
            let text = std::fs::read_to_string(&path).map_err(|source| Error::Io {
                path: path.clone(),
                doing: "read",
                source,
            })?;
            return Self::parse(&text, &path);
        }
        if let Some((_, text)) = SHIPPED.iter().find(|(known, _)| *known == name) {
            return Self::parse(text, Path::new(&format!("{name}.toml")));
        }
        let nearest = Self::names().max_by(|a, b| strsim::jaro(a, name).total_cmp(&strsim::jaro(b, name)));
        let known: Vec<&str> = Self::names().collect();
        Err(Error::Refused(format!(
            "no task `{name}`; did you mean `{}`? There are {}, or give a .toml file",
            nearest.unwrap_or_default(),
            known.join(", ")
        )))
    }

    /// A task of the text of its file.
    ///
    /// # Errors
    /// As [`Task::open`].
    pub fn parse(text: &str, file: &Path) -> Result<Self> {
        let corrupt = |problem: String| Error::Corrupt { path: file.to_owned(), problem };
        let mut task: Self = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
            corrupt(format!("line {line}: {}", e.message().replace('\n', " ")))
        })?;
        if task.metrics.is_empty() {
            return Err(corrupt(
                "field `metrics`: found an empty list, expected at least one of acc, acc_norm, greedy, perplexity"
                    .into(),
            ));
        }
        task.name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        task.file = file.to_owned();
        Ok(task)
    }

    /// The records of `folder/DATA.jsonl` or `folder/DATA.jsonl.zst`, `limit` of them at most, as items.
    ///
    /// # Errors
    /// If there is no such file, a line is not a JSON object, or a record lacks what the task asks of it.
    pub fn items(&self, folder: &Path, limit: usize) -> Result<Vec<Item>> {
        let candidates = [".jsonl", ".jsonl.zst"].map(|ending| folder.join(format!("{}{ending}", self.data)));
        let path = candidates.iter().find(|path| path.exists()).ok_or_else(|| Error::Missing {
            path: folder.to_owned(),
            what: format!("{}.jsonl or {}.jsonl.zst", self.data, self.data),
            remedy: format!("put the records of {} there, one JSON object a line (docs/evaluation.md)", self.name),
        })?;
        let text = read(path).map_err(|source| Error::Io { path: path.clone(), doing: "read", source })?;
        let environment = environment();
        let lines = text.lines().filter(|line| !line.trim().is_empty()).take(limit).enumerate();
        lines
            .map(|(i, line)| {
                let at = |problem: String| Error::Corrupt {
                    path: path.clone(),
                    problem: format!("line {}: {problem}", i + 1),
                };
                let record: serde_json::Value = serde_json::from_str(line).map_err(|e| at(format!("not JSON: {e}")))?;
                if !record.is_object() {
                    return Err(at("not a JSON object".into()));
                }
                self.item(&environment, &record).map_err(|(field, e)| {
                    let reason = e.detail().map_or_else(|| e.to_string(), str::to_owned);
                    at(format!("field `{field}` of {}: {reason}", self.file.display()))
                })
            })
            .collect()
    }

    /// One record as an item; an error names the task's field.
    fn item(
        &self,
        environment: &Environment<'_>,
        record: &serde_json::Value,
    ) -> std::result::Result<Item, (&'static str, minijinja::Error)> {
        let invalid = |what: String| minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, what);
        let value = Value::from(Serde(record));
        let evaluate = |field: &'static str, expression: &str| {
            environment.compile_expression(expression).and_then(|e| e.eval(&value)).map_err(|e| (field, e))
        };
        let choices = evaluate("choices", &self.choices)?;
        if !matches!(choices.kind(), ValueKind::Seq | ValueKind::Iterable) {
            return Err(("choices", invalid(format!("found {}, expected a list", choices.kind()))));
        }
        let (mut pairs, mut lengths) = (Vec::new(), Vec::new());
        for choice in choices.try_iter().map_err(|e| ("choices", e))? {
            lengths.push(choice.to_string().chars().count());
            let with_choice = minijinja::context! { choice, ..value.clone() };
            let render = |field: &'static str, template: &str| {
                environment.render_str(template, &with_choice).map_err(|e| (field, e))
            };
            pairs.push((render("context", &self.context)?, render("continuation", &self.continuation)?));
        }
        let gold = evaluate("gold", &self.gold)?;
        match usize::try_from(gold.clone()) {
            Ok(gold) if gold < pairs.len() => Ok(Item { pairs, lengths, gold }),
            _ => Err(("gold", invalid(format!("found {gold}, expected the number of one of {} choices", pairs.len())))),
        }
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    let file = std::fs::File::open(path)?;
    let mut text = String::new();
    if path.extension().is_some_and(|e| e == "zst") {
        zstd::Decoder::new(file)?.read_to_string(&mut text)?;
    } else {
        std::io::BufReader::new(file).read_to_string(&mut text)?;
    }
    Ok(text)
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    // Line ends at the end of a prompt count.
    if let Ok(syntax) = SyntaxConfig::builder().keep_trailing_newline(true).build() {
        environment.set_syntax(syntax);
    }
    environment.add_filter("before", |text: &str, mark: &str| text.split_once(mark).map_or(text, |x| x.0).to_owned());
    environment.add_filter("after", |text: &str, mark: &str| text.split_once(mark).map_or("", |x| x.1).to_owned());
    environment
        .add_filter("before_last", |text: &str, mark: &str| text.rsplit_once(mark).map_or("", |x| x.0).to_owned());
    environment
        .add_filter("after_last", |text: &str, mark: &str| text.rsplit_once(mark).map_or(text, |x| x.1).to_owned());
    environment.add_filter("position", |list: Vec<Value>, wanted: Value| list.iter().position(|x| *x == wanted));
    environment.add_filter("without_brackets", without_brackets);
    environment
}

/// HellaSwag's texts carry WikiHow's marks: `[title]` ends a sentence, any other brackets go with what they hold.
fn without_brackets(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(open) = rest.find('[') {
        // A line's end is not part of a bracket.
        match rest[open..].find(']').filter(|close| !rest[open..open + close].contains('\n')) {
            Some(close) => {
                kept.push_str(&rest[..open]);
                rest = &rest[open + close + 1..];
            }
            None => {
                kept.push_str(&rest[..=open]);
                rest = &rest[open + 1..];
            }
        }
    }
    kept.push_str(rest);
    kept.replace("  ", " ")
}
