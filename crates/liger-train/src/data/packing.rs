//! Documents laid end to end and cut into rows of one length.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Document;
use crate::recipe::{DataRecipe, LossOn};

/// A row of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// The token that follows each, or -100 where it does not count.
    pub labels: Vec<i64>,
    /// Lengths of the sequences in it: one, or one a document where the state is reset.
    pub lengths: Vec<usize>,
    /// Lines of the documents in it.
    pub lines: Vec<usize>,
}

/// Fisher and Yates, by seed.
pub(crate) fn shuffle<T>(list: &mut [T], seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for i in (1..list.len()).rev() {
        list.swap(i, rng.random_range(0..=i));
    }
}

/// Packs documents in their order, each row from the token that the model wants before a text. The last row may be shorter; a
/// row in which nothing counts is left out.
pub fn pack(documents: &[&Document], recipe: &DataRecipe) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = Row { ids: Vec::new(), labels: Vec::new(), lengths: Vec::new(), lines: Vec::new() };
    for document in documents {
        let mut at = 0;
        while at < document.ids.len() {
            let label = |next: usize| match recipe.loss_on == LossOn::All || document.answer[next] {
                true => i64::from(document.ids[next]),
                false => -100,
            };
            let begin = document.begin.filter(|_| row.ids.is_empty() && at > 0);
            row.ids.extend(begin);
            row.labels.extend(begin.map(|_| label(at)));
            let count = (document.ids.len() - at).min(recipe.length - row.ids.len());
            for i in at..at + count {
                row.ids.push(document.ids[i]);
                row.labels.push(if i + 1 < at + count { label(i + 1) } else { -100 });
            }
            row.lines.push(document.line);
            row.lengths.push(usize::from(begin.is_some()) + count);
            at += count;
            if row.ids.len() == recipe.length {
                let empty = Row { ids: Vec::new(), labels: Vec::new(), lengths: Vec::new(), lines: Vec::new() };
                rows.push(std::mem::replace(&mut row, empty));
            }
        }
    }
    rows.push(row);
    rows.retain(|row| row.labels.iter().any(|&label| label >= 0));
    if !recipe.reset_at_documents {
        rows.iter_mut().for_each(|row| row.lengths = vec![row.ids.len()]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;

    #[test]
    fn rows_hold_every_token_once_and_labels_stay_inside_documents() {
        let document = |line: usize, ids: &[u32]| Document {
            line,
            ids: ids.to_vec(),
            answer: ids.iter().map(|id| id % 2 == 1).collect(),
            begin: None,
        };
        let (a, b) = (document(1, &[1, 2, 3, 5, 4]), document(2, &[7, 9, 8]));
        let mut recipe = Recipe::load("paper").unwrap().data;
        recipe.length = 4;
        let rows = pack(&[&a, &b], &recipe);
        assert_eq!(rows[0].ids, [1, 2, 3, 5]);
        assert_eq!(rows[0].labels, [-100, 3, 5, -100]);
        assert_eq!(rows[1].ids, [4, 7, 9, 8]);
        assert_eq!(rows[1].labels, [-100, 9, -100, -100]);
        assert_eq!((rows[1].lengths.clone(), rows[1].lines.clone()), (vec![4], vec![1, 2]));
        recipe.reset_at_documents = true;
        recipe.loss_on = LossOn::All;
        let rows = pack(&[&a, &b], &recipe);
        assert_eq!((rows[1].lengths.clone(), rows[1].labels.clone()), (vec![1, 3], vec![-100, 9, 8, -100]));
        let a = Document { begin: Some(0), ..a };
        let rows = pack(&[&a, &b], &recipe);
        assert_eq!((rows[0].ids.clone(), rows[1].ids.clone()), (vec![1, 2, 3, 5], vec![0, 4, 7, 9]));
        assert_eq!((rows[1].lengths.clone(), rows[1].labels.clone()), (vec![2, 2], vec![4, -100, 9, -100]));
    }
}
