//! What stands between the products of a decoder, and its loss, with gradients, on Flex.
//!
//! Each function gives `None` on other backends and for tensors of another form; the caller's own operations are
//! for those. Burn's operations one after the other keep the result of each for the backward pass, and go over it on
//! one thread; these keep their inputs at most, with gradient checkpointing too. The output of a norm and of the gate,
//! which an adapted layer after it asks for in its backward pass, is computed again there: that costs a pass over it;
//! kept, these outputs would be a third of a block's activations.

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{
        base::Checkpointer,
        retro_forward::RetroForward,
        state::BackwardStates,
        strategy::{BalancedCheckpointing, CheckpointStrategy},
    },
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::{BoolTensor, FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Bool, DType, Device, Int, Tensor};
use lora_flex::{FlexTensor, Rounding};

/// The operations, of tensors that have been seen to fit.
#[backend_extension(Flex: cfg(feature = "flex"), Autodiff)]
pub trait TrainingOps: Backend {
    /// gamma · x / sqrt(mean(x²) + epsilon) over the last axis.
    fn train_rms_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self>;

    /// Splits x into heads and rotates each.
    fn train_rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// softmax(scale q k^T) v, without the hidden keys.
    fn train_attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        hidden: BoolTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self>;

    /// silu(gate) · up.
    fn train_gated(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `-ln softmax(logits)[target]` of each row, in f32.
    fn train_cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self>;
}

const FITS: &str = "tensors that were seen to fit";

fn in_one_piece(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The classes that a tensor of integers names; one that cannot be is beyond every class.
fn classes(targets: &FlexTensor) -> Vec<usize> {
    let targets = in_one_piece(targets.clone());
    let (first, count) = (targets.layout().start_offset(), targets.layout().num_elements());
    let class = |target: i64| usize::try_from(target).unwrap_or(usize::MAX);
    match targets.dtype() {
        DType::I64 => {
            targets.storage::<i64>()[first..][..count].iter().map(|target| class(*target)).collect()
        }
        DType::I32 => targets.storage::<i32>()[first..][..count]
            .iter()
            .map(|target| class((*target).into()))
            .collect(),
        _ => Vec::new(),
    }
}

impl TrainingOps for Flex {
    fn train_rms_norm(x: FlexTensor, gamma: FlexTensor, epsilon: f64) -> FlexTensor {
        lora_flex::rms_norm(&in_one_piece(x), &in_one_piece(gamma), epsilon).expect(FITS)
    }

    fn train_rotate(x: FlexTensor, cos: FlexTensor, sin: FlexTensor) -> FlexTensor {
        let [x, cos, sin] = [x, cos, sin].map(in_one_piece);
        lora_flex::rotate(&x, &cos, &sin).expect(FITS)
    }

    fn train_attend(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        hidden: FlexTensor,
        scale: f64,
    ) -> FlexTensor {
        let [q, k, v, hidden] = [q, k, v, hidden].map(in_one_piece);
        lora_flex::attend(&q, &k, &v, scale as f32, Some(&hidden), Rounding::Output).expect(FITS)
    }

    fn train_gated(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        lora_flex::gated(&in_one_piece(gate), &in_one_piece(up)).expect(FITS)
    }

    fn train_cross_entropy(logits: FlexTensor, targets: FlexTensor) -> FlexTensor {
        lora_flex::cross_entropy(&in_one_piece(logits), &classes(&targets))
            .expect("cross_entropy: targets below the number of logits in a row")
    }
}

/// A tensor on an autodiff device, whatever its checkpointing is.
type AutodiffFlexTensor = FloatTensor<Autodiff<Flex>>;

/// What an operation is computed again of.
#[derive(Debug)]
enum Input {
    Node(NodeId),
    Constant(FlexTensor), // what has no gradient is in no graph
}

impl Input {
    fn of(tensor: &AutodiffFlexTensor) -> Self {
        match tensor.is_tracked() {
            true => Self::Node(tensor.id()),
            false => Self::Constant(tensor.primitive().clone()),
        }
    }

    fn value(&self, states: &mut BackwardStates) -> FlexTensor {
        match self {
            Self::Node(id) => states.get_state(id),
            Self::Constant(tensor) => tensor.clone(),
        }
    }
}

/// Prepares an operation whose output, where the backward pass asks for it, is computed `again`.
fn prepare_recomputed<O: Backward<Flex, N>, const N: usize>(
    operation: O,
    inputs: [&AutodiffFlexTensor; N],
    again: impl RetroForward,
) -> OpsKind<O, Flex, O::State, BalancedCheckpointing, N> {
    let prepared = operation.prepare::<BalancedCheckpointing>(inputs.map(|input| input.node()));
    let tracked: Vec<_> = inputs.into_iter().filter(|input| input.is_tracked()).collect();
    match tracked.is_empty() {
        true => prepared.compute_bound().stateful(), // outside of every graph nothing is computed again
        false => prepared.memory_bound().retro_forward(again).parents(tracked).stateful(),
    }
}

#[derive(Debug)]
struct RecomputeNorm {
    inputs: [Input; 2], // x and gamma
    epsilon: f64,
}

impl RetroForward for RecomputeNorm {
    fn forward(&self, states: &mut BackwardStates, to: NodeId) {
        let [x, gamma] = self.inputs.each_ref().map(|input| input.value(states));
        states.save(to, Flex::train_rms_norm(x, gamma, self.epsilon));
    }
}

#[derive(Debug)]
struct RecomputeGated([Input; 2]); // gate and up

impl RetroForward for RecomputeGated {
    fn forward(&self, states: &mut BackwardStates, to: NodeId) {
        let [gate, up] = self.0.each_ref().map(|input| input.value(states));
        states.save(to, Flex::train_gated(gate, up));
    }
}

/// An operation's backward pass over its kept inputs.
#[derive(Debug)]
struct FromInputs;

#[derive(Debug, Clone)]
struct Norm {
    x: FlexTensor,
    gamma: FlexTensor,
    epsilon: f64,
}

impl Backward<Flex, 2> for FromInputs {
    type State = Norm;

    fn backward(self, ops: Ops<Norm, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [to_x, to_gamma] = ops.parents;
        let g = grads.consume::<Flex>(&ops.node);
        let Norm { x, gamma, epsilon } = ops.state;
        let (dx, dgamma) = lora_flex::rms_norm_backward(&x, &gamma, epsilon, &g).expect(FITS);
        for (node, gradient) in [(to_x, dx), (to_gamma, dgamma)] {
            if let Some(node) = node {
                grads.register::<Flex>(node.id, gradient);
            }
        }
    }
}

#[derive(Debug)]
struct Turned;

impl Backward<Flex, 1> for Turned {
    type State = [FlexTensor; 2]; // cos and sin

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [to_x] = ops.parents;
        let g = grads.consume::<Flex>(&ops.node);
        let [cos, sin] = ops.state;
        if let Some(node) = to_x {
            let dx = lora_flex::rotate_backward(&g, &cos, &sin).expect(FITS);
            grads.register::<Flex>(node.id, dx);
        }
    }
}

#[derive(Debug)]
struct Attended;

#[derive(Debug, Clone)]
struct Attention {
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    hidden: FlexTensor,
    scale: f64,
}

impl Backward<Flex, 3> for Attended {
    type State = Attention;

