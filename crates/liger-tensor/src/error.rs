/// What can go wrong inside a device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor does not have the shape that the operation needs.
    #[error("{operation}: found a tensor of shape {found:?}, expected {expected}")]
    Shape {
        /// The operation that refused.
        operation: &'static str,
        /// The shape it was given.
        found: Vec<usize>,
        /// The shape it takes, in words.
        expected: String,
    },
    /// A tensor lives on another device, or has another element type, than the operation needs.
    #[error("{operation}: found a tensor of {found}, expected {expected}")]
    Storage {
        /// The operation that refused.
        operation: &'static str,
        /// What it was given.
        found: &'static str,
        /// What it takes.
        expected: &'static str,
    },
    /// The device has no memory for a tensor.
    #[error(
        "{device}: no memory for {:.2} GiB more ({:.2} of {:.2} GiB are free); use smaller batches (train.micro_batch of a recipe, --batch), shorter texts (data.length), or --recompute layer",
        *needed as f64 / 1e9, *free as f64 / 1e9, *total as f64 / 1e9
    )]
    OutOfMemory {
        /// The device's name.
        device: String,
        /// Bytes asked for.
        needed: usize,
        /// Bytes free.
        free: usize,
        /// Bytes it has.
        total: usize,
    },
    /// The device or one of its libraries failed.
    #[error("{operation}: {message}")]
    Device {
        /// What was being done.
        operation: String,
        /// What the device says.
        message: String,
    },
    /// What was to be kept on the device could not be read.
    #[error("cannot read: {0}")]
    Read(#[from] std::io::Error),
    /// A token id is not in the embedding table.
    #[error("token id {id} is out of range: the model has {vocabulary} tokens")]
    TokenOutOfRange {
        /// The id found.
        id: i64,
        /// Rows of the embedding table.
        vocabulary: usize,
    },
}

impl Error {
    /// Of a device without products of quantised weights.
    pub const NO_BLOCKS: Self =
        Self::Storage { operation: "upload", found: "quantised weights", expected: "f32 or bf16 on this device" };
}

/// Result of a device operation.
pub type Result<T> = std::result::Result<T, Error>;
