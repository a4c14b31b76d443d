use std::any::Any;
use std::fs::File;
use std::ops::Range;

use crate::{
    Attention, AttentionGradients, DType, Error, FeatureGradients, FeatureSpec, Features, KeyValueCache, Result,
    Sequences, StepOps, Tensor,
};

/// Reads the blocks of some rows of a quantised matrix, see [`Ops::upload_blocks`].
pub type BlockRows<'a> = dyn Fn(Range<usize>) -> std::io::Result<Vec<u8>> + Sync + 'a;

/// `c = scale * op(a) op(b) (+ c)`, where `op` transposes if asked.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    /// Use `a` transposed.
    pub transpose_a: bool,
    /// Use `b` transposed: weights are kept `[out, in]`, so a linear layer is `x w^T`.
    pub transpose_b: bool,
    /// Factor of the product.
    pub scale: f32,
    /// Add to `c` instead of overwriting it.
    pub accumulate: bool,
}

impl Gemm {
    /// `x w^T`: a linear layer.
    pub const LINEAR: Self = Self { transpose_a: false, transpose_b: true, scale: 1.0, accumulate: false };
    /// `dy w`: the gradient of a linear layer's input.
    pub const INPUT_GRADIENT: Self = Self { transpose_a: false, transpose_b: false, scale: 1.0, accumulate: false };
    /// `dy^T x`: the gradient of a linear layer's weight.
    pub const WEIGHT_GRADIENT: Self = Self { transpose_a: true, transpose_b: false, scale: 1.0, accumulate: false };

    /// The same, adding to what `c` holds.
    pub fn accumulated(self) -> Self {
        Self { accumulate: true, ..self }
    }

    /// The same, times `scale`.
    pub fn scaled(self, scale: f32) -> Self {
        Self { scale, ..self }
    }
}

/// What the gate of a feed-forward layer goes through: `x sigmoid(a x + b x^3)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// GELU by its hyperbolic tangent, `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
    GeluTanh,
}

impl Activation {
    /// a and b of the formula.
    pub fn coefficients(self) -> [f32; 2] {
        const TWICE: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::SQRT_2;
        match self {
            Self::Silu => [1.0, 0.0],
            Self::GeluTanh => [TWICE as f32, (0.044_715 * TWICE) as f32],
        }
    }
}

/// Which axis of the recurrent state `[Dk, Dv]` the gate decays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateAxis {
    /// `S_t = diag(a_t) S_{t-1} + k_t^T v_t`, gates `[N, K, Dk]`.
    Key,
    /// `S_t = S_{t-1} diag(a_t) + k_t^T v_t`, gates `[N, K, Dv]`: the first pass of gsa.
    Value,
}

/// Inputs of the gated recurrence `o_t = q_t S_t`, for K key/value heads read by H = G K query heads.
#[derive(Clone, Copy)]
pub struct Recurrence<'a> {
    /// `[N, H, Dk]`.
    pub q: &'a Tensor,
    /// `[N, K, Dk]`.
    pub k: &'a Tensor,
    /// `[N, K, Dv]`.
    pub v: &'a Tensor,
    /// Logarithm of the gate, <= 0; `[N, K, Dk]` or `[N, K, Dv]` after `axis`. A value below -40 counts as -40.
    pub log_gate: &'a Tensor,
    /// The axis that the gate decays.
    pub axis: GateAxis,
    /// The sequences of the N rows.
    pub sequences: &'a Sequences,
}

/// Gradients of the inputs of a [`Recurrence`], each overwritten.
pub struct RecurrenceGradients<'a> {
    /// `[N, H, Dk]`.
    pub q: &'a mut Tensor,
    /// `[N, K, Dk]`.
    pub k: &'a mut Tensor,
    /// `[N, K, Dv]`.
    pub v: &'a mut Tensor,
    /// Like the gate.
    pub log_gate: &'a mut Tensor,
    /// In: the gradient of the final state. Out: that of the initial one. `[sequences, K, Dk, Dv]`, by sequence.
    /// `None` if the final state has no gradient and nobody asks for the initial one's.
    pub state: Option<&'a mut Tensor>,
}

