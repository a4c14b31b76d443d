//! Plain float64 mathematics, written as the formulas are.

/// `a [m, k] b [k, n]`.
pub(crate) fn matmul(a: &[f64], b: &[f64], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            c[i * n + j] = (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
        }
    }
    c
}

pub(crate) fn transpose(a: &[f64], rows: usize) -> Vec<f64> {
    let columns = a.len() / rows;
    (0..a.len()).map(|i| a[i % rows * columns + i / rows]).collect()
}

pub(crate) fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
    x.iter().map(|x| (x - max).exp() / sum).collect()
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub(crate) fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

pub(crate) fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

/// Central differences of `sum(f(x) * weight)`: the gradient by every element of `x`.
pub(crate) fn gradient(x: &[f64], weight: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let value = |x: &[f64]| f(x).iter().zip(weight).map(|(y, w)| y * w).sum::<f64>();
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let (kept, step) = (x[i], 1e-5);
            x[i] = kept + step;
            let above = value(&x);
            x[i] = kept - step;
            let below = value(&x);
            x[i] = kept;
            (above - below) / (2.0 * step)
        })
        .collect()
}
