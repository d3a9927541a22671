//! The starting values of A and B.

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Normal, Uniform};

use crate::problem::ConfigProblem;

/// How A `[d_input, rank]` (the down matrix, which x meets first) and B `[rank, d_output]` (the up
/// matrix) start. One of the two is always zero, so that an adapted layer begins as its base.
///
/// Values come from a generator on the host, so that every backend starts from the same numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// B ~ N(0, std²), A = 0, the default, with std = 1/sqrt(rank) where none is given:
    /// the up matrix is random and the down matrix is zero.
    GaussianB {
        /// Standard deviation of B.
        std: Option<f64>,
    },
    /// A ~ N(0, std²), B = 0, with std = 1/rank where none is given (PEFT's `"gaussian"`), as in the
    /// paper ([arXiv:2106.09685](https://arxiv.org/abs/2106.09685)): the down matrix is random and
    /// the up matrix is zero.
    GaussianA {
        /// Standard deviation of A.
        std: Option<f64>,
    },
    /// A ~ U(-1/sqrt(d_input), 1/sqrt(d_input)), B = 0: what PEFT does unless told otherwise.
    KaimingUniformA,
    /// (placeholder until merged)
    Pissa {
        /// n
        iterations: Option<usize>,
    },
    /// (placeholder until merged)
    Olora,
}

impl Default for Init {
    fn default() -> Self {
        Self::GaussianB { std: None }
    }
}

impl Init {
    /// What is wrong with the number in it, if anything is.
    pub(crate) fn problem(self) -> Option<ConfigProblem> {
        match self {
            Self::GaussianB { std: Some(std) } | Self::GaussianA { std: Some(std) }
                if !(std > 0.0 && (std as f32).is_finite()) =>
            {
                Some(ConfigProblem::setting("init std", "a finite number above 0", std))
            }
            _ => None,
        }
    }

    pub(crate) fn start(
        self,
        _w: &Tensor<2>,
        dims: [usize; 3],
        _s: f64,
        seed: u64,
        options: (&Device, DType),
    ) -> crate::error::Result<Start> {
        let (a, b) = self.draw(dims, seed, options);
        Ok(Start { a, b, offset: None })
    }
    pub(crate) fn needs_weight(self) -> bool {
        false
    }

    /// Draws A `[d_input, rank]` and B `[rank, d_output]` in f32 and rounds them to the dtype; the
    /// same seed gives the same values.
    pub(crate) fn draw(
        self,
        [d_input, rank, d_output]: [usize; 3],
        seed: u64,
        options: (&Device, DType),
    ) -> (Tensor<2>, Tensor<2>) {
        let (shape_a, shape_b) = ([d_input, rank], [rank, d_output]);
        let rank = rank as f64;
        match self {
            Self::GaussianB { std } => {
                let normal = gaussian(std.unwrap_or(1.0 / rank.sqrt()));
                (Tensor::zeros(shape_a, options), random(shape_b, normal, seed, options))
            }
            Self::GaussianA { std } => {
                let normal = gaussian(std.unwrap_or(1.0 / rank));
                (random(shape_a, normal, seed, options), Tensor::zeros(shape_b, options))
            }
            Self::Pissa { .. } | Self::Olora => unreachable!(),
            Self::KaimingUniformA => {
                let bound = 1.0 / (d_input as f32).sqrt();
                let uniform = Uniform::new(-bound, bound).expect("the bound is finite and above 0");
                (random(shape_a, uniform, seed, options), Tensor::zeros(shape_b, options))
            }
        }
    }
}

pub(crate) struct Start {
    pub a: Tensor<2>,
    pub b: Tensor<2>,
    pub offset: Option<(Tensor<2>, Tensor<2>)>,
}

/// A fresh seed, for layers that are wrapped without one.
pub(crate) fn fresh_seed() -> u64 {
    rand::rng().random()
}

fn gaussian(std: f64) -> Normal<f32> {
    Normal::new(0.0, std as f32).expect("the standard deviation was checked to be finite")
}

fn random(
    shape: [usize; 2],
    distribution: impl Distribution<f32>,
    seed: u64,
    options: (&Device, DType),
) -> Tensor<2> {
    let rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let values: Vec<f32> = distribution.sample_iter(rng).take(shape[0] * shape[1]).collect();
    Tensor::from_data(TensorData::new(values, shape), options)
}
