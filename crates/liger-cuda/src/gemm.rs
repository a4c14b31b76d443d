//! Matrix products: cuBLASLt with a plan kept for each shape, and an own kernel for a few rows times bfloat16 weights.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use liger_tensor::checks::same_length;
use liger_tensor::{DType, Error, Gemm, Result, Tensor};

use crate::driver::Block;
use crate::{Cuda, pointer, typed};

/// cuBLASLt's scratch: what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// What a plan depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    transpose_a: bool,
    transpose_b: bool,
    input: DType,
    output: DType,
}

#[derive(Clone, Copy)]
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    c: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The library's handle and the plans made so far; they live as long as the process.
pub(crate) struct Products {
    handle: sys::cublasLtHandle_t,
    workspace: Block,
    plans: Mutex<HashMap<Shape, Plan>>,
}

// SAFETY: cuBLASLt's handle and descriptors may be used from any thread; the map is behind a lock.
unsafe impl Send for Products {}
// SAFETY: as above.
unsafe impl Sync for Products {}

fn failed(e: CublasError) -> Error {
    Error::Device { operation: "matrix product".into(), message: format!("cuBLASLt: {:?}", e.0) }
}

fn cuda_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        // Quantised weights never come onto a GPU.
        _ => sys::cudaDataType_t::CUDA_R_32F,
    }
}

impl Products {
    pub(crate) fn new(gpu: &std::sync::Arc<crate::driver::Gpu>) -> Result<Self> {
        gpu.bind()?;
        let handle = result::create_handle().map_err(failed)?;
        Ok(Self { handle, workspace: gpu.allocate(WORKSPACE)?, plans: Mutex::default() })
    }

    fn plan(&self, shape: Shape) -> Result<Plan> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&plan) = plans.get(&shape) {
            return Ok(plan);
        }
        let plan = self.make(shape).map_err(failed)?;
        plans.insert(shape, plan);
        Ok(plan)
    }

    /// cuBLASLt counts columns first: it is asked for C^T = op(B)^T op(A)^T, whose memory is C by rows.
    fn make(&self, s: Shape) -> std::result::Result<Plan, CublasError> {
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let description = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)?;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let flags = [
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, s.transpose_b),
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, s.transpose_a),
        ];
        for (attribute, transposed) in flags {
            let value = i32::from(transposed);
            // SAFETY: the attribute is an integer of this size.
            unsafe { result::set_matmul_desc_attribute(description, attribute, (&raw const value).cast(), 4) }?;
        }
        let layout = |dtype: DType, rows: usize, columns: usize| {
            result::create_matrix_layout(cuda_type(dtype), columns as u64, rows as u64, columns as i64)
        };
        let a = if s.transpose_b { layout(s.input, s.n, s.k)? } else { layout(s.input, s.k, s.n)? };
        let b = if s.transpose_a { layout(s.input, s.k, s.m)? } else { layout(s.input, s.m, s.k)? };
        let c = layout(s.output, s.m, s.n)?;
        let preference = result::create_matmul_pref()?;
        let workspace = WORKSPACE;
        // SAFETY: the attribute is a size of 8 bytes; all handles were just made.
        let heuristic = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                8,
            )?;
            let found = result::get_matmul_algo_heuristic(self.handle, description, a, b, c, c, preference)?;
            result::destroy_matmul_pref(preference)?;
            found
        };
        Ok(Plan { description, a, b, c, algorithm: heuristic.algo })
    }
}

/// The sizes m, n, k, if the three matrices fit together.
fn sizes(c: &Tensor, a: &Tensor, b: &Tensor, how: Gemm) -> Result<(usize, usize, usize)> {
    let matrix = |t: &Tensor| (t.dim(0), t.len() / t.dim(0).max(1));
    let flip =
        |(rows, columns): (usize, usize), transposed: bool| if transposed { (columns, rows) } else { (rows, columns) };
    let ((m, k), (other, n)) = (flip(matrix(a), how.transpose_a), flip(matrix(b), how.transpose_b));
    if k == other && matrix(c) == (m, n) {
        return Ok((m, n, k));
    }
    let expected = format!("[{m}, {n}] from {:?} and {:?}", a.shape(), b.shape());
    Err(Error::Shape { operation: "gemm", found: c.shape().to_vec(), expected })
}

/// `base` takes the place of what `c` held.
pub(crate) fn gemm(
    cuda: &Cuda,
    c: &mut Tensor,
    base: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    how: Gemm,
) -> Result<()> {
    let (m, n, k) = sizes(c, a, b, how)?;
    if m == 0 || n == 0 {
        return Ok(());
    }
    if let Some(base) = base {
        same_length("gemm", base, c)?;
    }
    let is_plain = !how.transpose_a && how.transpose_b && how.scale == 1.0;
    if is_plain && crate::steps::takes_linear(cuda.activations, a, b) {
        if let Some(base) = base {
            cuda.copy("gemm", (c, 0), (base, 0), base.len())?;
        }
        return crate::steps::linear(cuda, c, a, b, how.accumulate || base.is_some());
    }
    // Both inputs in one type: the adapters' float32 becomes bfloat16 beside bfloat16 activations.
    let input = if a.dtype() == b.dtype() { a.dtype() } else { cuda.activations };
    let (converted_a, converted_b) = (converted(cuda, a, input)?, converted(cuda, b, input)?);
    let at =
        |own: &Option<Block>, tensor: &Tensor| own.as_ref().map_or_else(|| pointer("gemm", tensor), |b| Ok(b.pointer));
    let (a, b) = (at(&converted_a, a)?, at(&converted_b, b)?);
    if input == DType::F32 && c.dtype() == DType::Bf16 {
        return Err(Error::Storage { operation: "gemm", found: "bfloat16", expected: "float32 from float32 factors" });
    }
    let shape = Shape { m, n, k, transpose_a: how.transpose_a, transpose_b: how.transpose_b, input, output: c.dtype() };
    let plan = cuda.products.plan(shape)?;
    let (alpha, beta) = (how.scale, if how.accumulate || base.is_some() { 1.0f32 } else { 0.0 });
    let base = base.map_or_else(|| pointer("gemm", c), |base| typed("gemm", base, c.dtype()))?;
    let c = pointer("gemm", c)?;
    cuda.gpu.bind()?;
    let span = cuda.gpu.begin_span(|| format!("gemm {m} x {n} x {k}, {input:?}"))?;
    // SAFETY: the matrices have the sizes of the plan, and the workspace that which the plan was made with.
    unsafe {
        result::matmul(
            cuda.products.handle,
            plan.description,
            (&raw const alpha).cast(),
            (&raw const beta).cast(),
            b as *const c_void,
            plan.a,
            a as *const c_void,
            plan.b,
            base as *const c_void,
            plan.c,
            c as *mut c_void,
            plan.c,
            &plan.algorithm,
            cuda.products.workspace.pointer as *mut c_void,
            WORKSPACE,
            cuda.gpu.stream.cast(),
        )
    }
    .map_err(failed)?;
    cuda.gpu.end_span(span)
}

/// A copy in another element type, if it has another.
fn converted(cuda: &Cuda, x: &Tensor, dtype: DType) -> Result<Option<Block>> {
    if x.dtype() == dtype {
        return Ok(None);
    }
    let block = cuda.gpu.allocate(dtype.bytes(x.len()))?;
    cuda.convert(block.pointer, pointer("gemm", x)?, dtype, x.len())?;
    Ok(Some(block))
}
