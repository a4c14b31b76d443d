//! Products, norms, RoPE, SwiGLU, feature maps, losses and the optimizer.

use liger_tensor::{
    Activation, AdamwParameter, AdamwStep, DType, Draw, FeatureGradients, FeatureMap, FeatureSpec, Features, Gate, Gemm,
};

use crate::plain::{gradient, log_sigmoid, matmul, mean, sigmoid, softmax, transpose};
use crate::{Check, Numbers};

pub(crate) fn check(c: &Check<'_>) {
    products(c);
    low_rank(c);
    norms_and_activations(c);
    rope(c, 60);
    rope(c, 64);
    features(c);
    slot_gates(c);
    losses(c);
    optimizer(c);
    sampling(c);
    rows(c);
}

fn products(c: &Check<'_>) {
    let sizes =
        [(1, 1, 1), (1, 65, 33), (2, 3, 16), (7, 48, 60), (8, 130, 64), (50, 20, 96), (100, 130, 70), (200, 600, 17)];
    // One side short, as LoRA's.
    let short = [(100, 130, 8), (130, 8, 100), (9, 100, 130), (70, 17, 90)];
    for (m, n, k) in sizes.into_iter().chain(short) {
        let mut numbers = Numbers::new((m * n * k) as u64);
        let (x, w, old) = (numbers.normal(m * k), numbers.normal(n * k), numbers.normal(m * n));
        let product = matmul(&x, &transpose(&w, n), (m, n, k));
        let expected: Vec<f64> = old.iter().zip(&product).map(|(o, p)| o + 0.5 * p).collect();
        for (a_flag, b_flag) in [(false, true), (false, false), (true, true), (true, false)] {
            let a = if a_flag { c.tensor(&transpose(&x, m), &[k, m]) } else { c.tensor(&x, &[m, k]) };
            let b = if b_flag { c.tensor(&w, &[n, k]) } else { c.tensor(&transpose(&w, n), &[k, n]) };
            let how = Gemm { transpose_a: a_flag, transpose_b: b_flag, scale: 1.0, accumulate: false };
            let what = format!("gemm {m} {n} {k}, transposed {a_flag} {b_flag}");
            let mut out = c.poisoned(&[m, n]);
            c.ops.gemm(&mut out, &a, &b, how).expect(&what);
            c.close(&what, &out, &product);
            let mut out = c.tensor(&old, &[m, n]);
            c.ops.gemm(&mut out, &a, &b, how.accumulated().scaled(0.5)).expect(&what);
            c.close(&what, &out, &expected);
            let (mut out, base) = (c.poisoned(&[m, n]), c.tensor(&old, &[m, n]));
            c.ops.gemm_onto(&mut out, &base, &a, &b, how.scaled(0.5)).expect(&what);
            c.close(&what, &out, &expected);
        }
        // bfloat16 weights: the products of the rounded ones, with inputs that bfloat16 holds, for some devices round them.
        let narrow = x.iter().map(|&x| x as f32).collect();
        let narrow = c.ops.upload(narrow, &[m, k], DType::Bf16).expect("upload");
        let x: Vec<f64> = c.ops.download(&narrow).expect("download").iter().map(|&x| f64::from(x)).collect();
        for (b_flag, shape) in [(true, [n, k]), (false, [k, n])] {
            let values = if b_flag { w.clone() } else { transpose(&w, n) };
            let narrow = values.iter().map(|&x| x as f32).collect();
            let b = c.ops.upload(narrow, &shape, DType::Bf16).expect("upload");
            let rounded: Vec<f64> = c.ops.download(&b).expect("download").iter().map(|&x| f64::from(x)).collect();
            let rounded = if b_flag { transpose(&rounded, n) } else { rounded };
            let how = Gemm { transpose_a: false, transpose_b: b_flag, scale: 1.0, accumulate: false };
            let mut out = c.poisoned(&[m, n]);
            c.ops.gemm(&mut out, &c.tensor(&x, &[m, k]), &b, how).expect("gemm");
            let product = matmul(&x, &rounded, (m, n, k));
            c.close(&format!("bf16 gemm {m} {n} {k}"), &out, &product);
            // Operands in the type that the device multiplies, and sums in either.
            let (a, what) = (c.operand(&x, &[m, k]), format!("gemm of operands {m} {n} {k}"));
            for mut out in [c.poisoned(&[m, n]), c.poisoned_operand(&[m, n])] {
                c.ops.gemm(&mut out, &a, &b, how).expect(&what);
                c.close(&what, &out, &product);
                c.ops.gemm(&mut out, &a, &b, how.accumulated().scaled(0.5)).expect(&what);
                let expected: Vec<f64> = product.iter().map(|x| 1.5 * x).collect();
                c.close(&what, &out, &expected);
            }
            let mut out = c.poisoned_operand(&[m, n]);
            c.ops.gemm(&mut out, &c.tensor(&x, &[m, k]), &b, how).expect(&what);
            c.close(&what, &out, &product);
        }
    }
}

