use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use liger_eval::{ConversionReport, EvaluationRun, comparison};

use crate::common::print;

/// One page of evaluations and conversions: tables, plots, commands.
#[derive(clap::Args)]
#[command(after_help = "Example: liger report teacher.json student.json smollm2-liger --out report")]
pub struct Args {
    /// Files of `liger eval --out`, and folders of `liger linearize`
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// Folder to write report.html, report.md and the plots to
    #[arg(long, short, default_value = "report")]
    out: PathBuf,
}

pub fn run(args: &Args) -> Result<()> {
    let (mut runs, mut conversions) = (Vec::new(), Vec::new());
    for path in &args.runs {
        if !path.is_dir() {
            runs.push(EvaluationRun::read(path)?);
            continue;
        }
        let file = path.join("report.json");
        if !file.exists() {
            bail!(
                "{}: no report.json; give a folder of `liger linearize` or a file of `liger eval --out`",
                path.display()
            );
        }
        let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let report: ConversionReport =
            serde_json::from_str(&text).with_context(|| format!("{}: not a conversion's report", file.display()))?;
        conversions.push(report);
    }
    if args.out.is_file() {
        bail!("{}: a file; give a folder to write to", args.out.display());
    }
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    comparison(&runs, &conversions).write(&args.out)?;
    print(&format!("{o}/report.html and {o}/report.md\n", o = args.out.display()))
}
