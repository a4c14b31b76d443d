//! Kernel sources, compiled by NVRTC for the GPU at hand and kept on disk.

use std::ffi::CString;
use std::io::Write;
use std::path::PathBuf;

use cudarc::nvrtc::{result, sys};
use liger_tensor::DType;

/// What a file is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Variant {
    /// Element type of activations.
    pub activations: DType,
    /// Sizes, as [`Source::sizes`] names them; 0 for those that the file does not have.
    pub sizes: [usize; 5],
}

impl Variant {
    /// For a file without sizes.
    pub fn of(activations: DType) -> Self {
        Self { activations, sizes: [0; 5] }
    }
}

/// A file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// Norms, RoPE, SwiGLU and the like.
    Elementwise,
    /// Feature maps and gates.
    Features,
    /// Softmax attention.
    Attention,
    /// Its key/value cache, and one token of it.
    AttentionStep,
    /// Which keys stay when they leave the window.
    Kept,
    /// The gated recurrence in chunks.
    RecurrenceChunks,
    /// Its gradients of k, v and the gates.
    RecurrenceGradients,
    /// One token of it.
    RecurrenceStep,
    /// Losses and the optimizer.
    Loss,
    /// Choosing the next token.
    Sampling,
    /// LoRA's products of few columns.
    LowRank,
    /// Linear layers of few rows.
    FewRows,
    /// Liger Attention for one token.
    LigerStep,
}

const COMMON: &str = include_str!("../kernels/common.cuh");
const TILE: &str = include_str!("../kernels/tile.cuh");
const BATCH: &str = include_str!("../kernels/batch.cuh");
const ATTENTION: &str = include_str!("../kernels/attention.cuh");
const KEPT: &str = include_str!("../kernels/kept.cuh");
const GATES: &str = include_str!("../kernels/gates.cuh");
const RECURRENCE: &str = include_str!("../kernels/recurrence.cuh");

impl Source {
    /// Every file.
    pub const ALL: [Self; 13] = [
        Self::Elementwise,
        Self::Features,
        Self::Attention,
        Self::AttentionStep,
        Self::Kept,
        Self::RecurrenceChunks,
        Self::RecurrenceGradients,
        Self::RecurrenceStep,
        Self::Loss,
        Self::Sampling,
        Self::LowRank,
        Self::FewRows,
        Self::LigerStep,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Elementwise => "elementwise.cu",
            Self::Features => "features.cu",
            Self::Attention => "attention.cu",
            Self::AttentionStep => "attention_step.cu",
            Self::Kept => "kept.cu",
            Self::RecurrenceChunks => "recurrence_chunks.cu",
            Self::RecurrenceGradients => "recurrence_gradients.cu",
            Self::RecurrenceStep => "recurrence_step.cu",
            Self::Loss => "loss.cu",
            Self::Sampling => "sampling.cu",
            Self::LowRank => "low_rank.cu",
            Self::FewRows => "few_rows.cu",
            Self::LigerStep => "liger_step.cu",
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Elementwise => include_str!("../kernels/elementwise.cu"),
            Self::Features => include_str!("../kernels/features.cu"),
            Self::Attention => include_str!("../kernels/attention.cu"),
            Self::AttentionStep => include_str!("../kernels/attention_step.cu"),
            Self::Kept => include_str!("../kernels/kept.cu"),
            Self::RecurrenceChunks => include_str!("../kernels/recurrence_chunks.cu"),
            Self::RecurrenceGradients => include_str!("../kernels/recurrence_gradients.cu"),
            Self::RecurrenceStep => include_str!("../kernels/recurrence_step.cu"),
            Self::Loss => include_str!("../kernels/loss.cu"),
            Self::Sampling => include_str!("../kernels/sampling.cu"),
            Self::LowRank => include_str!("../kernels/low_rank.cu"),
            Self::FewRows => include_str!("../kernels/few_rows.cu"),
            Self::LigerStep => include_str!("../kernels/liger_step.cu"),
        }
    }

    /// Names of the sizes that the file's kernels are compiled for.
    pub fn sizes(self) -> &'static [&'static str] {
        match self {
            Self::Attention | Self::AttentionStep => &["DIM", "GROUP", "KEPT"],
            Self::LigerStep => &["DIM", "GROUP", "SLOTS", "KEPT", "SPLITS"],
            Self::Kept => &["DIM"],
            Self::LowRank => &["RANK", "PROJECTIONS"],
            Self::RecurrenceChunks | Self::RecurrenceGradients | Self::RecurrenceStep => {
                &["DK", "DV", "GROUP", "SLICE", "AXIS"]
            }
            _ => &[],
        }
    }

    /// What stands before the file's own text.
    fn headers(self) -> &'static [&'static str] {
        match self {
            Self::Attention => &[COMMON, TILE, BATCH, KEPT, ATTENTION],
            Self::AttentionStep => &[COMMON, BATCH, KEPT, ATTENTION],
            Self::LowRank => &[COMMON, TILE],
            Self::Kept => &[COMMON, BATCH, KEPT],
            Self::Features => &[COMMON, GATES],
            Self::LigerStep => &[COMMON, TILE, GATES, KEPT],
            Self::RecurrenceChunks | Self::RecurrenceGradients | Self::RecurrenceStep => {
                &[COMMON, TILE, BATCH, RECURRENCE]
            }
            _ => &[COMMON],
        }
    }

    /// The whole program of one variant.
    fn program(self, variant: Variant) -> String {
        self.preamble(variant) + "#line 1 \"" + self.name() + "\"\n" + self.text()
    }

    /// What stands before the file's text: type of activations, sizes, headers.
    fn preamble(self, variant: Variant) -> String {
        let mut program = String::new();
        if variant.activations == DType::Bf16 {
            program.push_str("#define ACT_BF16\n");
        }
        for (name, size) in self.sizes().iter().zip(variant.sizes) {
            program.push_str(&format!("#define {name} {size}\n"));
        }
        program + &self.headers().concat()
    }
}

