use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Test numbers: the same seed gives the same ones, rounded to float32 so that device and reference see the same.
pub struct Numbers(ChaCha8Rng);

impl Numbers {
    /// Begins a stream.
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// `count` numbers of mean 0 and variance about 1.
    pub fn normal(&mut self, count: usize) -> Vec<f64> {
        let one = |rng: &mut ChaCha8Rng| {
            let sum: f64 = (0..12).map(|_| rng.random::<f64>()).sum();
            f64::from((sum - 6.0) as f32)
        };
        (0..count).map(|_| one(&mut self.0)).collect()
    }

    /// Log gates: mostly mild, some zero, some down to -1e4 if `strong`.
    pub fn log_gates(&mut self, count: usize, strong: bool) -> Vec<f64> {
        let one = |rng: &mut ChaCha8Rng| match rng.random_range(0..10) {
            0 => 0.0,
            1 | 2 if strong => -(10f64.powf(rng.random_range(0.0..4.0))),
            _ => -rng.random_range(0.0..0.3f64),
        };
        (0..count).map(|_| f64::from(one(&mut self.0) as f32)).collect()
    }
}
