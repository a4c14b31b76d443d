//! The endpoints: OpenAI's, and ours for states, tokens, metrics and the page.

mod answer;
mod openapi;
mod request;
mod states;
mod texts;

pub use request::check_body;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::StreamExt;
use liger_model::{Decoder, Tokenizer};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::Sender;

use self::request::parse;
use self::texts::{chat, completions, create_state, render};
use crate::engine::Work;
use crate::error::Refusal;
use crate::metrics::Metrics;
use crate::states::States;

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

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
