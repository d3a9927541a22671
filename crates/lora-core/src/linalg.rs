//! Factorisations on the host, in f64: thin QR, exact and randomised singular values.
//!
//! Always in f64 and on the host, so that every backend gets the same factors; only the wide products
//! of the randomised method run on the matrix's own device.

use burn::tensor::{DType, Device, Tensor, TensorData};
use faer::{Mat, MatRef};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use rand_distr::{Distribution, StandardNormal};

use crate::error::{ErrorKind, Result};

/// Columns that the randomised method draws above the rank: with 10, Halko et al. find the error
/// close to the best one (section 4.2).
const OVERSAMPLING: usize = 10;

/// M ≈ U diag(S) Vᵀ, with U `[rows, k]` and V `[columns, k]` of orthonormal columns, and the k singular
/// values in S from the largest down.
///
/// The largest entry of each column of U is positive: singular vectors are only unique up to a sign,
/// and a rule makes them the same everywhere.
#[derive(Debug)]
pub(crate) struct Svd {
    pub(crate) u: Mat<f64>,
    pub(crate) s: Vec<f64>,
    pub(crate) v: Mat<f64>,
}

impl Svd {
    /// Of these factors, with the signs put right.
    pub(crate) fn new(mut u: Mat<f64>, s: Vec<f64>, mut v: Mat<f64>) -> Self {
        for k in 0..s.len() {
            let column = u.col(k);
            let largest = column.iter().max_by(|x, y| x.abs().total_cmp(&y.abs()));
            if largest.is_some_and(|value| *value < 0.0) {
                u.col_mut(k).iter_mut().for_each(|value| *value = -*value);
                v.col_mut(k).iter_mut().for_each(|value| *value = -*value);
            }
        }
        Self { u, s, v }
    }

    /// The `rank` largest terms as a balanced pair: U sqrt(S) `[rows, rank]` and sqrt(S) Vᵀ
    /// `[rank, columns]`, each times `factor`.
    pub(crate) fn balanced(&self, rank: usize, factor: f64) -> (Mat<f64>, Mat<f64>) {
        let root = |k: usize| factor * self.s[k].sqrt();
        let a = Mat::from_fn(self.u.nrows(), rank, |row, k| self.u[(row, k)] * root(k));
        let b = Mat::from_fn(rank, self.v.nrows(), |k, column| root(k) * self.v[(column, k)]);
        (a, b)
    }
}

/// M = Q R for M `[rows, columns]`: Q `[rows, k]` has orthonormal columns and R `[k, columns]` is upper
/// triangular, with k the smaller of the two sizes. By Householder reflections.
pub(crate) fn thin_qr(matrix: MatRef<'_, f64>) -> (Mat<f64>, Mat<f64>) {
    let qr = matrix.qr();
    (qr.compute_thin_Q(), qr.thin_R().to_owned())
}

/// All k = min(rows, columns) terms of M `[rows, columns]`.
///
/// # Errors
/// When the iteration does not converge, as it may not for values that are not finite.
pub(crate) fn thin_svd(matrix: MatRef<'_, f64>) -> Result<Svd> {
    let (rows, columns) = matrix.shape();
    let svd = matrix.thin_svd().map_err(|_| ErrorKind::NoConvergence { rows, columns })?;
    let s = svd.S().column_vector().iter().copied().collect();
    Ok(Svd::new(svd.U().to_owned(), s, svd.V().to_owned()))
}

/// About the `rank` largest terms of a float M `[rows, columns]`, from its action on `rank` + 10 random
/// vectors.
///
/// Y = (M Mᵀ)^n M Ω with Gaussian Ω, n = `iterations`, made orthonormal after every product, spans
/// nearly what the largest left singular vectors span; with Q R = Y, the exact factors of the small
/// QᵀM follow. On average, with k = `rank` and p = 10,
///
/// ```text
/// |M - Q QᵀM| <= (1 + sqrt(k / (p - 1)) + e sqrt(k + p) / p sqrt(min(rows, columns) - k))^(1 / (2n + 1)) s(k+1)
/// ```
///
/// in the spectral norm, and cutting QᵀM to k terms adds at most s(k+1). The products run on M's device
/// in f32 (f64 for an f64 M), 2n + 2 of them with rows · columns · (k + p) multiplications each.
///
/// Halko, Martinsson and Tropp, "Finding structure with randomness"
/// ([arXiv:0909.4061](https://arxiv.org/abs/0909.4061)), algorithms 4.4 and 5.1, corollary 10.10 and
/// theorem 9.3.
///
/// # Errors
/// When the small factorisation does not converge.
pub(crate) fn randomised_svd(
    matrix: &Tensor<2>,
    rank: usize,
    iterations: usize,
    seed: u64,
) -> Result<Svd> {
    let [rows, columns] = matrix.dims();
    let dtype = if matrix.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let matrix = matrix.clone().without_autodiff().cast(dtype);
    let device = matrix.device();
    let orthonormal = |product: Tensor<2>| {
        let (q, _) = thin_qr(to_host(&product).as_ref());
        to_tensor(q.as_ref(), (&device, dtype))
    };

    let sketch = (rank + OVERSAMPLING).min(rows).min(columns);
    let omega = to_tensor(gaussian(columns, sketch, seed).as_ref(), (&device, dtype));
    let mut q = orthonormal(matrix.clone().matmul(omega));
    for _ in 0..iterations {
        let back = orthonormal(matrix.clone().transpose().matmul(q));
        q = orthonormal(matrix.clone().matmul(back));
    }
    // [columns, sketch]: tall, as the QR step inside the factorisation wants it.
    let small = to_host(&matrix.transpose().matmul(q.clone()));
    let svd = thin_svd(small.as_ref())?;
    Ok(Svd::new(to_host(&q) * svd.v, svd.s, svd.u))
}

