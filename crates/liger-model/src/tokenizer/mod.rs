//! Text to tokens and back, and chat templates.

mod chat;
mod gguf;

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};

pub use chat::{ChatTemplate, Message};

use crate::checkpoint::gguf::MetadataValue;
use crate::error::{Error, Result, io};
use crate::files;

/// The tokenizer of a model, with what is needed to write it out again.
pub struct Tokenizer {
    inner: Option<tokenizers::Tokenizer>,
    /// `tokenizer.json`.
    json: String,
    /// `tokenizer_config.json`.
    config: Map<String, Value>,
    /// The template of conversations, if the model has one.
    pub chat: Option<ChatTemplate>,
}

const JSON: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";

impl Tokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a folder.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing, or a file is damaged.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join(JSON);
        if !path.exists() {
            return Err(Error::Missing {
                path: folder.to_owned(),
                what: JSON.into(),
                remedy: "save the model with a fast tokenizer (transformers: `tokenizer.save_pretrained`)".into(),
            });
        }
        let json = std::fs::read_to_string(&path).map_err(io(&path, "read"))?;
        let config_path = folder.join(CONFIG);
        let config = match config_path.exists() {
            true => {
                let text = std::fs::read_to_string(&config_path).map_err(io(&config_path, "read"))?;
                serde_json::from_str(&text).map_err(|e| Error::corrupt(&config_path, format!("not JSON: {e}")))?
            }
            false => Map::new(),
        };
        let template_path = folder.join(TEMPLATE);
        let template = match template_path.exists() {
            true => Some(std::fs::read_to_string(&template_path).map_err(io(&template_path, "read"))?),
            false => template_of(&config),
        };
        Self::build(json, config, template, &path)
    }

    /// Rebuilds a tokenizer from a GGUF file's metadata.
    ///
    /// # Errors
    /// [`Error::Field`] with what is missing or not supported.
    pub fn from_gguf(metadata: &HashMap<String, MetadataValue>, path: &Path) -> Result<Self> {
        let (json, config) = gguf::rebuild(metadata, path)?;
        let template = template_of(&config);
        Self::build(json.to_string(), config, template, path)
    }

    /// Out of the texts of `tokenizer.json`, `tokenizer_config.json` and the chat template; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if one of them is damaged.
    pub(crate) fn from_texts(json: &str, config: &str, template: Option<&str>, path: &Path) -> Result<Self> {
        let config = serde_json::from_str(config)
            .map_err(|e| Error::corrupt(path, format!("{CONFIG}: not a JSON object: {e}")))?;
        Self::build(json.to_owned(), config, template.map(str::to_owned), path)
    }

    /// The same texts, the template empty if there is none; `None` without a vocabulary.
    pub(crate) fn texts(&self) -> Option<[String; 3]> {
        self.inner.as_ref()?;
        let template = self.chat.as_ref().map_or(String::new(), |chat| chat.source().to_owned());
        let mut config = self.config.clone();
        config.remove("chat_template");
        Some([self.json.clone(), Value::Object(config).to_string(), template])
    }

    /// No vocabulary: tokens are the bytes of the text. For models that come without a tokenizer, as fixtures do.
    pub fn bytes() -> Self {
        Self { inner: None, json: String::new(), config: Map::new(), chat: None }
    }

    fn build(json: String, config: Map<String, Value>, template: Option<String>, path: &Path) -> Result<Self> {
        let damaged = |e: tokenizers::Error| Error::corrupt(path, format!("not a tokenizer that can be read: {e}"));
        // Not `from_bytes`: it is generic, and would compile all of the tokenizers' parsing once more in this crate.
        let mut inner: tokenizers::Tokenizer = json.parse().map_err(damaged)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(damaged)?;
        let special = |name: &str| match config.get(name) {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Object(object)) => object.get("content").and_then(Value::as_str).unwrap_or("").to_owned(),
            _ => String::new(),
        };
        let chat = match template {
            Some(text) => Some(ChatTemplate::new(text, special("bos_token"), special("eos_token"), path)?),
            None => None,
        };
        Ok(Self { inner: Some(inner), json, config, chat })
    }

    /// Tokens of a text. `special` adds what the model wants around a whole text, such as a first token.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let Some(inner) = &self.inner else {
            return Ok(text.bytes().map(u32::from).collect());
        };
        let encoding = inner.encode_fast(text, special).map_err(|e| Error::Refused(format!("tokenizer: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token that the model wants before every text, if it wants one.
    pub fn begin(&self) -> Option<u32> {
        self.encode("", true).ok()?.first().copied()
    }

    /// The text of tokens.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let Some(inner) = &self.inner else {
            let bytes: Vec<u8> = ids.iter().map(|&id| id.min(255) as u8).collect();
            return Ok(String::from_utf8_lossy(&bytes).into_owned());
        };
        inner.decode(ids, skip_special).map_err(|e| Error::Refused(format!("tokenizer: {e}")))
    }

    /// The id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.as_ref()?.token_to_id(token)
    }

    /// Number of tokens, added ones counted.
    pub fn vocab_size(&self) -> usize {
        self.inner.as_ref().map_or(256, |inner| inner.get_vocab_size(true))
    }

    /// Writes the tokenizer's files to a folder.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        if self.inner.is_none() {
            return Ok(());
        }
        files::write_whole(&folder.join(JSON), self.json.as_bytes())?;
        let mut config = self.config.clone();
        if let Some(chat) = &self.chat {
            config.remove("chat_template");
            files::write_whole(&folder.join(TEMPLATE), chat.source().as_bytes())?;
        }
        files::write_whole(&folder.join(CONFIG), format!("{:#}\n", Value::Object(config)).as_bytes())
    }
}

/// `chat_template` of a `tokenizer_config.json`: one text, or named ones of which "default" counts.
fn template_of(config: &Map<String, Value>) -> Option<String> {
    match config.get("chat_template")? {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => {
            let named = list.iter().find(|t| t.get("name") == Some(&json!("default")))?;
            named.get("template")?.as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// Turns tokens into text as they come: what is not yet whole UTF-8 waits.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Tokens whose text is out already, kept for the context that decoding needs.
    done: usize,
}

/// Tokens of context that are decoded again with each new one: leading spaces depend on what comes before.
const CONTEXT: usize = 8;

impl<'a> TextStream<'a> {
    /// A stream that has seen `prompt`.
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Self {
        let ids = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        Self { tokenizer, done: ids.len(), ids }
    }

    /// The text that became certain with this token, often empty inside a character of several bytes.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let before = self.tokenizer.decode(&self.ids[..self.done], true)?;
        let all = self.tokenizer.decode(&self.ids, true)?;
        if all.ends_with('\u{fffd}') && self.ids.len() - self.done < CONTEXT {
            return Ok(String::new());
        }
        self.done = self.ids.len();
        let new = all.get(before.len()..).unwrap_or("").to_owned();
        if self.done > 2 * CONTEXT {
            self.ids.drain(..self.done - CONTEXT);
            self.done = CONTEXT;
        }
        Ok(new)
    }
}
