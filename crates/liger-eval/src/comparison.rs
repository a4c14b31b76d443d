//! The report of evaluations: what every model keeps of its teacher.

use crate::conversion::{memory_plot, number, perplexity_plot, position_table};
use crate::document::{Block, Document};
use crate::plot::{Axis, Line, Plot};
use crate::{ConversionReport, EvaluationRun, HeatMap, ModelScores, Score, Table};

/// The tasks that the paper averages (arXiv 2503.01496, table 1), by their headlines; MMLU last.
const PAPER: [&str; 6] = ["piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu"];

/// A score as the tables show it: accuracies in percent.
pub fn shown(score: &Score) -> String {
    let scale = if score.is_accuracy() { 100.0 } else { 1.0 };
    let error = score.standard_error.map(|e| format!(" ± {:.1}", scale * e)).unwrap_or_default();
    if score.is_accuracy() {
        format!("{:.1}{error}", scale * score.value)
    } else {
        format!("{}{error}", number(Some(score.value)))
    }
}

fn headline<'a>(model: &'a ModelScores, task: &str) -> Option<&'a Score> {
    model.tasks.iter().find(|t| t.task == task)?.scores.first()
}

/// Mean of the headlines of `tasks` with its standard error, if the model has all of them.
fn average(model: &ModelScores, tasks: &[&str]) -> Option<Score> {
    let scores: Vec<&Score> = tasks.iter().map(|task| headline(model, task)).collect::<Option<_>>()?;
    let n = scores.len() as f64;
    let value = scores.iter().map(|s| s.value).sum::<f64>() / n;
    let variance: f64 = scores.iter().filter_map(|s| s.standard_error).map(|e| e * e).sum();
    Some(Score { metric: "acc".into(), value, standard_error: Some(variance.sqrt() / n) })
}

/// One row a model, one column a task: the headline metric, averages, and percent of the first model where it is the teacher.
pub fn recovery_table(models: &[&ModelScores], has_teacher: bool) -> Table {
    let mut tasks: Vec<&str> = Vec::new();
    for task in models.iter().flat_map(|m| &m.tasks) {
        if !tasks.contains(&task.task.as_str()) {
            tasks.push(&task.task);
        }
    }
    let metric = |task: &str| models.iter().find_map(|m| headline(m, task)).map_or("", |s| s.metric.as_str());
    let averages: Vec<(&str, &[&str])> = [("average of 5", &PAPER[..5]), ("with MMLU", &PAPER[..])]
        .into_iter()
        .filter(|(_, tasks)| models.iter().any(|m| average(m, tasks).is_some()))
        .collect();
    // What it comes down to before what it is made of: a wide table is cut at its right.
    let mut head = vec!["model".to_owned(), "tokens tuned".to_owned()];
    for (name, _) in &averages {
        head.push((*name).to_owned());
        if has_teacher {
            head.push("% of teacher".into());
        }
    }
    head.extend(tasks.iter().map(|task| format!("{task} {}", metric(task))));
    let mut table = Table::new(head);
    for model in models {
        let tuned = model.tokens_tuned.map_or("0".into(), |n| format!("{:.2} M", n as f64 / 1e6));
        let mut row = vec![model.name.clone(), tuned];
        for (_, tasks) in &averages {
            let own = average(model, tasks);
            row.push(own.as_ref().map_or("-".into(), shown));
            if has_teacher {
                let teacher = average(models[0], tasks).map(|s| s.value);
                let percent = own.zip(teacher).map(|(own, teacher)| format!("{:.1}", 100.0 * own.value / teacher));
                row.push(percent.unwrap_or_else(|| "-".into()));
            }
        }
        row.extend(tasks.iter().map(|task| headline(model, task).map_or("-".into(), shown)));
        table.row(row);
    }
    table
}

