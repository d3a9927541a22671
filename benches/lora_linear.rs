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
//! than an adapter costs, so the second table measures the layers in turn and compares each with the
//! frozen layer of the same rounds.

use std::fmt;
use std::time::Instant;

use burn::module::{Lora, Module};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Distribution, Tensor};
use divan::{Bencher, black_box};
use lora_core::{FrozenLinear, LoraLinear};

const SIZES: [usize; 2] = [2048, 4096]; // d_input = d_output
const INPUTS: [&[usize]; 2] = [&[512], &[4, 128]]; // the axes before d_input
const RANKS: [usize; 3] = [8, 16, 64];
const ADAPTERS: [Adapter; 2] = [Adapter::Lora, Adapter::Burn];

/// Rounds of the second table.
const ROUNDS: usize = 15;

/// What stands on the frozen layer.
#[derive(Clone, Copy, PartialEq)]
enum Adapter {
    /// This library's.
    Lora,
    /// Burn's own, which adds A·B to the weight at every forward.
    Burn,
}

#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    ForwardBackward,
}

/// A layer under measurement.
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
    /// A layer to be frozen.
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
    println!("\nTime beyond the frozen layer's: {ROUNDS} rounds of all the layers in turn");
    for pass in [Pass::Forward, Pass::ForwardBackward] {
        println!("\n{pass:<40} fastest   median");
        for group in groups(pass) {
            let base = group.base();
            let _ = base.weight.val(); // one weight for all the layers
            let steps: Vec<_> = adapters()
                .map(|adapter| Case { adapter, ..group })
                .map(|case| (case, case.step(base.clone())))
                .collect();
            let times = in_turn(&steps.iter().map(|(_, step)| &**step).collect::<Vec<_>>());
            for ((case, _), time) in steps.iter().zip(&times) {
                let name = case.to_string();
                match case.adapter {
                    None => println!("{name:<40} {:>7.1}  {:>7.1} ms", time[0], time[1]),
                    Some(_) => {
                        let [fastest, median] =
                            [0, 1].map(|i| 100.0 * (time[i] / times[0][i] - 1.0));
                        println!("{name:<40} {fastest:>+7.1}  {median:>+7.1} %");
                    }
                }
            }
        }
    }
}

/// The fastest and the median time of each step, in ms.
fn in_turn(steps: &[&dyn Fn()]) -> Vec<[f64; 2]> {
    let mut times = vec![Vec::new(); steps.len()];
    for round in 0..=ROUNDS {
        for turn in 0..steps.len() {
            // Another one first each time, so that none always follows the same.
            let i = (round + turn) % steps.len();
            let start = Instant::now();
            steps[i]();
            times[i].push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    times
        .into_iter()
        .map(|mut times| {
            times.remove(0); // warm-up
            times.sort_by(f64::total_cmp);
            [times[0], times[times.len() / 2]]
        })
        .collect()
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
