//! A report as a list of blocks, written as one HTML file that needs nothing else, and as Markdown with its plots beside it.

use std::path::Path;

use liger_model::{Result, files};

use crate::Table;

/// A part of a report.
pub enum Block {
    /// A heading.
    Heading(String),
    /// A paragraph.
    Text(String),
    /// A table.
    Table(Table),
    /// A plot: its file's name without ending, what it shows in words, its SVG.
    Plot(String, String, String),
    /// Commands or settings.
    Code(String),
    /// What somebody or something said.
    Quote(String),
}

/// A report.
pub struct Document {
    /// Its title.
    pub title: String,
    /// Its parts in order.
    pub blocks: Vec<Block>,
}

/// Follows the reader's light or dark setting; wide tables and plots scroll by themselves, so that a phone shows the rest at
/// its width and their words at a size to read.
const STYLE: &str = "
:root { color-scheme: light dark; --line: #d0d4da; --soft: #f3f5f8; --ink: #16202c; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --line: #3b4552; --soft: #1d2530; --ink: #e6eaf0; --paper: #12181f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th, th:first-child { background: var(--soft); white-space: normal; vertical-align: bottom; }
pre, blockquote { margin: 0.5rem 0; padding: 0.7rem; background: var(--soft); border-radius: 6px; }
pre { overflow-x: auto; } blockquote { white-space: pre-wrap; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { width: 100%; height: auto; min-width: 34rem; max-width: 760px; border-radius: 6px; }
";

impl Document {
    /// The HTML text.
    pub fn to_html(&self) -> String {
        let title = escape(&self.title);
        let mut out = format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
             <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        );
        for block in &self.blocks {
            out.push_str(&match block {
                Block::Heading(text) => format!("<h2>{}</h2>\n", escape(text)),
                Block::Text(text) => format!("<p>{}</p>\n", escape(text)),
                Block::Table(table) => format!("<div class=\"wide\">{}</div>\n", table.to_html()),
                Block::Plot(_, words, svg) => {
                    let size = svg_size(svg);
                    // A view box lets the plot shrink with the page.
                    let svg = match size {
                        Some((width, height)) if !svg.contains("viewBox") => {
                            svg.replacen("<svg ", &format!("<svg viewBox=\"0 0 {width} {height}\" "), 1)
                        }
                        _ => svg.clone(),
                    };
                    let named =
                        svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{}\" ", escape(words)), 1);
                    format!("<figure>{named}</figure>\n")
                }
                Block::Code(text) => format!("<pre>{}</pre>\n", escape(text)),
                Block::Quote(text) => format!("<blockquote>{}</blockquote>\n", escape(text)),
            });
        }
        out + "</body>\n</html>\n"
    }

    /// The Markdown text; plots are files beside it.
    pub fn to_markdown(&self) -> String {
        let mut out = format!("# {}\n", self.title);
        for block in &self.blocks {
            out.push_str(&match block {
                Block::Heading(text) => format!("\n## {text}\n"),
                Block::Text(text) => format!("\n{text}\n"),
                Block::Table(table) => format!("\n{}", table.to_markdown()),
                Block::Plot(file, words, _) => format!("\n![{words}]({file}.svg)\n"),
                Block::Code(text) => format!("\n```\n{}\n```\n", text.trim_end()),
                Block::Quote(text) => {
                    format!("\n{}", text.lines().map(|line| format!("> {line}\n")).collect::<String>())
                }
            });
        }
        out
    }

    /// Writes `report.html`, `report.md` and the plots to a folder.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        for block in &self.blocks {
            if let Block::Plot(file, _, svg) = block {
                files::write_whole(&folder.join(format!("{file}.svg")), svg.as_bytes())?;
            }
        }
        files::write_whole(&folder.join("report.md"), self.to_markdown().as_bytes())?;
        files::write_whole(&folder.join("report.html"), self.to_html().as_bytes())
    }
}

fn svg_size(svg: &str) -> Option<(u32, u32)> {
    let number = |name: &str| svg.split_once(&format!("{name}=\""))?.1.split_once('"')?.0.parse().ok();
    Some((number("width")?, number("height")?))
}

/// Text for HTML.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_carry_everything_and_html_is_escaped() {
        let mut table = Table::new(["model", "acc"]);
        table.row(["<b>", "1"]);
        let svg = "<svg width=\"10\" height=\"5\"></svg>".to_owned();
        let document = Document {
            title: "A & B".into(),
            blocks: vec![
                Block::Heading("Scores".into()),
                Block::Table(table),
                Block::Plot("memory".into(), "Memory".into(), svg),
                Block::Code("liger eval <x>".into()),
                Block::Quote("a\nb".into()),
            ],
        };
        let html = document.to_html();
        for part in ["A &amp; B", "&lt;b&gt;", "viewBox=\"0 0 10 5\"", "aria-label=\"Memory\"", "liger eval &lt;x&gt;"]
        {
            assert!(html.contains(part), "{part}");
        }
        assert!(!html.contains("http") && !html.contains("<b>"));
        let markdown = document.to_markdown();
        for part in ["# A & B", "## Scores", "| <b>", "![Memory](memory.svg)", "> a\n> b"] {
            assert!(markdown.contains(part), "{part}");
        }
        let folder = tempfile::tempdir().unwrap();
        document.write(folder.path()).unwrap();
        assert!(folder.path().join("memory.svg").exists() && folder.path().join("report.html").exists());
    }
}
