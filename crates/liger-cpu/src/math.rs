//! Scalar functions written so that loops over them become vector code.

/// `e^x` to about 2 units in the last place; 0 below -87. Products and sums are fused: an instruction each inside vector loops, a call
/// on x86 CPUs that have no such instruction.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let y = saturated_exp(x);
    if x < -87.0 { 0.0 } else { y }
}

/// The same, but `e^-87` below -87.
#[inline(always)]
fn saturated_exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer in the low bits
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, clamped)); // ln 2 in two parts
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 0.166_666_65);
    let p = p.mul_add(r, 0.5);
    let e = (p * r).mul_add(r, r) + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    e * f32::from_bits(exponent)
}

/// Sine and cosine of an angle in revolutions, to about 1e-7; polynomials as in Cephes' `sinf` and `cosf`.
#[inline(always)]
pub(crate) fn sin_cos_of_revolutions(revolutions: f64) -> (f32, f32) {
    const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52: adding it rounds to an integer in the low bits
    let shifted = 4.0 * revolutions + ROUND;
    let quarter = shifted.to_bits() as u32;
    let x = (std::f64::consts::FRAC_PI_2 * (4.0 * revolutions - (shifted - ROUND))) as f32; // up to pi/4
    let z = x * x;
    let sin = x + x * z * (-0.166_666_55 + z * (8.332_161e-3 - z * 1.951_529_6e-4));
    let cos = 1.0 - 0.5 * z + z * z * (4.166_664_6e-2 + z * (-1.388_731_6e-3 + z * 2.443_315_7e-5));
    let (s, c) = if quarter & 1 == 0 { (sin, cos) } else { (cos, sin) };
    let s = if quarter & 2 == 0 { s } else { -s };
    let c = if quarter.wrapping_add(1) & 2 == 0 { c } else { -c };
    (s, c)
}

#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + saturated_exp(-x))
}

/// `log(1 + e^x)`, accurate in both tails.
#[inline(always)]
pub(crate) fn softplus(x: f32) -> f32 {
    // log(1 + y) = 2 artanh(y / (2 + y)), whose series ends soon: y is at most 1.
    let y = exp(-x.abs());
    let s = y / (2.0 + y);
    let z = s * s;
    let series = 1.0 / 9.0 + z * (1.0 / 11.0 + z * (1.0 / 13.0));
    x.max(0.0) + 2.0 * s * (1.0 + z * (1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z * series))))
}

/// Sum of 16 lanes by halves, which stays in registers.
#[inline(always)]
pub(crate) fn reduce(lanes: [f32; 16]) -> f32 {
    let mut sums = lanes;
    let mut half = 8;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}

/// In two sums of 16 lanes, so that an addition does not wait for the one before.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [[0.0f32; 16]; 2];
    let (a_chunks, b_chunks) = (a.chunks_exact(32), b.chunks_exact(32));
    let (a_rest, b_rest) = (a_chunks.remainder(), b_chunks.remainder());
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..16 {
            lanes[0][lane] += x[lane] * y[lane];
            lanes[1][lane] += x[16 + lane] * y[16 + lane];
        }
    }
    let (a_chunks, b_chunks) = (a_rest.chunks_exact(16), b_rest.chunks_exact(16));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..16 {
            lanes[0][lane] += x[lane] * y[lane];
        }
    }
    let [mut sums, others] = lanes;
    sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
    reduce(sums) + tail
}

/// `y += a x`.
#[inline(always)]
pub(crate) fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// Softmax of a row, in place; minus infinity counts as absent.
#[inline(always)]
pub(crate) fn softmax(row: &mut [f32]) {
    let scale = 1.0 / exponentials(row).1;
    for x in row {
        *x *= scale;
    }
}

/// e^(x - max) in place of each; the maximum and the sum.
#[inline(always)]
pub(crate) fn exponentials(row: &mut [f32]) -> (f32, f32) {
    let max = maximum(row);
    let mut lanes = [0.0f32; 16];
    let mut chunks = row.chunks_exact_mut(16);
    for chunk in &mut chunks {
        for lane in 0..16 {
            chunk[lane] = exp(chunk[lane] - max);
            lanes[lane] += chunk[lane];
        }
    }
    let mut sum = reduce(lanes);
    for x in chunks.into_remainder() {
        *x = exp(*x - max);
        sum += *x;
    }
    (max, sum)
}

#[inline(always)]
pub(crate) fn maximum(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = row.chunks_exact(16);
    let rest = chunks.remainder().iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    for chunk in chunks {
        for lane in 0..16 {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    let largest = largest(lanes);
    if largest > rest { largest } else { rest }
}

/// Largest of 16 lanes, by halves as [`reduce`].
#[inline(always)]
pub(crate) fn largest(mut lanes: [f32; 16]) -> f32 {
    let mut half = 8;
    while half > 0 {
        for i in 0..half {
            lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    #[test]
    fn softplus_is_accurate_in_both_tails() {
        for i in -8_700..8_800 {
            let x = i as f32 * 0.01;
            let expected = f64::from(x).max(0.0) + (-f64::from(x).abs()).exp().ln_1p();
            let found = f64::from(super::softplus(x));
            assert!((found - expected).abs() <= 4e-7 * expected, "softplus {x}: {found}, not {expected}");
        }
    }

    #[test]
    fn sines_of_revolutions_are_accurate_over_long_texts() {
        for i in 0..200_000 {
            let revolutions = f64::from(i) * 0.137 - 9000.0;
            let (s, c) = super::sin_cos_of_revolutions(revolutions);
            let (sin, cos) = (std::f64::consts::TAU * revolutions.fract()).sin_cos();
            assert!((f64::from(s) - sin).abs() < 2e-7 && (f64::from(c) - cos).abs() < 2e-7, "{revolutions}: {s} {c}");
        }
    }

    #[test]
    fn softmax_of_rows_of_any_length_is_that_in_float64() {
        for len in (0..40).chain([100, 127, 128]) {
            let row: Vec<f32> = (0..len).map(|i| ((i * 37 % 19) as f32 - 9.0) * 0.7).collect();
            let largest = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
            assert_eq!(super::maximum(&row), largest);
            let exps: Vec<f64> = row.iter().map(|x| f64::from(x - largest).exp()).collect();
            let (mut found, sum) = (row, exps.iter().sum::<f64>());
            super::softmax(&mut found);
            for (found, exp) in found.iter().zip(exps) {
                assert!((f64::from(*found) - exp / sum).abs() < 1e-6, "{found}, not {} of {len}", exp / sum);
            }
        }
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        for i in -1000..=880 {
            let x = i as f32 * 0.1;
            let (found, expected) = (f64::from(super::exp(x)), f64::from(x).exp());
            assert!((found - expected).abs() <= 3e-7 * expected + 1e-37, "exp({x}) = {found}, expected {expected}");
        }
        assert_eq!(super::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(super::exp(-1e30), 0.0);
    }
}
