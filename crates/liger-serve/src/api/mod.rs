//! The endpoints: OpenAI's, and ours for states, tokens, metrics and the page.

mod answer;
mod openapi;
mod request;
mod states;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::StreamExt;
use liger_model::{Decoder, Message, Tokenizer};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{Sender, unbounded_channel};

use self::answer::{Coming, Head, stream_out, whole};
use self::request::{ChatRequest, Common, CompletionRequest, Prompt, parse};
use self::states::Kept;
use crate::engine::{Event, Work};
use crate::error::Refusal;
use crate::metrics::Metrics;
use crate::states::{About, States};

/// Bytes of a state that is brought back, at most.
const STATE_BODY: usize = 1 << 30;
/// Bytes that are read and thrown away of a request that is too long.
const THROWN_AWAY: usize = 64 << 20;

/// What the handlers share.
pub(crate) struct App {
    pub(crate) name: String,
    pub(crate) decoder: Arc<Decoder>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) stop_ids: Vec<u32>,
    pub(crate) work: Sender<Work>,
    pub(crate) api_key: Option<String>,
    pub(crate) states: Option<Arc<States>>,
    pub(crate) metrics: Arc<Metrics>,
}

/// Which of the two kinds of answer is built.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Completion,
    Chat,
}

/// The routes; `body` is the most bytes of a request.
pub(crate) fn router(app: App, body: usize) -> Router {
    let app = Arc::new(app);
    let kept = Router::new()
        .route("/v1/states", get(states::list).post(create_state).layer(DefaultBodyLimit::max(STATE_BODY)))
        .route("/v1/states/{id}", get(states::show).delete(states::remove))
        .route("/v1/states/{id}/content", get(states::content));
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .route("/tokenize", post(tokenize))
        .route("/status", get(status))
        .merge(kept)
        .layer(middleware::from_fn_with_state(app.clone(), check_key))
        .route("/metrics", get(metrics))
        .route("/health", get(async || Json(json!({"status": "ok"}))))
        .route("/openapi.json", get(async || Json(openapi::document())))
        .route("/", get(page))
        .fallback(async || Refusal::new(StatusCode::NOT_FOUND, "no such path"))
        .method_not_allowed_fallback(async || Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "not with this method"))
        .layer(DefaultBodyLimit::max(body))
        .layer(middleware::from_fn_with_state(body, refuse_long))
        .layer(middleware::from_fn(log_request))
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

/// Refuses a body that says it is too long. It is read and thrown away first, up to a limit: a client that is still sending
/// would see a broken connection and not the reason.
async fn refuse_long(State(most): State<usize>, request: Request, next: Next) -> Response {
    let length =
        request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if request.uri().path() == "/v1/states" || length.is_none_or(|length| length <= most) {
        return next.run(request).await;
    }
    let (mut body, mut left) = (request.into_body().into_data_stream(), THROWN_AWAY);
    while let Some(Ok(piece)) = body.next().await {
        left = left.saturating_sub(piece.len());
        if left == 0 {
            break;
        }
    }
    Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the request is longer than {most} bytes")).into_response()
}

/// One JSON object a line on stderr; never a prompt.
pub(crate) fn log(level: &str, what: &Value) {
    let mut line = json!({"time": now(), "level": level});
    if let (Some(line), Some(what)) = (line.as_object_mut(), what.as_object()) {
        line.extend(what.clone());
    }
    eprintln!("{line}");
}

async fn log_request(request: Request, next: Next) -> Response {
    let (method, path, start) = (request.method().clone(), request.uri().path().to_owned(), Instant::now());
    let response = next.run(request).await;
    // Probes and scrapes would fill the log.
    if path.starts_with("/v1/") {
        let milliseconds = start.elapsed().as_millis() as u64;
        let status = response.status().as_u16();
        log("info", &json!({"method": method.as_str(), "path": path, "status": status, "milliseconds": milliseconds}));
    }
    response
}

/// The page is one file and asks nothing of the network but this server.
async fn page() -> Response {
    let policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                  img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let mut response = Html(include_str!("../page.html")).into_response();
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    response
}

fn described(app: &App) -> Value {
    json!({"id": app.name, "object": "model", "created": 0, "owned_by": "liger"})
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [described(&app)]}))
}

async fn model(
    State(app): State<Arc<App>>,
    axum::extract::Path(id): axum::extract::Path<String>,
) -> Result<Json<Value>, Refusal> {
    if id != app.name {
        let message = format!("this model is not served here; `{}` is", app.name);
        return Err(Refusal { status: StatusCode::NOT_FOUND, message, param: Some("model") });
    }
    Ok(Json(described(&app)))
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.page()).into_response()
}

/// What the page's panel shows.
async fn status(State(app): State<Arc<App>>) -> Json<Value> {
    let m = &app.metrics;
    let [slots, used, waiting, bytes, written] =
        [&m.slots, &m.slots_in_use, &m.waiting, &m.state_bytes, &m.written_tokens].map(|c| c.load(Ordering::Relaxed));
    Json(json!({"model": app.name, "slots": slots, "slots_in_use": used, "waiting": waiting, "state_bytes": bytes,
        "written_tokens": written, "tokens_per_second": m.tokens_per_second(), "keeps_states": app.states.is_some(),
        "grows": app.decoder.context_limit().is_some()}))
}

