//! What an adapter costs in time: one layer and 512 rows, forward and backward with the input's
//! gradient, as inside a network; and forward alone.
//!
//! ```text
//! cargo bench --bench lora_linear              # both tables, some minutes
//! cargo bench --bench lora_linear -- ratios    # the second table alone
//! cargo bench --bench lora_linear -- forward_backward
//! ```
//!
//! The first table is divan's: one layer after the other. Times on a shared machine wander by more
//! than an adapter costs, so the second table measures each layer next to the one that it is compared
//! with, by turns before and behind it: the frozen layer, or for DoRA LoRA of the same rank. It gives the
//! ratio of the two fastest times, the median ratio of neighbours, and that of their processor times (of
//! all threads), which other programs disturb least. With `RAYON_NUM_THREADS=1` the latter is the work
//! alone.

use std::fmt;
use std::time::Instant;

use burn::module::{Lora, Module};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Distribution, Tensor};
use cpu_time::ProcessTime;
use divan::{Bencher, black_box};
use lora_core::{FrozenLinear, LoraConfig, LoraLinear};

const SIZES: [usize; 2] = [2048, 4096]; // d_input = d_output
const INPUTS: [&[usize]; 2] = [&[512], &[4, 128]]; // the axes before d_input
const RANKS: [usize; 3] = [8, 16, 64];
const ADAPTERS: [Adapter; 3] = [Adapter::Lora, Adapter::Dora, Adapter::Burn];

/// Rounds of the second table.
const ROUNDS: usize = 15;

/// What stands on the frozen layer.
#[derive(Clone, Copy, PartialEq)]
enum Adapter {
    /// This library's.
    Lora,
    /// This library's with DoRA's magnitudes.
    Dora,
    /// Burn's own, which adds A·B to the weight at every forward.
    Burn,
}

#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    ForwardBackward,
}

/// A layer under measurement.
#[allow(clippy::large_enum_variant)] // one at a time
enum Layer {
    Frozen(FrozenLinear),
    Lora(LoraLinear),
    Burn(Linear),
}

impl Layer {
    fn new(base: Linear, adapter: Option<(Adapter, usize)>) -> Self {
        match adapter {
            None => Self::Frozen(FrozenLinear::new(base)),
            Some((Adapter::Lora, rank)) => {
                Self::Lora(LoraLinear::wrap(base, rank, 2.0 * rank as f64).unwrap())
            }
            Some((Adapter::Dora, rank)) => {
                let config = LoraConfig { dora: true, ..LoraConfig::new(rank, 2.0 * rank as f64) };
                let config = config.resolve("").unwrap();
                Self::Lora(LoraLinear::with_config(base, &config).unwrap())
            }
            Some((Adapter::Burn, rank)) => {
                Self::Burn(base.apply_lora(Lora::new(rank, 2.0 * rank as f64)))
            }
        }
    }

    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Frozen(layer) => layer.forward(x),
            Self::Lora(layer) => layer.forward(x),
            Self::Burn(layer) => layer.forward(x),
        }
    }
}

/// One line of the tables.
#[derive(Clone, Copy)]
struct Case {
    pass: Pass,
    d: usize,
    rows: &'static [usize],
    adapter: Option<(Adapter, usize)>,
}

impl Case {
    /// The layer to be frozen.
    fn base(self) -> Linear {
        let device = match self.pass {
            Pass::Forward => Device::flex(),
            Pass::ForwardBackward => Device::flex().autodiff(),
        };
        LinearConfig::new(self.d, self.d).with_bias(false).init(&device)
    }

    /// What is timed: one pass over a random input.
    fn step(self, base: Linear) -> Box<dyn Fn()> {
        match *self.rows {
            [rows] => self.step_of([rows, self.d], base),
            [batch, rows] => self.step_of([batch, rows, self.d], base),
            _ => unreachable!("INPUTS has one or two axes before d_input"),
        }
    }

    fn step_of<const D: usize>(self, shape: [usize; D], base: Linear) -> Box<dyn Fn()> {
        let device = base.weight.device();
        let x = Tensor::<D>::random(shape, Distribution::Normal(0.0, 1.0), &device);
        let layer = Layer::new(base, self.adapter);
        match self.pass {
            Pass::Forward => Box::new(move || drop(black_box(layer.forward(x.clone())))),
            // From y itself, so that its gradient is a tensor of ones and no loss is timed.
            Pass::ForwardBackward => {
                let x = x.require_grad();
                Box::new(move || drop(black_box(layer.forward(x.clone()).backward())))
            }
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape = self.rows.iter().chain([&self.d]).map(usize::to_string).collect::<Vec<_>>();
        let shape = format!("[{}]", shape.join(", "));
        match self.adapter {
            None => write!(f, "{shape:<14} frozen"),
            Some((adapter, rank)) => write!(f, "{shape:<14} {adapter}, rank {rank}"),
        }
    }
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Forward => "forward",
            Self::ForwardBackward => "forward and backward",
        })
    }
}

impl fmt::Display for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Lora => "LoraLinear",
            Self::Dora => "with DoRA",
            Self::Burn => "apply_lora",
        })
    }
}

