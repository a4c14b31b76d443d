//! From records to items.

use std::io::Read;
use std::path::{Path, PathBuf};

use liger_model::{Error, Result};
use minijinja::value::{Serde, ValueKind};
use minijinja::{Environment, Value};

use super::templates::environment;
use super::{Item, Kind, Shots, Task};

type Record = serde_json::Value;
/// An error, and the task's field that it is about.
type Of<T> = std::result::Result<T, (&'static str, minijinja::Error)>;

impl Task {
    /// The files of records that it reads, without their endings.
    pub fn data(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.data.as_str()).chain(self.shots.as_ref().map(|shots| shots.data.as_str()))
    }

    /// The records of `folder/DATA.jsonl` or `folder/DATA.jsonl.zst`, `limit` of them at most, as items.
    ///
    /// # Errors
    /// If there is no such file, a line is not a JSON object, or a record lacks what the task asks of it.
    pub fn items(&self, folder: &Path, limit: usize) -> Result<Vec<Item>> {
        let (path, records) = read_records(folder, &self.data, limit)?;
        let environment = environment();
        let examples = match &self.shots {
            Some(shots) => self.examples(&environment, folder, shots)?,
            None => Vec::new(),
        };
        let items = records.iter().enumerate().map(|(i, record)| {
            let item = self.item(&environment, record, &examples);
            item.map_err(|e| self.wrong_record(&path, i, e))
        });
        items.collect()
    }

    fn wrong_record(&self, path: &Path, index: usize, (field, e): (&str, minijinja::Error)) -> Error {
        let reason = e.detail().map_or_else(|| e.to_string(), str::to_owned);
        let problem = format!("line {}: field `{field}` of {}: {reason}", index + 1, self.file.display());
        Error::Corrupt { path: path.to_owned(), problem }
    }

    /// The solved examples with the value of the field that they share with a question.
    fn examples(&self, environment: &Environment<'_>, folder: &Path, shots: &Shots) -> Result<Vec<(Record, String)>> {
        let (path, records) = read_records(folder, &shots.data, usize::MAX)?;
        let solved = records.into_iter().enumerate().map(|(i, record)| {
            let text = self.solved(environment, &record).map_err(|e| self.wrong_record(&path, i, e))?;
            let same = shots.same.as_ref().and_then(|field| record.get(field)).cloned().unwrap_or_default();
            Ok((same, text))
        });
        solved.collect()
    }

    /// An example: the question with the right continuation.
    fn solved(&self, environment: &Environment<'_>, record: &Record) -> Of<String> {
        match self.plain_item(environment, record)? {
            Item::Choices { pairs, gold, .. } => Ok(format!("{}{}", pairs[gold].0, pairs[gold].1)),
            Item::Answer { context, answer } => Ok(format!("{context} {answer}")),
            Item::Text { text, .. } => Ok(text),
        }
    }

    fn item(&self, environment: &Environment<'_>, record: &Record, examples: &[(Record, String)]) -> Of<Item> {
        let mut item = self.plain_item(environment, record)?;
        let description =
            environment.render_str(&self.description, Value::from(Serde(record))).map_err(|e| ("description", e))?;
        let mut before = description;
        if let Some(shots) = &self.shots {
            let own = shots.same.as_ref().and_then(|field| record.get(field)).cloned().unwrap_or_default();
            for (_, text) in examples.iter().filter(|(same, _)| *same == own).take(shots.count) {
                before.push_str(text);
                before.push_str("\n\n");
            }
        }
        match &mut item {
            Item::Choices { pairs, .. } => pairs.iter_mut().for_each(|(context, _)| context.insert_str(0, &before)),
            Item::Answer { context, .. } => context.insert_str(0, &before),
            Item::Text { .. } => {}
        }
        Ok(item)
    }

    /// One record as an item, without description and examples.
    fn plain_item(&self, environment: &Environment<'_>, record: &Record) -> Of<Item> {
        let value = Value::from(Serde(record));
        let render =
            |field: &'static str, template: &str| environment.render_str(template, &value).map_err(|e| (field, e));
        match self.kind {
            Kind::Choices => self.choices_of(environment, &value),
            Kind::Text => {
                let text = render("text", &self.text)?;
                let counted = match &self.counted {
                    Some(template) => render("counted", template)?,
                    None => text.clone(),
                };
                // Python's re.split(r"\s+", text), which the harness counts words by, has an empty part at a blank end.
                let ends = [counted.chars().next(), counted.chars().next_back()];
                let blank = ends.into_iter().flatten().filter(|c| c.is_whitespace()).count();
                let words = counted.split_whitespace().count() + blank;
                Ok(Item::Text { text, words, bytes: counted.len() })
            }
            Kind::Answer => {
                let (context, answer) = (render("context", &self.context)?, render("answer", &self.answer)?);
                Ok(Item::Answer { context, answer: answer.trim().to_owned() })
            }
        }
    }

    fn choices_of(&self, environment: &Environment<'_>, value: &Value) -> Of<Item> {
        let invalid = |what: String| minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, what);
        let evaluate = |field: &'static str, expression: &str| {
            environment.compile_expression(expression).and_then(|e| e.eval(value)).map_err(|e| (field, e))
        };
        let choices = evaluate("choices", &self.choices)?;
        if !matches!(choices.kind(), ValueKind::Seq | ValueKind::Iterable) {
            return Err(("choices", invalid(format!("found {}, expected a list", choices.kind()))));
        }
        let (mut pairs, mut lengths) = (Vec::new(), Vec::new());
        for choice in choices.try_iter().map_err(|e| ("choices", e))? {
            lengths.push(choice.to_string().chars().count());
            let with_choice = minijinja::context! { choice, ..value.clone() };
            let render = |field: &'static str, template: &str| {
                environment.render_str(template, &with_choice).map_err(|e| (field, e))
            };
            let continuation = self.continuation.as_deref().unwrap_or(" {{ choice }}");
            pairs.push((render("context", &self.context)?, render("continuation", continuation)?));
        }
        let gold = evaluate("gold", &self.gold)?;
        match usize::try_from(gold.clone()) {
            Ok(gold) if gold < pairs.len() => Ok(Item::Choices { pairs, lengths, gold }),
            _ => Err(("gold", invalid(format!("found {gold}, expected the number of one of {} choices", pairs.len())))),
        }
    }
}

