//! y = x W + scaling (x A) B as one differentiable operation.
//!
//! With g = dL/dy:
//!
//! - dB = (scaling x A)^T g, `[rank, d_output]`
//! - dA = x^T (scaling g B^T), `[d_input, rank]`
//! - dx = g W^T + (scaling g B^T) A^T, `[rows, d_input]`
//!
//! W is a constant: no gradient of its shape is ever formed, nor the product A·B. What is kept between the passes is
//! scaling·xA, `[rows, rank]`, and where A gets a gradient x, unless what made it says how it is computed again. An x
//! that is a view keeps all that it is a view of.

// burn-ndarray and burn-tch are deprecated in 0.22, and the features that name them are opt-in.
#![allow(deprecated)]
// Without a backend the generated dispatch has no arm that uses its arguments.
#![cfg_attr(
    not(any(
        feature = "flex",
        feature = "ndarray",
        feature = "tch",
        feature = "wgpu",
        feature = "cuda"
    )),
    allow(unused_variables)
)]

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Backend, Dispatch, TensorMetadata, backend_extension, tensor::FloatTensor};
use burn::tensor::{DType, FloatDType, Shape, Tensor};

/// The operations that a backend may do better than their definitions.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Autodiff,
    Fusion: cfg(any(feature = "wgpu", feature = "cuda"))
)]
pub trait LoraOps: Backend {
    /// x W + scaling (x A) B with x W, or x W + b, as the `product` that is given. All are of rank 2 but x, `[...,
    /// d_input]`, of which `rows` are the values, folded, without gradients. x and `weight` are for the gradients alone.
    #[fusion(default)]
    fn lora_linear(
        product: FloatTensor<Self>,
        _x: FloatTensor<Self>,
        rows: FloatTensor<Self>,
        _weight: FloatTensor<Self>,
        lora_a: FloatTensor<Self>,
        lora_b: FloatTensor<Self>,
        scaling: f64,
    ) -> FloatTensor<Self> {
        let down = Self::scaled_product(rows, lora_a, scaling);
        Self::add_product(product, down, lora_b)
    }

    /// scaling · x · factor, for a factor A or B^T: x `[rows, inner]`, factor `[inner, columns]`; in the dtype
    /// of x, or in f32 where x is in half precision.
    #[fusion(default)]
    fn scaled_product(
        x: FloatTensor<Self>,
        factor: FloatTensor<Self>,
        scaling: f64,
    ) -> FloatTensor<Self> {
        let x = in_full::<Self>(x);
        let factor = in_dtype::<Self>(factor, x.dtype());
        Self::float_mul_scalar(Self::float_matmul(x, factor), scaling.into())
    }

    /// y + left · right in the dtype of y, for a product of small inner size: y `[rows, columns]`, left
    /// `[rows, rank]` as [`scaled_product`](Self::scaled_product) gives it, right `[rank, columns]` a factor. The sum
    /// is rounded once.
    #[fusion(default)]
    fn add_product(
        y: FloatTensor<Self>,
        left: FloatTensor<Self>,
        right: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let dtype = y.dtype();
        let left = in_full::<Self>(left);
        let right = in_dtype::<Self>(right, left.dtype());
        let y = in_dtype::<Self>(y, left.dtype());
        in_dtype::<Self>(Self::float_add(y, Self::float_matmul(left, right)), dtype)
    }

    /// x W: x `[rows, d_input]`, weight `[d_input, d_output]`.
    #[fusion(default)]
    fn product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_matmul(x, weight)
    }

    /// x W + b, which a backend may round once in half precision: bias `[d_output]`.
    #[fusion(default)]
    fn linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        with_bias::<Self>(Self::product(x, weight), bias)
    }

    /// left^T · right, of which one has few columns: left `[rows, m]`, right `[rows, n]`; one may be what
    /// [`scaled_product`](Self::scaled_product) gives. In f32 where one is in half precision.
    #[fusion(default)]
    fn transposed_product(left: FloatTensor<Self>, right: FloatTensor<Self>) -> FloatTensor<Self> {
        let [left, right] = [left, right].map(in_full::<Self>);
        Self::float_matmul(Self::float_transpose(left), right)
    }
}

