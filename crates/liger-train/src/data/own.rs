//! Text that the teacher writes itself: conversations in which it plays both sides of its own chat template.

use liger_model::{Generator, Message, Sampling, Tokenizer};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::Document;
use crate::error::Result;

/// How much text, and from which seed.
#[derive(Debug, Clone, Copy)]
pub struct OwnText {
    /// Conversations that are written side by side.
    pub conversations: usize,
    /// Tokens of each.
    pub length: usize,
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
    /// Tokens of the frame that still have to be said.
    forced: std::collections::VecDeque<u32>,
    answering: bool,
    said: usize,
    rng: ChaCha8Rng,
}

/// Writes conversations; `tell(tokens so far, tokens in all)` is called as they grow and stops them with `false`.
///
/// # Errors
/// If the model fails, or the length is past its context.
pub fn write_conversations(
    teacher: Generator<'_>,
    tokenizer: &Tokenizer,
    plan: OwnText,
    tell: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Vec<Document>> {
    let frame = Frame::of(tokenizer)?;
    let decoder = teacher.decoder;
    let config = decoder.config();
    // Plain sampling: the student must be right on what the teacher itself would say.
    let sampling = Sampling { temperature: 1.0, top_p: 0.95, ..Sampling::default() };
    let mut state = decoder.new_state(plan.conversations)?;
    let opening = match &frame {
        Some(frame) => frame.before_user.clone(),
        None => vec![config.bos_token_id.or(config.eos_token_ids.first().copied()).unwrap_or(0)],
    };
    let ends_turn = |id: u32| config.eos_token_ids.contains(&id);
    let mut speakers: Vec<Speaker> = (0..plan.conversations)
        .map(|i| Speaker {
            document: Document { line: i + 1, ids: Vec::new(), answer: Vec::new(), begin: None },
            forced: opening.iter().copied().collect(),
            answering: frame.is_none(),
            said: 0,
            rng: ChaCha8Rng::seed_from_u64(plan.seed.wrapping_mul(1_000_003).wrapping_add(i as u64)),
        })
        .collect();
    let mut logits: Vec<f32> = Vec::new();
    let vocabulary = config.vocab_size;
    for position in 0..plan.length {
        let mut step = Vec::with_capacity(speakers.len());
        for (slot, s) in speakers.iter_mut().enumerate() {
            let forced = s.forced.pop_front();
            let id = forced.unwrap_or_else(|| {
                let row = &mut logits[slot * vocabulary..(slot + 1) * vocabulary];
                if s.said == 0 {
                    // Nobody says nothing.
                    config.eos_token_ids.iter().for_each(|&id| row[id as usize] = f32::NEG_INFINITY);
                }
                sampling.pick(row, &[], &mut s.rng)
            });
            s.document.ids.push(id);
            s.document.answer.push(forced.is_none() && s.answering);
            step.push((slot, id));
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
        if !tell((position + 1) * plan.conversations, plan.length * plan.conversations) {
            break;
        }
        if position + 1 < plan.length {
            logits = decoder.ops().download(teacher.step(&mut state, &step)?)?;
        }
    }
    Ok(speakers.into_iter().map(|s| s.document).collect())
}
