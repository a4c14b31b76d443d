use std::path::{Path, PathBuf};

/// What can go wrong while tuning. Each message is one line that says what to do.
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
    /// A line of a data file cannot be read at all.
    #[error("{}: line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A file or setting that cannot be used.
    #[error("{}: {problem}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A setting that makes no sense.
    #[error("recipe: `{field}`: found {found}, expected {expected}")]
    Setting {
        /// The field, dotted.
        field: &'static str,
        /// What stands there.
        found: String,
        /// What may stand there.
        expected: &'static str,
    },
    /// The numbers went wrong.
    #[error(
        "step {step}: the loss is {loss}, the gradient norm {norm}; the step's data: {data}; last good checkpoint: \
         {checkpoint}. Lower `train.learning_rate`, or look at that data"
    )]
    NotFinite {
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        norm: f64,
        /// Documents of the step.
        data: String,
        /// Where to go on from.
        checkpoint: String,
    },
    /// The model refused.
    #[error(transparent)]
    Model(#[from] liger_model::Error),
}

impl From<liger_tensor::Error> for Error {
    fn from(error: liger_tensor::Error) -> Self {
        Self::Model(error.into())
    }
}

/// Result of the functions of this crate.
pub type Result<T> = std::result::Result<T, Error>;

pub(crate) fn io(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, doing, source }
}

pub(crate) fn unusable(path: &Path, problem: impl Into<String>) -> Error {
    Error::Unusable { path: path.to_owned(), problem: problem.into() }
}