/// How a token is drawn: by softmax(logits / temperature), of what is left after `min_p`, `top_k` and `top_p`, in this order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Divides the logits; above 0.
    pub temperature: f32,
    /// Only so many of the most likely tokens (and their equals); 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this share of what is left.
    pub top_p: f32,
    /// Only tokens of at least this share of the most likely one's probability.
    pub min_p: f32,
}

/// A float32 parameter and what its update needs, all of one length.
pub struct AdamwParameter<'a> {
    /// What is trained.
    pub value: &'a mut Tensor,
    /// Its gradient.
    pub gradient: &'a Tensor,
    /// First moment.
    pub first_moment: &'a mut Tensor,
    /// Second moment.
    pub second_moment: &'a mut Tensor,
}

/// One AdamW update, as PyTorch defines it (decoupled weight decay, bias correction).
#[derive(Debug, Clone, Copy)]
pub struct AdamwStep {
    /// Learning rate now.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Weight decay.
    pub weight_decay: f32,
    /// Number of this update, from 1.
    pub step: u64,
    /// Every gradient is multiplied by this first: clipping, accumulation.
    pub gradient_scale: f32,
}

/// The operations that a device implements. `N` counts token rows, see [`Sequences`]; `[N, ...]` tensors are of the
/// device's type of activations, but log gates, states, angles, norms, biases and adapters, which are float32.
///
/// Outputs come first and are overwritten unless the text says "adds". Every method fails with
/// [`Error::Shape`](crate::Error::Shape) or [`Error::Storage`](crate::Error::Storage) where tensors do not fit.
pub trait Ops: Send + Sync {
    /// The device for people: "cpu, 2 threads, avx512f".
    fn describe(&self) -> String;
    /// For a device's own benchmarks and tests.
    fn as_any(&self) -> &dyn Any;

    /// Element type of activations: float32, or bfloat16 on a device that computes in it.
    fn activations(&self) -> DType;
    /// Element type of keys and values in a cache that grows with the text.
    fn growing_cache(&self) -> DType {
        self.activations()
    }
    /// A tensor of activations whose elements are not set.
    fn empty(&self, shape: &[usize]) -> Result<Tensor>;
    /// The same for what a [`gemm`](Ops::gemm) reads or writes and nothing else touches but norms, the feed-forward layer's activation and
    /// adapters: in the type that products multiply, where that is a narrower one.
    fn empty_operand(&self, shape: &[usize]) -> Result<Tensor> {
        self.empty(shape)
    }
    /// A float32 tensor whose elements are not set.
    fn empty_f32(&self, shape: &[usize]) -> Result<Tensor>;
    /// A tensor of activations that are zero.
    fn zeros(&self, shape: &[usize]) -> Result<Tensor> {
        let mut tensor = self.empty(shape)?;
        self.clear(&mut tensor)?;
        Ok(tensor)
    }
    /// Sets all elements to zero.
    fn clear(&self, x: &mut Tensor) -> Result<()>;
    /// Copies `data` to the device and keeps it in `dtype`.
    fn upload(&self, data: Vec<f32>, shape: &[usize], dtype: DType) -> Result<Tensor>;
    /// The matrix of type `stored` that lies in a file from a byte on, kept in `dtype`: where it is, if the device can read
    /// it there. `None` where it has to be read and uploaded. The file must hold it whole.
    fn open_matrix(
        &self,
        _file: (&File, u64),
        _stored: DType,
        _shape: &[usize],
        _dtype: DType,
    ) -> Result<Option<Tensor>> {
        Ok(None)
    }
    /// Products of many rows with these frozen weights will come again and again: a device may keep them in the order in which it multiplies
    /// too, from the first such product on. It changes no result.
    fn keep_packed(&self, _weights: &Tensor) {}
    /// Whether [`Ops::upload_blocks`] is there.
    fn takes_blocks(&self) -> bool {
        false
    }
    /// Keeps a matrix of ggml's blocks ([`quantize`](crate::quantize)) for products with 8-bit integers. `rows` reads the blocks of some
    /// rows, one row after the other; it is called by several threads, once for every row.
    ///
    /// # Errors
    /// [`Error::Storage`](crate::Error::Storage) on a device that has no such products, [`Error::Read`](crate::Error::Read) if `rows` fails.
    fn upload_blocks(&self, _rows: &BlockRows<'_>, _shape: &[usize], _dtype: DType) -> Result<Tensor> {
        Err(Error::NO_BLOCKS)
    }
    /// The elements as float32.
    fn download(&self, tensor: &Tensor) -> Result<Vec<f32>>;
    /// Copies rows `start..start + destination rows` of `source` (axis 0).
    fn copy_rows(&self, destination: &mut Tensor, source: &Tensor, start: usize) -> Result<()>;
    /// Copies all of `source` over the rows of `destination` from `start`.
    fn write_rows(&self, destination: &mut Tensor, source: &Tensor, start: usize) -> Result<()>;
    /// Memory that is not in use goes back to the system.
    fn trim(&self);
    /// What the device holds now, in use or not, is from now on the most that it keeps: texts of ever new lengths do not fill
    /// its memory. For servers, once they have done the largest of what they do.
    fn settle_memory(&self) {}
    /// Waits until everything that was asked for is done.
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
    /// Bytes of memory that is free and of all that there is, where the device has its own.
    fn memory(&self) -> Option<(usize, usize)> {
        None
    }
    /// Bytes that new tensors can take.
    fn available_memory(&self) -> Option<usize> {
        self.memory().map(|(free, _)| free)
    }
    /// Most bytes of memory in use at once since the last `trim`, where the device counts them.
    fn peak_bytes(&self) -> Option<usize> {
        None
    }
    /// Decoding steps in few operations, where the device has such.
    fn steps(&self) -> Option<&dyn StepOps> {
        None
    }
    /// A matrix of numbers drawn evenly from -bound to bound, for measurements; the same seed gives the same ones.
    fn random(&self, shape: &[usize], bound: f32, seed: u64, dtype: DType) -> Result<Tensor>;

