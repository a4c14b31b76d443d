//! Decoding steps: sizes for `kernels/few_rows.cu` and `kernels/liger_step.cu`, and their recording as a graph.

use std::sync::Arc;

use liger_tensor::{
    DType, DeviceMemory, Error, Gate, KeyValueCache, LigerStep, Recording, Result, Sequences, StepForm, StepLinear,
    StepOps, StepSpec, Tensor,
};

use crate::compile::{Source, Variant};
use crate::driver::{Arg, Block, Gpu, Graph, Launch};
use crate::features::{gate_words, map_word};
use crate::kept::{Remembered, reach_word};
use crate::{Cuda, pointer, typed};

/// Rows that the largest kernel of few_rows.cu takes: eight tiles of eight.
const MOST_ROWS: usize = 64;
/// More rows want a large shared memory, and a single product of so many is cuBLASLt's.
const FEW_ROWS: usize = 32;
/// Outputs of a block: `BLOCK_OUTPUTS` of the kernels.
const BLOCK_OUTPUTS: usize = 16;
/// Layers that one launch takes: `MOST_OUTPUTS` of the kernels.
const MOST_LAYERS: usize = 3;
/// Largest group of query heads: `HEADS` of liger_step.cu.
const HEADS: usize = 8;
/// `PAD` of tile.cuh.
const PAD: usize = 8;
/// Largest head, and most memory slots.
const LARGEST_HEAD: usize = 128;
/// Elements of `StepShared.parts` a query head, where there is a recurrence.
const PARTS: usize = 1024;
/// Blocks that share the rows of a cache that keeps keys, on GPUs where blocks read each other's memory.
const SPLITS: usize = 4;

/// Kernels for up to 8, 16, 32 and 64 rows, by groups of [`BLOCK_OUTPUTS`] a block: `LINEARS` and `SWIGLU` of few_rows.cu.
const LINEARS: [&[(usize, &str)]; 4] = [
    &[(2, "linears_1_2"), (1, "linears_1_1")],
    &[(2, "linears_2_2"), (1, "linears_2_1")],
    &[(2, "linears_4_2"), (1, "linears_4_1")],
    &[(4, "linears_8_4"), (2, "linears_8_2"), (1, "linears_8_1")],
];
const SWIGLU: [&[(usize, &str)]; 4] =
    [&[(1, "swiglu_1_1")], &[(1, "swiglu_2_1")], &[(1, "swiglu_4_1")], &[(2, "swiglu_8_2"), (1, "swiglu_8_1")]];

