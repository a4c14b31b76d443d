//! Records from JSONL (Alpaca, chat, ShareGPT, plain text), text files and Parquet; .zst and .gz are unpacked.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use liger_model::Message;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value, json};

use super::Skipped;
use crate::error::{Error, Result, io, unusable};

/// A record before it is made into text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// An instruction, what it is about (may be empty), and the answer.
    Instruction {
        /// What to do.
        instruction: String,
        /// On what.
        input: String,
        /// The answer.
        output: String,
    },
    /// A conversation.
    Chat(Vec<Message>),
    /// Just text.
    Text(String),
}

/// The records of a file with their lines, and what was left out.
#[derive(Debug, Default)]
pub struct Records {
    /// Line or row, from 1, and the record.
    pub list: Vec<(usize, Record)>,
    /// Records of no known form, or with nothing in them.
    pub skipped: Vec<Skipped>,
}

/// Reads a file by its ending: .jsonl, .json, .txt, .parquet, each but the last also .zst or .gz.
///
/// # Errors
/// If it cannot be read or unpacked, or a line is not a JSON object.
pub fn read_records(path: &Path) -> Result<Records> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (stem, packed) = match name.rsplit_once('.') {
        Some((stem, ending @ ("zst" | "gz"))) => (stem.to_owned(), Some(ending.to_owned())),
        _ => (name, None),
    };
    let file = File::open(path).map_err(io(path, "read"))?;
    if stem.ends_with(".parquet") {
        return read_parquet(file, path);
    }
    let reader: Box<dyn Read> = match packed.as_deref() {
        Some("zst") => Box::new(zstd::Decoder::new(file).map_err(io(path, "unpack"))?),
        Some(_) => Box::new(flate2::read::MultiGzDecoder::new(file)),
        None => Box::new(file),
    };
    let mut reader = BufReader::new(reader);
    if stem.ends_with(".txt") {
        let mut text = String::new();
        reader.read_to_string(&mut text).map_err(io(path, "read"))?;
        return Ok(Records { list: vec![(1, Record::Text(text))], skipped: Vec::new() });
    }
    if stem.ends_with(".json") {
        let array: Vec<Value> =
            serde_json::from_reader(reader).map_err(|e| unusable(path, format!("not a JSON list: {e}")))?;
        let mut records = Records::default();
        array.into_iter().enumerate().for_each(|(i, value)| records.add(i + 1, value));
        return Ok(records);
    }
    if !stem.ends_with(".jsonl") {
        return Err(unusable(
            path,
            "unknown kind of file; expected .jsonl, .json, .txt (also .zst or .gz) or .parquet",
        ));
    }
    records_from_jsonl(reader, path)
}

/// One JSON object a line.
///
/// # Errors
/// [`Error::Line`] for an empty line or one that is not a JSON object.
pub fn records_from_jsonl(reader: impl BufRead, path: &Path) -> Result<Records> {
    let mut records = Records::default();
    for (i, line) in reader.split(b'\n').enumerate() {
        let line = line.map_err(io(path, "read"))?;
        let fail = |problem: String| Error::Line { path: path.to_owned(), line: i + 1, problem };
        if line.trim_ascii().is_empty() {
            return Err(fail("an empty line; expected a JSON object".into()));
        }
        let value: Value = serde_json::from_slice(&line).map_err(|e| fail(format!("not JSON: {e}")))?;
        if !value.is_object() {
            return Err(fail("not a JSON object".into()));
        }
        records.add(i + 1, value);
    }
    if records.list.is_empty() && records.skipped.is_empty() {
        return Err(unusable(path, "the file is empty"));
    }
    Ok(records)
}

impl Records {
    fn add(&mut self, line: usize, value: Value) {
        let record = match value.as_object() {
            Some(object) => record_of(object),
            None => Err("not an object".into()),
        };
        match record {
            Ok(record) => self.list.push((line, record)),
            Err(reason) => self.skipped.push(Skipped { line, reason }),
        }
    }
}

fn text_of<'a>(object: &'a Map<String, Value>, names: &[&str]) -> Option<&'a str> {
    names.iter().find_map(|name| object.get(*name)?.as_str())
}

/// The form is told by the fields; Dolly's names for Alpaca's fields are known too.
fn record_of(object: &Map<String, Value>) -> std::result::Result<Record, String> {
    if let Some(turns) = object.get("messages").or_else(|| object.get("conversations")).and_then(Value::as_array) {
        let messages: Option<Vec<Message>> = turns.iter().map(message_of).collect();
        let messages = messages.ok_or("a turn without a role and a text")?;
        if !messages.iter().any(|m| m.role == "assistant" && !m.content.trim().is_empty()) {
            return Err("a conversation without an answer".into());
        }
        return Ok(Record::Chat(messages));
    }
    if let Some(instruction) = text_of(object, &["instruction"]) {
        let output = text_of(object, &["output", "response"]).ok_or("an instruction without `output`")?;
        if output.trim().is_empty() || instruction.trim().is_empty() {
            return Err("an empty instruction or answer".into());
        }
        let input = text_of(object, &["input", "context"]).unwrap_or("").to_owned();
        return Ok(Record::Instruction { instruction: instruction.into(), input, output: output.into() });
    }
    match text_of(object, &["text"]) {
        Some(text) if text.trim().is_empty() => Err("an empty text".into()),
        Some(text) => Ok(Record::Text(text.into())),
        None => Err("none of the fields `messages`, `conversations`, `instruction`, `text`".into()),
    }
}

