//! The loss of a language model: how surprised its logits are by the tokens that came.

use burn::backend::TensorMetadata;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::FlexTensor;
use crate::exponential::exp_of_negative;
use crate::weight::{Weight, by_dtype, tensor_of, values_of};

/// `-ln softmax(logits)[target]` of each row, in f32.
///
/// # Shapes
/// - logits `[rows, classes]`, contiguous; a target for each row, below `classes`
/// - output `[rows]`
///
/// `None` for tensors of another form, of other dtypes than f32, bf16 and f16, and without values.
pub fn cross_entropy(logits: &FlexTensor, targets: &[usize]) -> Option<FlexTensor> {
    by_dtype!(logits.dtype(), cross_entropy_in(logits, targets))
}

fn cross_entropy_in<T: Weight>(logits: &FlexTensor, targets: &[usize]) -> Option<FlexTensor> {
    let (values, classes) = (values_of::<T>(logits)?, fitting(logits, targets)?);
    let rows = values.par_chunks_exact(classes).zip(targets);
    let losses: Vec<f32> = rows
        .map(|(row, target)| {
            let (largest, sum) = Arch::new().dispatch(Sum { row });
            sum.ln() + largest - row[*target].widen()
        })
        .collect();
    Some(tensor_of(losses, [targets.len()]))
}

/// The gradient of [`cross_entropy`] with respect to the logits, from `g`, that of each row's loss: g (softmax - 1 at
/// the target). It takes the place of the logits where nobody else holds them.
///
/// # Shapes
/// - as there; g `[rows]` in f32; output `[rows, classes]` in the dtype of the logits
///
/// `None` for tensors of another form, of other dtypes, and without values.
pub fn cross_entropy_backward(
    logits: FlexTensor,
    targets: &[usize],
    g: &FlexTensor,
) -> Option<FlexTensor> {
    by_dtype!(logits.dtype(), cross_entropy_backward_in(logits, targets, g))
}

fn cross_entropy_backward_in<T: Weight>(
    mut logits: FlexTensor,
    targets: &[usize],
    g: &FlexTensor,
) -> Option<FlexTensor> {
    let classes = fitting(&logits, targets)?;
    let g = g.to_contiguous();
    let gs = values_of::<f32>(&g)?;
    if gs.len() != targets.len() {
        return None;
    }
    let turn = |values: &mut [T]| {
        let rows = values.par_chunks_exact_mut(classes).zip(targets.par_iter().zip(gs));
        rows.for_each(|(row, (target, g))| {
            Arch::new().dispatch(Backward { row, target: *target, g: *g });
        });
    };
    let whole = logits.layout().start_offset() == 0 && logits.is_contiguous();
    let count = logits.layout().num_elements();
    if whole && let Some(values) = logits.try_storage_mut::<T>() {
        turn(values.get_mut(..count)?);
        return Some(logits);
    }
    let mut values = values_of::<T>(&logits)?.to_vec();
    turn(&mut values);
    Some(tensor_of(values, logits.shape()))
}

/// The number of classes, where there are logits of some for each target, and each target is one of them.
fn fitting(logits: &FlexTensor, targets: &[usize]) -> Option<usize> {
    let shape = logits.layout().shape();
    let fits = shape.num_dims() == 2 && shape[0] == targets.len() && !targets.is_empty();
    let classes = *shape.last()?;
    (fits && targets.iter().all(|target| *target < classes)).then_some(classes)
}

/// The largest logit of a row, and the sum of all e^(logit - largest).
struct Sum<'a, T> {
    row: &'a [T],
}

const LANES: usize = 16; // numbers side by side, which a vector can hold

impl<T: Weight> WithSimd for Sum<'_, T> {
    type Output = (f32, f32);

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, _: S) -> (f32, f32) {
        let largest = largest(self.row);
        let mut sums = [0.0; LANES];
        let mut chunks = self.row.chunks_exact(LANES);
        for chunk in &mut chunks {
            for (sum, logit) in sums.iter_mut().zip(chunk) {
                *sum += exp_of_negative(logit.widen() - largest);
            }
        }
        let rest = chunks.remainder().iter();
        let rest: f32 = rest.map(|logit| exp_of_negative(logit.widen() - largest)).sum();
        (largest, sums.iter().sum::<f32>() + rest)
    }
}

