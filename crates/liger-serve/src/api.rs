//! OpenAI's endpoints: what a request says, and how the text goes back.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event as Chunk, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream;
use liger_model::{GenerateOptions, Message, Sampling, Tokenizer};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{Sender, UnboundedReceiver, unbounded_channel};

use crate::engine::{Event, Failure, Finish, Work};
use crate::error::Refusal;
use crate::scores::{self, Asked};

/// Tokens named at each place of `logprobs`, at most.
const MOST_TOP: u64 = 20;

/// What the handlers share.
pub(crate) struct App {
    pub(crate) name: String,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) stop_ids: Vec<u32>,
    pub(crate) work: Sender<Work>,
    pub(crate) api_key: Option<String>,
}

/// The routes; `body` is the most bytes of a request.
pub(crate) fn router(app: App, body: usize) -> Router {
    let app = Arc::new(app);
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(models))
        .layer(middleware::from_fn_with_state(app.clone(), check_key))
        .route("/health", get(async || Json(json!({"status": "ok"}))))
        .fallback(async || Refusal::new(StatusCode::NOT_FOUND, "no such path"))
        .method_not_allowed_fallback(async || Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "not with this method"))
        .layer(DefaultBodyLimit::max(body))
        .with_state(app)
}

async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if let Some(key) = &app.api_key {
        let sent = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let sent = sent.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        if !constant_time_eq::constant_time_eq(sent.as_bytes(), key.as_bytes()) {
            return Refusal::new(StatusCode::UNAUTHORIZED, "the API key is missing or wrong").into_response();
        }
    }
    next.run(request).await
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [{"id": app.name, "object": "model", "created": 0, "owned_by": "liger"}]}))
}

/// One text or several.
#[derive(Deserialize)]
#[serde(untagged, expecting = "`stop`: expected a text or a list of texts")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "`prompt`: expected a text, a list of tokens, or a list of such")]
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    IdLists(Vec<Vec<u32>>),
}

/// What both kinds of request have. Fields that would change the answer and are not obeyed are refused, not ignored.
#[derive(Deserialize)]
struct Common {
    model: Option<String>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    seed: Option<u64>,
    stop: Option<OneOrMany>,
    #[serde(default)]
    stream: bool,
    n: Option<u32>,
    best_of: Option<u32>,
    logprobs: Option<Value>,
    echo: Option<bool>,
    suffix: Option<Value>,
    tools: Option<Value>,
    response_format: Option<Value>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<Value>,
}

#[derive(Deserialize)]
struct CompletionRequest {
    prompt: Prompt,
    #[serde(flatten)]
    common: Common,
}

#[derive(Deserialize)]
struct Turn {
    role: String,
    content: Option<Value>,
}

#[derive(Deserialize)]
struct ChatRequest {
    messages: Vec<Turn>,
    #[serde(flatten)]
    common: Common,
}

impl Common {
    /// What is asked for of log-probabilities: OpenAI's completions count the tokens at each place.
    fn scores(&self) -> Result<Option<Asked>, Refusal> {
        let echo = self.echo == Some(true);
        let value = match &self.logprobs {
            None | Some(Value::Null | Value::Bool(false)) => return Ok(None),
            Some(value) => value,
        };
        let top = value.as_u64().filter(|&top| top <= MOST_TOP).map(|top| top as usize);
        let message = || format!("`logprobs`: found {value}, expected a whole number from 0 to {MOST_TOP}");
        let top = top.ok_or_else(|| Refusal::invalid(Some("logprobs"), message()))?;
        match self.stream {
            true => Err(Refusal::invalid(Some("logprobs"), "`logprobs` does not go with `stream` on this server")),
            false => Ok(Some(Asked { top, echo })),
        }
    }

    fn check(&self, app: &App, kind: Kind) -> Result<(), Refusal> {
        if let Some(model) = self.model.as_ref().filter(|model| **model != app.name) {
            let message = format!("the model `{model}` is not served here; `{}` is", app.name);
            return Err(Refusal { status: StatusCode::NOT_FOUND, message, param: Some("model") });
        }
        let is_set = |value: &Option<Value>| value.as_ref().is_some_and(|v| !v.is_null() && *v != json!(false));
        let is_text = |format: &Value| format.get("type") == Some(&json!("text"));
        let unsupported = [
            ("n", self.n.is_some_and(|n| n != 1)),
            ("best_of", self.best_of.is_some_and(|n| n != 1)),
            ("logprobs", kind == Kind::Chat && is_set(&self.logprobs)),
            ("echo", self.echo == Some(true) && (kind == Kind::Chat || self.stream)),
            ("suffix", is_set(&self.suffix)),
            ("tools", is_set(&self.tools)),
            ("response_format", self.response_format.as_ref().is_some_and(|f| !f.is_null() && !is_text(f))),
            ("presence_penalty", self.presence_penalty.is_some_and(|x| x != 0.0)),
            ("frequency_penalty", self.frequency_penalty.is_some_and(|x| x != 0.0)),
            ("logit_bias", self.logit_bias.as_ref().is_some_and(|b| !b.is_null() && *b != json!({}))),
        ];
        match unsupported.into_iter().find(|(_, is_asked)| *is_asked) {
            Some((param, _)) => {
                Err(Refusal::invalid(Some(param), format!("`{param}` is not supported by this server")))
            }
            None => Ok(()),
        }
    }

