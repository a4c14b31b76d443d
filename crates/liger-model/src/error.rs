use std::path::{Path, PathBuf};

/// What can go wrong with a model, its files or its use. Each message is one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused to read or write.
    #[error("{}: cannot {doing}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// "read", "write".
        doing: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A field does not say what it must.
    #[error("{}: field `{field}`: found {found}, expected {expected}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, dotted.
        field: String,
        /// What stands there.
        found: String,
        /// What may stand there.
        expected: String,
    },
    /// A file is damaged.
    #[error("{}: {problem}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// Something is not there.
    #[error("{}: no {what} here; {remedy}", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// What was looked for.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// A request that this model or file cannot serve.
    #[error("{0}")]
    Refused(String),
    /// An operation of the device failed.
    #[error(transparent)]
    Device(#[from] liger_tensor::Error),
}

/// Result of the functions of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn corrupt(path: &Path, problem: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn field(path: &Path, field: &str, found: impl ToString, expected: impl Into<String>) -> Self {
        let (field, found) = (field.to_owned(), found.to_string());
        Self::Field { path: path.to_owned(), field, found, expected: expected.into() }
    }
}

/// For `map_err` on the system's errors.
pub(crate) fn io(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, doing, source }
}
