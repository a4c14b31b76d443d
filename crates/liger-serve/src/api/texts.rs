//! From a request to the texts that are written for it: prompts, conversations, kept states.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use liger_model::{GenerateOptions, Message, Sampling};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::unbounded_channel;

use super::answer::{self, Coming, Head, stream_out, whole};
use super::request::{ChatRequest, Common, CompletionRequest, Prompt, parse};
use super::states::{self, Kept};
use super::{App, encode, now};
use crate::engine::{Event, Work};
use crate::error::Refusal;
use crate::metrics::Metrics;
use crate::states::About;

/// Which of the two kinds of answer is built.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Kind {
    Completion,
    Chat,
}

/// The model's chat template; parts of a turn are joined, as templates expect one text.
pub(super) fn render(
    app: &App,
    messages: &[Value],
    tools: Option<&[Value]>,
    answer_next: bool,
) -> Result<String, Refusal> {
    let invalid = |message: String| Refusal::invalid(Some("messages"), message);
    let Some(template) = &app.tokenizer.chat else {
        return Err(invalid("this model has no chat template; use /v1/completions".into()));
    };
    if messages.is_empty() {
        return Err(invalid("`messages`: expected at least one".into()));
    }
    let mut turns = messages.to_vec();
    for turn in &mut turns {
        if turn.get("role").and_then(Value::as_str).is_none() {
            return Err(invalid("`messages`: expected objects with a `role`".into()));
        }
        let calls_tools = turn.get("tool_calls").is_some_and(|calls| !calls.is_null());
        let text = match turn.get("content") {
            Some(Value::String(text)) => Some(text.clone()),
            Some(Value::Array(parts)) => parts.iter().map(|part| part.get("text")?.as_str()).collect(),
            None | Some(Value::Null) if calls_tools => Some(String::new()),
            _ => None,
        };
        turn["content"] = json!(text.ok_or_else(|| invalid("`content`: expected a text or parts of text".into()))?);
    }
    template.render_with_tools(&turns, tools, answer_next).map_err(|e| invalid(e.to_string()))
}

