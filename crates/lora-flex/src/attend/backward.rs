//! The gradients of attention of many queries.

use gemm::Parallelism;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::Rounding;
use super::blocks::{FEWEST, Hidden, Lines, MOST, SCORES, Weigh};
use crate::FlexTensor;
use crate::backward::dot;
use crate::halves::widened;
use crate::product::{Matrix, gemm_accumulate_on};
use crate::weight::{Weight, by_dtype, tensor_of, values_of};

/// The gradients of [`attend`](super::attend) with respect to q, k and v, from `g`, that of its output.
///
/// With P = softmax(scale q k^T), of each head: dv = P^T g, dP = g v^T, dS = scale P (dP - rowsum(P dP)), dq = dS k,
/// dk = dS^T q. P is formed again, of some queries at a time and for the keys only that one of them sees, so that no
/// matrix of all queries and keys is kept, here or since the forward pass.
///
/// # Shapes
/// - q and g `[batch, heads, rows, head_dim]`, q contiguous; k, v `[batch, heads, positions, head_dim]`
/// - hidden `[1 or batch, 1, length, positions]`, bool, contiguous: row r is of query r modulo length
/// - outputs as q, k and v, contiguous
///
/// `None` for tensors of another form, of unequal or other dtypes than f32, bf16 and f16, and without values.
///
/// Source: "FlashAttention", [arXiv:2205.14135](https://arxiv.org/abs/2205.14135), for the order of the work.
pub fn attend_backward(
    [q, k, v]: [&FlexTensor; 3],
    scale: f32,
    hidden: Option<&FlexTensor>,
    g: &FlexTensor,
) -> Option<[FlexTensor; 3]> {
    if [q, k, v, g].iter().any(|tensor| tensor.layout().num_dims() != 4) {
        return None;
    }
    by_dtype!(q.dtype(), backward_in([q, k, v], scale, hidden, g))
}

fn backward_in<T: Weight>(
    [q, k, v]: [&FlexTensor; 3],
    scale: f32,
    hidden: Option<&FlexTensor>,
    g: &FlexTensor,
) -> Option<[FlexTensor; 3]> {
    let shape: [usize; 4] = q.layout().shape().dims();
    let [batch, heads, rows, width] = shape;
    let positions = k.layout().shape().dims::<4>()[2];
    let seen = [batch, heads, positions, width];
    let fits = [k, v]
        .iter()
        .all(|tensor| tensor.dtype() == T::dtype() && **tensor.layout().shape() == seen);
    if !fits || **g.layout().shape() != shape || seen.contains(&0) || rows == 0 {
        return None;
    }
    let hidden = Hidden::of(hidden, [batch, rows, positions])?;
    values_of::<T>(q)?;
    let (q, g) = (widened(q.clone()), widened(g.to_contiguous()));
    let (queries, gs) = (values_of::<f32>(&q)?, values_of::<f32>(&g)?);
    let (keys, values) = (Lines::of(k)?, Lines::of(v)?);

    let mut to_q = vec![0.0; queries.len()];
    let [mut to_k, mut to_v] = [0; 2].map(|_| vec![0.0; batch * heads * positions * width]);
    let outputs =
        to_k.par_chunks_mut(positions * width).zip(to_v.par_chunks_mut(positions * width));
    let done = to_q.par_chunks_mut(rows * width).zip(outputs).enumerate().map(
        |(number, (to_q, (to_k, to_v)))| {
            let (batch, head) = (number / heads, number % heads);
            let first = number * rows * width;
            let head = Head {
                queries: &queries[first..][..rows * width],
                g: &gs[first..][..rows * width],
                keys: keys.of_head(batch, head)?,
                values: values.of_head(batch, head)?,
                scale,
            };
            head.backward(&hidden, batch, [to_q, to_k, to_v])
        },
    );
    done.collect::<Option<()>>()?;
    let rounded = |values: Vec<f32>, shape: [usize; 4]| {
        let mut output = vec![T::round(0.0); values.len()];
        T::round_all(&values, &mut output);
        tensor_of(output, shape)
    };
    Some([rounded(to_q, shape), rounded(to_k, seen), rounded(to_v, seen)])
}

