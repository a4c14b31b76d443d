//! The operations of `liger-tensor` on any CPU: plain loops that the compiler turns into vector code for the CPU at
//! hand (chosen when the program runs), large matrix products of float32 by `gemm-f32`, on as many threads
//! as the global rayon pool has.
//!
//! ```
//! use liger_tensor::{Gemm, Ops};
//! let cpu = liger_cpu::Cpu::new();
//! let x = cpu.upload(vec![1.0, 2.0], &[1, 2], liger_tensor::DType::F32)?;
//! let w = cpu.upload(vec![1.0, 1.0, 0.5, 0.0], &[2, 2], liger_tensor::DType::F32)?;
//! let mut y = cpu.empty(&[1, 2])?;
//! cpu.gemm(&mut y, &x, &w, Gemm::LINEAR)?;
//! assert_eq!(cpu.download(&y)?, [3.0, 0.5]);
//! # Ok::<(), liger_tensor::Error>(())
//! ```

mod attention;
#[cfg(target_arch = "x86_64")]
mod bfloat;
mod dots;
mod element;
mod elementwise;
mod features;
mod gemm;
mod loss;
mod low_rank;
mod mapped;
mod math;
mod memory;
mod narrow;
mod pages;
mod parallel;
mod prefetch;
mod profile;
mod quantized;
mod recurrence;
mod sampling;
mod team;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::any::Any;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use liger_tensor::checks::row_range;
use liger_tensor::quantize::quantize;
use liger_tensor::{
    Activation, AdamwParameter, AdamwStep, Attention, AttentionGradients, BlockRows, DType, Draw, Error,
    FeatureGradients, FeatureSpec, Features, Gemm, KeyValueCache, Ops, Pool, Recurrence, RecurrenceGradients, Result,
    Sequences, Storage, Tensor, low_rank_backward_by_products, low_rank_forward_by_products,
};

use crate::quantized::Quantized;

/// The CPU as a device.
#[derive(Default)]
pub struct Cpu {
    pool: Arc<Pool>,
    profile: profile::Profile,
    /// How attention and the recurrence multiply.
    alone: gemm::Alone,
    /// Whether a cache that grows with the text is bfloat16.
    has_narrow_cache: bool,
}

impl Cpu {
    /// The CPU, on as many threads as the global rayon pool has.
    pub fn new() -> Self {
        Self::default()
    }

    /// The CPU, for bfloat16 weights: where it multiplies bfloat16, products inside attention and recurrence round their operands to it, as
    /// those with the weights do, and what lies between a block's products is bfloat16. So is a cache of keys and values that grows with the
    /// text. Residuals, sums, softmax, gates and states stay float32.
    pub fn with_bfloat16() -> Self {
        Self { alone: gemm::Alone::rounded(), has_narrow_cache: true, ..Self::default() }
    }

    /// Measures every operation from now on.
    pub fn start_profile(&self) {
        self.profile.start();
    }

    /// Name, number of runs and milliseconds of what ran since [`Cpu::start_profile`], longest first.
    pub fn finish_profile(&self) -> Vec<(String, usize, f64)> {
        self.profile.finish()
    }
}

impl Ops for Cpu {
    fn describe(&self) -> String {
        // Debug prints every feature after the name.
        let arch = format!("{:?}", pulp::Arch::new());
        let vectors = match arch.split('(').next().unwrap_or_default() {
            "V4" => "AVX-512",
            "V3" => "AVX2",
            other => other,
        };
        #[cfg(target_arch = "x86_64")]
        let narrow = match bfloat::best() {
            Some(bfloat::Kernel::Amx) => " and AMX",
            Some(bfloat::Kernel::Avx512Bf16) => " with BF16",
            None => "",
        };
        #[cfg(not(target_arch = "x86_64"))]
        let narrow = "";
        format!("cpu, {} threads, {vectors}{narrow}", parallel::threads())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn activations(&self) -> DType {
        DType::F32
    }

    fn growing_cache(&self) -> DType {
        if self.has_narrow_cache { DType::Bf16 } else { DType::F32 }
    }

    fn empty(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::pooled(shape, &self.pool))
    }

    fn empty_operand(&self, shape: &[usize]) -> Result<Tensor> {
        match self.alone {
            gemm::Alone::Full => self.empty(shape),
            #[cfg(target_arch = "x86_64")]
            gemm::Alone::Rounded(_) => Ok(Tensor::pooled_bf16(shape, &self.pool)),
        }
    }