fn with_bias<B: Backend>(product: FloatTensor<B>, bias: FloatTensor<B>) -> FloatTensor<B> {
    let columns = bias.shape()[0];
    B::float_add(product, B::float_reshape(bias, [1, columns].into()))
}

fn in_dtype<B: Backend>(tensor: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if tensor.dtype() == dtype { tensor } else { B::float_cast(tensor, dtype.into()) }
}

/// In f32 where it is in half precision.
fn in_full<B: Backend>(tensor: FloatTensor<B>) -> FloatTensor<B> {
    match tensor.dtype() {
        DType::F16 | DType::BF16 => B::float_cast(tensor, FloatDType::F32),
        _ => tensor,
    }
}

/// Half precision is widened block by block, and nothing of the size of x or y is held in f32.
#[cfg(feature = "flex")]
impl LoraOps for burn::backend::Flex {
    fn scaled_product(
        x: FloatTensor<Self>,
        factor: FloatTensor<Self>,
        scaling: f64,
    ) -> FloatTensor<Self> {
        let factor = match (x.dtype(), factor.dtype()) {
            (DType::F16 | DType::BF16, DType::F16 | DType::BF16) => factor, // each is widened
            (DType::F16 | DType::BF16, _) => in_dtype::<Self>(factor, DType::F32),
            (dtype, _) => in_dtype::<Self>(factor, dtype),
        };
        lora_flex::scaled_product(x, factor, scaling)
    }

    fn add_product(
        y: FloatTensor<Self>,
        left: FloatTensor<Self>,
        right: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let right = in_dtype::<Self>(right, left.dtype());
        lora_flex::add_product(y, left, right)
    }

    fn product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        lora_flex::linear(x, weight, None)
    }

    fn linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        lora_flex::linear(x, weight, Some(bias))
    }

    fn transposed_product(left: FloatTensor<Self>, right: FloatTensor<Self>) -> FloatTensor<Self> {
        lora_flex::transposed_product(left, right)
    }
}

#[cfg(feature = "ndarray")]
impl LoraOps for burn::backend::NdArray {}

#[cfg(feature = "tch")]
impl LoraOps for burn::backend::LibTorch {
    fn add_product(
        y: FloatTensor<Self>,
        left: FloatTensor<Self>,
        right: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let left = in_full::<Self>(left);
        let right = in_dtype::<Self>(right, left.dtype());
        lora_tch::add_product(y, left, right)
    }

    fn linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        match x.dtype() {
            DType::F16 | DType::BF16 => lora_tch::linear(x, weight, bias),
            _ => with_bias::<Self>(Self::product(x, weight), bias), // Burn's layer, to the bit
        }
    }
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
impl LoraOps for burn_cubecl::CubeBackend {}

#[derive(Debug)]
struct LoraLinearBackward;

#[derive(Debug, Clone)]
struct Saved<B: Backend> {
    /// Where A gets a gradient. `[..., d_input]` as the graph has it, which may compute it again.
    x: Option<NodeId>,
    shape: Shape,           // that of x
    down: FloatTensor<B>,   // scaling x A, [rows, rank]
    weight: FloatTensor<B>, // [d_input, d_output]
    lora_a: FloatTensor<B>, // [d_input, rank]
    lora_b: FloatTensor<B>, // [rank, d_output]
    scaling: f64,
}

impl<B: Backend + LoraOps> Backward<B, 3> for LoraLinearBackward {
    type State = Saved<B>;

