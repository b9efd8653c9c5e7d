// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask plot`: draws a bench as bars, each as long as the ratio to its goal.

use std::fmt::Write as _;
use std::io::stdin;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// One line of `cargo xtask bench --json`.
#[derive(Deserialize)]
struct Row {
    name: String,
    ratio: f64,
    goal: f64,
    better: String,
}

/// Height of a line, start of the bars, length of a bar that meets its goal exactly, the most that
/// is drawn; in pixels.
const LINE: u32 = 26;
const LEFT: u32 = 420;
const UNIT: f64 = 160.0;
const MOST: f64 = 2.0;

pub(crate) fn run(file: &Path) -> Result<()> {
    let mut rows = Vec::new();
    for line in stdin().lines() {
        let line = line.context("cannot read standard input")?;
        if line.starts_with('{') {
            rows.push(
                serde_json::from_str(&line)
                    .with_context(|| format!("no line of a bench: {line}"))?,
            );
        }
    }
    ensure!(
        !rows.is_empty(),
        "no lines of a bench: pipe the output of `cargo xtask bench views --json` in here"
    );
    std::fs::write(file, draw(&rows)).with_context(|| format!("cannot write {}", file.display()))
}

/// How far the goal is met: 1 just so, more is better.
fn merit(row: &Row) -> f64 {
    let ratio = if row.better == "higher" { row.ratio / row.goal } else { row.goal / row.ratio };
    if ratio.is_finite() { ratio } else { 0.0 }
}

fn draw(rows: &[Row]) -> String {
    let width = f64::from(LEFT) + UNIT * MOST + 120.0;
    let height = LINE * (u32::try_from(rows.len()).unwrap_or(u32::MAX - 2) + 2);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    for (index, row) in (1u32..).zip(rows) {
        let (y, merit) = (index * LINE, merit(row));
        let colour = if merit >= 1.0 { "#2f7d4f" } else { "#b4442f" };
        let sign = if row.better == "higher" { "≥" } else { "≤" };
        let bar = UNIT * merit.min(MOST);
        let (text, figure) = (y + 5, f64::from(LEFT) + bar + 6.0);
        // Writing to a String cannot fail.
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LEFT}\" y=\"{}\" width=\"{bar:.1}\" height=\"16\" fill=\"{colour}\"/>\n\
             <text x=\"{figure:.1}\" y=\"{text}\">{:.3} (goal {sign} {})</text>",
            LEFT - 8,
            escape(&row.name),
            y - 8,
            row.ratio,
            row.goal
        );
    }
    let goal = f64::from(LEFT) + UNIT;
    let _ = writeln!(
        svg,
        "<line x1=\"{goal}\" y1=\"{}\" x2=\"{goal}\" y2=\"{}\" stroke=\"#444444\" stroke-dasharray=\"4 3\"/>\n\
         <text x=\"{goal}\" y=\"{}\" text-anchor=\"middle\">goal</text>\n</svg>",
        LINE / 2 + 4,
        height - LINE + 4,
        height - 8
    );
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_the_goal_is_met() {
        let row = |better: &str, ratio, goal| Row {
            name: "a<b".into(),
            ratio,
            goal,
            better: better.into(),
        };
        assert!((merit(&row("higher", 1.9, 0.95)) - 2.0).abs() < 1e-9);
        assert!((merit(&row("lower", 3.0, 1.5)) - 0.5).abs() < 1e-9);
        assert!(merit(&row("lower", 0.0, 1.5)).abs() < 1e-9);
        let svg = draw(&[row("lower", 3.0, 1.5), row("higher", 1.0, 1.0)]);
        assert!(
            svg.contains("a&lt;b")
                && svg.contains("width=\"80.0\"")
                && svg.contains("width=\"160.0\"")
        );
    }
}
