//! What trains, and how much of it there is.

use std::fmt;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;

/// How many values a model has, and how many of them train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ParameterCount {
    /// Values that get a gradient.
    pub trainable: usize,
    /// All values.
    pub total: usize,
}

impl ParameterCount {
    /// Counts a model's parameters. A model counts as it is on an autodiff device: elsewhere nothing
    /// trains.
    pub fn of<M: Module>(model: &M) -> Self {
        let mut count = Self::default();
        model.visit(&mut count);
        count
    }

    /// The trainable share, 0 to 100.
    pub fn percent(&self) -> f64 {
        100.0 * self.trainable as f64 / self.total.max(1) as f64
    }
}

impl ModuleVisitor for ParameterCount {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let values = param.shape().num_elements();
        self.total += values;
        if param.val().is_require_grad() {
            self.trainable += values;
        }
    }
}

/// `2,442,240 of 136,957,248 (1.783 %)`
impl fmt::Display for ParameterCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (trainable, total) = (grouped(self.trainable), grouped(self.total));
        write!(f, "{trainable} of {total} ({:.3} %)", self.percent())
    }
}

/// A number with a comma every three digits.
pub(crate) fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_three_digits() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1234567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
    }
}