/// Machine code and what the compiler says of it.
pub struct Compiled {
    /// A cubin.
    pub code: Vec<u8>,
    /// Registers, shared memory and spills of every kernel, as ptxas prints them.
    pub log: String,
}

fn options(arch: &str) -> Vec<String> {
    let fixed = ["--std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v"];
    std::iter::once(format!("--gpu-architecture={arch}")).chain(fixed.map(String::from)).collect()
}

/// Compiles a file for `arch`, such as `sm_90a`; needs NVRTC, not a GPU.
///
/// # Errors
/// If NVRTC cannot be found, or the compiler's messages.
pub fn compile(source: Source, variant: Variant, arch: &str) -> Result<Compiled, String> {
    compile_text(source.name(), &source.program(variant), arch)
}

/// The same of a file that is no [`Source`], in the place of `source`: for kernels that are tried or kept beside the others.
///
/// # Errors
/// As [`compile`].
pub fn compile_instead(source: Source, text: &str, variant: Variant, arch: &str) -> Result<Compiled, String> {
    compile_text("a kernel", &(source.preamble(variant) + text), arch)
}

fn compile_text(name: &str, program: &str, arch: &str) -> Result<Compiled, String> {
    crate::libraries::open_compiler()?;
    let failed = |what: &str| format!("{name}: NVRTC: {what}");
    let text = CString::new(program).map_err(|e| failed(&e.to_string()))?;
    let file = CString::new(name).map_err(|e| failed(&e.to_string()))?;
    let program = result::create_program(&text, Some(&file)).map_err(|e| failed(&e.to_string()))?;
    // SAFETY: the program was just made, and is destroyed once, below.
    let outcome = unsafe { result::compile_program(program, &options(arch)) };
    // SAFETY: as above.
    let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
    let log: String = log.iter().map(|&c| c as u8 as char).filter(|&c| c != '\0').collect();
    let code = match outcome {
        Ok(()) => cubin(program).map_err(|e| failed(&e)),
        Err(e) => Err(format!("{name}: {e}\n{log}")),
    };
    // SAFETY: as above; nothing uses it later.
    let _ = unsafe { result::destroy_program(program) };
    Ok(Compiled { code: code?, log })
}

fn cubin(program: sys::nvrtcProgram) -> Result<Vec<u8>, String> {
    let mut size = 0;
    // SAFETY: the program is compiled; NVRTC writes one size.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut size) }.result().map_err(|e| e.to_string())?;
    let mut code = vec![0u8; size];
    // SAFETY: the buffer has the size that NVRTC named.
    unsafe { sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()) }.result().map_err(|e| e.to_string())?;
    Ok(code)
}

/// The same from the cache on disk, which is filled on the way. The name of an entry is a hash of source, options and
/// driver.
pub(crate) fn compile_cached(source: Source, variant: Variant, arch: &str, driver: i32) -> Result<Vec<u8>, String> {
    let key = format!("{}\n{:?}\n{driver}", source.program(variant), options(arch));
    let path =
        cache_folder().map(|folder| folder.join(format!("{}-{:016x}.cubin", source.name(), hash(key.as_bytes()))));
    if let Some(code) = path.as_ref().and_then(|path| std::fs::read(path).ok()).filter(|code| !code.is_empty()) {
        return Ok(code);
    }
    let code = compile(source, variant, arch)?.code;
    if let Some(path) = path {
        // A cache that cannot be written costs time, nothing else.
        let _ = write_whole(&path, &code);
    }
    Ok(code)
}

fn cache_folder() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(base.join("liger").join("kernels"))
}

/// Under a temporary name first: another process may read at any time.
fn write_whole(path: &std::path::Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}