    fn backward(self, ops: Ops<Attention, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let g = grads.consume::<Flex>(&ops.node);
        let Attention { q, k, v, hidden, scale } = ops.state;
        let gradients =
            lora_flex::attend_backward([&q, &k, &v], scale as f32, Some(&hidden), &g).expect(FITS);
        for (node, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(node) = node {
                grads.register::<Flex>(node.id, gradient);
            }
        }
    }
}

#[derive(Debug)]
struct Gated;

impl Backward<Flex, 2> for Gated {
    type State = [FlexTensor; 2]; // gate and up

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [to_gate, to_up] = ops.parents;
        let g = grads.consume::<Flex>(&ops.node);
        let [gate, up] = ops.state;
        let (dgate, dup) = lora_flex::gated_backward(&gate, &up, &g).expect(FITS);
        for (node, gradient) in [(to_gate, dgate), (to_up, dup)] {
            if let Some(node) = node {
                grads.register::<Flex>(node.id, gradient);
            }
        }
    }
}

#[derive(Debug)]
struct Surprised;

#[derive(Debug, Clone)]
struct Loss {
    logits: FlexTensor,
    targets: Vec<usize>,
}

impl Backward<Flex, 1> for Surprised {
    type State = Loss;

    fn backward(self, ops: Ops<Loss, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [to_logits] = ops.parents;
        let g = grads.consume::<Flex>(&ops.node);
        let Loss { logits, targets } = ops.state;
        if let Some(node) = to_logits {
            let gradient = lora_flex::cross_entropy_backward(logits, &targets, &g).expect(FITS);
            grads.register::<Flex>(node.id, gradient);
        }
    }
}

