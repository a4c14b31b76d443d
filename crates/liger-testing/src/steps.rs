//! Decoding steps: linear layers of few rows against float64, and Liger Attention of one token against the operations that
//! it stands for, which have their own checks.

use liger_tensor::{
    Attention, AttentionSpec, DType, FeatureMap, FeatureSpec, Features, Gate, GateAxis, Keeping, KeptKeys,
    KeyValueCache, LigerStep, Recurrence, Sequences, StepForm, StepLinear, StepOps, StepSpec, Tensor,
};

use crate::attention::frequencies;
use crate::plain::{matmul, sigmoid, transpose};
use crate::{Check, Numbers};

pub(crate) fn check(c: &Check<'_>) {
    let Some(steps) = c.ops.steps() else { return };
    for rows in [1, 3, 8, 9, 16, 17, 32, 33, 64] {
        for (inputs, outputs) in [(8, [1, 0, 0]), (40, [16, 33, 0]), (576, [48, 16, 20]), (2048, [64, 0, 0])] {
            linears(c, steps, rows, inputs, &outputs);
        }
    }
    let features = |query, key, gate| StepForm::Features(FeatureSpec { query, key, gate });
    let gla = features(FeatureMap::Softmax, FeatureMap::Softmax, Gate::LogSigmoid { divisor: 16.0 });
    let hgrn2 = features(FeatureMap::Softmax, FeatureMap::OneMinusSigmoid, Gate::LogSigmoid { divisor: 1.0 });
    let retnet = features(FeatureMap::Softmax, FeatureMap::Softmax, Gate::MeanLogSigmoid);
    let mamba2 = features(FeatureMap::Softmax, FeatureMap::Softmax, Gate::MeanNegativeSoftplus);
    let rwkv6 = features(FeatureMap::Softmax, FeatureMap::Softmax, Gate::NegativeExp);
    let over = Gate::MeanLogSigmoidOver { shortest: 4.0, longest: 100.0 };
    let mean = features(FeatureMap::Softmax, FeatureMap::Share, over);
    for form in [gla, hgrn2, retnet, mamba2, rwkv6, mean, StepForm::Off] {
        liger(c, steps, (2, 3, 64), form, 4);
    }
    liger(c, steps, (1, 4, 128), gla, 0);
    liger(c, steps, (2, 1, 24), gla, 4);
    liger(c, steps, (2, 8, 16), rwkv6, 1);
    liger(c, steps, (1, 4, 128), mean, 4);
    liger(c, steps, (2, 3, 64), StepForm::Slots(64), 4);
    liger(c, steps, (1, 2, 32), StepForm::Slots(16), 0);
    // The last have more rows than a GPU's shared memory holds keys and values of at once.
    liger(c, steps, (1, 4, 128), StepForm::Off, 380);
    liger(c, steps, (1, 4, 128), gla, 370);
    for (sizes, sinks) in [((2, 3, 64), 4), ((1, 4, 128), 0), ((2, 1, 24), 1), ((1, 4, 128), 360)] {
        liger(c, steps, sizes, StepForm::Kept, sinks);
    }
}

fn bf16(c: &Check<'_>, values: &[f64], shape: &[usize]) -> Tensor {
    c.ops.upload(values.iter().map(|&x| x as f32).collect(), shape, DType::Bf16).expect("upload")
}

struct Layer {
    weight: Vec<f64>,
    bias: Vec<f64>,
    old: Vec<f64>,
    outputs: usize,
}

