//! How the next token is chosen from a row of logits.

use std::cmp::Ordering;
use std::fmt;

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

use crate::error::{Error, ErrorKind, Result};

/// How the next token is chosen: always the likeliest, or drawn from the model's probabilities.
///
/// The settings act on a row of logits in the order of transformers:
///
/// 1. `repetition_penalty` r: the logit of each token that the prompt or the answer holds already is
///    divided by r where it is positive and multiplied by r where it is negative.
/// 2. `temperature` T: p = softmax(logits / T).
/// 3. `top_k`: the k likeliest tokens stay, and those as likely as the last of them.
/// 4. `top_p`: of these, the likeliest stay until together they have top_p of what step 3 left.
/// 5. `min_p`: of these, each stays that is at least min_p times as likely as the likeliest.
///
/// At least one token always stays; the token is drawn from those that do. Among equally likely tokens
/// a lower id comes first.
///
/// Nothing is drawn (greedy) until a temperature, `top_k`, `top_p` or `min_p` is set, nor at a temperature of
/// 0; the temperature is 1 where another of them is set alone. `repetition_penalty` acts on both.
///
/// ```
/// use lora_models::Sampling;
///
/// let sampling = Sampling::default().temperature(0.7).top_p(0.9).seed(1);
/// sampling.check()?;
/// assert_eq!(sampling.to_string(), "temperature 0.7, top_p 0.9, seed 1");
/// assert!(Sampling::default().is_greedy());
/// # Ok::<(), lora_models::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sampling {
    temperature: Option<f64>,
    top_k: Option<usize>,
    top_p: Option<f64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
    seed: u64,
}

impl Sampling {
    /// The likeliest token always: the default.
    pub fn greedy() -> Self {
        Self::default()
    }

    /// Divides the logits, at least 0: below 1 is safer than the model, above 1 wilder, 0 is greedy.
    pub fn temperature(self, temperature: f64) -> Self {
        Self { temperature: Some(temperature), ..self }
    }

    /// How many of the likeliest tokens stay; 0 is all.
    pub fn top_k(self, top_k: usize) -> Self {
        Self { top_k: Some(top_k), ..self }
    }

    /// How much of the probability stays, 0 to 1; 1 is all.
    pub fn top_p(self, top_p: f64) -> Self {
        Self { top_p: Some(top_p), ..self }
    }

    /// How likely a token must be as a part of the likeliest one, 0 to 1; 0 is not at all.
    pub fn min_p(self, min_p: f64) -> Self {
        Self { min_p: Some(min_p), ..self }
    }

    /// Above 1, what was written before becomes less likely; 1 changes nothing, below 1 repeats. 0.01 to 100.
    pub fn repetition_penalty(self, penalty: f64) -> Self {
        Self { repetition_penalty: Some(penalty), ..self }
    }

    /// The same seed draws the same tokens; 0 by default.
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// For one row of a batch: the same settings, another seed for every row but the first.
    pub(crate) fn for_row(self, row: usize) -> Self {
        Self { seed: self.seed.wrapping_add(row as u64), ..self }
    }

    /// Whether the likeliest token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature_drawn_at().is_none()
    }

    /// Checks the settings, which is worth doing before a model is loaded.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`] with the name of the first setting that is out of its range.
    pub fn check(&self) -> Result<()> {
        let (any, part) = ("a finite number of at least 0", "a number of 0 to 1");
        let ranges = [
            ("temperature", self.temperature, 0.0, f64::MAX, any),
            ("top_p", self.top_p, 0.0, 1.0, part),
            ("min_p", self.min_p, 0.0, 1.0, part),
            // Farther out, logits could overflow; nobody means it.
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "a number of 0.01 to 100"),
        ];
        for (what, value, least, most, expected) in ranges {
            if let Some(value) = value.filter(|value| !(least..=most).contains(value)) {
                return Err(argument(what, expected, value.to_string()));
            }
        }
        Ok(())
    }

    /// The probability with which each token is drawn, in the order of `logits`. `tokens` is what was
    /// written so far, the prompt included; ids that have no logit do not count.
    ///
    /// # Errors
    /// When a setting is out of its range; when a logit is NaN or +inf; when none is finite.
    ///
    /// ```
    /// use lora_models::Sampling;
    ///
    /// let logits = [3f32.ln(), 0.0, 0.0];
    /// assert_eq!(Sampling::greedy().probabilities(&logits, &[])?, [1.0, 0.0, 0.0]);
    /// let drawn = Sampling::default().temperature(1.0).probabilities(&logits, &[])?;
    /// assert!((drawn[0] - 0.6).abs() < 1e-7 && (drawn[2] - 0.2).abs() < 1e-7);
    /// # Ok::<(), lora_models::Error>(())
    /// ```
    pub fn probabilities(&self, logits: &[f32], tokens: &[u32]) -> Result<Vec<f64>> {
        self.check()?;
        let mut room = Room::default();
        match self.choose(logits, tokens, &mut room)? {
            Choice::Token(token) => {
                Ok((0..logits.len()).map(|id| if id == token { 1.0 } else { 0.0 }).collect())
            }
            Choice::Draw { total } => {
                Ok(room.weights.iter().map(|weight| weight / total).collect())
            }
        }
    }

    /// `None` is greedy.
    fn temperature_drawn_at(&self) -> Option<f64> {
        let cuts = self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some();
        self.temperature.or(cuts.then_some(1.0)).filter(|temperature| *temperature != 0.0)
    }

    /// The settings were checked.
    fn choose(&self, logits: &[f32], tokens: &[u32], room: &mut Room) -> Result<Choice> {
        let mut row = logits;
        if let Some(penalty) = self.repetition_penalty.filter(|penalty| *penalty != 1.0) {
            penalise(logits, tokens, penalty as f32, &mut room.logits);
            row = &room.logits;
        }
        let likeliest = likeliest(row)?;
        let Some(temperature) = self.temperature_drawn_at() else {
            return Ok(Choice::Token(likeliest));
        };

        let least = match self.top_k {
            Some(k) if (1..row.len()).contains(&k) => nth_largest(row, k, &mut room.sorted),
            _ => f32::NEG_INFINITY,
        };
        let largest = f64::from(row[likeliest]);
        room.weights.clear();
        room.weights.extend(row.iter().map(|logit| match *logit >= least {
            true => ((f64::from(*logit) - largest) / temperature).exp(),
            false => 0.0,
        }));
        if let Some(top_p) = self.top_p.filter(|top_p| *top_p < 1.0) {
            keep_likeliest(&mut room.weights, top_p, &mut room.undecided);
        }
        if let Some(min_p) = self.min_p {
            // The likeliest token's weight is 1.
            room.weights
                .iter_mut()
                .filter(|weight| **weight < min_p)
                .for_each(|weight| *weight = 0.0);
        }
        Ok(Choice::Draw { total: room.weights.iter().sum() })
    }
}

