//! The loss curve as a picture, with a font of its own, so that it is drawn wherever Rust runs.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use plotters::coord::Shift;
use plotters::coord::types::{RangedCoordf64, RangedCoordusize};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use crate::error::{Error, ErrorKind, Result};

const SIZE: (u32, u32) = (900, 540); // pixels
const FONT: &str = "loss curve";

const INK: RGBColor = RGBColor(50, 54, 60);
const GRID: RGBColor = RGBColor(232, 234, 238);
const TRAINING: RGBColor = RGBColor(172, 203, 236);
const SMOOTHED: RGBColor = RGBColor(26, 96, 168);
const HELD_OUT: RGBColor = RGBColor(208, 78, 20);

/// How much of the average stays at each step; about the last ten steps count.
const DECAY: f64 = 0.9;

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Chart<'a> = ChartContext<'a, BitMapBackend<'a>, Cartesian2d<RangedCoordusize, RangedCoordf64>>;
type Drawn<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Draws the losses of a run over its steps, into a PNG file of 900 x 540 pixels.
///
/// `training` has the loss of each step, `held_out` that of each evaluation, as (step, nats per
/// token) in the order of the steps. A point whose loss is not finite is left out; without any
/// point the axes stand alone.
///
/// # Errors
/// When the file cannot be written, or its name does not end in `.png`.
pub fn draw_loss_curve(
    path: &Path,
    title: &str,
    training: &[(usize, f64)],
    held_out: &[(usize, f64)],
) -> Result<()> {
    let (training, held_out) = (finite(training), finite(held_out));
    // plotters prints a system error as Rust's debug text; this one is in the system's own words.
    fs::File::create(path).map_err(|source| Error::io(path, source))?;
    draw(path, title, &training, &held_out).map_err(|error| {
        let _ = fs::remove_file(path); // what is there is no picture
        ErrorKind::Picture { path: path.to_owned(), reason: error.to_string() }.into()
    })
}

fn finite(points: &[(usize, f64)]) -> Vec<(usize, f64)> {
    // A model's losses are f32; plotters never ends on an axis that f64 itself cannot span.
    points.iter().copied().filter(|&(_, loss)| (loss as f32).is_finite()).collect()
}

fn draw(path: &Path, title: &str, training: &[(usize, f64)], held_out: &[(usize, f64)]) -> Drawn {
    let root = BitMapBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    // The last held-out value stands in the right margin.
    let inner = root.margin(16, 10, 16, 74);
    // The legend stands above the plot: inside, it would hide one curve or another.
    let (head, body) = inner.split_vertically(62);
    head.draw(&Text::new(title, (8, 0), text(20, INK)?))?;
    draw_legend(&head)?;

    let last_step = training.iter().chain(held_out).map(|&(step, _)| step).max();
    let (low, high) = loss_range(training.iter().chain(held_out).map(|&(_, loss)| loss));
    let mut chart = ChartBuilder::on(&body)
        .x_label_area_size(50)
        .y_label_area_size(66)
        .build_cartesian_2d(0..last_step.unwrap_or(0).max(1), low..high)?;
    chart
        .configure_mesh()
        .x_labels(9)
        .y_labels(8)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(INK.mix(0.5))
        .label_style(text(14, INK)?)
        .axis_desc_style(text(15, INK)?)
        .x_desc("step")
        .y_desc("loss (nats per token)")
        .draw()?;

    draw_line(&mut chart, training.to_vec(), TRAINING.stroke_width(1))?;
    draw_line(&mut chart, smoothed(training), SMOOTHED.stroke_width(2))?;
    draw_line(&mut chart, held_out.to_vec(), HELD_OUT.stroke_width(2))?;
    chart.draw_series(held_out.iter().map(|&at| Circle::new(at, 5, WHITE.filled())))?;
    chart.draw_series(held_out.iter().map(|&at| Circle::new(at, 4, HELD_OUT.filled())))?;
    draw_values(&root, &chart, held_out)?;
    root.present()?;
    Ok(())
}