/// The records of `folder/NAME.jsonl` or `folder/NAME.jsonl.zst`, `limit` of them at most, and the file.
///
/// # Errors
/// If there is no such file, it cannot be read, or a line is not a JSON object.
pub fn read_records(folder: &Path, name: &str, limit: usize) -> Result<(PathBuf, Vec<Record>)> {
    let candidates = [".jsonl", ".jsonl.zst"].map(|ending| folder.join(format!("{name}{ending}")));
    let path = candidates.into_iter().find(|path| path.exists()).ok_or_else(|| Error::Missing {
        path: folder.to_owned(),
        what: format!("{name}.jsonl or {name}.jsonl.zst"),
        remedy: format!(
            "put the records of {name} there, one JSON object a line, or leave out --data-dir to fetch them \
             (docs/evaluation.md)"
        ),
    })?;
    let text = read(&path).map_err(|source| Error::Io { path: path.clone(), doing: "read", source })?;
    let mut records = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).take(limit) {
        let at = |problem: String| Error::Corrupt { path: path.clone(), problem: format!("line {}: {problem}", i + 1) };
        let record: Record = serde_json::from_str(line).map_err(|e| at(format!("not JSON: {e}")))?;
        if !record.is_object() {
            return Err(at("not a JSON object".into()));
        }
        records.push(record);
    }
    Ok((path, records))
}

fn read(path: &Path) -> std::io::Result<String> {
    let file = std::fs::File::open(path)?;
    let mut text = String::new();
    if path.extension().is_some_and(|e| e == "zst") {
        zstd::Decoder::new(file)?.read_to_string(&mut text)?;
    } else {
        std::io::BufReader::new(file).read_to_string(&mut text)?;
    }
    Ok(text)
}
