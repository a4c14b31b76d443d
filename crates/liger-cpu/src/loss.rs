//! Cross-entropy and KL divergence over rows of logits, each row's gradient written over its logits.

use liger_tensor::checks::{logit_rows, same_length};
use liger_tensor::{AdamwParameter, AdamwStep, Error, Result, Tensor};

use crate::elementwise::log_sum_exp;
use crate::math::{dot, exp, exponentials};
use crate::parallel::{Disjoint, for_rows, for_tasks, vectorized};

/// Terms of a sum that are added up in float32.
const BLOCK: usize = 256;

pub(crate) fn cross_entropy(logits: &mut Tensor, labels: &[i64], gradient_scale: Option<f32>) -> Result<Vec<f32>> {
    let vocabulary = logit_rows("cross_entropy", logits, labels.len())?;
    if let Some(&id) = labels.iter().find(|&&id| id >= vocabulary as i64) {
        return Err(Error::TokenOutOfRange { id, vocabulary });
    }
    let mut losses = vec![0.0f32; labels.len()];
    let out = Disjoint::new(&mut losses);
    let logits = Disjoint::new(logits.as_f32_mut()?);
    for_tasks(labels.len(), |t| {
        // SAFETY: task t alone touches row t of both.
        let (row, loss) = unsafe { (logits.slice(t * vocabulary, vocabulary), &mut out.slice(t, 1)[0]) };
        vectorized!(|| {
            let Ok(label) = usize::try_from(labels[t]) else {
                if gradient_scale.is_some() {
                    row.fill(0.0);
                }
                return;
            };
            let own = row[label];
            let Some(scale) = gradient_scale else {
                *loss = log_sum_exp(row) - own;
                return;
            };
            let (max, sum) = exponentials(row);
            *loss = max + sum.ln() - own;
            row.iter_mut().for_each(|x| *x *= scale / sum);
            row[label] -= scale;
        },);
    });
    Ok(losses)
}

/// KL(p || q) = sum p (log p - log q); its gradient by the student's logits is q - p.
pub(crate) fn kl_divergence(
    student: &mut Tensor,
    teacher: &Tensor,
    count: &[bool],
    gradient_scale: Option<f32>,
) -> Result<Vec<f32>> {
    same_length("kl_divergence", student, teacher)?;
    let vocabulary = logit_rows("kl_divergence", student, count.len())?;
    let mut losses = vec![0.0f32; count.len()];
    let out = Disjoint::new(&mut losses);
    let student = Disjoint::new(student.as_f32_mut()?);
    let teacher = teacher.as_f32()?;
    for_tasks(count.len(), |t| {
        // SAFETY: task t alone touches row t of both.
        let (row, loss) = unsafe { (student.slice(t * vocabulary, vocabulary), &mut out.slice(t, 1)[0]) };
        let teacher = &teacher[t * vocabulary..(t + 1) * vocabulary];
        vectorized!(|| {
            if !count[t] {
                if gradient_scale.is_some() {
                    row.fill(0.0);
                }
                return;
            }
            let (total_q, total_p) = (log_sum_exp(row), log_sum_exp(teacher));
            // Float64 over blocks: thousands of tiny terms of both signs.
            let (mut of_block, mut ratios) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
            let mut sum = 0.0f64;
            for (q, p) in row.chunks_mut(BLOCK).zip(teacher.chunks(BLOCK)) {
                let (probabilities, log_ratios) = (&mut of_block[..p.len()], &mut ratios[..p.len()]);
                for (((probability, log_ratio), q), p) in
                    probabilities.iter_mut().zip(log_ratios.iter_mut()).zip(&*q).zip(p)
                {
                    let log_p = p - total_p;
                    *probability = exp(log_p);
                    *log_ratio = log_p - (q - total_q);
                }
                sum += f64::from(dot(probabilities, log_ratios));
                if let Some(scale) = gradient_scale {
                    q.iter_mut().zip(&*probabilities).for_each(|(q, p)| *q = scale * (exp(*q - total_q) - p));
                }
            }
            *loss = sum as f32;
        },);
    });
    Ok(losses)
}

pub(crate) fn sum_of_squares(tensors: &[&Tensor]) -> Result<f64> {
    let mut sum = 0.0;
    for x in tensors {
        sum += x.as_f32()?.chunks(1024).map(|c| f64::from(c.iter().map(|x| x * x).sum::<f32>())).sum::<f64>();
    }
    Ok(sum)
}

pub(crate) fn adamw(tensors: &mut AdamwParameter<'_>, step: AdamwStep) -> Result<()> {
    let AdamwParameter { value, gradient, first_moment: first, second_moment: second } = tensors;
    for other in [gradient, &**first, &**second] {
        same_length("adamw", value, other)?;
    }
    let AdamwStep { learning_rate, beta1, beta2, epsilon, weight_decay, gradient_scale, .. } = step;
    let correction = |beta: f32| (1.0 - f64::from(beta).powf(step.step as f64)) as f32;
    let (first_scale, second_scale) = (1.0 / correction(beta1), 1.0 / correction(beta2));
    let (gradient, first, second) =
        (gradient.as_f32()?, Disjoint::new(first.as_f32_mut()?), Disjoint::new(second.as_f32_mut()?));
    for_rows(value.as_f32_mut()?, 1, |start, parameter| {
        let gradient = &gradient[start..start + parameter.len()];
        // SAFETY: the moments are cut at the places where `parameter` is.
        let (first, second) = unsafe { (first.slice(start, parameter.len()), second.slice(start, parameter.len())) };
        vectorized!(|| {
            for (((w, g), m), v) in parameter.iter_mut().zip(gradient).zip(first.iter_mut()).zip(second.iter_mut()) {
                let g = g * gradient_scale;
                *m = beta1 * *m + (1.0 - beta1) * g;
                *v = beta2 * *v + (1.0 - beta2) * g * g;
                let update = *m * first_scale / ((*v * second_scale).sqrt() + epsilon);
                *w -= learning_rate * (update + weight_decay * *w);
            }
        },);
    });
    Ok(())
}
