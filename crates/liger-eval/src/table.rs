//! Tables for a terminal, for Markdown and for HTML.

use crate::document::escape;

/// Rows of text under a head; the first column is left-aligned, the others right.
#[derive(Debug, Clone, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this head.
    pub fn new<T: Into<String>>(head: impl IntoIterator<Item = T>) -> Self {
        Self { rows: vec![head.into_iter().map(Into::into).collect()] }
    }

    /// Adds a row.
    pub fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    fn widths(&self) -> Vec<usize> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| self.rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max();
        (0..columns).map(|column| width(column).unwrap_or(0)).collect()
    }

    fn padded(&self, row: &[String]) -> Vec<String> {
        let pad = |(i, width): (usize, usize)| {
            let cell = row.get(i).map_or("", String::as_str);
            let space = " ".repeat(width.saturating_sub(cell.chars().count()));
            if i == 0 { format!("{cell}{space}") } else { format!("{space}{cell}") }
        };
        self.widths().into_iter().enumerate().map(pad).collect()
    }

    /// Columns under one another.
    pub fn to_text(&self) -> String {
        self.rows.iter().map(|row| self.padded(row).join("  ").trim_end().to_owned() + "\n").collect()
    }

    /// An HTML table.
    pub fn to_html(&self) -> String {
        let row = |(i, row): (usize, &Vec<String>)| {
            let tag = if i == 0 { "th" } else { "td" };
            let cells = row.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell)));
            format!("<tr>{}</tr>\n", cells.collect::<String>())
        };
        format!("<table>\n{}</table>", self.rows.iter().enumerate().map(row).collect::<String>())
    }

    /// A Markdown table.
    ///
    /// ```
    /// let mut table = liger_eval::Table::new(["model", "KL"]);
    /// table.row(["tuned", "0.1"]);
    /// assert_eq!(table.to_markdown(), "| model |  KL |\n|:------|----:|\n| tuned | 0.1 |\n");
    /// ```
    pub fn to_markdown(&self) -> String {
        let line = |row: &Vec<String>| format!("| {} |\n", self.padded(row).join(" | "));
        let mut lines: Vec<String> = self.rows.iter().map(line).collect();
        let rule = |(i, width): (usize, usize)| {
            if i == 0 { format!(":{}", "-".repeat(width + 1)) } else { format!("{}:", "-".repeat(width + 1)) }
        };
        let rules: Vec<String> = self.widths().into_iter().enumerate().map(rule).collect();
        lines.insert(1, format!("|{}|\n", rules.join("|")));
        lines.concat()
    }
}
