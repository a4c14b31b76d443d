//! Text that the teacher writes itself: conversations in which it plays both sides of its own chat template.

use liger_model::{Chooser, Generator, Message, Sampling, Tokenizer, choose};
use liger_tensor::{Ops, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::Document;
use crate::error::Result;

/// How much text, and from which seed.
#[derive(Debug, Clone)]
pub struct OwnText {
    /// Tokens of each of the conversations, which are written side by side.
    pub lengths: Vec<usize>,
    /// The same seed writes the same text.
    pub seed: u64,
}

/// Tokens after which a turn is ended for the teacher.
const LONGEST_USER_TURN: usize = 160;
const LONGEST_ANSWER: usize = 400;

/// The fixed tokens of a template between what the two sides say.
struct Frame {
    before_user: Vec<u32>,
    user_to_assistant: Vec<u32>,
    assistant_to_user: Vec<u32>,
}

impl Frame {
    /// Renders a conversation of marks and cuts it at them. `None` for a model without a template: it then just
    /// writes.
    fn of(tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let Some(chat) = &tokenizer.chat else { return Ok(None) };
        let marks = ["@@first@@", "@@second@@", "@@third@@"];
        let turns =
            [Message::new("user", marks[0]), Message::new("assistant", marks[1]), Message::new("user", marks[2])];
        let text = chat.render(&turns, false)?;
        let mut rest = text.as_str();
        let mut parts = Vec::new();
        for mark in marks {
            let Some((part, after)) = rest.split_once(mark) else { return Ok(None) };
            parts.push(tokenizer.encode(part, false)?);
            rest = after;
        }
        let mut parts = parts.into_iter();
        let mut next = || parts.next().unwrap_or_default();
        Ok(Some(Self { before_user: next(), user_to_assistant: next(), assistant_to_user: next() }))
    }
}

/// One conversation in the making.
struct Speaker {
    document: Document,
    length: usize,
    /// Tokens of the frame that still have to be said.
    forced: std::collections::VecDeque<u32>,
    /// What it says next where nothing is forced.
    chosen: u32,
    answering: bool,
    said: usize,
    rng: ChaCha8Rng,
}

impl Speaker {
    fn goes_on(&self) -> bool {
        self.document.ids.len() < self.length
    }
}

/// Writes conversations; `tell(tokens so far, tokens in all)` is called as they grow and stops them with `false`.
///
/// # Errors
/// If the model fails, or a length is past its context.
pub fn write_conversations(
    teacher: Generator<'_>,
    tokenizer: &Tokenizer,
    plan: OwnText,
    tell: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Vec<Document>> {
    let frame = Frame::of(tokenizer)?;
    let config = teacher.decoder.config();
    let mut state = teacher.decoder.new_state(plan.lengths.len())?;
    let opening = match &frame {
        Some(frame) => frame.before_user.clone(),
        None => vec![config.bos_token_id.or(config.eos_token_ids.first().copied()).unwrap_or(0)],
    };
    let ends_turn = |id: u32| config.eos_token_ids.contains(&id);
    let mut speakers: Vec<Speaker> = (plan.lengths.iter().enumerate())
        .map(|(i, &length)| Speaker {
            document: Document { line: i + 1, ids: Vec::new(), answer: Vec::new(), begin: None },
            length,
            forced: opening.iter().copied().collect(),
            chosen: 0,
            answering: frame.is_none(),
            said: 0,
            rng: ChaCha8Rng::seed_from_u64(plan.seed.wrapping_mul(1_000_003).wrapping_add(i as u64)),
        })
        .collect();
    let (mut written, total) = (0, plan.lengths.iter().sum());
    while written < total {
        let mut step = Vec::with_capacity(speakers.len());
        for (slot, s) in speakers.iter_mut().enumerate().filter(|(_, s)| s.goes_on()) {
            let forced = s.forced.pop_front();
            let id = forced.unwrap_or(s.chosen);
            s.document.ids.push(id);
            s.document.answer.push(forced.is_none() && s.answering);
            written += 1;
            if s.goes_on() {
                step.push((slot, id));
            }
            if let (Some(frame), None) = (&frame, forced) {
                s.said += 1;
                let longest = if s.answering { LONGEST_ANSWER } else { LONGEST_USER_TURN };
                if ends_turn(id) || s.said > longest {
                    let link = if s.answering { &frame.assistant_to_user } else { &frame.user_to_assistant };
                    // The end token that the speaker chose is the first of the link.
                    let skip = usize::from(ends_turn(id) && link.first() == Some(&id));
                    s.forced.extend(&link[skip..]);
                    (s.answering, s.said) = (!s.answering, 0);
                }
            }
        }
        if !tell(written, total) {
            break;
        }
        if !step.is_empty() {
            let logits = teacher.step(&mut state, &step)?;
            let speakers = speakers.iter_mut().filter(|s| s.goes_on()).collect();
            choose_all(teacher.decoder.ops(), logits, speakers, &config.eos_token_ids)?;
        }
    }
    Ok(speakers.into_iter().map(|s| s.document).collect())
}

/// What each says next, from `logits [speakers, V]`.
fn choose_all(ops: &dyn Ops, logits: &Tensor, mut speakers: Vec<&mut Speaker>, ends: &[u32]) -> Result<()> {
    // Plain sampling: the student must be right on what the teacher itself would say.
    let plain = Sampling { temperature: 1.0, top_p: 0.95, ..Sampling::default() };
    let greedy = Sampling::default();
    let mut choosers: Vec<_> = (speakers.iter_mut())
        .map(|s| Chooser {
            // Nothing is drawn for who does not choose.
            sampling: if s.forced.is_empty() { &plain } else { &greedy },
            seen: &[],
            rng: &mut s.rng,
            shows_logits: false,
        })
        .collect();
    let (ids, mut all) = choose(ops, logits, &mut choosers)?;
    for (row, (s, id)) in speakers.into_iter().zip(ids).enumerate() {
        s.chosen = id;
        // Nobody says nothing.
        if s.forced.is_empty() && s.said == 0 && ends.contains(&id) {
            let all = match &mut all {
                Some(all) => all,
                None => all.insert(ops.download(logits)?),
            };
            let width = logits.len() / logits.dim(0);
            let row = &mut all[row * width..(row + 1) * width];
            ends.iter().for_each(|&id| row[id as usize] = f32::NEG_INFINITY);
            s.chosen = plain.pick(row, &[], &mut s.rng);
        }
    }
    Ok(())
}