#[derive(Deserialize)]
struct TokenizeRequest {
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
}

async fn tokenize(State(app): State<Arc<App>>, body: Result<Bytes, BytesRejection>) -> Result<Json<Value>, Refusal> {
    let request: TokenizeRequest = parse(body)?;
    let tokens = match (&request.prompt, &request.messages) {
        (Some(text), None) => encode(&app, text, true)?,
        (None, Some(messages)) => encode(&app, &render(&app, messages, None, true)?, false)?,
        _ => return Err(Refusal::invalid(Some("prompt"), "expected either `prompt` or `messages`")),
    };
    Ok(Json(json!({"count": tokens.len(), "tokens": tokens})))
}

fn encode(app: &App, text: &str, begins: bool) -> Result<Vec<u32>, Refusal> {
    app.tokenizer.encode(text, begins).map_err(|e| Refusal::invalid(Some("prompt"), e.to_string()))
}

/// The model's chat template; parts of a turn are joined, as templates expect one text.
fn render(app: &App, messages: &[Value], tools: Option<&[Value]>, answer_next: bool) -> Result<String, Refusal> {
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

async fn completions(State(app): State<Arc<App>>, body: Result<Bytes, BytesRejection>) -> Result<Response, Refusal> {
    let CompletionRequest { prompt, common } = parse(body)?;
    common.check(&app.name, Kind::Completion)?;
    let start = Start::of(&app, &common).await?;
    let encode = |text: &String| encode(&app, text, start.is_none());
    let prompts = match prompt {
        Prompt::Text(text) => vec![encode(&text)?],
        Prompt::Ids(ids) => vec![ids],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::IdLists(lists) => lists,
    };
    let before = start.as_ref().map_or(String::new(), |start| start.about.text.clone());
    answer(&app, prompts, &common, Kind::Completion, start, Said { before, messages: Vec::new() }).await
}

async fn chat(State(app): State<Arc<App>>, body: Result<Bytes, BytesRejection>) -> Result<Response, Refusal> {
    let ChatRequest { messages, tools, common } = parse(body)?;
    common.check(&app.name, Kind::Chat)?;
    let start = Start::of(&app, &common).await?;
    let tools = tools.filter(|tools| common.shows_tools() && !tools.is_empty());
    let (text, messages) = conversation(&app, start.as_ref(), messages, tools.as_deref(), true)?;
    let prompt = encode(&app, &text, false)?;
    let before = start.as_ref().map_or(String::new(), |start| start.about.text.clone());
    answer(&app, vec![prompt], &common, Kind::Chat, start, Said { before, messages }).await
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
    async fn of(app: &Arc<App>, common: &Common) -> Result<Option<Self>, Refusal> {
        if common.keep_state {
            states::store(app)?;
        }
        let Some(id) = &common.state_id else { return Ok(None) };
        let (state, about) = states::load(app, id).await?;
        Ok(Some(Self { state, about }))
    }
}

/// What was said before a prompt: the text that its state has taken in, and the turns up to the answer.
struct Said {
    before: String,
    messages: Vec<Message>,
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

async fn answer(
    app: &Arc<App>,
    prompts: Vec<Vec<u32>>,
    common: &Common,
    kind: Kind,
    start: Option<Start>,
    said: Said,
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
        (true, Some(prompt)) => Some(Kept {
            text: said.before + &app.tokenizer.decode(prompt, false).map_err(broken)?,
            tokens: prompt.len() + start.as_ref().map_or(0, |start| start.about.tokens),
            messages: said.messages,
            is_chat: kind == Kind::Chat,
        }),
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
async fn create_state(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, Refusal> {
    if headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/octet-stream") {
        return states::restore(State(app), body).await;
    }
    let request: StateRequest = parse(body)?;
    states::store(&app)?;
    let start = match &request.state_id {
        Some(id) => {
            let (state, about) = states::load(&app, id).await?;
            Some(Start { state, about })
        }
        None => None,
    };
    let before = start.as_ref().map_or(String::new(), |start| start.about.text.clone());
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
    let tokens = prompt.len() + start.as_ref().map_or(0, |start| start.about.tokens);
    let (sender, mut events) = unbounded_channel();
    let options = liger_model::GenerateOptions {
        max_tokens: 0,
        sampling: liger_model::Sampling::default(),
        seed: 0,
        stop_ids: Vec::new(),
    };
    let start = start.map(|start| start.state);
    let asked_at = Instant::now();
    hand_over(
        &app,
        Work { prompt, options, stop: Vec::new(), scores: None, start, keeps: true, asked_at, events: sender },
    )?;
    let kept = Kept { messages, text: before + &text, tokens, is_chat: false };
    while let Some(event) = events.recv().await {
        match event {
            Event::Kept { state, written } => {
                let id = states::keep(&app, Some(&kept), *state, &written).await?;
                return states::show(State(app), axum::extract::Path(id)).await;
            }
            Event::Failed(failure) => return Err(answer::refusal(failure)),
            _ => {}
        }
    }
    Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the text was lost"))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
