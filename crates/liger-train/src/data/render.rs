//! Records as tokens, with the tokens of answers marked.

use liger_model::{Message, Tokenizer};

use super::{Document, Record};
use crate::recipe::Template;

/// Makes documents.
pub struct Renderer<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Ends texts that no template ends.
    pub eos: Option<u32>,
    /// Form of instruction records.
    pub template: Template,
}

impl Renderer<'_> {
    /// The tokens of a record, or why there are none.
    ///
    /// # Errors
    /// The reason, for the list of records left out.
    pub fn document(&self, line: usize, record: &Record) -> Result<Document, String> {
        let begin = self.tokenizer.begin();
        let mut document = Document { line, ids: Vec::new(), answer: Vec::new(), begin };
        match record {
            Record::Text(text) => {
                self.add(&mut document, text, true, true)?;
                self.end(&mut document);
            }
            Record::Chat(messages) => self.chat(&mut document, messages)?,
            Record::Instruction { instruction, input, output } => match (&self.tokenizer.chat, self.template) {
                (Some(_), Template::Chat) => {
                    let separator = if input.is_empty() { "" } else { "\n\n" };
                    let user = format!("{instruction}{separator}{input}");
                    self.chat(&mut document, &[Message::new("user", &user), Message::new("assistant", output)])?;
                }
                _ => {
                    self.add(&mut document, &alpaca_prompt(instruction, input), false, true)?;
                    self.add(&mut document, output, true, false)?;
                    self.end(&mut document);
                }
            },
        }
        if document.ids.len() < 2 {
            return Err("fewer than two tokens".into());
        }
        Ok(document)
    }

    fn add(&self, document: &mut Document, text: &str, answer: bool, first: bool) -> Result<(), String> {
        let ids = self.tokenizer.encode(text, first).map_err(|e| e.to_string())?;
        document.answer.resize(document.answer.len() + ids.len(), answer);
        document.ids.extend(ids);
        Ok(())
    }

    fn end(&self, document: &mut Document) {
        document.ids.extend(self.eos);
        document.answer.extend(self.eos.map(|_| true));
    }

    /// Each answer is what the template adds between "now the assistant speaks" and the end of its turn.
    fn chat(&self, document: &mut Document, messages: &[Message]) -> Result<(), String> {
        let chat = self.tokenizer.chat.as_ref().ok_or("a conversation, and the model has no chat template")?;
        let render = |turns: &[Message], next: bool| chat.render(turns, next).map_err(|e| e.to_string());
        let mut done = String::new();
        for (i, message) in messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let before = render(&messages[..i], true)?;
            let after = render(&messages[..=i], false)?;
            let (Some(prompt), Some(answer)) =
                (before.strip_prefix(done.as_str()), after.strip_prefix(before.as_str()))
            else {
                return Err("the chat template writes earlier turns in another way later".into());
            };
            self.add(document, prompt, false, false)?;
            self.add(document, answer, true, false)?;
            done = after;
        }
        Ok(())
    }
}

/// Stanford Alpaca's headings, which the paper's data use.
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        return format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the \
             request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        );
    }
    format!(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
         response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### \
         Input:\n{input}\n\n### Response:\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_marked() {
        let tokenizer = Tokenizer::bytes();
        let renderer = Renderer { tokenizer: &tokenizer, eos: Some(0), template: Template::Alpaca };
        let record = Record::Instruction { instruction: "Add".into(), input: "1 1".into(), output: "two".into() };
        let document = renderer.document(7, &record).unwrap();
        let text = tokenizer.decode(&document.ids, false).unwrap();
        assert!(text.starts_with("Below is an instruction") && text.ends_with("### Response:\ntwo\0"), "{text}");
        let marked: Vec<u32> =
            document.ids.iter().zip(&document.answer).filter(|(_, a)| **a).map(|(id, _)| *id).collect();
        assert_eq!(marked, [b't', b'w', b'o', 0].map(u32::from));
        let refused = renderer.document(1, &Record::Chat(vec![Message::new("assistant", "x")]));
        assert!(refused.unwrap_err().contains("no chat template"));
    }
}
