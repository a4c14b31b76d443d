//! GEMM, the chunked recurrence, a decoding step and a training step, at SmolLM2-135M's sizes.
#![allow(missing_docs, clippy::unwrap_used)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use liger_model::{Adapter, Generator, LoraConfig, Recompute, Target};
use liger_tensor::{DType, GateAxis, Gemm, Ops, Recurrence, RecurrenceGradients, Sequences};

const TOKENS: usize = 1024;

fn gemm(c: &mut Criterion) {
    let cpu = liger_cpu::Cpu::new();
    let mut group = c.benchmark_group("gemm");
    group.sample_size(10);
    let sizes = [(1, 576, 1536), (16, 576, 1536), (TOKENS, 576, 1536), (TOKENS, 1536, 576), (TOKENS, 4096, 14336)];
    for (tokens, input, out) in sizes {
        let ones = |shape: &[usize]| cpu.upload(vec![1.0; shape.iter().product()], shape, DType::F32).unwrap();
        let (x, dy) = (ones(&[tokens, input]), ones(&[tokens, out]));
        let (mut y, mut dx) = (ones(&[tokens, out]), ones(&[tokens, input]));
        group.throughput(Throughput::Elements((2 * tokens * input * out) as u64));
        for dtype in [DType::F32, DType::Bf16, DType::Q8_0, DType::Q4_1] {
            let w = cpu.random(&[out, input], 1.0, 0, dtype).unwrap();
            group.bench_function(format!("linear {tokens}x{input}x{out} {}", dtype.name()), |b| {
                b.iter(|| cpu.gemm(&mut y, &x, &w, Gemm::LINEAR).unwrap());
            });
            group.bench_function(format!("input gradient {tokens}x{out}x{input} {}", dtype.name()), |b| {
                b.iter(|| cpu.gemm(&mut dx, &dy, &w, Gemm::INPUT_GRADIENT).unwrap());
            });
        }
    }
}

fn recurrence(c: &mut Criterion) {
    let cpu = liger_cpu::Cpu::new();
    let (kv, heads, d) = (3, 9, 64);
    let fill = |heads: usize, value: f32| {
        cpu.upload(vec![value; TOKENS * heads * d], &[TOKENS, heads, d], DType::F32).unwrap()
    };
    let (q, k, v, log_gate) = (fill(heads, 0.1), fill(kv, 0.1), fill(kv, 1.0), fill(kv, -0.05));
    let sequences = Sequences::fresh([TOKENS]);
    let inputs = Recurrence { q: &q, k: &k, v: &v, log_gate: &log_gate, axis: GateAxis::Key, sequences: &sequences };
    let mut out = fill(heads, 0.0);
    let mut group = c.benchmark_group("recurrence of 1024 tokens");
    group.throughput(Throughput::Elements(TOKENS as u64));
    group.bench_function("forward", |b| b.iter(|| cpu.gated_recurrence_forward(&mut out, inputs, None, None).unwrap()));
    let (mut dq, mut dk, mut dv, mut dg) = (fill(heads, 0.0), fill(kv, 0.0), fill(kv, 0.0), fill(kv, 0.0));
    let dout = fill(heads, 0.1);
    group.bench_function("backward", |b| {
        b.iter(|| {
            let gradients = RecurrenceGradients { q: &mut dq, k: &mut dk, v: &mut dv, log_gate: &mut dg, state: None };
            cpu.gated_recurrence_backward(gradients, inputs, None, None, &dout).unwrap();
        });
    });
}

fn model(c: &mut Criterion) {
    let decoder = liger_benches::smollm2().unwrap();
    let (ops, config) = (decoder.ops(), decoder.config());
    let mut group = c.benchmark_group("smollm2-135m");
    group.sample_size(10);
    let generator = Generator { decoder: &decoder, adapter: None };
    let mut state = decoder.new_state(1).unwrap();
    group.bench_function("decode step", |b| b.iter(|| generator.step(&mut state, &[(0, 1)]).map(|_| ()).unwrap()));
    let lora = LoraConfig { rank: 8, alpha: 8.0, dropout: 0.0, targets: Target::ALL.to_vec() };
    let adapter = Adapter::new(lora, config, ops, 0).unwrap();
    let mut gradients = adapter.zeros_like(config, ops).unwrap();
    let ids: Vec<u32> = (0..256).collect();
    group.throughput(Throughput::Elements(ids.len() as u64));
    group.bench_function("training step of 256 tokens, without the output layer", |b| {
        b.iter(|| {
            let pass =
                decoder.train_forward(&ids, Sequences::fresh([ids.len()]), &adapter, 0, Recompute::Layer).unwrap();
            let dhidden = ops.zeros(pass.hidden.shape()).unwrap();
            decoder.train_backward(pass, &dhidden, &adapter, &mut gradients).unwrap();
        });
    });
}

criterion_group!(benches, gemm, recurrence, model);
criterion_main!(benches);
