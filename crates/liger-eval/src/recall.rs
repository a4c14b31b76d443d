//! Questions about something said long ago: passkey, needle, and multi-query associative recall, made from a seed.

use liger_model::{Result, Tokenizer};
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{Cache, Request, Subject, loglikelihood};

/// A kind of question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// A number among sentences that repeat (Mohtashami and Jaggi, arXiv 2305.16300).
    Passkey,
    /// A number among sentences that are all different.
    Needle,
    /// One of many pairs (multi-query associative recall, Arora et al., arXiv 2312.04927).
    Mqar,
}

/// How deep in the text the answer is, from its beginning (0) to its end (1).
pub const DEPTHS: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];

/// Share of right answers at one length and depth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RecallCell {
    /// Tokens of the text.
    pub length: usize,
    /// See [`DEPTHS`].
    pub depth: f64,
    /// Questions.
    pub items: usize,
    /// Those answered right: every token of the answer is the model's most likely one.
    pub right: usize,
}

/// What a model scored in a probe.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RecallScores {
    /// The probe's name.
    pub probe: String,
    /// By length, then depth.
    pub cells: Vec<RecallCell>,
    /// Texts longer than the model's context, which lost their beginning.
    pub cut: usize,
}

impl RecallScores {
    /// Share of right answers at a length.
    pub fn at(&self, length: usize) -> Option<f64> {
        let own = || self.cells.iter().filter(|cell| cell.length == length);
        let items: usize = own().map(|cell| cell.items).sum();
        (items > 0).then(|| own().map(|cell| cell.right).sum::<usize>() as f64 / items as f64)
    }
}

impl Probe {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Passkey, Self::Needle, Self::Mqar];

    /// Its name as a task.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passkey => "passkey",
            Self::Needle => "needle",
            Self::Mqar => "mqar",
        }
    }

    /// The probe of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|probe| probe.name() == name)
    }

    /// A question whose text has at most `length` tokens, with its answer. The same seed gives the same question.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn question(self, tokenizer: &Tokenizer, length: usize, depth: f64, seed: u64) -> Result<Request> {
        // As many sentences as fit: their number grows and shrinks until the text is just short enough.
        let tokens_of = |sentences: usize| -> Result<Request> {
            let mut rng = ChaCha8Rng::seed_from_u64(seed ^ ((depth * 1e3) as u64) << 32 ^ (length as u64) << 44);
            let (context, answer) = self.write(sentences, depth, &mut rng);
            Request::new(tokenizer, &context, &answer, 0)
        };
        let (mut low, mut high) = (1, 2);
        while tokens_of(high)?.tokens() <= length {
            (low, high) = (high, high * 2);
        }
        while high - low > 1 {
            let middle = low.midpoint(high);
            if tokens_of(middle)?.tokens() <= length { low = middle } else { high = middle }
        }
        tokens_of(low)
    }

    fn write(self, sentences: usize, depth: f64, rng: &mut ChaCha8Rng) -> (String, String) {
        let at = (depth * sentences as f64).round() as usize;
        let number = rng.random_range(10_000..100_000);
        match self {
            Self::Passkey => {
                let filler =
                    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
                let mut lines = vec![filler.to_owned(); sentences];
                lines.insert(at, format!("The pass key is {number}. Remember it. {number} is the pass key."));
                let text = lines.join("\n");
                let start = "There is important information hidden inside a lot of irrelevant text. Find it and \
                             memorize it. I will ask you about it.";
                (format!("{start}\n{text}\nWhat is the pass key? The pass key is"), format!(" {number}"))
            }
            Self::Needle => {
                let mut lines: Vec<String> = (0..sentences).map(|_| sentence(rng)).collect();
                let place = pick(PLACES, rng);
                lines.insert(at, format!("The special magic number of {place} is {number}."));
                let text = lines.join(" ");
                let question = format!("What is the special magic number of {place}? It is");
                (format!("{text}\n\n{question}"), format!(" {number}"))
            }
            Self::Mqar => {
                let mut names: Vec<String> =
                    ADJECTIVES.iter().flat_map(|a| THINGS.iter().map(move |t| format!("{a} {t}"))).collect();
                names.shuffle(rng);
                // Names come twice where there are more pairs than names; the one asked for comes once.
                let asked = at.min(sentences - 1);
                let name = |i: usize| {
                    let others = names.len() - 1;
                    if i == asked { &names[others] } else { &names[i % others] }
                };
                let values: Vec<u32> = (0..sentences).map(|_| rng.random_range(100..1000)).collect();
                let pairs: Vec<String> =
                    values.iter().enumerate().map(|(i, value)| format!("{} = {value}", name(i))).collect();
                (format!("{}\n\n{} =", pairs.join("\n"), name(asked)), format!(" {}", values[asked]))
            }
        }
    }
}

