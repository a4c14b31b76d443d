//! What needs no GPU: every kernel compiles, and those for bfloat16 keep everything in registers. NVRTC comes from PyPI
//! (`pip install nvidia-cuda-nvrtc`); where it is not installed, the tests say so and do nothing, unless
//! `LIGER_NEEDS_NVRTC` is set.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use liger_cuda::{Source, Variant, compile, compile_instead};
use liger_tensor::DType;

/// Sizes to compile for: Llama 3 at 1B and 8B, SmolLM2, and gsa's axis.
fn sizes(source: Source) -> Vec<[usize; 5]> {
    match source {
        Source::Attention | Source::AttentionStep => {
            vec![
                [64, 4, 0, 0, 0],
                [64, 3, 1, 0, 0],
                [128, 4, 0, 0, 0],
                [64, 3, 0, 0, 0],
                [128, 4, 1, 0, 0],
                [64, 4, 1, 0, 0],
            ]
        }
        Source::RecurrenceChunks | Source::RecurrenceGradients | Source::RecurrenceStep => {
            vec![[64, 64, 4, 4, 0], [128, 128, 4, 4, 0], [64, 64, 3, 3, 0], [64, 64, 3, 3, 1]]
        }
        Source::Kept => vec![[64, 0, 0, 0, 0], [128, 0, 0, 0, 0], [80, 0, 0, 0, 0]],
        Source::LowRank => vec![[8, 3, 0, 0, 0], [8, 1, 0, 0, 0], [16, 2, 0, 0, 0]],
        Source::LigerStep => {
            vec![
                [64, 4, 0, 0, 1],
                [64, 3, 0, 1, 1],
                [128, 4, 0, 0, 1],
                [64, 3, 64, 0, 1],
                [128, 8, 0, 0, 1],
                [128, 4, 0, 1, 4],
                [64, 3, 0, 1, 4],
            ]
        }
        _ => vec![[0; 5]],
    }
}

/// Compiles every file for `arch`, as many sizes of it as there are up to `most`.
fn check(arch: &str, activations: DType, most: usize) {
    for source in Source::ALL {
        for sizes in sizes(source).into_iter().take(most) {
            let variant = Variant { activations, sizes };
            let compiled = match compile(source, variant, arch) {
                Ok(compiled) => compiled,
                Err(e) if e.contains("not found") && std::env::var_os("LIGER_NEEDS_NVRTC").is_none() => {
                    println!("skipped: {e}");
                    return;
                }
                Err(e) => panic!("{e}"),
            };
            assert!(!compiled.code.is_empty());
            let spills = |line: &&str| line.contains("spill") && !line.contains(" 0 bytes spill stores");
            let spilled: Vec<&str> = compiled.log.lines().filter(spills).collect();
            // float32 is for parity, not for speed.
            let hot = activations == DType::Bf16;
            assert!(spilled.is_empty() || !hot, "{source:?} {variant:?} {arch}: {spilled:?}\n{}", compiled.log);
        }
    }
}

#[test]
fn hopper() {
    check("sm_90a", DType::Bf16, 7);
}

#[test]
fn ampere() {
    check("sm_80", DType::Bf16, 2);
}

#[test]
fn float32() {
    check("sm_80", DType::F32, 1);
}

/// The versions that are kept in `lab/` still compile, with the headers of today.
#[test]
fn lab() {
    let kept = [
        (Source::FewRows, include_str!("../lab/gemv.cu")),
        (Source::FewRows, include_str!("../lab/few_rows_in_rounds.cu")),
        (Source::FewRows, include_str!("../lab/few_rows_in_registers.cu")),
        (Source::Attention, include_str!("../lab/attention_64_keys.cu")),
        (Source::Loss, include_str!("../lab/loss_one_by_one.cu")),
        (Source::Attention, include_str!("../lab/recurrence_step_by_step.cu")),
    ];
    for (source, text) in kept {
        let variant = Variant { activations: DType::Bf16, sizes: sizes(source)[0] };
        match compile_instead(source, text, variant, "sm_90a") {
            Ok(compiled) => assert!(!compiled.code.is_empty()),
            Err(e) if e.contains("not found") && std::env::var_os("LIGER_NEEDS_NVRTC").is_none() => return,
            Err(e) => panic!("{source:?}: {e}"),
        }
    }
}