    fn backward(
        self,
        ops: Ops<Saved<B>, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let [node_x, node_a, node_b] = ops.parents;
        let g = grads.consume::<B>(&ops.node); // [rows, d_output]
        let saved = ops.state;

        if let Some(node) = node_b {
            let db = B::transposed_product(saved.down, g.clone());
            grads.register::<B>(node.id, in_dtype::<B>(db, saved.lora_b.dtype()));
        }
        if node_a.is_none() && node_x.is_none() {
            return;
        }
        let up = B::float_transpose(saved.lora_b);
        let up = B::scaled_product(g.clone(), up, saved.scaling); // scaling g B^T, [rows, rank]
        if let (Some(node), Some(x)) = (node_a, saved.x) {
            let x: FloatTensor<B> = checkpointer.retrieve_node_output(x);
            let rows = [g.shape()[0], saved.lora_a.shape()[0]];
            let da = B::transposed_product(B::float_reshape(x, rows.into()), up.clone());
            grads.register::<B>(node.id, in_dtype::<B>(da, saved.lora_a.dtype()));
        }
        if let Some(node) = node_x {
            let dx = B::product(g, B::float_transpose(saved.weight));
            let dx = B::add_product(dx, up, B::float_transpose(saved.lora_a));
            grads.register::<B>(node.id, B::float_reshape(dx, saved.shape));
        }
    }
}

/// Of x W, and with a third parent, of x W + b.
#[derive(Debug)]
struct LinearBackward;

#[derive(Debug, Clone)]
struct Factors<B: Backend> {
    x: Option<NodeId>,              // [rows, d_input], where W gets a gradient
    weight: Option<FloatTensor<B>>, // [d_input, d_output], where x gets one
}

impl<B: Backend + LoraOps, const N: usize> Backward<B, N> for LinearBackward {
    type State = Factors<B>;

    fn backward(
        self,
        ops: Ops<Factors<B>, N>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let g = grads.consume::<B>(&ops.node); // [rows, d_output]
        let node = |at: usize| ops.parents.get(at).and_then(Option::as_ref);
        if let (Some(node), Some(x)) = (node(1), ops.state.x) {
            let x: FloatTensor<B> = checkpointer.retrieve_node_output(x);
            grads.register::<B>(node.id, B::float_matmul(B::float_transpose(x), g.clone()));
        }
        if let Some(node) = node(2) {
            let columns = g.shape()[1];
            let sum = B::float_sum_dim(g.clone(), 0);
            grads.register::<B>(node.id, B::float_reshape(sum, [columns].into()));
        }
        if let (Some(node), Some(weight)) = (node(0), ops.state.weight) {
            grads.register::<B>(node.id, B::product(g, B::float_transpose(weight)));
        }
    }
}

impl<B: Backend + LoraOps, C: CheckpointStrategy> LoraOps for Autodiff<B, C> {
    fn product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let prepared = LinearBackward.prepare::<C>([x.node(), weight.node()]);
        finish_linear(prepared.compute_bound().stateful(), x, weight, burns_product::<B>)
    }

    fn linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let prepared = LinearBackward.prepare::<C>([x.node(), weight.node(), bias.node()]);
        finish_linear(prepared.compute_bound().stateful(), x, weight, |x, weight| {
            let bias = bias.into_primitive();
            match x.dtype() {
                DType::F16 | DType::BF16 => <B as LoraOps>::linear(x, weight, bias),
                _ => with_bias::<B>(burns_product::<B>(x, weight), bias),
            }
        })
    }

    fn lora_linear(
        product: FloatTensor<Self>,
        x: FloatTensor<Self>,
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        lora_a: FloatTensor<Self>,
        lora_b: FloatTensor<Self>,
        scaling: f64,
    ) -> FloatTensor<Self> {
        let (product, rows) = (product.into_primitive(), rows.into_primitive());
        let prepared = LoraLinearBackward
            .prepare::<C>([x.node(), lora_a.node(), lora_b.node()])
            .compute_bound()
            .stateful();
        match prepared {
            OpsKind::Tracked(mut prepared) => {
                let node_x = lora_a.is_tracked().then(|| prepared.checkpoint(&x));
                let (shape, weight) = (x.shape(), weight.into_primitive());
                let (lora_a, lora_b) = (lora_a.into_primitive(), lora_b.into_primitive());
                let down = B::scaled_product(rows, lora_a.clone(), scaling);
                let y = B::add_product(product, down.clone(), lora_b.clone());
                let saved = Saved { x: node_x, shape, down, weight, lora_a, lora_b, scaling };
                prepared.finish(saved, y)
            }
            OpsKind::UnTracked(prepared) => prepared.finish(B::lora_linear(
                product,
                x.into_primitive(),
                rows,
                weight.into_primitive(),
                lora_a.into_primitive(),
                lora_b.into_primitive(),
                scaling,
            )),
        }
    }
}