    /// See [`Gemm`]. Tensors of more than two axes count as `[first, rest]`.
    fn gemm(&self, c: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm) -> Result<()>;
    /// The same with `base`, of c's shape, in the place of what `c` held: `c = scale * op(a) op(b) + base`.
    fn gemm_onto(&self, c: &mut Tensor, base: &Tensor, a: &Tensor, b: &Tensor, how: Gemm) -> Result<()> {
        self.axpby(c, 1.0, base, 0.0)?;
        self.gemm(c, a, b, how.accumulated())
    }
    /// LoRA's first product for projections that share their input `x [N, inputs]`: `low[i] [N, r] = x a[i]^T`, with `a[i]`
    /// `[r, inputs]` in float32.
    fn low_rank_forward(&self, low: &mut [Tensor], x: &Tensor, a: &[&Tensor]) -> Result<()>;
    /// Adds `dlow[i]^T x` to every `da[i]`, and `dlow[i] a[i]` of all to `dx`, unless nobody needs it.
    fn low_rank_backward(
        &self,
        dx: Option<&mut Tensor>,
        da: &mut [&mut Tensor],
        dlow: &[Tensor],
        x: &Tensor,
        a: &[&Tensor],
    ) -> Result<()>;
    /// Adds `bias [M]` to every row of `x [N, M]`.
    fn add_bias(&self, x: &mut Tensor, bias: &Tensor) -> Result<()>;
    /// `y = a x + b y`.
    fn axpby(&self, y: &mut Tensor, a: f32, x: &Tensor, b: f32) -> Result<()>;

