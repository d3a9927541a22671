//! What trains in full, in place of a frozen layer's own values.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};

use crate::adapter::{in_dtype, in_full, on};
use crate::error::{Error, Result};
use crate::frozen::{FrozenLayer, Weights};

/// Trainable copies of some of a layer's values, beside the frozen ones: the whole layer
/// (`modules_to_save`), its bias, or some rows of an embedding. Every part that is there acts in place
/// of the layer's own.
#[derive(Module, Debug)]
pub struct Replacement {
    /// In place of W, `[d_input, d_output]`.
    pub weight: Option<Param<Tensor<2>>>,
    /// In place of b, `[d_output]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// In place of some rows of an embedding.
    pub tokens: Option<TokenRows>,
}

/// Rows of an embedding that train.
#[derive(Module, Debug)]
pub struct TokenRows {
    /// The rows, `[tokens, d_output]`.
    pub rows: Param<Tensor<2>>,
    // Parameters, so that a record that brings rows brings their tokens too.
    indices: Param<Tensor<1, Int>>, // the token ids, [tokens]
    slots: Param<Tensor<1, Int>>,   // for each id of the vocabulary: 0, or 1 + its row here
}

impl Replacement {
    /// Copies of a layer's weight and bias, in f32 beside half-precision ones, as adapters are.
    pub(crate) fn of_layer<F: FrozenLayer>(layer: &F) -> Self {
        let weight = layer.weight();
        let device = weight.device();
        let weight = on(in_full(weight.without_autodiff()), &device);
        let bias = layer.bias().map(|bias| on(in_full(bias.without_autodiff()), &device));
        Self {
            weight: Some(Param::from_tensor(weight)),
            bias: bias.map(Param::from_tensor),
            tokens: None,
        }
    }

    /// Which values: `the whole layer`, `its bias`, `3 tokens`.
    pub fn what(&self) -> String {
        match (&self.weight, &self.tokens) {
            (Some(_), _) => "the whole layer".to_owned(),
            (None, Some(tokens)) => format!("{} tokens", tokens.count()),
            (None, None) => "its bias".to_owned(),
        }
    }

    /// Values that train.
    pub fn num_parameters(&self) -> usize {
        let weight = self.weight.as_ref().map_or(0, |weight| weight.shape().num_elements());
        let bias = self.bias.as_ref().map_or(0, |bias| bias.dims()[0]);
        let tokens = self.tokens.as_ref().map_or(0, |tokens| tokens.rows.shape().num_elements());
        weight + bias + tokens
    }

    /// The layer's weight and bias with this in place of its own, without autodiff.
    pub(crate) fn weights<F: FrozenLayer>(&self, base: &F) -> Weights {
        self.weights_over(base.weight(), base.bias())
    }

    pub(crate) fn weights_over(&self, own: Tensor<2>, bias: Option<Tensor<1>>) -> Weights {
        let own = own.without_autodiff();
        let dtype = own.dtype();
        let weight = match &self.weight {
            Some(weight) => weight.val().without_autodiff().cast(dtype),
            None => own,
        };
        let weight = match &self.tokens {
            Some(tokens) => tokens.put_into(weight),
            None => weight,
        };
        let bias = match &self.bias {
            Some(bias) => Some(bias.val().without_autodiff().cast(dtype)),
            None => bias.map(Tensor::without_autodiff),
        };
        Weights { weight, bias }
    }
}

impl TokenRows {
    /// The rows of `weight` `[vocabulary, d_output]` at `ids`, which then train.
    ///
    /// # Errors
    /// When `ids` is empty, names a row twice, or one that is not there.
    pub(crate) fn new(weight: &Tensor<2>, ids: &[usize]) -> Result<Self> {
        check_ids(ids, weight.dims()[0])?;
        let rows = weight.clone().without_autodiff();
        let indices = index_tensor(ids, &rows);
        let rows = on(in_full(rows.select(0, indices)), &weight.device());
        Self::from_rows(weight, ids, rows)
    }