    fn options(&self, stop_ids: &[u32], default_tokens: usize) -> Result<GenerateOptions, Refusal> {
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0),
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
        };
        let within = |param, value: f32, low: f32, high: f32| {
            let fits = (low..=high).contains(&value);
            let message = || format!("`{param}`: found {value}, expected a number from {low} to {high}");
            if fits { Ok(()) } else { Err(Refusal::invalid(Some(param), message())) }
        };
        within("temperature", sampling.temperature, 0.0, 100.0)?;
        within("top_p", sampling.top_p, 1e-6, 1.0)?;
        within("min_p", sampling.min_p, 0.0, 1.0)?;
        within("repetition_penalty", sampling.repetition_penalty, 0.01, 100.0)?;
        let max_tokens = self.max_completion_tokens.or(self.max_tokens).unwrap_or(default_tokens);
        if max_tokens == 0 && self.echo != Some(true) {
            return Err(Refusal::invalid(Some("max_tokens"), "`max_tokens`: found 0, expected at least 1"));
        }
        let seed = self.seed.unwrap_or_else(rand::random);
        Ok(GenerateOptions { max_tokens, sampling, seed, stop_ids: stop_ids.to_vec() })
    }

    fn stop(&self) -> Vec<String> {
        match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(text)) => vec![text.clone()],
            Some(OneOrMany::Many(texts)) => texts.clone(),
        }
    }
}

fn parse<T: for<'a> Deserialize<'a>>(body: Result<Bytes, BytesRejection>) -> Result<T, Refusal> {
    let body = body.map_err(|e| Refusal::new(e.status(), "the request is too long, or broke off"))?;
    serde_json::from_slice(&body)
        .map_err(|e| Refusal::invalid(None, format!("the request is not what it must be: {e}")))
}

/// Which of the two kinds of answer is built.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Completion,
    Chat,
}

async fn completions(State(app): State<Arc<App>>, body: Result<Bytes, BytesRejection>) -> Result<Response, Refusal> {
    let request: CompletionRequest = parse(body)?;
    let encode =
        |text: &String| app.tokenizer.encode(text, true).map_err(|e| Refusal::invalid(Some("prompt"), e.to_string()));
    let prompts = match request.prompt {
        Prompt::Text(text) => vec![encode(&text)?],
        Prompt::Ids(ids) => vec![ids],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::IdLists(lists) => lists,
    };
    answer(&app, prompts, &request.common, Kind::Completion, 16).await
}

async fn chat(State(app): State<Arc<App>>, body: Result<Bytes, BytesRejection>) -> Result<Response, Refusal> {
    let request: ChatRequest = parse(body)?;
    let invalid = |message: String| Refusal::invalid(Some("messages"), message);
    let Some(template) = &app.tokenizer.chat else {
        return Err(invalid("this model has no chat template; use /v1/completions".into()));
    };
    let messages: Vec<Message> = request
        .messages
        .iter()
        .map(|turn| {
            Ok(Message::new(&turn.role, &text_of(turn).ok_or_else(|| invalid("`content` must be text".into()))?))
        })
        .collect::<Result<_, Refusal>>()?;
    let text = template.render(&messages, true).map_err(|e| invalid(e.to_string()))?;
    let prompt = app.tokenizer.encode(&text, false).map_err(|e| invalid(e.to_string()))?;
    answer(&app, vec![prompt], &request.common, Kind::Chat, 1024).await
}

/// A text, or OpenAI's list of parts that are all text.
fn text_of(turn: &Turn) -> Option<String> {
    match turn.content.as_ref()? {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts.iter().map(|part| part.get("text")?.as_str()).collect(),
        _ => None,
    }
}

async fn answer(
    app: &App,
    prompts: Vec<Vec<u32>>,
    common: &Common,
    kind: Kind,
    default_tokens: usize,
) -> Result<Response, Refusal> {
    common.check(app, kind)?;
    let options = common.options(&app.stop_ids, default_tokens)?;
    let scores = if kind == Kind::Completion { common.scores()? } else { None };
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        return Err(Refusal::invalid(Some("prompt"), "the prompt is empty"));
    }
    if common.stream && prompts.len() > 1 {
        return Err(Refusal::invalid(Some("prompt"), "`prompt`: several texts do not go with `stream` on this server"));
    }
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    let head = Head { kind, model: app.name.clone(), id: new_id(kind), created: now(), prompt_tokens };
    let mut texts = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let echo = match common.echo {
            Some(true) => app.tokenizer.decode(&prompt, false),
            _ => Ok(String::new()),
        };
        let echo = echo.map_err(|e| Refusal::invalid(Some("prompt"), e.to_string()))?;
        let (sender, events) = unbounded_channel();
        let work = Work { prompt, options: options.clone(), stop: common.stop(), scores, events: sender };
        app.work.try_send(work).map_err(|e| match e {
            TrySendError::Full(_) => Refusal::new(StatusCode::TOO_MANY_REQUESTS, "too many requests wait; come again"),
            TrySendError::Closed(_) => Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping"),
        })?;
        texts.push((echo, events));
    }
    match (common.stream, texts.pop()) {
        (true, Some((_, events))) => Ok(stream_out(head, events)),
        (_, last) => whole(head, texts.into_iter().chain(last).collect(), scores.is_some()).await,
    }
}