    fn empty_f32(&self, shape: &[usize]) -> Result<Tensor> {
        self.empty(shape)
    }

    fn clear(&self, x: &mut Tensor) -> Result<()> {
        match x.storage() {
            Storage::Bf16(_) => x.as_bf16_mut()?.fill(bf16::ZERO),
            _ => x.as_f32_mut()?.fill(0.0),
        }
        Ok(())
    }

    fn upload(&self, data: Vec<f32>, shape: &[usize], dtype: DType) -> Result<Tensor> {
        if data.len() != shape.iter().product::<usize>() {
            let expected = format!("{} elements", data.len());
            return Err(Error::Shape { operation: "upload", found: shape.to_vec(), expected });
        }
        Ok(Tensor::host(
            shape,
            match dtype {
                DType::F32 => Storage::F32(data.into()),
                DType::Bf16 => Storage::Bf16(data.into_iter().map(bf16::from_f32).collect::<Vec<_>>().into()),
                DType::Q8_0 | DType::Q4_1 if shape.len() == 2 => {
                    let blocks =
                        |rows: Range<usize>| Ok(quantize(&data[rows.start * shape[1]..rows.end * shape[1]], dtype));
                    return self.upload_blocks(&blocks, shape, dtype);
                }
                _ => {
                    let (found, expected) =
                        (dtype.name(), "a type to round to: f32, bf16, or of matrices q8_0 or q4_1");
                    return Err(Error::Storage { operation: "upload", found, expected });
                }
            },
        ))
    }

    fn open_matrix(&self, file: (&File, u64), stored: DType, shape: &[usize], dtype: DType) -> Result<Option<Tensor>> {
        mapped::tensor(file, stored, shape, dtype)
    }

    fn keep_packed(&self, weights: &Tensor) {
        #[cfg(target_arch = "x86_64")]
        if bfloat::best().is_some() && weights.dtype() == DType::Bf16 && bfloat::Panels::pay_for(weights.len()) {
            weights.keep_beside(bfloat::Panels::default());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = weights;
    }

    fn takes_blocks(&self) -> bool {
        true
    }

    fn upload_blocks(&self, rows: &BlockRows<'_>, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let &[height, width] = shape else {
            let expected = "a matrix".to_owned();
            return Err(Error::Shape { operation: "upload_blocks", found: shape.to_vec(), expected });
        };
        if !dtype.is_quantized() || !width.is_multiple_of(dtype.block()) {
            let expected = format!("rows of whole blocks of {} in {}", dtype.block(), dtype.name());
            return Err(Error::Shape { operation: "upload_blocks", found: shape.to_vec(), expected });
        }
        let packed = Quantized::pack(rows, (height, width), dtype)?;
        Ok(Tensor::device(shape, dtype, Box::new(packed)))
    }

    fn download(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        match tensor.storage() {
            Storage::F32(data) => Ok(data.to_vec()),
            Storage::Bf16(data) => Ok(data.iter().map(|x| x.to_f32()).collect()),
            Storage::Device(_) => {
                let weights = gemm::quantized_of(tensor)?;
                let mut all = vec![0.0; tensor.len()];
                let rows = all.chunks_exact_mut(weights.shape().1.max(1)).enumerate();
                rows.for_each(|(i, row)| weights.row(i, row));
                Ok(all)
            }
        }
    }

    fn copy_rows(&self, destination: &mut Tensor, source: &Tensor, start: usize) -> Result<()> {
        let (at, count) = row_range("copy_rows", source, destination, start)?;
        match (destination.storage(), source.storage()) {
            (Storage::Bf16(_), Storage::Bf16(source)) => {
                destination.as_bf16_mut()?.copy_from_slice(&source[at..at + count]);
            }
            _ => destination.as_f32_mut()?.copy_from_slice(&source.as_f32()?[at..at + count]),
        }
        Ok(())
    }

    fn write_rows(&self, destination: &mut Tensor, source: &Tensor, start: usize) -> Result<()> {
        let (at, count) = row_range("write_rows", destination, source, start)?;
        match (destination.storage(), source.storage()) {
            (Storage::Bf16(_), Storage::Bf16(source)) => {
                destination.as_bf16_mut()?[at..at + count].copy_from_slice(source);
            }
            _ => destination.as_f32_mut()?[at..at + count].copy_from_slice(source.as_f32()?),
        }
        Ok(())
    }

    fn trim(&self) {
        self.pool.trim();
    }

    fn available_memory(&self) -> Option<usize> {
        memory::available()
    }

