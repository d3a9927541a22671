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
//! frozen layer of the same rounds, once by the clock (the fastest round, the median) and once by the
//! median processor time of all threads, which other programs disturb least. With
//! `RAYON_NUM_THREADS=1` the latter is the work alone.

use std::fmt;
use std::time::Instant;

use burn::module::{Lora, Module};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Distribution, Tensor};
use cpu_time::ProcessTime;
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
#[allow(clippy::large_enum_variant)] // a handful of layers
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
        println!("\n{pass:<40} fastest   median  processor");
        for group in groups(pass) {
            let base = group.base();
            let _ = base.weight.val(); // one weight for all the layers
            let cases: Vec<_> = adapters().map(|adapter| Case { adapter, ..group }).collect();
            let steps: Vec<_> = cases.iter().map(|case| case.step(base.clone())).collect();
            let times = in_turn(&steps);
            for (case, time) in cases.iter().zip(&times) {
                let name = case.to_string();
                if case.adapter.is_none() {
                    let [fastest, median, processor] = time;
                    println!("{name:<40} {fastest:>7.1}  {median:>7.1}  {processor:>9.1} ms");
                } else {
                    let [fastest, median, processor] =
                        [0, 1, 2].map(|i| 100.0 * (time[i] / times[0][i] - 1.0));
                    println!("{name:<40} {fastest:>+7.1}  {median:>+7.1}  {processor:>+9.1} %");
                }
            }
        }
    }
}

/// For each step its fastest time, its median time and its median processor time, in ms.
fn in_turn(steps: &[Box<dyn Fn()>]) -> Vec<[f64; 3]> {
    let mut clock = vec![Vec::new(); steps.len()];
    let mut processor = clock.clone();
    for step in steps {
        step(); // warm-up
    }
    for round in 0..ROUNDS {
        for turn in 0..steps.len() {
            // Forwards and backwards, each time from another start: none is always first, or always
            // follows the same one.
            let place = if round % 2 == 0 { turn } else { steps.len() - 1 - turn };
            let i = (round + place) % steps.len();
            let start = (Instant::now(), ProcessTime::now());
            steps[i]();
            clock[i].push(start.0.elapsed().as_secs_f64() * 1e3);
            processor[i].push(start.1.elapsed().as_secs_f64() * 1e3);
        }
    }
    clock
        .into_iter()
        .zip(processor)
        .map(|(mut clock, mut processor)| {
            clock.sort_by(f64::total_cmp);
            processor.sort_by(f64::total_cmp);
            [clock[0], clock[ROUNDS / 2], processor[ROUNDS / 2]]
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