pub(super) async fn completions(
    State(app): State<Arc<App>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Refusal> {
    let CompletionRequest { prompt, common } = parse(body)?;
    common.check(&app.name, Kind::Completion)?;
    let start = Start::asked_for(&app, &common).await?;
    let encode = |text: &String| encode(&app, text, start.is_none());
    let prompts = match prompt {
        Prompt::Text(text) => vec![encode(&text)?],
        Prompt::Ids(ids) => vec![ids],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::IdLists(lists) => lists,
    };
    write_texts(&app, prompts, &common, Kind::Completion, start, Vec::new()).await
}

pub(super) async fn chat(
    State(app): State<Arc<App>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Refusal> {
    let ChatRequest { messages, tools, common } = parse(body)?;
    common.check(&app.name, Kind::Chat)?;
    let start = Start::asked_for(&app, &common).await?;
    let tools = tools.filter(|tools| common.shows_tools() && !tools.is_empty());
    let (text, messages) = conversation(&app, start.as_ref(), messages, tools.as_deref(), true)?;
    let prompt = encode(&app, &text, false)?;
    write_texts(&app, vec![prompt], &common, Kind::Chat, start, messages).await
}

/// What the state has not taken in yet of a conversation, and all of its turns: those of the state, and the new ones.
fn conversation(
    app: &App,
    start: Option<&Start>,
    new: Vec<Value>,
    tools: Option<&[Value]>,
    answer_next: bool,
) -> Result<(String, Vec<Message>), Refusal> {
    let earlier = start.map_or(&[][..], |start| &start.about.messages);
    if start.is_some() && earlier.is_empty() {
        return Err(Refusal::invalid(Some("state_id"), "the state is of a text, not of a conversation"));
    }
    let mut all: Vec<Value> = earlier.iter().map(|m| json!({"role": m.role, "content": m.content})).collect();
    all.extend(new);
    let text = render(app, &all, tools, answer_next)?;
    let turn = |turn: &Value| {
        let field = |name: &str| turn.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        Message { role: field("role"), content: field("content") }
    };
    let messages = all.iter().map(turn).collect();
    let Some(start) = start else { return Ok((text, messages)) };
    match text.strip_prefix(&start.about.text) {
        Some(rest) if !rest.is_empty() => Ok((rest.to_owned(), messages)),
        _ => {
            let message = "the model's chat template does not continue the state's text; send the whole conversation";
            Err(Refusal { status: StatusCode::CONFLICT, message: message.into(), param: Some("state_id") })
        }
    }
}

/// A kept state that a text goes on from.
struct Start {
    state: Arc<liger_model::State>,
    about: About,
}

impl Start {
    async fn load(app: &Arc<App>, id: Option<&String>) -> Result<Option<Self>, Refusal> {
        let Some(id) = id else { return Ok(None) };
        let (state, about) = states::load(app, id).await?;
        Ok(Some(Self { state, about }))
    }

    async fn asked_for(app: &Arc<App>, common: &Common) -> Result<Option<Self>, Refusal> {
        if common.keep_state {
            states::store(app)?;
        }
        Self::load(app, common.state_id.as_ref()).await
    }
}

/// What is known of a text when `text` of `tokens` has come after the start.
fn known(start: Option<&Start>, text: &str, tokens: usize, messages: Vec<Message>, is_chat: bool) -> Kept {
    let (before, earlier) = start.map_or(("", 0), |start| (&start.about.text, start.about.tokens));
    Kept { text: before.to_owned() + text, tokens: earlier + tokens, messages, is_chat }
}

fn hand_over(app: &App, work: Work) -> Result<(), Refusal> {
    Metrics::add(&app.metrics.requests, 1);
    app.work.try_send(work).map_err(|e| match e {
        TrySendError::Full(_) => {
            Metrics::add(&app.metrics.refused, 1);
            Refusal::new(StatusCode::TOO_MANY_REQUESTS, "too many requests wait; come again")
        }
        TrySendError::Closed(_) => Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping"),
    })
}

async fn write_texts(
    app: &Arc<App>,
    prompts: Vec<Vec<u32>>,
    common: &Common,
    kind: Kind,
    start: Option<Start>,
    messages: Vec<Message>,
) -> Result<Response, Refusal> {
    let options = common.options(&app.stop_ids, if kind == Kind::Chat { 1024 } else { 16 })?;
    let scores = common.scores(kind)?;
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        return Err(Refusal::invalid(Some("prompt"), "the prompt is empty"));
    }
    if common.keep_state && prompts.len() > 1 {
        return Err(Refusal::invalid(Some("keep_state"), "`keep_state` does not go with several prompts"));
    }
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    let broken = |e: liger_model::Error| Refusal::invalid(Some("prompt"), e.to_string());
    let kept = match (common.keep_state, prompts.first()) {
        (true, Some(prompt)) => {
            let text = app.tokenizer.decode(prompt, false).map_err(broken)?;
            Some(known(start.as_ref(), &text, prompt.len(), messages, kind == Kind::Chat))
        }
        _ => None,
    };
    let mut texts = Vec::with_capacity(prompts.len() * common.answers());
    for prompt in prompts {
        let echo = if common.echoes() { app.tokenizer.decode(&prompt, false).map_err(broken)? } else { String::new() };
        for number in 0..common.answers() {
            let (sender, events) = unbounded_channel();
            let mut options = options.clone();
            options.seed = options.seed.wrapping_add(number as u64);
            hand_over(
                app,
                Work {
                    prompt: prompt.clone(),
                    options,
                    stop: common.stop(),
                    scores,
                    start: start.as_ref().map(|start| start.state.clone()),
                    keeps: common.keep_state,
                    asked_at: Instant::now(),
                    events: sender,
                },
            )?;
            texts.push(Coming { echo: echo.clone(), events });
        }
    }
    let name = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    let id = format!("{name}-{:016x}", rand::random::<u64>());
    let head = Head { app: app.clone(), kind, id, created: now(), prompt_tokens, scores, kept };
    if common.streams() { Ok(stream_out(head, texts)) } else { whole(head, texts).await }
}

#[derive(Deserialize)]
struct StateRequest {
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    state_id: Option<String>,
}

/// Keeps the state of a text that is read, after another state or from the beginning; or brings a file back.
pub(super) async fn create_state(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, Refusal> {
    if headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/octet-stream") {
        return states::restore(State(app), body).await;
    }
    let request: StateRequest = parse(body)?;
    states::store(&app)?;
    let start = Start::load(&app, request.state_id.as_ref()).await?;
    let (text, messages, begins) = match (request.prompt, request.messages) {
        (Some(text), None) => (text, Vec::new(), start.is_none()),
        (None, Some(messages)) => {
            let (text, messages) = conversation(&app, start.as_ref(), messages, None, false)?;
            (text, messages, false)
        }
        _ => return Err(Refusal::invalid(Some("prompt"), "expected either `prompt` or `messages`")),
    };
    let prompt = encode(&app, &text, begins)?;
    if prompt.is_empty() {
        return Err(Refusal::invalid(Some("prompt"), "the prompt is empty"));
    }
    let kept = known(start.as_ref(), &text, prompt.len(), messages, false);
    let (sender, mut events) = unbounded_channel();
    let options = GenerateOptions { max_tokens: 0, sampling: Sampling::default(), seed: 0, stop_ids: Vec::new() };
    let start = start.map(|start| start.state);
    let asked_at = Instant::now();
    hand_over(
        &app,
        Work { prompt, options, stop: Vec::new(), scores: None, start, keeps: true, asked_at, events: sender },
    )?;
    while let Some(event) = events.recv().await {
        match event {
            Event::Kept { state, written } => {
                let (id, about) = states::keep(&app, Some(&kept), *state, &written).await?;
                return states::describe(&app, &id, &about).map(Json);
            }
            Event::Failed(failure) => return Err(answer::refusal(failure)),
            _ => {}
        }
    }
    Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the text was lost"))
}