    fn random(&self, shape: &[usize], bound: f32, seed: u64, dtype: DType) -> Result<Tensor> {
        let count: usize = shape.iter().product();
        let data = (0..count as u64).map(|i| bound * elementwise::uniform(seed, i)).collect();
        self.upload(data, shape, dtype)
    }

    fn gemm(&self, c: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm) -> Result<()> {
        self.profile.time("gemm", || gemm::gemm(c, a, b, how))
    }

    fn low_rank_forward(&self, low: &mut [Tensor], x: &Tensor, a: &[&Tensor]) -> Result<()> {
        if !low_rank::go_together(a, x) {
            return low_rank_forward_by_products(self, low, x, a);
        }
        self.profile.time("low_rank_forward", || low_rank::forward(low, x, a))
    }

    fn low_rank_backward(
        &self,
        dx: Option<&mut Tensor>,
        da: &mut [&mut Tensor],
        dlow: &[Tensor],
        x: &Tensor,
        a: &[&Tensor],
    ) -> Result<()> {
        if !low_rank::go_together(a, x) {
            return low_rank_backward_by_products(self, dx, da, dlow, x, a);
        }
        self.profile.time("low_rank_backward", || low_rank::backward(dx, da, dlow, x, a))
    }

    fn add_bias(&self, x: &mut Tensor, bias: &Tensor) -> Result<()> {
        self.profile.time("add_bias", || elementwise::add_bias(x, bias))
    }

    fn axpby(&self, y: &mut Tensor, a: f32, x: &Tensor, b: f32) -> Result<()> {
        self.profile.time("axpby", || elementwise::axpby(y, a, x, b))
    }

