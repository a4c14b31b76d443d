use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use half::bf16;

use crate::quantize::{BLOCK, SUPER_BLOCK};
use crate::{Buffer, Error, Lines, Result};

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// bfloat16, for frozen weights.
    Bf16,
    /// For frozen weights on the CPU, as ggml has it: of every 32 elements of a row a float16 scale, and 8 bits each.
    Q8_0,
    /// For frozen weights on the CPU, as ggml has it: of every 32 elements of a row a float16 scale and minimum, and 4 bits
    /// each.
    Q4_1,
    /// For frozen weights on the CPU, as ggml has it: of every 256 elements of a row a float16 scale and minimum, of every 32 of them 6
    /// bits for each of the two, and 4 bits each.
    Q4K,
    /// For frozen weights on the CPU, as ggml has it: of every 256 elements of a row a float16 scale, of every 16 of them 8 bits for it,
    /// and 6 bits each.
    Q6K,
}

impl DType {
    /// Bytes of `count` elements: of whole rows, for those in blocks.
    pub fn bytes(self, count: usize) -> usize {
        match self {
            Self::F32 => 4 * count,
            Self::Bf16 => 2 * count,
            Self::Q8_0 => count / BLOCK * 34,
            Self::Q4_1 => count / BLOCK * 20,
            Self::Q4K => count / SUPER_BLOCK * 144,
            Self::Q6K => count / SUPER_BLOCK * 210,
        }
    }

    /// Elements that are packed together.
    pub fn block(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_1 => BLOCK,
            Self::Q4K | Self::Q6K => SUPER_BLOCK,
        }
    }

    /// For people: "bfloat16".
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_1 => "Q4_1",
            Self::Q4K => "Q4_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// Whether elements are packed in blocks.
    pub fn is_quantized(self) -> bool {
        self.block() > 1
    }
}

/// Memory that only its own device can read.
pub trait DeviceMemory: Any + Send + Sync {
    /// For the device to find its own type again.
    fn as_any(&self) -> &dyn Any;
    /// The same, to write.
    fn as_any_mut(&mut self) -> &mut dyn Any;
    /// Room for so many bytes.
    fn bytes(&self) -> usize;
}

/// Where the elements of a tensor are.
pub enum Storage {
    /// In host memory.
    F32(Buffer<f32>),
    /// In host memory.
    Bf16(Buffer<bf16>),
    /// On another device.
    Device(Box<dyn DeviceMemory>),
}

