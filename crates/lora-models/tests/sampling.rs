//! The choice of tokens: transformers' probabilities, laws that hold for any row, and draws that follow
//! the probabilities.

use std::path::Path;

use lora_models::{ErrorKind, Sampler, Sampling};
use proptest::prelude::*;
use serde_json::Value;

fn floats<T>(values: &Value, from: fn(f64) -> T) -> Vec<T> {
    values.as_array().unwrap().iter().map(|value| from(value.as_f64().unwrap())).collect()
}

fn setting(sampling: Sampling, name: &str, value: &Value) -> Sampling {
    let number = value.as_f64().unwrap();
    match name {
        "temperature" => sampling.temperature(number),
        "top_k" => sampling.top_k(number as usize),
        "top_p" => sampling.top_p(number),
        "min_p" => sampling.min_p(number),
        "repetition_penalty" => sampling.repetition_penalty(number),
        other => panic!("{other} is no setting"),
    }
}

/// Against transformers: tests/sampling_golden.py wrote the file.
#[test]
fn probabilities_are_those_of_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sampling.json");
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let cases = file["cases"].as_array().unwrap();
    let mut worst = 0f64;
    for case in cases {
        let row = case["row"].as_u64().unwrap() as usize;
        let logits = floats(&file["rows"][row], |value| value as f32);
        let tokens = floats(&file["tokens"][row], |value| value as u32);
        let settings = case.as_object().unwrap().iter();
        let settings: Vec<_> =
            settings.filter(|(name, _)| *name != "row" && *name != "probabilities").collect();
        let sampling = settings
            .iter()
            .fold(Sampling::default(), |sampling, (name, value)| setting(sampling, name, value));
        let found = sampling.probabilities(&logits, &tokens).unwrap();
        let expected = floats(&case["probabilities"], |value| value);
        assert_eq!(found.len(), expected.len());
        for (id, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let difference = (found - expected).abs();
            worst = worst.max(difference);
            assert!(
                difference < 1e-6 && (*found == 0.0) == (*expected == 0.0),
                "{settings:?}, token {id} of row {row}: expected {expected}, found {found}"
            );
        }
    }
    println!("{} cases, largest difference {worst:.1e}", cases.len());
}

#[test]
fn a_penalty_changes_what_greedy_takes() {
    let logits = [1.0, 3.0, 2.0, -1.0];
    let next = |sampling, tokens: &[u32]| {
        Sampler::new(sampling).unwrap().next_token(&logits, tokens).unwrap()
    };
    let greedy = Sampling::greedy();
    assert_eq!(next(greedy, &[1]), 1);
    assert_eq!(next(greedy.repetition_penalty(2.0), &[1]), 2);
    assert_eq!(next(greedy.repetition_penalty(2.0), &[0]), 1);
    // A temperature of 0 is greedy, whatever else is set.
    assert_eq!(next(greedy.temperature(0.0).top_p(0.9).seed(3), &[]), 1);
}

#[test]
fn settings_out_of_range_are_named() {
    let sampling = Sampling::default();
    for (sampling, name, found) in [
        (sampling.temperature(-1.0), "temperature", "-1"),
        (sampling.temperature(f64::NAN), "temperature", "NaN"),
        (sampling.temperature(f64::INFINITY), "temperature", "inf"),
        (sampling.top_p(1.1), "top_p", "1.1"),
        (sampling.top_p(-0.1), "top_p", "-0.1"),
        (sampling.min_p(2.0), "min_p", "2"),
        (sampling.min_p(f64::NAN), "min_p", "NaN"),
        (sampling.repetition_penalty(0.0), "repetition_penalty", "0"),
        (sampling.repetition_penalty(1e9), "repetition_penalty", "1000000000"),
    ] {
        let error = Sampler::new(sampling).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Argument { what, .. } if *what == name),
            "{error}"
        );
        let message = error.to_string();
        assert!(message.contains("expected a") && message.ends_with(&format!("found {found}")));
        assert_eq!(sampling.probabilities(&[0.0], &[]).unwrap_err().to_string(), message);
    }
}

