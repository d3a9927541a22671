//! Several adapters into one: the mathematics of one layer.
//!
//! An adapter's update is the dense scaling A·B `[d_input, d_output]`. Sums of updates are exact on the
//! factors ([`cat`]) and can be cut to a lower rank without ever forming a dense matrix ([`recompress`]).
//! [`ties`] and [`dare`] choose single entries of the updates, which no pair of factors shows: A_i and
//! B_i are only unique up to an invertible matrix between them, and trimming or adding them one by one
//! brings in cross terms A_i B_j of adapters that have nothing to do with each other. PEFT's `"ties"`
//! and `"dare_*"` do so; here both work on the dense updates, one layer at a time, and [`factorise`]
//! makes factors of the result (PEFT's `"ties_svd"` and `"dare_*_svd"`). That costs one exact singular
//! value decomposition for each layer (about 10 s for 2048 x 2048 on one core) and, while it lasts,
//! the layer's updates in f64.

use burn::tensor::{DType, Device, Tensor};
use faer::Mat;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

use crate::error::{Error, Result};
use crate::linalg::{Svd, thin_qr, thin_svd, to_host, to_tensor};

/// One adapter of a layer, and how much of it is wanted.
#[derive(Debug)]
pub(crate) struct Part {
    /// A `[d_input, rank]`; each part has its own rank.
    pub(crate) a: Tensor<2>,
    /// B `[rank, d_output]`, or `[rank / groups, d_output]` for a grouped convolution.
    pub(crate) b: Tensor<2>,
    /// The factor on this adapter's update.
    pub(crate) scaling: f64,
    /// The factor on it in the sum, of any sign.
    pub(crate) weight: f64,
}

impl Part {
    /// The groups of the convolution that it adapts; 1 elsewhere.
    pub(crate) fn groups(&self) -> usize {
        self.a.dims()[1] / self.b.dims()[0]
    }
}

/// A pair of factors of a lower rank, and how far its product is from what it stands for.
#[derive(Debug)]
pub(crate) struct LowRank {
    /// A `[d_input, rank]`.
    pub(crate) a: Tensor<2>,
    /// B `[rank, d_output]`.
    pub(crate) b: Tensor<2>,
    /// |M - A B| / |M| in the Frobenius norm; 0 for M = 0.
    pub(crate) error: f64,
}

/// A `[d_input, sum of ranks]` and B `[sum of ranks, d_output]` whose product, with scaling 1, is the
/// sum of the parts:
///
/// ```text
/// [A_1 .. A_n] [w_1 s_1 B_1; ..; w_n s_n B_n] = sum_i w_i s_i A_i B_i        s: scaling, w: weight
/// ```
///
/// All the factors go onto B, so that a negative weight needs no square root. (PEFT's `"cat"`.) The
/// columns for a grouped convolution stand group by group, in each of them part by part, since a group's
/// output sees its own ranks only.
///
/// # Errors
/// When there is no part, or the parts are not for one layer.
pub(crate) fn cat(parts: &[Part]) -> Result<(Tensor<2>, Tensor<2>)> {
    let dims = |part: &Part| [part.a.dims()[0], part.b.dims()[1], part.groups()];
    let [_, _, groups] = same_shape(parts.iter().map(dims))?;
    let columns = (0..groups).flat_map(|group| parts.iter().map(move |part| (group, part)));
    let a = columns.map(|(group, part)| {
        let each = part.b.dims()[0];
        part.a.clone().slice_dim(1, group * each..(group + 1) * each)
    });
    let b = parts.iter().map(|part| part.b.clone().mul_scalar(part.scaling * part.weight));
    Ok((Tensor::cat(a.collect(), 1), Tensor::cat(b.collect(), 0)))
}

/// Which part each column of [`cat`]'s A is from.
pub(crate) fn column_parts(parts: &[Part]) -> Vec<usize> {
    let groups = parts.first().map_or(1, Part::groups);
    let group = parts.iter().enumerate();
    let group: Vec<usize> =
        group.flat_map(|(place, part)| std::iter::repeat_n(place, part.b.dims()[0])).collect();
    group.repeat(groups)
}