#[inline(always)]
fn largest<T: Weight>(row: &[T]) -> f32 {
    let mut most = [f32::NEG_INFINITY; LANES];
    let mut chunks = row.chunks_exact(LANES);
    for chunk in &mut chunks {
        most.iter_mut().zip(chunk).for_each(|(most, logit)| *most = most.max(logit.widen()));
    }
    let rest = chunks.remainder().iter().map(|logit| logit.widen());
    rest.chain(most).fold(f32::NEG_INFINITY, f32::max)
}

/// A row of logits to its gradient, in place.
struct Backward<'a, T> {
    row: &'a mut [T],
    target: usize,
    g: f32,
}

impl<T: Weight> WithSimd for Backward<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { row, target, g } = self;
        let (largest, sum) = Sum { row }.with_simd(simd);
        let factor = g / sum;
        let at_target = factor * exp_of_negative(row[target].widen() - largest) - g;
        for logit in row.iter_mut() {
            *logit = T::round(factor * exp_of_negative(logit.widen() - largest));
        }
        row[target] = T::round(at_target);
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::backend::ops::FloatTensorOps;
    use burn::tensor::DType;

    use super::*;
    use crate::samples::{in_dtype, tensor, transposed, values};

    fn case([rows, classes]: [usize; 2], dtype: DType) -> (FlexTensor, Vec<usize>) {
        let logits = Flex::float_mul_scalar(tensor([rows, classes], 1), 8.0.into());
        let targets = (0..rows).map(|row| (row * row + 3) % classes).collect();
        (in_dtype(logits, dtype), targets)
    }

    /// Where a tensor's values are.
    fn place(tensor: &FlexTensor) -> usize {
        match tensor.dtype() {
            DType::F32 => tensor.storage::<f32>().as_ptr().addr(),
            DType::F16 => tensor.storage::<half::f16>().as_ptr().addr(),
            _ => tensor.storage::<half::bf16>().as_ptr().addr(),
        }
    }

    #[test]
    fn it_and_its_gradient_are_their_definitions() {
        for (dtype, bound) in [(DType::F32, 2e-6), (DType::F16, 1e-3), (DType::BF16, 8e-3)] {
            for shape in [[1, 1], [3, 5], [7, 1000], [40, 16]] {
                let (logits, targets) = case(shape, dtype);
                let g = Flex::float_reshape(tensor([1, shape[0]], 2), [shape[0]].into());
                let (mut losses, mut gradients) = (Vec::new(), Vec::new());
                let (given, gs) = (values(&logits), values(&g));
                for (row, (logits, target)) in
                    given.chunks_exact(shape[1]).zip(&targets).enumerate()
                {
                    let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
                    losses.push(sum.ln() - logits[*target]);
                    gradients.extend(logits.iter().enumerate().map(|(class, logit)| {
                        gs[row] * (logit.exp() / sum - f64::from(class == *target))
                    }));
                }
                let close = |found: &FlexTensor, expected: &[f64], bound: f64| {
                    for (found, expected) in values(found).iter().zip(expected) {
                        let apart = (found - expected).abs();
                        assert!(apart <= bound * expected.abs().max(0.1), "{found}, {expected}");
                    }
                };
                let found = cross_entropy(&logits, &targets).expect("it has a kernel");
                assert_eq!(found.dtype(), DType::F32);
                close(&found, &losses, 1e-5);
                let found = cross_entropy_backward(logits.clone(), &targets, &g).unwrap();
                close(&found, &gradients, bound);
                assert_eq!(values(&logits), given, "logits that others hold were changed");
                let place = place(&logits);
                let found = cross_entropy_backward(logits, &targets, &g).unwrap();
                close(&found, &gradients, bound);
                assert_eq!(self::place(&found), place, "not in place");
            }
        }
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let logits = tensor_of(vec![1e30f32, -1e30, 0.0], [1, 3]);
        let of = |target| values(&cross_entropy(&logits, &[target]).unwrap())[0];
        assert_eq!([of(0), of(1), of(2)], [0.0, 2e30f32 as f64, 1e30f32 as f64]);
        let nan = tensor_of(vec![f32::NAN, 0.0], [1, 2]);
        assert!(values(&cross_entropy(&nan, &[1]).unwrap())[0].is_nan());
    }

    #[test]
    fn other_forms_have_no_kernel() {
        let (logits, targets) = case([3, 5], DType::F32);
        assert!(cross_entropy(&logits, &targets[1..]).is_none());
        assert!(cross_entropy(&logits, &[1, 2, 5]).is_none());
        assert!(cross_entropy(&transposed([3, 5], 1), &targets).is_none());
        let g = tensor_of(vec![1.0f32; 2], [2]);
        assert!(cross_entropy_backward(logits, &targets, &g).is_none());
    }
}