fn linears(c: &Check<'_>, steps: &dyn StepOps, rows: usize, inputs: usize, outputs: &[usize]) {
    let what = format!("few rows: {rows} x {inputs} -> {outputs:?}");
    let mut n = Numbers::new((rows * inputs) as u64);
    let (x, norm) = (n.normal(rows * inputs), n.normal(inputs));
    let normed: Vec<f64> = x
        .chunks_exact(inputs)
        .flat_map(|row| {
            let scale = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / inputs as f64 + 1e-5).sqrt();
            row.iter().zip(&norm).map(|(x, w)| x * scale * w).collect::<Vec<_>>()
        })
        .collect();
    let (xt, norm_weight) = (c.tensor(&x, &[rows, inputs]), c.exact(&norm, &[inputs]));
    let product = |x: &[f64], w: &[f64], outputs: usize| matmul(x, &transpose(w, outputs), (rows, outputs, inputs));
    let layers: Vec<Layer> = outputs
        .iter()
        .filter(|&&o| o > 0)
        .map(|&outputs| {
            let (weight, bias, old) = (n.normal(outputs * inputs), n.normal(outputs), n.normal(rows * outputs));
            Layer { weight, bias, old, outputs }
        })
        .collect();
    let weights: Vec<Tensor> = layers.iter().map(|l| bf16(c, &l.weight, &[l.outputs, inputs])).collect();
    let biases: Vec<Tensor> = layers.iter().map(|l| c.exact(&l.bias, &[l.outputs])).collect();

    let mut outs: Vec<Tensor> = layers.iter().map(|l| c.poisoned(&[rows, l.outputs])).collect();
    let mut list: Vec<StepLinear<'_>> = outs
        .iter_mut()
        .zip(&weights)
        .zip(&biases)
        .map(|((out, weight), b)| StepLinear { out, weight, bias: Some(b) })
        .collect();
    steps.linears(&mut list, &xt, Some((&norm_weight, 1e-5)), false).expect("linears");
    for (out, l) in outs.iter().zip(&layers) {
        let mut expected = product(&normed, &l.weight, l.outputs);
        expected.iter_mut().enumerate().for_each(|(i, y)| *y += l.bias[i % l.outputs]);
        c.close(&format!("{what}, normed"), out, &expected);
    }

    // Added to what is there, without a norm.
    let mut outs: Vec<Tensor> = layers.iter().map(|l| c.tensor(&l.old, &[rows, l.outputs])).collect();
    let mut list: Vec<StepLinear<'_>> =
        outs.iter_mut().zip(&weights).map(|(out, weight)| StepLinear { out, weight, bias: None }).collect();
    steps.linears(&mut list, &xt, None, true).expect("linears");
    for (out, l) in outs.iter().zip(&layers) {
        let product = product(&x, &l.weight, l.outputs);
        let expected: Vec<f64> = product.iter().zip(&l.old).map(|(y, old)| y + old).collect();
        c.close(&format!("{what}, added"), out, &expected);
    }

    let Layer { weight: w, outputs: o, .. } = &layers[0];
    let mut wide = c.poisoned_exact(&[rows, *o]);
    steps
        .linears(&mut [StepLinear { out: &mut wide, weight: &weights[0], bias: None }], &xt, None, false)
        .expect("linears");
    c.close(&format!("{what}, float32"), &wide, &product(&x, w, *o));

    let up = n.normal(o * inputs);
    let mut out = c.poisoned(&[rows, *o]);
    let norm = (&norm_weight, 1e-5);
    steps.swiglu(&mut out, &xt, norm, &weights[0], &bf16(c, &up, &[*o, inputs])).expect("swiglu");
    let (g, u) = (product(&normed, w, *o), product(&normed, &up, *o));
    let expected: Vec<f64> = g.iter().zip(&u).map(|(g, u)| g * sigmoid(*g) * u).collect();
    c.close(&format!("{what}, SwiGLU"), &out, &expected);
}

