//! Decoding in constant memory.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;

use liger_cpu::Cpu;
use liger_cuda::Cuda;
use liger_model::{Decoder, Generator, LigerConfig, ModelConfig, RandomWeights, Structure, Weights};
use liger_tensor::DType;

fn tiny(structure: Structure) -> Decoder {
    let config = ModelConfig::shape("tiny").unwrap();
    let ops = Arc::new(Cpu::new());
    let weights = Weights::load(&RandomWeights::new(&config, 1), &config, &*ops, DType::F32).unwrap();
    let liger = LigerConfig { window: 16, sinks: 4, ..LigerConfig::paper(structure) };
    Decoder::new(ops, config, weights).with_attention(Some(liger))
}

/// Resident memory in KiB; `None` where the system does not say.
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// One test, for the other tests of a process would show in its memory.
#[test]
fn twenty_thousand_tokens_take_no_more_memory_than_a_thousand() {
    let decoder = tiny(Structure::Gla);
    // Far past the 512 tokens that the base model is said to be trained for.
    assert_eq!(decoder.context_limit(), None);
    let generator = Generator { decoder: &decoder, adapter: None };
    let mut state = decoder.new_state(1).unwrap();
    let bytes = state.bytes();
    let mut logits = generator.prefill(&mut state, 0, &[1, 2, 3]).unwrap();
    let mut before = None;
    for i in 0..20_000 {
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
        let step = generator.step(&mut state, &[(0, best)]).unwrap();
        logits = decoder.ops().download(step).unwrap();
        if i == 1000 {
            before = resident();
        }
    }
    assert!(logits.iter().all(|x| x.is_finite()));
    assert_eq!((state.position(0), state.bytes()), (20_003, bytes));
    if let (Some(before), Some(after)) = (before, resident()) {
        assert!(after <= before + 1024, "resident memory grew from {before} to {after} KiB");
    }
    a_state_survives_the_disk();
    a_teacher_stops_at_its_context();
    // As tests/golden.rs chooses its device.
    if std::env::var("LIGER_TEST_DEVICE").is_ok_and(|device| device == "cuda-bf16") {
        a_gpu_keeps_to_the_memory_of_its_start();
    }
}

/// Prompts of all lengths and all numbers of texts after [`Generator::warm_up`].
fn a_gpu_keeps_to_the_memory_of_its_start() {
    const CHUNK: usize = 256;
    let gpu = Arc::new(Cuda::open(0, DType::Bf16).unwrap_or_else(|e| panic!("{e}")));
    let config = ModelConfig::shape("smollm2-135m").unwrap();
    let weights = Weights::load(&RandomWeights::new(&config, 1), &config, &*gpu, DType::Bf16).unwrap();
    let liger = LigerConfig { sinks: 4, ..LigerConfig::paper(Structure::Kept) };
    let decoder = Decoder::new(gpu.clone(), config, weights).with_attention(Some(liger));
    let generator = Generator { decoder: &decoder, adapter: None };
    let mut state = decoder.new_state(64).unwrap();
    generator.warm_up(&mut state, CHUNK).unwrap();
    let (held, (free, _)) = (gpu.held_bytes(), decoder.ops().memory().unwrap());
    for round in 1..=CHUNK {
        let (slot, length) = (round % 64, round * 97 % CHUNK + 1);
        state.reset(slot, decoder.ops()).unwrap();
        let ids = vec![round as u32; length];
        if round % 4 == 0 {
            generator.prefill_scoring(&mut state, slot, &ids).unwrap();
        } else {
            generator.prefill(&mut state, slot, &ids).unwrap();
        }
        let tokens: Vec<(usize, u32)> = (0..round % 64 + 1).map(|slot| (slot, 7)).collect();
        let step = generator.step(&mut state, &tokens).unwrap();
        assert_eq!(step.shape(), [tokens.len(), 49152]);
        assert!(decoder.ops().download(step).unwrap().iter().all(|x| x.is_finite()));
        assert!(gpu.held_bytes() <= held, "{} bytes after {round} prompts, {held} before", gpu.held_bytes());
    }
    let (free_now, _) = decoder.ops().memory().unwrap();
    // The driver's own, such as of recordings, too.
    assert!(free_now + (2 << 20) >= free, "{} bytes were free after the start, {free_now} in the end", free);
}

fn a_state_survives_the_disk() {
    for structure in Structure::ALL {
        let decoder = tiny(structure);
        let generator = Generator { decoder: &decoder, adapter: None };
        let prompt: Vec<u32> = (0..100).map(|i| i * 37 % 256).collect();
        let mut state = decoder.new_state(1).unwrap();
        generator.prefill(&mut state, 0, &prompt).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        state.save(&path, "this model", "a note", decoder.ops()).unwrap();
        let expected = generator.prefill(&mut state, 0, &[7, 8, 9]).unwrap();
        let mut again = decoder.new_state(1).unwrap();
        assert_eq!(again.load(&path, "this model", decoder.ops()).unwrap(), "a note");
        assert_eq!(again.position(0), 100);
        // Out of a slot and into another.
        let (mut one, mut several) = (decoder.new_state(1).unwrap(), decoder.new_state(3).unwrap());
        again.take(0, &mut one, decoder.ops()).unwrap();
        several.put(2, &one, decoder.ops()).unwrap();
        assert_eq!(generator.prefill(&mut several, 2, &[7, 8, 9]).unwrap(), expected);
        assert_eq!(generator.prefill(&mut again, 0, &[7, 8, 9]).unwrap(), expected);
        let error = again.load(&path, "another model", decoder.ops()).unwrap_err().to_string();
        assert!(error.ends_with("the state of another model, structure or adapter"), "{error}");
        again.reset(0, decoder.ops()).unwrap();
        let mut fresh = decoder.new_state(1).unwrap();
        let first = generator.prefill(&mut fresh, 0, &prompt).unwrap();
        assert_eq!(generator.prefill(&mut again, 0, &prompt).unwrap(), first);
    }
}

fn a_teacher_stops_at_its_context() {
    let teacher = tiny(Structure::Gla).with_attention(None);
    assert_eq!(teacher.context_limit(), Some(512));
    let mut state = teacher.new_state(1).unwrap();
    let generator = Generator { decoder: &teacher, adapter: None };
    let error = generator.prefill(&mut state, 0, &[1; 513]).unwrap_err().to_string();
    assert!(error.starts_with("513 tokens are more than this model's context of 512"), "{error}");
    assert!(error.contains("a Liger model has no such limit"), "{error}");
}