/// A dense row-major array on one device. Owned: a tensor is never a view of another.
pub struct Tensor {
    shape: Vec<usize>,
    dtype: DType,
    storage: Storage,
    pool: Option<Arc<Pool>>,
    beside: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl Tensor {
    /// Wraps host memory of `shape.iter().product()` elements.
    ///
    /// # Panics
    /// If the number of elements is not that of the shape.
    pub fn host(shape: &[usize], storage: Storage) -> Self {
        let (count, dtype) = match &storage {
            Storage::F32(data) => (data.len(), DType::F32),
            Storage::Bf16(data) => (data.len(), DType::Bf16),
            Storage::Device(_) => (shape.iter().product(), DType::F32),
        };
        assert_eq!(count, shape.iter().product::<usize>(), "elements of shape {shape:?}");
        Self::new(shape, dtype, storage, None)
    }

    fn new(shape: &[usize], dtype: DType, storage: Storage, pool: Option<Arc<Pool>>) -> Self {
        Self { shape: shape.to_vec(), dtype, storage, pool, beside: OnceLock::new() }
    }

    /// A float32 tensor whose memory comes from `pool` and goes back there when it is dropped. Its elements are those
    /// of whoever had the memory before.
    pub fn pooled(shape: &[usize], pool: &Arc<Pool>) -> Self {
        let data = pool.take(DType::F32.bytes(shape.iter().product()));
        let storage = Storage::F32(Buffer::Pooled(data));
        Self::new(shape, DType::F32, storage, Some(pool.clone()))
    }

    /// The same in bfloat16.
    pub fn pooled_bf16(shape: &[usize], pool: &Arc<Pool>) -> Self {
        let data = pool.take(DType::Bf16.bytes(shape.iter().product()));
        let storage = Storage::Bf16(Buffer::Pooled(data));
        Self::new(shape, DType::Bf16, storage, Some(pool.clone()))
    }

    /// Wraps memory of another device.
    pub fn device(shape: &[usize], dtype: DType, memory: Box<dyn DeviceMemory>) -> Self {
        Self::new(shape, dtype, Storage::Device(memory), None)
    }

    /// Lengths of the axes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the elements.
    pub fn bytes(&self) -> usize {
        self.dtype.bytes(self.len())
    }

    /// Length of axis `axis`, 1 past the last.
    pub fn dim(&self, axis: usize) -> usize {
        self.shape.get(axis).copied().unwrap_or(1)
    }

    /// The same elements under another shape.
    ///
    /// # Panics
    /// If the number of elements differs.
    pub fn reshaped(mut self, shape: &[usize]) -> Self {
        assert_eq!(self.len(), shape.iter().product::<usize>(), "reshape {:?} to {shape:?}", self.shape);
        self.shape = shape.to_vec();
        self.beside.take();
        self
    }

    /// Makes it the first `rows` rows (axis 0) of its memory, which may have room for more than it has now.
    ///
    /// # Panics
    /// If the memory is the host's, or has no room for so many.
    pub fn set_rows(&mut self, rows: usize) {
        self.shape[0] = rows;
        self.beside.take();
        let Storage::Device(memory) = &self.storage else { panic!("rows of host memory") };
        assert!(self.bytes() <= memory.bytes(), "{:?} in {} bytes", self.shape, memory.bytes());
    }

    /// Where the elements are.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// The same, to write.
    pub fn storage_mut(&mut self) -> &mut Storage {
        self.beside.take();
        &mut self.storage
    }

    /// What a device keeps beside the elements, if it is of this type.
    pub fn beside<T: Any>(&self) -> Option<&T> {
        self.beside.get()?.downcast_ref()
    }

    /// Keeps something that a device made of the elements, until they are written to or get another shape; what is there already stays.
    pub fn keep_beside<T: Any + Send + Sync>(&self, value: T) {
        self.beside.get_or_init(|| Box::new(value));
    }

    /// The elements, if they are float32 in host memory.
    ///
    /// # Errors
    /// [`Error::Storage`] for anything else.
    pub fn as_f32(&self) -> Result<&[f32]> {
        match &self.storage {
            Storage::F32(data) => Ok(data),
            other => Err(wrong_storage(other, "host float32")),
        }
    }

    /// The elements, if they are bfloat16 in host memory.
    ///
    /// # Errors
    /// [`Error::Storage`] for anything else.
    pub fn as_bf16(&self) -> Result<&[bf16]> {
        match &self.storage {
            Storage::Bf16(data) => Ok(data),
            other => Err(wrong_storage(other, "host bfloat16")),
        }
    }

    /// The elements to write, if they are the tensor's own and float32 in host memory.
    ///
    /// # Errors
    /// [`Error::Storage`] for anything else.
    pub fn as_f32_mut(&mut self) -> Result<&mut [f32]> {
        self.beside.take();
        match &mut self.storage {
            Storage::F32(Buffer::Owned(data)) => Ok(data),
            Storage::F32(Buffer::Pooled(lines)) => Ok(lines.as_mut_slice()),
            other => Err(wrong_storage(other, "host float32")),
        }
    }

    /// The elements to write, if they are the tensor's own and bfloat16 in host memory.
    ///
    /// # Errors
    /// [`Error::Storage`] for anything else.
    pub fn as_bf16_mut(&mut self) -> Result<&mut [bf16]> {
        self.beside.take();
        match &mut self.storage {
            Storage::Bf16(Buffer::Owned(data)) => Ok(data),
            Storage::Bf16(Buffer::Pooled(lines)) => Ok(lines.as_mut_slice()),
            other => Err(wrong_storage(other, "own host bfloat16")),
        }
    }
}

fn wrong_storage(found: &Storage, expected: &'static str) -> Error {
    let found = match found {
        Storage::F32(Buffer::Shared(_)) => "host float32 that is only read",
        Storage::F32(Buffer::Owned(_) | Buffer::Pooled(_)) => "host float32",
        Storage::Bf16(_) => "host bfloat16",
        Storage::Device(_) => "another device",
    };
    Error::Storage { operation: "read", found, expected }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        if let (Some(pool), Storage::F32(Buffer::Pooled(lines)) | Storage::Bf16(Buffer::Pooled(lines))) =
            (&self.pool, &mut self.storage)
        {
            pool.give_back(std::mem::take(lines));
        }
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor{:?} {:?}", self.shape, self.dtype)
    }
}

/// Host memory that tensors give back and take again, so that a step after the first allocates nothing. What waits there is
/// at most twice the most that tensors held at once: texts of ever new lengths do not fill the memory.
#[derive(Default)]
pub struct Pool(Mutex<Blocks>);

/// Lengths are in bytes.
#[derive(Default)]
struct Blocks {
    /// By exact length: the sizes of a step are few and repeat.
    free: HashMap<usize, Vec<Lines>>,
    waiting: usize,
    in_use: usize,
    peak: usize,
}

impl Pool {
    fn take(&self, bytes: usize) -> Lines {
        let mut blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.in_use += bytes;
        blocks.peak = blocks.peak.max(blocks.in_use);
        let found = blocks.free.get_mut(&bytes).and_then(Vec::pop);
        if found.is_some() {
            blocks.waiting -= bytes;
        }
        drop(blocks);
        found.unwrap_or_else(|| Lines::zeroed::<u8>(bytes))
    }

    fn give_back(&self, data: Lines) {
        let bytes = data.as_slice::<u8>().len();
        let mut blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.in_use -= bytes;
        if blocks.waiting + bytes > 2 * blocks.peak {
            blocks.free.clear();
            blocks.waiting = 0;
        }
        blocks.waiting += bytes;
        blocks.free.entry(bytes).or_default().push(data);
    }

    /// Frees what no tensor holds now: between phases whose sizes differ.
    pub fn trim(&self) {
        let mut blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.free.clear();
        blocks.waiting = 0;
        blocks.peak = blocks.in_use;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_ever_new_lengths_do_not_fill_the_memory() {
        let pool = Arc::new(Pool::default());
        let waiting = || pool.0.lock().unwrap().waiting;
        for length in 1..1000 {
            let pair = [Tensor::pooled(&[length], &pool), Tensor::pooled(&[2 * length], &pool)];
            drop(pair);
            assert!(waiting() <= 24 * length, "{} bytes wait after texts of {length}", waiting());
        }
        drop(Tensor::pooled(&[7], &pool));
        let before = waiting();
        drop(Tensor::pooled(&[7], &pool));
        assert_eq!(waiting(), before, "a block of a size that waits is taken, not made");
        pool.trim();
        assert_eq!(waiting(), 0);
    }
}
