//! The report of a conversion: `report.md` with its plots beside it.

use std::path::Path;

use liger_model::{Result, files};
use serde::Serialize;

use crate::plot::{Axis, Line, Plot};
use crate::position::{Bucket, PositionScores};
use crate::speed::StepCost;
use crate::table::Table;

/// Everything that a conversion's report shows.
#[derive(Debug, Serialize)]
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
#[derive(Debug, Default, Serialize)]
pub struct Answers {
    /// The question.
    pub prompt: String,
    /// The teacher's answer.
    pub teacher: String,
    /// The student's.
    pub student: String,
}

fn number(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(x) if x >= 1e5 => format!("{x:.1e}"),
        Some(x) if x >= 100.0 => format!("{x:.0}"),
        Some(x) if x >= 10.0 => format!("{x:.1}"),
        Some(x) => format!("{x:.3}"),
    }
}

fn mebibytes(bytes: usize) -> f64 {
    bytes as f64 / (1024.0 * 1024.0)
}

impl ConversionReport {
    fn by_position(&self, value: impl Fn(&PositionScores) -> &[Option<f64>]) -> Table {
        let head = std::iter::once("tokens".to_owned()).chain(self.buckets.iter().map(Bucket::to_string));
        let mut table = Table::new(head);
        for scores in &self.scores {
            let cells = value(scores).iter().map(|x| number(*x));
            table.row(std::iter::once(scores.name.clone()).chain(cells));
        }
        table
    }

    /// Perplexity of every model by bucket.
    pub fn perplexity_table(&self) -> Table {
        self.by_position(|s| &s.perplexity)
    }

    /// KL to the teacher by bucket.
    pub fn kl_table(&self) -> Table {
        self.by_position(|s| &s.kl)
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

    fn plots(&self) -> Vec<(&'static str, Plot)> {
        let axis = |label: &str, logarithmic| Axis { label: label.into(), logarithmic };
        let steps = |points: &[(u64, f64)]| points.iter().map(|(x, y)| (*x as f64, *y)).collect::<Vec<_>>();
        let mut loss_lines = vec![Line { name: "training".into(), points: steps(&self.losses) }];
        if !self.validation.is_empty() {
            loss_lines.push(Line { name: "validation".into(), points: steps(&self.validation) });
        }
        let middle = |b: &Bucket| ((b.from.max(1) * b.to) as f64).sqrt();
        let position_lines = self.scores.iter().map(|s| Line {
            name: s.name.clone(),
            points: self.buckets.iter().zip(&s.perplexity).filter_map(|(b, p)| Some((middle(b), (*p)?))).collect(),
        });
        let cost_lines =
            ["teacher: KV cache", "student: state"].into_iter().zip(&self.costs).map(|(name, costs)| Line {
                name: name.into(),
                points: costs.iter().map(|c| (c.context as f64, mebibytes(c.state_bytes))).collect(),
            });
        vec![
            (
                "loss.svg",
                Plot { title: "Loss".into(), x: axis("step", false), y: axis("nats", false), lines: loss_lines },
            ),
            (
                "perplexity.svg",
                Plot {
                    title: "Perplexity by position".into(),
                    x: axis("position in the text, tokens", true),
                    y: axis("perplexity", true),
                    lines: position_lines.collect(),
                },
            ),
            (
                "memory.svg",
                Plot {
                    title: "Memory of a text while decoding".into(),
                    x: axis("tokens so far", true),
                    y: axis("MiB", true),
                    lines: cost_lines.collect(),
                },
            ),
        ]
    }

    /// Writes `report.md`, `report.json` and the plots to a folder.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let mut images = String::new();
        for (name, plot) in self.plots() {
            if let Some(svg) = plot.to_svg() {
                files::write_whole(&folder.join(name), svg.as_bytes())?;
                images.push_str(&format!("![{}]({name})\n\n", plot.title));
            }
        }
        let quote = |text: &str| text.lines().map(|line| format!("> {line}\n")).collect::<String>();
        let text = format!(
            "# {model}\n\n{tuning}\n\nOn {machine}, by\n\n```\n{command}\n```\n\n## Perplexity by position\n\n{texts}\n\n\
             {perplexity}\n## KL to the teacher by position, nats\n\n{kl}\n## Time and memory of a token\n\n\
             Steps timed over a state filled to that length.\n\n{costs}\n## The same question to both\n\n{prompt}\n\
             **Teacher**\n\n{teacher}\n**Student**\n\n{student}\n{images}## Recipe\n\n```toml\n{recipe}```\n",
            model = self.model,
            tuning = self.tuning,
            machine = self.machine,
            command = self.command,
            texts = self.texts,
            perplexity = self.perplexity_table().to_markdown(),
            kl = self.kl_table().to_markdown(),
            costs = self.cost_table().to_markdown(),
            prompt = quote(&self.answers.prompt),
            teacher = quote(&self.answers.teacher),
            student = quote(&self.answers.student),
            recipe = self.recipe,
        );
        files::write_whole(&folder.join("report.md"), text.as_bytes())
    }
}
