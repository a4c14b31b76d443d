//! What a model said of a request, kept on disk: an evaluation that was cut off goes on where it was.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use liger_model::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::{Likelihood, Request};

/// Answers of one model; every batch is appended as it comes.
pub struct Cache {
    path: PathBuf,
    file: File,
    likelihoods: HashMap<String, Likelihood>,
    texts: HashMap<String, String>,
}

/// A line of the file.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Entry {
    Likelihood { key: String, log: f64, greedy: bool, cut: bool },
    Text { key: String, text: String },
}

impl Cache {
    /// The answers of the model that `identity` tells from all others: file hashes, attention, precision, device.
    ///
    /// # Errors
    /// If the folder cannot be made or the file cannot be read.
    pub fn open(folder: &Path, identity: &str) -> Result<Self> {
        let path = folder.join(format!("{}.jsonl", short_hash(identity.as_bytes())));
        let io = |doing: &'static str| {
            let path = path.clone();
            move |source| Error::Io { path, doing, source }
        };
        std::fs::create_dir_all(folder).map_err(io("make the folder of"))?;
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(&path).map_err(io("open"))?;
        let (mut likelihoods, mut texts) = (HashMap::new(), HashMap::new());
        let mut whole = 0;
        let mut reader = BufReader::new(&file);
        let mut line = String::new();
        while reader.read_line(&mut line).map_err(io("read"))? > 0 && line.ends_with('\n') {
            match serde_json::from_str(&line) {
                Ok(Entry::Likelihood { key, log, greedy, cut }) => {
                    likelihoods.insert(key, Likelihood { log, greedy, cut });
                }
                Ok(Entry::Text { key, text }) => {
                    texts.insert(key, text);
                }
                Err(_) => break,
            }
            whole += line.len() as u64;
            line.clear();
        }
        // A line that was being written when the machine went down.
        file.set_len(whole).map_err(io("mend"))?;
        file.seek(SeekFrom::End(0)).map_err(io("read"))?;
        Ok(Self { path, file, likelihoods, texts })
    }

    pub(crate) fn likelihood(&self, request: &Request) -> Option<Likelihood> {
        self.likelihoods.get(&key(request)).copied()
    }

    pub(crate) fn keep<'a>(&mut self, answers: impl Iterator<Item = (&'a Request, Likelihood)>) -> Result<()> {
        let mut lines = String::new();
        for (request, likelihood) in answers {
            let Likelihood { log, greedy, cut } = likelihood;
            let key = key(request);
            self.likelihoods.insert(key.clone(), likelihood);
            push(&mut lines, &Entry::Likelihood { key, log, greedy, cut });
        }
        self.append(&lines)
    }

    pub(crate) fn text(&self, prompt: &str) -> Option<&str> {
        self.texts.get(&short_hash(prompt.as_bytes())).map(String::as_str)
    }

    pub(crate) fn keep_text(&mut self, prompt: &str, text: &str) -> Result<()> {
        let (key, text) = (short_hash(prompt.as_bytes()), text.to_owned());
        let mut line = String::new();
        self.texts.insert(key.clone(), text.clone());
        push(&mut line, &Entry::Text { key, text });
        self.append(&line)
    }

    fn append(&mut self, lines: &str) -> Result<()> {
        let io = |source| Error::Io { path: self.path.clone(), doing: "write", source };
        self.file.write_all(lines.as_bytes()).map_err(io)
    }
}

fn push(lines: &mut String, entry: &Entry) {
    if let Ok(line) = serde_json::to_string(entry) {
        lines.push_str(&line);
        lines.push('\n');
    }
}

fn key(request: &Request) -> String {
    let ids = [&request.context[..], &[u32::MAX], &request.continuation[..]].concat();
    let bytes: Vec<u8> = ids.into_iter().flat_map(u32::to_le_bytes).collect();
    short_hash(&bytes)
}

/// 128 bits are plenty to tell requests apart.
fn short_hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..32].to_owned()
}

/// Hash of a model's files: of a file, or of all in a folder that say what the model computes.
///
/// # Errors
/// If a file cannot be read.
pub fn hash_files(path: &Path) -> Result<String> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { path, doing: "read", source }
    };
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        let is_model = |name: &str| name.ends_with(".json") || name.ends_with(".safetensors");
        // Records of a run lie beside its model and say nothing of it.
        let is_record = |name: &str| ["report.json", "self.json"].contains(&name);
        files = std::fs::read_dir(path)
            .map_err(io(path))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|file| {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                file.is_file() && is_model(&name) && !is_record(&name)
            })
            .collect();
        files.sort();
    }
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(file.file_name().unwrap_or_default().as_encoded_bytes());
        hasher.update_reader(File::open(&file).map_err(io(&file))?).map_err(io(&file))?;
    }
    Ok(hasher.finalize().to_hex()[..32].to_owned())
}
