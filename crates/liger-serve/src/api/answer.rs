//! How texts go back: whole, or as server-sent events.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::sse::{Event as Chunk, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::App;
use super::states::{Kept, keep};
use super::texts::Kind;
use crate::engine::{Event, Failure, Finish};
use crate::error::Refusal;
use crate::scores::{self, Asked, TokenScore};

/// What every part of an answer begins with.
pub(super) struct Head {
    pub(super) app: Arc<App>,
    pub(super) kind: Kind,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) prompt_tokens: usize,
    pub(super) scores: Option<Asked>,
    /// What is known of the text when its state is to be kept.
    pub(super) kept: Option<Kept>,
}

/// A text on its way, behind what is echoed of its prompt.
pub(super) struct Coming {
    pub(super) echo: String,
    pub(super) events: UnboundedReceiver<Event>,
}

/// Usage so far.
#[derive(Default, Clone, Copy)]
struct Used {
    written: usize,
    cached: usize,
}

impl Used {
    fn add(&mut self, finish: Finish) {
        self.written += finish.tokens;
        self.cached += finish.cached;
    }
}

impl Head {
    fn object(&self, choices: &[Value], usage: Option<Used>, is_chunk: bool) -> Value {
        let object = match (self.kind, is_chunk) {
            (Kind::Completion, _) => "text_completion",
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
        };
        let usage = usage.map(|used| {
            json!({"prompt_tokens": self.prompt_tokens, "completion_tokens": used.written,
                "total_tokens": self.prompt_tokens + used.written,
                "prompt_tokens_details": {"cached_tokens": used.cached}})
        });
        json!({"id": self.id, "object": object, "created": self.created, "model": self.app.name, "choices": choices,
            "usage": usage})
    }

    fn choice(&self, index: usize, text: &str, finish: Option<Finish>, logprobs: Value, is_chunk: bool) -> Value {
        let reason = finish.map(|finish| if finish.at_limit { "length" } else { "stop" });
        let (name, content) = match (self.kind, is_chunk) {
            (Kind::Completion, _) => ("text", json!(text)),
            (Kind::Chat, false) => ("message", json!({"role": "assistant", "content": text, "refusal": null})),
            (Kind::Chat, true) if finish.is_some() => ("delta", json!({})),
            (Kind::Chat, true) => ("delta", json!({"role": "assistant", "content": text})),
        };
        json!({"index": index, name: content, "finish_reason": reason, "logprobs": logprobs})
    }

    fn logprobs(&self, scores: &[TokenScore], offset: &mut usize) -> Value {
        match (self.scores, self.kind) {
            (None, _) => Value::Null,
            (Some(_), Kind::Completion) => scores::of_completion(scores, offset),
            (Some(asked), Kind::Chat) => scores::of_chat(scores, asked.top),
        }
    }
}

/// All texts of one request.
pub(super) async fn whole(head: Head, texts: Vec<Coming>) -> Result<Response, Refusal> {
    let (mut choices, mut used, mut saved) = (Vec::with_capacity(texts.len()), Used::default(), None);
    for (index, Coming { echo: mut text, mut events }) in texts.into_iter().enumerate() {
        let mut scores = Vec::new();
        let finish = loop {
            match events.recv().await {
                Some(Event::Text(piece)) => text.push_str(&piece),
                Some(Event::Score(score)) => scores.push(score),
                Some(Event::Kept { state, written }) => {
                    saved = Some(keep(&head.app, head.kept.as_ref(), *state, &written).await.map(|(id, _)| id));
                }
                Some(Event::Done(finish)) => break finish,
                Some(Event::Failed(failure)) => return Err(refusal(failure)),
                None => return Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the text was lost")),
            }
        };
        used.add(finish);
        let logprobs = head.logprobs(&scores, &mut 0);
        choices.push(head.choice(index, &text, Some(finish), logprobs, false));
    }
    let mut answer = head.object(&choices, Some(used), false);
    add_state(&mut answer, saved);
    Ok(Json(answer).into_response())
}

