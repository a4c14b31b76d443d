//! Element-wise and row-wise operations, feature maps and losses: checks of shapes, then one kernel each.

use liger_tensor::{AdamwStep, DType, Error, FeatureMap, FeatureSpec, Gate, Result, Storage, Tensor};

use crate::compile::{Source, Variant};
use crate::driver::{Arg, Launch};
use crate::{Cuda, pointer, typed};

/// Both have the same number of elements.
pub(crate) fn same_length(operation: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    if a.len() == b.len() {
        return Ok(());
    }
    Err(Error::Shape { operation, found: a.shape().to_vec(), expected: format!("as many elements as {:?}", b.shape()) })
}

fn long(n: usize) -> Arg<'static> {
    Arg::Long(n as i64)
}

fn int(n: usize) -> Arg<'static> {
    Arg::Int(n as i32)
}

/// Length of a row and number of rows.
fn rows_of(x: &Tensor) -> (usize, usize) {
    let width = x.shape().last().copied().unwrap_or(1).max(1);
    (width, x.len() / width)
}

impl Cuda {
    pub(crate) fn act(&self, operation: &'static str, x: &Tensor) -> Result<Arg<'static>> {
        typed(operation, x, self.activations).map(Arg::Pointer)
    }

    pub(crate) fn f32(&self, operation: &'static str, x: &Tensor) -> Result<Arg<'static>> {
        typed(operation, x, DType::F32).map(Arg::Pointer)
    }

    /// `y` becomes `x` in `dtype`, from the other type.
    pub(crate) fn convert(&self, y: u64, x: u64, dtype: DType, n: usize) -> Result<()> {
        let name = if dtype == DType::Bf16 { "narrow" } else { "widen" };
        self.launch((Source::Elementwise, name), Launch::over(n, 4), &[Arg::Pointer(y), Arg::Pointer(x), long(n)])
    }

    pub(crate) fn add_bias_(&self, x: &mut Tensor, bias: &Tensor) -> Result<()> {
        let args = [self.act("add_bias", x)?, self.f32("add_bias", bias)?, int(bias.len()), long(x.len())];
        self.launch((Source::Elementwise, "add_bias"), Launch::over(x.len(), 1), &args)
    }

    pub(crate) fn axpby_(&self, y: &mut Tensor, a: f32, x: &Tensor, b: f32) -> Result<()> {
        same_length("axpby", y, x)?;
        let n = x.len();
        let args = [
            Arg::Pointer(pointer("axpby", y)?),
            Arg::Pointer(typed("axpby", x, y.dtype())?),
            Arg::Float(a),
            Arg::Float(b),
            long(n),
        ];
        self.gpu.launch((Source::Elementwise, "axpby"), Variant::of(y.dtype()), Launch::over(n, 4), &args)
    }

    /// A short row is a warp's work, a long one a block's.
    fn norm_launch(width: usize, rows: usize) -> Launch {
        if width <= 256 {
            return Launch::warp_rows(rows);
        }
        Launch { grid: (rows as u32, 1, 1), block: (256, 1), shared: 0 }
    }

    pub(crate) fn norm_forward(&self, out: &mut Tensor, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<()> {
        const NAME: &str = "rms_norm_forward";
        same_length(NAME, out, x)?;
        let (width, rows) = (weight.len(), x.len() / weight.len().max(1));
        let args = [
            self.act(NAME, out)?,
            self.act(NAME, x)?,
            self.f32(NAME, weight)?,
            Arg::Float(epsilon),
            int(width),
            int(rows),
        ];
        self.launch((Source::Elementwise, NAME), Self::norm_launch(width, rows), &args)
    }

    pub(crate) fn norm_backward(
        &self,
        dx: &mut Tensor,
        x: &Tensor,
        w: &Tensor,
        epsilon: f32,
        dy: &Tensor,
    ) -> Result<()> {
        const NAME: &str = "rms_norm_backward";
        same_length(NAME, dx, x)?;
        same_length(NAME, dy, x)?;
        let (width, rows) = (w.len(), x.len() / w.len().max(1));
        let args = [
            self.act(NAME, dx)?,
            self.act(NAME, x)?,
            self.f32(NAME, w)?,
            Arg::Float(epsilon),
            self.act(NAME, dy)?,
            int(width),
            int(rows),
        ];
        self.launch((Source::Elementwise, NAME), Self::norm_launch(width, rows), &args)
    }

    pub(crate) fn combine_(&self, out: &mut Tensor, a: f32, x: &Tensor, b: f32, y: &Tensor) -> Result<()> {
        same_length("combine", out, x)?;
        same_length("combine", out, y)?;
        let (x, y) = (self.act("combine", x)?, self.act("combine", y)?);
        let args = [self.act("combine", out)?, Arg::Float(a), x, Arg::Float(b), y, long(out.len())];
        self.launch((Source::Elementwise, "combine"), Launch::over(out.len(), 4), &args)
    }

    pub(crate) fn rope_(
        &self,
        out: &mut Tensor,
        x: &Tensor,
        (cos, sin): (&Tensor, &Tensor),
        inverse: bool,
        add: Option<&Tensor>,
    ) -> Result<()> {
        let pairs = x.len() / 2;
        same_length("rope", out, x)?;
        if cos.len() != x.dim(0) * x.dim(2) / 2 {
            let expected = format!("[{}, {}]", x.dim(0), x.dim(2) / 2);
            return Err(Error::Shape { operation: "rope", found: cos.shape().to_vec(), expected });
        }
        let add = match add {
            Some(add) => {
                same_length("rope", add, x)?;
                self.act("rope", add)?
            }
            None => Arg::Pointer(0),
        };
        let sign = if inverse { -1.0 } else { 1.0 };
        let args = [
            self.act("rope", out)?,
            self.act("rope", x)?,
            add,
            self.f32("rope", cos)?,
            self.f32("rope", sin)?,
            int(x.dim(1)),
            int(x.dim(2)),
            Arg::Float(sign),
            long(pairs),
        ];
        self.launch((Source::Elementwise, "rope"), Launch::over(pairs, 1), &args)
    }

    pub(crate) fn swiglu(&self, out: &mut Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
        const NAME: &str = "swiglu_forward";
        same_length(NAME, out, gate)?;
        same_length(NAME, up, gate)?;
        let args = [self.act(NAME, out)?, self.act(NAME, gate)?, self.act(NAME, up)?, long(out.len())];
        self.launch((Source::Elementwise, NAME), Launch::over(out.len(), 4), &args)
    }

    pub(crate) fn swiglu_gradients(&self, gate: &mut Tensor, up: &mut Tensor, dout: &Tensor) -> Result<()> {
        const NAME: &str = "swiglu_backward";
        same_length(NAME, gate, dout)?;
        same_length(NAME, up, dout)?;
        let args = [self.act(NAME, gate)?, self.act(NAME, up)?, self.act(NAME, dout)?, long(dout.len())];
        self.launch((Source::Elementwise, NAME), Launch::over(dout.len(), 4), &args)
    }

    pub(crate) fn embed(&self, out: &mut Tensor, table: &Tensor, ids: &[u32]) -> Result<()> {
        let (vocabulary, width) = (table.dim(0), table.dim(1));
        if out.len() != ids.len() * width {
            let expected = format!("{} rows of {width}", ids.len());
            return Err(Error::Shape { operation: "embedding", found: out.shape().to_vec(), expected });
        }
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(Error::TokenOutOfRange { id: i64::from(id), vocabulary });
        }
        let uploaded = self.gpu.allocate(ids.len() * 4)?;
        self.gpu.write(&uploaded, ids)?;
        let args = [
            self.act("embedding", out)?,
            Arg::Pointer(pointer("embedding", table)?),
            Arg::Int(i32::from(table.dtype() == DType::Bf16)),
            Arg::Pointer(uploaded.pointer),
            int(width),
        ];
        let launch = Launch { grid: (ids.len() as u32, 1, 1), block: (256, 1), shared: 0 };
        self.launch((Source::Elementwise, "embedding"), launch, &args)
    }

    pub(crate) fn drop_out(&self, x: &mut Tensor, p: f32, seed: u64) -> Result<()> {
        let threshold = (f64::from(p) * u64::MAX as f64) as u64;
        let args = [
            self.act("dropout", x)?,
            Arg::Long(threshold as i64),
            Arg::Float(1.0 / (1.0 - p)),
            Arg::Long(seed as i64),
            long(x.len()),
        ];
        self.launch((Source::Elementwise, "dropout"), Launch::over(x.len(), 1), &args)
    }

    pub(crate) fn softmax(&self, x: &mut Tensor) -> Result<()> {
        let (width, rows) = rows_of(x);
        let args = [self.act("softmax_forward", x)?, int(width), int(rows)];
        self.launch((Source::Elementwise, "softmax_forward"), Launch::warp_rows(rows), &args)
    }

    pub(crate) fn softmax_gradient(&self, dy: &mut Tensor, y: &Tensor) -> Result<()> {
        same_length("softmax_backward", dy, y)?;
        let (width, rows) = rows_of(y);
        let args = [self.act("softmax_backward", dy)?, self.act("softmax_backward", y)?, int(width), int(rows)];
        self.launch((Source::Elementwise, "softmax_backward"), Launch::warp_rows(rows), &args)
    }

    /// One map; with gates for the key. The same kernel arguments serve both directions.
    fn feature(
        &self,
        name: &'static str,
        y: &Tensor,
        gates: Option<&Tensor>,
        x: &Tensor,
        how: (FeatureMap, Gate),
    ) -> Result<()> {
        same_length(name, y, x)?;
        let gates = match gates {
            Some(gates) => {
                same_length(name, gates, x)?;
                self.f32(name, gates)?
            }
            None => Arg::Pointer(0),
        };
        let (kind, divisor) = match how.1 {
            Gate::LogSigmoid { divisor } => (0, divisor),
            Gate::MeanLogSigmoid => (1, 1.0),
            Gate::MeanNegativeSoftplus => (2, 1.0),
            Gate::NegativeExp => (3, 1.0),
        };
        let map = match how.0 {
            FeatureMap::Softmax => 0,
            FeatureMap::OneMinusSigmoid => 1,
        };
        let (width, rows) = rows_of(x);
        let (y, x) = (self.act(name, y)?, self.act(name, x)?);
        let args = [y, gates, x, Arg::Int(map), Arg::Int(kind), Arg::Float(divisor), int(width), int(rows)];
        // A quarter of the head in threads, where that divides a warp.
        let fours = width % 4 == 0 && (width / 4).is_power_of_two() && width <= 128;
        let (kernel, launch) = match (name, fours) {
            ("features_forward", true) => ("features_forward_fours", Launch::warp_rows((rows * width).div_ceil(128))),
            (_, true) => ("features_backward_fours", Launch::warp_rows((rows * width).div_ceil(128))),
            (_, false) => (name, Launch::warp_rows(rows)),
        };
        self.launch((Source::Features, kernel), launch, &args)
    }

    pub(crate) fn features(
        &self,
        query: &mut Tensor,
        key: &mut Tensor,
        log_gate: &mut Tensor,
        (q, k): (&Tensor, &Tensor),
        spec: FeatureSpec,
    ) -> Result<()> {
        self.feature("features_forward", query, None, q, (spec.query, spec.gate))?;
        self.feature("features_forward", key, Some(log_gate), k, (spec.key, spec.gate))
    }

    pub(crate) fn feature_gradients(
        &self,
        dquery: &mut Tensor,
        dkey: &mut Tensor,
        dlog_gate: &Tensor,
        (q, k): (&Tensor, &Tensor),
        spec: FeatureSpec,
    ) -> Result<()> {
        self.feature("features_backward", dquery, None, q, (spec.query, spec.gate))?;
        self.feature("features_backward", dkey, Some(dlog_gate), k, (spec.key, spec.gate))
    }

    fn slot_sizes(operation: &'static str, gates: &Tensor, k: &Tensor) -> Result<(usize, usize)> {
        let (dim, slots) = (k.dim(2), gates.dim(2));
        if gates.len() * dim == k.len() * slots {
            return Ok((dim, slots));
        }
        let expected = format!("the rows and heads of {:?}", k.shape());
        Err(Error::Shape { operation, found: gates.shape().to_vec(), expected })
    }

    pub(crate) fn slot_gates(&self, log_gate: &mut Tensor, write: &mut Tensor, k: &Tensor) -> Result<()> {
        const NAME: &str = "slot_gates_forward";
        same_length(NAME, write, log_gate)?;
        let (dim, slots) = Self::slot_sizes(NAME, log_gate, k)?;
        let n = log_gate.len();
        let args =
            [self.f32(NAME, log_gate)?, self.act(NAME, write)?, self.act(NAME, k)?, int(dim), int(slots), long(n)];
        self.launch((Source::Features, NAME), Launch::over(n, 1), &args)
    }

    pub(crate) fn slot_gate_gradients(
        &self,
        dk: &mut Tensor,
        dgate: &Tensor,
        dwrite: &Tensor,
        k: &Tensor,
    ) -> Result<()> {
        const NAME: &str = "slot_gates_backward";
        same_length(NAME, dk, k)?;
        same_length(NAME, dwrite, dgate)?;
        let (dim, slots) = Self::slot_sizes(NAME, dgate, k)?;
        let args = [
            self.act(NAME, dk)?,
            self.f32(NAME, dgate)?,
            self.act(NAME, dwrite)?,
            self.act(NAME, k)?,
            int(dim),
            int(slots),
            long(dk.len()),
        ];
        self.launch((Source::Features, NAME), Launch::over(dk.len(), 1), &args)
    }

    /// Runs a loss kernel over rows of logits of either type; `marks` is a label or a flag a row.
    fn loss(
        &self,
        name: &'static str,
        logits: &mut Tensor,
        teacher: Option<&Tensor>,
        marks: &[i32],
        scale: Option<f32>,
    ) -> Result<Vec<f32>> {
        let rows = marks.len();
        let (vocabulary, found) = rows_of(logits);
        if found != rows {
            let expected = format!("{rows} rows");
            return Err(Error::Shape { operation: name, found: logits.shape().to_vec(), expected });
        }
        let losses = self.gpu.allocate(rows * 4)?;
        let uploaded = crate::batch::upload(&self.gpu, marks)?;
        let mut args = vec![Arg::Pointer(losses.pointer), Arg::Pointer(pointer(name, logits)?)];
        if let Some(teacher) = teacher {
            args.push(Arg::Pointer(typed(name, teacher, logits.dtype())?));
        }
        args.extend([
            Arg::Pointer(uploaded.pointer),
            int(vocabulary),
            Arg::Int(i32::from(scale.is_some())),
            Arg::Float(scale.unwrap_or(0.0)),
        ]);
        let launch = Launch { grid: (rows as u32, 1, 1), block: (512, 1), shared: 0 };
        self.gpu.launch((Source::Loss, name), Variant::of(logits.dtype()), launch, &args)?;
        self.gpu.read(losses.pointer, rows)
    }

    pub(crate) fn cross_entropies(&self, logits: &mut Tensor, labels: &[i64], scale: Option<f32>) -> Result<Vec<f32>> {
        let vocabulary = rows_of(logits).0;
        if let Some(&id) = labels.iter().find(|&&id| id >= vocabulary as i64) {
            return Err(Error::TokenOutOfRange { id, vocabulary });
        }
        let labels: Vec<i32> = labels.iter().map(|&id| id.max(-1) as i32).collect();
        self.loss("cross_entropy", logits, None, &labels, scale)
    }

    pub(crate) fn kl(
        &self,
        student: &mut Tensor,
        teacher: &Tensor,
        count: &[bool],
        scale: Option<f32>,
    ) -> Result<Vec<f32>> {
        same_length("kl_divergence", student, teacher)?;
        let count: Vec<i32> = count.iter().map(|&c| i32::from(c)).collect();
        self.loss("kl_divergence", student, Some(teacher), &count, scale)
    }

    pub(crate) fn largest(&self, logits: &Tensor) -> Result<Vec<u32>> {
        let (vocabulary, rows) = rows_of(logits);
        let found = self.gpu.allocate(rows * 4)?;
        let args = [Arg::Pointer(found.pointer), Arg::Pointer(pointer("argmax", logits)?), int(vocabulary)];
        let launch = Launch { grid: (rows as u32, 1, 1), block: (1024, 1), shared: 0 };
        self.gpu.launch((Source::Loss, "argmax"), Variant::of(logits.dtype()), launch, &args)?;
        self.gpu.read(found.pointer, rows)
    }

    /// All parts are read back at once: one wait, however many tensors.
    pub(crate) fn squares(&self, tensors: &[&Tensor]) -> Result<f64> {
        let blocks = |x: &Tensor| x.len().div_ceil(4096).clamp(1, 256);
        let total: usize = tensors.iter().map(|x| blocks(x)).sum();
        let parts = self.gpu.allocate(total * 8)?;
        let mut at = 0;
        for x in tensors {
            let launch = Launch { grid: (blocks(x) as u32, 1, 1), block: (256, 1), shared: 0 };
            let args = [Arg::Pointer(parts.pointer + at as u64 * 8), self.f32("sum_of_squares", x)?, long(x.len())];
            self.launch((Source::Loss, "sum_of_squares"), launch, &args)?;
            at += blocks(x);
        }
        Ok(self.gpu.read::<f64>(parts.pointer, total)?.iter().sum())
    }

    pub(crate) fn adamw_(
        &self,
        parameter: &mut Tensor,
        gradient: &Tensor,
        first: &mut Tensor,
        second: &mut Tensor,
        step: AdamwStep,
    ) -> Result<()> {
        for other in [gradient, &*first, &*second] {
            same_length("adamw", parameter, other)?;
        }
        let correction = |beta: f32| (1.0 / (1.0 - f64::from(beta).powf(step.step as f64))) as f32;
        let n = parameter.len();
        let tensor = |t: &Tensor| self.f32("adamw", t);
        let args = [
            tensor(parameter)?,
            tensor(gradient)?,
            tensor(first)?,
            tensor(second)?,
            Arg::Float(step.learning_rate),
            Arg::Float(step.beta1),
            Arg::Float(step.beta2),
            Arg::Float(step.epsilon),
            Arg::Float(step.weight_decay),
            Arg::Float(correction(step.beta1)),
            Arg::Float(correction(step.beta2)),
            Arg::Float(step.gradient_scale),
            long(n),
        ];
        self.launch((Source::Loss, "adamw"), Launch::over(n, 1), &args)
    }

    /// Bytes of rows `start..` of a large tensor that a small one covers: offset and count.
    pub(crate) fn rows(
        operation: &'static str,
        large: &Tensor,
        small: &Tensor,
        start: usize,
    ) -> Result<(usize, usize)> {
        let width = large.len() / large.dim(0).max(1);
        let count = small.dim(0);
        let fits = small.len() == count * width && start + count <= large.dim(0) && small.dtype() == large.dtype();
        if fits {
            let size = large.dtype().size();
            return Ok((start * width * size, count * width * size));
        }
        let expected = format!("rows {start}.. of {large:?}");
        Err(Error::Shape { operation, found: small.shape().to_vec(), expected })
    }

    /// The elements of a host tensor, or of one on this GPU.
    pub(crate) fn to_host(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        match tensor.storage() {
            Storage::F32(data) => Ok(data.clone()),
            Storage::Bf16(data) => Ok(data.iter().map(|x| x.to_f32()).collect()),
            Storage::Device(_) if tensor.is_empty() => Ok(Vec::new()),
            Storage::Device(_) => {
                let from = pointer("download", tensor)?;
                match tensor.dtype() {
                    DType::F32 => self.gpu.read(from, tensor.len()),
                    DType::Bf16 => {
                        let raw: Vec<half::bf16> = self.gpu.read(from, tensor.len())?;
                        Ok(raw.into_iter().map(half::bf16::to_f32).collect())
                    }
                }
            }
        }
    }
}