/// LoRA's products for one to three projections of one input.
fn low_rank(c: &Check<'_>) {
    for (n, inputs, rank, count) in [
        (1, 32, 8, 1),
        (70, 32, 8, 1),
        (64, 576, 8, 3),
        (200, 160, 16, 2),
        (65, 48, 8, 3),
        (130, 64, 4, 3),
        (333, 288, 8, 2),
    ] {
        let mut numbers = Numbers::new((n * inputs + rank) as u64);
        let (x, old) = (numbers.normal(n * inputs), numbers.normal(n * inputs));
        let of_each = |length: usize, numbers: &mut Numbers| -> Vec<Vec<f64>> {
            (0..count).map(|_| numbers.normal(length)).collect()
        };
        let (a, old_da) = (of_each(rank * inputs, &mut numbers), of_each(rank * inputs, &mut numbers));
        let dlow = of_each(n * rank, &mut numbers);
        let what = format!("low rank {n} {inputs}, {count} of {rank}");
        let at: Vec<_> = a.iter().map(|a| c.exact(a, &[rank, inputs])).collect();
        let at: Vec<_> = at.iter().collect();
        let inputs_of_both_types = [c.tensor(&x, &[n, inputs]), c.operand(&x, &[n, inputs])];
        for xt in &inputs_of_both_types {
            let mut low: Vec<_> = (0..count).map(|_| c.poisoned(&[n, rank])).collect();
            c.ops.low_rank_forward(&mut low, xt, &at).expect(&what);
            for (low, a) in low.iter().zip(&a) {
                c.close(&what, low, &matmul(&x, &transpose(a, rank), (n, rank, inputs)));
            }
        }
        let dlows: Vec<_> = dlow.iter().map(|dlow| c.tensor(dlow, &[n, rank])).collect();
        let mut expected = old.clone();
        for (dlow, a) in dlow.iter().zip(&a) {
            let through = matmul(dlow, a, (n, inputs, rank));
            expected.iter_mut().zip(through).for_each(|(sum, x)| *sum += x);
        }
        for (with_input, xt) in
            [true, false].into_iter().flat_map(|with| inputs_of_both_types.iter().map(move |x| (with, x)))
        {
            let mut dx = c.tensor(&old, &[n, inputs]);
            let mut da: Vec<_> = old_da.iter().map(|da| c.exact(da, &[rank, inputs])).collect();
            let mut list: Vec<_> = da.iter_mut().collect();
            c.ops.low_rank_backward(with_input.then_some(&mut dx), &mut list, &dlows, xt, &at).expect(&what);
            c.close(&format!("{what}: dx"), &dx, if with_input { &expected } else { &old });
            for ((da, old), dlow) in da.iter().zip(&old_da).zip(&dlow) {
                let product = matmul(&transpose(dlow, n), &x, (rank, inputs, n));
                let expected: Vec<f64> = old.iter().zip(product).map(|(o, p)| o + p).collect();
                c.close(&format!("{what}: da"), da, &expected);
            }
        }
    }
}

