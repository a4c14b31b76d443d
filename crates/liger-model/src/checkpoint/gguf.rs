//! The GGUF container: metadata and tensor directory. Every length is checked against the file before memory is taken
//! for it, so that a damaged or hostile file costs no more than its own size.
//!
//! Format: the GGUF specification of the ggml project, versions 2 and 3.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use super::gguf_blocks::BlockType;
use crate::error::{Error, Result};

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum MetadataValue {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Either float.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// UTF-8 text; bytes that are not UTF-8 are replaced.
    Text(String),
    /// Values of one type.
    Array(Vec<MetadataValue>),
}

impl MetadataValue {
    /// A whole number that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(n) => Some(*n),
            Self::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// Any number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Unsigned(n) => Some(*n as f64),
            Self::Signed(n) => Some(*n as f64),
            Self::Float(x) => Some(*x),
            _ => None,
        }
    }

    /// A text.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// Where a tensor lies and what it is.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorEntry {
    /// Outermost axis first, the reverse of the file's order.
    pub shape: Vec<usize>,
    /// How its elements are packed.
    pub(crate) block: BlockType,
    /// Bytes from the file's beginning.
    pub(crate) start: u64,
    /// Bytes it takes.
    pub(crate) bytes: u64,
}

/// The directory of a GGUF file.
#[derive(Debug)]
pub struct Directory {
    /// Metadata by key.
    pub metadata: HashMap<String, MetadataValue>,
    /// Tensors by ggml's names.
    pub tensors: HashMap<String, TensorEntry>,
}

struct Reader<'a, R> {
    inner: R,
    position: u64,
    length: u64,
    path: &'a Path,
}

/// Of tensors, where the metadata says nothing.
pub(crate) const ALIGNMENT: u64 = 32;

const CUT: &str = "the file is cut short or damaged; download it again";

impl<R: Read> Reader<'_, R> {
    fn error(&self, problem: impl std::fmt::Display) -> Error {
        Error::corrupt(self.path, format!("{problem} (at byte {})", self.position))
    }

    fn bytes(&mut self, count: u64) -> Result<Vec<u8>> {
        if count > self.length - self.position {
            return Err(self.error(format!("{count} bytes wanted, {} left: {CUT}", self.length - self.position)));
        }
        let mut bytes = vec![0; count as usize];
        self.inner.read_exact(&mut bytes).map_err(|e| self.error(format!("{e}: {CUT}")))?;
        self.position += count;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.bytes(N as u64)?);
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String> {
        let length = self.u64()?;
        Ok(String::from_utf8_lossy(&self.bytes(length)?).into_owned())
    }

    /// A number of things that take at least `size` bytes each.
    fn count(&mut self, size: u64, what: &str) -> Result<usize> {
        let count = self.u64()?;
        if count.checked_mul(size).is_none_or(|bytes| bytes > self.length - self.position) {
            return Err(self.error(format!("{count} {what} do not fit in the file: {CUT}")));
        }
        Ok(count as usize)
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<MetadataValue> {
        Ok(match kind {
            0 => MetadataValue::Unsigned(u64::from(self.array::<1>()?[0])),
            1 => MetadataValue::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => MetadataValue::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => MetadataValue::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => MetadataValue::Unsigned(u64::from(self.u32()?)),
            5 => MetadataValue::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => MetadataValue::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => MetadataValue::Bool(self.array::<1>()?[0] != 0),
            8 => MetadataValue::Text(self.text()?),
            9 if depth < 4 => {
                let kind = self.u32()?;
                let count = self.count(1, "array elements")?;
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(kind, depth + 1)?);
                }
                MetadataValue::Array(values)
            }
            10 => MetadataValue::Unsigned(self.u64()?),
            11 => MetadataValue::Signed(i64::from_le_bytes(self.array()?)),
            12 => MetadataValue::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(self.error(format!("metadata of unknown type {other}"))),
        })
    }
}

impl Directory {
    /// Reads the head of a file of `length` bytes; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::Corrupt`] with the byte at which it stopped making sense.
    pub fn read(reader: impl Read, length: u64, path: &Path) -> Result<Self> {
        let mut r = Reader { inner: reader, position: 0, length, path };
        if r.array()? != *b"GGUF" {
            return Err(Error::corrupt(path, "not a GGUF file; expected a model folder or a .gguf file"));
        }
        let version = r.u32()?;
        if !(2..=3).contains(&version) {
            return Err(r.error(format!("GGUF version {version}, expected 2 or 3")));
        }
        // A tensor's entry takes at least 24 bytes, a metadata pair at least 13.
        let tensor_count = r.count(24, "tensors")?;
        let pairs = r.count(13, "metadata pairs")?;
        let mut metadata = HashMap::new();
        for _ in 0..pairs {
            let key = r.text()?;
            let kind = r.u32()?;
            let value = r.value(kind, 0)?;
            metadata.insert(key, value);
        }
        let mut entries = Vec::new();
        for _ in 0..tensor_count {
            entries.push(read_entry(&mut r)?);
        }
        let alignment = metadata.get("general.alignment").and_then(MetadataValue::as_u64).unwrap_or(ALIGNMENT);
        if alignment == 0 || alignment > 1 << 20 {
            return Err(Error::field(path, "general.alignment", alignment, "a small power of two"));
        }
        let data = r.position.next_multiple_of(alignment);
        let mut tensors = HashMap::new();
        for (name, shape, block, offset) in entries {
            let count = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64));
            let bytes = count.and_then(|count| block.bytes(count));
            let start = data.checked_add(offset);
            let (Some(bytes), Some(start)) = (bytes, start) else {
                return Err(Error::corrupt(path, format!("tensor `{name}` has an impossible shape {shape:?}")));
            };
            if start.checked_add(bytes).is_none_or(|end| end > length) {
                return Err(Error::corrupt(path, format!("tensor `{name}` ends behind the end of the file: {CUT}")));
            }
            tensors.insert(name, TensorEntry { shape, block, start, bytes });
        }
        Ok(Self { metadata, tensors })
    }
}

fn read_entry(r: &mut Reader<'_, impl Read>) -> Result<(String, Vec<usize>, BlockType, u64)> {
    let name = r.text()?;
    let axes = r.u32()?;
    if axes > 4 {
        return Err(r.error(format!("tensor `{name}` has {axes} axes, at most 4 are possible")));
    }
    let mut shape = Vec::new();
    for _ in 0..axes {
        let length = r.u64()?;
        shape.insert(0, usize::try_from(length).map_err(|_| r.error("an axis too long"))?);
    }
    let kind = r.u32()?;
    let supported = "supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K";
    let block = BlockType::from_id(kind)
        .ok_or_else(|| r.error(format!("tensor `{name}` is packed as ggml type {kind}; {supported}")))?;
    Ok((name, shape, block, r.u64()?))
}