/// Share of right answers by length, one row a model and probe.
pub fn recall_table(models: &[&ModelScores]) -> Table {
    let lengths = lengths(models);
    let head = ["model".to_owned(), "probe".to_owned()].into_iter().chain(lengths.iter().map(|&l| tokens(l)));
    let mut table = Table::new(head);
    for model in models {
        for scores in &model.recall {
            let cells = lengths.iter().map(|&l| scores.at(l).map_or("-".into(), |x| format!("{:.0}", 100.0 * x)));
            table.row([model.name.clone(), scores.probe.clone()].into_iter().chain(cells));
        }
    }
    table
}

fn lengths(models: &[&ModelScores]) -> Vec<usize> {
    let mut lengths: Vec<usize> =
        models.iter().flat_map(|m| &m.recall).flat_map(|r| &r.cells).map(|cell| cell.length).collect();
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}

fn tokens(length: usize) -> String {
    if length >= 1024 && length.is_multiple_of(1024) { format!("{}K", length / 1024) } else { length.to_string() }
}

/// The report of all runs: models of the same name in several runs are shown run by run.
pub fn comparison(runs: &[EvaluationRun], conversions: &[ConversionReport]) -> Document {
    let heading = |text: &str| Block::Heading(text.into());
    let mut blocks = Vec::new();
    let with_tasks: Vec<&EvaluationRun> =
        runs.iter().filter(|run| run.models.iter().any(|m| !m.tasks.is_empty())).collect();
    if !with_tasks.is_empty() {
        blocks.push(heading("Benchmarks"));
        blocks
            .push(Block::Text("Accuracies in percent with standard errors; the headline metric of each task.".into()));
    }
    // The first run's teacher stands for all: its row comes first.
    let models: Vec<&ModelScores> = with_tasks.iter().flat_map(|run| &run.models).collect();
    let has_teacher = models.len() > 1 && models.first().is_some_and(|m| m.liger.is_none());
    if !models.is_empty() {
        blocks.push(Block::Table(recovery_table(&models, has_teacher)));
        for run in &with_tasks {
            if let Some(limit) = run.limit {
                blocks.push(Block::Text(format!("Only the first {limit} items of each task: {}", run.command)));
            }
        }
    }
    for run in runs {
        if let Some(long) = &run.long_text {
            blocks.push(heading("By position in a long text"));
            blocks.push(Block::Text(long.description.clone()));
            plot(&mut blocks, "perplexity", perplexity_plot(&long.buckets, &long.scores));
            blocks.push(Block::Text("Perplexity".into()));
            blocks.push(Block::Table(position_table(&long.buckets, &long.scores, |s| &s.perplexity)));
            if long.scores.len() > 1 {
                blocks.push(Block::Text(format!("KL to {}, nats", long.scores[0].name)));
                blocks.push(Block::Table(position_table(&long.buckets, &long.scores[1..], |s| &s.kl)));
                blocks.push(Block::Text(format!(
                    "Share of tokens where the most likely one is that of {}",
                    long.scores[0].name
                )));
                blocks.push(Block::Table(position_table(&long.buckets, &long.scores[1..], |s| &s.agreement)));
            }
            greedy(&mut blocks, run);
        }
    }
    recall(&mut blocks, runs);
    costs(&mut blocks, runs);
    branches(&mut blocks, runs);
    tuning(&mut blocks, conversions);
    blocks.push(heading("How this was measured"));
    for run in runs {
        blocks.push(Block::Text(run.machine.clone()));
        blocks.push(Block::Code(run.command.clone()));
        let mut table = Table::new(["model", "files", "hash"]);
        for model in &run.models {
            table.row([model.name.clone(), model.path.clone(), model.hash.clone()]);
        }
        blocks.push(Block::Table(table));
    }
    for conversion in conversions {
        blocks.push(Block::Text(format!("{}, {}", conversion.model, conversion.machine)));
        blocks.push(Block::Code(conversion.command.clone()));
    }
    let name = runs.first().and_then(|run| run.models.first()).map_or("models".into(), |m| m.name.clone());
    Document { title: format!("What was kept of {name}"), blocks }
}