impl<C: CheckpointStrategy> TrainingOps for Autodiff<Flex, C> {
    fn train_rms_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let again = RecomputeNorm { inputs: [Input::of(&x), Input::of(&gamma)], epsilon };
        let prepared = prepare_recomputed(FromInputs, [&x, &gamma], again);
        let [x, gamma] = [x.into_primitive(), gamma.into_primitive()].map(in_one_piece);
        let y = Flex::train_rms_norm(x.clone(), gamma.clone(), epsilon);
        match prepared {
            OpsKind::Tracked(prepared) => prepared.finish(Norm { x, gamma, epsilon }, y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }

    fn train_rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let prepared = Turned.prepare::<C>([x.node()]).compute_bound().stateful();
        let [cos, sin] = [cos.into_primitive(), sin.into_primitive()].map(in_one_piece);
        let y = Flex::train_rotate(x.into_primitive(), cos.clone(), sin.clone());
        match prepared {
            OpsKind::Tracked(prepared) => prepared.finish([cos, sin], y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }

    fn train_attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        hidden: BoolTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self> {
        let nodes = [q.node(), k.node(), v.node()];
        let prepared = Attended.prepare::<C>(nodes).compute_bound().stateful();
        let [q, k, v] = [q.into_primitive(), k.into_primitive(), v.into_primitive()];
        let [q, k, v, hidden] = [q, k, v, hidden].map(in_one_piece);
        let y = Flex::train_attend(q.clone(), k.clone(), v.clone(), hidden.clone(), scale);
        match prepared {
            OpsKind::Tracked(prepared) => prepared.finish(Attention { q, k, v, hidden, scale }, y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }

    fn train_gated(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let again = RecomputeGated([Input::of(&gate), Input::of(&up)]);
        let prepared = prepare_recomputed(Gated, [&gate, &up], again);
        let [gate, up] = [gate.into_primitive(), up.into_primitive()].map(in_one_piece);
        let y = Flex::train_gated(gate.clone(), up.clone());
        match prepared {
            OpsKind::Tracked(prepared) => prepared.finish([gate, up], y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }

    fn train_cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let prepared = Surprised.prepare::<C>([logits.node()]).compute_bound().stateful();
        let logits = in_one_piece(logits.into_primitive());
        let losses = Flex::train_cross_entropy(logits.clone(), targets.clone());
        match prepared {
            OpsKind::Tracked(prepared) => {
                prepared.finish(Loss { logits, targets: classes(&targets) }, losses)
            }
            OpsKind::UnTracked(prepared) => prepared.finish(losses),
        }
    }
}

/// Whether Flex has kernels for tensors of this type, and gradients are recorded.
fn is_training<const D: usize>(tensor: &Tensor<D>) -> bool {
    let device = tensor.device();
    let has_kernels = matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16);
    device.is_autodiff()
        && device == Device::flex()
        && has_kernels
        && tensor.shape().num_elements() > 0
}

pub(crate) fn rms_norm<const D: usize>(
    x: &Tensor<D>,
    gamma: &Tensor<1>,
    epsilon: f64,
) -> Option<Tensor<D>> {
    let fits = is_training(x) && x.dtype() == gamma.dtype() && x.dims()[D - 1] == gamma.dims()[0];
    fits.then(|| {
        let (x, gamma) = (x.clone().into_dispatch(), gamma.clone().into_dispatch());
        Tensor::from_dispatch(<Dispatch as TrainingOps>::train_rms_norm(x, gamma, epsilon))
    })
}

pub(crate) fn rotate(x: &Tensor<3>, cos: &Tensor<4>, sin: &Tensor<4>) -> Option<Tensor<4>> {
    let fits = is_training(x) && [cos, sin].iter().all(|angles| angles.dtype() == x.dtype());
    fits.then(|| {
        let [cos, sin] = [cos, sin].map(|angles| angles.clone().into_dispatch());
        Tensor::from_dispatch(<Dispatch as TrainingOps>::train_rotate(
            x.clone().into_dispatch(),
            cos,
            sin,
        ))
    })
}

/// Of many queries alone, which do not see each other's future, and without the rounding of each operation.
pub(crate) fn attend(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    scale: f64,
    hidden: Option<&Tensor<4, Bool>>,
    rounds: bool,
) -> Option<Tensor<4>> {
    let hidden = hidden.filter(|_| !rounds)?;
    let fits = is_training(q) && [k, v].iter().all(|seen| seen.dtype() == q.dtype());
    fits.then(|| {
        let [q, k, v] = [q, k, v].map(|tensor| tensor.clone().into_dispatch());
        let hidden = hidden.clone().into_dispatch();
        Tensor::from_dispatch(<Dispatch as TrainingOps>::train_attend(q, k, v, hidden, scale))
    })
}

pub(crate) fn gated<const D: usize>(gate: &Tensor<D>, up: &Tensor<D>) -> Option<Tensor<D>> {
    let fits = is_training(gate) && (gate.dtype(), gate.dims()) == (up.dtype(), up.dims());
    fits.then(|| {
        let [gate, up] = [gate, up].map(|tensor| tensor.clone().into_dispatch());
        Tensor::from_dispatch(<Dispatch as TrainingOps>::train_gated(gate, up))
    })
}

/// A target beyond the classes is the caller's to refuse.
pub(crate) fn cross_entropy(logits: &Tensor<2>, targets: &Tensor<1, Int>) -> Option<Tensor<1>> {
    let fits = is_training(logits) && matches!(targets.dtype(), DType::I64 | DType::I32);
    fits.then(|| {
        let (logits, targets) = (logits.clone().into_dispatch(), targets.clone().into_dispatch());
        Tensor::from_dispatch(<Dispatch as TrainingOps>::train_cross_entropy(logits, targets))
    })
}

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use burn::nn::{LinearConfig, RmsNorm, RmsNormConfig};
    use burn::tensor::TensorData;
    use lora_core::LoraLinear;

    use super::*;
    use crate::{attention, loss, mlp, norm};

    /// f32 to the order of sums; in half precision each value is rounded once here, and several times there.
    const TYPES: [(DType, f64); 3] = [(DType::F32, 5e-6), (DType::F16, 4e-3), (DType::BF16, 3e-2)];

    fn device() -> Device {
        Device::flex().autodiff()
    }

    /// Numbers from -1 to 1 that are the same in every type, as a leaf.
    fn leaf<const D: usize>(shape: [usize; D], seed: usize, dtype: DType) -> Tensor<D> {
        let number = |i: usize| ((i * 7919 + seed * 104_729) % 257) as f32 / 128.0 - 1.0;
        let values: Vec<f32> = (0..shape.iter().product()).map(number).collect();
        Tensor::<D>::from_data(TensorData::new(values, shape), (&device(), DType::F32))
            .cast(dtype)
            .detach()
            .require_grad()
    }

    fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
        tensor.into_data().iter::<f64>().collect()
    }

    /// That the kernel gives the output and the gradients that Burn's operations give.
    fn check<const N: usize, const D: usize, const E: usize>(
        what: &str,
        leaves: [Tensor<D>; N],
        bound: f64,
        kernel: impl Fn([Tensor<D>; N]) -> Tensor<E>,
        operations: impl Fn([Tensor<D>; N]) -> Tensor<E>,
    ) {
        let run = |f: &dyn Fn([Tensor<D>; N]) -> Tensor<E>| {
            let leaves = leaves.clone().map(|leaf| leaf.detach().require_grad());
            let y = f(leaves.clone());
            // Each value with a weight of its own, so that no gradient is a sum of others.
            let weights = leaf(y.dims(), 9, DType::F32).detach();
            let gradients = (y.clone().cast(DType::F32) * weights).sum().backward();
            let mut found = vec![(y.dtype(), host(y))];
            for leaf in leaves {
                let gradient = leaf.grad(&gradients).expect("a gradient");
                found.push((gradient.dtype(), host(gradient)));
            }
            found
        };
        let (found, expected) = (run(&kernel), run(&operations));
        for (part, ((dtype, found), (_, expected))) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.len(), expected.len());
            let largest = expected.iter().fold(1e-3, |most: f64, value| most.max(value.abs()));
            for (found, expected) in found.iter().zip(expected) {
                let apart = (found - expected).abs() / largest;
                assert!(apart <= bound, "{what} {dtype:?}, part {part}: {found} for {expected}");
            }
        }
    }