/// What every part of an answer begins with.
struct Head {
    kind: Kind,
    model: String,
    id: String,
    created: u64,
    prompt_tokens: usize,
}

impl Head {
    fn object(&self, choices: &[Value], usage: Option<usize>, is_chunk: bool) -> Value {
        let object = match (self.kind, is_chunk) {
            (Kind::Completion, _) => "text_completion",
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
        };
        let usage = usage.map(|tokens| {
            json!({"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens,
                "total_tokens": self.prompt_tokens + tokens})
        });
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
            "usage": usage})
    }

    fn choice(&self, text: &str, finish: Option<Finish>, is_chunk: bool) -> Value {
        let reason = finish.map(|finish| if finish.at_limit { "length" } else { "stop" });
        match (self.kind, is_chunk) {
            (Kind::Completion, _) => json!({"index": 0, "text": text, "finish_reason": reason, "logprobs": null}),
            (Kind::Chat, false) => {
                let message = json!({"role": "assistant", "content": text});
                json!({"index": 0, "message": message, "finish_reason": reason, "logprobs": null})
            }
            (Kind::Chat, true) => {
                let delta = if finish.is_some() { json!({}) } else { json!({"role": "assistant", "content": text}) };
                json!({"index": 0, "delta": delta, "finish_reason": reason, "logprobs": null})
            }
        }
    }
}

/// Texts of one request, each behind what is echoed of its prompt.
async fn whole(head: Head, texts: Vec<(String, UnboundedReceiver<Event>)>, scored: bool) -> Result<Response, Refusal> {
    let (mut choices, mut tokens) = (Vec::with_capacity(texts.len()), 0);
    for (index, (mut text, mut events)) in texts.into_iter().enumerate() {
        let mut scores = Vec::new();
        let finish = loop {
            match events.recv().await {
                Some(Event::Text(piece)) => text.push_str(&piece),
                Some(Event::Score(score)) => scores.push(score),
                Some(Event::Done(finish)) => break finish,
                Some(Event::Failed(failure)) => return Err(refusal(failure)),
                None => return Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the text was lost")),
            }
        };
        tokens += finish.tokens;
        let mut choice = head.choice(&text, Some(finish), false);
        choice["index"] = json!(index);
        if scored {
            choice["logprobs"] = scores::to_json(&scores);
        }
        choices.push(choice);
    }
    Ok(Json(head.object(&choices, Some(tokens), false)).into_response())
}

/// What broke is said in the server's log: it may name what is nobody else's business.
fn refusal(failure: Failure) -> Refusal {
    match failure {
        Failure::Refused(message) => Refusal::invalid(None, message),
        Failure::Broken(message) => {
            eprintln!("a text could not be written: {message}");
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the server failed")
        }
    }
}

/// Server-sent events: pieces as they come, the end with its usage, `[DONE]`.
fn stream_out(head: Head, events: UnboundedReceiver<Event>) -> Response {
    let next = async |(head, mut events, is_over): (Head, UnboundedReceiver<Event>, bool)| {
        if is_over {
            return None;
        }
        loop {
            let (chunks, is_over) = match events.recv().await {
                Some(Event::Score(_)) => continue,
                Some(Event::Text(piece)) if piece.is_empty() => continue,
                Some(Event::Text(piece)) => (vec![head.object(&[head.choice(&piece, None, true)], None, true)], false),
                Some(Event::Done(finish)) => {
                    (vec![head.object(&[head.choice("", Some(finish), true)], Some(finish.tokens), true)], true)
                }
                Some(Event::Failed(failure)) => (vec![refusal(failure).body()], true),
                None => (Vec::new(), true),
            };
            let mut lines: Vec<Result<Chunk, Infallible>> =
                chunks.iter().map(|chunk| Ok(Chunk::default().data(chunk.to_string()))).collect();
            if is_over {
                lines.push(Ok(Chunk::default().data("[DONE]")));
            }
            return Some((stream::iter(lines), (head, events, is_over)));
        }
    };
    use futures_util::StreamExt;
    Sse::new(stream::unfold((head, events, false), next).flatten()).into_response()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn new_id(kind: Kind) -> String {
    format!("{}-{:016x}", if kind == Kind::Chat { "chatcmpl" } else { "cmpl" }, rand::random::<u64>())
}