fn message_of(turn: &Value) -> Option<Message> {
    let turn = turn.as_object()?;
    let role = match text_of(turn, &["role", "from"])? {
        "human" => "user",
        "gpt" => "assistant",
        other => other,
    };
    Some(Message::new(role, text_of(turn, &["content", "value"])?))
}

fn read_parquet(file: File, path: &Path) -> Result<Records> {
    let mut records = Records::default();
    parquet_rows(file, path)?.into_iter().enumerate().for_each(|(i, row)| records.add(i + 1, row));
    Ok(records)
}

/// The rows of a Parquet file as JSON objects; columns of rare kinds are null. `path` is for messages.
///
/// # Errors
/// If it is not such a file.
pub fn parquet_rows(file: File, path: &Path) -> Result<Vec<Value>> {
    let broken = |e: parquet::errors::ParquetError| unusable(path, format!("not a Parquet file that can be read: {e}"));
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let rows = reader.get_row_iter(None).map_err(broken)?;
    rows.map(|row| Ok(row_value(&row.map_err(broken)?))).collect()
}

fn row_value(row: &Row) -> Value {
    Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), field_value(field))).collect())
}

/// Only what records are made of: texts, numbers, lists and groups.
fn field_value(field: &Field) -> Value {
    match field {
        Field::Str(text) => json!(text),
        Field::Bytes(bytes) => json!(String::from_utf8_lossy(bytes.data())),
        Field::Bool(value) => json!(value),
        Field::Int(value) => json!(value),
        Field::Long(value) => json!(value),
        Field::Double(value) => json!(value),
        Field::Group(row) => row_value(row),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(field_value).collect()),
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn jsonl(text: &str) -> Result<Records> {
        records_from_jsonl(text.as_bytes(), "d.jsonl".as_ref())
    }

    #[test]
    fn every_form_is_known() {
        let records = jsonl(concat!(
            r#"{"instruction": "Add", "input": "1 1", "output": "2"}"#,
            "\n",
            r#"{"instruction": "Add", "context": "1 2", "response": "3", "category": "x"}"#,
            "\n",
            r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}"#,
            "\n",
            r#"{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}"#,
            "\n",
            r#"{"text": "Call me Ishmael."}"#,
            "\n",
        ));
        let list = records.unwrap().list;
        let chat = Record::Chat(vec![Message::new("user", "Hi"), Message::new("assistant", "Ho")]);
        let add = |input: &str, output: &str| Record::Instruction {
            instruction: "Add".into(),
            input: input.into(),
            output: output.into(),
        };
        let expected = [add("1 1", "2"), add("1 2", "3"), chat.clone(), chat, Record::Text("Call me Ishmael.".into())];
        assert_eq!(list.iter().map(|(_, r)| r.clone()).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn unusable_records_are_counted_and_broken_lines_named() {
        let records = jsonl("{\"text\": \"a\"}\n{\"instruction\": \"x\"}\n{\"text\": \" \"}\n").unwrap();
        assert_eq!((records.list.len(), records.skipped.len()), (1, 2));
        assert_eq!((records.skipped[0].line, records.skipped[1].line), (2, 3));
        let error = jsonl("{\"text\": \"a\"}\n{broken\n").unwrap_err().to_string();
        assert!(error.starts_with("d.jsonl: line 2: not JSON"), "{error}");
        let error = jsonl("{\"text\": \"a\"}\n\n{\"text\": \"b\"}\n").unwrap_err().to_string();
        assert_eq!(error, "d.jsonl: line 2: an empty line; expected a JSON object");
        assert!(jsonl("").unwrap_err().to_string().contains("empty"));
    }

    #[test]
    fn packed_files_are_unpacked() {
        let folder = tempfile::tempdir().unwrap();
        let line = b"{\"text\": \"a\"}\n";
        let plain = folder.path().join("a.jsonl");
        std::fs::write(&plain, line).unwrap();
        let zst = folder.path().join("a.jsonl.zst");
        std::fs::write(&zst, zstd::encode_all(&line[..], 1).unwrap()).unwrap();
        let gz = folder.path().join("a.jsonl.gz");
        let mut encoder = flate2::write::GzEncoder::new(File::create(&gz).unwrap(), flate2::Compression::fast());
        encoder.write_all(line).unwrap();
        encoder.finish().unwrap();
        for path in [plain, zst, gz] {
            assert_eq!(read_records(&path).unwrap().list, [(1, Record::Text("a".into()))]);
        }
    }

    #[test]
    fn parquet_rows_are_records() {
        use parquet::data_type::{ByteArray, ByteArrayType};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let schema =
            "message m { required binary instruction (UTF8); required binary output (UTF8); required int64 label; }";
        let schema = std::sync::Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
        let properties = std::sync::Arc::new(parquet::file::properties::WriterProperties::builder().build());
        let file = File::create(&path).unwrap();
        let mut writer = parquet::file::writer::SerializedFileWriter::new(file, schema, properties).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for values in [["Say a", "Say b"], ["a", "b"]] {
            let mut column = group.next_column().unwrap().unwrap();
            let values = values.map(ByteArray::from);
            column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
            column.close().unwrap();
        }
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<parquet::data_type::Int64Type>().write_batch(&[7, -1], None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        let rows = parquet_rows(File::open(&path).unwrap(), &path).unwrap();
        assert_eq!(rows[1], json!({"instruction": "Say b", "output": "b", "label": -1}));
        let list = read_records(&path).unwrap().list;
        let record =
            |i: &str, o: &str| Record::Instruction { instruction: i.into(), input: "".into(), output: o.into() };
        assert_eq!(list, [(1, record("Say a", "a")), (2, record("Say b", "b"))]);
    }
}
