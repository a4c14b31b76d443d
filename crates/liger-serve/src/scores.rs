//! Log-probabilities of tokens, as OpenAI's completions give them back.

use liger_model::{Result, Tokenizer};
use serde_json::{Map, Value, json};

/// What a request asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    /// The most likely tokens at each place, besides the one that is there.
    pub(crate) top: usize,
    /// Whether the prompt is part of the answer.
    pub(crate) echo: bool,
}

/// A token and its log-probability; `None` for a text's first token, which nothing predicts.
#[derive(Debug)]
pub(crate) struct TokenScore {
    text: String,
    logprob: Option<f32>,
    top: Vec<(String, f32)>,
}

impl TokenScore {
    /// The first token of a text.
    pub(crate) fn first(tokenizer: &Tokenizer, id: u32) -> Result<Self> {
        Ok(Self { text: tokenizer.decode(&[id], false)?, logprob: None, top: Vec::new() })
    }

    /// A token where `logits [V]` say what comes.
    pub(crate) fn of(tokenizer: &Tokenizer, logits: &[f32], id: u32, top: usize) -> Result<Self> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|x| f64::from(x - largest).exp()).sum();
        let all = f64::from(largest) + sum.ln();
        let logprob = |id: usize| logits.get(id).map_or(f32::NEG_INFINITY, |&x| (f64::from(x) - all) as f32);
        let top = top.min(logits.len());
        let mut order = Vec::new();
        if top > 0 {
            order.extend(0..logits.len());
            order.select_nth_unstable_by(top - 1, |&a, &b| logits[b].total_cmp(&logits[a]));
        }
        order.truncate(top);
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let named = |id: usize| Ok((tokenizer.decode(&[id as u32], false)?, logprob(id)));
        let mut list = order.into_iter().map(named).collect::<Result<Vec<_>>>()?;
        let own = named(id as usize)?;
        if top > 0 && !list.contains(&own) {
            list.push(own.clone());
        }
        Ok(Self { text: own.0, logprob: Some(own.1), top: list })
    }
}

/// The `logprobs` object of a completion's choice; `offset` is how many characters of the text came before.
pub(crate) fn of_completion(scores: &[TokenScore], offset: &mut usize) -> Value {
    let offsets = scores.iter().map(|score| {
        let at = *offset;
        *offset += score.text.chars().count();
        at
    });
    let offsets: Vec<usize> = offsets.collect();
    let top = scores.iter().map(|score| {
        let mut map = Map::new();
        // Of tokens that look alike, such as parts of a character, the likeliest is named.
        for (text, logprob) in &score.top {
            map.entry(text.clone()).or_insert_with(|| json!(logprob));
        }
        if score.logprob.is_some() { Value::Object(map) } else { Value::Null }
    });
    json!({
        "tokens": scores.iter().map(|s| s.text.as_str()).collect::<Vec<_>>(),
        "token_logprobs": scores.iter().map(|s| s.logprob).collect::<Vec<_>>(),
        "top_logprobs": top.collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

/// The `logprobs` object of a chat's choice.
pub(crate) fn of_chat(scores: &[TokenScore], top: usize) -> Value {
    let one = |text: &str, logprob: Option<f32>| json!({"token": text, "logprob": logprob, "bytes": text.as_bytes()});
    let content = scores.iter().map(|score| {
        let mut token = one(&score.text, score.logprob);
        let likeliest = score.top.iter().take(top).map(|(text, logprob)| one(text, Some(*logprob)));
        token["top_logprobs"] = likeliest.collect();
        token
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}
