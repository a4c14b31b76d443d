//! The operations of `liger-tensor` on an NVIDIA GPU: kernels of this crate (`kernels/`), compiled by NVRTC for the GPU at
//! hand when they are first used, and cuBLASLt. CUDA is looked for when the program runs; the crate builds without it.
//!
//! ```no_run
//! use liger_tensor::{DType, Ops};
//! let gpu = liger_cuda::Cuda::open(0, DType::Bf16).map_err(|e| println!("on the CPU, then: {e}"));
//! ```

mod attention;
mod batch;
mod compile;
mod driver;
mod gemm;
mod libraries;
mod recurrence;
mod rowwise;

use std::any::Any;
use std::sync::Arc;

use half::bf16;
use liger_tensor::{
    AdamwStep, AttentionSpec, DType, DeviceMemory, Error, FeatureSpec, Gemm, KeyValueCache, Ops, Recurrence,
    RecurrenceGradients, Result, Sequences, Storage, Tensor,
};

use batch::{Batch, Batches};
pub use compile::{Compiled, Source, Variant, compile};
use driver::{Arg, Block, Gpu, Kernel, Launch};

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

    fn tensor(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let block = self.gpu.allocate(shape.iter().product::<usize>() * dtype.size())?;
        Ok(Tensor::device(shape, dtype, Box::new(block)))
    }

    fn launch(&self, kernel: Kernel, launch: Launch, args: &[Arg<'_>]) -> Result<()> {
        self.gpu.launch(kernel, Variant::of(self.activations), launch, args)
    }

    fn batch(&self, sequences: &Sequences) -> Result<Arc<Batch>> {
        self.batches.get(&self.gpu, sequences)
    }
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
    elements * activations.size() + floats.iter().map(|(rows, width)| rows * (width + 4) * 4).sum::<usize>()
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
        let block = self.gpu.allocate(data.len() * dtype.size())?;
        match dtype {
            DType::F32 => self.gpu.write(&block, &data)?,
            DType::Bf16 => {
                let narrow: Vec<bf16> = data.into_iter().map(bf16::from_f32).collect();
                self.gpu.write(&block, &narrow)?;
            }
        }
        Ok(Tensor::device(shape, dtype, Box::new(block) as Box<dyn DeviceMemory>))
    }

    fn download(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        self.to_host(tensor)
    }

    fn copy_rows(&self, destination: &mut Tensor, source: &Tensor, start: usize) -> Result<()> {
        let (at, bytes) = Self::rows("copy_rows", source, destination, start)?;
        self.gpu.copy(pointer("copy_rows", destination)?, pointer("copy_rows", source)? + at as u64, bytes)
    }

    fn write_rows(&self, destination: &mut Tensor, source: &Tensor, start: usize) -> Result<()> {
        let (at, bytes) = Self::rows("write_rows", destination, source, start)?;
        self.gpu.copy(pointer("write_rows", destination)? + at as u64, pointer("write_rows", source)?, bytes)
    }

    fn trim(&self) {
        // An error of earlier work comes up again at the next call that reports one.
        let _ = self.gpu.trim();
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
        gemm::gemm(self, c, a, b, how)
    }

    fn add_bias(&self, x: &mut Tensor, bias: &Tensor) -> Result<()> {
        self.add_bias_(x, bias)
    }

    fn axpby(&self, y: &mut Tensor, a: f32, x: &Tensor, b: f32) -> Result<()> {
        self.axpby_(y, a, x, b)
    }

    fn rms_norm_forward(&self, out: &mut Tensor, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<()> {
        self.norm_forward(out, x, weight, epsilon)
    }

    fn rms_norm_backward(&self, dx: &mut Tensor, x: &Tensor, weight: &Tensor, epsilon: f32, dy: &Tensor) -> Result<()> {
        self.norm_backward(dx, x, weight, epsilon, dy)
    }

    fn combine(&self, out: &mut Tensor, a: f32, x: &Tensor, b: f32, y: &Tensor) -> Result<()> {
        self.combine_(out, a, x, b, y)
    }

    fn rope(
        &self,
        out: &mut Tensor,
        x: &Tensor,
        angles: (&Tensor, &Tensor),
        inverse: bool,
        add: Option<&Tensor>,
    ) -> Result<()> {
        self.rope_(out, x, angles, inverse, add)
    }

    fn swiglu_forward(&self, out: &mut Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
        self.swiglu(out, gate, up)
    }

    fn swiglu_backward(&self, gate: &mut Tensor, up: &mut Tensor, dout: &Tensor) -> Result<()> {
        self.swiglu_gradients(gate, up, dout)
    }

    fn embedding(&self, out: &mut Tensor, table: &Tensor, ids: &[u32]) -> Result<()> {
        self.embed(out, table, ids)
    }

    fn dropout(&self, x: &mut Tensor, p: f32, seed: u64) -> Result<()> {
        self.drop_out(x, p, seed)
    }

    fn attention_forward(
        &self,
        out: &mut Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        sequences: &Sequences,
        spec: AttentionSpec,
        cache: Option<&mut KeyValueCache>,
    ) -> Result<()> {
        self.attention(out, q, k, v, sequences, spec, cache)
    }

    fn attention_backward(
        &self,
        dq: &mut Tensor,
        dk: &mut Tensor,
        dv: &mut Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        dout: &Tensor,
        sequences: &Sequences,
        spec: AttentionSpec,
    ) -> Result<()> {
        self.attention_gradients((dq, dk, dv), (q, k, v), out, dout, sequences, spec)
    }

    fn features_forward(
        &self,
        query: &mut Tensor,
        key: &mut Tensor,
        log_gate: &mut Tensor,
        q: &Tensor,
        k: &Tensor,
        spec: FeatureSpec,
    ) -> Result<()> {
        self.features(query, key, log_gate, (q, k), spec)
    }

    fn features_backward(
        &self,
        dquery: &mut Tensor,
        dkey: &mut Tensor,
        dlog_gate: &Tensor,
        q: &Tensor,
        k: &Tensor,
        spec: FeatureSpec,
    ) -> Result<()> {
        self.feature_gradients(dquery, dkey, dlog_gate, (q, k), spec)
    }

    fn slot_gates_forward(&self, log_gate: &mut Tensor, write: &mut Tensor, k: &Tensor) -> Result<()> {
        self.slot_gates(log_gate, write, k)
    }

    fn slot_gates_backward(&self, dk: &mut Tensor, dlog_gate: &Tensor, dwrite: &Tensor, k: &Tensor) -> Result<()> {
        self.slot_gate_gradients(dk, dlog_gate, dwrite, k)
    }

    fn softmax_forward(&self, x: &mut Tensor) -> Result<()> {
        self.softmax(x)
    }

    fn softmax_backward(&self, dy: &mut Tensor, y: &Tensor) -> Result<()> {
        self.softmax_gradient(dy, y)
    }

    fn gated_recurrence_forward(
        &self,
        out: &mut Tensor,
        inputs: Recurrence<'_>,
        state: Option<&mut Tensor>,
    ) -> Result<()> {
        self.recurrence(out, inputs, state)
    }

    fn gated_recurrence_backward(
        &self,
        gradients: RecurrenceGradients<'_>,
        inputs: Recurrence<'_>,
        initial: Option<&Tensor>,
        dout: &Tensor,
    ) -> Result<()> {
        self.recurrence_gradients(gradients, inputs, initial, dout)
    }

    fn argmax(&self, logits: &Tensor) -> Result<Vec<u32>> {
        self.largest(logits)
    }

    fn cross_entropy(&self, logits: &mut Tensor, labels: &[i64], gradient_scale: Option<f32>) -> Result<Vec<f32>> {
        self.cross_entropies(logits, labels, gradient_scale)
    }

    fn kl_divergence(
        &self,
        student: &mut Tensor,
        teacher: &Tensor,
        count: &[bool],
        gradient_scale: Option<f32>,
    ) -> Result<Vec<f32>> {
        self.kl(student, teacher, count, gradient_scale)
    }

    fn sum_of_squares(&self, tensors: &[&Tensor]) -> Result<f64> {
        self.squares(tensors)
    }

    fn adamw(
        &self,
        parameter: &mut Tensor,
        gradient: &Tensor,
        first_moment: &mut Tensor,
        second_moment: &mut Tensor,
        step: AdamwStep,
    ) -> Result<()> {
        self.adamw_(parameter, gradient, first_moment, second_moment, step)
    }
}
