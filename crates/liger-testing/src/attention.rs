//! Softmax attention, with windows, sinks and kept keys: forward in one piece, by any split through a cache, and backward;
//! and the scores by which keys are kept.

use liger_tensor::{
    Attention, AttentionGradients, AttentionSpec, DType, Keeping, KeptKeys, KeyValueCache, Sequences, Tensor,
};

use crate::plain::{gradient, softmax};
use crate::{Check, Numbers};

type Sizes = (usize, usize, usize, usize);

/// One sequence: q [T,H,D], k, v [T,K,D], scores [T,K]; revolutions a token of the pairs of a key, [D/2].
#[derive(Clone, Copy)]
struct Text<'a> {
    q: &'a [f64],
    k: &'a [f64],
    v: &'a [f64],
    scores: &'a [f64],
    frequencies: &'a [f64],
    sizes: Sizes,
}

/// RoPE's frequencies for heads of `d`, and as operations take them.
pub(crate) fn frequencies(c: &Check<'_>, d: usize) -> (Vec<f64>, Tensor) {
    let radians = (0..d / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / d as f64));
    let all: Vec<f64> = radians.map(|f| f / std::f64::consts::TAU).collect();
    let missing = all.iter().map(|&f| f - f64::from(f as f32));
    let halves: Vec<f64> = all.iter().map(|&f| f64::from(f as f32)).chain(missing).collect();
    let tensor = c.exact(&halves, &[2, d / 2]);
    (all, tensor)
}

impl Text<'_> {
    /// q . k / sqrt(D) of one token's query head, or of the mean of several tokens' queries, and a key that is moved on.
    fn score(&self, tokens: std::ops::Range<usize>, head: usize, key: usize, turn: usize) -> f64 {
        let (_, h, kv, d) = self.sizes;
        let mut k = self.k[(key * kv + head / (h / kv)) * d..][..d].to_vec();
        for (i, frequency) in self.frequencies.iter().enumerate().filter(|_| turn > 0) {
            let (sin, cos) = (std::f64::consts::TAU * frequency * turn as f64).sin_cos();
            let (x, y) = (k[i], k[i + d / 2]);
            (k[i], k[i + d / 2]) = (x * cos - y * sin, y * cos + x * sin);
        }
        let count = tokens.len() as f64;
        let dot = |t: usize| self.q[(t * h + head) * d..][..d].iter().zip(&k).map(|(q, k)| q * k).sum::<f64>();
        tokens.map(dot).sum::<f64>() / count / (d as f64).sqrt()
    }

    /// Positions kept for the queries of every stretch.
    fn kept(&self, of: usize, spec: AttentionSpec) -> Vec<Vec<usize>> {
        let ((t, h, kv, _), Some(window)) = (self.sizes, spec.window) else { return Vec::new() };
        let mut all: Vec<Vec<usize>> = vec![Vec::new(); 2];
        for stretch in 2..t.div_ceil(window) {
            let mut left = all[stretch - 1].clone();
            left.extend((stretch - 2) * window..(stretch - 1) * window);
            let score = |j: &usize| if *j < spec.sinks { f64::INFINITY } else { self.scores[j * kv + of] };
            left.sort_by(|a, b| score(b).total_cmp(&score(a)));
            let mut kept: Vec<usize> = left.drain(..left.len().min(spec.sinks + spec.kept / 2)).collect();
            let last = (stretch - 1) * window..stretch * window;
            let group = of * (h / kv)..(of + 1) * (h / kv);
            let liking = |j: &usize| {
                let turn = spec.turn(stretch * window, *j);
                group.clone().map(|head| self.score(last.clone(), head, *j, turn).exp()).sum::<f64>()
            };
            left.sort_by(|a, b| liking(b).total_cmp(&liking(a)));
            kept.extend(left.into_iter().take(spec.kept - spec.kept / 2));
            all.push(kept);
        }
        all
    }

    fn attention(&self, spec: AttentionSpec) -> Vec<f64> {
        let (t, h, kv, d) = self.sizes;
        let mut out = vec![0.0; self.q.len()];
        for of in 0..kv {
            let kept = if spec.kept > 0 { self.kept(of, spec) } else { Vec::new() };
            for i in 0..t {
                let seen: Vec<usize> = match spec.window {
                    None => (0..=i).collect(),
                    Some(window) if spec.kept > 0 => {
                        let stretch = i / window;
                        kept[stretch].iter().copied().chain(stretch.max(1) * window - window..=i).collect()
                    }
                    Some(window) => (0..=i).filter(|&j| i - j < window || j < spec.sinks).collect(),
                };
                for head in of * (h / kv)..(of + 1) * (h / kv) {
                    let turn = |j: usize| spec.turn(i, j);
                    let scores: Vec<f64> = seen.iter().map(|&j| self.score(i..i + 1, head, j, turn(j))).collect();
                    let out = &mut out[(i * h + head) * d..][..d];
                    for (p, j) in softmax(&scores).iter().zip(&seen) {
                        let value = &self.v[(j * kv + of) * d..][..d];
                        out.iter_mut().zip(value).for_each(|(o, v)| *o += p * v);
                    }
                }
            }
        }
        out
    }
}