/// The font in a size (pixels) and colour.
fn text(size: u32, color: RGBColor) -> Drawn<TextStyle<'static>> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let registered = REGISTERED.get_or_init(|| {
        register_font(FONT, FontStyle::Normal, epaint_default_fonts::HACK_REGULAR).is_ok()
    });
    if !registered {
        return Err("the embedded font cannot be read".into());
    }
    Ok((FONT, size).into_font().color(&color))
}

/// One line of samples and names.
fn draw_legend(area: &Area<'_>) -> Drawn {
    const MIDDLE: i32 = 47; // y of the line
    const SAMPLE: i32 = 30; // its length
    let style = text(15, INK)?.pos(Pos::new(HPos::Left, VPos::Center));
    let names = [
        ("training, each step", TRAINING.stroke_width(2)),
        ("training, exponential moving average", SMOOTHED.stroke_width(2)),
        ("held out", HELD_OUT.stroke_width(2)),
    ];
    let mut x = 8;
    for (name, line) in names {
        area.draw(&PathElement::new([(x, MIDDLE), (x + SAMPLE, MIDDLE)], line))?;
        if line.color == HELD_OUT.to_rgba() {
            area.draw(&Circle::new((x + SAMPLE / 2, MIDDLE), 4, HELD_OUT.filled()))?;
        }
        x += SAMPLE + 8;
        area.draw(&Text::new(name, (x, MIDDLE), style.clone()))?;
        x += area.estimate_text_size(name, &style)?.0 as i32 + 28;
    }
    Ok(())
}

fn draw_line(chart: &mut Chart<'_>, points: Vec<(usize, f64)>, style: ShapeStyle) -> Drawn {
    // A single point would have no line.
    let dot = if points.len() == 1 { 2 } else { 0 };
    chart.draw_series(LineSeries::new(points, style).point_size(dot))?;
    Ok(())
}

/// Writes the held-out values next to their points: the last one to the right of the plot, the
/// others up and to the right, where a falling curve leaves room, unless they would run into the
/// one before.
fn draw_values(root: &Area<'_>, chart: &Chart<'_>, held_out: &[(usize, f64)]) -> Drawn {
    const WIDTH: i32 = 50; // of a value, in pixels
    const HEIGHT: i32 = 15;
    let Some((last, others)) = held_out.split_last() else { return Ok(()) };
    let style = text(15, HELD_OUT)?.pos(Pos::new(HPos::Left, VPos::Center));

    let (end, y) = chart.backend_coord(last);
    root.draw(&Text::new(format!("{:.3}", last.1), (end + 10, y), style.clone()))?;
    let mut free_from = i32::MIN;
    for at in others {
        let (x, y) = chart.backend_coord(at);
        let (x, y) = (x + 7, y - 15);
        if x < free_from || x + WIDTH > end {
            continue;
        }
        free_from = x + WIDTH + 4;
        // A white ground keeps the digits readable on the curves.
        let ground = [(x - 2, y - HEIGHT / 2), (x + WIDTH - 2, y + HEIGHT / 2)];
        root.draw(&Rectangle::new(ground, WHITE.mix(0.85).filled()))?;
        root.draw(&Text::new(format!("{:.3}", at.1), (x, y), style.clone()))?;
    }
    Ok(())
}

/// The exponential moving average. The early values are divided by the weights met so far, or the
/// average would start near zero.
fn smoothed(points: &[(usize, f64)]) -> Vec<(usize, f64)> {
    let (mut sum, mut weight) = (0.0, 0.0);
    points
        .iter()
        .map(|&(step, loss)| {
            sum = DECAY * sum + (1.0 - DECAY) * loss;
            weight = DECAY * weight + (1.0 - DECAY);
            (step, sum / weight)
        })
        .collect()
}

