//! The frozen layer behind an adapter.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::Tensor;

use crate::ops::fold_rows;

/// A linear layer that never trains: y = x W + b.
///
/// That it is frozen is known from its type, so that other forms of the weight (packed, quantised)
/// can stand behind the same name.
///
/// # Shapes
/// - input `[..., d_input]`, output `[..., d_output]`
#[derive(Module, Debug)]
pub struct FrozenLinear {
    weight: Param<Tensor<2>>,       // [d_input, d_output]
    bias: Option<Param<Tensor<1>>>, // [d_output]
}

impl FrozenLinear {
    /// Freezes a linear layer.
    pub fn new(layer: Linear) -> Self {
        // A parameter that was never read is a recipe, shared by the clones of the layer: freezing it
        // would freeze them too. Reading it first makes this one's value its own.
        let _ = layer.weight.val();
        let _ = layer.bias.as_ref().map(Param::val);
        let Linear { weight, bias } = layer.no_grad();
        Self { weight, bias }
    }

    /// W, `[d_input, d_output]`.
    pub fn weight(&self) -> Tensor<2> {
        self.weight.val()
    }

    /// b, `[d_output]`, where the layer has one.
    pub fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(Param::val)
    }

    /// `[d_input, d_output]`.
    pub fn dims(&self) -> [usize; 2] {
        self.weight.dims()
    }

    /// y = x W + b.
    ///
    /// # Panics
    /// When the last axis of `input` is not `d_input`.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        apply(input, self.weight(), self.bias())
    }

    /// The same layer with another weight of the same shape.
    pub(crate) fn forward_with<const D: usize>(
        &self,
        input: Tensor<D>,
        weight: Tensor<2>,
    ) -> Tensor<D> {
        apply(input, weight, self.bias())
    }

    /// A plain, trainable layer with this one's bias and the given weight.
    pub(crate) fn into_linear_with(self, weight: Tensor<2>) -> Linear {
        let weight = if self.weight().is_autodiff() { weight.autodiff() } else { weight };
        let mut layer = self.into_linear();
        layer.weight = Param::from_tensor(weight);
        layer
    }

    /// Thaws the layer: the same weight and bias, trainable again.
    pub fn into_linear(self) -> Linear {
        Linear { weight: self.weight, bias: self.bias }.set_require_grad(true)
    }
}

fn apply<const D: usize>(
    input: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    fold_rows(input, |rows| {
        let output = rows.matmul(weight);
        match bias {
            Some(bias) => output + bias.unsqueeze(),
            None => output,
        }
    })
}
