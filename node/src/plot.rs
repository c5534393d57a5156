//! The plot of a run: what people would rather see than read.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use manyhands_core::run::report::{EvalReport, Phase, StepReport};
use plotters::prelude::*;

use crate::store::write_atomic;
use crate::train::LogLine;

const SIZE: (u32, u32) = (1000, 760);
const COLORS: [RGBColor; 4] =
    [RGBColor(31, 119, 180), RGBColor(214, 90, 30), RGBColor(44, 140, 60), RGBColor(140, 80, 170)];

/// A named line of (step, value).
type Series = (String, Vec<(f64, f64)>);

/// Draws loss, reward, entropy and pass@k of a log into an SVG file.
pub fn write(path: &Path, lines: &[LogLine]) -> Result<()> {
    let mut svg = String::new();
    draw(&mut svg, lines).map_err(|e| anyhow!("{e}")).context("cannot draw the plot")?;
    write_atomic(path, svg.as_bytes())
}

fn draw(svg: &mut String, lines: &[LogLine]) -> Result<(), Box<dyn std::error::Error>> {
    let steps = |phase: Phase| {
        lines.iter().filter_map(move |line| match line {
            LogLine::Step { report, .. } if report.phase == phase => Some(report),
            _ => None,
        })
    };
    let series = |name: &str, phase, value: fn(&StepReport) -> Option<f64>| -> Series {
        let points = steps(phase).filter_map(|r| Some((r.step as f64, value(r)?)));
        (name.to_string(), smooth(points.collect()))
    };
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let panels = root.split_evenly((2, 2));
    panel(
        &panels[0],
        "Supervised: loss, nats a token",
        "step",
        &[series("loss", Phase::Sft, |r| Some(r.loss))],
    )?;
    panel(
        &panels[1],
        "RL: mean reward of rollouts",
        "step",
        &[series("reward", Phase::Rl, |r| Some(r.rl.as_ref()?.reward))],
    )?;
    panel(
        &panels[2],
        "RL: token entropy, nats",
        "step",
        &[series("entropy", Phase::Rl, |r| Some(r.rl.as_ref()?.entropy))],
    )?;
    pass_panel(&panels[3], lines)?;
    root.present()?;
    Ok(())
}

/// Mean over a short window, so that a curve can be read.
fn smooth(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let half = points.len() / 60;
    let mean = |i: usize| {
        let window = &points[i.saturating_sub(half)..points.len().min(i + half + 1)];
        window.iter().map(|p| p.1).sum::<f64>() / window.len() as f64
    };
    (0..points.len()).map(|i| (points[i].0, mean(i))).collect()
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn panel(
    area: &Area<'_>,
    title: &str,
    x_name: &str,
    series: &[Series],
) -> Result<(), Box<dyn std::error::Error>> {
    let all = || series.iter().flat_map(|s| s.1.iter());
    let x_max = all().map(|p| p.0).fold(1.0, f64::max);
    let (low, high) = all().fold((0.0_f64, 0.0_f64), |(l, h), p| (l.min(p.1), h.max(p.1)));
    let high = if high > low { high + 0.05 * (high - low) } else { 1.0 };
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .margin_right(24)
        .x_label_area_size(34)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..x_max, low..high)?;
    let whole = |x: &f64| format!("{x:.0}");
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(x_name).x_label_formatter(&whole).light_line_style(WHITE).draw()?;
    if all().next().is_none() {
        let at = ((x_max * 0.3), (low + high) / 2.0);
        let text = Text::new("no such phase in this run", at, ("sans-serif", 15));
        chart.draw_series(std::iter::once(text))?;
    }
    for (i, (_, points)) in series.iter().enumerate() {
        let style = COLORS[i % COLORS.len()].stroke_width(2);
        chart.draw_series(LineSeries::new(points.iter().copied(), style))?;
    }
    Ok(())
}

/// pass@k against k, before and after RL, with bootstrap intervals.
fn pass_panel(area: &Area<'_>, lines: &[LogLine]) -> Result<(), Box<dyn std::error::Error>> {
    let evaluation = |wanted: Phase| {
        lines.iter().rev().find_map(|line| match line {
            LogLine::Eval { evaluation: e, .. } if e.phase == wanted && e.step == 0 => {
                Some(&e.report)
            }
            _ => None,
        })
    };
    let curves: Vec<(&str, &EvalReport)> = [("before RL", Phase::Rl), ("after", Phase::Done)]
        .into_iter()
        .filter_map(|(name, phase)| Some((name, evaluation(phase)?)))
        .collect();
    let ks = curves.iter().flat_map(|c| c.1.overall.pass_at_k.keys());
    let k_max = ks.copied().max().unwrap_or(1).max(2) as f64;
    let mut chart = ChartBuilder::on(area)
        .caption("Held out: pass@k, 95% intervals", ("sans-serif", 18))
        .margin(12)
        .margin_right(24)
        .x_label_area_size(34)
        .y_label_area_size(48)
        .build_cartesian_2d((0.9..k_max * 1.1).log_scale(), 0.0..1.0)?;
    let whole = |x: &f64| format!("{x:.0}");
    let mut mesh = chart.configure_mesh();
    mesh.x_desc("k").x_labels(4).x_label_formatter(&whole).light_line_style(WHITE).draw()?;
    for (i, (name, report)) in curves.iter().enumerate() {
        let color = COLORS[i];
        let passes = || report.overall.pass_at_k.iter().map(|(k, p)| (*k as f64, p));
        let line = LineSeries::new(passes().map(|(k, p)| (k, p.mean)), color.stroke_width(2));
        chart
            .draw_series(line)?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        chart
            .draw_series(passes().map(|(k, p)| {
                ErrorBar::new_vertical(k, p.low, p.mean, p.high, color.filled(), 8)
            }))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}
