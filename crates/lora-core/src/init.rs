//! The starting values of A and B.

use burn::tensor::{DType, Device, Tensor, TensorData};
use faer::Mat;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Normal, Uniform};

use crate::error::{Error, Result};
use crate::linalg::{gaussian, randomised_svd, thin_qr, thin_svd, to_host, to_tensor};
use crate::problem::ConfigProblem;

/// How A `[d_input, rank]` (the down matrix, which x meets first) and B `[rank, d_output]` (the up
/// matrix) start.
///
/// A new layer computes what its base does, and its base keeps its weight to the bit. With the first
/// four the product A·B starts at zero; [`Pissa`](Self::Pissa) and [`Olora`](Self::Olora) start at a
/// piece of the weight, and what they start at is subtracted again:
///
/// ```text
/// y = x W + scaling (x A B - x A0 B0)        A0, B0: the starting values, frozen
/// ```
///
/// PEFT writes W - scaling A0 B0 over the weight instead, so that its adapters only fit that other base.
///
/// Values come from the host, so that every backend starts from the same numbers. What fine-tunings with
/// each of them gave: [`guide::starting_values`](crate::guide::starting_values).
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
    /// Neither is zero, and A·B is, to rounding: A = G E / 10 and B = Oᵀ H / 10, where E and O
    /// `[rank/2, rank]` are every other row of one random orthogonal matrix, and G `[d_input, rank/2]`
    /// and H `[rank/2, d_output]` are N(0, 1). For even ranks (PEFT's `"orthogonal"`).
    ///
    /// Both matrices get a gradient in the first step
    /// ([the author's post](https://datta0.github.io/posts/rethink-lora-init/)).
    Orthogonal,
    /// A0 = U sqrt(S/scaling), B0 = sqrt(S/scaling) Vᵀ from the `rank` largest singular values S of
    /// W = U S Vᵀ: what the adapter starts from is the best approximation of W of its rank.
    ///
    /// "PiSSA: Principal Singular Values and Singular Vectors Adaptation"
    /// ([arXiv:2404.02948](https://arxiv.org/abs/2404.02948)).
    Pissa {
        /// `None`: exact (PEFT's `"pissa"`), in time min(d_input, d_output) · d_input · d_output:
        /// about 10 s for 2048 x 2048 on one core. `Some(n)`: by a randomised method with n power
        /// iterations (PEFT's `"pissa_niter_n"`, with 10 more columns than there), in 0.2 s.
        /// Of a Gaussian 2048 x 2048 weight, whose singular values hardly fall, n = 4 leaves 0.13 %
        /// more than the best approximation of rank 16 does.
        iterations: Option<usize>,
    },
    /// A0 = Rᵀ, B0 = Qᵀ from the first `rank` columns of Q and rows of R, where Wᵀ = Q R: the rows of
    /// B0 are orthonormal. The scaling divides neither of them, as in PEFT (`"olora"`).
    ///
    /// "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models"
    /// ([arXiv:2406.01775](https://arxiv.org/abs/2406.01775)).
    Olora,
}

impl Default for Init {
    fn default() -> Self {
        Self::GaussianB { std: None }
    }
}

/// What a layer's adapter starts from.
#[derive(Debug)]
pub(crate) struct Start {
    /// A `[d_input, rank]`.
    pub(crate) a: Tensor<2>,
    /// B `[rank, d_output]`.
    pub(crate) b: Tensor<2>,
    /// A0 and B0, the same values, where A·B is not zero: scaling A0·B0 has to be subtracted.
    pub(crate) offset: Option<(Tensor<2>, Tensor<2>)>,
}

impl Init {
    /// Whether A and B are taken from the weight, so that what they start at is subtracted again and
    /// the weight has to be finite and not quantised.
    pub fn starts_from_weight(self) -> bool {
        matches!(self, Self::Pissa { .. } | Self::Olora)
    }

