//! States that clients keep: one file each, which never changes, so that going on from the same one twice is a fork.

use std::path::{Path, PathBuf};

use liger_model::{Decoder, Error, Message, Result, State};
use serde::{Deserialize, Serialize};

/// What the server remembers of a kept state besides the numbers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct About {
    /// Turns of a conversation; none of a plain text.
    pub(crate) messages: Vec<Message>,
    /// The text that the state has taken in, the answer without the token that ended it.
    pub(crate) text: String,
    /// Tokens of it.
    pub(crate) tokens: usize,
    /// Seconds since 1970.
    pub(crate) created: u64,
}

/// A folder of states of one model.
pub(crate) struct States {
    folder: PathBuf,
    fingerprint: String,
}

impl States {
    pub(crate) fn new(folder: &Path, fingerprint: String) -> std::io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        Ok(Self { folder: folder.to_owned(), fingerprint })
    }

    /// Only what this server makes: nothing else reaches the disk.
    pub(crate) fn path(&self, id: &str) -> Option<PathBuf> {
        let hex = id.strip_prefix("state-")?;
        let fits = hex.len() == 32 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        fits.then(|| self.folder.join(format!("{id}.safetensors")))
    }

    /// Every state's id, in no order.
    pub(crate) fn ids(&self) -> std::io::Result<Vec<String>> {
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.folder)? {
            let name = entry?.file_name();
            if let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".safetensors"))
                && self.path(id).is_some()
            {
                ids.push(id.to_owned());
            }
        }
        Ok(ids)
    }

    /// Writes a state under a new id.
    pub(crate) fn save(&self, state: &State, about: &About, decoder: &Decoder) -> Result<String> {
        let id = format!("state-{:032x}", rand::random::<u128>());
        let path = self.path(&id).ok_or_else(|| Error::Refused("a state's id is not one".into()))?;
        let about = serde_json::to_string(about).map_err(|e| Error::Refused(e.to_string()))?;
        state.save(&path, &self.fingerprint, &about, decoder.ops())?;
        Ok(id)
    }

    /// Reads a state into `state`, of one slot.
    pub(crate) fn load(&self, path: &Path, state: &mut State, decoder: &Decoder) -> Result<About> {
        let about = state.load(path, &self.fingerprint, decoder.ops())?;
        serde_json::from_str(&about).map_err(|_| Error::Refused("the state was not kept by a server".into()))
    }
}
