use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use liger_model::{ChatTemplate, GenerateOptions, Generator, Message, StopStrings, TextStream};

use crate::common::{DeviceArgs, Loaded, SamplingArgs, mebibytes, print};

/// Talk with a model; each line is a turn. /reset begins anew, /quit ends.
#[derive(clap::Args)]
#[command(after_help = "Example: liger chat smollm2-liger --temperature 0.7 --system 'You answer in one sentence.'")]
pub struct Args {
    /// Model folder or GGUF file
    model: PathBuf,
    /// Adapter folder
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// What the model is told first
    #[arg(long)]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// The conversation, and the text of it that the state has seen.
#[derive(Default)]
struct Conversation {
    messages: Vec<Message>,
    seen: String,
}

impl Conversation {
    fn new(system: Option<&str>) -> Self {
        Self { messages: system.map(|text| Message::new("system", text)).into_iter().collect(), seen: String::new() }
    }

    /// The text that the state has to take in for the next answer; all of it (and `true`) if the template rewrites
    /// what was said before.
    fn next_text(&mut self, chat: &ChatTemplate) -> Result<(String, bool)> {
        let whole = chat.render(&self.messages, true)?;
        let new = whole.strip_prefix(self.seen.as_str()).map(str::to_owned);
        let anew = new.is_none();
        let text = new.unwrap_or_else(|| whole.clone());
        self.seen = whole;
        Ok((text, anew))
    }
}

pub fn run(args: &Args) -> Result<()> {
    let sampling = args.sampling.sampling()?;
    let Loaded { checkpoint, decoder, adapter } = Loaded::open(&args.model, args.adapter.as_deref(), &args.device)?;
    let Some(chat) = &checkpoint.tokenizer.chat else {
        bail!("{}: the model has no chat template; use `liger generate --raw`", args.model.display());
    };
    let terminal = std::io::stdin().is_terminal();
    let generator = Generator { decoder: &decoder, adapter: adapter.as_ref() };
    let mut state = decoder.new_state(1)?;
    let mut conversation = Conversation::new(args.system.as_deref());
    if terminal {
        eprintln!("{}; /reset begins anew, /quit or Ctrl-D ends", decoder.ops().describe());
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if terminal {
            eprint!("> ");
        }
        let Some(line) = lines.next() else { return Ok(()) };
        let line = line.context("standard input")?;
        match line.trim() {
            "" => continue,
            "/quit" => return Ok(()),
            "/reset" => {
                conversation = Conversation::new(args.system.as_deref());
                state.reset(0, decoder.ops())?;
                continue;
            }
            _ => conversation.messages.push(Message::new("user", &line)),
        }
        let (text, anew) = conversation.next_text(chat)?;
        if anew {
            state.reset(0, decoder.ops())?;
        }
        let prompt = checkpoint.tokenizer.encode(&text, false)?;
        let options = GenerateOptions {
            max_tokens: args.sampling.max_tokens,
            sampling: sampling.clone(),
            seed: args.sampling.seed.wrapping_add(conversation.messages.len() as u64),
            stop_ids: checkpoint.config.eos_token_ids.clone(),
        };
        let mut stream = TextStream::new(&checkpoint.tokenizer, &prompt);
        let mut stop = StopStrings::new(&args.sampling.stop);
        let (mut answer, mut printed) = (String::new(), Ok(()));
        let produced = generator.generate(&mut state, &prompt, &options, &mut |id| {
            let (piece, stopped) = stop.push(&stream.push(id)?);
            answer.push_str(&piece);
            printed = print(&piece);
            Ok(!stopped && printed.is_ok())
        })?;
        printed?;
        let rest = stop.finish();
        answer.push_str(&rest);
        print(&format!("{rest}\n"))?;
        // The last token of an answer that was cut short has not been taken in yet.
        if produced.len() == options.max_tokens
            && let Some(&last) = produced.last()
        {
            generator.step(&mut state, &[(0, last)])?;
        }
        conversation.seen.push_str(&answer);
        conversation.messages.push(Message::new("assistant", &answer));
        if terminal {
            eprintln!("[{} tokens, state {}]", state.position(0), mebibytes(state.bytes()));
        }
    }
}