    /// What is wrong with the number in it, or with the rank for it, if anything is.
    pub(crate) fn problem(self, rank: usize) -> Option<ConfigProblem> {
        match self {
            Self::GaussianB { std: Some(std) } | Self::GaussianA { std: Some(std) }
                if !(std as f32 > 0.0 && (std as f32).is_finite()) =>
            {
                Some(ConfigProblem::setting("init std", "a finite number above 0", std))
            }
            Self::Orthogonal if !rank.is_multiple_of(2) => {
                let expected = "an even number for the orthogonal start";
                Some(ConfigProblem::setting("rank", expected, rank))
            }
            _ => None,
        }
    }

    /// A `[d_input, rank]` and B `[rank, d_output]` for a weight `[d_input, d_output]`, computed on the
    /// host and rounded to the dtype; the same seed gives the same values.
    ///
    /// # Errors
    /// What [`problem`](Self::problem) finds. Where the values come from the weight: when the rank is above
    /// the smaller of its sizes, or it holds NaN or infinity.
    pub(crate) fn start(
        self,
        weight: &Tensor<2>,
        rank: usize,
        scaling: f64,
        seed: u64,
        options: (&Device, DType),
    ) -> Result<Start> {
        if let Some(problem) = self.problem(rank) {
            return Err(Error::config(vec![problem]));
        }
        let [d_input, d_output] = weight.dims();
        if self.starts_from_weight() {
            check_weight(weight, rank)?;
        }
        let (shape_a, shape_b) = ([d_input, rank], [rank, d_output]);
        let (a, b) = match self {
            Self::GaussianB { std } => {
                let normal = normal(std.unwrap_or(1.0 / (rank as f64).sqrt()));
                (Tensor::zeros(shape_a, options), random(shape_b, normal, seed, options))
            }
            Self::GaussianA { std } => {
                let normal = normal(std.unwrap_or(1.0 / rank as f64));
                (random(shape_a, normal, seed, options), Tensor::zeros(shape_b, options))
            }
            Self::KaimingUniformA => {
                let bound = 1.0 / (d_input as f32).sqrt();
                let uniform = Uniform::new(-bound, bound).expect("the bound is finite and above 0");
                (random(shape_a, uniform, seed, options), Tensor::zeros(shape_b, options))
            }
            Self::Orthogonal => to_tensors(orthogonal([d_input, rank, d_output], seed), options),
            Self::Pissa { iterations } => {
                let svd = match iterations {
                    None => thin_svd(to_host(weight).as_ref())?,
                    Some(iterations) => randomised_svd(weight, rank, iterations, seed)?,
                };
                to_tensors(svd.balanced(rank, 1.0 / scaling.sqrt()), options)
            }
            Self::Olora => to_tensors(olora(&to_host(weight), rank), options),
        };
        let offset = self.starts_from_weight().then(|| (a.clone(), b.clone()));
        Ok(Start { a, b, offset })
    }
}

fn check_weight(weight: &Tensor<2>, rank: usize) -> Result<()> {
    let [d_input, d_output] = weight.dims();
    let most = d_input.min(d_output);
    if rank > most {
        let expected = format!("at most {most} to start from a weight of {d_input} x {d_output}");
        return Err(Error::setting("rank", expected, rank));
    }
    if !weight.clone().is_finite().all().into_scalar::<bool>() {
        return Err(Error::setting("weight", "finite values to start from", "NaN or infinity"));
    }
    Ok(())
}

/// A `[d_input, rank]` and B `[rank, d_output]`, with A·B = 0 because the rows of one orthogonal matrix
/// are orthogonal to each other.
fn orthogonal([d_input, rank, d_output]: [usize; 3], seed: u64) -> (Mat<f64>, Mat<f64>) {
    let half = rank / 2;
    // One draw for all three, so that they are independent.
    let draw = gaussian(rank + d_input + d_output, rank, seed);
    let (q, _) = thin_qr(draw.get(..rank, ..));
    let even = Mat::from_fn(half, rank, |row, column| q[(2 * row, column)]);
    let odd = Mat::from_fn(half, rank, |row, column| q[(2 * row + 1, column)]);
    let down = draw.get(rank..rank + d_input, ..half);
    let up = draw.get(rank + d_input.., ..half);
    (down * even * faer::Scale(0.1), odd.transpose() * up.transpose() * faer::Scale(0.1))
}

