//! What a request says.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use liger_model::{GenerateOptions, Sampling};
use serde::Deserialize;
use serde_json::{Value, json};

use super::texts::Kind;
use crate::error::Refusal;
use crate::scores::Asked;

/// Tokens named at each place of `logprobs`, at most.
const MOST_TOP: u64 = 20;
/// Answers to one prompt, at most.
const MOST_ANSWERS: u64 = 128;

/// One text or several.
#[derive(Deserialize)]
#[serde(untagged, expecting = "`stop`: expected a text or a list of texts")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "`prompt`: expected a text, a list of tokens, or a list of such")]
pub(super) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    IdLists(Vec<Vec<u32>>),
}

/// What both kinds of request have. Fields that would change the answer and are not obeyed are refused, not ignored.
#[derive(Deserialize)]
pub(super) struct Common {
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
    stream: Option<bool>,
    stream_options: Option<Value>,
    n: Option<u64>,
    best_of: Option<u64>,
    logprobs: Option<Value>,
    top_logprobs: Option<u64>,
    echo: Option<bool>,
    suffix: Option<Value>,
    response_format: Option<Value>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<Value>,
    tool_choice: Option<Value>,
    /// Of ours: the state to go on from, and whether to keep the one in the end.
    pub(super) state_id: Option<String>,
    #[serde(default)]
    pub(super) keep_state: bool,
}

#[derive(Deserialize)]
pub(super) struct CompletionRequest {
    pub(super) prompt: Prompt,
    #[serde(flatten)]
    pub(super) common: Common,
}

#[derive(Deserialize)]
pub(super) struct ChatRequest {
    pub(super) messages: Vec<Value>,
    pub(super) tools: Option<Vec<Value>>,
    #[serde(flatten)]
    pub(super) common: Common,
}

/// A body that is JSON of this form.
pub(super) fn parse<T: for<'a> Deserialize<'a>>(body: Result<Bytes, BytesRejection>) -> Result<T, Refusal> {
    let body = body.map_err(|e| Refusal::new(e.status(), "the request is too long, or broke off"))?;
    serde_json::from_slice(&body)
        .map_err(|e| Refusal::invalid(None, format!("the request is not what it must be: {e}")))
}

/// Whether the body of a completion, or of a chat, would be taken, apart from what depends on the model.
///
/// # Errors
/// What the client would be told.
pub fn check_body(body: &[u8], is_chat: bool, served: &str) -> Result<(), String> {
    let body = || Ok(Bytes::copy_from_slice(body));
    let (kind, common) = if is_chat {
        (Kind::Chat, parse::<ChatRequest>(body()).map(|request| request.common))
    } else {
        (Kind::Completion, parse::<CompletionRequest>(body()).map(|request| request.common))
    };
    let checked = common.and_then(|common| {
        common.check(served, kind)?;
        common.scores(kind)?;
        common.options(&[], 1)
    });
    checked.map(|_| ()).map_err(|refusal| refusal.message)
}

impl Common {
    pub(super) fn streams(&self) -> bool {
        self.stream == Some(true)
    }

    pub(super) fn echoes(&self) -> bool {
        self.echo == Some(true)
    }

    /// Answers to each prompt.
    pub(super) fn answers(&self) -> usize {
        self.n.unwrap_or(1) as usize
    }

    /// Whether the template is told of tools.
    pub(super) fn shows_tools(&self) -> bool {
        self.tool_choice != Some(json!("none"))
    }