fn norms_and_activations(c: &Check<'_>) {
    for (n, d) in [(1, 1), (3, 60), (2, 64), (5, 65)] {
        let mut numbers = Numbers::new((n * d) as u64);
        let (x, w, dy, old) = (numbers.normal(n * d), numbers.normal(d), numbers.normal(n * d), numbers.normal(n * d));
        let norm = |x: &[f64]| -> Vec<f64> {
            let row = |x: &[f64]| {
                let r = (x.iter().map(|x| x * x).sum::<f64>() / d as f64 + 1e-5).sqrt();
                x.iter().zip(&w).map(|(x, w)| x * w / r).collect::<Vec<_>>()
            };
            x.chunks(d).flat_map(row).collect()
        };
        let (xt, wt) = (c.tensor(&x, &[n, d]), c.exact(&w, &[d]));
        for mut out in [c.poisoned(&[n, d]), c.poisoned_operand(&[n, d])] {
            c.ops.rms_norm_forward(&mut out, &xt, &wt, 1e-5).expect("rms_norm_forward");
            c.close("rms_norm_forward", &out, &norm(&x));
        }
        let mut dx = c.tensor(&old, &[n, d]);
        c.ops.rms_norm_backward(&mut dx, &xt, &wt, 1e-5, &c.tensor(&dy, &[n, d])).expect("rms_norm_backward");
        let expected: Vec<f64> = gradient(&x, &dy, norm).iter().zip(&old).map(|(g, o)| g + o).collect();
        c.close(&format!("rms_norm_backward {n} {d}"), &dx, &expected);

        let (gate, up) = (x, numbers.normal(n * d));
        let gelu = |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
        let silu = |x: f64| x * sigmoid(x);
        let activations: [(Activation, &dyn Fn(f64) -> f64); 2] =
            [(Activation::Silu, &silu), (Activation::GeluTanh, &gelu)];
        for (activation, plain) in activations {
            let glu = |g: &[f64], u: &[f64]| -> Vec<f64> { g.iter().zip(u).map(|(g, u)| plain(*g) * u).collect() };
            for are_operands in [false, true] {
                let tensor = |x: &[f64]| if are_operands { c.operand(x, &[n, d]) } else { c.tensor(x, &[n, d]) };
                let (mut gt, mut ut, what) =
                    (tensor(&gate), tensor(&up), format!("glu {activation:?}, {are_operands}"));
                let mut out = tensor(&vec![f64::NAN; n * d]);
                c.ops.glu_forward(&mut out, &gt, &ut, activation).expect("glu_forward");
                c.close(&what, &out, &glu(&gate, &up));
                c.ops.glu_backward(&mut gt, &mut ut, &tensor(&dy), activation).expect("glu_backward");
                c.close(&format!("{what}: gate"), &gt, &gradient(&gate, &dy, |g| glu(g, &up)));
                c.close(&format!("{what}: up"), &ut, &gradient(&up, &dy, |u| glu(&gate, u)));
            }
        }

        let soft = |x: &[f64]| -> Vec<f64> { x.chunks(d).flat_map(softmax).collect() };
        let mut y = c.tensor(&gate, &[n, d]);
        c.ops.softmax_forward(&mut y).expect("softmax_forward");
        c.close("softmax_forward", &y, &soft(&gate));
        let mut dx = c.tensor(&dy, &[n, d]);
        c.ops.softmax_backward(&mut dx, &y).expect("softmax_backward");
        c.close("softmax_backward", &dx, &gradient(&gate, &dy, soft));
    }
}