/// A = W Q `[d_input, rank]` and B = Qᵀ `[rank, d_output]`, with Q `[d_output, rank]` the first columns
/// of Q in Wᵀ = Q R. They follow from the first columns of Wᵀ alone, and A = Rᵀ since R = QᵀWᵀ.
fn olora(weight: &Mat<f64>, rank: usize) -> (Mat<f64>, Mat<f64>) {
    let (q, _) = thin_qr(weight.get(..rank, ..).transpose());
    (weight * &q, q.transpose().to_owned())
}

fn to_tensors((a, b): (Mat<f64>, Mat<f64>), options: (&Device, DType)) -> (Tensor<2>, Tensor<2>) {
    (to_tensor(a.as_ref(), options), to_tensor(b.as_ref(), options))
}

/// A fresh seed, for layers that are wrapped without one.
pub(crate) fn fresh_seed() -> u64 {
    rand::rng().random()
}

fn normal(std: f64) -> Normal<f32> {
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

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::linalg::Svd;

    const SCALING: f64 = 2.5;

    /// The weight's values, N(0, 1), with singular values that fall by `decay` from one to the next.
    fn weight(rows: usize, columns: usize, decay: f64, dtype: DType) -> Tensor<2> {
        let Svd { u, s, v } = thin_svd(gaussian(rows, columns, 9).as_ref()).unwrap();
        let scaled = Mat::from_fn(rows, s.len(), |row, k| u[(row, k)] * decay.powi(k as i32));
        to_tensor((scaled * v.transpose()).as_ref(), (&crate::device_from_env().unwrap(), dtype))
    }

    fn start(init: Init, weight: &Tensor<2>, rank: usize, seed: u64) -> Start {
        let dtype = crate::adapter::adapter_dtype(weight.dtype(), None).unwrap();
        init.start(weight, rank, SCALING, seed, (&weight.device(), dtype)).unwrap()
    }

    /// The factors of a start over a weight of these sizes that doesn't matter.
    fn draw(init: Init, [d_input, rank, d_output]: [usize; 3], seed: u64) -> (Mat<f64>, Mat<f64>) {
        let weight = Tensor::zeros([d_input, d_output], &crate::device_from_env().unwrap());
        let Start { a, b, .. } = start(init, &weight, rank, seed);
        (to_host(&a), to_host(&b))
    }

    fn entries(matrix: &Mat<f64>) -> Vec<f64> {
        matrix.col_iter().flat_map(|column| column.iter().copied().collect::<Vec<_>>()).collect()
    }

    fn largest(matrix: &Mat<f64>) -> f64 {
        entries(matrix).iter().fold(0.0, |most, value| value.abs().max(most))
    }

    /// |QᵀQ - 1| for Q with orthonormal columns.
    fn defect(q: &Mat<f64>) -> f64 {
        largest(&(q.transpose() * q - Mat::<f64>::identity(q.ncols(), q.ncols())))
    }

    /// The offset's product, and a check that it is the start.
    fn product(start: &Start) -> Mat<f64> {
        let (a, b) = start.offset.as_ref().unwrap();
        assert_eq!((to_host(a), to_host(b)), (to_host(&start.a), to_host(&start.b)));
        to_host(a) * to_host(b) * faer::Scale(SCALING)
    }

    /// Kolmogorov and Smirnov's test: the largest distance between the values' distribution and `cdf`,
    /// against what 1 in 1000 samples of the right distribution exceeds.
    fn follows(mut values: Vec<f64>, cdf: impl Fn(f64) -> f64) -> bool {
        values.sort_by(f64::total_cmp);
        let count = values.len() as f64;
        let distance = values.iter().enumerate().fold(0.0, |most: f64, (index, value)| {
            let expected = cdf(*value);
            let (below, above) = (index as f64 / count, (index + 1) as f64 / count);
            most.max((expected - below).abs()).max((expected - above).abs())
        });
        distance < (-(0.001f64 / 2.0).ln() / 2.0).sqrt() / count.sqrt()
    }

    /// Abramowitz and Stegun 7.1.26, good to 1.5e-7.
    fn normal_cdf(x: f64, std: f64) -> f64 {
        let z = x.abs() / std / 2f64.sqrt();
        let t = 1.0 / (1.0 + 0.327_591_1 * z);
        let terms = [1.061_405_429, -1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592];
        let erf = 1.0 - terms.iter().fold(0.0, |sum, term| (sum + term) * t) * (-z * z).exp();
        0.5 * (1.0 + erf.copysign(x))
    }

    #[test]
    fn random_starts_follow_their_distributions() {
        let dims = [50, 64, 70];
        for seed in [1, 2, 3] {
            let (a, b) = draw(Init::GaussianB { std: None }, dims, seed);
            assert!(follows(entries(&b), |x| normal_cdf(x, 0.125)));
            assert!(!follows(entries(&b), |x| normal_cdf(x, 0.155)), "24 % off is seen");
            assert_eq!(largest(&a), 0.0);

            let (_, b) = draw(Init::GaussianB { std: Some(0.3) }, dims, seed);
            assert!(follows(entries(&b), |x| normal_cdf(x, 0.3)));

            let (a, b) = draw(Init::GaussianA { std: None }, dims, seed);
            assert!(follows(entries(&a), |x| normal_cdf(x, 1.0 / 64.0)));
            assert_eq!(largest(&b), 0.0);

            let (a, b) = draw(Init::KaimingUniformA, dims, seed);
            let bound = 1.0 / 50f64.sqrt();
            assert!(follows(entries(&a), |x| ((x / bound + 1.0) / 2.0).clamp(0.0, 1.0)));
            assert!(!follows(entries(&a), |x| normal_cdf(x, bound / 3f64.sqrt())));
            assert_eq!(largest(&b), 0.0);
        }
    }

    /// A row of A is g E / 10 with two Gaussians g and orthonormal rows E at rank 4, so that its square
    /// is (g1² + g2²)/100, exponential; so is a column of B. At rank 2, E is a direction in the plane,
    /// of any angle.
    #[test]
    fn orthogonal_starts_follow_their_distributions() {
        let (a, b) = draw(Init::Orthogonal, [3000, 4, 2000], 5);
        let exponential = |x: f64| 1.0 - (-x * 50.0).exp();
        assert!(follows(a.row_iter().map(|row| row.squared_norm_l2()).collect(), exponential));
        assert!(follows(
            b.col_iter().map(|column| column.squared_norm_l2()).collect(),
            exponential
        ));

        let angles = (0..1000).map(|seed| {
            let (a, _) = draw(Init::Orthogonal, [1, 2, 1], seed);
            (a[(0, 1)] / a[(0, 0)]).atan() / std::f64::consts::PI + 0.5
        });
        assert!(follows(angles.collect(), |x| x));
    }

    #[test]
    fn orthogonal_starts_have_a_product_of_zero() {
        for rank in [2, 8, 20] {
            let (a, b) = draw(Init::Orthogonal, [60, rank, 40], 3);
            assert!(largest(&a) > 0.1 && largest(&b) > 0.1);
            let found = largest(&(&a * &b));
            assert!(found < 1e-7, "rank {rank}: {found:e}");
            // Half of the directions each.
            for factor in [a, b.transpose().to_owned()] {
                let Svd { s, .. } = thin_svd(factor.as_ref()).unwrap();
                assert!(s[rank / 2 - 1] > 0.1 && s[rank / 2] < 1e-6, "{s:?}");
            }
        }
        let weight = Tensor::zeros([6, 4], &crate::device_from_env().unwrap());
        let options = (&crate::device_from_env().unwrap(), DType::F32);
        assert!(Init::Orthogonal.start(&weight, 3, 1.0, 0, options).is_err());
        assert!(Init::Orthogonal.start(&weight, 2, 1.0, 0, options).unwrap().offset.is_none());
    }

    #[test]
    fn the_same_seed_gives_the_same_values_and_another_gives_others() {
        let weight = weight(40, 30, 0.9, DType::F32);
        let values = |init, seed| {
            let Start { a, b, .. } = start(init, &weight, 4, seed);
            (to_host(&a), to_host(&b))
        };
        let random = [
            Init::GaussianB { std: None },
            Init::GaussianA { std: None },
            Init::KaimingUniformA,
            Init::Orthogonal,
            Init::Pissa { iterations: Some(0) },
        ];
        for init in random {
            assert_eq!(values(init, 1), values(init, 1), "{init:?}");
            assert_ne!(values(init, 1), values(init, 2), "{init:?}");
        }
        for init in [Init::Pissa { iterations: None }, Init::Olora] {
            assert_eq!(values(init, 1), values(init, 2), "{init:?}");
        }
    }

    /// On the device of the tests.
    fn is_there(dtype: DType) -> bool {
        crate::supports_dtype(&crate::device_from_env().unwrap(), dtype)
    }

    /// W less its best approximation of rank r has the singular values of W from r on, and no other
    /// matrix of rank r leaves so little (Eckart, Young and Mirsky).
    #[test]
    fn exact_pissa_leaves_the_tail_of_the_singular_values() {
        let cases = [
            (DType::F32, 1e-6),
            (DType::F64, 1e-13),
            (DType::BF16, 1e-6), // the factors are f32, of the rounded weight
        ];
        for (dtype, tolerance) in cases.into_iter().filter(|(dtype, _)| is_there(*dtype)) {
            for (rows, columns, rank) in [(40, 24, 1), (40, 24, 7), (24, 40, 7), (40, 24, 24)] {
                let weight = weight(rows, columns, 0.9, dtype);
                let host = to_host(&weight);
                let start = start(Init::Pissa { iterations: None }, &weight, rank, 0);
                assert_eq!((start.a.dims(), start.b.dims()), ([rows, rank], [rank, columns]));
                let all = thin_svd(host.as_ref()).unwrap().s;
                let left = thin_svd((host - product(&start)).as_ref()).unwrap().s;
                for (k, found) in left.iter().enumerate() {
                    let expected = all.get(rank + k).copied().unwrap_or(0.0);
                    assert!(
                        (found - expected).abs() < tolerance,
                        "{dtype:?} {k}: {found} {expected}"
                    );
                }
                // Balanced: AᵀA = B Bᵀ = S / scaling.
                let (a, b) = (to_host(&start.a), to_host(&start.b));
                let difference = largest(&(a.transpose() * &a - &b * b.transpose()));
                assert!(difference < tolerance, "{difference:e}");
            }
        }
    }

    #[test]
    fn randomised_pissa_is_within_its_bound_and_close_to_exact() {
        let (rows, columns, rank) = (120, 80, 8);
        let weight = weight(rows, columns, 0.8, DType::F32);
        let host = to_host(&weight);
        let next = 0.8f64.powi(rank as i32);
        let exact = product(&start(Init::Pissa { iterations: None }, &weight, rank, 0));
        for seed in 0..5 {
            for iterations in [0, 1, 2, 4] {
                let init = Init::Pissa { iterations: Some(iterations) };
                let found = product(&start(init, &weight, rank, seed));
                let error = thin_svd((&host - &found).as_ref()).unwrap().s[0];
                let (k, p, smaller) = (rank as f64, 10.0f64, columns as f64);
                let base = 1.0
                    + (k / (p - 1.0)).sqrt()
                    + std::f64::consts::E * (k + p).sqrt() / p * (smaller - k).sqrt();
                let bound = (base.powf(1.0 / (2 * iterations + 1) as f64) + 1.0) * next;
                assert!(error <= bound, "{iterations} iterations: {error} above {bound}");
                if iterations >= 2 {
                    assert!(error < 1.0001 * next, "{iterations} iterations: {error}, best {next}");
                }
                let apart = (&found - &exact).norm_l2() / exact.norm_l2();
                let tolerance = [1e-1, 2e-3, 1e-5, 1e-6][iterations.min(3)];
                assert!(apart < tolerance, "{iterations} iterations: {apart:e} from exact");
            }
        }
    }

    /// What PEFT 0.21.2 does, as numpy in f64: `Q, R = np.linalg.qr(W.T); s * (Q[:, :r] @ R[:r]).T`.
    /// The product is s W P with P the projection onto the span of the first r rows of W, whatever the
    /// signs in Q: here by hand for W = [[3, 4], [1, 2], [5, 0]] and r = 1, where P = [9 12; 12 16] / 25.
    #[test]
    fn olora_takes_the_first_columns_of_q_and_rows_of_r() {
        let device = crate::device_from_env().unwrap();
        let small = Tensor::<2>::from_data([[3.0f32, 4.0], [1.0, 2.0], [5.0, 0.0]], &device);
        let found = product(&start(Init::Olora, &small, 1, 0));
        let expected = [[3.0, 4.0], [1.32, 1.76], [1.8, 2.4]];
        for (row, values) in expected.iter().enumerate() {
            for (column, value) in values.iter().enumerate() {
                assert!((found[(row, column)] - SCALING * value).abs() < 1e-6, "{found:?}");
            }
        }

        let cases = [(DType::F32, 1e-6), (DType::F64, 1e-13), (DType::BF16, 1e-6)];
        for (dtype, tolerance) in cases.into_iter().filter(|(dtype, _)| is_there(*dtype)) {
            for (rows, columns, rank) in [(40, 24, 1), (40, 24, 7), (24, 40, 7), (24, 40, 24)] {
                let weight = weight(rows, columns, 0.9, dtype);
                let start = start(Init::Olora, &weight, rank, 0);
                let (a, b) = (to_host(&start.a), to_host(&start.b));
                assert!(defect(&b.transpose().to_owned()) < tolerance);
                let (q, r) = thin_qr(to_host(&weight).transpose());
                let q = q.get(.., ..rank);
                let expected = (q * r.get(..rank, ..)).transpose() * faer::Scale(SCALING);
                let difference = largest(&(product(&start) - expected));
                assert!(difference < tolerance * SCALING, "{dtype:?} {difference:e}");
                // R is upper triangular.
                for k in 0..rank {
                    assert!((0..k).all(|row| a[(row, k)].abs() < tolerance));
                }
            }
        }
    }

    #[test]
    fn weights_that_cannot_be_started_from_are_errors() {
        let device = crate::device_from_env().unwrap();
        let fails = |init: Init, weight: &Tensor<2>, rank| {
            init.start(weight, rank, 1.0, 0, (&device, DType::F32)).is_err()
        };
        let good = Tensor::<2>::ones([6, 4], &device);
        let inits =
            [Init::Olora, Init::Pissa { iterations: None }, Init::Pissa { iterations: Some(2) }];
        for init in inits {
            assert!(init.starts_from_weight());
            assert!(fails(init, &good, 5), "{init:?}: a rank above the smaller size");
            for value in [f32::NAN, f32::INFINITY] {
                let bad =
                    good.clone().slice_assign([1..2, 1..2], Tensor::full([1, 1], value, &device));
                assert!(fails(init, &bad, 2), "{init:?}: {value}");
            }
            // Of rank 1, as a weight of ones is, and all of zero: still finite and right.
            for weight in [good.clone(), good.zeros_like()] {
                let start = init.start(&weight, 3, SCALING, 0, (&device, DType::F32)).unwrap();
                let apart = largest(&(product(&start) - to_host(&weight) * faer::Scale(1.0)));
                let olora = largest(&(product(&start) - to_host(&weight) * faer::Scale(SCALING)));
                assert!(if init == Init::Olora { olora } else { apart } < 1e-5, "{init:?}");
            }
        }
        assert!(!Init::default().starts_from_weight() && !Init::Orthogonal.starts_from_weight());
    }
}
