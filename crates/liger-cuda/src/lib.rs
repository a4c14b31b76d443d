//! The operations of `liger-tensor` on an NVIDIA GPU: kernels of this crate (`kernels/`), compiled by NVRTC for the GPU at
//! hand when they are first used, and cuBLASLt. CUDA is looked for when the program runs; the crate builds without it.
//!
//! ```no_run
//! use liger_tensor::{DType, Ops};
//! let gpu = liger_cuda::Cuda::open(0, DType::Bf16).map_err(|e| println!("on the CPU, then: {e}"));
//! ```

mod attention;
mod attention_step;
mod batch;
mod compile;
mod driver;
mod elementwise;
mod features;
mod gemm;
mod kept;
mod libraries;
mod loss;
mod low_rank;
mod recurrence;
mod sampling;
mod steps;

use std::any::Any;
use std::sync::Arc;

use half::bf16;
use liger_tensor::checks;
use liger_tensor::{
    Activation, AdamwParameter, AdamwStep, Attention, AttentionGradients, DType, DeviceMemory, Draw, Error,
    FeatureGradients, FeatureSpec, Features, Gemm, KeyValueCache, Ops, Recurrence, RecurrenceGradients, Result,
    Sequences, StepOps, Storage, Tensor,
};

use batch::{Batch, Batches};
pub use compile::{Compiled, Source, Variant, compile, compile_instead};
use driver::{Arg, Block, Gpu, Kernel, Launch, long};

/// A GPU as a device.
pub struct Cuda {
    gpu: Arc<Gpu>,
    activations: DType,
    products: gemm::Products,
    batches: Batches,
}

impl Cuda {
    /// Opens GPU number `ordinal`, with activations in `activations`.
    ///
    /// # Errors
    /// One sentence: which library is missing and where it was looked for, or what the driver says.
    pub fn open(ordinal: usize, activations: DType) -> std::result::Result<Self, String> {
        let gpu = Arc::new(Gpu::open(ordinal as i32)?);
        let products = gemm::Products::new(&gpu).map_err(|e| e.to_string())?;
        Ok(Self { gpu, activations, products, batches: Batches::default() })
    }

    /// From now on the time of every kernel and product is taken.
    pub fn start_profile(&self) {
        self.gpu.start_profile();
    }

    /// Name, number of runs and milliseconds of what ran since [`Cuda::start_profile`], longest first.
    ///
    /// # Errors
    /// If the GPU failed.
    pub fn finish_profile(&self) -> Result<Vec<(String, usize, f64)>> {
        self.gpu.finish_profile()
    }

    /// How many blocks of memory were taken from the driver so far: none is while work repeats itself.
    pub fn blocks_taken(&self) -> usize {
        self.gpu.blocks_taken()
    }

    /// Bytes of memory taken from the driver, in use or not.
    pub fn held_bytes(&self) -> usize {
        self.gpu.held_bytes()
    }

    fn tensor(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let block = self.gpu.allocate(dtype.bytes(shape.iter().product()))?;
        Ok(Tensor::device(shape, dtype, Box::new(block)))
    }