impl fmt::Display for Sampling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.temperature_drawn_at() {
            None => write!(f, "greedy")?,
            Some(temperature) => write!(f, "temperature {temperature}")?,
        }
        if !self.is_greedy() {
            if let Some(top_k) = self.top_k {
                write!(f, ", top_k {top_k}")?;
            }
            for (name, value) in [("top_p", self.top_p), ("min_p", self.min_p)] {
                if let Some(value) = value {
                    write!(f, ", {name} {value}")?;
                }
            }
        }
        if let Some(penalty) = self.repetition_penalty {
            write!(f, ", repetition_penalty {penalty}")?;
        }
        if !self.is_greedy() {
            write!(f, ", seed {}", self.seed)?;
        }
        Ok(())
    }
}

/// Chooses tokens one after the other, as a [`Sampling`] says.
///
/// ```
/// use lora_models::{Sampler, Sampling};
///
/// let logits = [0.0, 2.0, 1.0]; // of a vocabulary of 3
/// let mut sampler = Sampler::new(Sampling::default().temperature(0.5).top_k(2).seed(7))?;
/// let tokens = vec![0];
/// let next = sampler.next_token(&logits, &tokens)?;
/// assert!(next == 1 || next == 2);
/// # Ok::<(), lora_models::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    rng: Xoshiro256PlusPlus,
    room: Room,
}

impl Sampler {
    /// A sampler at the start of its seed's draws.
    ///
    /// # Errors
    /// When a setting is out of its range.
    pub fn new(sampling: Sampling) -> Result<Self> {
        sampling.check()?;
        let rng = Xoshiro256PlusPlus::seed_from_u64(sampling.seed);
        Ok(Self { sampling, rng, room: Room::default() })
    }

    /// The next token, given its row of logits and what was written so far, the prompt included.
    ///
    /// # Errors
    /// When a logit is NaN or +inf, or none is finite: the model has come apart.
    pub fn next_token(&mut self, logits: &[f32], tokens: &[u32]) -> Result<u32> {
        let index = match self.sampling.choose(logits, tokens, &mut self.room)? {
            Choice::Token(token) => token,
            Choice::Draw { total } => draw(&self.room.weights, self.rng.random::<f64>() * total),
        };
        Ok(index as u32)
    }
}

/// What a row of logits comes to.
enum Choice {
    Token(usize),
    /// In proportion to the room's weights, which have this sum.
    Draw {
        total: f64,
    },
}

/// Memory that is used again for every token; each is as long as the vocabulary.
#[derive(Debug, Clone, Default)]
struct Room {
    logits: Vec<f32>,
    sorted: Vec<f32>,
    weights: Vec<f64>,
    undecided: Vec<(f64, usize)>,
}

/// The first of the largest.
fn likeliest(logits: &[f32]) -> Result<usize> {
    let expected = "numbers or -inf, and at least one number";
    let (mut best, mut largest) = (None, f32::NEG_INFINITY);
    for (index, logit) in logits.iter().enumerate() {
        if logit.is_nan() || *logit == f32::INFINITY {
            return Err(argument("logits", expected, format!("{logit} for token {index}")));
        }
        if *logit > largest {
            (best, largest) = (Some(index), *logit);
        }
    }
    best.ok_or_else(|| argument("logits", expected, "no number".to_owned()))
}