/// The best approximation of A·B of this rank, for A `[d_input, k]` and B `[k, d_output]`.
///
/// ```text
/// A = Q_a R_a        Bᵀ = Q_b R_b        R_a R_bᵀ = U S Vᵀ        A·B = (Q_a U) S (Q_b V)ᵀ
/// ```
///
/// The result is balanced: A' = Q_a U sqrt(S) and B' = sqrt(S) (Q_b V)ᵀ of the `rank` largest S. It takes
/// k² (d_input + d_output) multiplications, on the host, and no matrix larger than A and B.
///
/// # Errors
/// When `rank` is 0 or above the smallest of k, d_input and d_output, or the values are not finite.
pub(crate) fn recompress(a: &Tensor<2>, b: &Tensor<2>, rank: usize) -> Result<LowRank> {
    let (q_a, r_a) = thin_qr(to_host(a).as_ref());
    let (q_b, r_b) = thin_qr(to_host(b).transpose());
    let Svd { u, s, v } = thin_svd((r_a * r_b.transpose()).as_ref())?;
    cut(&Svd::new(q_a * u, s, q_b * v), rank, (&a.device(), a.dtype()))
}

/// The best approximation of a dense M `[d_input, d_output]` of this rank, balanced as in [`recompress`].
///
/// # Errors
/// When `rank` is 0 or above the smaller of M's sizes, or the values are not finite.
pub(crate) fn factorise(matrix: &Tensor<2>, rank: usize) -> Result<LowRank> {
    cut(&thin_svd(to_host(matrix).as_ref())?, rank, (&matrix.device(), matrix.dtype()))
}

/// The mean of what the updates agree on, for (update `[d_input, d_output]`, weight) of each adapter:
///
/// 1. trim: of each update, keep the `density` · d_input · d_output entries of largest magnitude;
/// 2. elect: each entry's sign is that of the trimmed updates' sum (plus for a sum of 0);
/// 3. mean: of weight · update over those updates that kept the entry with the elected sign; 0 if none did.
///
/// The weights have no part in the election, as in PEFT.
///
/// "TIES-Merging: Resolving Interference When Merging Models"
/// ([arXiv:2306.01708](https://arxiv.org/abs/2306.01708)).
///
/// # Errors
/// When there is no update, the shapes differ, or `density` is not above 0 and at most 1.
pub(crate) fn ties(updates: &[(Tensor<2>, f64)], density: f64) -> Result<Tensor<2>> {
    check_density(density)?;
    let [rows, columns] = same_shape(updates.iter().map(|(update, _)| update.dims()))?;
    let trimmed: Vec<Mat<f64>> =
        updates.iter().map(|(update, _)| trim(to_host(update), density)).collect();
    let mean = Mat::from_fn(rows, columns, |row, column| {
        let entries = || trimmed.iter().map(|update| update[(row, column)]);
        let elected = if entries().sum::<f64>() >= 0.0 { 1.0 } else { -1.0 };
        let agreeing = entries().zip(updates).filter(|(entry, _)| entry * elected > 0.0);
        let (sum, count) = agreeing.fold((0.0, 0u32), |(sum, count), (entry, (_, weight))| {
            (sum + weight * entry, count + 1)
        });
        sum / f64::from(count.max(1))
    });
    let like = &updates[0].0;
    Ok(to_tensor(mean.as_ref(), (&like.device(), like.dtype())))
}

/// Each entry of an update `[d_input, d_output]` kept with probability `density` and divided by it, so
/// that the mean over seeds is the update; the same seed keeps the same entries.
///
/// "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch"
/// ([arXiv:2311.03099](https://arxiv.org/abs/2311.03099), DARE), followed by a weighted sum, or by
/// [`ties`] with density 1.
///
/// # Errors
/// When `density` is not above 0 and at most 1.
pub(crate) fn dare(update: &Tensor<2>, density: f64, seed: u64) -> Result<Tensor<2>> {
    check_density(density)?;
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let update_host = to_host(update);
    let [rows, columns] = update.dims();
    let mut dropped = Mat::zeros(rows, columns);
    for row in 0..rows {
        for column in 0..columns {
            if rng.random::<f64>() < density {
                dropped[(row, column)] = update_host[(row, column)] / density;
            }
        }
    }
    Ok(to_tensor(dropped.as_ref(), (&update.device(), update.dtype())))
}

