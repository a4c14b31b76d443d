//! Where a model is: a path, or with the feature `hub` an id such as `HuggingFaceTB/SmolLM2-135M-Instruct`.

use std::path::Path;

use anyhow::{Result, bail};
use liger_model::Checkpoint;

/// Opens a model by path or hub id.
pub fn open(model: &Path) -> Result<Checkpoint> {
    match model.to_str().filter(|id| !model.exists() && is_id(id)) {
        Some(id) => fetch(id),
        None => Ok(Checkpoint::open(model)?),
    }
}

/// Whether a text can be a hub id: `owner/name`, and not a file's name.
fn is_id(text: &str) -> bool {
    let mut parts = text.split('/');
    let fits = |part: &str| {
        let letters = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && !part.starts_with('.') && part.chars().all(letters)
    };
    let two = parts.next().is_some_and(fits) && parts.next().is_some_and(fits) && parts.next().is_none();
    two && !text.ends_with(".gguf")
}

#[cfg(not(feature = "hub"))]
fn fetch(id: &str) -> Result<Checkpoint> {
    bail!(
        "{id}: no such folder or file; to fetch it from the Hugging Face hub, build with \
         `cargo build --release --features hub`"
    )
}

/// Downloads what a model needs into the hub's own cache (`HF_HOME`), from `HF_ENDPOINT` if that is set.
#[cfg(feature = "hub")]
fn fetch(id: &str) -> Result<Checkpoint> {
    use anyhow::Context;
    use hf_hub::api::sync::ApiBuilder;

    let repository = ApiBuilder::from_env().build().context("Hugging Face hub")?.model(id.to_owned());
    let files = repository.info().with_context(|| format!("{id}: the hub does not give a list of its files"))?;
    let wanted = |name: &str| {
        let text = name.ends_with(".json") || name == "tokenizer.model" || name == "chat_template.jinja";
        !name.contains('/') && (text || name.ends_with(".safetensors"))
    };
    let mut config = None;
    for file in files.siblings.iter().map(|s| s.rfilename.as_str()).filter(|name| wanted(name)) {
        let path = repository.get(file).with_context(|| format!("{id}: cannot fetch {file}"))?;
        if file == "config.json" {
            config = Some(path);
        }
    }
    match config.as_deref().and_then(Path::parent) {
        Some(folder) => Ok(Checkpoint::open(folder)?),
        None => bail!("{id}: has no config.json; give a model in Hugging Face's layout"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn ids_and_paths() {
        assert!(
            ["a/b", "HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.2-1B"].iter().all(|x| super::is_id(x))
        );
        assert!(!["a", "./a", "../a/b", "/a/b", "a/b/c", "a/b.gguf", "a/", ""].iter().any(|x| super::is_id(x)));
    }
}
