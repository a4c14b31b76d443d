//! Softmax attention, with windows and sinks: forward in one piece, by any split through a cache, and backward.

use liger_tensor::{AttentionSpec, KeyValueCache, Sequences, Tensor};

use crate::plain::{gradient, softmax};
use crate::{Check, Numbers};

/// q [T,H,D], k, v [T,K,D] of one sequence.
fn plain(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    (t, h, kv, d): (usize, usize, usize, usize),
    spec: AttentionSpec,
) -> Vec<f64> {
    let mut out = vec![0.0; q.len()];
    for i in 0..t {
        let seen: Vec<usize> = (0..=i).filter(|&j| spec.window.is_none_or(|w| i - j < w) || j < spec.sinks).collect();
        for head in 0..h {
            let at = (i * h + head) * d;
            let row = |x: &[f64], j: usize| x[(j * kv + head / (h / kv)) * d..][..d].to_vec();
            let score =
                |j: &usize| q[at..at + d].iter().zip(row(k, *j)).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt();
            let p = softmax(&seen.iter().map(score).collect::<Vec<_>>());
            for (p, j) in p.iter().zip(&seen) {
                out[at..at + d].iter_mut().zip(row(v, *j)).for_each(|(o, v)| *o += p * v);
            }
        }
    }
    out
}

pub(crate) fn check(c: &Check<'_>) {
    let specs = [(None, 0), (Some(1), 0), (Some(5), 0), (Some(64), 0), (Some(64), 4), (Some(3), 4), (Some(1), 1)];
    for (window, sinks) in specs {
        let spec = AttentionSpec { window, sinks };
        for (t, h, kv, d) in
            [(1, 1, 1, 16), (2, 3, 1, 16), (63, 4, 4, 8), (65, 3, 1, 60), (200, 8, 2, 32), (70, 2, 2, 128)]
        {
            forward(c, (t, h, kv, d), spec);
        }
        backward(c, (7, 3, 1, 4), spec);
        backward(c, (9, 4, 2, 6), spec);
    }
    long_backward(c);
}

fn forward(c: &Check<'_>, sizes: (usize, usize, usize, usize), spec: AttentionSpec) {
    let (t, h, kv, d) = sizes;
    let mut numbers = Numbers::new((t * d) as u64);
    let (q, k, v) = (numbers.normal(t * h * d), numbers.normal(t * kv * d), numbers.normal(t * kv * d));
    let expected = plain(&q, &k, &v, sizes, spec);
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
    c.ops.attention_forward(&mut out, &qt, &kt, &vt, &batch, spec, None, None).expect(&what);
    let mut own = c.poisoned(&[t, h, d]);
    c.ops.copy_rows(&mut own, &out, before).expect(&what);
    c.close(&what, &own, &expected);

    for pieces in [vec![t], vec![1; t], vec![t / 2, t - t / 2], vec![t / 3, 1, t - t / 3 - t.min(1)]] {
        if pieces.iter().sum::<usize>() != t {
            continue;
        }
        let cache_rows = spec.window.map_or(0, |w| w + spec.sinks);
        let empty = |n: usize| {
            c.ops.upload(vec![f32::NAN; 2 * kv * n * d], &[2, kv, n, d], c.ops.activations()).expect("upload")
        };
        let mut cache = KeyValueCache { spec, keys: empty(cache_rows), values: empty(cache_rows) };
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
            c.ops.attention_forward(&mut out, &q, &k, &v, &batch, spec, Some(&mut cache), None).expect(&what);
            found.extend(c.ops.download(&out).expect("download").iter().map(|&x| f64::from(x)));
            done += piece;
        }
        c.close(&format!("{what} in {} pieces", pieces.len()), &c.exact(&found, &[t, h, d]), &expected);
    }
}

fn numbers_like(count: usize) -> Vec<f64> {
    Numbers::new(99).normal(count)
}

fn backward(c: &Check<'_>, sizes: (usize, usize, usize, usize), spec: AttentionSpec) {
    let (t, h, kv, d) = sizes;
    let mut numbers = Numbers::new(t as u64);
    let (q, k, v) = (numbers.normal(t * h * d), numbers.normal(t * kv * d), numbers.normal(t * kv * d));
    let dout = numbers.normal(t * h * d);
    let f = |q: &[f64], k: &[f64], v: &[f64]| plain(q, k, v, sizes, spec);
    let expected = [
        gradient(&q, &dout, |q| f(q, &k, &v)),
        gradient(&k, &dout, |k| f(&q, k, &v)),
        gradient(&v, &dout, |v| f(&q, &k, v)),
    ];
    let found = gradients(c, sizes, spec, [&q, &k, &v], &dout);
    for ((found, expected), name) in found.iter().zip(&expected).zip(["dq", "dk", "dv"]) {
        c.close(&format!("attention {name} {sizes:?} {spec:?}"), found, expected);
    }
}

fn gradients(
    c: &Check<'_>,
    (t, h, kv, d): (usize, usize, usize, usize),
    spec: AttentionSpec,
    [q, k, v]: [&[f64]; 3],
    dout: &[f64],
) -> [Tensor; 3] {
    let (q, k, v) = (c.tensor(q, &[t, h, d]), c.tensor(k, &[t, kv, d]), c.tensor(v, &[t, kv, d]));
    let dout = c.tensor(dout, &[t, h, d]);
    let batch = Sequences::fresh([t]);
    let mut out = c.poisoned(&[t, h, d]);
    let mut statistics = c.ops.attention_statistics(&q).expect("attention_statistics");
    let kept = statistics.as_mut();
    c.ops.attention_forward(&mut out, &q, &k, &v, &batch, spec, None, kept).expect("attention_forward");
    let backward = |statistics: Option<&Tensor>| {
        let (mut dq, mut dk, mut dv) = (c.poisoned(&[t, h, d]), c.poisoned(&[t, kv, d]), c.poisoned(&[t, kv, d]));
        c.ops
            .attention_backward(&mut dq, &mut dk, &mut dv, &q, &k, &v, &out, statistics, &dout, &batch, spec)
            .expect("attention_backward");
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
fn long_backward(c: &Check<'_>) {
    let sizes @ (t, h, kv, d) = (150, 3, 1, 16);
    for spec in [AttentionSpec { window: None, sinks: 0 }, AttentionSpec { window: Some(64), sinks: 4 }] {
        let mut numbers = Numbers::new(5);
        let (q, k, v) = (numbers.normal(t * h * d), numbers.normal(t * kv * d), numbers.normal(t * kv * d));
        let dout = numbers.normal(t * h * d);
        let [dq, dk, dv] = gradients(c, sizes, spec, [&q, &k, &v], &dout);
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
                let out = plain(&moved(&q, 0), &moved(&k, 1), &moved(&v, 2), sizes, spec);
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