    fn rms_norm_forward(&self, out: &mut Tensor, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<()> {
        self.profile.time("rms_norm_forward", || elementwise::rms_norm_forward(out, x, weight, epsilon))
    }

    fn rms_norm_backward(&self, dx: &mut Tensor, x: &Tensor, weight: &Tensor, epsilon: f32, dy: &Tensor) -> Result<()> {
        self.profile.time("rms_norm_backward", || elementwise::rms_norm_backward(dx, x, weight, epsilon, dy))
    }

    fn combine(&self, out: &mut Tensor, a: f32, x: &Tensor, b: f32, y: &Tensor) -> Result<()> {
        self.profile.time("combine", || {
            elementwise::axpby(out, a, x, 0.0)?;
            elementwise::axpby(out, b, y, 1.0)
        })
    }

    fn rope_forward(&self, out: &mut Tensor, x: &Tensor, angles: (&Tensor, &Tensor)) -> Result<()> {
        self.profile.time("rope_forward", || elementwise::rope(out, x, angles))
    }

    fn rope_backward(
        &self,
        dx: &mut Tensor,
        keep: f32,
        scale: f32,
        dy: &Tensor,
        angles: (&Tensor, &Tensor),
    ) -> Result<()> {
        self.profile.time("rope_backward", || elementwise::rope_backward(dx, keep, scale, dy, angles))
    }

    fn glu_forward(&self, out: &mut Tensor, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<()> {
        self.profile.time("glu_forward", || elementwise::glu_forward(out, gate, up, activation))
    }

    fn glu_backward(&self, gate: &mut Tensor, up: &mut Tensor, dout: &Tensor, activation: Activation) -> Result<()> {
        self.profile.time("glu_backward", || elementwise::glu_backward(gate, up, dout, activation))
    }

    fn embedding(&self, out: &mut Tensor, table: &Tensor, ids: &[u32]) -> Result<()> {
        self.profile.time("embedding", || elementwise::embedding(out, table, ids))
    }

    fn dropout(&self, x: &mut Tensor, p: f32, seed: u64) -> Result<()> {
        self.profile.time("dropout", || elementwise::dropout(x, p, seed))
    }

    fn attention_forward(
        &self,
        out: &mut Tensor,
        inputs: Attention<'_>,
        cache: Option<&mut KeyValueCache>,
        _statistics: Option<&mut Tensor>,
    ) -> Result<()> {
        self.profile.time("attention_forward", || attention::forward(out, inputs, cache, self.alone))
    }

    fn attention_backward(
        &self,
        gradients: AttentionGradients<'_>,
        inputs: Attention<'_>,
        _out: &Tensor,
        _statistics: Option<&Tensor>,
        dout: &Tensor,
    ) -> Result<()> {
        self.profile.time("attention_backward", || attention::backward(gradients, inputs, dout, self.alone))
    }

    fn key_novelty(
        &self,
        scores: &mut Tensor,
        k: &Tensor,
        sequences: &Sequences,
        state: Option<&mut Tensor>,
    ) -> Result<()> {
        self.profile.time("key_novelty", || attention::novelty(scores, k, sequences, state))
    }

    fn features_forward(
        &self,
        out: Features<'_>,
        q: &Tensor,
        k: &Tensor,
        angles: (&Tensor, &Tensor),
        spec: FeatureSpec,
    ) -> Result<()> {
        self.profile.time("features_forward", || features::forward(out, (q, k), angles, spec))
    }

    fn features_backward(
        &self,
        gradients: FeatureGradients<'_>,
        q: &Tensor,
        k: &Tensor,
        angles: (&Tensor, &Tensor),
        spec: FeatureSpec,
    ) -> Result<()> {
        self.profile.time("features_backward", || features::backward(gradients, (q, k), angles, spec))
    }

    fn slot_gates_forward(&self, log_gate: &mut Tensor, write: &mut Tensor, k: &Tensor) -> Result<()> {
        self.profile.time("slot_gates_forward", || features::slot_gates_forward(log_gate, write, k))
    }

    fn slot_gates_backward(&self, dk: &mut Tensor, dlog_gate: &Tensor, dwrite: &Tensor, k: &Tensor) -> Result<()> {
        self.profile.time("slot_gates_backward", || features::slot_gates_backward(dk, dlog_gate, dwrite, k))
    }

    fn softmax_forward(&self, x: &mut Tensor) -> Result<()> {
        self.profile.time("softmax_forward", || elementwise::softmax_forward(x))
    }

    fn softmax_backward(&self, dy: &mut Tensor, y: &Tensor) -> Result<()> {
        self.profile.time("softmax_backward", || elementwise::softmax_backward(dy, y))
    }

    fn gated_recurrence_forward(
        &self,
        out: &mut Tensor,
        inputs: Recurrence<'_>,
        state: Option<&mut Tensor>,
        _kept: Option<&mut Tensor>,
    ) -> Result<()> {
        self.profile.time("gated_recurrence_forward", || recurrence::forward(out, inputs, state, self.alone))
    }

    fn gated_recurrence_backward(
        &self,
        gradients: RecurrenceGradients<'_>,
        inputs: Recurrence<'_>,
        initial: Option<&Tensor>,
        _kept: Option<&Tensor>,
        dout: &Tensor,
    ) -> Result<()> {
        self.profile
            .time("gated_recurrence_backward", || recurrence::backward(gradients, inputs, initial, dout, self.alone))
    }

    fn argmax(&self, logits: &Tensor) -> Result<Vec<u32>> {
        self.profile.time("argmax", || sampling::argmax(logits))
    }

    fn sample(&self, logits: &Tensor, how: Draw, draws: &[f32]) -> Result<Vec<u32>> {
        self.profile.time("sample", || sampling::sample(logits, how, draws))
    }

    fn cross_entropy(&self, logits: &mut Tensor, labels: &[i64], gradient_scale: Option<f32>) -> Result<Vec<f32>> {
        self.profile.time("cross_entropy", || loss::cross_entropy(logits, labels, gradient_scale))
    }

    fn kl_divergence(
        &self,
        student: &mut Tensor,
        teacher: &Tensor,
        count: &[bool],
        gradient_scale: Option<f32>,
    ) -> Result<Vec<f32>> {
        self.profile.time("kl_divergence", || loss::kl_divergence(student, teacher, count, gradient_scale))
    }

    fn sum_of_squares(&self, tensors: &[&Tensor]) -> Result<f64> {
        self.profile.time("sum_of_squares", || loss::sum_of_squares(tensors))
    }

    fn adamw(&self, parameters: &mut [AdamwParameter<'_>], step: AdamwStep) -> Result<()> {
        self.profile.time("adamw", || parameters.iter_mut().try_for_each(|parameter| loss::adamw(parameter, step)))
    }
}

/// Names the kernels that this CPU cannot test; past the capture of tests that pass.
#[cfg(test)]
fn tell_untested<K: std::fmt::Debug + PartialEq>(all: &[K], found: &[K]) {
    use std::io::Write;
    let lacking: Vec<_> = all.iter().filter(|kernel| !found.contains(kernel)).collect();
    if !lacking.is_empty() {
        writeln!(std::io::stderr(), "not tested, for this CPU lacks them: {lacking:?}").unwrap();
    }
}