    #[test]
    fn gradients_are_those_of_burns_operations() {
        for (dtype, bound) in TYPES {
            let gates = [1, 2].map(|seed| leaf([2, 3, 40], seed, dtype));
            let kernel = |[gate, up]: [Tensor<3>; 2]| gated(&gate, &up).unwrap();
            check("gate", gates, bound, kernel, |[gate, up]| mlp::by_operations(gate, up));

            let gamma = leaf([40], 3, dtype);
            let with = |gamma: Tensor<1>| RmsNorm {
                gamma: Param::from_tensor(gamma),
                ..RmsNormConfig::new(40).with_epsilon(1e-3).init(&device())
            };
            let kernel = |[x]: [Tensor<3>; 1]| rms_norm(&x, &gamma, 1e-3).unwrap();
            let operations = |[x]: [Tensor<3>; 1]| norm::by_operations(&with(gamma.clone()), x);
            check("norm", [leaf([2, 3, 40], 4, dtype)], bound, kernel, operations);
            let x = leaf([2, 3, 40], 4, dtype);
            let kernel = |[gamma]: [Tensor<1>; 1]| rms_norm(&x, &gamma, 1e-3).unwrap();
            let operations = |[gamma]: [Tensor<1>; 1]| {
                // The gradient of the parameter is that of the leaf, which it is not by itself.
                let ones = with(Tensor::ones([40], (&device(), dtype)));
                norm::by_operations(&ones, x.clone()) * gamma.unsqueeze()
            };
            check("gamma", [gamma.clone()], bound, kernel, operations);
        }
    }

