//! What stands between the products of a decoder, and its loss, with gradients, on Flex.
//!
//! Each function gives `None` on other backends and for tensors of another form; the caller's own operations are
//! for those. Burn's operations one after the other keep the result of each for the backward pass, and go over it on
//! one thread; these keep their inputs alone.

use burn::backend::autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
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

    /// -ln softmax(logits)[target] of each row, in f32.
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
        let prepared = FromInputs.prepare::<C>([x.node(), gamma.node()]).compute_bound().stateful();
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
        let prepared = Gated.prepare::<C>([gate.node(), up.node()]).compute_bound().stateful();
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