/// The losses' range and a margin, wider at the top, where the values are written. It does not go
/// below zero unless a loss does, and is never empty.
fn loss_range(losses: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) =
        losses.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    if low > high {
        return (0.0, 1.0);
    }
    let span = if high > low { high - low } else { 0.1 * high.abs().max(1.0) };
    let floor = if low >= 0.0 { 0.0 } else { f64::NEG_INFINITY };
    ((low - 0.06 * span).max(floor), high + 0.1 * span)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Points = Vec<(usize, f64)>;

    /// A run of `steps` steps that learns: a noisy fall, evaluated every tenth of it.
    fn run(steps: usize) -> (Points, Points) {
        let loss = |step: usize| 0.9 + 0.8 * (-(step as f64) / (0.2 * steps as f64)).exp();
        let noise = |step: usize| ((step * 7919) % 101) as f64 / 101.0 - 0.5;
        let training = (1..=steps).map(|step| (step, loss(step) + 0.5 * noise(step))).collect();
        let held_out = (0..=steps).step_by(steps / 10).map(|step| (step, loss(step))).collect();
        (training, held_out)
    }

    fn drawn(training: &[(usize, f64)], held_out: &[(usize, f64)]) -> image::RgbImage {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.png");
        draw_loss_curve(&path, "A model on some data", training, held_out).unwrap();
        let picture = image::open(&path).unwrap().into_rgb8();
        assert_eq!(picture.dimensions(), SIZE);
        picture
    }

    fn pixels_of(picture: &image::RgbImage, color: RGBColor) -> usize {
        picture.pixels().filter(|pixel| pixel.0 == [color.0, color.1, color.2]).count()
    }

    #[test]
    fn a_run_shows_all_its_curves() {
        let empty = drawn(&[], &[]);
        let (training, held_out) = run(40);
        let picture = drawn(&training, &held_out);
        for color in [TRAINING, SMOOTHED, HELD_OUT] {
            // The legend is in both; a smooth line has few pixels of its very colour.
            let (found, legend) = (pixels_of(&picture, color), pixels_of(&empty, color));
            assert!(
                legend > 0 && found > legend + 20,
                "{color:?}: {found}, {legend} in the legend"
            );
        }
        assert!(pixels_of(&picture, WHITE) > pixels_of(&picture, SMOOTHED));
    }

    #[test]
    fn points_that_are_not_finite_are_left_out() {
        let good = [(1, 2.0), (3, 1.0)];
        let bad = [(1, 2.0), (2, f64::NAN), (3, 1.0), (9, f64::INFINITY)];
        assert_eq!(drawn(&good, &good), drawn(&bad, &bad));
        assert_eq!(drawn(&[], &[]), drawn(&[(5, f64::NAN)], &[(5, f64::NEG_INFINITY)]));
    }

    #[test]
    fn odd_runs_are_drawn() {
        drawn(&[(0, 0.0)], &[]);
        drawn(&[(1, 1.5)], &[(0, 1.5), (1, 1.5)]);
        drawn(&[(1, f64::from(f32::MAX)), (2, -1.0)], &[(0, f64::MAX), (2, f64::MIN)]);
        drawn(&[(1, 1e-12), (1_000_000_000, 2e-12)], &[(1_000_000_000, 1.0)]);
    }

    #[test]
    fn a_constant_loss_stays_itself_when_smoothed() {
        let smooth = smoothed(&[(1, 2.0), (2, 2.0), (3, 2.0)]);
        assert!(smooth.iter().all(|&(_, loss)| (loss - 2.0).abs() < 1e-12), "{smooth:?}");
    }

    #[test]
    fn bad_path_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nowhere/loss.png");
        let error = draw_loss_curve(&path, "", &[], &[]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Io { path: at, .. } if *at == path), "{error}");

        let path = folder.path().join("loss.what");
        let error = draw_loss_curve(&path, "", &[], &[]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Picture { .. }), "{error}");
        assert!(!path.exists());
    }
}