fn plot(blocks: &mut Vec<Block>, file: &str, plot: Plot) {
    if let Some(svg) = plot.to_svg() {
        // Several runs have a plot of the same kind.
        let same = |block: &&Block| matches!(block, Block::Plot(other, ..) if other.starts_with(file));
        let file = match blocks.iter().filter(same).count() {
            0 => file.to_owned(),
            before => format!("{file}-{}", before + 1),
        };
        blocks.push(Block::Plot(file, plot.title, svg));
    }
}

fn greedy(blocks: &mut Vec<Block>, run: &EvaluationRun) {
    let Some(long) = run.long_text.as_ref().filter(|long| !long.greedy.is_empty()) else { return };
    blocks.push(Block::Text(format!(
        "Both write greedily after the same prompt: tokens until the first that is not that of {}, of {}",
        long.scores[0].name, long.greedy[0].written
    )));
    let mut prompts: Vec<usize> = long.greedy.iter().map(|g| g.prompt).collect();
    prompts.sort_unstable();
    prompts.dedup();
    let head = std::iter::once("after a prompt of".to_owned()).chain(prompts.iter().map(|&p| tokens(p)));
    let mut table = Table::new(head);
    for scores in &long.scores[1..] {
        let cell = |&prompt: &usize| {
            let own = long.greedy.iter().find(|g| g.name == scores.name && g.prompt == prompt);
            own.map_or("-".into(), |g| format!("{:.1}", g.until_first_difference))
        };
        table.row(std::iter::once(scores.name.clone()).chain(prompts.iter().map(cell)));
    }
    blocks.push(Block::Table(table));
}

/// The models of all runs that have something to show; `None` if none has.
fn models_with(runs: &[EvaluationRun], has: impl Fn(&ModelScores) -> bool) -> Option<Vec<&ModelScores>> {
    let models: Vec<&ModelScores> = runs.iter().flat_map(|run| &run.models).filter(|model| has(model)).collect();
    (!models.is_empty()).then_some(models)
}

fn recall(blocks: &mut Vec<Block>, runs: &[EvaluationRun]) {
    let Some(models) = models_with(runs, |m| !m.recall.is_empty()) else { return };
    let lengths = lengths(&models);
    let rows = models.iter().flat_map(|model| {
        let lengths = &lengths;
        model.recall.iter().map(move |scores| {
            (format!("{}, {}", model.name, scores.probe), lengths.iter().map(|&l| scores.at(l)).collect())
        })
    });
    let map = HeatMap {
        title: "Recall, percent right".into(),
        x: "tokens of the text".into(),
        columns: lengths.iter().map(|&l| tokens(l)).collect(),
        rows: rows.collect(),
    };
    blocks.push(Block::Heading("Recall".into()));
    if let Some(svg) = map.to_svg() {
        blocks.push(Block::Plot("recall".into(), map.title.clone(), svg));
    }
    blocks.push(Block::Table(recall_table(&models)));
    let mut by_depth = Table::new(
        ["model", "probe"]
            .map(str::to_owned)
            .into_iter()
            .chain(crate::DEPTHS.map(|d| format!("depth {:.0} %", 100.0 * d))),
    );
    for model in &models {
        for scores in &model.recall {
            let cells = crate::DEPTHS.map(|depth| {
                let own = || scores.cells.iter().filter(move |cell| cell.depth == depth);
                let (right, items): (usize, usize) = (own().map(|c| c.right).sum(), own().map(|c| c.items).sum());
                format!("{:.0}", 100.0 * right as f64 / items.max(1) as f64)
            });
            by_depth.row([model.name.clone(), scores.probe.clone()].into_iter().chain(cells));
        }
    }
    blocks.push(Block::Text("The same over all lengths, by where in the text the answer is:".into()));
    blocks.push(Block::Table(by_depth));
}