/// The kernel for so many rows, and its launch: more outputs a block read x less often, where enough blocks are left for every
/// processor; of many rows x is most of what is read, and three of eight processors read it faster. A layer has `matrices` of the
/// same shape; `outputs` are of each layer.
fn few_rows_kernel(
    cuda: &Cuda,
    kernels: [&[(usize, &'static str)]; 4],
    rows: usize,
    outputs: &[usize],
    matrices: usize,
) -> (&'static str, Launch) {
    let tiles = rows.div_ceil(8).max(1).next_power_of_two();
    let of_rows = kernels[(tiles.ilog2() as usize).min(3)];
    let blocks = |groups: usize| -> usize { outputs.iter().map(|n| n.div_ceil(groups * BLOCK_OUTPUTS)).sum() };
    let many = tiles == 8;
    let enough = if many { cuda.gpu.processors * 3 / 8 } else { cuda.gpu.processors };
    let most = of_rows.iter().find(|(groups, _)| blocks(*groups) >= enough).or(of_rows.last());
    let (groups, name) = most.copied().unwrap_or((1, ""));
    let shared = staged_bytes(tiles, groups * matrices);
    (name, Launch { grid: (blocks(groups) as u32, 1, 1), block: (256, 1), shared })
}

/// Shared memory of `few_rows`: its `stages`, of 16 bytes for each of 256 threads in every slot.
fn staged_bytes(tiles: usize, groups: usize) -> usize {
    let slots = 2 * groups + tiles;
    let stages = (if tiles == 8 { 224 } else { 96 } / (4 * slots)).min(8);
    stages * slots * 256 * 16
}

/// Addresses of one layer; `bias` may be 0.
#[derive(Clone, Copy, Default)]
struct Layer {
    y: u64,
    w: u64,
    bias: u64,
    outputs: usize,
}

/// `y [rows, outputs] = x [rows, inputs] w^T` for up to three layers. Fails where few_rows.cu does not take the sizes.
fn linears(
    cuda: &Cuda,
    layers: &[Layer],
    x: &Tensor,
    norm: Option<(&Tensor, f32)>,
    add: bool,
    wide: bool,
) -> Result<()> {
    const NAME: &str = "linears";
    let (rows, inputs) = matrix(x);
    check(x, rows, inputs)?;
    let mut args = Vec::new();
    let at = |i: usize| layers.get(i).copied().unwrap_or_default();
    args.extend((0..MOST_LAYERS).map(|i| Arg::Pointer(at(i).y)));
    args.extend((0..MOST_LAYERS).map(|i| Arg::Pointer(at(i).w)));
    args.extend((0..MOST_LAYERS).map(|i| Arg::Pointer(at(i).bias)));
    args.push(cuda.act(NAME, x)?);
    args.push(norm_pointer(NAME, norm)?);
    let outputs: Vec<usize> = (0..MOST_LAYERS).map(|i| at(i).outputs).collect();
    let words = words(rows, inputs, &outputs, norm, layers.len(), add, wide);
    args.push(Arg::Words(&words));
    let (name, launch) = few_rows_kernel(cuda, LINEARS, rows, &outputs, 1);
    cuda.launch((Source::FewRows, name), launch, &args)
}

/// One layer, as a product of `Ops::gemm`.
pub(crate) fn linear(cuda: &Cuda, y: &Tensor, x: &Tensor, w: &Tensor, add: bool) -> Result<()> {
    let (y_at, w_at) = (pointer("gemm", y)?, typed("gemm", w, DType::Bf16)?);
    let layer = Layer { y: y_at, w: w_at, bias: 0, outputs: w.dim(0) };
    linears(cuda, &[layer], x, None, add, y.dtype() == DType::F32)
}

/// Whether [`linear`] takes these sizes.
pub(crate) fn takes_linear(activations: DType, x: &Tensor, w: &Tensor) -> bool {
    let (rows, inputs) = matrix(x);
    let types = [activations, x.dtype(), w.dtype()].iter().all(|&t| t == DType::Bf16);
    types && rows <= FEW_ROWS && inputs.is_multiple_of(8)
}

fn matrix(x: &Tensor) -> (usize, usize) {
    (x.dim(0), x.len() / x.dim(0).max(1))
}

fn check(x: &Tensor, rows: usize, inputs: usize) -> Result<()> {
    if rows <= MOST_ROWS && inputs.is_multiple_of(8) {
        return Ok(());
    }
    let expected = format!("at most {MOST_ROWS} rows of a multiple of 8");
    Err(Error::Shape { operation: "linears", found: x.shape().to_vec(), expected })
}

fn norm_pointer(operation: &'static str, norm: Option<(&Tensor, f32)>) -> Result<Arg<'static>> {
    norm.map_or(Ok(Arg::Pointer(0)), |(weight, _)| typed(operation, weight, DType::F32).map(Arg::Pointer))
}

/// `FewRows` of the kernels.
fn words(
    rows: usize,
    inputs: usize,
    outputs: &[usize],
    norm: Option<(&Tensor, f32)>,
    parts: usize,
    add: bool,
    wide: bool,
) -> [i32; 9] {
    let output = |i: usize| outputs.get(i).map_or(0, |&n| n as i32);
    let epsilon = norm.map_or(0.0, |(_, epsilon)| epsilon).to_bits() as i32;
    let [add, wide] = [add, wide].map(i32::from);
    [rows as i32, inputs as i32, parts as i32, output(0), output(1), output(2), epsilon, add, wide]
}

/// Bytes of shared memory: `StepShared` of liger_step.cu, scores and shares, and keys and values: both at once, or one after the
/// other. Before them that memory holds the `Choice` of kept.cuh.
fn shared_bytes(spec: &StepSpec, cache: &KeyValueCache, splits: usize, together: bool) -> usize {
    let (group, dim) = (spec.heads / spec.kv_heads, spec.head_dim);
    let (widest, cache_rows) = (slots(spec).max(dim), cache.keys.dim(2));
    let (rows, width) = (cache_rows.div_ceil(splits).next_multiple_of(16), dim.next_multiple_of(16) + PAD);
    let kept = spec.form == StepForm::Kept;
    let recurrence = if kept { 0 } else { group * (2 * widest + PARTS) + 2 * widest };
    let floats = group * (2 * dim + 2) + 3 * dim + recurrence + group * rows;
    let halves = HEADS * (width + rows + PAD);
    let keys_and_values = 2 * (1 + usize::from(together)) * rows * width;
    let choice = if kept { 4 * (5 * cache_rows + group * dim) } else { 0 };
    // Parts of the structure begin and end at multiples of 16 bytes.
    4 * floats + 2 * halves + 48 + keys_and_values.max(choice)
}

fn slots(spec: &StepSpec) -> usize {
    if let StepForm::Slots(slots) = spec.form { slots } else { 0 }
}

struct StepGraph {
    gpu: Arc<Gpu>,
    graph: Graph,
}

impl Recording for StepGraph {
    fn replay(&self) -> Result<()> {
        self.gpu.replay(&self.graph)
    }
}

impl Cuda {
    /// `SPLITS` of liger_step.cu.
    fn splits(&self, spec: &StepSpec) -> usize {
        if spec.form == StepForm::Kept && self.gpu.has_clusters() { SPLITS } else { 1 }
    }
}

fn block<'a>(operation: &'static str, tokens: &'a dyn DeviceMemory) -> Result<&'a Block> {
    let other = Error::Storage { operation, found: "memory of another device", expected: "the GPU's" };
    tokens.as_any().downcast_ref::<Block>().ok_or(other)
}

impl StepOps for Cuda {
    fn most_texts(&self) -> usize {
        let most = [1, 2, 4].map(|groups| staged_bytes(MOST_ROWS / 8, groups)).into_iter().max().unwrap_or(0)
            + MOST_ROWS * 8 * 4;
        if most <= self.gpu.largest_shared { MOST_ROWS } else { FEW_ROWS }
    }

    fn takes(&self, spec: &StepSpec, cache: &KeyValueCache) -> bool {
        let (dim, slots) = (spec.head_dim, slots(spec));
        let sizes = dim.is_multiple_of(8) && dim <= LARGEST_HEAD && slots.is_multiple_of(4) && slots <= LARGEST_HEAD;
        let room = shared_bytes(spec, cache, self.splits(spec), false) <= self.gpu.largest_shared;
        sizes && room && cache.spec.window.is_some() && spec.heads <= HEADS * spec.kv_heads
    }

    fn tokens(&self, texts: usize) -> Result<Box<dyn DeviceMemory>> {
        Ok(Box::new(self.gpu.allocate(3 * texts * 4)?))
    }

    fn place(&self, tokens: &dyn DeviceMemory, ids: &[u32], sequences: &Sequences) -> Result<()> {
        let list = sequences.list();
        let mut words: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        words.extend(list.iter().map(|s| s.slot as i32));
        words.extend(list.iter().map(|s| s.position as i32));
        self.gpu.write(block("place", tokens)?, &words)
    }

    fn embedding(&self, out: &mut Tensor, table: &Tensor, tokens: &dyn DeviceMemory) -> Result<()> {
        let ids = block("embedding", tokens)?;
        crate::elementwise::embedding_rows(self, out, table, ids)
    }

    fn linears(
        &self,
        layers: &mut [StepLinear<'_>],
        x: &Tensor,
        norm: Option<(&Tensor, f32)>,
        add: bool,
    ) -> Result<()> {
        const NAME: &str = "linears";
        let wide = layers.iter().any(|l| l.out.dtype() == DType::F32);
        let mut list = Vec::with_capacity(layers.len());
        for layer in layers {
            let outputs = layer.weight.dim(0);
            if layer.out.len() != x.dim(0) * outputs || layer.weight.len() * x.dim(0) != outputs * x.len() {
                let expected = format!("[{}, {outputs}]", x.dim(0));
                return Err(Error::Shape { operation: NAME, found: layer.out.shape().to_vec(), expected });
            }
            let bias = layer.bias.map_or(Ok(0), |bias| typed(NAME, bias, DType::F32))?;
            let dtype = if wide { DType::F32 } else { self.activations };
            let (y, w) = (typed(NAME, layer.out, dtype)?, typed(NAME, layer.weight, DType::Bf16)?);
            list.push(Layer { y, w, bias, outputs });
        }
        linears(self, &list, x, norm, add, wide)
    }

    fn swiglu(&self, out: &mut Tensor, x: &Tensor, norm: (&Tensor, f32), gate: &Tensor, up: &Tensor) -> Result<()> {
        const NAME: &str = "swiglu";
        let ((rows, inputs), outputs) = (matrix(x), gate.dim(0));
        check(x, rows, inputs)?;
        if out.len() != rows * outputs || gate.len() != outputs * inputs || up.len() != gate.len() {
            let expected = format!("[{rows}, {outputs}]");
            return Err(Error::Shape { operation: NAME, found: out.shape().to_vec(), expected });
        }
        let words = words(rows, inputs, &[outputs], Some(norm), 1, false, false);
        let args = [
            self.act(NAME, out)?,
            Arg::Pointer(typed(NAME, gate, DType::Bf16)?),
            Arg::Pointer(typed(NAME, up, DType::Bf16)?),
            self.act(NAME, x)?,
            norm_pointer(NAME, Some(norm))?,
            Arg::Words(&words),
        ];
        let (name, launch) = few_rows_kernel(self, SWIGLU, rows, &[outputs], 2);
        self.launch((Source::FewRows, name), launch, &args)
    }

    fn liger(&self, mixed: &mut Tensor, step: LigerStep<'_>, tokens: &dyn DeviceMemory) -> Result<()> {
        const NAME: &str = "liger_step";
        let LigerStep { spec, qkv, head_norms, frequencies, cache, states } = step;
        let texts = mixed.dim(0);
        let cache_rows = cache.keys.dim(2);
        let window = cache.spec.window.unwrap_or(cache_rows);
        let (maps, gate) = match spec.form {
            StepForm::Features(f) => ([map_word(f.query), map_word(f.key)], gate_words(f.gate)),
            StepForm::Slots(_) | StepForm::Off | StepForm::Kept => ([0; 2], gate_words(Gate::NegativeExp)),
        };
        let alpha = if matches!(spec.form, StepForm::Off | StepForm::Kept) { 0.0 } else { spec.alpha };
        let float = |x: f32| x.to_bits() as i32;
        let [heads, kv, n, window, sinks, rows] =
            [spec.heads, spec.kv_heads, texts, window, cache.spec.sinks, cache_rows].map(|x| x as i32);
        let scale = 1.0 / (spec.head_dim as f32).sqrt();
        let [query_map, key_map] = maps;
        let floats = [gate.1, gate.2, alpha, spec.beta, scale, spec.rope_factor, spec.epsilon].map(float);
        let kept_slots = if spec.form == StepForm::Kept { cache.spec.slots() as i32 } else { 0 };
        let [by_score, reach] = [cache.spec.kept_by_score() as i32, reach_word(cache.spec)];
        let splits = self.splits(&spec);
        // Keys and values at once where all blocks then run at the same time, if they fit at all.
        let blocks = spec.kv_heads * splits * texts;
        let [apart, at_once] = [false, true].map(|together| shared_bytes(&spec, cache, splits, together));
        let largest = self.gpu.largest_shared;
        let runs = |bytes: usize| blocks <= self.gpu.processors * (largest / bytes);
        let together = at_once <= largest && (runs(at_once) || !runs(apart));
        let both = i32::from(together);
        let counts = [heads, kv, n, window, sinks, rows, kept_slots, by_score, reach, both, query_map, key_map, gate.0];
        let words: Vec<i32> = counts.into_iter().chain(floats).collect();
        let state = |i: usize| states.get(i).map_or(Ok(Arg::Pointer(0)), |s| self.f32(NAME, s));
        let (first_state, key_sum) = match spec.form {
            StepForm::Kept => (Arg::Pointer(0), state(0)?),
            _ => (state(0)?, Arg::Pointer(0)),
        };
        let remembered = if kept_slots > 0 { Remembered::of(cache)? } else { Remembered::default() };
        let norm = |i: usize| head_norms.map_or(Ok(Arg::Pointer(0)), |norms| self.f32(NAME, norms[i]));
        let args = [
            self.act(NAME, mixed)?,
            self.act(NAME, qkv[0])?,
            self.act(NAME, qkv[1])?,
            self.act(NAME, qkv[2])?,
            norm(0)?,
            norm(1)?,
            self.f32(NAME, frequencies)?,
            self.act(NAME, &cache.keys)?,
            self.act(NAME, &cache.values)?,
            Arg::Pointer(remembered.scores),
            Arg::Pointer(remembered.positions),
            first_state,
            state(1)?,
            key_sum,
            Arg::Pointer(remembered.queries),
            Arg::Pointer(block(NAME, tokens)?.pointer),
            Arg::Words(&words),
        ];
        let sizes = [spec.head_dim, spec.heads / spec.kv_heads, slots(&spec), usize::from(kept_slots > 0), splits];
        let launch = Launch {
            grid: ((spec.kv_heads * splits) as u32, texts as u32, 1),
            block: (256, 1),
            shared: if together { at_once } else { apart },
        };
        let variant = Variant { activations: self.activations, sizes };
        self.gpu.launch((Source::LigerStep, NAME), variant, launch, &args)
    }

    fn record(&self, run: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Recording>>> {
        let graph = self.gpu.record(run)?;
        Ok(graph.map(|graph| Box::new(StepGraph { gpu: self.gpu.clone(), graph }) as Box<dyn Recording>))
    }
}