/// Keeps floor(`density` · entries) entries of largest magnitude; of equal ones the first by rows.
fn trim(mut update: Mat<f64>, density: f64) -> Mat<f64> {
    let (rows, columns) = update.shape();
    let mut order: Vec<(usize, usize)> =
        (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))).collect();
    let kept = (density * order.len() as f64) as usize;
    if kept < order.len() {
        order.select_nth_unstable_by(kept, |&x, &y| {
            update[y].abs().total_cmp(&update[x].abs()).then(x.cmp(&y))
        });
        order[kept..].iter().for_each(|&entry| update[entry] = 0.0);
    }
    update
}

fn cut(svd: &Svd, rank: usize, options: (&Device, DType)) -> Result<LowRank> {
    let most = svd.s.len();
    if rank == 0 || rank > most {
        return Err(Error::setting("rank", format!("1 to {most} to approximate with"), rank));
    }
    let norm = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>().sqrt();
    let all = norm(&svd.s);
    let error = if all == 0.0 { 0.0 } else { norm(&svd.s[rank..]) / all };
    let (a, b) = svd.balanced(rank, 1.0);
    let (a, b) = (to_tensor(a.as_ref(), options), to_tensor(b.as_ref(), options));
    Ok(LowRank { a, b, error })
}

pub(crate) fn same_shape<const N: usize>(
    shapes: impl IntoIterator<Item = [usize; N]>,
) -> Result<[usize; N]> {
    let mut shapes = shapes.into_iter();
    let Some(first) = shapes.next() else {
        return Err(Error::setting("adapters", "at least one to combine", 0));
    };
    match shapes.find(|shape| *shape != first) {
        Some(other) => {
            let expected = format!("updates of one shape, {first:?}");
            Err(Error::setting("adapters", expected, format!("{other:?}")))
        }
        None => Ok(first),
    }
}