    /// `x weight / rms(x)` over rows of `weight.len()` elements.
    fn rms_norm_forward(&self, out: &mut Tensor, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<()>;
    /// Adds the gradient of `x` to `dx`.
    fn rms_norm_backward(&self, dx: &mut Tensor, x: &Tensor, weight: &Tensor, epsilon: f32, dy: &Tensor) -> Result<()>;
    /// `out = a x + b y`.
    fn combine(&self, out: &mut Tensor, a: f32, x: &Tensor, b: f32, y: &Tensor) -> Result<()>;
    /// Rotates the halves of each head of `x [N, heads, D]` by the `angles`, cosines and sines `[N, D/2]`.
    fn rope_forward(&self, out: &mut Tensor, x: &Tensor, angles: (&Tensor, &Tensor)) -> Result<()>;
    /// `dx = keep dx + scale dy`, with `dy` rotated back; what is not kept may be anything.
    fn rope_backward(
        &self,
        dx: &mut Tensor,
        keep: f32,
        scale: f32,
        dy: &Tensor,
        angles: (&Tensor, &Tensor),
    ) -> Result<()>;
    /// `activation(gate) up`.
    fn glu_forward(&self, out: &mut Tensor, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<()>;
    /// Overwrites `gate` and `up` by their gradients.
    fn glu_backward(&self, gate: &mut Tensor, up: &mut Tensor, dout: &Tensor, activation: Activation) -> Result<()>;
    /// Rows `ids` of `table [V, d]` as float32 `[N, d]`.
    fn embedding(&self, out: &mut Tensor, table: &Tensor, ids: &[u32]) -> Result<()>;
    /// Inverted dropout: zero with probability `p`, else `x / (1 - p)`; the same `seed` gives the same mask.
    fn dropout(&self, x: &mut Tensor, p: f32, seed: u64) -> Result<()>;

    /// Softmax attention, `D^-1/2` times `q k^T`. With a cache, queries see what it holds of their slot too, and it takes in
    /// the new keys; its memory grows where it has no window. Without one, sequences begin at position 0 where keys are
    /// kept. `statistics` takes what the backward can use again.
    fn attention_forward(
        &self,
        out: &mut Tensor,
        inputs: Attention<'_>,
        cache: Option<&mut KeyValueCache>,
        statistics: Option<&mut Tensor>,
    ) -> Result<()>;
    /// Memory for the statistics of an attention with these queries, where the device's backward has a use for them.
    fn attention_statistics(&self, _q: &Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }
    /// Gradients of an attention from the beginning of every sequence, without a cache, given its output and statistics.
    fn attention_backward(
        &self,
        gradients: AttentionGradients<'_>,
        inputs: Attention<'_>,
        out: &Tensor,
        statistics: Option<&Tensor>,
        dout: &Tensor,
    ) -> Result<()>;
    /// Scores `[N, K]` of `k [N, K, D]` before RoPE: the cosine of a key and the sum of the directions `k / |k|` of all keys
    /// up to itself, negated; 0 for a key that is 0. `state [slots, K, 1, D]` is that sum: in, and out.
    fn key_novelty(
        &self,
        scores: &mut Tensor,
        k: &Tensor,
        sequences: &Sequences,
        state: Option<&mut Tensor>,
    ) -> Result<()>;

    /// What Liger Attention makes of `q [N, H, D]` and `k [N, K, D]`: RoPE by the `angles` for the window, feature maps and the
    /// gate for the recurrence.
    fn features_forward(
        &self,
        out: Features<'_>,
        q: &Tensor,
        k: &Tensor,
        angles: (&Tensor, &Tensor),
        spec: FeatureSpec,
    ) -> Result<()>;
    /// Gradients of `q` and `k`, of both branches.
    fn features_backward(
        &self,
        gradients: FeatureGradients<'_>,
        q: &Tensor,
        k: &Tensor,
        angles: (&Tensor, &Tensor),
        spec: FeatureSpec,
    ) -> Result<()>;
    /// gsa: log gate `log sigmoid(pool(k)) / 16` and write strength `1 - gate`, both `[N, K, M]`, of `k [N, K, D]`;
    /// `pool` is the adaptive mean over M stretches of the head.
    fn slot_gates_forward(&self, log_gate: &mut Tensor, write: &mut Tensor, k: &Tensor) -> Result<()>;
    /// Adds the gradient of `k` to `dk`.
    fn slot_gates_backward(&self, dk: &mut Tensor, dlog_gate: &Tensor, dwrite: &Tensor, k: &Tensor) -> Result<()>;
    /// Softmax over the last axis, in place.
    fn softmax_forward(&self, x: &mut Tensor) -> Result<()>;
    /// Overwrites the gradient of `y = softmax(x)` by that of `x`.
    fn softmax_backward(&self, dy: &mut Tensor, y: &Tensor) -> Result<()>;

    /// The gated recurrence, chunk by chunk, or by single steps where all sequences have one row.
    /// `state [slots, K, Dk, Dv]`, by slot: initial state in, final state out; zero and lost if `None`. `kept` takes the
    /// states between chunks, which the backward can use again.
    fn gated_recurrence_forward(
        &self,
        out: &mut Tensor,
        inputs: Recurrence<'_>,
        state: Option<&mut Tensor>,
        kept: Option<&mut Tensor>,
    ) -> Result<()>;
    /// Memory for the states between the chunks of a recurrence, where the device's backward has a use for them.
    fn recurrence_states(&self, _inputs: Recurrence<'_>) -> Result<Option<Tensor>> {
        Ok(None)
    }
    /// Gradients given `dout [N, H, Dv]`; `initial [slots, K, Dk, Dv]` is the state that the forward began with, `kept` what
    /// it kept.
    fn gated_recurrence_backward(
        &self,
        gradients: RecurrenceGradients<'_>,
        inputs: Recurrence<'_>,
        initial: Option<&Tensor>,
        kept: Option<&Tensor>,
        dout: &Tensor,
    ) -> Result<()>;

    /// Index of the largest element of each row, the last of equals.
    fn argmax(&self, logits: &Tensor) -> Result<Vec<u32>>;
    /// One token a row of `logits [N, V]`, drawn; `draws [N]` are evenly from 0 to 1.
    fn sample(&self, logits: &Tensor, how: Draw, draws: &[f32]) -> Result<Vec<u32>>;
    /// Cross-entropy of each row of `logits [N, V]`, 0 where the label is negative. With a scale, `logits` are
    /// overwritten by `scale` times their gradient; without, they stay.
    fn cross_entropy(&self, logits: &mut Tensor, labels: &[i64], gradient_scale: Option<f32>) -> Result<Vec<f32>>;
    /// KL(teacher || student) of each row, 0 where `count` is false. With a scale, the student's logits are
    /// overwritten by `scale` times their gradient; without, they stay.
    fn kl_divergence(
        &self,
        student: &mut Tensor,
        teacher: &Tensor,
        count: &[bool],
        gradient_scale: Option<f32>,
    ) -> Result<Vec<f32>>;
    /// Sum of the squares of all elements of float32 tensors, in float64.
    fn sum_of_squares(&self, tensors: &[&Tensor]) -> Result<f64>;
    /// One update of every parameter and its two moments.
    fn adamw(&self, parameters: &mut [AdamwParameter<'_>], step: AdamwStep) -> Result<()>;
}

/// [`Ops::low_rank_forward`] by one product a projection: for sizes that a device has nothing better for.
///
/// # Errors
/// As [`Ops::gemm`].
pub fn low_rank_forward_by_products<O: Ops + ?Sized>(
    ops: &O,
    low: &mut [Tensor],
    x: &Tensor,
    a: &[&Tensor],
) -> Result<()> {
    low.iter_mut().zip(a).try_for_each(|(low, a)| ops.gemm(low, x, a, Gemm::LINEAR))
}

/// [`Ops::low_rank_backward`], likewise.
///
/// # Errors
/// As [`Ops::gemm`].
pub fn low_rank_backward_by_products<O: Ops + ?Sized>(
    ops: &O,
    mut dx: Option<&mut Tensor>,
    da: &mut [&mut Tensor],
    dlow: &[Tensor],
    x: &Tensor,
    a: &[&Tensor],
) -> Result<()> {
    for ((da, dlow), a) in da.iter_mut().zip(dlow).zip(a) {
        ops.gemm(da, dlow, x, Gemm::WEIGHT_GRADIENT.accumulated())?;
        if let Some(dx) = dx.as_deref_mut() {
            ops.gemm(dx, dlow, a, Gemm::INPUT_GRADIENT.accumulated())?;
        }
    }
    Ok(())
}