    /// A layer after a norm or a gate takes their output as it is computed again, of constants too.
    #[test]
    fn a_layer_gets_the_same_gradient_of_what_is_computed_again() {
        for (dtype, bound) in TYPES {
            let mut base = LinearConfig::new(40, 24).with_bias(false).init(&device());
            base.weight = Param::from_tensor(leaf([40, 24], 7, dtype).detach());
            let layer = LoraLinear::wrap(base, 4, 8.0).unwrap();
            let gradient = |x: Tensor<3>| {
                let y = layer.forward(x).cast(DType::F32);
                let weights = leaf(y.dims(), 9, DType::F32).detach();
                let gradients = (y * weights).sum().backward();
                host(layer.adapter().lora_a.val().grad(&gradients).expect("a gradient of A"))
            };
            let [x, up] = [1, 2].map(|seed| leaf::<3>([2, 3, 40], seed, dtype));
            let gamma = leaf([40], 3, dtype).set_require_grad(false);
            let norm = RmsNorm {
                gamma: Param::from_tensor(gamma.clone()),
                ..RmsNormConfig::new(40).with_epsilon(1e-3).init(&device())
            };
            let [x_alone, up_alone] = [&x, &up].map(|input| input.clone().set_require_grad(false));
            let gate = |gate: &Tensor<3>, up: &Tensor<3>| {
                let operations = mlp::by_operations(gate.clone(), up.clone());
                (gated(gate, up).unwrap(), operations)
            };
            let kernel = rms_norm(&x, &gamma, 1e-3).unwrap();
            for (what, (kernel, operations)) in [
                ("norm", (kernel, norm::by_operations(&norm, x.clone()))),
                ("gate, up without a gradient", gate(&x, &up_alone)),
                ("gate without a gradient", gate(&x_alone, &up)),
            ] {
                let (found, expected) = (gradient(kernel), gradient(operations));
                let largest = expected.iter().fold(0.0, |most: f64, value| most.max(value.abs()));
                for (found, expected) in found.iter().zip(&expected) {
                    let apart = (found - expected).abs() / largest;
                    assert!(apart <= bound, "{what} {dtype:?}: {found} for {expected}");
                }
            }
        }
    }