/// Numbers that a device's activations hold exactly: what is kept must not depend on their rounding.
fn activations(c: &Check<'_>, numbers: &mut Numbers, count: usize) -> Vec<f64> {
    let rounded = c.tensor(&numbers.normal(count), &[count]);
    c.ops.download(&rounded).expect("download").iter().map(|&x| f64::from(x)).collect()
}

/// Scores that are told apart in float32.
fn drawn_scores(numbers: &mut Numbers, count: usize) -> Vec<f64> {
    numbers.normal(count).iter().map(|&x| f64::from(x as f32)).collect()
}

pub(crate) fn check(c: &Check<'_>) {
    for (window, sinks) in
        [(None, 0), (Some(1), 0), (Some(5), 0), (Some(64), 0), (Some(64), 4), (Some(3), 4), (Some(1), 1)]
    {
        check_spec(c, AttentionSpec { window, sinks, ..AttentionSpec::EVERYTHING });
    }
    wide_heads(c, AttentionSpec::EVERYTHING);
    wide_heads(c, AttentionSpec::window(2, 1));
    long_backward(c, &[AttentionSpec::EVERYTHING, AttentionSpec::window(64, 4)]);
}

/// The same with kept keys.
pub(crate) fn check_kept(c: &Check<'_>) {
    let keeping = |window, sinks, kept, reach| AttentionSpec { kept, reach, ..AttentionSpec::window(window, sinks) };
    for (window, sinks, kept, reach) in [
        (64, 4, 20, None),
        (8, 0, 1, Some(9)),
        (5, 2, 7, Some(0)),
        (3, 4, 64, None),
        (1, 1, 3, Some(2)),
        (16, 4, 124, Some(30)),
    ] {
        let spec = keeping(window, sinks, kept, reach);
        check_spec(c, spec);
        if window < 5 {
            backward(c, (17, 2, 1, 4), spec);
        }
    }
    wide_heads(c, keeping(1, 1, 2, Some(0)));
    long_backward(c, &[keeping(16, 4, 12, None), keeping(64, 4, 116, Some(40)), keeping(8, 2, 90, Some(20))]);
    novelty(c);
}

fn check_spec(c: &Check<'_>, spec: AttentionSpec) {
    for (t, h, kv, d) in [(1, 1, 1, 16), (2, 3, 1, 16), (63, 4, 4, 8), (65, 3, 1, 60), (200, 8, 2, 32), (70, 2, 2, 128)]
    {
        forward(c, (t, h, kv, d), spec);
    }
    backward(c, (7, 3, 1, 4), spec);
    backward(c, (9, 4, 2, 6), spec);
}

/// Gemma's heads; a GPU has no room for them in float32.
fn wide_heads(c: &Check<'_>, spec: AttentionSpec) {
    if c.ops.memory().is_none() || c.ops.activations() == DType::Bf16 {
        forward(c, (140, 4, 1, 256), spec);
        backward(c, (4, 2, 1, 256), spec);
    }
}