#[test]
fn logits_that_are_no_numbers_are_errors() {
    let infinite = f32::INFINITY;
    for (logits, found) in [
        (&[0.0, f32::NAN][..], "NaN for token 1"),
        (&[infinite, 0.0], "inf for token 0"),
        (&[-infinite, -infinite], "no number"),
        (&[], "no number"),
    ] {
        for sampling in [Sampling::greedy(), Sampling::default().temperature(1.0).top_k(1)] {
            let error = Sampler::new(sampling).unwrap().next_token(logits, &[]).unwrap_err();
            assert!(error.to_string().ends_with(&format!("found {found}")), "{error}");
        }
    }
}

#[test]
fn settings_print_as_they_were_given() {
    let sampling = Sampling::default();
    assert_eq!(sampling.to_string(), "greedy");
    assert_eq!(
        sampling.seed(3).repetition_penalty(1.1).to_string(),
        "greedy, repetition_penalty 1.1"
    );
    assert_eq!(
        sampling.top_k(20).min_p(0.05).to_string(),
        "temperature 1, top_k 20, min_p 0.05, seed 0"
    );
}

/// Pearson's statistic: the sum of (counted - expected)² / expected over the tokens that can be drawn.
fn chi_square(counts: &[usize], probabilities: &[f64]) -> (f64, usize) {
    let draws = counts.iter().sum::<usize>() as f64;
    let mut statistic = 0.0;
    let mut tokens = 0;
    for (count, probability) in counts.iter().zip(probabilities) {
        if *probability == 0.0 {
            assert_eq!(*count, 0, "a token of probability 0 was drawn");
            continue;
        }
        let expected = draws * probability;
        assert!(expected > 5.0, "too few draws for the test");
        statistic += (*count as f64 - expected).powi(2) / expected;
        tokens += 1;
    }
    (statistic, tokens)
}

#[test]
fn draws_follow_the_probabilities() {
    let logits: Vec<f32> = (0..16).map(|id| ((id * 7) % 16) as f32 / 3.0).collect();
    let warm = Sampling::default().temperature(1.3);
    for (sampling, expected_tokens) in
        [(warm, 16), (warm.top_k(4), 4), (warm.top_p(0.8), 7), (warm.repetition_penalty(1.5), 16)]
    {
        let probabilities = sampling.probabilities(&logits, &[3, 9]).unwrap();
        for seed in 0..5 {
            let mut sampler = Sampler::new(sampling.seed(seed)).unwrap();
            let mut counts = [0; 16];
            for _ in 0..20_000 {
                counts[sampler.next_token(&logits, &[3, 9]).unwrap() as usize] += 1;
            }
            let (statistic, tokens) = chi_square(&counts, &probabilities);
            assert_eq!(tokens, expected_tokens, "{sampling}");
            // Mean n - 1, variance 2 (n - 1): true draws pass this in all but about one of 10,000 cases.
            let freedom = (tokens - 1) as f64;
            let limit = freedom + 5.0 * (2.0 * freedom).sqrt();
            assert!(statistic < limit, "{sampling}: seed {seed}: {statistic} of at most {limit}");
        }
    }
}

#[test]
fn a_seed_gives_its_draws_again() {
    let logits = [0.0; 50];
    let draws = |seed| -> Vec<u32> {
        let mut sampler = Sampler::new(Sampling::default().temperature(1.0).seed(seed)).unwrap();
        (0..30).map(|_| sampler.next_token(&logits, &[]).unwrap()).collect()
    };
    assert_eq!(draws(1), draws(1));
    assert_ne!(draws(1), draws(2));
}

