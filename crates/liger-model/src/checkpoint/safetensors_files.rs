//! Reading safetensors files, one or sharded behind an index. Only the headers are kept in memory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use liger_tensor::{DType, Ops, Tensor};
use serde::Deserialize;

use crate::error::{Error, Result, io};
use crate::weights::TensorSource;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// `model.safetensors.index.json`: the file that each tensor is in.
#[derive(Debug, Deserialize)]
pub struct WeightMap {
    weight_map: HashMap<String, String>,
}

impl WeightMap {
    /// Reads an index; a file name in it must stay inside the folder.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it is not an index.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let map: Self = serde_json::from_str(text)
            .map_err(|e| Error::corrupt(path, format!("not an index of safetensors files: {e}")))?;
        for file in map.weight_map.values() {
            if file.is_empty() || Path::new(file).components().count() != 1 || file.starts_with('.') {
                return Err(Error::field(path, "weight_map", format!("`{file}`"), "a file name without a folder"));
            }
        }
        Ok(map)
    }

    fn files(&self) -> Vec<&str> {
        let mut files: Vec<&str> = self.weight_map.values().map(String::as_str).collect();
        files.sort_unstable();
        files.dedup();
        files
    }
}

#[derive(Debug, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

struct Located {
    file: usize,
    entry: Entry,
    /// Of the tensor's bytes, from the file's beginning.
    start: u64,
}

/// The tensors of a folder, or of single files.
pub struct SafetensorsFiles {
    paths: Vec<PathBuf>,
    tensors: HashMap<String, Located>,
    folder: PathBuf,
}

impl SafetensorsFiles {
    /// Opens what a model folder holds.
    ///
    /// # Errors
    /// If a file is missing, cut short or damaged.
    pub fn open(folder: &Path) -> Result<Self> {
        let index = folder.join(INDEX);
        if !index.exists() {
            let single = folder.join(SINGLE);
            if !single.exists() {
                return Err(Error::Missing {
                    path: folder.to_owned(),
                    what: format!("{SINGLE} or {INDEX}"),
                    remedy: "download the model's weights in safetensors form".into(),
                });
            }
            return Self::open_files(folder, vec![single]);
        }
        let text = std::fs::read_to_string(&index).map_err(io(&index, "read"))?;
        let map = WeightMap::parse(&text, &index)?;
        let files: Vec<PathBuf> = map.files().iter().map(|file| folder.join(file)).collect();
        if let Some(path) = files.iter().find(|path| !path.exists()) {
            let (path, remedy) = (path.clone(), format!("download it again: {INDEX} names it"));
            return Err(Error::Missing { path, what: "file".into(), remedy });
        }
        Self::open_files(folder, files)
    }

    /// Opens these files.
    ///
    /// # Errors
    /// As [`SafetensorsFiles::open`].
    pub fn open_files(folder: &Path, paths: Vec<PathBuf>) -> Result<Self> {
        let mut tensors = HashMap::new();
        for (file, path) in paths.iter().enumerate() {
            let mut reader = File::open(path).map_err(io(path, "read"))?;
            let length = reader.metadata().map_err(io(path, "read"))?.len();
            for (name, entry, start) in read_header(&mut reader, length, path)? {
                tensors.insert(name, Located { file, entry, start });
            }
        }
        Ok(Self { paths, tensors, folder: folder.to_owned() })
    }

    /// Whether a tensor is there in float32.
    pub fn is_f32(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|t| t.entry.dtype == "F32")
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The elements of an integer tensor.
    ///
    /// # Errors
    /// If it is not there or not int64.
    pub fn read_i64(&self, name: &str) -> Result<Vec<i64>> {
        let (bytes, dtype, path) = self.bytes(name)?;
        if dtype != "I64" {
            return Err(Error::corrupt(path, format!("tensor `{name}` has dtype {dtype}, expected I64")));
        }
        Ok(bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect())
    }

    fn bytes(&self, name: &str) -> Result<(Vec<u8>, &str, &Path)> {
        let located = self.tensors.get(name).ok_or_else(|| self.error(format!("tensor `{name}` is missing")))?;
        let path = &self.paths[located.file];
        let [from, to] = located.entry.data_offsets;
        let mut bytes = vec![0; (to - from) as usize];
        let mut file = File::open(path).map_err(io(path, "read"))?;
        file.seek(SeekFrom::Start(located.start)).map_err(io(path, "read"))?;
        file.read_exact(&mut bytes).map_err(io(path, "read"))?;
        Ok((bytes, &located.entry.dtype, path))
    }
}

