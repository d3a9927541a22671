//! The learning rate of each step.

use serde::{Deserialize, Serialize};

/// How the learning rate goes after the warm-up, from its peak at the end of the warm-up on.
///
/// A function of the step alone: a run that is taken up again needs no state for it.
///
/// ```
/// use lora_train::Schedule;
///
/// let rate = |step| Schedule::Linear.learning_rate(1.0, step, 10, 2);
/// assert_eq!([rate(1), rate(2), rate(3), rate(7), rate(10)], [0.5, 1.0, 1.0, 0.5, 0.125]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// It stays at its peak.
    #[default]
    Constant,
    /// It falls in a straight line towards 0.
    Linear,
    /// It falls as half a cosine towards 0.
    Cosine,
}

impl Schedule {
    /// The learning rate of `step`, 1 to `steps`: up in a straight line for `warmup` steps, then as
    /// the schedule says. It would reach 0 one step after the last.
    pub fn learning_rate(self, peak: f64, step: usize, steps: usize, warmup: usize) -> f64 {
        if step < warmup {
            return peak * step as f64 / warmup as f64;
        }
        let done =
            step.saturating_sub(warmup + 1) as f64 / steps.saturating_sub(warmup).max(1) as f64;
        match self {
            Self::Constant => peak,
            Self::Linear => peak * (1.0 - done),
            Self::Cosine => peak * 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_schedule_starts_at_the_peak_and_never_rises() {
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            let rates: Vec<f64> =
                (1..=50).map(|step| schedule.learning_rate(3e-4, step, 50, 5)).collect();
            assert!(rates[..5].windows(2).all(|pair| pair[0] < pair[1]), "{schedule:?}");
            assert_eq!((rates[4], rates[5]), (3e-4, 3e-4), "{schedule:?}");
            assert!(rates[5..].windows(2).all(|pair| pair[0] >= pair[1]), "{schedule:?}");
            assert!(rates[49] > 0.0, "{schedule:?}");
        }
    }

    #[test]
    fn a_run_without_warm_up_and_one_of_warm_up_only() {
        assert_eq!(Schedule::Cosine.learning_rate(1.0, 1, 10, 0), 1.0);
        assert_eq!(Schedule::Cosine.learning_rate(1.0, 2, 2, 2), 1.0);
    }
}
