//! A chart over steps as inline SVG: lines with a band between their extremes, or stacked areas. Knows nothing about runs.
//! Invariants: its size does not grow with the number of points, and all coordinates are finite.

use crate::text::short;

/// Most points drawn of a series, one per 1.5 pixels.
const POINTS_MAX: usize = 240;
/// Up to this many points, each is also marked with a dot.
const DOTS_MAX: usize = 60;
/// Largest |value| drawn, far from where sums and differences overflow.
const VALUE_MAX: f64 = 1e30;
/// Size of the drawing in its own units; the page scales it.
const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 210.0;
const LEFT: f64 = 48.0;
const RIGHT: f64 = WIDTH - 10.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = HEIGHT - 24.0;

/// A curve: its name and its points, ordered by step.
#[derive(Debug, Clone)]
pub(crate) struct Series {
    /// Name in the legend.
    pub(crate) name: &'static str,
    /// Step and value.
    pub(crate) points: Vec<(f64, f64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Lines; the axis covers the range of the values.
    Lines,
    /// Lines; the axis runs from 0 to 100 %.
    Share,
    /// Lines on a logarithmic axis; zero is drawn at the bottom.
    Logarithmic,
    /// Stacked areas, from zero.
    Stacked,
}

/// Series over the same axis.
#[derive(Debug, Clone)]
pub(crate) struct Chart {
    pub(crate) kind: Kind,
    /// The curves, at most three, since the page has three colours.
    pub(crate) series: Vec<Series>,
}

/// Neighbouring points drawn as one.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Bucket {
    x: f64,
    mean: f64,
    low: f64,
    high: f64,
}

