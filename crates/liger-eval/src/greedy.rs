//! How long a model writes what its teacher writes, both greedily, after prompts of different lengths.

use liger_model::Result;
use serde::{Deserialize, Serialize};

use crate::Subject;
use crate::writer::write_greedily;

/// Agreement with the teacher's greedy text after prompts of one length.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GreedyAgreement {
    /// The model.
    pub name: String,
    /// Tokens of the prompts.
    pub prompt: usize,
    /// Prompts.
    pub texts: usize,
    /// Tokens that each wrote.
    pub written: usize,
    /// Mean number of tokens until the first that differs.
    pub until_first_difference: f64,
    /// Share of texts whose token at this place (0 the first written) and all before it are the teacher's.
    pub same: Vec<f64>,
}

/// Tokens written after each prompt.
const WRITTEN: usize = 64;

/// Compares `students` with the teacher after the first `length` tokens of each text that is long enough.
///
/// # Errors
/// If a device fails.
pub fn greedy_agreement(
    teacher: &Subject<'_>,
    students: &[Subject<'_>],
    texts: &[Vec<u32>],
    length: usize,
) -> Result<Vec<GreedyAgreement>> {
    let prompts: Vec<&[u32]> = texts.iter().filter_map(|text| text.get(..length)).collect();
    let expected = write(teacher, &prompts)?;
    let mut found = Vec::with_capacity(students.len());
    for student in students {
        let own = write(student, &prompts)?;
        let lengths: Vec<usize> = own
            .iter()
            .zip(&expected)
            .map(|(own, expected)| own.iter().zip(expected).take_while(|(a, b)| a == b).count())
            .collect();
        let n = lengths.len().max(1) as f64;
        found.push(GreedyAgreement {
            name: student.name.clone(),
            prompt: length,
            texts: prompts.len(),
            written: WRITTEN,
            until_first_difference: lengths.iter().sum::<usize>() as f64 / n,
            same: (0..WRITTEN).map(|at| lengths.iter().filter(|&&l| l > at).count() as f64 / n).collect(),
        });
    }
    Ok(found)
}

fn write(subject: &Subject<'_>, prompts: &[&[u32]]) -> Result<Vec<Vec<u32>>> {
    let mut written = vec![Vec::with_capacity(WRITTEN); prompts.len()];
    write_greedily(subject, prompts, &mut |slot, id| {
        written[slot].push(id);
        Ok(written[slot].len() < WRITTEN)
    })?;
    Ok(written)
}