    /// Given rows for `ids`.
    pub(crate) fn from_rows(weight: &Tensor<2>, ids: &[usize], rows: Tensor<2>) -> Result<Self> {
        let [vocabulary, _] = weight.dims();
        check_ids(ids, vocabulary)?;
        let mut slots = vec![0_i32; vocabulary];
        for (row, id) in ids.iter().enumerate() {
            slots[*id] = row as i32 + 1;
        }
        let device = weight.device();
        Ok(Self {
            rows: Param::from_tensor(rows),
            indices: int_param(index_tensor(ids, weight)),
            slots: int_param(Tensor::from_data(TensorData::new(slots, [vocabulary]), &device)),
        })
    }

    /// The rows of a layer's own weight `[vocabulary, d_output]` for these tokens.
    pub(crate) fn rows_of(&self, weight: &Tensor<2>) -> Tensor<2> {
        weight.clone().select(0, self.indices.val().without_autodiff())
    }

    /// The same tokens with other rows.
    pub(crate) fn with_rows(&self, rows: Param<Tensor<2>>) -> Self {
        Self { rows, ..self.clone() }
    }

    /// The size of the vocabulary to which the tokens belong.
    pub(crate) fn vocabulary(&self) -> usize {
        self.slots.dims()[0]
    }

    /// The token ids, in the order of the rows.
    pub fn ids(&self) -> Vec<usize> {
        let ids = self.indices.val().without_autodiff().into_data();
        ids.iter::<i64>().map(|id| id as usize).collect() // they came from usize
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.rows.dims()[0]
    }

    /// `looked_up` `[tokens, d_output]`, the frozen rows of `ids`, with these in their places.
    pub(crate) fn put_over(&self, looked_up: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
        let rows = self.rows.val();
        let rows = in_dtype(rows, looked_up.dtype());
        let slots = self.slots.val().select(0, ids);
        let nothing = Tensor::zeros([1, rows.dims()[1]], (&rows.device(), rows.dtype()));
        let replaced = Tensor::cat(vec![nothing, rows], 0).select(0, slots.clone());
        let frozen = slots.equal_elem(0).unsqueeze_dim::<2>(1).expand(looked_up.dims());
        replaced.mask_where(frozen, looked_up)
    }

    /// `logits` `[rows, vocabulary]` of the states `hidden` `[rows, d_output]`, made with the frozen
    /// embedding as the head, with the columns of these tokens made anew.
    pub(crate) fn put_over_logits(&self, logits: Tensor<2>, hidden: Tensor<2>) -> Tensor<2> {
        let rows = in_dtype(self.rows.val(), hidden.dtype());
        let ours = hidden.matmul(rows.transpose());
        let indices = self.indices.val();
        let theirs = logits.clone().select(1, indices.clone());
        // In two steps: what is left of theirs is zero, so that ours takes no rounding of theirs over.
        let without = logits.select_assign(1, indices.clone(), theirs.neg(), IndexingUpdateOp::Add);
        without.select_assign(1, indices, ours, IndexingUpdateOp::Add)
    }

    /// `weight` `[vocabulary, d_output]` with these rows in their places.
    fn put_into(&self, weight: Tensor<2>) -> Tensor<2> {
        let rows = self.rows.val().without_autodiff().cast(weight.dtype());
        let columns = weight.dims()[1];
        self.ids().into_iter().enumerate().fold(weight, |weight, (row, id)| {
            let value = rows.clone().slice([row..row + 1, 0..columns]);
            weight.slice_assign([id..id + 1, 0..columns], value)
        })
    }
}

fn check_ids(ids: &[usize], vocabulary: usize) -> Result<()> {
    let error =
        |expected: String, found: String| Err(Error::setting("trainable_tokens", expected, found));
    if ids.is_empty() {
        return error("at least one token id".to_owned(), "none".to_owned());
    }
    for (place, id) in ids.iter().enumerate() {
        if *id >= vocabulary {
            return error(format!("ids below {vocabulary}, the vocabulary"), id.to_string());
        }
        if ids[..place].contains(id) {
            return error("each id once".to_owned(), format!("{id} twice"));
        }
    }
    Ok(())
}

fn int_param(tensor: Tensor<1, Int>) -> Param<Tensor<1, Int>> {
    Param::initialized(ParamId::new(), tensor)
}

fn index_tensor(ids: &[usize], beside: &Tensor<2>) -> Tensor<1, Int> {
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let length = ids.len();
    Tensor::from_data(TensorData::new(ids, [length]), &beside.device())
}
