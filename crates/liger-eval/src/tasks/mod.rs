//! Benchmarks as data: a TOML file says how a record becomes prompts and choices. `docs/evaluation.md` has the schema.

mod records;
mod templates;

use std::path::{Path, PathBuf};

use liger_model::{Error, Result};
use regex::Regex;
use serde::{Deserialize, Serialize};

pub use records::read_records;

/// What is told of a task's items.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
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
    /// exp of the negative log-likelihood of all texts over their number of words.
    WordPerplexity,
    /// The same over their number of bytes.
    BytePerplexity,
    /// log2 of it.
    BitsPerByte,
    /// What the model writes is the answer.
    ExactMatch,
}

/// What a record becomes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// The log-likelihood of each of some continuations (the harness's `loglikelihood`).
    #[default]
    Choices,
    /// The log-likelihood of a whole text (`loglikelihood_rolling`).
    Text,
    /// Text that the model writes (`generate_until`).
    Answer,
}

impl Kind {
    /// Fields that it needs, and metrics that it has.
    fn needs(self) -> (&'static [&'static str], &'static [Metric]) {
        match self {
            Self::Choices => {
                (&["context", "choices", "gold"], &[Metric::Acc, Metric::AccNorm, Metric::Greedy, Metric::Perplexity])
            }
            Self::Text => (&["text"], &[Metric::WordPerplexity, Metric::BytePerplexity, Metric::BitsPerByte]),
            Self::Answer => (&["context", "answer"], &[Metric::ExactMatch]),
        }
    }
}

/// Solved examples before the question.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shots {
    count: usize,
    data: String,
    /// A field that an example must share with the question.
    same: Option<String>,
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
    #[serde(default)]
    kind: Kind,
    data: String,
    #[serde(default)]
    description: String,
    shots: Option<Shots>,
    #[serde(default)]
    context: String,
    continuation: Option<String>,
    #[serde(default)]
    choices: String,
    #[serde(default)]
    gold: String,
    #[serde(default)]
    text: String,
    /// What words and bytes are counted in, where that is not `text`.
    counted: Option<String>,
    #[serde(default)]
    answer: String,
    #[serde(default)]
    until: Vec<String>,
    #[serde(default = "default_max_tokens")]
    max_tokens: usize,
    /// The first group of its first match is the answer; else everything that was written.
    extract: Option<String>,
    /// What is told, the headline first.
    pub metrics: Vec<Metric>,
}

fn default_max_tokens() -> usize {
    256
}

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// Continuations of which one is right.
    Choices {
        /// Context and continuation of every choice.
        pairs: Vec<(String, String)>,
        /// Characters of every choice.
        lengths: Vec<usize>,
        /// Number of the right choice.
        gold: usize,
    },
    /// A text to be predicted whole.
    Text {
        /// It.
        text: String,
        /// Words that its log-likelihood is told over.
        words: usize,
        /// Bytes that it is told over.
        bytes: usize,
    },
    /// A text to be written.
    Answer {
        /// What it follows.
        context: String,
        /// The right one.
        answer: String,
    },
}

impl Item {
    /// How many requests it makes of a model.
    pub fn requests(&self) -> usize {
        match self {
            Self::Choices { pairs, .. } => pairs.len(),
            Self::Text { .. } | Self::Answer { .. } => 1,
        }
    }
}

macro_rules! shipped {
    ($($name:literal),*) => { &[$(($name, include_str!(concat!("../../tasks/", $name, ".toml")))),*] };
}

const SHIPPED: &[(&str, &str)] = shipped!(
    "piqa",
    "arc_easy",
    "arc_challenge",
    "hellaswag",
    "winogrande",
    "mmlu",
    "mmlu_cloze",
    "openbookqa",
    "boolq",
    "lambada_openai",
    "wikitext"
);

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
        let known: Vec<&str> = Self::names().chain(crate::Probe::ALL.map(crate::Probe::name)).collect();
        let nearest = known.iter().max_by(|a, b| strsim::jaro(a, name).total_cmp(&strsim::jaro(b, name)));
        Err(Error::Refused(format!(
            "no task `{name}`; did you mean `{}`? There are {}, or give a .toml file",
            nearest.copied().unwrap_or_default(),
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
        task.check().map_err(corrupt)?;
        task.name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        task.file = file.to_owned();
        Ok(task)
    }

    /// What goes together; an error says which field does not.
    fn check(&self) -> std::result::Result<(), String> {
        let fields = [
            ("context", !self.context.is_empty()),
            ("continuation", self.continuation.is_some()),
            ("choices", !self.choices.is_empty()),
            ("gold", !self.gold.is_empty()),
            ("text", !self.text.is_empty()),
            ("counted", self.counted.is_some()),
            ("answer", !self.answer.is_empty()),
            ("until", !self.until.is_empty()),
            ("extract", self.extract.is_some()),
        ];
        let (needed, metrics) = self.kind.needs();
        let kind = format!("{:?}", self.kind).to_lowercase();
        let optional: &[&str] = match self.kind {
            Kind::Choices => &["continuation"],
            Kind::Text => &["counted"],
            Kind::Answer => &["until", "extract"],
        };
        for (field, is_there) in fields {
            if is_there && !needed.contains(&field) && !optional.contains(&field) {
                return Err(format!("field `{field}`: not for a task of the kind {kind}"));
            }
            // A context may be the empty text.
            if !is_there && needed.contains(&field) && field != "context" {
                return Err(format!("field `{field}`: missing; a task of the kind {kind} needs it"));
            }
        }
        let names = || metrics.iter().map(|m| m.name_in_file()).collect::<Vec<_>>().join(", ");
        if self.metrics.is_empty() {
            return Err(format!("field `metrics`: found an empty list, expected at least one of {}", names()));
        }
        if let Some(wrong) = self.metrics.iter().find(|m| !metrics.contains(m)) {
            let found = wrong.name_in_file();
            return Err(format!("field `metrics`: found {found}, a task of the kind {kind} has {}", names()));
        }
        self.extraction().map(|_| ())
    }

    /// The expression that finds the answer in what was written.
    pub(crate) fn extraction(&self) -> std::result::Result<Option<Regex>, String> {
        let Some(text) = &self.extract else { return Ok(None) };
        match Regex::new(text) {
            Ok(regex) if regex.captures_len() > 1 => Ok(Some(regex)),
            Ok(_) => Err(format!("field `extract`: found {text}, expected a group in brackets: it is the answer")),
            Err(e) => Err(format!("field `extract`: {}", e.to_string().replace('\n', " "))),
        }
    }

    /// Texts that end what the model writes, and its tokens at most.
    pub(crate) fn writing(&self) -> (&[String], usize) {
        (&self.until, self.max_tokens)
    }
}

impl Metric {
    fn name_in_file(self) -> String {
        serde_json::to_value(self).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
    }

    /// As lm-evaluation-harness names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Acc | Self::Greedy => "acc",
            Self::AccNorm => "acc_norm",
            Self::Perplexity => "perplexity",
            Self::WordPerplexity => "word_perplexity",
            Self::BytePerplexity => "byte_perplexity",
            Self::BitsPerByte => "bits_per_byte",
            Self::ExactMatch => "exact_match",
        }
    }
}
