//! AdamW over the matrices of an adapter, with the gradients' norm clipped first.

use liger_model::{Adapter, ModelConfig};
use liger_tensor::{AdamwParameter, AdamwStep, Ops};

use crate::error::Result;
use crate::recipe::TrainRecipe;

/// The moments, in the adapter's own form.
pub struct Optimizer {
    pub(crate) first: Adapter,
    pub(crate) second: Adapter,
}

impl Optimizer {
    /// Moments of zero.
    ///
    /// # Errors
    /// If the device has no memory.
    pub fn new(adapter: &Adapter, model: &ModelConfig, ops: &dyn Ops) -> Result<Self> {
        Ok(Self { first: adapter.zeros_like(model, ops)?, second: adapter.zeros_like(model, ops)? })
    }

    /// Norm of all gradients together.
    ///
    /// # Errors
    /// If the device fails.
    pub fn norm(gradients: &Adapter, ops: &dyn Ops) -> Result<f64> {
        let gradients: Vec<_> = gradients.named().into_iter().map(|(_, gradient)| gradient).collect();
        Ok(ops.sum_of_squares(&gradients)?.sqrt())
    }

    /// One update; `norm` is the gradients'.
    ///
    /// # Errors
    /// If the device fails.
    pub fn step(
        &mut self,
        adapter: &mut Adapter,
        gradients: &Adapter,
        ops: &dyn Ops,
        (step, learning_rate, norm): (u64, f32, f64),
        recipe: &TrainRecipe,
    ) -> Result<()> {
        let clip = f64::from(recipe.clip);
        let gradient_scale = if clip > 0.0 && norm > clip { (clip / norm) as f32 } else { 1.0 };
        let update = AdamwStep {
            learning_rate,
            beta1: recipe.betas[0],
            beta2: recipe.betas[1],
            epsilon: recipe.epsilon,
            weight_decay: recipe.weight_decay,
            step,
            gradient_scale,
        };
        let moments = self.first.matrices_mut().zip(self.second.matrices_mut());
        let mut parameters: Vec<AdamwParameter<'_>> = adapter
            .matrices_mut()
            .zip(gradients.named())
            .zip(moments)
            .map(|((value, (_, gradient)), (first_moment, second_moment))| AdamwParameter {
                value,
                gradient,
                first_moment,
                second_moment,
            })
            .collect();
        Ok(ops.adamw(&mut parameters, update)?)
    }
}