/// A value axis: its ends and its marks.
#[derive(Debug, Clone, PartialEq)]
struct Axis {
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Axis {
    /// Round marks around `low..=high`, about `count` of them.
    fn linear(low: f64, high: f64, count: f64) -> Self {
        let (low, high) = widened(low, high);
        let step = round_step((high - low) / count);
        let first = (low / step).floor();
        let last = (high / step).ceil();
        let marks = (last - first) as usize;
        let ticks = (0..=marks).map(|at| (first + at as f64) * step).collect();
        Self {
            low: first * step,
            high: last * step,
            ticks,
        }
    }

    /// Marks at round values within `low..=high`, which stay the ends.
    fn within(low: f64, high: f64, count: f64) -> Self {
        let (low, high) = widened(low, high);
        let outer = Self::linear(low, high, count);
        let slack = (high - low) * 1e-9;
        let inside = |tick: &f64| (low - slack..=high + slack).contains(tick);
        Self {
            low,
            high,
            ticks: outer.ticks.into_iter().filter(inside).collect(),
        }
    }

    /// Position of `value` between 0 (low end) and 1.
    fn place(&self, value: f64) -> f64 {
        ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

/// An interval of positive length: equal ends are moved apart.
fn widened(low: f64, high: f64) -> (f64, f64) {
    let margin = (low.abs().max(high.abs()) * 0.05).max(1e-12);
    if high - low > margin * 1e-6 {
        (low, high)
    } else {
        (low - margin, high + margin)
    }
}

/// 1, 2, 2.5 or 5 times a power of ten, not below `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 2.5, 5.0]
        .into_iter()
        .find(|factor| factor * power >= step * 0.999);
    factor.unwrap_or(10.0) * power
}

fn buckets(points: &[(f64, f64)]) -> Vec<Bucket> {
    let finite: Vec<(f64, f64)> = points
        .iter()
        .filter(|(x, y)| x.is_finite() && y.is_finite())
        .map(|&(x, y)| (x, y.clamp(-VALUE_MAX, VALUE_MAX)))
        .collect();
    let columns = finite.len().min(POINTS_MAX);
    let bucket = |column: usize| {
        let part = &finite[column * finite.len() / columns..(column + 1) * finite.len() / columns];
        let count = part.len() as f64;
        Bucket {
            x: part.iter().map(|(x, _)| x).sum::<f64>() / count,
            mean: part.iter().map(|(_, y)| y).sum::<f64>() / count,
            low: part.iter().map(|&(_, y)| y).fold(f64::INFINITY, f64::min),
            high: part
                .iter()
                .map(|&(_, y)| y)
                .fold(f64::NEG_INFINITY, f64::max),
        }
    };
    (0..columns).map(bucket).collect()
}

impl Chart {
    /// The drawing; `None` without points.
    pub(crate) fn svg(&self) -> Option<String> {
        let values: Vec<Vec<Bucket>> = self
            .series
            .iter()
            .map(|series| buckets(&self.scaled(&series.points)))
            .collect();
        let mut curves = values.clone();
        if self.kind == Kind::Stacked {
            stack(&mut curves);
        }
        let all: Vec<&Bucket> = curves.iter().flatten().collect();
        if all.is_empty() {
            return None;
        }
        let (x_low, x_high) = extent(all.iter().map(|b| (b.x, b.x)));
        let x_axis = Axis::within(x_low, x_high, 6.0);
        let y_axis = self.y_axis(extent(all.iter().map(|b| (b.low, b.high))));
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
            self.series
                .iter()
                .map(|series| series.name)
                .collect::<Vec<_>>()
                .join(", ")
        );
        self.draw_axes(&mut svg, &x_axis, &y_axis);
        match self.kind {
            Kind::Stacked => draw_areas(&mut svg, &curves, &x_axis, &y_axis),
            Kind::Lines | Kind::Share | Kind::Logarithmic => {
                for (colour, curve) in curves.iter().enumerate() {
                    draw_line(&mut svg, curve, colour, (&x_axis, &y_axis));
                }
            }
        }
        self.draw_hints(&mut svg, &values, &x_axis);
        svg.push_str("</svg>");
        Some(svg)
    }

    /// The text of a value on this chart.
    pub(crate) fn label(&self, value: f64) -> String {
        match self.kind {
            Kind::Share => crate::text::percent(value),
            Kind::Lines | Kind::Logarithmic | Kind::Stacked => short(value),
        }
    }

    /// The points on the axis: on a logarithmic axis, their logarithms.
    fn scaled(&self, points: &[(f64, f64)]) -> Vec<(f64, f64)> {
        if self.kind != Kind::Logarithmic {
            return points.to_vec();
        }
        let values = self
            .series
            .iter()
            .flat_map(|series| &series.points)
            .map(|&(_, y)| y);
        let smallest = values
            .filter(|&y| y > 0.0 && y.is_finite())
            .fold(1.0, f64::min);
        points
            .iter()
            .map(|&(x, y)| (x, y.max(smallest).log10()))
            .collect()
    }

    fn unscaled(&self, value: f64) -> f64 {
        if self.kind == Kind::Logarithmic {
            10f64.powf(value)
        } else {
            value
        }
    }

    fn y_axis(&self, (low, high): (f64, f64)) -> Axis {
        match self.kind {
            Kind::Share => Axis {
                low: 0.0,
                high: 1.0,
                ticks: vec![0.0, 0.25, 0.5, 0.75, 1.0],
            },
            // From zero where that costs little room, so that a small change does not look like a large one.
            Kind::Lines if (0.0..=0.5 * high).contains(&low) => Axis::linear(0.0, high, 4.0),
            Kind::Lines => Axis::linear(low, high, 4.0),
            Kind::Stacked => Axis::linear(0.0, high.max(0.0), 4.0),
            Kind::Logarithmic => {
                let (low, high) = (low.floor(), high.ceil().max(low.floor() + 1.0));
                let stride = ((high - low) / 5.0).ceil().max(1.0);
                let marks = ((high - low) / stride) as usize;
                let ticks = (0..=marks).map(|at| low + at as f64 * stride).collect();
                Axis { low, high, ticks }
            }
        }
    }

    fn draw_axes(&self, svg: &mut String, x_axis: &Axis, y_axis: &Axis) {
        for &tick in &y_axis.ticks {
            let y = down(y_axis, tick);
            let label = match self.kind {
                Kind::Share => format!("{:.0} %", tick * 100.0),
                Kind::Logarithmic => format!("1e{tick:.0}"),
                Kind::Lines | Kind::Stacked => tick_label(tick),
            };
            svg.push_str(&format!(
                "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{RIGHT}\"/>\
                 <text class=\"y\" x=\"{:.1}\" y=\"{:.1}\">{label}</text>",
                LEFT - 6.0,
                y + 3.5
            ));
        }
        // Steps are whole: between two of them there is nothing to mark.
        for &tick in x_axis.ticks.iter().filter(|tick| tick.fract().abs() < 1e-9) {
            let x = across(x_axis, tick);
            let y = BOTTOM + 16.0;
            svg.push_str(&format!(
                "<text class=\"x\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>",
                tick_label(tick)
            ));
        }
    }

    /// Invisible columns that show the values under the pointer.
    fn draw_hints(&self, svg: &mut String, values: &[Vec<Bucket>], x_axis: &Axis) {
        let Some(longest) = values.iter().max_by_key(|curve| curve.len()) else {
            return;
        };
        for (at, bucket) in longest.iter().enumerate() {
            let half_way = |other: Option<&Bucket>, end: f64| {
                other.map_or(end, |other| {
                    across(x_axis, f64::midpoint(other.x, bucket.x))
                })
            };
            let from = half_way(
                at.checked_sub(1).and_then(|before| longest.get(before)),
                LEFT,
            );
            let to = half_way(longest.get(at + 1), RIGHT);
            let mut hint = format!("step {:.0}", bucket.x);
            for (series, curve) in self.series.iter().zip(values) {
                let Some(value) = curve.get(at) else { continue };
                hint.push_str(&format!(
                    "&#10;{} {}",
                    series.name,
                    self.label(self.unscaled(value.mean))
                ));
            }
            svg.push_str(&format!(
                "<rect class=\"hint\" x=\"{from:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\">\
                 <title>{hint}</title></rect>",
                (to - from).max(0.0),
                BOTTOM - TOP
            ));
        }
    }
}

/// Stacks each curve on those before it.
fn stack(curves: &mut [Vec<Bucket>]) {
    for at in 1..curves.len() {
        let (below, rest) = curves.split_at_mut(at);
        for (bucket, base) in rest[0].iter_mut().zip(&below[at - 1]) {
            bucket.mean += base.mean;
            bucket.low = bucket.mean;
            bucket.high = bucket.mean;
        }
    }
}

fn extent(spans: impl Iterator<Item = (f64, f64)>) -> (f64, f64) {
    spans.fold(
        (f64::INFINITY, f64::NEG_INFINITY),
        |(low, high), (from, to)| (low.min(from), high.max(to)),
    )
}

fn across(axis: &Axis, x: f64) -> f64 {
    LEFT + axis.place(x) * (RIGHT - LEFT)
}

fn down(axis: &Axis, y: f64) -> f64 {
    BOTTOM - axis.place(y) * (BOTTOM - TOP)
}

/// `L` commands through the points.
fn path(points: impl Iterator<Item = (f64, f64)>) -> String {
    points.map(|(x, y)| format!("L{x:.1} {y:.1}")).collect()
}

/// An outline along `points`, closed.
fn outline(points: impl Iterator<Item = (f64, f64)>) -> String {
    format!("M{}Z", path(points).trim_start_matches('L'))
}

fn draw_line(svg: &mut String, curve: &[Bucket], colour: usize, (x_axis, y_axis): (&Axis, &Axis)) {
    let at = |bucket: &Bucket, y: f64| (across(x_axis, bucket.x), down(y_axis, y));
    if curve.iter().any(|bucket| bucket.high > bucket.low) {
        let upper = curve.iter().map(|bucket| at(bucket, bucket.high));
        let lower = curve.iter().rev().map(|bucket| at(bucket, bucket.low));
        let band = outline(upper.chain(lower));
        svg.push_str(&format!("<path class=\"band s{colour}\" d=\"{band}\"/>"));
    }
    let line = path(curve.iter().map(|bucket| at(bucket, bucket.mean)));
    let line = line.trim_start_matches('L');
    svg.push_str(&format!("<path class=\"line s{colour}\" d=\"M{line}\"/>"));
    if curve.len() <= DOTS_MAX {
        for (x, y) in curve.iter().map(|bucket| at(bucket, bucket.mean)) {
            svg.push_str(&format!(
                "<circle class=\"dot s{colour}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.2\"/>"
            ));
        }
    }
}

fn draw_areas(svg: &mut String, curves: &[Vec<Bucket>], x_axis: &Axis, y_axis: &Axis) {
    for (colour, curve) in curves.iter().enumerate() {
        let at = |bucket: &Bucket, y: f64| (across(x_axis, bucket.x), down(y_axis, y));
        let upper = curve.iter().map(|bucket| at(bucket, bucket.mean));
        let lower: Vec<(f64, f64)> = match colour.checked_sub(1) {
            Some(below) => curves[below]
                .iter()
                .map(|bucket| at(bucket, bucket.mean))
                .collect(),
            None => curve.iter().map(|bucket| at(bucket, 0.0)).collect(),
        };
        let area = outline(upper.chain(lower.into_iter().rev()));
        svg.push_str(&format!("<path class=\"area s{colour}\" d=\"{area}\"/>"));
    }
}

/// A round number without trailing zeros.
fn tick_label(tick: f64) -> String {
    if tick.abs() < 1e-12 {
        return "0".to_owned();
    }
    let label = short(tick);
    let end = label
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(label.len());
    let (digits, unit) = label.split_at(end);
    if !digits.contains('.') {
        return label;
    }
    format!(
        "{}{unit}",
        digits.trim_end_matches('0').trim_end_matches('.')
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chart(kind: Kind, points: Vec<(f64, f64)>) -> Chart {
        Chart {
            kind,
            series: vec![Series {
                name: "reward",
                points,
            }],
        }
    }

    #[test]
    fn a_chart_without_points_is_none() {
        assert_eq!(chart(Kind::Lines, vec![]).svg(), None);
        assert_eq!(chart(Kind::Lines, vec![(1.0, f64::NAN)]).svg(), None);
    }

    #[test]
    fn a_long_run_is_drawn_as_few_points_with_the_band_of_their_extremes() {
        let points: Vec<_> = (0..100_000)
            .map(|x| (f64::from(x), f64::from(x % 7)))
            .collect();
        let drawn = buckets(&points);
        assert_eq!(drawn.len(), POINTS_MAX);
        assert!(drawn.iter().all(|b| (b.low, b.high) == (0.0, 6.0)));
        let svg = chart(Kind::Lines, points).svg().unwrap();
        assert!(svg.contains("class=\"band s0\""));
        assert!(svg.len() < 64 << 10, "{} bytes", svg.len());
    }

    #[test]
    fn marks_are_round_and_hold_the_values_between_them() {
        let axis = Axis::linear(0.13, 0.87, 4.0);
        assert_eq!(
            axis.ticks
                .iter()
                .map(|&t| tick_label(t))
                .collect::<Vec<_>>(),
            ["0", "0.2", "0.4", "0.6", "0.8", "1"]
        );
        let one_value = Axis::linear(3.0, 3.0, 4.0);
        assert!(one_value.low < 3.0 && one_value.high > 3.0);
        let steps = Axis::within(1.0, 140.0, 6.0);
        assert_eq!((steps.low, steps.high), (1.0, 140.0));
        assert_eq!(steps.ticks.first(), Some(&25.0));
        assert_eq!(tick_label(12_000.0), "12k");
        assert_eq!(tick_label(-2.5), "-2.5");
        assert_eq!(tick_label(100.0), "100");
    }

    #[test]
    fn zero_sits_at_the_bottom_of_powers_of_ten() {
        let svg = chart(
            Kind::Logarithmic,
            vec![(1.0, 0.0), (2.0, 1e-7), (3.0, 1e-3)],
        )
        .svg()
        .unwrap();
        assert!(svg.contains(">1e-7<") && svg.contains(">1e-3<"), "{svg}");
    }

    #[test]
    fn areas_lie_on_top_of_one_another() {
        let points = vec![(1.0, 1.0), (2.0, 3.0)];
        let mut curves = vec![buckets(&points), buckets(&points)];
        stack(&mut curves);
        assert_eq!(
            curves[1].iter().map(|b| b.mean).collect::<Vec<_>>(),
            [2.0, 6.0]
        );
    }

    proptest! {
        #[test]
        fn no_values_make_a_drawing_with_coordinates_that_are_not_finite(
            values in prop::collection::vec(prop::num::f64::ANY, 0..40),
            kind in prop::sample::select(vec![
                Kind::Lines, Kind::Share, Kind::Logarithmic, Kind::Stacked,
            ]),
        ) {
            let points = values.into_iter().enumerate().map(|(x, y)| (x as f64, y)).collect();
            if let Some(svg) = chart(kind, points).svg() {
                let drawing = svg.split("<title>").next().unwrap_or("");
                prop_assert!(!drawing.contains("NaN") && !drawing.contains("inf"), "{drawing}");
            }
        }
    }
}