/// One head's queries and what they see.
struct Head<'a> {
    queries: &'a [f32], // [rows, width]
    g: &'a [f32],       // [rows, width]
    keys: Matrix<'a>,   // [positions, width]
    values: Matrix<'a>, // [positions, width]
    scale: f32,
}

impl Head<'_> {
    /// Adds to the gradients of queries `[rows, width]`, keys and values `[positions, width]`.
    fn backward(
        &self,
        hidden: &Hidden,
        batch: usize,
        [to_q, to_k, to_v]: [&mut [f32]; 3],
    ) -> Option<()> {
        let [positions, width] = self.keys.shape();
        let most = (SCORES / positions).clamp(FEWEST, MOST);
        let rows = self.queries.len() / width;
        for first in (0..rows).step_by(most) {
            let count = most.min(rows - first);
            let lines: Vec<_> = (first..first + count).map(|row| hidden.line(batch, row)).collect();
            let start = lines.iter().map(|(_, seen)| seen.start).min()?;
            let seen = lines.iter().map(|(_, seen)| seen.end).max()? - start;
            let [keys, values] = [self.keys.rows(start, seen)?, self.values.rows(start, seen)?];
            let block = first * width..(first + count) * width;
            let of_block = |values| Matrix::new(values, [count, width], [width, 1]);
            let queries = of_block(&self.queries[block.clone()])?;
            let g = of_block(&self.g[block.clone()])?;
            let accumulate = |y: &mut [f32], stride, left, right| {
                gemm_accumulate_on(Parallelism::None, y, stride, left, right);
            };

            let [mut weights, mut products] = [0; 2].map(|_| vec![0.0; count * seen]);
            accumulate(&mut weights, seen, queries, keys.transposed());
            let flags = lines.iter();
            let flags =
                flags.map(|(flags, _)| flags.map(|flags| &flags[start..][..seen])).collect();
            Arch::new().dispatch(Weigh::<f32>::new(
                &mut weights,
                flags,
                self.scale,
                Rounding::Output,
            ));
            accumulate(&mut products, seen, g, values.transposed());
            let as_block = |values| Matrix::new(values, [count, seen], [seen, 1]);
            accumulate(&mut to_v[start * width..], width, as_block(&weights)?.transposed(), g);
            let scale = self.scale;
            Arch::new().dispatch(Turn { weights: &weights, products: &mut products, seen, scale });
            let products = as_block(&products)?;
            accumulate(&mut to_q[block], width, products, keys);
            accumulate(&mut to_k[start * width..], width, products.transposed(), queries);
        }
        Some(())
    }
}

/// dP to dS = scale P (dP - rowsum(P dP)), in place.
struct Turn<'a> {
    weights: &'a [f32],      // P, [count, seen]
    products: &'a mut [f32], // dP, [count, seen]
    seen: usize,
    scale: f32,
}

