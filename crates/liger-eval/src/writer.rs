//! Texts that a model writes, greedily, many side by side: lm-evaluation-harness's `generate_until`.

use liger_model::{Generator, Result, Tokenizer};

use crate::{Cache, Subject};

/// Texts side by side.
const SLOTS: usize = 32;

/// Where writing ends.
pub struct Until<'a> {
    /// At one of these texts, which is not part of it.
    pub strings: &'a [String],
    /// At one of these tokens.
    pub ids: &'a [u32],
    /// After this many tokens.
    pub max_tokens: usize,
}

/// What the model writes after each prompt. A prompt that does not fit loses its beginning. `tell(prompts done)` is called
/// as it goes.
///
/// # Errors
/// If the device or the tokenizer fails, or the cache cannot be written.
pub fn generate_until(
    subject: &Subject<'_>,
    tokenizer: &Tokenizer,
    prompts: &[String],
    until: &Until<'_>,
    mut cache: Option<&mut Cache>,
    tell: &mut dyn FnMut(usize),
) -> Result<Vec<String>> {
    // The same prompt with another end is another request.
    let request = |prompt: &str| format!("{}\u{0}{}\u{0}{prompt}", until.max_tokens, until.strings.join("\u{0}"));
    let mut written = vec![None; prompts.len()];
    for (text, prompt) in written.iter_mut().zip(prompts) {
        *text = cache.as_ref().and_then(|cache| cache.text(&request(prompt))).map(str::to_owned);
    }
    let open: Vec<usize> = (0..prompts.len()).filter(|&i| written[i].is_none()).collect();
    let mut done = prompts.len() - open.len();
    for batch in open.chunks(SLOTS) {
        let texts = write_batch(subject, tokenizer, batch.iter().map(|&i| prompts[i].as_str()), until)?;
        for (&i, text) in batch.iter().zip(texts) {
            if let Some(cache) = cache.as_deref_mut() {
                cache.keep_text(&request(&prompts[i]), &text)?;
            }
            written[i] = Some(text);
        }
        done += batch.len();
        tell(done);
    }
    Ok(written.into_iter().map(Option::unwrap_or_default).collect())
}

fn write_batch<'a>(
    subject: &Subject<'_>,
    tokenizer: &Tokenizer,
    prompts: impl ExactSizeIterator<Item = &'a str>,
    until: &Until<'_>,
) -> Result<Vec<String>> {
    let decoder = subject.decoder;
    let generator = Generator { decoder, adapter: subject.adapter };
    let mut state = decoder.new_state(prompts.len())?;
    let room = decoder.context_limit().map_or(usize::MAX, |limit| limit.saturating_sub(until.max_tokens).max(1));
    let mut ids: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
    let mut texts = vec![String::new(); prompts.len()];
    let mut writing: Vec<(usize, u32)> = Vec::new();
    for (slot, prompt) in prompts.enumerate() {
        let tokens = tokenizer.encode(prompt, true)?;
        let logits = generator.prefill(&mut state, slot, &tokens[tokens.len().saturating_sub(room)..])?;
        writing.push((slot, largest(&logits)));
    }
    for step in 1.. {
        let mut going_on = Vec::new();
        for (slot, id) in writing {
            if until.ids.contains(&id) {
                continue;
            }
            ids[slot].push(id);
            texts[slot] = tokenizer.decode(&ids[slot], true)?;
            match until.strings.iter().filter_map(|s| texts[slot].find(s.as_str())).min() {
                Some(end) => texts[slot].truncate(end),
                None if step < until.max_tokens => going_on.push((slot, id)),
                None => {}
            }
        }
        if going_on.is_empty() {
            break;
        }
        let best = decoder.ops().argmax(generator.step(&mut state, &going_on)?)?;
        writing = going_on.iter().zip(best).map(|(&(slot, _), id)| (slot, id)).collect();
    }
    Ok(texts)
}

fn largest(logits: &[f32]) -> u32 {
    let take = |best: (usize, f32), (i, &x): (usize, &f32)| if x > best.1 { (i, x) } else { best };
    logits.iter().enumerate().fold((0, f32::NEG_INFINITY), take).0 as u32
}
