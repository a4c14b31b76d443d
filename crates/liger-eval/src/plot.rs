//! Line plots as SVG.

use plotters::prelude::*;

/// An axis: its label, and whether it is logarithmic.
#[derive(Debug, Clone)]
pub struct Axis {
    /// What it counts, with its unit.
    pub label: String,
    /// Powers at even distances.
    pub logarithmic: bool,
}

impl Axis {
    /// Equal steps at equal distances.
    pub fn linear(label: &str) -> Self {
        Self { label: label.into(), logarithmic: false }
    }

    /// Equal factors at equal distances.
    pub fn logarithmic(label: &str) -> Self {
        Self { label: label.into(), logarithmic: true }
    }
}

/// One line.
#[derive(Debug, Clone)]
pub struct Line {
    /// For the legend.
    pub name: String,
    /// Its points.
    pub points: Vec<(f64, f64)>,
}

/// A plot.
#[derive(Debug, Clone)]
pub struct Plot {
    /// Its title.
    pub title: String,
    /// Across.
    pub x: Axis,
    /// Up.
    pub y: Axis,
    /// Its lines.
    pub lines: Vec<Line>,
}

/// Okabe and Ito's colours, told apart by everybody, and three more for nine structures side by side.
const COLOURS: [RGBColor; 10] = [
    RGBColor(0, 0, 0),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(204, 121, 167),
    RGBColor(130, 130, 130),
    RGBColor(120, 70, 20),
    RGBColor(110, 60, 190),
];

impl Plot {
    /// The SVG text; `None` if there is not a single point to draw.
    pub fn to_svg(&self) -> Option<String> {
        let place = |axis: &Axis, value: f64| if axis.logarithmic { value.max(1e-12).log10() } else { value };
        let lines: Vec<Vec<(f64, f64)>> = self
            .lines
            .iter()
            .map(|line| {
                let finite = line.points.iter().filter(|(x, y)| x.is_finite() && y.is_finite());
                finite.map(|(x, y)| (place(&self.x, *x), place(&self.y, *y))).collect()
            })
            .collect();
        let range = |values: Vec<f64>, zero: bool| {
            let low = values.iter().copied().fold(f64::INFINITY, f64::min);
            let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let low = if zero { low.min(0.0) } else { low };
            // A single value stands in the middle of a decade, or of its own size.
            let space = if high > low { (high - low) * 0.06 } else { (0.3 * high.abs()).clamp(1e-3, 0.5) };
            (high >= low).then_some(if zero { low..high + space } else { low - space..high + space })
        };
        let xs = range(lines.iter().flatten().map(|p| p.0).collect(), false)?;
        let ys = range(lines.iter().flatten().map(|p| p.1).collect(), !self.y.logarithmic)?;
        let mut svg = String::new();
        self.draw(&mut svg, &lines, xs, ys).ok()?;
        Some(svg)
    }

    fn draw(
        &self,
        svg: &mut String,
        lines: &[Vec<(f64, f64)>],
        xs: std::ops::Range<f64>,
        ys: std::ops::Range<f64>,
    ) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::with_string(svg, (760, 440)).into_drawing_area();
        area.fill(&WHITE)?;
        // Powers of ten only, where there are enough of them.
        let labels = |axis: &Axis, range: &std::ops::Range<f64>| {
            let decades = range.end - range.start;
            if axis.logarithmic && decades > 1.6 { decades.ceil() as usize } else { 8 }
        };
        let (x_labels, y_labels) = (labels(&self.x, &xs), labels(&self.y, &ys));
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.title, ("sans-serif", 20))
            .margin(14)
            .x_label_area_size(46)
            .y_label_area_size(70)
            .build_cartesian_2d(xs, ys)?;
        let label = |axis: &Axis| {
            let logarithmic = axis.logarithmic;
            move |value: &f64| short(if logarithmic { 10f64.powf(*value) } else { *value })
        };
        let (x_label, y_label) = (label(&self.x), label(&self.y));
        chart
            .configure_mesh()
            .light_line_style(RGBColor(240, 240, 240))
            .x_labels(x_labels)
            .y_labels(y_labels)
            .x_desc(&self.x.label)
            .y_desc(&self.y.label)
            .x_label_formatter(&x_label)
            .y_label_formatter(&y_label)
            .label_style(("sans-serif", 14))
            .axis_desc_style(("sans-serif", 15))
            .draw()?;
        for (i, (points, line)) in lines.iter().zip(&self.lines).enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
                .label(&line.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
            if points.len() <= 12 {
                chart.draw_series(points.iter().map(|p| Circle::new(*p, 3, colour.filled())))?;
            }
        }
        if lines.len() > 1 {
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperLeft)
                .background_style(WHITE.mix(0.85))
                .border_style(RGBColor(200, 200, 200))
                .label_font(("sans-serif", 14))
                .draw()?;
        }
        area.present()?;
        drop(chart);
        Ok(())
    }
}

/// "1.5M", "16K", "0.25".
fn short(value: f64) -> String {
    let size = value.abs();
    let text = |x: f64| {
        let digits = if x.abs() >= 100.0 {
            0
        } else if x.abs() >= 10.0 {
            1
        } else {
            2
        };
        let text = format!("{x:.digits$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    };
    if size >= 1e9 {
        text(value / 1e9) + "G"
    } else if size >= 1e6 {
        text(value / 1e6) + "M"
    } else if size >= 1e4 {
        text(value / 1e3) + "K"
    } else {
        text(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_is_an_svg_with_its_words() {
        let line = |name: &str, points: &[(f64, f64)]| Line { name: name.into(), points: points.to_vec() };
        let mut plot = Plot {
            title: "Memory".into(),
            x: Axis::logarithmic("tokens"),
            y: Axis::logarithmic("MiB"),
            lines: vec![
                line("teacher", &[(512.0, 22.0), (16384.0, 720.0)]),
                line("student", &[(512.0, 7.0), (f64::NAN, 7.0)]),
            ],
        };
        let svg = plot.to_svg().unwrap();
        for word in ["<svg", "Memory", "tokens", "MiB", "teacher", "student"] {
            assert!(svg.contains(word), "{word}");
        }
        plot.lines.clear();
        assert!(plot.to_svg().is_none());
    }

    #[test]
    fn numbers_are_short() {
        let found = [0.25, 3.0, 120.0, 16384.0, 2.5e6, 7e9].map(short);
        assert_eq!(found, ["0.25", "3", "120", "16.4K", "2.5M", "7G"]);
    }
}