fn rope(c: &Check<'_>, d: usize) {
    let (n, heads) = (5, 3);
    let mut numbers = Numbers::new(1);
    let (x, angles) = (numbers.normal(n * heads * d), numbers.normal(n * d / 2));
    let expected = turned(&x, &angles, heads, d);
    let table = |f: fn(f64) -> f64| c.exact(&angles.iter().map(|a| f(*a)).collect::<Vec<_>>(), &[n, d / 2]);
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    let xt = c.tensor(&x, &[n, heads, d]);
    let mut out = c.poisoned(&[n, heads, d]);
    c.ops.rope_forward(&mut out, &xt, (&cos, &sin)).expect("rope");
    c.close("rope", &out, &expected);
    let mut back = c.poisoned(&[n, heads, d]);
    c.ops.rope_backward(&mut back, 0.0, 0.5, &out, (&cos, &sin)).expect("rope");
    c.close("rope back", &back, &x.iter().map(|x| 0.5 * x).collect::<Vec<_>>());
    c.ops.rope_backward(&mut back, 2.0, 1.0, &out, (&cos, &sin)).expect("rope");
    c.close("rope back, and added", &back, &x.iter().map(|x| 2.0 * x).collect::<Vec<_>>());
    c.ops.combine(&mut out, 0.5, &xt, 2.0, &back).expect("combine");
    c.close("combine", &out, &x.iter().map(|x| 4.5 * x).collect::<Vec<_>>());
}

/// `x [N, heads, d]` after RoPE by `angles [N, d / 2]`.
fn turned(x: &[f64], angles: &[f64], heads: usize, d: usize) -> Vec<f64> {
    let one = |i: usize| {
        let (t, e) = (i / (heads * d), i % d);
        let (angle, other) = (angles[t * d / 2 + e % (d / 2)], if e < d / 2 { i + d / 2 } else { i - d / 2 });
        let sign = if e < d / 2 { -1.0 } else { 1.0 };
        x[i] * angle.cos() + sign * x[other] * angle.sin()
    };
    (0..x.len()).map(one).collect()
}

/// `log_gate` is that of `x`, for a share.
fn map(x: &[f64], kind: FeatureMap, d: usize, log_gate: &[f64]) -> Vec<f64> {
    match kind {
        FeatureMap::Softmax => x.chunks(d).flat_map(softmax).collect(),
        FeatureMap::Share => {
            let softmaxed = x.chunks(d).flat_map(softmax);
            softmaxed.zip(log_gate).map(|(y, g)| d as f64 * (1.0 - g.exp()) * y).collect()
        }
        FeatureMap::OneMinusSigmoid => x.iter().map(|x| 1.0 - sigmoid(*x)).collect(),
    }
}

fn log_gate(k: &[f64], gate: Gate, heads: usize, d: usize) -> Vec<f64> {
    match gate {
        Gate::LogSigmoid { divisor } => k.iter().map(|k| log_sigmoid(*k) / f64::from(divisor)).collect(),
        Gate::NegativeExp => k.iter().map(|k| -k.exp()).collect(),
        Gate::None => vec![0.0; k.len()],
        Gate::MeanLogSigmoid => k.chunks(d).flat_map(|k| vec![log_sigmoid(mean(k)); d]).collect(),
        Gate::MeanLogSigmoidOver { shortest, longest } => {
            let (shortest, longest) = (f64::from(shortest), f64::from(longest));
            let divisor = |row: usize| {
                let place = if heads > 1 { (row % heads) as f64 / (heads - 1) as f64 } else { 0.5 };
                shortest * (longest / shortest).powf(place)
            };
            k.chunks(d).enumerate().flat_map(|(row, k)| vec![log_sigmoid(mean(k)) / divisor(row); d]).collect()
        }
        Gate::MeanNegativeSoftplus => k.chunks(d).flat_map(|k| vec![log_sigmoid(-mean(k)); d]).collect(),
    }
}

