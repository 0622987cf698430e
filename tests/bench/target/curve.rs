//! Curves of how the cost grows, as one SVG.

use std::fmt::Write as _;

use crate::grow::{Series, Step};

/// Size of one chart, and the room around its curves.
const WIDTH: f64 = 370.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 50.0;
const TOP: f64 = 30.0;
const INNER_WIDTH: f64 = WIDTH - LEFT - 20.0;
const INNER_HEIGHT: f64 = HEIGHT - TOP - 40.0;
const CURVES: [(&str, &str); 2] = [("reads", "#1b6ca8"), ("writes", "#c2571a")];

/// Two charts a line; what grows goes to the right in powers, I/Os per second go up from 0.
pub(crate) fn chart(all: &[Series]) -> String {
    let lines = all.len().div_ceil(2) as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        2.0 * WIDTH,
        lines * HEIGHT
    );
    for (n, series) in all.iter().enumerate() {
        let (x, y) = ((n % 2) as f64 * WIDTH, (n / 2) as f64 * HEIGHT);
        let _ = writeln!(svg, "<g transform=\"translate({x},{y})\">");
        one(&mut svg, series);
        svg.push_str("</g>\n");
    }
    svg.push_str("</svg>\n");
    svg
}

fn one(svg: &mut String, series: &Series) {
    let most = series
        .steps
        .iter()
        .map(|step| step.read_iops.max(step.write_iops))
        .fold(1.0, f64::max);
    // 0 has no logarithm: everything moves by one.
    let place = |step: &Step| f64::from(step.at + 1).ln();
    let (first, last) = match (series.steps.first(), series.steps.last()) {
        (Some(first), Some(last)) => (place(first), place(last)),
        _ => return,
    };
    let x = |step: &Step| LEFT + (place(step) - first) / (last - first).max(1e-9) * INNER_WIDTH;
    let y = |iops: f64| TOP + INNER_HEIGHT * (1.0 - iops / most);
    let _ = writeln!(
        svg,
        "<text x=\"10\" y=\"18\" font-size=\"12\">{}</text>",
        series.name
    );
    let (base, right) = (TOP + INNER_HEIGHT, LEFT + INNER_WIDTH);
    let _ = writeln!(
        svg,
        "<path d=\"M{LEFT} {TOP}V{base}H{right}\" stroke=\"#888\" fill=\"none\"/><text x=\"4\" y=\"{:.0}\">{:.0}k</text>\
         <text x=\"4\" y=\"{base}\">0</text>",
        TOP + 8.0,
        most / 1000.0
    );
    for step in &series.steps {
        let _ = writeln!(
            svg,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{}</text>",
            x(step),
            base + 15.0,
            step.at
        );
    }
    for (n, (name, colour)) in CURVES.iter().enumerate() {
        let value = |step: &Step| if n == 0 { step.read_iops } else { step.write_iops };
        let points: Vec<String> = series
            .steps
            .iter()
            .map(|step| format!("{:.1},{:.1}", x(step), y(value(step))))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" stroke=\"{colour}\" stroke-width=\"2\" fill=\"none\"/><text x=\"{:.0}\" y=\"{:.0}\" fill=\"{colour}\">{name}</text>",
            points.join(" "),
            LEFT + 10.0 + 60.0 * n as f64,
            base + 32.0
        );
    }
}
