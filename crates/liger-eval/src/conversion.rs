//! The report of a conversion.

use std::path::Path;

use liger_model::{Error, Result, files};
use serde::{Deserialize, Serialize};

use crate::document::{Block, Document};
use crate::plot::{Axis, Line, Plot};
use crate::position::{Bucket, PositionScores};
use crate::speed::StepCost;
use crate::table::Table;

/// Everything that a conversion's report shows.
#[derive(Debug, Serialize, Deserialize)]
pub struct ConversionReport {
    /// What was converted.
    pub model: String,
    /// The command that did it.
    pub command: String,
    /// Device and version.
    pub machine: String,
    /// What the scores are over: "4 texts of 2,048 tokens that the teacher wrote".
    pub texts: String,
    /// What was tuned: tokens, parameters, time.
    pub tuning: String,
    /// The buckets of the scores.
    pub buckets: Vec<Bucket>,
    /// Teacher first, tuned model last.
    pub scores: Vec<PositionScores>,
    /// Step costs of teacher and student.
    pub costs: [Vec<StepCost>; 2],
    /// A prompt and the answers of teacher and student.
    pub answers: Answers,
    /// Loss by step.
    pub losses: Vec<(u64, f64)>,
    /// Validation loss by step.
    pub validation: Vec<(u64, f64)>,
    /// The recipe as TOML.
    pub recipe: String,
}

/// The same question to both.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Answers {
    /// The question.
    pub prompt: String,
    /// The teacher's answer.
    pub teacher: String,
    /// The student's.
    pub student: String,
}

pub(crate) fn number(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(x) if x >= 1e5 => format!("{x:.1e}"),
        Some(x) if x >= 100.0 => format!("{x:.0}"),
        Some(x) if x >= 10.0 => format!("{x:.1}"),
        Some(x) => format!("{x:.3}"),
    }
}

pub(crate) fn mebibytes(bytes: usize) -> f64 {
    bytes as f64 / (1024.0 * 1024.0)
}

impl ConversionReport {
    /// Perplexity of every model by bucket.
    pub fn perplexity_table(&self) -> Table {
        position_table(&self.buckets, &self.scores, |s| &s.perplexity)
    }

    /// KL to the teacher by bucket.
    pub fn kl_table(&self) -> Table {
        position_table(&self.buckets, &self.scores, |s| &s.kl)
    }

    /// Time and memory of a step by length.
    pub fn cost_table(&self) -> Table {
        let mut table = Table::new(["after", "teacher ms/token", "KV cache MiB", "student ms/token", "state MiB"]);
        for (teacher, student) in self.costs[0].iter().zip(&self.costs[1]) {
            table.row([
                format!("{} tokens", teacher.context),
                format!("{:.1}", teacher.milliseconds),
                format!("{:.1}", mebibytes(teacher.state_bytes)),
                format!("{:.1}", student.milliseconds),
                format!("{:.1}", mebibytes(student.state_bytes)),
            ]);
        }
        table
    }

    fn plots(&self) -> Vec<Block> {
        let steps = |points: &[(u64, f64)]| points.iter().map(|(x, y)| (*x as f64, *y)).collect::<Vec<_>>();
        let mut losses = vec![Line { name: "training".into(), points: steps(&self.losses) }];
        if !self.validation.is_empty() {
            losses.push(Line { name: "validation".into(), points: steps(&self.validation) });
        }
        let loss = Plot { title: "Loss".into(), x: Axis::linear("step"), y: Axis::linear("nats"), lines: losses };
        let costs: Vec<(&str, &[StepCost])> =
            vec![("teacher: KV cache", &self.costs[0]), ("student: state", &self.costs[1])];
        [("loss", loss), ("perplexity", perplexity_plot(&self.buckets, &self.scores)), ("memory", memory_plot(&costs))]
            .into_iter()
            .filter_map(|(file, plot)| Some(Block::Plot(file.into(), plot.title.clone(), plot.to_svg()?)))
            .collect()
    }

    /// The report.
    pub fn to_document(&self) -> Document {
        let heading = |text: &str| Block::Heading(text.into());
        let mut blocks = vec![
            Block::Text(self.tuning.clone()),
            Block::Text(format!("On {}, by", self.machine)),
            Block::Code(self.command.clone()),
            heading("Perplexity by position"),
            Block::Text(self.texts.clone()),
            Block::Table(self.perplexity_table()),
            heading("KL to the teacher by position, nats"),
            Block::Table(self.kl_table()),
            heading("Time and memory of a token"),
            Block::Text("Steps timed over a state filled to that length.".into()),
            Block::Table(self.cost_table()),
            heading("The same question to both"),
            Block::Quote(self.answers.prompt.clone()),
            Block::Text("Teacher:".into()),
            Block::Quote(self.answers.teacher.clone()),
            Block::Text("Student:".into()),
            Block::Quote(self.answers.student.clone()),
            heading("Plots"),
        ];
        blocks.extend(self.plots());
        blocks.extend([heading("Recipe"), Block::Code(self.recipe.clone())]);
        Document { title: self.model.clone(), blocks }
    }

    /// Writes `report.json`, and the report as HTML and Markdown with its plots, to a folder.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let json = serde_json::to_string(self).map_err(|e| Error::Refused(e.to_string()))?;
        files::write_whole(&folder.join("report.json"), json.as_bytes())?;
        self.to_document().write(folder)
    }
}

/// One kind of score of every model by bucket.
pub fn position_table(
    buckets: &[Bucket],
    scores: &[PositionScores],
    value: impl Fn(&PositionScores) -> &[Option<f64>],
) -> Table {
    let mut table = Table::new(std::iter::once("tokens".to_owned()).chain(buckets.iter().map(Bucket::to_string)));
    for scores in scores {
        let cells = value(scores).iter().map(|x| number(*x));
        table.row(std::iter::once(scores.name.clone()).chain(cells));
    }
    table
}

/// Perplexity by position, one line a model.
pub(crate) fn perplexity_plot(buckets: &[Bucket], scores: &[PositionScores]) -> Plot {
    let middle = |b: &Bucket| ((b.from.max(1) * b.to) as f64).sqrt();
    let lines = scores.iter().map(|s| Line {
        name: s.name.clone(),
        points: buckets.iter().zip(&s.perplexity).filter_map(|(b, p)| Some((middle(b), (*p)?))).collect(),
    });
    Plot {
        title: "Perplexity by position".into(),
        x: Axis::logarithmic("position in the text, tokens"),
        y: Axis::logarithmic("perplexity"),
        lines: lines.collect(),
    }
}

/// Memory of a text by its length, one line a model.
pub(crate) fn memory_plot(costs: &[(&str, &[StepCost])]) -> Plot {
    let lines = costs.iter().map(|(name, costs)| Line {
        name: (*name).into(),
        points: costs.iter().map(|c| (c.context as f64, mebibytes(c.state_bytes))).collect(),
    });
    Plot {
        title: "Memory of a text while decoding".into(),
        x: Axis::logarithmic("tokens so far"),
        y: Axis::logarithmic("MiB"),
        lines: lines.collect(),
    }
}
