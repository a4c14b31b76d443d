//! Heat maps as SVG.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Shares from 0 to 1 in rows and columns.
#[derive(Debug, Clone)]
pub struct HeatMap {
    /// Its title.
    pub title: String,
    /// What the columns are.
    pub x: String,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// Names and values of the rows.
    pub rows: Vec<(String, Vec<Option<f64>>)>,
}

const CELL: (i32, i32) = (74, 30);
const LEFT: i32 = 210;
const TOP: i32 = 44;

impl HeatMap {
    /// The SVG text; `None` if there is not a single value.
    pub fn to_svg(&self) -> Option<String> {
        self.rows.iter().flat_map(|(_, values)| values).flatten().next()?;
        let mut svg = String::new();
        self.draw(&mut svg).ok()?;
        Some(svg)
    }

    fn draw(&self, svg: &mut String) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let width = LEFT + CELL.0 * self.columns.len() as i32 + 14;
        let height = TOP + CELL.1 * self.rows.len() as i32 + 54;
        let area = SVGBackend::with_string(svg, (width as u32, height as u32)).into_drawing_area();
        area.fill(&WHITE)?;
        let style = |size: i32, pos: Pos| ("sans-serif", size).into_font().color(&BLACK).pos(pos);
        let middle = Pos::new(HPos::Center, VPos::Center);
        area.draw_text(&self.title, &style(18, middle), (width / 2, TOP / 2))?;
        for (row, (name, values)) in self.rows.iter().enumerate() {
            let y = TOP + CELL.1 * row as i32;
            let right = Pos::new(HPos::Right, VPos::Center);
            area.draw_text(name, &style(14, right), (LEFT - 8, y + CELL.1 / 2))?;
            for (column, value) in values.iter().enumerate() {
                let Some(value) = value.map(|v| v.clamp(0.0, 1.0)) else { continue };
                let x = LEFT + CELL.0 * column as i32;
                area.draw(&Rectangle::new([(x, y), (x + CELL.0, y + CELL.1)], colour(value).filled()))?;
                area.draw(&Rectangle::new([(x, y), (x + CELL.0, y + CELL.1)], WHITE.stroke_width(1)))?;
                let ink = if value > 0.5 { &WHITE } else { &BLACK };
                let text = ("sans-serif", 13).into_font().color(ink).pos(middle);
                area.draw_text(&format!("{:.0}", 100.0 * value), &text, (x + CELL.0 / 2, y + CELL.1 / 2))?;
            }
        }
        let bottom = TOP + CELL.1 * self.rows.len() as i32;
        for (column, name) in self.columns.iter().enumerate() {
            let x = LEFT + CELL.0 * column as i32 + CELL.0 / 2;
            area.draw_text(name, &style(13, middle), (x, bottom + 14))?;
        }
        area.draw_text(&self.x, &style(14, middle), (LEFT + CELL.0 * self.columns.len() as i32 / 2, bottom + 36))?;
        area.present()?;
        Ok(())
    }
}

/// From nearly white to dark blue: light and dark tell it, whatever colours one sees.
fn colour(value: f64) -> RGBColor {
    let mix = |from: f64, to: f64| (from + (to - from) * value) as u8;
    RGBColor(mix(240.0, 8.0), mix(244.0, 48.0), mix(250.0, 107.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_an_svg_with_its_words() {
        let row = ("teacher".to_owned(), vec![Some(1.0), None]);
        let mut map = HeatMap {
            title: "Recall".into(),
            x: "tokens".into(),
            columns: vec!["256".into(), "1K".into()],
            rows: vec![row],
        };
        let svg = map.to_svg().unwrap();
        for word in ["<svg", "Recall", "tokens", "teacher", "100"] {
            assert!(svg.contains(word), "{word}");
        }
        map.rows.clear();
        assert!(map.to_svg().is_none());
    }
}