/// x W with the bits of Burn's product in f32, so that a model whose adapters are disabled is its base to the bit. The
/// kernels for few rows add in another order, and many rows are what training has.
fn burns_product<B: Backend + LoraOps>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
) -> FloatTensor<B> {
    const MANY: usize = 64;
    match x.dtype() {
        DType::F32 if x.shape()[0] < MANY => B::float_matmul(x, weight),
        _ => B::product(x, weight),
    }
}

/// Saves for the backward pass of [`LinearBackward`] what the gradients that are wanted take.
fn finish_linear<B: Backend + LoraOps, C: CheckpointStrategy, const N: usize>(
    prepared: OpsKind<LinearBackward, B, Factors<B>, C, N>,
    x: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    forward: impl FnOnce(FloatTensor<B>, FloatTensor<B>) -> FloatTensor<B>,
) -> FloatTensor<Autodiff<B, C>> {
    match prepared {
        OpsKind::Tracked(mut prepared) => {
            let factors = Factors {
                x: weight.is_tracked().then(|| prepared.checkpoint(&x)),
                weight: x.is_tracked().then(|| weight.primitive().clone()),
            };
            prepared.finish(factors, forward(x.into_primitive(), weight.into_primitive()))
        }
        OpsKind::UnTracked(prepared) => {
            prepared.finish(forward(x.into_primitive(), weight.into_primitive()))
        }
    }
}

/// y = x W + scaling (x A) B, where W gets no gradient.
///
/// # Shapes
/// - `x` `[rows, d_input]`, `weight` `[d_input, d_output]`
/// - `lora_a` `[d_input, rank]`, `lora_b` `[rank, d_output]`
/// - output `[rows, d_output]`
///
/// `x` and `weight` have one dtype, which the output has too; the factors may have another, and their
/// gradients have theirs. Beside half precision x A and (x A) B are formed in f32, and the sum is rounded once.
///
/// # Panics
/// When the shapes do not fit each other, or the device's backend was not compiled into this crate
/// (Cargo features `flex`, `ndarray`, `tch`, `wgpu`, `vulkan`, `metal`, `cuda`).
///
/// Source: "LoRA: Low-Rank Adaptation of Large Language Models",
/// [arXiv:2106.09685](https://arxiv.org/abs/2106.09685).
pub fn lora_linear(
    x: Tensor<2>,
    weight: Tensor<2>,
    lora_a: Tensor<2>,
    lora_b: Tensor<2>,
    scaling: f64,
) -> Tensor<2> {
    check_shapes(&x, &weight, &lora_a, &lora_b);
    let rows = x.clone().without_autodiff();
    let product = product(rows.clone(), weight.clone().without_autodiff());
    lora_linear_over(product, x, rows, weight, lora_a, lora_b, scaling)
}

