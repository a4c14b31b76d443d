//! The templates of task files: Jinja, with what the benchmarks' own scripts do to texts as filters.

use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, Value};
use regex::{Captures, Regex};

pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    // Line ends at the end of a prompt count.
    if let Ok(syntax) = SyntaxConfig::builder().keep_trailing_newline(true).build() {
        environment.set_syntax(syntax);
    }
    environment.add_filter("before", |text: &str, mark: &str| text.split_once(mark).map_or(text, |x| x.0).to_owned());
    environment.add_filter("after", |text: &str, mark: &str| text.split_once(mark).map_or("", |x| x.1).to_owned());
    environment
        .add_filter("before_last", |text: &str, mark: &str| text.rsplit_once(mark).map_or("", |x| x.0).to_owned());
    environment
        .add_filter("after_last", |text: &str, mark: &str| text.rsplit_once(mark).map_or(text, |x| x.1).to_owned());
    environment.add_filter("position", |list: Vec<Value>, wanted: Value| list.iter().position(|x| *x == wanted));
    environment.add_filter("without_brackets", without_brackets);
    environment.add_filter("wikitext", wikitext);
    environment
}

/// HellaSwag's texts carry WikiHow's marks: `[title]` ends a sentence, any other brackets go with what they hold.
fn without_brackets(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(open) = rest.find('[') {
        // A line's end is not part of a bracket.
        match rest[open..].find(']').filter(|close| !rest[open..open + close].contains('\n')) {
            Some(close) => {
                kept.push_str(&rest[..open]);
                rest = &rest[open + close + 1..];
            }
            None => {
                kept.push_str(&rest[..=open]);
                rest = &rest[open + 1..];
            }
        }
    }
    kept.push_str(rest);
    kept.replace("  ", " ")
}

/// WikiText's spaces around punctuation and in brackets, taken out as the harness does.
fn wikitext(text: &str) -> String {
    static INSIDE: LazyLock<Vec<Regex>> = LazyLock::new(|| {
        let patterns = [
            r"\(\s*([^)]*?)\s*\)",
            r"\[\s*([^\]]*?)\s*\]",
            r"\{\s*([^}]*?)\s*\}",
            r#""\s*([^"]*?)\s*""#,
            r"'\s*([^']*?)\s*'",
        ];
        patterns.iter().filter_map(|pattern| Regex::new(pattern).ok()).collect()
    });
    let replace =
        |text: String, pairs: &[(&str, &str)]| pairs.iter().fold(text, |text, (from, to)| text.replace(from, to));
    let text = text.replace("s '", "s'");
    let marks = [(" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". ")];
    let more = [(" ! ", "! "), (" ? ", "? "), (" , ", ", ")];
    let mut text = replace(replace(text, &marks), &more);
    for pattern in &*INSIDE {
        let close = |found: &Captures<'_>| {
            let (whole, inside) = (&found[0], &found[1]);
            let (open, shut) = (&whole[..1], &whole[whole.len() - 1..]);
            format!("{open}{inside}{shut}")
        };
        text = pattern.replace_all(&text, close).into_owned();
    }
    let titles = [("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u{b0} ", "\u{b0}")];
    replace(replace(text, &titles), &[(" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")])
}
