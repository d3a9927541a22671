//! What the choice of one token costs, for a vocabulary of 151,936 tokens (Qwen's).
//!
//! ```text
//! cargo bench --bench sampling
//! ```

use divan::{Bencher, black_box};
use lora_models::{Sampler, Sampling};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

const VOCABULARY: usize = 151_936;

fn main() {
    divan::main();
}

/// Few tokens have nearly all of the probability, as in a model's answer; or all have about as much.
fn logits(steep: bool) -> Vec<f32> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(5);
    let mut row: Vec<f32> = (0..VOCABULARY).map(|_| rng.random::<f32>() * 8.0 - 4.0).collect();
    if steep {
        for place in 0..40 {
            row[place * 3_700] = 22.0 - place as f32 / 4.0;
        }
    } else {
        row.iter_mut().for_each(|logit| *logit /= 40.0);
    }
    row
}

#[divan::bench(args = ["greedy", "penalty", "temperature", "top_k", "top_p", "min_p", "all"])]
fn steep(bencher: Bencher, settings: &str) {
    measure(bencher, settings, &logits(true));
}

#[divan::bench(args = ["top_k", "top_p", "all"])]
fn flat(bencher: Bencher, settings: &str) {
    measure(bencher, settings, &logits(false));
}

fn measure(bencher: Bencher, settings: &str, logits: &[f32]) {
    let sampling = Sampling::default();
    let sampling = match settings {
        "greedy" => sampling,
        "penalty" => sampling.repetition_penalty(1.1),
        "temperature" => sampling.temperature(0.7),
        "top_k" => sampling.top_k(50),
        "top_p" => sampling.top_p(0.9),
        "min_p" => sampling.min_p(0.05),
        _ => sampling.temperature(0.7).top_k(50).top_p(0.9).min_p(0.05).repetition_penalty(1.1),
    };
    let mut sampler = Sampler::new(sampling).expect("the settings are in range");
    let tokens: Vec<u32> = (0..2_000).map(|place| place * 70).collect();
    bencher.bench_local(|| sampler.next_token(black_box(logits), &tokens));
}