/// The definition word by word, with a whole sort.
fn by_sorting(sampling: Settings, logits: &[f32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    let weight = |id: usize| {
        ((f64::from(logits[id]) - f64::from(logits[order[0]])) / sampling.temperature).exp()
    };
    let k = if sampling.top_k == 0 { logits.len() } else { sampling.top_k.min(logits.len()) };
    let least = logits[order[k - 1]];
    let kept: Vec<usize> = order.iter().copied().filter(|id| logits[*id] >= least).collect();
    let total: f64 = kept.iter().map(|id| weight(*id)).sum();
    let mut above = 0.0;
    let mut probabilities = vec![0.0; logits.len()];
    for (place, id) in kept.into_iter().enumerate() {
        if place > 0 && (above >= sampling.top_p * total || weight(id) < sampling.min_p) {
            break;
        }
        probabilities[id] = weight(id);
        above += weight(id);
    }
    let total: f64 = probabilities.iter().sum();
    probabilities.iter().map(|weight| weight / total).collect()
}

#[derive(Debug, Clone, Copy)]
struct Settings {
    temperature: f64,
    top_k: usize,
    top_p: f64,
    min_p: f64,
}

impl Settings {
    fn sampling(self) -> Sampling {
        Sampling::default()
            .temperature(self.temperature)
            .top_k(self.top_k)
            .top_p(self.top_p)
            .min_p(self.min_p)
    }
}

prop_compose! {
    fn settings()(
        temperature in 0.05..5.0,
        top_k in 0usize..50,
        top_p in prop_oneof![Just(0.0), Just(1.0), 0.0..1.0],
        min_p in prop_oneof![Just(0.0), Just(1.0), 0.0..1.0],
    ) -> Settings {
        Settings { temperature, top_k, top_p, min_p }
    }
}

/// Rows with ties, and with tokens that cannot be drawn.
fn row() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![
        6 => -20f32..20.0,
        2 => (-3i8..3).prop_map(f32::from),
        1 => Just(f32::NEG_INFINITY),
        1 => -1e30f32..1e30,
    ];
    prop::collection::vec(logit, 1..80)
        .prop_filter("a finite logit", |row| row.iter().any(|logit| logit.is_finite()))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn probabilities_sum_to_one_and_the_likeliest_stays(settings in settings(), logits in row()) {
        let probabilities = settings.sampling().probabilities(&logits, &[]).unwrap();
        prop_assert!(probabilities.iter().all(|p| (0.0..=1.0).contains(p)));
        prop_assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        let greedy = Sampling::greedy().probabilities(&logits, &[]).unwrap();
        let likeliest = greedy.iter().position(|p| *p == 1.0).unwrap();
        let largest = probabilities.iter().copied().fold(0.0, f64::max);
        prop_assert!(largest > 0.0 && probabilities[likeliest] == largest);
    }

    #[test]
    fn the_cuts_are_those_of_a_whole_sort(settings in settings(), logits in row()) {
        let found = settings.sampling().probabilities(&logits, &[]).unwrap();
        let expected = by_sorting(settings, &logits);
        for (found, expected) in found.iter().zip(&expected) {
            prop_assert!((found - expected).abs() < 1e-9, "{found:?} {expected:?}");
        }
    }

    #[test]
    fn settings_that_cut_nothing_cut_nothing(temperature in 0.1..5.0, logits in row()) {
        let plain = Sampling::default().temperature(temperature);
        let open = plain.top_k(0).top_p(1.0).min_p(0.0).repetition_penalty(1.0);
        let tokens: Vec<u32> = (0..logits.len() as u32).collect();
        prop_assert_eq!(
            open.probabilities(&logits, &tokens).unwrap(),
            plain.probabilities(&logits, &[]).unwrap()
        );
    }

    #[test]
    fn top_k_keeps_k_tokens_and_ties_with_the_last(k in 1usize..90, logits in row()) {
        let kept = Sampling::default().top_k(k).probabilities(&logits, &[]).unwrap();
        let mut sorted = logits.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let least = sorted[k.min(sorted.len()) - 1];
        for (logit, probability) in logits.iter().zip(kept) {
            // Far below the likeliest, a probability is 0 by rounding.
            if *logit < least || *logit > sorted[0] - 100.0 {
                prop_assert_eq!(probability > 0.0, *logit >= least);
            }
        }
    }
}
