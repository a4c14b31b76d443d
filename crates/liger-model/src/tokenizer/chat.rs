//! Chat templates: Jinja as `transformers` runs it.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user", "assistant".
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// The template of a model.
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    pub(crate) fn new(source: String, bos_token: String, eos_token: String, path: &Path) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::Refused(e.to_string()))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<String, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| today(&format));
        // Marks for training masks; they print nothing.
        let plain = source.replace("{% generation %}", "").replace("{% endgeneration %}", "");
        environment
            .add_template_owned("chat", plain)
            .map_err(|e| Error::corrupt(path, format!("the chat template is not Jinja that can be read: {e}")))?;
        Ok(Self { source, environment, bos_token, eos_token })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation; `answer_next` ends it where the assistant begins to speak.
    ///
    /// # Errors
    /// [`Error::Refused`] with the template's own complaint.
    pub fn render(&self, messages: &[Message], answer_next: bool) -> Result<String> {
        self.render_with_tools(messages, None::<()>, answer_next)
    }

    /// The same of turns in OpenAI's form, whatever their fields, with what the template is told of tools.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with_tools(
        &self,
        messages: impl Serialize,
        tools: Option<impl Serialize>,
        answer_next: bool,
    ) -> Result<String> {
        let values = context! {
            messages => Value::from(Serde(messages)), tools => tools.map(|tools| Value::from(Serde(tools))),
            add_generation_prompt => answer_next,
            bos_token => self.bos_token.as_str(), eos_token => self.eos_token.as_str(),
        };
        let template = self.environment.get_template("chat");
        let rendered = template.and_then(|template| template.render(values));
        rendered.map_err(|e| Error::Refused(format!("the model's chat template refuses the conversation: {e}")))
    }
}

/// The few fields of `strftime` that templates use, in UTC.
fn today(format: &str) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let days = (now.as_secs() / 86_400) as i64;
    // Howard Hinnant's civil_from_days.
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    const NAMES: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let name = NAMES[(month - 1) as usize];
    format
        .replace("%Y", &year.to_string())
        .replace("%m", &format!("{month:02}"))
        .replace("%d", &format!("{day:02}"))
        .replace("%B", name)
        .replace("%b", &name[..3])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_as_transformers_does() {
        let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
            {{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' \
            + message['content'].strip() + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}\
            {{ '<|im_start|>assistant\n' }}{% endif %}";
        let chat = ChatTemplate::new(source.into(), String::new(), String::new(), "t".as_ref()).unwrap();
        let text = chat.render(&[Message::new("user", " Hi ")], true).unwrap();
        let expected = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_templates_complaint_reaches_the_user() {
        let source = "{{ raise_exception('roles must alternate') }}";
        let chat = ChatTemplate::new(source.into(), String::new(), String::new(), "t".as_ref()).unwrap();
        let error = chat.render(&[], false).unwrap_err().to_string();
        assert!(error.contains("roles must alternate"), "{error}");
    }
}