    /// Three query heads share keys, and a text's queries do not see its future, nor one what is before its start.
    #[test]
    fn gradients_of_attention_are_those_of_burns_operations() {
        let (length, total) = (21, 25);
        for texts in [1, 2] {
            let hidden = |i: usize| {
                let (text, query, key) = (i / total / length, i / total % length, i % total);
                key > query + 4 || (key < 3 * text && key != query)
            };
            let hidden: Vec<bool> = (0..texts * length * total).map(hidden).collect();
            let hidden = TensorData::new(hidden, [texts, 1, length, total]);
            let hidden = Tensor::<4, Bool>::from_data(hidden, &device());
            for (dtype, bound) in TYPES {
                let seen = leaf([2, 2, total, 8], 2, dtype);
                let q = leaf([2, 2, 3 * length, 8], 1, dtype);
                let v = leaf([2, 2, total, 8], 3, dtype);
                // One leaf for each, cut out of a longer one, so that all have one shape.
                let pad = |tensor: Tensor<4>| {
                    let rows = tensor.dims()[2];
                    let rest = Tensor::zeros([2, 2, 3 * length - rows, 8], (&device(), dtype));
                    Tensor::cat(vec![tensor.detach(), rest], 2)
                };
                let cut = |tensor: Tensor<4>| tensor.narrow(2, 0, total);
                let kernel = |[q, k, v]: [Tensor<4>; 3]| {
                    attend(&q, &cut(k), &cut(v), 0.4, Some(&hidden), false).unwrap()
                };
                let operations = |[q, k, v]: [Tensor<4>; 3]| {
                    attention::by_operations(q, cut(k), cut(v), 0.4, Some(&hidden), false)
                };
                let leaves = [q.detach(), pad(seen), pad(v)];
                check("attention", leaves, bound, kernel, operations);
            }
        }
    }

    #[test]
    fn the_gradient_of_the_rotation_is_that_of_burns_operations() {
        for (dtype, bound) in TYPES {
            for rows in [1, 2] {
                let [cos, sin] = [5, 6].map(|seed| leaf([rows, 1, 3, 8], seed, dtype).detach());
                let rope = crate::rope::Rope { cos, sin };
                let kernel = |[x]: [Tensor<3>; 1]| rotate(&x, &rope.cos, &rope.sin).unwrap();
                let operations =
                    |[x]: [Tensor<3>; 1]| rope.apply(x.reshape([2, 3, 4, 8]).swap_dims(1, 2));
                check("rotation", [leaf([2, 3, 32], 1, dtype)], bound, kernel, operations);
            }
        }
    }

    #[test]
    fn the_gradient_of_the_loss_is_that_of_burns_operations() {
        let targets = || Tensor::<1, Int>::from_data([3, 0, 16, 3], &device());
        for (dtype, bound) in TYPES {
            let kernel = |[logits]: [Tensor<2>; 1]| cross_entropy(&logits, &targets()).unwrap();
            let operations = |[logits]: [Tensor<2>; 1]| loss::by_operations(logits, targets());
            check("loss", [leaf([4, 17], 1, dtype)], bound, kernel, operations);
        }
        // What others hold is not written over.
        let logits = leaf([4, 17], 1, DType::F32);
        let before = host(logits.clone());
        let gradients = cross_entropy(&logits, &targets()).unwrap().sum().backward();
        assert_eq!(host(logits.clone()), before);
        assert_ne!(host(logits.grad(&gradients).unwrap()), before);
    }
}