/// N(0, 1) values `[rows, columns]`; the same seed gives the same values.
pub(crate) fn gaussian(rows: usize, columns: usize, seed: u64) -> Mat<f64> {
    let rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let values: Vec<f64> = StandardNormal.sample_iter(rng).take(rows * columns).collect();
    MatRef::from_row_major_slice(&values, rows, columns).to_owned()
}

/// A float tensor's values.
pub(crate) fn to_host(tensor: &Tensor<2>) -> Mat<f64> {
    let [rows, columns] = tensor.dims();
    let values: Vec<f64> = tensor.clone().into_data().iter::<f64>().collect();
    MatRef::from_row_major_slice(&values, rows, columns).to_owned()
}

/// A tensor of the values, rounded to the dtype.
pub(crate) fn to_tensor(matrix: MatRef<'_, f64>, options: (&Device, DType)) -> Tensor<2> {
    let (rows, columns) = matrix.shape();
    let values: Vec<f64> =
        (0..rows).flat_map(|row| (0..columns).map(move |column| matrix[(row, column)])).collect();
    Tensor::from_data(TensorData::new(values, [rows, columns]), options)
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    fn difference(x: &Mat<f64>, y: &Mat<f64>) -> f64 {
        (x - y).norm_max()
    }

    fn identity(size: usize) -> Mat<f64> {
        Mat::identity(size, size)
    }

    #[test]
    fn factors_are_orthonormal_and_multiply_to_the_matrix() {
        for (rows, columns) in [(30, 8), (8, 30), (12, 12), (5, 1), (1, 1)] {
            let matrix = gaussian(rows, columns, 1);
            let k = rows.min(columns);

            let (q, r) = thin_qr(matrix.as_ref());
            assert_eq!((q.shape(), r.shape()), ((rows, k), (k, columns)));
            assert!(difference(&(q.transpose() * &q), &identity(k)) < 1e-14);
            assert!(difference(&(q * &r), &matrix) < 1e-13);
            assert!((0..k).all(|row| (0..row).all(|column| r[(row, column)] == 0.0)));

            let svd = thin_svd(matrix.as_ref()).unwrap();
            let (a, b) = svd.balanced(k, 1.0);
            let Svd { u, s, v } = svd;
            assert!(difference(&(u.transpose() * &u), &identity(k)) < 1e-14);
            assert!(difference(&(v.transpose() * &v), &identity(k)) < 1e-14);
            assert!(s.is_sorted_by(|x, y| x >= y) && s[k - 1] >= 0.0);
            assert!(difference(&(a * b), &matrix) < 1e-13);
        }
    }

    #[test]
    fn signs_of_singular_vectors_do_not_depend_on_those_of_the_matrix() {
        let matrix = gaussian(9, 6, 2);
        let (one, other) =
            (thin_svd(matrix.as_ref()).unwrap(), thin_svd((-&matrix).as_ref()).unwrap());
        assert!(difference(&one.u, &other.u) < 1e-13);
        assert!(difference(&one.v, &-other.v) < 1e-13);
    }

    #[test]
    fn a_sketch_as_large_as_the_matrix_is_exact() {
        for (rows, columns) in [(14, 9), (9, 14)] {
            let matrix = gaussian(rows, columns, 3);
            let tensor = to_tensor(matrix.as_ref(), (&Device::flex(), DType::F64));
            let found = randomised_svd(&tensor, 4, 1, 0).unwrap();
            let exact = thin_svd(matrix.as_ref()).unwrap();
            for (x, y) in found.s.iter().zip(&exact.s) {
                assert!((x - y).abs() < 1e-13);
            }
            let (a, b) = found.balanced(4, 1.0);
            let (c, d) = exact.balanced(4, 1.0);
            assert!(difference(&(a * b), &(c * d)) < 1e-12);
        }
    }
}
