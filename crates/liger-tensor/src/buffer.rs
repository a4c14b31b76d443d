use std::ops::Deref;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

/// Elements in host memory: a tensor's own, or memory that is only read, such as a file's.
#[derive(Clone)]
pub enum Buffer<T: 'static> {
    /// The tensor's own.
    Owned(Vec<T>),
    /// The tensor's own, out of a pool.
    Pooled(Lines),
    /// Somebody else's too.
    Shared(Arc<dyn AsRef<[T]> + Send + Sync>),
}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Owned(data) => data,
            Self::Pooled(lines) => lines.as_slice(),
            Self::Shared(data) => (**data).as_ref(),
        }
    }
}

impl<T> From<Vec<T>> for Buffer<T> {
    fn from(data: Vec<T>) -> Self {
        Self::Owned(data)
    }
}

/// Memory that begins with a line of the caches. Vectors as wide as a line that lie across two take twice the time.
#[derive(Clone, Default)]
pub struct Lines {
    lines: Vec<Line>,
    bytes: usize,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl Lines {
    /// Room for `count` elements, which are zero.
    pub fn zeroed<T: Pod>(count: usize) -> Self {
        let bytes = count * size_of::<T>();
        Self { lines: bytemuck::zeroed_vec(bytes.div_ceil(size_of::<Line>())), bytes }
    }

    /// Makes room for at least `count` elements; what was there is lost if it has to grow.
    pub fn reserve<T: Pod>(&mut self, count: usize) {
        if self.bytes < count * size_of::<T>() {
            *self = Self::zeroed::<T>(count);
        }
    }

    /// All elements.
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.bytes / size_of::<T>()]
    }

    /// All elements, to write.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.bytes / size_of::<T>()]
    }
}