fn features(c: &Check<'_>) {
    let gates = [
        Gate::LogSigmoid { divisor: 16.0 },
        Gate::LogSigmoid { divisor: 1.0 },
        Gate::MeanLogSigmoid,
        Gate::MeanNegativeSoftplus,
        Gate::MeanLogSigmoidOver { shortest: 2.0, longest: 50.0 },
        Gate::NegativeExp,
        Gate::None,
    ];
    for gate in gates {
        for (key, kv, d) in [
            (FeatureMap::Softmax, 2, 18),
            (FeatureMap::OneMinusSigmoid, 2, 18),
            (FeatureMap::Share, 2, 18),
            (FeatureMap::Share, 1, 16),
            (FeatureMap::Share, 4, 64),
        ] {
            let one_a_head = matches!(gate, Gate::MeanLogSigmoid | Gate::MeanLogSigmoidOver { .. });
            if key == FeatureMap::Share && !one_a_head {
                continue;
            }
            let spec = FeatureSpec { query: FeatureMap::Softmax, key, gate };
            let (n, heads) = (3, 4);
            let (q_shape, k_shape) = ([n, heads, d], [n, kv, d]);
            let mut numbers = Numbers::new(2);
            let q = numbers.normal(n * heads * d);
            let k: Vec<f64> = numbers.normal(n * kv * d).iter().map(|k| 2.0 * k).collect();
            let (qt, kt) = (c.tensor(&q, &q_shape), c.tensor(&k, &k_shape));
            let angles = numbers.normal(n * d / 2);
            let table = |f: fn(f64) -> f64| c.exact(&angles.iter().map(|a| f(*a)).collect::<Vec<_>>(), &[n, d / 2]);
            let (cos, sin) = (table(f64::cos), table(f64::sin));
            let (mut f, mut w, mut g) = (c.poisoned(&q_shape), c.poisoned(&k_shape), c.poisoned_exact(&k_shape));
            let (mut rope_q, mut rope_k) = (c.poisoned(&q_shape), c.poisoned(&k_shape));
            let (query, rope_q_out, rope_k_out) = (&mut f, &mut rope_q, &mut rope_k);
            let out = Features { rope_q: rope_q_out, rope_k: rope_k_out, query, key: &mut w, log_gate: &mut g };
            c.ops.features_forward(out, &qt, &kt, (&cos, &sin), spec).expect("features_forward");
            let what = format!("{spec:?}, {kv} heads of {d}");
            c.close(&format!("{what}: q after RoPE"), &rope_q, &turned(&q, &angles, heads, d));
            c.close(&format!("{what}: k after RoPE"), &rope_k, &turned(&k, &angles, kv, d));
            c.close(&format!("{what}: query"), &f, &map(&q, spec.query, d, &[]));
            c.close(&format!("{what}: key"), &w, &map(&k, key, d, &log_gate(&k, gate, kv, d)));
            c.close(&format!("{what}: gate"), &g, &log_gate(&k, gate, kv, d));
            let (df, dw, dg) = (numbers.normal(q.len()), numbers.normal(k.len()), numbers.normal(k.len()));
            let (of_rope_q, of_rope_k) = (numbers.normal(q.len()), numbers.normal(k.len()));
            let (mut dq, mut dk) = (c.tensor(&df, &q_shape), c.tensor(&dw, &k_shape));
            let gradients = FeatureGradients {
                q: &mut dq,
                k: &mut dk,
                log_gate: &c.exact(&dg, &k_shape),
                rope_q: &c.tensor(&of_rope_q, &q_shape),
                rope_k: &c.tensor(&of_rope_k, &k_shape),
                recurrent: 0.5,
                window: 0.75,
            };
            c.ops.features_backward(gradients, &qt, &kt, (&cos, &sin), spec).expect("features_backward");
            let weighed = |branches: &[&[f64]], rope: &[f64]| -> Vec<f64> {
                branches.concat().iter().map(|x| 0.5 * x).chain(rope.iter().map(|x| 0.75 * x)).collect()
            };
            let expected = gradient(&q, &weighed(&[&df], &of_rope_q), |q| {
                [map(q, spec.query, d, &[]), turned(q, &angles, heads, d)].concat()
            });
            c.close(&format!("{what}: dq"), &dq, &expected);
            let expected = gradient(&k, &weighed(&[&dw, &dg], &of_rope_k), |k| {
                let gates = log_gate(k, gate, kv, d);
                [map(k, key, d, &gates), gates, turned(k, &angles, kv, d)].concat()
            });
            c.close(&format!("{what}: dk"), &dk, &expected);
        }
    }
}