fn costs(blocks: &mut Vec<Block>, runs: &[EvaluationRun]) {
    let Some(models) = models_with(runs, |m| !m.costs.is_empty()) else { return };
    blocks.push(Block::Heading("Time and memory of a token".into()));
    let lines: Vec<(&str, &[crate::StepCost])> = models.iter().map(|m| (m.name.as_str(), m.costs.as_slice())).collect();
    plot(blocks, "memory", memory_plot(&lines));
    let time = models.iter().map(|m| Line {
        name: m.name.clone(),
        points: m.costs.iter().map(|c| (c.context as f64, c.milliseconds)).collect(),
    });
    let time = Plot {
        title: "Time of a token".into(),
        x: Axis::logarithmic("tokens so far"),
        y: Axis::linear("milliseconds"),
        lines: time.collect(),
    };
    plot(blocks, "time", time);
    let mut table = Table::new(["model", "after", "ms a token", "MiB"]);
    for model in models {
        for cost in &model.costs {
            table.row([
                model.name.clone(),
                format!("{} tokens", cost.context),
                format!("{:.2}", cost.milliseconds),
                format!("{:.2}", crate::conversion::mebibytes(cost.state_bytes)),
            ]);
        }
    }
    blocks.push(Block::Table(table));
}

fn branches(blocks: &mut Vec<Block>, runs: &[EvaluationRun]) {
    let Some(models) = models_with(runs, |m| m.branches.iter().any(|b| b.recurrent > 0.0)) else { return };
    blocks.push(Block::Heading("What each branch does".into()));
    let ratio = models.iter().map(|m| Line {
        name: m.name.clone(),
        points: m.branches.iter().map(|b| (b.layer as f64, b.recurrent / b.window.max(1e-12))).collect(),
    });
    let ratio = Plot {
        title: "Recurrent branch over window branch, root mean squares".into(),
        x: Axis::linear("layer"),
        y: Axis::logarithmic("ratio"),
        lines: ratio.collect(),
    };
    plot(blocks, "branches", ratio);
    // Powers of the square root of two.
    let bin = |life: f64| (2.0 * life.clamp(0.5, 1e9).log2()).round() as i32;
    let lives = models.iter().map(|m| {
        let all: Vec<f64> = m.branches.iter().flat_map(|b| &b.half_lives).copied().collect();
        let bins = |at: i32| all.iter().filter(|&&life| bin(life) == at).count() as f64 / all.len().max(1) as f64;
        let first = all.iter().map(|&l| bin(l)).min().unwrap_or(0);
        let last = all.iter().map(|&l| bin(l)).max().unwrap_or(0);
        let points = (first - 1..=last + 1).map(|at| (2f64.powf(f64::from(at) / 2.0), 100.0 * bins(at)));
        Line { name: m.name.clone(), points: points.collect() }
    });
    let lives = Plot {
        title: "Half-lives of the gates".into(),
        x: Axis::logarithmic("tokens"),
        y: Axis::linear("percent of heads"),
        lines: lives.collect(),
    };
    plot(blocks, "half-lives", lives);
}

fn tuning(blocks: &mut Vec<Block>, conversions: &[ConversionReport]) {
    if conversions.is_empty() {
        return;
    }
    blocks.push(Block::Heading("Tuning".into()));
    let steps = |points: &[(u64, f64)]| points.iter().map(|(x, y)| (*x as f64, *y)).collect::<Vec<_>>();
    let lines = conversions.iter().map(|c| Line { name: c.model.clone(), points: steps(&c.losses) });
    let loss = Plot {
        title: "Loss while tuning".into(),
        x: Axis::linear("step"),
        y: Axis::linear("nats"),
        lines: lines.collect(),
    };
    plot(blocks, "loss", loss);
    for conversion in conversions {
        blocks.push(Block::Text(format!("{}: {}", conversion.model, conversion.tuning)));
        blocks.push(Block::Table(conversion.perplexity_table()));
    }
}
