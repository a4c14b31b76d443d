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

/// What the model writes after each prompt, and how many prompts did not fit and lost their beginning.
/// `tell(prompts done)` is called as it goes.
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
) -> Result<(Vec<String>, usize)> {
    // The same prompt with another end is another request.
    let request = |prompt: &str| format!("{}\u{0}{}\u{0}{prompt}", until.max_tokens, until.strings.join("\u{0}"));
    let room = room(subject, until);
    let encoded = prompts.iter().map(|prompt| tokenizer.encode(prompt, true)).collect::<Result<Vec<_>>>()?;
    let cut = encoded.iter().filter(|ids| ids.len() > room).count();
    let encoded: Vec<&[u32]> = encoded.iter().map(|ids| &ids[ids.len().saturating_sub(room)..]).collect();
    let mut written = vec![None; prompts.len()];
    for (text, prompt) in written.iter_mut().zip(prompts) {
        *text = cache.as_ref().and_then(|cache| cache.text(&request(prompt))).map(str::to_owned);
    }
    let open: Vec<usize> = (0..prompts.len()).filter(|&i| written[i].is_none()).collect();
    let mut done = prompts.len() - open.len();
    for batch in open.chunks(SLOTS) {
        let texts = write_batch(subject, tokenizer, &batch.iter().map(|&i| encoded[i]).collect::<Vec<_>>(), until)?;
        for (&i, text) in batch.iter().zip(texts) {
            if let Some(cache) = cache.as_deref_mut() {
                cache.keep_text(&request(&prompts[i]), &text)?;
            }
            written[i] = Some(text);
        }
        done += batch.len();
        tell(done);
    }
    Ok((written.into_iter().map(Option::unwrap_or_default).collect(), cut))
}

/// Tokens of a prompt that leave place for what is written.
fn room(subject: &Subject<'_>, until: &Until<'_>) -> usize {
    let limit = subject.decoder.context_limit();
    limit.map_or(usize::MAX, |limit| limit.saturating_sub(until.max_tokens).max(1))
}

fn write_batch(
    subject: &Subject<'_>,
    tokenizer: &Tokenizer,
    prompts: &[&[u32]],
    until: &Until<'_>,
) -> Result<Vec<String>> {
    let mut ids: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
    let mut texts = vec![String::new(); prompts.len()];
    write_greedily(subject, prompts, &mut |slot, id| {
        if until.ids.contains(&id) {
            return Ok(false);
        }
        ids[slot].push(id);
        texts[slot] = tokenizer.decode(&ids[slot], true)?;
        if let Some(end) = until.strings.iter().filter_map(|s| texts[slot].find(s.as_str())).min() {
            texts[slot].truncate(end);
            return Ok(false);
        }
        Ok(ids[slot].len() < until.max_tokens)
    })?;
    Ok(texts)
}

/// Writes after all prompts side by side; `take(prompt's number, token)` says whether that text goes on.
pub(crate) fn write_greedily(
    subject: &Subject<'_>,
    prompts: &[&[u32]],
    take: &mut dyn FnMut(usize, u32) -> Result<bool>,
) -> Result<()> {
    let decoder = subject.decoder;
    let generator = Generator { decoder, adapter: subject.adapter };
    let mut state = decoder.new_state(prompts.len().max(1))?;
    let mut written = Vec::with_capacity(prompts.len());
    for (slot, prompt) in prompts.iter().enumerate() {
        let logits = generator.prefill(&mut state, slot, prompt)?;
        // The last of equals, as the device's argmax.
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        written.push((slot, best.map_or(0, |(id, _)| id as u32)));
    }
    loop {
        let mut going_on = Vec::with_capacity(written.len());
        for &(slot, id) in &written {
            if take(slot, id)? {
                going_on.push((slot, id));
            }
        }
        if going_on.is_empty() {
            return Ok(());
        }
        let best = decoder.ops().argmax(generator.step(&mut state, &going_on)?)?;
        written = going_on.iter().zip(best).map(|(&(slot, _), id)| (slot, id)).collect();
    }
}