/// The layers of one comparison, the frozen one first.
fn adapters() -> impl Iterator<Item = Option<(Adapter, usize)>> {
    let pairs = ADAPTERS.into_iter().flat_map(|adapter| RANKS.map(|rank| (adapter, rank)));
    [None].into_iter().chain(pairs.map(Some))
}

fn groups(pass: Pass) -> impl Iterator<Item = Case> {
    let sizes = SIZES.into_iter().flat_map(|d| INPUTS.map(|rows| (d, rows)));
    sizes.map(move |(d, rows)| Case { pass, d, rows, adapter: None })
}

fn cases(pass: Pass) -> impl Iterator<Item = Case> {
    groups(pass).flat_map(|case| adapters().map(move |adapter| Case { adapter, ..case }))
}

#[divan::bench(args = cases(Pass::Forward), sample_count = 10, sample_size = 1)]
fn forward(bencher: Bencher, case: Case) {
    bencher.bench_local(case.step(case.base()));
}

#[divan::bench(args = cases(Pass::ForwardBackward), sample_count = 10, sample_size = 1)]
fn forward_backward(bencher: Bencher, case: Case) {
    bencher.bench_local(case.step(case.base()));
}

/// The second table.
fn ratios() {
    println!("\nTime beyond the other layer's, next to which each is measured {ROUNDS} times");
    for pass in [Pass::Forward, Pass::ForwardBackward] {
        println!("\n{pass:<40} over         fastest   median  processor");
        for group in groups(pass) {
            let base = group.base();
            let _ = base.weight.val(); // one weight for all the layers
            let cases: Vec<_> = adapters().map(|adapter| Case { adapter, ..group }).collect();
            let steps: Vec<_> = cases.iter().map(|case| case.step(base.clone())).collect();
            // Where the layer stands with which each is compared.
            let others: Vec<usize> = cases
                .iter()
                .map(|case| match case.adapter {
                    Some((Adapter::Dora, rank)) => {
                        let lora = |case: &Case| case.adapter == Some((Adapter::Lora, rank));
                        cases.iter().position(lora).unwrap_or(0)
                    }
                    _ => 0,
                })
                .collect();
            let pairs = in_pairs(&steps, &others);
            for ((case, other), pairs) in cases.iter().zip(&others).zip(&pairs) {
                let name = case.to_string();
                if case.adapter.is_none() {
                    let times: Vec<f64> = pairs.iter().map(|pair| pair.clock[0] * 1e3).collect();
                    let (fastest, median) = (fastest(&times), median(times));
                    println!("{name:<40} {:<10} {fastest:>9.1}  {median:>7.1}             ms", "");
                    continue;
                }
                let [own, its]: [Vec<f64>; 2] =
                    [0, 1].map(|i| pairs.iter().map(|pair| pair.clock[i]).collect());
                let of = |ratio: fn(&Pair) -> f64| median(pairs.iter().map(ratio).collect());
                let [fastest, median, processor] = [
                    fastest(&own) / fastest(&its),
                    of(|pair| pair.clock[0] / pair.clock[1]),
                    of(|pair| pair.processor[0] / pair.processor[1]),
                ]
                .map(|ratio| 100.0 * (ratio - 1.0));
                let over = cases[*other]
                    .adapter
                    .map_or("frozen".to_owned(), |(adapter, _)| adapter.to_string());
                println!(
                    "{name:<40} {over:<10} {fastest:>+9.1}  {median:>+7.1}  {processor:>+9.1} %"
                );
            }
        }
    }
}

/// Seconds of a step, and of the other one next to it.
struct Pair {
    clock: [f64; 2],
    processor: [f64; 2],
}

/// The times of each step next to the one of which `others` has the place.
fn in_pairs(steps: &[Box<dyn Fn()>], others: &[usize]) -> Vec<Vec<Pair>> {
    let timed = |step: &dyn Fn()| {
        let start = (Instant::now(), ProcessTime::now());
        step();
        (start.0.elapsed().as_secs_f64(), start.1.elapsed().as_secs_f64())
    };
    for step in steps {
        step(); // warm-up
    }
    let mut pairs: Vec<Vec<Pair>> = steps.iter().map(|_| Vec::new()).collect();
    for round in 0..ROUNDS {
        for (i, &other) in others.iter().enumerate() {
            let (own, its);
            if round % 2 == 0 {
                (own, its) = (timed(&steps[i]), timed(&steps[other]));
            } else {
                let first = timed(&steps[other]);
                (own, its) = (timed(&steps[i]), first);
            }
            pairs[i].push(Pair { clock: [own.0, its.0], processor: [own.1, its.1] });
        }
    }
    pairs
}

fn fastest(times: &[f64]) -> f64 {
    times.iter().copied().fold(f64::INFINITY, f64::min)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    divan::main();
    // Cargo gives `--bench` to a benchmark, and not under `cargo test`.
    let options: Vec<String> = std::env::args().skip(1).collect();
    let mut filters = options.iter().filter(|option| !option.starts_with('-')).peekable();
    let chosen = filters.peek().is_none() || filters.any(|filter| "ratios".contains(&**filter));
    let measures = options.iter().any(|option| option == "--bench");
    let lists = options.iter().any(|option| option == "--list");
    if measures && chosen && !lists {
        ratios();
    }
}
