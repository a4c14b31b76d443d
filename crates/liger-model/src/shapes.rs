//! Models of known shapes with random weights: for benchmarks, which need no download, and for tests.

use liger_tensor::{DType, Ops, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::config::{Family, ModelConfig, RopeConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::weights::{TensorSource, expected_tensors};

/// Names of the shapes.
pub const SHAPES: [&str; 4] = ["tiny", "smollm2-135m", "llama-3.2-1b", "llama-3-8b"];

impl ModelConfig {
    /// The configuration of a known shape.
    ///
    /// # Errors
    /// [`Error::Refused`] with the names that there are.
    pub fn shape(name: &str) -> Result<Self> {
        // Vocabulary, width, feed-forward width, layers, query heads, key/value heads, head size, context, theta.
        let (vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, context, theta) =
            match name {
                "tiny" => (256, 64, 128, 2, 4, 2, 16, 512, 10_000.0),
                "smollm2-135m" => (49_152, 576, 1536, 30, 9, 3, 64, 8192, 100_000.0),
                "llama-3.2-1b" => (128_256, 2048, 8192, 16, 32, 8, 64, 131_072, 500_000.0),
                "llama-3-8b" => (128_256, 4096, 14_336, 32, 32, 8, 128, 8192, 500_000.0),
                other => {
                    let known = SHAPES.join(", ");
                    return Err(Error::Refused(format!("shape: found `{other}`, expected one of {known}")));
                }
            };
        Ok(Self {
            family: Family::Llama,
            vocab_size,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            max_position_embeddings: context,
            rms_norm_eps: 1e-5,
            rope: RopeConfig { theta, scaling: RopeScaling::Default },
            local_rope: None,
            tie_word_embeddings: name != "llama-3-8b",
            sliding_windows: vec![None; num_layers],
            bos_token_id: Some(0),
            eos_token_ids: vec![0],
            liger: None,
        })
    }
}

/// Normal-ish weights for any configuration; the same seed gives the same ones.
pub struct RandomWeights {
    tensors: std::collections::HashMap<String, Vec<usize>>,
    seed: u64,
}

impl RandomWeights {
    /// Weights for `config`.
    pub fn new(config: &ModelConfig, seed: u64) -> Self {
        Self { tensors: expected_tensors(config).into_iter().collect(), seed }
    }

    fn seed_of(&self, name: &str) -> u64 {
        name.bytes().fold(self.seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
    }
}

/// Of even numbers with variance 1 / in.
fn bound(shape: &[usize]) -> f32 {
    (3.0 / shape[1] as f32).sqrt()
}

impl TensorSource for RandomWeights {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).cloned()
    }

    fn read(&self, name: &str) -> Result<Vec<f32>> {
        let shape = self.shape(name).unwrap_or_default();
        let count: usize = shape.iter().product();
        if shape.len() == 1 {
            return Ok(vec![1.0; count]);
        }
        let bound = bound(&shape);
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed_of(name));
        Ok((0..count).map(|_| rng.random_range(-bound..bound)).collect())
    }

    /// Matrices are drawn by the device itself: billions of numbers in no time.
    fn load(&self, name: &str, shape: &[usize], ops: &dyn Ops, dtype: Option<DType>) -> Result<Tensor> {
        let dtype = dtype.unwrap_or(DType::F32);
        match shape.len() {
            1 => Ok(ops.upload(self.read(name)?, shape, dtype)?),
            _ => Ok(ops.random(shape, bound(shape), self.seed_of(name), dtype)?),
        }
    }

    fn error(&self, problem: String) -> Error {
        Error::Refused(problem)
    }
}