    fn launch(&self, kernel: Kernel, launch: Launch, args: &[Arg<'_>]) -> Result<()> {
        self.gpu.launch(kernel, Variant::of(self.activations), launch, args)
    }

    fn batch(&self, sequences: &Sequences) -> Result<Arc<Batch>> {
        self.batches.get(&self.gpu, sequences)
    }

    /// An activation as an argument.
    fn act(&self, operation: &'static str, x: &Tensor) -> Result<Arg<'static>> {
        typed(operation, x, self.activations).map(Arg::Pointer)
    }

    fn f32(&self, operation: &'static str, x: &Tensor) -> Result<Arg<'static>> {
        typed(operation, x, DType::F32).map(Arg::Pointer)
    }

    /// `y` becomes `x` in `dtype`, from the other type.
    fn convert(&self, y: u64, x: u64, dtype: DType, n: usize) -> Result<()> {
        let name = if dtype == DType::Bf16 { "narrow" } else { "widen" };
        self.launch((Source::Elementwise, name), Launch::over(n, 4), &[Arg::Pointer(y), Arg::Pointer(x), long(n)])
    }

    /// Copies elements between tensors of one type; `at` and `from` are the first ones.
    fn copy(
        &self,
        operation: &'static str,
        (destination, at): (&Tensor, usize),
        (source, from): (&Tensor, usize),
        count: usize,
    ) -> Result<()> {
        let size = source.dtype().bytes(1);
        let to = typed(operation, destination, source.dtype())? + (at * size) as u64;
        self.gpu.copy(to, pointer(operation, source)? + (from * size) as u64, count * size)
    }
}

/// Length of a row and number of rows.
fn rows_of(x: &Tensor) -> (usize, usize) {
    let width = x.shape().last().copied().unwrap_or(1).max(1);
    (width, x.len() / width)
}

/// Whether the system shows an NVIDIA card, usable or not.
pub fn is_card_there() -> bool {
    ["/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia", "/dev/dxg"]
        .iter()
        .any(|p| std::path::Path::new(p).exists())
}

/// Where a tensor's elements are on this GPU.
fn pointer(operation: &'static str, tensor: &Tensor) -> Result<u64> {
    let block = match tensor.storage() {
        Storage::Device(memory) => memory.as_any().downcast_ref::<Block>(),
        _ => None,
    };
    let host = Error::Storage { operation, found: "another device", expected: "the GPU" };
    block.map(|b| b.pointer).ok_or(host)
}

/// The same, of a tensor whose elements must be `dtype`.
fn typed(operation: &'static str, tensor: &Tensor, dtype: DType) -> Result<u64> {
    let name = |dtype: DType| if dtype == DType::F32 { "float32" } else { "bfloat16" };
    if tensor.dtype() != dtype {
        return Err(Error::Storage { operation, found: name(tensor.dtype()), expected: name(dtype) });
    }
    pointer(operation, tensor)
}

/// Bytes of shared memory that `Carver` in the kernels cuts into tiles (rows, width) of elements and of float32.
fn shared_bytes(activations: DType, tiles: &[(usize, usize)], floats: &[(usize, usize)]) -> usize {
    let padding = if activations == DType::Bf16 { 8 } else { 4 };
    let elements: usize = tiles.iter().map(|(rows, width)| rows * (width + padding)).sum();
    activations.bytes(elements) + floats.iter().map(|(rows, width)| rows * (width + 4) * 4).sum::<usize>()
}

impl Ops for Cuda {
    fn describe(&self) -> String {
        let dtype = if self.activations == DType::F32 { "float32" } else { "bfloat16" };
        format!("{}, {}, {dtype}", self.gpu.name, self.gpu.arch)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn activations(&self) -> DType {
        self.activations
    }

    fn empty(&self, shape: &[usize]) -> Result<Tensor> {
        self.tensor(shape, self.activations)
    }

    fn empty_f32(&self, shape: &[usize]) -> Result<Tensor> {
        self.tensor(shape, DType::F32)
    }

    fn clear(&self, x: &mut Tensor) -> Result<()> {
        self.gpu.clear(pointer("clear", x)?, x.bytes())
    }

    fn upload(&self, data: Vec<f32>, shape: &[usize], dtype: DType) -> Result<Tensor> {
        if data.len() != shape.iter().product::<usize>() {
            let expected = format!("{} elements", data.len());
            return Err(Error::Shape { operation: "upload", found: shape.to_vec(), expected });
        }
        let block = self.gpu.allocate(dtype.bytes(data.len()))?;
        match dtype {
            DType::F32 => self.gpu.write(&block, &data)?,
            DType::Bf16 => {
                let narrow: Vec<bf16> = data.into_iter().map(bf16::from_f32).collect();
                self.gpu.write(&block, &narrow)?;
            }
            _ => return Err(Error::NO_BLOCKS),
        }
        Ok(Tensor::device(shape, dtype, Box::new(block) as Box<dyn DeviceMemory>))
    }

    fn download(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        match tensor.storage() {
            Storage::F32(data) => Ok(data.to_vec()),
            Storage::Bf16(data) => Ok(data.iter().map(|x| x.to_f32()).collect()),
            Storage::Device(_) if tensor.is_empty() => Ok(Vec::new()),
            Storage::Device(_) => {
                let from = pointer("download", tensor)?;
                match tensor.dtype() {
                    DType::F32 => self.gpu.read(from, tensor.len()),
                    DType::Bf16 => {
                        let raw: Vec<bf16> = self.gpu.read(from, tensor.len())?;
                        Ok(raw.into_iter().map(bf16::to_f32).collect())
                    }
                    _ => Err(Error::NO_BLOCKS),
                }
            }
        }
    }

    fn copy_rows(&self, destination: &mut Tensor, source: &Tensor, start: usize) -> Result<()> {
        let (from, count) = checks::row_range("copy_rows", source, destination, start)?;
        self.copy("copy_rows", (destination, 0), (source, from), count)
    }

    fn write_rows(&self, destination: &mut Tensor, source: &Tensor, start: usize) -> Result<()> {
        let (at, count) = checks::row_range("write_rows", destination, source, start)?;
        self.copy("write_rows", (destination, at), (source, 0), count)
    }

    fn trim(&self) {
        // An error of earlier work comes up again at the next call that reports one.
        let _ = self.gpu.trim();
    }

    fn settle_memory(&self) {
        self.gpu.settle();
    }

    fn synchronize(&self) -> Result<()> {
        self.gpu.synchronize()
    }

    fn memory(&self) -> Option<(usize, usize)> {
        self.gpu.memory()
    }

    fn peak_bytes(&self) -> Option<usize> {
        Some(self.gpu.peak_bytes())
    }

    fn steps(&self) -> Option<&dyn StepOps> {
        (self.activations == DType::Bf16).then_some(self)
    }

    fn random(&self, shape: &[usize], bound: f32, seed: u64, dtype: DType) -> Result<Tensor> {
        let tensor = self.tensor(shape, dtype)?;
        let args = [
            Arg::Pointer(pointer("random", &tensor)?),
            Arg::Float(bound),
            Arg::Long(seed as i64),
            Arg::Long(tensor.len() as i64),
        ];
        let launch = Launch { grid: (1024, 1, 1), block: (256, 1), shared: 0 };
        self.gpu.launch((Source::Elementwise, "uniform"), Variant::of(dtype), launch, &args)?;
        Ok(tensor)
    }

    fn gemm(&self, c: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm) -> Result<()> {
        gemm::gemm(self, c, None, a, b, how)
    }

    fn gemm_onto(&self, c: &mut Tensor, base: &Tensor, a: &Tensor, b: &Tensor, how: Gemm) -> Result<()> {
        gemm::gemm(self, c, Some(base), a, b, how)
    }

    fn low_rank_forward(&self, low: &mut [Tensor], x: &Tensor, a: &[&Tensor]) -> Result<()> {
        low_rank::forward(self, low, x, a)
    }

    fn low_rank_backward(
        &self,
        dx: Option<&mut Tensor>,
        da: &mut [&mut Tensor],
        dlow: &[Tensor],
        x: &Tensor,
        a: &[&Tensor],
    ) -> Result<()> {
        low_rank::backward(self, dx, da, dlow, x, a)
    }

    fn add_bias(&self, x: &mut Tensor, bias: &Tensor) -> Result<()> {
        elementwise::add_bias(self, x, bias)
    }

    fn axpby(&self, y: &mut Tensor, a: f32, x: &Tensor, b: f32) -> Result<()> {
        elementwise::axpby(self, y, a, x, b)
    }

    fn rms_norm_forward(&self, out: &mut Tensor, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<()> {
        elementwise::rms_norm_forward(self, out, x, weight, epsilon)
    }

    fn rms_norm_backward(&self, dx: &mut Tensor, x: &Tensor, weight: &Tensor, epsilon: f32, dy: &Tensor) -> Result<()> {
        elementwise::rms_norm_backward(self, dx, x, weight, epsilon, dy)
    }

    fn combine(&self, out: &mut Tensor, a: f32, x: &Tensor, b: f32, y: &Tensor) -> Result<()> {
        elementwise::combine(self, out, a, x, b, y)
    }

    fn rope_forward(&self, out: &mut Tensor, x: &Tensor, angles: (&Tensor, &Tensor)) -> Result<()> {
        elementwise::rope(self, out, (0.0, 1.0), x, angles, false)
    }

    fn rope_backward(
        &self,
        dx: &mut Tensor,
        keep: f32,
        scale: f32,
        dy: &Tensor,
        angles: (&Tensor, &Tensor),
    ) -> Result<()> {
        elementwise::rope(self, dx, (keep, scale), dy, angles, true)
    }

    fn glu_forward(&self, out: &mut Tensor, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<()> {
        elementwise::glu_forward(self, out, gate, up, activation)
    }

    fn glu_backward(&self, gate: &mut Tensor, up: &mut Tensor, dout: &Tensor, activation: Activation) -> Result<()> {
        elementwise::glu_backward(self, gate, up, dout, activation)
    }

    fn embedding(&self, out: &mut Tensor, table: &Tensor, ids: &[u32]) -> Result<()> {
        elementwise::embedding(self, out, table, ids)
    }

    fn dropout(&self, x: &mut Tensor, p: f32, seed: u64) -> Result<()> {
        elementwise::dropout(self, x, p, seed)
    }

    fn attention_forward(
        &self,
        out: &mut Tensor,
        inputs: Attention<'_>,
        cache: Option<&mut KeyValueCache>,
        statistics: Option<&mut Tensor>,
    ) -> Result<()> {
        attention::forward(self, out, inputs, cache, statistics)
    }

    fn attention_statistics(&self, q: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.empty_f32(&q.shape()[..2])?))
    }

    fn attention_backward(
        &self,
        gradients: AttentionGradients<'_>,
        inputs: Attention<'_>,
        out: &Tensor,
        statistics: Option<&Tensor>,
        dout: &Tensor,
    ) -> Result<()> {
        attention::backward(self, gradients, inputs, (out, statistics), dout)
    }

    fn key_novelty(
        &self,
        scores: &mut Tensor,
        k: &Tensor,
        sequences: &Sequences,
        state: Option<&mut Tensor>,
    ) -> Result<()> {
        kept::novelty(self, scores, k, sequences, state.as_deref())
    }

    fn features_forward(
        &self,
        out: Features<'_>,
        q: &Tensor,
        k: &Tensor,
        angles: (&Tensor, &Tensor),
        spec: FeatureSpec,
    ) -> Result<()> {
        features::forward(self, out, (q, k), angles, spec)
    }

    fn features_backward(
        &self,
        gradients: FeatureGradients<'_>,
        q: &Tensor,
        k: &Tensor,
        angles: (&Tensor, &Tensor),
        spec: FeatureSpec,
    ) -> Result<()> {
        features::backward(self, gradients, (q, k), angles, spec)
    }

    fn slot_gates_forward(&self, log_gate: &mut Tensor, write: &mut Tensor, k: &Tensor) -> Result<()> {
        features::slot_gates_forward(self, log_gate, write, k)
    }

    fn slot_gates_backward(&self, dk: &mut Tensor, dlog_gate: &Tensor, dwrite: &Tensor, k: &Tensor) -> Result<()> {
        features::slot_gates_backward(self, dk, dlog_gate, dwrite, k)
    }

    fn softmax_forward(&self, x: &mut Tensor) -> Result<()> {
        elementwise::softmax_forward(self, x)
    }

    fn softmax_backward(&self, dy: &mut Tensor, y: &Tensor) -> Result<()> {
        elementwise::softmax_backward(self, dy, y)
    }

    fn gated_recurrence_forward(
        &self,
        out: &mut Tensor,
        inputs: Recurrence<'_>,
        state: Option<&mut Tensor>,
        kept: Option<&mut Tensor>,
    ) -> Result<()> {
        recurrence::forward(self, out, inputs, state, kept)
    }

    fn recurrence_states(&self, inputs: Recurrence<'_>) -> Result<Option<Tensor>> {
        let chunks = self.batch(inputs.sequences)?.chunk_count;
        Ok(Some(self.empty_f32(&[chunks, inputs.k.dim(1), inputs.k.dim(2), inputs.v.dim(2)])?))
    }

    fn gated_recurrence_backward(
        &self,
        gradients: RecurrenceGradients<'_>,
        inputs: Recurrence<'_>,
        initial: Option<&Tensor>,
        kept: Option<&Tensor>,
        dout: &Tensor,
    ) -> Result<()> {
        recurrence::backward(self, gradients, inputs, (initial, kept), dout)
    }

    fn argmax(&self, logits: &Tensor) -> Result<Vec<u32>> {
        sampling::argmax(self, logits)
    }

    fn sample(&self, logits: &Tensor, how: Draw, draws: &[f32]) -> Result<Vec<u32>> {
        sampling::sample(self, logits, how, draws)
    }

    fn cross_entropy(&self, logits: &mut Tensor, labels: &[i64], gradient_scale: Option<f32>) -> Result<Vec<f32>> {
        loss::cross_entropy(self, logits, labels, gradient_scale)
    }

    fn kl_divergence(
        &self,
        student: &mut Tensor,
        teacher: &Tensor,
        count: &[bool],
        gradient_scale: Option<f32>,
    ) -> Result<Vec<f32>> {
        loss::kl_divergence(self, student, teacher, count, gradient_scale)
    }

    fn sum_of_squares(&self, tensors: &[&Tensor]) -> Result<f64> {
        loss::sum_of_squares(self, tensors)
    }

    fn adamw(&self, parameters: &mut [AdamwParameter<'_>], step: AdamwStep) -> Result<()> {
        loss::adamw(self, parameters, step)
    }
}