fn slot_gates(c: &Check<'_>) {
    for (d, slots) in [(16, 16), (16, 8), (18, 4), (6, 9)] {
        let (n, kv) = (3, 2);
        let mut numbers = Numbers::new((d * slots) as u64);
        let k = numbers.normal(n * kv * d);
        let pool = |k: &[f64]| -> Vec<f64> {
            (0..slots).map(|m| mean(&k[m * d / slots..((m + 1) * d).div_ceil(slots)])).collect()
        };
        let gates = |k: &[f64]| -> Vec<f64> { k.chunks(d).flat_map(pool).map(|p| log_sigmoid(p) / 16.0).collect() };
        let writes = |k: &[f64]| -> Vec<f64> { gates(k).iter().map(|g| 1.0 - g.exp()).collect() };
        let shape = [n, kv, slots];
        let kt = c.tensor(&k, &[n, kv, d]);
        let (mut g, mut w) = (c.poisoned_exact(&shape), c.poisoned(&shape));
        c.ops.slot_gates_forward(&mut g, &mut w, &kt).expect("slot_gates_forward");
        c.close("slot_gates_forward gate", &g, &gates(&k));
        c.close("slot_gates_forward write", &w, &writes(&k));
        let (dg, dw, old) = (numbers.normal(n * kv * slots), numbers.normal(n * kv * slots), numbers.normal(k.len()));
        let mut dk = c.tensor(&old, &[n, kv, d]);
        let (dgt, dwt) = (c.exact(&dg, &shape), c.tensor(&dw, &shape));
        c.ops.slot_gates_backward(&mut dk, &dgt, &dwt, &kt).expect("slot_gates_backward");
        let both: Vec<f64> = dg.iter().chain(&dw).copied().collect();
        let expected = gradient(&k, &both, |k| [gates(k), writes(k)].concat());
        let expected: Vec<f64> = expected.iter().zip(&old).map(|(g, o)| g + o).collect();
        c.close(&format!("slot_gates_backward {d} {slots}"), &dk, &expected);
    }
}

fn losses(c: &Check<'_>) {
    for v in [1, 5, 97, 300] {
        let n = 4;
        let mut numbers = Numbers::new(v as u64);
        let logits: Vec<f64> = numbers.normal(n * v).iter().map(|x| 3.0 * x).collect();
        let teacher: Vec<f64> = numbers.normal(n * v).iter().map(|x| 3.0 * x).collect();
        let labels = [0, -100, v as i64 - 1, v as i64 / 2];
        let counts = labels.map(|l| l >= 0);
        let cross = |x: &[f64]| -> Vec<f64> {
            let row = |(x, l): (&[f64], &i64)| if *l < 0 { 0.0 } else { -softmax(x)[*l as usize].ln() };
            x.chunks(v).zip(&labels).map(row).collect()
        };
        let kl = |x: &[f64]| -> Vec<f64> {
            let row = |((x, t), count): ((&[f64], &[f64]), &bool)| {
                let (q, p) = (softmax(x), softmax(t));
                if *count { p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum() } else { 0.0 }
            };
            x.chunks(v).zip(teacher.chunks(v)).zip(&counts).map(row).collect()
        };
        let t = c.tensor(&teacher, &[n, v]);
        for (name, expected, slope) in [
            ("cross_entropy", cross(&logits), gradient(&logits, &[0.25; 4], cross)),
            ("kl_divergence", kl(&logits), gradient(&logits, &[0.25; 4], kl)),
        ] {
            for scale in [None, Some(0.25)] {
                let mut x = c.tensor(&logits, &[n, v]);
                let exact = c.exact(&logits, &[n, v]);
                let largest = |row: &[f64]| (0..v).max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("a row") as u32;
                let places: Vec<u32> = logits.chunks(v).map(largest).collect();
                assert_eq!(c.ops.argmax(&exact).expect("argmax"), places, "argmax {v}");
                let found = match name {
                    "cross_entropy" => c.ops.cross_entropy(&mut x, &labels, scale),
                    _ => c.ops.kl_divergence(&mut x, &t, &counts, scale),
                };
                let found: Vec<f64> = found.expect(name).iter().map(|&x| f64::from(x)).collect();
                c.close(&format!("{name} {v}"), &c.exact(&found, &[n]), &expected);
                let after = if scale.is_some() { &slope } else { &logits };
                c.close(&format!("{name} {v}: logits after, {scale:?}"), &x, after);
            }
        }
    }
}