/// Scores of keys, in one piece behind another sequence and by any split with a state.
fn novelty(c: &Check<'_>) {
    for (t, kv, d) in [(1, 1, 4), (70, 3, 16), (200, 2, 64), (129, 1, 128)] {
        let mut numbers = Numbers::new(t as u64);
        // As a device has them: scores are float32 everywhere.
        let k = c.tensor(&numbers.normal(t * kv * d), &[t, kv, d]);
        let k: Vec<f64> = c.ops.download(&k).expect("download").iter().map(|&x| f64::from(x)).collect();
        let (mut expected, mut sums) = (Vec::new(), vec![0.0; kv * d]);
        for row in k.chunks_exact(kv * d) {
            for (key, sum) in row.chunks_exact(d).zip(sums.chunks_exact_mut(d)) {
                let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
                let length = norm(key);
                sum.iter_mut().zip(key).for_each(|(s, k)| *s += k / length);
                expected.push(-sum.iter().zip(key).map(|(s, k)| s * k).sum::<f64>() / length / norm(sum));
            }
        }
        for pieces in [vec![t], vec![t / 2, t - t / 2], vec![t / 3, t / 3, 1, t - 2 * (t / 3) - t.min(1)]] {
            if pieces.iter().sum::<usize>() != t {
                continue;
            }
            let mut state = c.exact(&vec![0.0; 2 * kv * d], &[2, kv, 1, d]);
            let (mut done, mut found) = (0, Vec::new());
            for piece in pieces.iter().copied().filter(|&p| p > 0) {
                let keys = c.tensor(&k[done * kv * d..(done + piece) * kv * d], &[piece, kv, d]);
                let mut sequences = Sequences::default();
                sequences.push(piece, done, 1);
                let mut scores = c.poisoned_exact(&[piece, kv]);
                c.ops.key_novelty(&mut scores, &keys, &sequences, Some(&mut state)).expect("key_novelty");
                found.extend(c.ops.download(&scores).expect("download").iter().map(|&x| f64::from(x)));
                done += piece;
            }
            let difference = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(difference < 1e-5, "scores of {t} x {kv} keys of {d} in {pieces:?}: {difference:.1e}");
            let state = c.ops.download(&state).expect("download");
            let largest = state[kv * d..].iter().zip(&sums).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max);
            assert!(largest < 1e-4 * (t as f64), "sums of {t} x {kv} keys of {d} in {pieces:?}: {largest:.1e}");
        }
        let joined: Vec<f64> = k[..2.min(t) * kv * d].iter().chain(&k).copied().collect();
        let keys = c.tensor(&joined, &[t + 2.min(t), kv, d]);
        let mut scores = c.poisoned_exact(&[t + 2.min(t), kv]);
        c.ops.key_novelty(&mut scores, &keys, &Sequences::fresh([2.min(t), t]), None).expect("key_novelty");
        let found = c.ops.download(&scores).expect("download");
        for (found, expected) in found[2.min(t) * kv..].iter().zip(&expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
        }
    }
}