/// A text was written though its state could not be kept: both are said.
fn add_state(answer: &mut Value, saved: Option<Result<String, Refusal>>) {
    match saved {
        None => {}
        Some(Ok(id)) => answer["state_id"] = json!(id),
        Some(Err(refusal)) => {
            answer["state_id"] = Value::Null;
            answer["state_error"] = json!(refusal.message);
        }
    }
}

/// What broke is said in the server's log: it may name what is nobody else's business.
pub(super) fn refusal(failure: Failure) -> Refusal {
    match failure {
        Failure::Refused(message) => Refusal::invalid(None, message),
        Failure::Late => Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "no slot became free in time; come again"),
        Failure::Broken(message) => {
            super::log("error", &json!({"message": "a text could not be written", "reason": message}));
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the server failed")
        }
    }
}

/// What a stream remembers between two events.
struct Streaming {
    head: Head,
    texts: Vec<Text>,
    used: Used,
    saved: Option<Result<String, Refusal>>,
}

#[derive(Default)]
struct Text {
    scores: Vec<TokenScore>,
    offset: usize,
    is_over: bool,
}

impl Streaming {
    /// What is sent when this happens to a text; whether that was the last.
    async fn take(&mut self, index: usize, event: Option<Event>) -> (Vec<Value>, bool) {
        let Self { head, texts, used, saved } = self;
        let text = &mut texts[index];
        match event {
            Some(Event::Score(score)) => {
                text.scores.push(score);
                (Vec::new(), false)
            }
            Some(Event::Text(piece)) if piece.is_empty() => (Vec::new(), false),
            Some(Event::Text(piece)) => {
                let logprobs = head.logprobs(&std::mem::take(&mut text.scores), &mut text.offset);
                (vec![head.object(&[head.choice(index, &piece, None, logprobs, true)], None, true)], false)
            }
            Some(Event::Kept { state, written }) => {
                *saved = Some(keep(&head.app, head.kept.as_ref(), *state, &written).await.map(|(id, _)| id));
                (Vec::new(), false)
            }
            Some(Event::Done(finish)) => {
                text.is_over = true;
                used.add(finish);
                let rest = std::mem::take(&mut text.scores);
                let logprobs = if rest.is_empty() { Value::Null } else { head.logprobs(&rest, &mut text.offset) };
                let is_last = texts.iter().all(|text| text.is_over);
                let choice = head.choice(index, "", Some(finish), logprobs, true);
                let mut chunk = head.object(&[choice], is_last.then_some(*used), true);
                add_state(&mut chunk, saved.take());
                (vec![chunk], is_last)
            }
            Some(Event::Failed(failure)) => (vec![refusal(failure).body()], true),
            None => (Vec::new(), false),
        }
    }
}

/// Server-sent events: pieces as they come, the ends, the last with the usage, `[DONE]`.
pub(super) fn stream_out(head: Head, texts: Vec<Coming>) -> Response {
    let (mut about, mut streams) = (Vec::new(), Vec::new());
    for (index, Coming { mut events, .. }) in texts.into_iter().enumerate() {
        about.push(Text::default());
        let events = stream::poll_fn(move |context| events.poll_recv(context));
        streams.push(events.map(move |event| (index, event)).boxed());
    }
    let state = Streaming { head, texts: about, used: Used::default(), saved: None };
    let next = async |(mut state, mut events, is_over): (Streaming, stream::SelectAll<_>, bool)| {
        if is_over {
            return None;
        }
        let (chunks, is_over) = match events.next().await {
            Some((index, event)) => state.take(index, Some(event)).await,
            None => (Vec::new(), true),
        };
        let mut lines: Vec<Result<Chunk, Infallible>> =
            chunks.iter().map(|chunk| Ok(Chunk::default().data(chunk.to_string()))).collect();
        if is_over {
            lines.push(Ok(Chunk::default().data("[DONE]")));
        }
        Some((stream::iter(lines), (state, events, is_over)))
    };
    let chunks = stream::unfold((state, stream::select_all(streams), false), next).flatten();
    let mut response = Sse::new(chunks).keep_alive(KeepAlive::default()).into_response();
    // Proxies must not gather the pieces.
    response.headers_mut().insert("x-accel-buffering", header::HeaderValue::from_static("no"));
    response
}
