//! The program `liger`. One file a verb in `verbs/`; the work is done by the other crates.

mod common;
mod fetch;
mod hub;
mod interrupt;
mod progress;
mod verbs;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Exit code of a mistake that the user can mend.
const USER_ERROR: u8 = 2;
/// Exit code after Ctrl-C.
const INTERRUPTED: u8 = 130;

#[derive(Parser)]
#[command(
    name = "liger",
    version,
    about = "Turns a pretrained Transformer LLM into a gated linear recurrent model that decodes in constant memory",
    after_help = "Example: liger linearize SmolLM2-135M-Instruct.Q4_1.gguf --data self --recipe quickstart --out smollm2-liger"
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Linearize(Box<verbs::linearize::Args>),
    Convert(verbs::convert::Args),
    Fuse(verbs::fuse::Args),
    Export(verbs::export::Args),
    Generate(verbs::generate::Args),
    Chat(verbs::chat::Args),
    Eval(verbs::eval::Args),
    Report(verbs::report::Args),
    Serve(verbs::serve::Args),
    Info(verbs::info::Args),
    Logits(verbs::logits::Args),
    Bench(verbs::bench::Args),
    /// Print a completion script for a shell.
    #[command(after_help = "Example: liger completions bash > /etc/bash_completion.d/liger")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().verb {
        Verb::Linearize(args) => verbs::linearize::run(&args),
        Verb::Convert(args) => verbs::convert::run(&args),
        Verb::Fuse(args) => verbs::fuse::run(&args),
        Verb::Export(args) => verbs::export::run(&args),
        Verb::Generate(args) => verbs::generate::run(&args),
        Verb::Chat(args) => verbs::chat::run(&args),
        Verb::Eval(args) => verbs::eval::run(&args),
        Verb::Report(args) => verbs::report::run(&args),
        Verb::Serve(args) => verbs::serve::run(&args),
        Verb::Info(args) => verbs::info::run(&args),
        Verb::Logits(args) => verbs::logits::run(&args),
        Verb::Bench(args) => verbs::bench::run(&args),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "liger", &mut script);
            common::print(&String::from_utf8_lossy(&script))
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<interrupt::Interrupted>() => {
            eprintln!("{error:#}");
            ExitCode::from(INTERRUPTED)
        }
        // Somebody closed the pipe that we write to: `liger ... | head` is no mistake.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(USER_ERROR)
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let is_pipe = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    error.downcast_ref::<std::io::Error>().is_some_and(is_pipe)
}