/// Two texts in slots 2 and 0, step after step, until the window's ring has gone round.
fn liger(c: &Check<'_>, steps: &dyn StepOps, (kv, group, dim): (usize, usize, usize), form: StepForm, sinks: usize) {
    let (ops, texts, slots, window) = (c.ops, 2, 3, 7);
    let what = format!("a step of {kv} x {group} heads of {dim}, {form:?}, {sinks} sinks");
    let mut n = Numbers::new((kv * group * dim) as u64);
    let heads = kv * group;
    let kept = if form == StepForm::Kept { 9 } else { 0 };
    let spec = AttentionSpec { kept, reach: Some(10), ..AttentionSpec::window(window, sinks) };
    let rows = spec.cache_rows();
    let cached = [slots, kv, rows, dim];
    let zeros = || ops.zeros(&cached).expect("zeros");
    let zeros_of = |shape: &[usize]| c.exact(&vec![0.0; shape.iter().product()], shape);
    let choice = || KeptKeys {
        scores: zeros_of(&[slots, kv, rows]),
        positions: zeros_of(&[slots, kv, spec.slots()]),
        queries: zeros_of(&[slots, heads, dim]),
    };
    let cache = || KeyValueCache { spec, keys: zeros(), values: zeros(), kept: (kept > 0).then(choice) };
    let (fused_cache, mut plain_cache) = (cache(), cache());
    let state_shapes: Vec<[usize; 4]> = match form {
        StepForm::Off => vec![],
        StepForm::Features(_) => vec![[slots, kv, dim, dim]],
        StepForm::Slots(m) => vec![[slots, kv, dim, m], [slots, kv, m, dim]],
        StepForm::Kept => vec![[slots, kv, 1, dim]],
    };
    let first: Vec<Vec<f64>> = state_shapes.iter().map(|s| n.normal(s.iter().product())).collect();
    let states = || -> Vec<Tensor> { first.iter().zip(&state_shapes).map(|(x, s)| c.exact(x, s)).collect() };
    let (fused_states, mut plain_states) = (states(), states());
    let (revolutions, frequencies) = frequencies(c, dim);
    let (alpha, beta) = (0.7, 0.3);
    let epsilon = 1e-5;
    let spec_of_step = StepSpec { heads, kv_heads: kv, head_dim: dim, form, alpha, beta, rope_factor: 1.1, epsilon };
    let tokens = steps.tokens(texts).expect("tokens");
    assert!(steps.takes(&spec_of_step, &fused_cache), "{what}");
    for step in 0..2 * window + if kept > 0 { 4 * window } else { 0 } {
        let mut sequences = Sequences::default();
        [(2, step + 100_000), (0, step)].iter().for_each(|&(slot, position)| sequences.push(1, position, slot));
        let (q, k, v) = (n.normal(texts * heads * dim), n.normal(texts * kv * dim), n.normal(texts * kv * dim));
        let (q, k, v) =
            (c.tensor(&q, &[texts, heads, dim]), c.tensor(&k, &[texts, kv, dim]), c.tensor(&v, &[texts, kv, dim]));
        steps.place(&*tokens, &[0, 0], &sequences).expect("place");
        let mut mixed = c.poisoned(&[texts, heads, dim]);
        let request = LigerStep {
            spec: spec_of_step,
            qkv: [&q, &k, &v],
            head_norms: None,
            frequencies: &frequencies,
            cache: &fused_cache,
            states: &fused_states,
        };
        steps.liger(&mut mixed, request, &*tokens).expect("liger");

        let mut angles = [Vec::new(), Vec::new()];
        for position in sequences.positions() {
            for f in &revolutions {
                let (sin, cos) = (std::f64::consts::TAU * position as f64 * f).sin_cos();
                angles[0].push(1.1 * cos);
                angles[1].push(1.1 * sin);
            }
        }
        let angles = angles.map(|a| c.exact(&a, &[texts, dim / 2]));
        let rotated = |x: &Tensor| {
            let mut out = c.poisoned(x.shape());
            ops.rope_forward(&mut out, x, (&angles[0], &angles[1])).expect("rope");
            out
        };
        let mut window = c.poisoned(&[texts, heads, dim]);
        let marks = (kept > 0).then(|| {
            let mut marks = c.poisoned_exact(&[texts, kv]);
            ops.key_novelty(&mut marks, &k, &sequences, plain_states.first_mut()).expect("key_novelty");
            marks
        });
        let (q_rotated, k_rotated) = (rotated(&q), rotated(&k));
        let keeping = marks.as_ref().map(|scores| Keeping { scores, frequencies: &frequencies });
        let inputs = Attention { q: &q_rotated, k: &k_rotated, v: &v, keeping, sequences: &sequences, spec };
        ops.attention_forward(&mut window, inputs, Some(&mut plain_cache), None).expect("attention");
        let recurrent = recurrence(c, form, (&q, &k, &v), &angles, &sequences, &mut plain_states);
        let window = ops.download(&window).expect("download");
        let recurrent = recurrent.map_or(vec![0.0; window.len()], |r| ops.download(&r).expect("download"));
        let expected: Vec<f64> =
            window.iter().zip(&recurrent).map(|(w, r)| f64::from(alpha * r) + f64::from(beta * w)).collect();
        c.close(&format!("{what}, step {step}"), &mixed, &expected);
    }
    for (fused, plain) in fused_states.iter().zip(&plain_states) {
        let expected: Vec<f64> = ops.download(plain).expect("download").iter().map(|&x| f64::from(x)).collect();
        c.close(&format!("{what}, state"), fused, &expected);
    }
}

/// The recurrent branch by the operations of `Ops`.
fn recurrence(
    c: &Check<'_>,
    form: StepForm,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    angles: &[Tensor; 2],
    sequences: &Sequences,
    states: &mut [Tensor],
) -> Option<Tensor> {
    let ops = c.ops;
    let mut out = c.poisoned(q.shape());
    let shape = |last: usize| [q.dim(0), k.dim(1), last];
    match form {
        StepForm::Off | StepForm::Kept => return None,
        StepForm::Features(spec) => {
            let (mut query, mut key) = (c.poisoned(q.shape()), c.poisoned(k.shape()));
            let (mut rope_q, mut rope_k) = (c.poisoned(q.shape()), c.poisoned(k.shape()));
            let mut log_gate = c.poisoned_exact(k.shape());
            let made = Features {
                rope_q: &mut rope_q,
                rope_k: &mut rope_k,
                query: &mut query,
                key: &mut key,
                log_gate: &mut log_gate,
            };
            ops.features_forward(made, q, k, (&angles[0], &angles[1]), spec).expect("features");
            let inputs = Recurrence { q: &query, k: &key, v, log_gate: &log_gate, axis: GateAxis::Key, sequences };
            ops.gated_recurrence_forward(&mut out, inputs, states.first_mut(), None).expect("recurrence");
        }
        StepForm::Slots(m) => {
            let (mut log_gate, mut write) = (c.poisoned_exact(&shape(m)), c.poisoned(&shape(m)));
            ops.slot_gates_forward(&mut log_gate, &mut write, k).expect("slot gates");
            let mut weights = c.poisoned(&[q.dim(0), q.dim(1), m]);
            let [first, second] = states else { panic!("gsa has two states") };
            let inputs = Recurrence { q, k, v: &write, log_gate: &log_gate, axis: GateAxis::Value, sequences };
            ops.gated_recurrence_forward(&mut weights, inputs, Some(first), None).expect("recurrence");
            ops.softmax_forward(&mut weights).expect("softmax");
            let inputs = Recurrence { q: &weights, k: &write, v, log_gate: &log_gate, axis: GateAxis::Key, sequences };
            ops.gated_recurrence_forward(&mut out, inputs, Some(second), None).expect("recurrence");
        }
    }
    Some(out)
}
