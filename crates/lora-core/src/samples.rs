//! What differs from sample to sample in a batch of several adapters.

use burn::module::Module;
use burn::tensor::Tensor;

/// Which part of a layer's adapter is meant for which sample of a batch.
#[derive(Module, Debug)]
pub struct Samples {
    /// 1 for the ranks that count for a sample, 0 for the others', `[batch, rank]`.
    pub(crate) ranks: Tensor<2>,
    /// DoRA's factors on the columns, `[batch, d_output]`, where an adapter has them.
    pub(crate) scale: Option<Tensor<2>>,
    /// The biases of the output, `[batch, d_output]`, where an adapter has one of its own.
    pub(crate) bias: Option<Tensor<2>>,
}

impl Samples {
    /// # Panics
    /// When the leading axis of a layer's input is not the batch. A fold of it, `[batch · length, d]`,
    /// could only be guessed at.
    pub(crate) fn check(&self, dims: &[usize]) {
        let (batch, found) = (self.ranks.dims()[0], dims[0]);
        assert!(
            dims.len() > 1 && found == batch,
            "expected an input whose leading axis is the {batch} samples of the mixed batch, \
             found {dims:?}"
        );
    }
}

/// The values of each sample, `[batch, n]`, for each of its rows, `[rows, n]`.
pub(crate) fn for_each_row(values: &Tensor<2>, rows: usize) -> Tensor<2> {
    let [batch, columns] = values.dims();
    match rows / batch {
        // In a shape that is asked of `reshape`, Burn takes a 0 as "the size that was there".
        0 => Tensor::zeros([0, columns], (&values.device(), values.dtype())),
        each => {
            let values = values.clone().unsqueeze_dim::<3>(1);
            values.expand([batch, each, columns]).reshape([rows, columns])
        }
    }
}