/// # Panics
/// When the shapes do not fit each other.
pub(crate) fn check_shapes(
    x: &Tensor<2>,
    weight: &Tensor<2>,
    lora_a: &Tensor<2>,
    lora_b: &Tensor<2>,
) {
    let ([_, d_input], [w_input, d_output]) = (x.dims(), weight.dims());
    let ([a_input, rank], [b_rank, b_output]) = (lora_a.dims(), lora_b.dims());
    assert!(
        d_input == w_input && d_input == a_input && rank == b_rank && d_output == b_output,
        "lora_linear: expected x [rows, d_input], W [d_input, d_output], A [d_input, rank] and \
         B [rank, d_output], found x {:?}, W {:?}, A {:?} and B {:?}",
        x.dims(),
        weight.dims(),
        lora_a.dims(),
        lora_b.dims(),
    );
}

/// The same with x W, or x W + b, as `product`, where the caller has it, and of an x with more axes, none of them empty,
/// whose values are `rows`. Both are without autodiff: constants, whatever the checkpointing of x is. Of x the graph has
/// what made it, which may compute it again; folded by Burn's `reshape`, it would be kept as that gave it.
pub(crate) fn lora_linear_over<const D: usize>(
    product: Tensor<2>,
    x: Tensor<D>,
    rows: Tensor<2>,
    weight: Tensor<2>,
    lora_a: Tensor<2>,
    lora_b: Tensor<2>,
    scaling: f64,
) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as LoraOps>::lora_linear(
        product.into_dispatch(),
        x.into_dispatch(),
        rows.into_dispatch(),
        weight.into_dispatch(),
        lora_a.into_dispatch(),
        lora_b.into_dispatch(),
        scaling,
    ))
}

/// x W, as the backend does it best; x and W get gradients where they want them.
///
/// # Shapes
/// - `x` `[rows, d_input]`, `weight` `[d_input, d_output]`, output `[rows, d_output]`
pub(crate) fn product(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    if is_quantised(&weight) {
        return x.matmul(weight);
    }
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(<Dispatch as LoraOps>::product(x, weight))
}

/// x W + b, likewise; where a backend can, rounded once.
///
/// # Shapes
/// - `x` `[rows, d_input]`, `weight` `[d_input, d_output]`, `bias` `[d_output]`, output `[rows, d_output]`
pub(crate) fn linear(x: Tensor<2>, weight: Tensor<2>, bias: Tensor<1>) -> Tensor<2> {
    if is_quantised(&weight) {
        return x.matmul(weight) + bias.unsqueeze();
    }
    let (x, weight, bias) = (x.into_dispatch(), weight.into_dispatch(), bias.into_dispatch());
    Tensor::from_dispatch(<Dispatch as LoraOps>::linear(x, weight, bias))
}

/// Whether it holds Burn's quantised numbers, which its own operations alone can read.
fn is_quantised(weight: &Tensor<2>) -> bool {
    matches!(weight.dtype(), DType::QFloat(_))
}