fn forward(c: &Check<'_>, sizes: Sizes, spec: AttentionSpec) {
    let (t, h, kv, d) = sizes;
    let mut numbers = Numbers::new((t * d) as u64);
    let [q, k, v] = [h, kv, kv].map(|heads| activations(c, &mut numbers, t * heads * d));
    let scores = drawn_scores(&mut numbers, t * kv);
    let (turns, frequencies) = frequencies(c, d);
    let expected = Text { q: &q, k: &k, v: &v, scores: &scores, frequencies: &turns, sizes }.attention(spec);
    let what = format!("attention {sizes:?} {spec:?}");
    // Behind another sequence in the batch, without a cache.
    let before = 3;
    let join = |x: &[f64], width: usize| [&numbers_like(before * width)[..], x].concat();
    let rows = before + t;
    let mut out = c.poisoned(&[rows, h, d]);
    let (qt, kt, vt) = (
        c.tensor(&join(&q, h * d), &[rows, h, d]),
        c.tensor(&join(&k, kv * d), &[rows, kv, d]),
        c.tensor(&join(&v, kv * d), &[rows, kv, d]),
    );
    let batch = Sequences::fresh([before, t]);
    let marks = c.exact(&join(&scores, kv), &[rows, kv]);
    let keeping = Some(Keeping { scores: &marks, frequencies: &frequencies });
    let inputs = Attention { q: &qt, k: &kt, v: &vt, keeping, sequences: &batch, spec };
    c.ops.attention_forward(&mut out, inputs, None, None).expect(&what);
    let mut own = c.poisoned(&[t, h, d]);
    c.ops.copy_rows(&mut own, &out, before).expect(&what);
    c.close(&what, &own, &expected);

    for pieces in [vec![t], vec![1; t], vec![t / 2, t - t / 2], vec![t / 3, 1, t - t / 3 - t.min(1)]] {
        if pieces.iter().sum::<usize>() != t {
            continue;
        }
        let cache_rows = spec.cache_rows();
        let dtype = if spec.window.is_some() { c.ops.activations() } else { c.ops.growing_cache() };
        let empty = |n: usize| c.ops.upload(vec![f32::NAN; 2 * kv * n * d], &[2, kv, n, d], dtype).expect("upload");
        let kept = (spec.kept > 0).then(|| KeptKeys {
            scores: c.poisoned_exact(&[2, kv, cache_rows]),
            positions: c.poisoned_exact(&[2, kv, spec.slots()]),
            queries: c.poisoned_exact(&[2, h, d]),
        });
        let mut cache = KeyValueCache { spec, keys: empty(cache_rows), values: empty(cache_rows), kept };
        let mut done = 0;
        let mut found = Vec::new();
        for piece in pieces.iter().copied().filter(|&p| p > 0) {
            let part = |x: &[f64], heads: usize| {
                c.tensor(&x[done * heads * d..(done + piece) * heads * d], &[piece, heads, d])
            };
            let mut batch = Sequences::default();
            batch.push(piece, done, 1);
            let mut out = c.poisoned(&[piece, h, d]);
            let (q, k, v) = (part(&q, h), part(&k, kv), part(&v, kv));
            let marks = c.exact(&scores[done * kv..(done + piece) * kv], &[piece, kv]);
            let keeping = Some(Keeping { scores: &marks, frequencies: &frequencies });
            let inputs = Attention { q: &q, k: &k, v: &v, keeping, sequences: &batch, spec };
            c.ops.attention_forward(&mut out, inputs, Some(&mut cache), None).expect(&what);
            found.extend(c.ops.download(&out).expect("download").iter().map(|&x| f64::from(x)));
            done += piece;
        }
        c.close(&format!("{what} in {} pieces", pieces.len()), &c.exact(&found, &[t, h, d]), &expected);
    }
}

fn numbers_like(count: usize) -> Vec<f64> {
    Numbers::new(99).normal(count)
}

fn backward(c: &Check<'_>, sizes: Sizes, spec: AttentionSpec) {
    let (t, h, kv, d) = sizes;
    let mut numbers = Numbers::new(t as u64);
    let [q, k, v] = [h, kv, kv].map(|heads| activations(c, &mut numbers, t * heads * d));
    let (dout, scores) = (numbers.normal(t * h * d), drawn_scores(&mut numbers, t * kv));
    let (turns, _) = frequencies(c, d);
    let f =
        |q: &[f64], k: &[f64], v: &[f64]| Text { q, k, v, scores: &scores, frequencies: &turns, sizes }.attention(spec);
    let expected = [
        gradient(&q, &dout, |q| f(q, &k, &v)),
        gradient(&k, &dout, |k| f(&q, k, &v)),
        gradient(&v, &dout, |v| f(&q, &k, v)),
    ];
    let found = gradients(c, sizes, spec, [&q, &k, &v, &scores], &dout);
    for ((found, expected), name) in found.iter().zip(&expected).zip(["dq", "dk", "dv"]) {
        c.close(&format!("attention {name} {sizes:?} {spec:?}"), found, expected);
    }
}