fn penalise(logits: &[f32], tokens: &[u32], penalty: f32, penalised: &mut Vec<f32>) {
    penalised.clear();
    penalised.extend_from_slice(logits);
    for token in tokens {
        let index = *token as usize;
        // From the logit as it came, so that a token that stands there twice is not penalised twice.
        if let (Some(logit), Some(place)) = (logits.get(index), penalised.get_mut(index)) {
            *place = if *logit < 0.0 { logit * penalty } else { logit / penalty };
        }
    }
}

/// The value at place `n`, from 1, of the row in descending order.
fn nth_largest(row: &[f32], n: usize, sorted: &mut Vec<f32>) -> f32 {
    sorted.clear();
    sorted.extend_from_slice(row);
    *sorted.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1
}

/// Sets the weight of each token to 0 above which, in descending order, there is at least `top_p` of
/// the whole.
///
/// Sorting a vocabulary takes many times as long as the rest, and only one place in the order is of
/// interest. So the weights, which are at most 1, are first counted by their power of two: that leaves
/// the few tokens of one power undecided, which are halved around their median.
fn keep_likeliest(weights: &mut [f64], top_p: f64, undecided: &mut Vec<(f64, usize)>) {
    let mut mass = [0f64; POWERS];
    for weight in weights.iter() {
        mass[power(*weight)] += weight;
    }
    let mut wanted = top_p * mass.iter().sum::<f64>();
    let last = mass.iter().rposition(|mass| *mass > 0.0).unwrap_or(0);
    let mut split = 0;
    while split < last && mass[split] < wanted {
        wanted -= mass[split];
        split += 1;
    }

    undecided.clear();
    undecided.extend(
        weights
            .iter()
            .enumerate()
            .filter(|(_, weight)| power(**weight) == split)
            .map(|(index, weight)| (*weight, index)),
    );
    // All before `low` stay, and what is at `low`; nothing from `high` on does.
    let (mut low, mut high) = (0, undecided.len());
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        undecided[low..high].select_nth_unstable_by(middle - low, descending);
        let above: f64 = undecided[low..middle].iter().map(|(weight, _)| weight).sum();
        if above < wanted {
            wanted -= above;
            low = middle;
        } else {
            high = middle;
        }
    }
    let cut = undecided[low];
    for (index, weight) in weights.iter_mut().enumerate() {
        if descending(&(*weight, index), &cut) == Ordering::Greater {
            *weight = 0.0;
        }
    }
}

/// One for each power of two that a normal f64 of at most 1 can have, and one for 0 and what is next to it.
const POWERS: usize = 1024;

/// 0 for 1, 1 for what is at least 1/2, and so on.
fn power(weight: f64) -> usize {
    const EXPONENT_OF_ONE: usize = 1023;
    EXPONENT_OF_ONE - (weight.to_bits() >> 52) as usize
}

fn descending(a: &(f64, usize), b: &(f64, usize)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The token at which the running sum of the weights passes `point`.
fn draw(weights: &[f64], point: f64) -> usize {
    let mut left = point;
    let mut last = 0;
    for (index, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        left -= weight;
        last = index;
        if left < 0.0 {
            break;
        }
    }
    // Rounding can leave a rest after the last token that can be drawn.
    last
}

fn argument(what: &'static str, expected: &str, found: String) -> Error {
    ErrorKind::Argument { what, expected: expected.to_owned(), found }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equal_logits_is_the_likeliest() {
        assert_eq!(likeliest(&[0.0, 3.0, 3.0, -1.0]).unwrap(), 1);
        assert_eq!(likeliest(&[f32::NEG_INFINITY, -9.0]).unwrap(), 1);
    }

    #[test]
    fn a_point_falls_on_the_token_whose_part_of_the_sum_holds_it() {
        let weights = [0.0, 1.0, 0.0, 3.0, 0.0];
        for (point, token) in [(0.0, 1), (0.9, 1), (1.0, 3), (3.9, 3), (4.0, 3), (5.0, 3)] {
            assert_eq!(draw(&weights, point), token, "{point}");
        }
    }

    #[test]
    fn a_token_that_was_written_twice_is_penalised_once() {
        let mut penalised = Vec::new();
        penalise(&[6.0, -6.0, 6.0, 0.0], &[0, 1, 0, 3, 99], 2.0, &mut penalised);
        assert_eq!(penalised, [3.0, -12.0, 6.0, 0.0]);
    }

    #[test]
    fn weights_fall_into_their_powers_of_two() {
        for (weight, expected) in [
            (1.0, 0),
            (0.999, 1),
            (0.5, 1),
            (0.499, 2),
            (f64::MIN_POSITIVE, 1022),
            (1e-310, 1023),
            (0.0, 1023),
        ] {
            assert_eq!(power(weight), expected, "{weight}");
            assert!(power(weight) < POWERS);
        }
    }
}