/// Each token as often as its probability says, and none that a filter leaves out.
fn sampling(c: &Check<'_>) {
    let size = 3000;
    let logits: Vec<f64> = Numbers::new(9).normal(size).iter().map(|x| 4.0 * x).collect();
    let draws: Vec<f32> = (0..2000).map(|i| (i as f32 + 0.5) / 2000.0).collect();
    let tensor = c.exact(&logits.repeat(draws.len()), &[draws.len(), size]);
    let all = Draw { temperature: 0.8, top_k: 0, top_p: 1.0, min_p: 0.0 };
    for how in
        [all, Draw { top_k: 5, ..all }, Draw { top_p: 0.7, ..all }, Draw { min_p: 0.2, top_p: 0.9, top_k: 40, ..all }]
    {
        let chosen = c.ops.sample(&tensor, how, &draws).expect("sample");
        let mut order: Vec<usize> = (0..size).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let weight = |i: usize| ((logits[i] - logits[order[0]]) / f64::from(how.temperature)).exp();
        let mut kept: Vec<usize> =
            order.iter().copied().filter(|&i| weight(i) >= f64::from(how.min_p.max(1e-9))).collect();
        if how.top_k > 0 {
            kept.truncate(how.top_k);
        }
        let total: f64 = kept.iter().map(|&i| weight(i)).sum();
        let mut sum = 0.0;
        let enough = |i: &usize| {
            let before = sum;
            sum += weight(*i);
            before < f64::from(how.top_p) * total
        };
        kept = kept.iter().copied().take_while(enough).collect();
        let total: f64 = kept.iter().map(|&i| weight(i)).sum();
        let mut often = vec![0.0; size];
        chosen.iter().for_each(|&id| often[id as usize] += 1.0 / draws.len() as f64);
        for (i, &found) in often.iter().enumerate() {
            let expected = if kept.contains(&i) { weight(i) / total } else { 0.0 };
            assert!((found - expected).abs() < 1.5e-3, "sample {how:?}: token {i} {found} of {expected}");
            assert!(expected > 0.0 || found == 0.0, "sample {how:?}: token {i} was left out");
        }
    }
}