fn gradients(
    c: &Check<'_>,
    (t, h, kv, d): Sizes,
    spec: AttentionSpec,
    [q, k, v, scores]: [&[f64]; 4],
    dout: &[f64],
) -> [Tensor; 3] {
    let (q, k, v) = (c.tensor(q, &[t, h, d]), c.tensor(k, &[t, kv, d]), c.tensor(v, &[t, kv, d]));
    let (dout, scores) = (c.tensor(dout, &[t, h, d]), c.exact(scores, &[t, kv]));
    let batch = Sequences::fresh([t]);
    let (_, frequencies) = frequencies(c, d);
    let keeping = Some(Keeping { scores: &scores, frequencies: &frequencies });
    let inputs = Attention { q: &q, k: &k, v: &v, keeping, sequences: &batch, spec };
    let mut out = c.poisoned(&[t, h, d]);
    let mut statistics = c.ops.attention_statistics(&q).expect("attention_statistics");
    let kept = statistics.as_mut();
    c.ops.attention_forward(&mut out, inputs, None, kept).expect("attention_forward");
    let backward = |statistics: Option<&Tensor>| {
        let (mut dq, mut dk, mut dv) = (c.poisoned(&[t, h, d]), c.poisoned(&[t, kv, d]), c.poisoned(&[t, kv, d]));
        let gradients = AttentionGradients { q: &mut dq, k: &mut dk, v: &mut dv };
        c.ops.attention_backward(gradients, inputs, &out, statistics, &dout).expect("attention_backward");
        [dq, dk, dv]
    };
    let gradients = backward(statistics.as_ref());
    // Without the forward's statistics they are computed again.
    for (with, without) in gradients.iter().zip(backward(None)) {
        assert_eq!(c.ops.download(with).expect("download"), c.ops.download(&without).expect("download"));
    }
    gradients
}

/// Over several blocks of rows the gradient by v is checked exactly: the output is linear in v.
fn long_backward(c: &Check<'_>, specs: &[AttentionSpec]) {
    let sizes @ (t, h, kv, d) = (150, 3, 1, 16);
    for &spec in specs {
        let mut numbers = Numbers::new(5);
        let [q, k, v] = [h, kv, kv].map(|heads| activations(c, &mut numbers, t * heads * d));
        let (dout, scores) = (numbers.normal(t * h * d), drawn_scores(&mut numbers, t * kv));
        let (turns, _) = frequencies(c, d);
        let [dq, dk, dv] = gradients(c, sizes, spec, [&q, &k, &v, &scores], &dout);
        let get = |t: &liger_tensor::Tensor| c.ops.download(t).expect("download");
        for (name, grad, which) in [("dq", get(&dq), 0), ("dk", get(&dk), 1), ("dv", get(&dv), 2)] {
            // The slope along one direction through all elements.
            let direction = numbers.normal(grad.len());
            let at = |step: f64| {
                let moved = |x: &[f64], i: usize| -> Vec<f64> {
                    if i != which {
                        return x.to_vec();
                    }
                    x.iter().zip(&direction).map(|(x, d)| x + step * d).collect()
                };
                let (q, k, v) = (&moved(&q, 0), &moved(&k, 1), &moved(&v, 2));
                let out = Text { q, k, v, scores: &scores, frequencies: &turns, sizes }.attention(spec);
                out.iter().zip(&dout).map(|(o, d)| o * d).sum::<f64>()
            };
            let expected = (at(1e-5) - at(-1e-5)) / 2e-5;
            let found: f64 = grad.iter().zip(&direction).map(|(&g, d)| f64::from(g) * d).sum();
            // A gradient that is off by the tolerance's share of its norm moves a random slope by about that much.
            let norm = grad.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            assert!(
                (found - expected).abs() <= 4.0 * c.tolerance * norm,
                "{name} {spec:?}: {found} {expected}, norm {norm}"
            );
        }
    }
}
