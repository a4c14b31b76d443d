use std::ops::Deref;
use std::sync::Arc;

/// Elements in host memory: a tensor's own, or memory that is only read, such as a file's.
#[derive(Clone)]
pub enum Buffer<T: 'static> {
    /// The tensor's own.
    Owned(Vec<T>),
    /// Somebody else's too.
    Shared(Arc<dyn AsRef<[T]> + Send + Sync>),
}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Owned(data) => data,
            Self::Shared(data) => (**data).as_ref(),
        }
    }
}

impl<T> From<Vec<T>> for Buffer<T> {
    fn from(data: Vec<T>) -> Self {
        Self::Owned(data)
    }
}