/// left^T · right, of which one has few columns, without gradients.
///
/// # Shapes
/// - `left` `[rows, m]`, `right` `[rows, n]`, output `[m, n]`
pub(crate) fn transposed_product(left: Tensor<2>, right: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as LoraOps>::transposed_product(
        left.into_dispatch(),
        right.into_dispatch(),
    ))
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Tensor, TensorData};

    use super::*;

    fn values(shape: &[usize], seed: f32) -> TensorData {
        let count: usize = shape.iter().product();
        let value = |i: usize| ((i as f32 + 1.0) * seed * 0.37).sin();
        TensorData::new((0..count).map(value).collect::<Vec<f32>>(), shape.to_vec())
    }

    fn close(what: &str, found: Option<TensorData>, expected: Option<TensorData>, bound: f64) {
        assert_eq!(
            found.is_some(),
            expected.is_some(),
            "{what}: a gradient where none is wanted, or none"
        );
        let (Some(found), Some(expected)) = (found, expected) else { return };
        assert_eq!((found.shape(), found.dtype()), (expected.shape(), expected.dtype()), "{what}");
        let (found, expected): (Vec<f64>, Vec<f64>) =
            (found.iter().collect(), expected.iter().collect());
        let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= bound * largest, "{what}: {found} for {expected}");
        }
    }

    #[test]
    #[cfg(feature = "flex")]
    fn a_weight_that_burn_quantised_is_multiplied_with_gradients() {
        use burn::tensor::{Device, quantization::QuantScheme};
        let device = Device::flex().autodiff();
        let x = || Tensor::<2>::from_data(values(&[4, 32], 1.0), &device).require_grad();
        let weight = Tensor::<2>::from_data(values(&[32, 32], 2.0), &device);
        let quantised = weight.quantize_dynamic(&QuantScheme::default());
        let bias = Tensor::<1>::from_data(values(&[32], 3.0), &device);
        let expected = x().matmul(quantised.clone()).into_data();
        close("x W", Some(product(x(), quantised.clone()).into_data()), Some(expected), 1e-6);
        let y = linear(x(), quantised.clone(), bias.clone()).into_data();
        let expected = (x().matmul(quantised) + bias.unsqueeze()).into_data();
        close("x W + b", Some(y), Some(expected), 1e-6);
    }

    /// Each combination of what is tracked, few rows and many, with every checkpointing: outputs and gradients are those
    /// of Burn's operations.
    #[test]
    fn a_linear_layer_has_the_gradients_of_burns_operations() {
        let device = crate::device_from_env().unwrap();
        for device in [device.clone().autodiff(), device.autodiff().gradient_checkpointing()] {
            for (dtype, bound) in [(DType::F32, 1e-5), (DType::BF16, 2e-2)] {
                if !crate::supports_dtype(&device, dtype) {
                    continue;
                }
                for rows in [3, 80] {
                    for tracked in 0..8 {
                        let run = |ours: bool, has_bias: bool| {
                            let place = (&device, dtype);
                            let wants = |at: usize| tracked >> at & 1 == 1;
                            let x = Tensor::<2>::from_data(values(&[rows, 5], 1.0), place);
                            let weight = Tensor::<2>::from_data(values(&[5, 7], 2.0), place);
                            let bias = Tensor::<1>::from_data(values(&[7], 3.0), place);
                            let x = x.set_require_grad(wants(0));
                            let weight = weight.set_require_grad(wants(1));
                            let bias = bias.set_require_grad(wants(2));
                            let y = match (ours, has_bias) {
                                (true, true) => linear(x.clone(), weight.clone(), bias.clone()),
                                (true, false) => product(x.clone(), weight.clone()),
                                (false, true) => {
                                    x.clone().matmul(weight.clone()) + bias.clone().unsqueeze()
                                }
                                (false, false) => x.clone().matmul(weight.clone()),
                            };
                            let data = y.to_data();
                            let _ = data.as_bytes(); // CubeCL reads at the first look, and y goes on
                            let factor = Tensor::from_data(values(&[rows, 7], 4.0), place);
                            // Somewhere a gradient is wanted, or there would be no graph.
                            let anchor = Tensor::<2>::from_data(values(&[rows, 7], 5.0), place);
                            let sum = (y * factor + anchor.require_grad()).sum();
                            let gradients = sum.backward();
                            let of = |tensor: Tensor<2>| {
                                tensor.grad(&gradients).map(|gradient| gradient.into_data())
                            };
                            let bias = bias.grad(&gradients).map(|gradient| gradient.into_data());
                            (data, of(x), of(weight), bias)
                        };
                        for has_bias in [false, true] {
                            let (found, expected) = (run(true, has_bias), run(false, has_bias));
                            let what =
                                format!("{dtype:?}, {rows} rows, {tracked:03b}, bias {has_bias}");
                            close(&what, Some(found.0), Some(expected.0), bound);
                            close(&format!("{what}: x"), found.1, expected.1, bound);
                            close(&format!("{what}: W"), found.2, expected.2, bound);
                            close(&format!("{what}: b"), found.3, expected.3, bound);
                        }
                    }
                }
            }
        }
    }
}
