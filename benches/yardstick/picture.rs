//! Speed and memory of the training steps as bars.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use crate::Answer;
use crate::page::{median, seconds};
use crate::peers::{Group, Program};
use crate::workload::Job;

const FONT: &str = "yardstick";
const INK: RGBColor = RGBColor(50, 54, 60);
const HERE: RGBColor = RGBColor(208, 78, 20);
const PEER: RGBColor = RGBColor(120, 160, 205);

const WIDTH: i32 = 1000;
const NAMES: i32 = 190; // pixels for the names of the programs
const BAR: i32 = 22; // from one bar to the next
const HEAD: i32 = 34; // a group's title

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

/// Draws the groups of training steps, one below the other: speed to the left, memory to the right.
pub fn draw(path: &Path, groups: &[Group]) -> Answer<()> {
    let is_training = |group: &&Group| {
        matches!(group.lines.first().map(|line| &line.job), Some(Job::Train { .. }))
    };
    let groups: Vec<_> = groups.iter().filter(is_training).collect();
    let height = |group: &Group| HEAD + BAR * group.lines.len() as i32 + 14;
    let total = 60 + groups.iter().map(|group| height(group)).sum::<i32>();
    register_font(FONT, FontStyle::Normal, epaint_default_fonts::HACK_REGULAR)
        .map_err(|_| "the embedded font cannot be read")?;
    let root = BitMapBackend::new(path, (WIDTH as u32, total as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    let half = (WIDTH - NAMES) / 2;
    write(&root, (NAMES, 18), 16, HPos::Left, "training, tokens/s")?;
    write(&root, (NAMES + half, 18), 16, HPos::Left, "peak memory, MB, freed memory given back")?;
    let mut top = 40;
    for group in groups {
        write(&root, (12, top + HEAD / 2), 15, HPos::Left, &group.what)?;
        let speeds: Vec<f64> =
            group.lines.iter().map(|line| group.tokens as f64 / median(&seconds(line))).collect();
        let peaks: Vec<f64> = group.lines.iter().map(|line| line.fair_peak / 1e6).collect();
        for (place, line) in group.lines.iter().enumerate() {
            let y = top + HEAD + BAR * place as i32;
            write(&root, (NAMES - 10, y + BAR / 2), 14, HPos::Right, &line.name)?;
            let color = if line.program == Program::Here { HERE } else { PEER };
            for (values, left) in [(&speeds, NAMES), (&peaks, NAMES + half)] {
                let most = values.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
                let length = (values[place] / most * f64::from(half - 90)) as i32;
                let corners = [(left, y + 3), (left + length.max(1), y + BAR - 3)];
                root.draw(&Rectangle::new(corners, color.filled()))?;
                let value = format!("{:.0}", values[place]);
                write(&root, (left + length + 6, y + BAR / 2), 14, HPos::Left, &value)?;
            }
        }
        top += height(group);
    }
    root.present()?;
    Ok(())
}

fn write(area: &Area<'_>, at: (i32, i32), size: i32, side: HPos, text: &str) -> Answer<()> {
    let style = (FONT, size).into_font().color(&INK).pos(Pos::new(side, VPos::Center));
    area.draw(&Text::new(text, at, style))?;
    Ok(())
}