pub(crate) fn check_density(density: f64) -> Result<()> {
    if density > 0.0 && density <= 1.0 {
        return Ok(());
    }
    Err(Error::setting("density", "a number above 0 and at most 1", density))
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::linalg::gaussian;

    fn random(rows: usize, columns: usize, seed: u64) -> Tensor<2> {
        to_tensor(gaussian(rows, columns, seed).as_ref(), (&Device::flex(), DType::F64))
    }

    fn matrix<const R: usize, const C: usize>(values: [[f64; C]; R]) -> Tensor<2> {
        let values = Mat::from_fn(R, C, |row, column| values[row][column]);
        to_tensor(values.as_ref(), (&Device::flex(), DType::F64))
    }

    /// |x - y| / |y| in the Frobenius norm.
    fn apart(x: &Mat<f64>, y: &Mat<f64>) -> f64 {
        (x - y).norm_l2() / y.norm_l2()
    }

    fn product(a: &Tensor<2>, b: &Tensor<2>) -> Mat<f64> {
        to_host(a) * to_host(b)
    }

    #[test]
    fn cat_is_the_weighted_sum() {
        let part = |rank: usize, scaling: f64, weight: f64| Part {
            a: random(7, rank, rank as u64),
            b: random(rank, 5, 10 + rank as u64),
            scaling,
            weight,
        };
        let parts = [part(3, 2.5, 0.5), part(1, 0.5, -2.0), part(4, 1.0, 0.0)];
        let (a, b) = cat(&parts).unwrap();
        assert_eq!((a.dims(), b.dims()), ([7, 8], [8, 5]));
        let mut expected = Mat::zeros(7, 5);
        for part in &parts {
            expected += product(&part.a, &part.b) * faer::Scale(part.scaling * part.weight);
        }
        assert!(apart(&product(&a, &b), &expected) < 1e-15);

        assert!(cat(&[]).is_err());
        let mut parts = parts;
        parts[1].b = random(1, 6, 0);
        assert!(cat(&parts).is_err());
    }

    #[test]
    fn recompressing_to_the_true_rank_loses_nothing() {
        // [A A] [B; B] is 2 A B: of rank 3, though it has 6 columns.
        let (a, b) = (random(9, 3, 1), random(3, 7, 2));
        let twice = (
            Tensor::cat(vec![a.clone(), a.clone()], 1),
            Tensor::cat(vec![b.clone(), b.clone()], 0),
        );
        let expected = product(&a, &b) * faer::Scale(2.0);
        for rank in [3, 5] {
            let low = recompress(&twice.0, &twice.1, rank).unwrap();
            assert_eq!((low.a.dims(), low.b.dims()), ([9, rank], [rank, 7]));
            assert!(low.error < 1e-14, "{:e}", low.error);
            assert!(apart(&product(&low.a, &low.b), &expected) < 1e-14);
        }
        assert!(recompress(&a, &b, 0).is_err());
        assert!(recompress(&a, &b, 4).is_err());
        let none = recompress(&a.zeros_like(), &b, 2).unwrap();
        assert_eq!((none.error, to_host(&none.a).norm_l2()), (0.0, 0.0));
    }

    #[test]
    fn recompressing_is_the_best_approximation_and_knows_its_error() {
        // Ranks below, between and above the sizes of the layer.
        for (rows, columns, k) in [(20, 30, 6), (8, 30, 12), (8, 6, 12)] {
            let (a, b) = (random(rows, k, 3), random(k, columns, 4));
            let dense = product(&a, &b);
            let low = recompress(&a, &b, 4).unwrap();
            let found = apart(&product(&low.a, &low.b), &dense);
            assert!((found - low.error).abs() < 1e-13, "{found} {}", low.error);
            let whole = to_tensor(dense.as_ref(), (&Device::flex(), DType::F64));
            let direct = factorise(&whole, 4).unwrap();
            assert!((direct.error - low.error).abs() < 1e-13);
            assert!(apart(&product(&low.a, &low.b), &product(&direct.a, &direct.b)) < 1e-12);
        }
    }

    #[test]
    fn ties_trims_elects_and_takes_the_mean_of_those_that_agree() {
        let updates = [
            (matrix([[4.0, -1.0, 0.5], [3.0, 2.0, -0.1]]), 1.0),
            (matrix([[2.0, -3.0, 0.2], [-5.0, 0.1, 6.0]]), 0.5),
            (matrix([[-1.0, 2.0, 3.0], [0.3, -0.2, 4.0]]), 2.0),
        ];
        // Half of 6: three of each are kept. 4, 3, 2 | -5, 6, -3 | 4, 3, 2.
        let found = to_host(&ties(&updates, 0.5).unwrap());
        let expected =
            [[4.0, 0.5 * -3.0, 2.0 * 3.0], [0.5 * -5.0, 2.0, (0.5 * 6.0 + 2.0 * 4.0) / 2.0]];
        for (row, values) in expected.iter().enumerate() {
            for (column, value) in values.iter().enumerate() {
                assert!((found[(row, column)] - value).abs() < 1e-15, "{found:?}");
            }
        }
        // Of one update nothing is lost, and of equal entries the first ones are kept.
        let one = [(matrix([[1.0, -1.0], [1.0, -1.0]]), 1.0)];
        assert_eq!(to_host(&ties(&one, 1.0).unwrap()), to_host(&one[0].0));
        let first = to_host(&matrix([[1.0, -1.0], [0.0, 0.0]]));
        assert_eq!(to_host(&ties(&one, 0.5).unwrap()), first);

        assert!(ties(&[], 0.5).is_err());
        assert!(ties(&updates, 0.0).is_err() && ties(&updates, f64::NAN).is_err());
        assert!(ties(&[(random(2, 3, 0), 1.0), (random(3, 2, 0), 1.0)], 0.5).is_err());
    }

    #[test]
    fn dare_drops_at_random_and_keeps_the_mean() {
        let update = random(100, 100, 1);
        let whole = to_host(&update);
        let density = 0.3;
        let found = to_host(&dare(&update, density, 5).unwrap());
        let mut kept = 0;
        for row in 0..100 {
            for column in 0..100 {
                let (value, from) = (found[(row, column)], whole[(row, column)]);
                assert!(value == 0.0 || (value - from / density).abs() < 1e-12);
                kept += usize::from(value != 0.0);
            }
        }
        // Binomial: a standard deviation is 46.
        assert!((2800..3200).contains(&kept), "{kept}");

        let mut mean = Mat::zeros(100, 100);
        for seed in 0..400 {
            mean += to_host(&dare(&update, density, seed).unwrap()) * faer::Scale(1.0 / 400.0);
        }
        // Of the mean of n: sqrt((1 - density) / density / n) = 0.076.
        let error = apart(&mean, &whole);
        assert!((0.06..0.09).contains(&error), "{error}");

        assert_eq!(found, to_host(&dare(&update, density, 5).unwrap()));
        assert_ne!(found, to_host(&dare(&update, density, 6).unwrap()));
        assert_eq!(to_host(&dare(&update, 1.0, 5).unwrap()), whole);
        assert!(dare(&update, 0.0, 5).is_err() && dare(&update, 1.5, 5).is_err());
    }
}
