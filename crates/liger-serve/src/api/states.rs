//! States that clients keep, go on from, take away and bring back.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use liger_model::{Message, State as TextState};
use serde_json::{Value, json};

use super::App;
use crate::error::Refusal;
use crate::states::{About, States};

/// What is known of a text before its answer.
pub(super) struct Kept {
    /// Before the answer's turn.
    pub(super) messages: Vec<Message>,
    /// All that the state will have taken in, short of the answer.
    pub(super) text: String,
    /// Tokens of it.
    pub(super) tokens: usize,
    pub(super) is_chat: bool,
}

pub(super) fn store(app: &App) -> Result<&Arc<States>, Refusal> {
    let hint = "this server keeps no states: start it with --states FOLDER (and a Liger model)";
    app.states.as_ref().ok_or_else(|| Refusal::invalid(Some("state_id"), hint))
}

fn unknown() -> Refusal {
    Refusal { status: StatusCode::NOT_FOUND, message: "no such state".into(), param: Some("state_id") }
}

fn path_of(app: &App, id: &str) -> Result<PathBuf, Refusal> {
    store(app)?.path(id).filter(|path| path.exists()).ok_or_else(unknown)
}

/// Runs what reads or writes a disk beside the handlers.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T, Refusal> + Send + 'static) -> Result<T, Refusal> {
    let lost = || Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the server failed");
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(lost()))
}

/// Saves the state of a text that is over; its id, and what is remembered of it.
pub(super) async fn keep(
    app: &Arc<App>,
    kept: Option<&Kept>,
    state: TextState,
    written: &[u32],
) -> Result<(String, About), Refusal> {
    let (states, Some(kept)) = (store(app)?.clone(), kept) else { return Err(unknown()) };
    let broken = |_| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the answer is no text");
    let answer = app.tokenizer.decode(written, false).map_err(broken)?;
    let mut messages = kept.messages.clone();
    if kept.is_chat {
        messages.push(Message::new("assistant", &answer));
    }
    let text = kept.text.clone() + &answer;
    let about = About { messages, text, tokens: kept.tokens + written.len(), created: super::now() };
    let decoder = app.decoder.clone();
    aside(move || {
        let saved = states.save(&state, &about, &decoder);
        saved.map(|id| (id, about)).map_err(|e| {
            super::log("error", &json!({"message": "a state could not be saved", "reason": e.to_string()}));
            Refusal::new(StatusCode::INSUFFICIENT_STORAGE, "the state could not be saved")
        })
    })
    .await
}

/// Reads a kept state.
pub(super) async fn load(app: &Arc<App>, id: &str) -> Result<(Arc<TextState>, About), Refusal> {
    let (path, states, decoder) = (path_of(app, id)?, store(app)?.clone(), app.decoder.clone());
    aside(move || {
        let other = "the state belongs to another model, or is damaged";
        let failed = |_| Refusal { status: StatusCode::CONFLICT, message: other.into(), param: Some("state_id") };
        let mut state = decoder.new_state(1).map_err(failed)?;
        let about = states.load(&path, &mut state, &decoder).map_err(failed)?;
        Ok((Arc::new(state), about))
    })
    .await
}

fn described(id: &str, about: &About, bytes: u64) -> Value {
    json!({"id": id, "object": "state", "created": about.created, "tokens": about.tokens, "bytes": bytes,
        "messages": about.messages.len()})
}

pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>, Refusal> {
    let states = store(&app)?.clone();
    let failed = |_| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the states cannot be listed");
    let mut ids = aside(move || states.ids().map_err(failed)).await?;
    ids.sort();
    let data: Vec<Value> = ids.iter().map(|id| json!({"id": id, "object": "state"})).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

pub(super) async fn show(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, Refusal> {
    let (_, about) = load(&app, &id).await?;
    describe(&app, &id, &about).map(Json)
}

pub(super) fn describe(app: &App, id: &str, about: &About) -> Result<Value, Refusal> {
    let bytes = std::fs::metadata(path_of(app, id)?).map_or(0, |data| data.len());
    Ok(described(id, about, bytes))
}

/// The file.
pub(super) async fn content(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, Refusal> {
    let path = path_of(&app, &id)?;
    let bytes = aside(move || std::fs::read(path).map_err(|_| unknown())).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response())
}

pub(super) async fn remove(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, Refusal> {
    let path = path_of(&app, &id)?;
    aside(move || std::fs::remove_file(path).map_err(|_| unknown())).await?;
    Ok(Json(json!({"id": id, "object": "state", "deleted": true})))
}

/// Brings back a file that was taken away: of this model, whole, under a new id.
pub(super) async fn restore(
    State(app): State<Arc<App>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, Refusal> {
    let body = body.map_err(|e| Refusal::new(e.status(), "the state is too long, or broke off"))?;
    let (states, decoder) = (store(&app)?.clone(), app.decoder.clone());
    let found = aside(move || {
        let failed = |_| Refusal::invalid(None, "this is no state of this model and structure");
        let mut state = decoder.new_state(1).map_err(failed)?;
        let brought = tempfile::NamedTempFile::new().and_then(|file| std::fs::write(file.path(), &body).map(|()| file));
        let full = |_| Refusal::new(StatusCode::INSUFFICIENT_STORAGE, "the state could not be saved");
        let brought = brought.map_err(full)?;
        let about = states.load(brought.path(), &mut state, &decoder).map_err(failed)?;
        let id = states.save(&state, &about, &decoder).map_err(|e| full(std::io::Error::other(e)))?;
        Ok(described(&id, &about, body.len() as u64))
    });
    Ok(Json(found.await?))
}