/// Checks the header of a safetensors file in memory; the names of its tensors.
///
/// # Errors
/// [`Error::Corrupt`] if it is damaged.
pub fn read_safetensors_header(bytes: &[u8], path: &Path) -> Result<Vec<String>> {
    let header = read_header(&mut &bytes[..], bytes.len() as u64, path)?;
    Ok(header.into_iter().map(|(name, ..)| name).collect())
}

fn element_size(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F64" | "I64" | "U64" => 8,
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        "I8" | "U8" | "BOOL" | "F8_E4M3" | "F8_E5M2" => 1,
        _ => return None,
    })
}

/// Name, entry and place of every tensor, each checked against the file's length.
fn read_header(reader: &mut impl Read, length: u64, path: &Path) -> Result<Vec<(String, Entry, u64)>> {
    let again = "the file is cut short or damaged; download it again";
    let mut prefix = [0u8; 8];
    reader.read_exact(&mut prefix).map_err(|_| Error::corrupt(path, format!("no safetensors header: {again}")))?;
    let header = u64::from_le_bytes(prefix);
    if header > MAX_HEADER || header + 8 > length {
        return Err(Error::corrupt(path, format!("a header of {header} bytes in a file of {length}: {again}")));
    }
    let mut text = vec![0u8; header as usize];
    reader.read_exact(&mut text).map_err(io(path, "read"))?;
    let json: HashMap<String, serde_json::Value> =
        serde_json::from_slice(&text).map_err(|e| Error::corrupt(path, format!("not a safetensors header: {e}")))?;
    let mut tensors = Vec::with_capacity(json.len());
    for (name, value) in json {
        if name == "__metadata__" {
            continue;
        }
        let entry: Entry = serde_json::from_value(value)
            .map_err(|e| Error::corrupt(path, format!("tensor `{name}` has a damaged entry: {e}")))?;
        let [from, to] = entry.data_offsets;
        let count = entry.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64));
        if let Some(size) = element_size(&entry.dtype) {
            let needed = count.and_then(|n| n.checked_mul(size));
            if to < from || needed != Some(to - from) {
                let problem = format!("tensor `{name}` of {:?} {} does not fit its bytes", entry.shape, entry.dtype);
                return Err(Error::corrupt(path, problem));
            }
        }
        if to < from || to > length - 8 - header {
            return Err(Error::corrupt(path, format!("tensor `{name}` ends behind the end of the file: {again}")));
        }
        tensors.push((name, entry, 8 + header + from));
    }
    Ok(tensors)
}

impl TensorSource for SafetensorsFiles {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|t| t.entry.shape.clone())
    }

    fn read(&self, name: &str) -> Result<Vec<f32>> {
        let (bytes, dtype, path) = self.bytes(name)?;
        let pairs = || bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
        match dtype {
            "F32" => Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
            "F16" => Ok(pairs().map(|bits| f16::from_bits(bits).to_f32()).collect()),
            "BF16" => Ok(pairs().map(|bits| bf16::from_bits(bits).to_f32()).collect()),
            other => {
                let problem = format!("tensor `{name}` has dtype {other}, expected F32, F16 or BF16");
                Err(Error::corrupt(path, problem))
            }
        }
    }

    fn load(&self, name: &str, shape: &[usize], ops: &dyn Ops, dtype: Option<DType>) -> Result<Tensor> {
        let located = self.tensors.get(name).ok_or_else(|| self.error(format!("tensor `{name}` is missing")))?;
        let stored = match located.entry.dtype.as_str() {
            "F32" => Some(DType::F32),
            "BF16" => Some(DType::Bf16),
            _ => None,
        };
        let dtype = dtype.or(stored).unwrap_or(DType::F32);
        if let (Some(stored), 2) = (stored, shape.len()) {
            let path = &self.paths[located.file];
            let file = File::open(path).map_err(io(path, "read"))?;
            if let Some(tensor) = ops.open_matrix((&file, located.start), stored, shape, dtype)? {
                return Ok(tensor);
            }
        }
        Ok(ops.upload(self.read(name)?, shape, dtype)?)
    }

    fn error(&self, problem: String) -> Error {
        Error::corrupt(&self.folder, problem)
    }
}