fn optimizer(c: &Check<'_>) {
    let n = 37;
    let mut numbers = Numbers::new(3);
    let (mut w, mut m, mut v) = (numbers.normal(n), vec![0.0; n], vec![0.0; n]);
    // Two tensors in one call.
    let cut = |x: &[f64]| [c.exact(&x[..30], &[30]), c.exact(&x[30..], &[7])];
    let (mut wt, mut mt, mut vt) = (cut(&w), cut(&m), cut(&v));
    for step in 1..=3u64 {
        let g = numbers.normal(n);
        let (b1, b2, lr, eps, wd, gs) = (0.9, 0.999, 1e-2, 1e-8, 0.1, 0.5);
        for i in 0..n {
            let g = g[i] * gs;
            m[i] = b1 * m[i] + (1.0 - b1) * g;
            v[i] = b2 * v[i] + (1.0 - b2) * g * g;
            let (mh, vh) = (m[i] / (1.0 - b1.powi(step as i32)), v[i] / (1.0 - b2.powi(step as i32)));
            w[i] -= lr * (mh / (vh.sqrt() + eps) + wd * w[i]);
        }
        let update = AdamwStep {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            step,
            gradient_scale: 0.5,
        };
        let gradients = cut(&g);
        let mut parameters: Vec<AdamwParameter<'_>> = wt
            .iter_mut()
            .zip(&gradients)
            .zip(mt.iter_mut().zip(&mut vt))
            .map(|((value, gradient), (first_moment, second_moment))| AdamwParameter {
                value,
                gradient,
                first_moment,
                second_moment,
            })
            .collect();
        c.ops.adamw(&mut parameters, update).expect("adamw");
        let found = c.ops.sum_of_squares(&[&gradients[0], &gradients[1]]).expect("sum_of_squares");
        let expected: f64 = g.iter().map(|g| g * g).sum();
        assert!((found / expected - 1.0).abs() < 1e-5, "sum_of_squares {found} {expected}");
    }
    c.close("adamw", &wt[0], &w[..30]);
    c.close("adamw", &wt[1], &w[30..]);
}

fn rows(c: &Check<'_>) {
    let mut numbers = Numbers::new(4);
    let table = numbers.normal(10 * 6);
    let t = c.tensor(&table, &[10, 6]);
    let mut out = c.poisoned(&[3, 6]);
    c.ops.embedding(&mut out, &t, &[9, 0, 9]).expect("embedding");
    c.close("embedding", &out, &[&table[54..], &table[..6], &table[54..]].concat());
    assert!(c.ops.embedding(&mut out, &t, &[10, 0, 0]).is_err(), "a token past the table");
    c.ops.copy_rows(&mut out, &t, 2).expect("copy_rows");
    c.close("copy_rows", &out, &table[12..30]);
    let mut large = c.tensor(&table, &[10, 6]);
    c.ops.write_rows(&mut large, &out, 0).expect("write_rows");
    c.close("write_rows", &large, &[&table[12..30], &table[18..]].concat());
    let bias = numbers.normal(6);
    c.ops.add_bias(&mut large, &c.exact(&bias, &[6])).expect("add_bias");
    let expected: Vec<f64> =
        [&table[12..30], &table[18..]].concat().iter().enumerate().map(|(i, x)| x + bias[i % 6]).collect();
    c.close("add_bias", &large, &expected);
    let mut y = c.poisoned(&[10, 6]);
    c.ops.axpby(&mut y, 2.0, &t, 0.0).expect("axpby");
    c.ops.axpby(&mut y, 1.0, &t, 0.5).expect("axpby");
    c.close("axpby", &y, &table.iter().map(|x| 2.0 * x).collect::<Vec<_>>());

    // Dropout: the share that is kept, its factor, the same mask for the same seed.
    let ones = vec![1.0; 40_000];
    let (mut a, mut b) = (c.tensor(&ones, &[40_000]), c.tensor(&ones, &[40_000]));
    c.ops.dropout(&mut a, 0.25, 7).expect("dropout");
    c.ops.dropout(&mut b, 0.25, 7).expect("dropout");
    let a = c.ops.download(&a).expect("download");
    assert_eq!(a, c.ops.download(&b).expect("download"));
    let kept = a.iter().filter(|x| **x > 0.0).count() as f64 / 4e4;
    assert!(
        (kept - 0.75).abs() < 0.01 && a.iter().all(|x| *x == 0.0 || (f64::from(*x) - 4.0 / 3.0).abs() < c.tolerance),
        "{kept}"
    );
}