    /// What is asked for of log-probabilities: completions count the tokens at each place, chats say so beside.
    pub(super) fn scores(&self, kind: Kind) -> Result<Option<Asked>, Refusal> {
        let asked = self.logprobs.as_ref().filter(|value| !value.is_null() && **value != json!(false));
        let Some(value) = asked else {
            return match self.top_logprobs.filter(|&top| top > 0) {
                Some(_) => Err(Refusal::invalid(Some("top_logprobs"), "`top_logprobs` goes with `logprobs`: true")),
                None => Ok(None),
            };
        };
        let top = match kind {
            Kind::Completion => value.as_u64(),
            Kind::Chat if *value == json!(true) => Some(self.top_logprobs.unwrap_or(0)),
            Kind::Chat => None,
        };
        let expected = match kind {
            Kind::Completion => format!("a whole number from 0 to {MOST_TOP}"),
            Kind::Chat => format!("true or false, and `top_logprobs` from 0 to {MOST_TOP}"),
        };
        let message = || format!("`logprobs`: found {value}, expected {expected}");
        let top = top.filter(|&top| top <= MOST_TOP).ok_or_else(|| Refusal::invalid(Some("logprobs"), message()))?;
        Ok(Some(Asked { top: top as usize, echo: self.echoes() }))
    }

    pub(super) fn check(&self, served: &str, kind: Kind) -> Result<(), Refusal> {
        if let Some(model) = self.model.as_ref().filter(|model| *model != served) {
            let message = format!("the model `{model}` is not served here; `{served}` is");
            return Err(Refusal { status: StatusCode::NOT_FOUND, message, param: Some("model") });
        }
        let is_set = |value: &Option<Value>| value.as_ref().is_some_and(|v| !v.is_null() && *v != json!(false));
        let is_text = |format: &Value| format.get("type") == Some(&json!("text"));
        let chooses_itself = |choice: &Value| *choice == json!("auto") || *choice == json!("none");
        let unsupported = [
            ("best_of", self.best_of.is_some_and(|best| best != self.n.unwrap_or(1))),
            ("echo", self.echoes() && kind == Kind::Chat),
            ("suffix", is_set(&self.suffix)),
            ("tool_choice", self.tool_choice.as_ref().is_some_and(|c| !c.is_null() && !chooses_itself(c))),
            ("response_format", self.response_format.as_ref().is_some_and(|f| !f.is_null() && !is_text(f))),
            ("presence_penalty", self.presence_penalty.is_some_and(|x| x != 0.0)),
            ("frequency_penalty", self.frequency_penalty.is_some_and(|x| x != 0.0)),
            ("logit_bias", self.logit_bias.as_ref().is_some_and(|b| !b.is_null() && *b != json!({}))),
        ];
        if let Some((param, _)) = unsupported.into_iter().find(|(_, is_asked)| *is_asked) {
            return Err(Refusal::invalid(Some(param), format!("`{param}` is not supported by this server")));
        }
        let together = [
            ("echo", self.echoes() && self.streams(), "`stream`"),
            ("echo", self.echoes() && self.state_id.is_some(), "`state_id`"),
            ("keep_state", self.keep_state && self.answers() != 1, "`n` above 1"),
        ];
        if let Some((param, _, other)) = together.into_iter().find(|(_, are_asked, _)| *are_asked) {
            return Err(Refusal::invalid(Some(param), format!("`{param}` does not go with {other}")));
        }
        if self.n.is_some_and(|n| !(1..=MOST_ANSWERS).contains(&n)) {
            return Err(Refusal::invalid(Some("n"), format!("`n`: expected a number from 1 to {MOST_ANSWERS}")));
        }
        match &self.stream_options {
            Some(options) if !options.is_null() && !options.is_object() => {
                Err(Refusal::invalid(Some("stream_options"), "`stream_options`: expected an object"))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn options(&self, stop_ids: &[u32], default_tokens: usize) -> Result<GenerateOptions, Refusal> {
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
        if max_tokens == 0 && !self.echoes() {
            return Err(Refusal::invalid(Some("max_tokens"), "`max_tokens`: found 0, expected at least 1"));
        }
        let seed = self.seed.unwrap_or_else(rand::random);
        Ok(GenerateOptions { max_tokens, sampling, seed, stop_ids: stop_ids.to_vec() })
    }

    pub(super) fn stop(&self) -> Vec<String> {
        match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(text)) => vec![text.clone()],
            Some(OneOrMany::Many(texts)) => texts.clone(),
        }
    }
}