/// Asks `per_cell` questions at every length and depth. `tell(questions done)` is called as it goes.
///
/// # Errors
/// If the tokenizer or the device fails, or the cache cannot be written.
pub fn recall(
    subject: &Subject<'_>,
    tokenizer: &Tokenizer,
    probe: Probe,
    lengths: &[usize],
    (per_cell, seed): (usize, u64),
    cache: Option<&mut Cache>,
    tell: &mut dyn FnMut(usize),
) -> Result<RecallScores> {
    let cells = lengths.iter().flat_map(|&length| DEPTHS.map(|depth| (length, depth)));
    let mut cells: Vec<RecallCell> =
        cells.map(|(length, depth)| RecallCell { length, depth, items: per_cell, right: 0 }).collect();
    let questions: Vec<(usize, f64, u64)> = cells
        .iter()
        .flat_map(|cell| (0..per_cell as u64).map(|i| (cell.length, cell.depth, seed.wrapping_add(i))))
        .collect();
    let requests: Vec<Request> = questions
        .into_par_iter()
        .map(|(length, depth, seed)| probe.question(tokenizer, length, depth, seed))
        .collect::<Result<_>>()?;
    let answers = loglikelihood(subject, &requests, cache, tell)?;
    for (cell, own) in cells.iter_mut().zip(answers.chunks(per_cell)) {
        cell.right = own.iter().filter(|answer| answer.greedy).count();
    }
    let cut = answers.iter().filter(|answer| answer.cut).count();
    Ok(RecallScores { probe: probe.name().into(), cells, cut })
}

fn pick<'a>(words: &[&'a str], rng: &mut ChaCha8Rng) -> &'a str {
    words.choose(rng).copied().unwrap_or_default()
}

fn sentence(rng: &mut ChaCha8Rng) -> String {
    let (who, adjective, thing) = (pick(PEOPLE, rng), pick(ADJECTIVES, rng), pick(THINGS, rng));
    let (verb, place, time) = (pick(VERBS, rng), pick(PLACES, rng), pick(TIMES, rng));
    format!("{time} the {who} {verb} a {adjective} {thing} near {place}.")
}

const PEOPLE: &[&str] = &[
    "baker", "sailor", "teacher", "farmer", "painter", "miller", "doctor", "soldier", "gardener", "clerk", "hunter",
    "singer", "tailor", "widow", "judge", "porter",
];
const VERBS: &[&str] = &["found", "sold", "lost", "carried", "mended", "bought", "drew", "hid", "washed", "broke"];
const ADJECTIVES: &[&str] = &[
    "red", "old", "small", "heavy", "green", "broken", "golden", "cold", "round", "wooden", "silver", "dry", "soft",
    "black", "bright", "narrow", "blue", "clean", "empty", "plain", "rough", "sweet", "tall", "warm",
];
const THINGS: &[&str] = &[
    "basket", "lamp", "table", "coat", "bell", "clock", "ladder", "mirror", "bottle", "wheel", "drum", "letter",
    "candle", "bridge", "horse", "apple", "shoe", "knife", "chair", "window", "stone", "rope", "book", "boat",
    "garden", "barrel", "spoon", "gate", "hammer", "flag", "kettle", "violin",
];
const PLACES: &[&str] = &[
    "Oslo", "Cairo", "Lima", "Boston", "Vienna", "Kyoto", "Dublin", "Havana", "Prague", "Nairobi", "Geneva", "Delhi",
    "Lisbon", "Denver", "Athens", "Quebec",
];
const TIMES: &[&str] = &[
    "In spring",
    "At noon",
    "Last winter",
    "On Monday",
    "After the storm",
    "Before dawn",
    "In the evening",
    "That summer",
    "At midnight",
    "During the fair",
];