impl WithSimd for Turn<'_> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, _: S) {
        let rows = self.weights.chunks_exact(self.seen);
        for (weights, products) in rows.zip(self.products.chunks_exact_mut(self.seen)) {
            let total = dot(weights, products);
            for (weight, product) in weights.iter().zip(products) {
                *product = self.scale * weight * (*product - total);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::backend::ops::{BoolTensorOps, FloatTensorOps};
    use burn::tensor::{DType, Shape, TensorData};

    use super::*;
    use crate::samples::{in_dtype, tensor, values};

    fn of_heads(shape: [usize; 4], seed: u64, dtype: DType) -> FlexTensor {
        let [batch, heads, rows, width] = shape;
        let flat = in_dtype(tensor([batch * heads * rows, width], seed), dtype);
        Flex::float_reshape(flat, Shape::from(shape))
    }

    /// The definition in f64, one head after the other.
    fn defined(
        [batch, heads, rows, width]: [usize; 4],
        positions: usize,
        [q, k, v, g]: [&[f64]; 4],
        scale: f64,
        hides: impl Fn(usize, usize, usize) -> bool,
    ) -> [Vec<f64>; 3] {
        let [mut to_q, mut to_k, mut to_v] =
            [q.len(), k.len(), v.len()].map(|count| vec![0.0; count]);
        for head in 0..batch * heads {
            let (queries, seen) = (head * rows * width, head * positions * width);
            for row in 0..rows {
                let at = queries + row * width;
                let dot = |a: &[f64], b: &[f64]| (0..width).map(|i| a[i] * b[i]).sum::<f64>();
                let mut weights: Vec<f64> = (0..positions)
                    .map(|key| match hides(head / heads, row, key) {
                        true => 0.0,
                        false => (scale * dot(&q[at..], &k[seen + key * width..])).exp(),
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                weights.iter_mut().for_each(|weight| *weight /= total);
                let products: Vec<f64> =
                    (0..positions).map(|key| dot(&g[at..], &v[seen + key * width..])).collect();
                let along: f64 = weights.iter().zip(&products).map(|(a, b)| a * b).sum();
                for key in 0..positions {
                    let to_score = scale * weights[key] * (products[key] - along);
                    let other = seen + key * width;
                    for i in 0..width {
                        to_q[at + i] += to_score * k[other + i];
                        to_k[other + i] += to_score * q[at + i];
                        to_v[other + i] += weights[key] * g[at + i];
                    }
                }
            }
        }
        [to_q, to_k, to_v]
    }

    fn check(
        shape: [usize; 4],
        positions: usize,
        [texts, length]: [usize; 2],
        hides: Option<fn(usize, usize, usize) -> bool>,
    ) {
        let [batch, heads, _, width] = shape;
        let seen = [batch, heads, positions, width];
        let flags = hides.map(|hides| {
            let flag =
                |at: usize| hides(at / positions / length, at / positions % length, at % positions);
            let flags: Vec<bool> = (0..texts * length * positions).map(flag).collect();
            let data = TensorData::new(flags, [texts, 1, length, positions]);
            Flex::bool_from_data(data, &Default::default())
        });
        for (dtype, bound) in [(DType::F32, 2e-5), (DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            let q = of_heads(shape, 1, dtype);
            let (k, v) = (of_heads(seen, 2, dtype), of_heads(seen, 3, dtype));
            let g = of_heads(shape, 4, dtype);
            let found = attend_backward([&q, &k, &v], 0.7, flags.as_ref(), &g);
            let given = [&q, &k, &v, &g].map(values);
            let expected = defined(
                shape,
                positions,
                given.each_ref().map(|g| &g[..]),
                0.7,
                |text, row, key| hides.is_some_and(|hides| hides(text % texts, row % length, key)),
            );
            for (found, expected) in found.expect("it has a kernel").iter().zip(expected) {
                assert_eq!(found.dtype(), dtype);
                for (found, expected) in values(found).iter().zip(expected) {
                    let apart = (found - expected).abs();
                    assert!(apart <= bound * expected.abs().max(1.0), "{found} for {expected}");
                }
            }
        }
    }

    #[test]
    fn it_is_its_definition_for_every_type_and_size() {
        for (shape, positions) in
            [([1, 1, 1, 2], 1), ([1, 3, 3, 64], 30), ([2, 2, 5, 34], 17), ([2, 1, 130, 16], 9)]
        {
            check(shape, positions, [1, 1], None);
        }
    }

    #[test]
    fn hidden_keys_have_no_part_in_it() {
        check([2, 2, 3 * 70, 16], 70, [1, 70], Some(|_, query, key| key > query));
        check([1, 2, 2 * 20, 8], 50, [1, 20], Some(|_, query, key| key > query + 30));
        check(
            [2, 1, 40, 8],
            40,
            [2, 40],
            Some(|text, query, key| key > query || (key < 5 * text && key != query)),
        );
    }

    #[test]
    fn other_forms_have_no_kernel() {
        let q = of_heads([1, 2, 6, 4], 1, DType::F32);
        let k = of_heads([1, 2, 5, 4], 2, DType::F32);
        assert!(attend_backward([&q, &k, &k], 1.0, None, &q).is_some());
        assert!(attend_backward([&q, &k, &q], 1.0, None, &q).is_none());
        assert!(attend_backward([&q, &k, &k], 1.0, None, &k).is_none());
        let half = in_dtype(k.clone(), DType::BF16);
        assert!(attend_backward([&q, &k, &half], 1.0, None, &q).is_none());
    }
}
