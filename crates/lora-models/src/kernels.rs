//! What stands between the products of a decoder, done by a backend in one pass where it can.
//!
//! Each function gives `None` on other backends and for tensors of another form; the caller's own operations are for
//! those. The results are the same but for rounding. With gradients it is `ops/training.rs` that does it.

use burn::tensor::{Bool, Int, Tensor};

#[cfg(feature = "flex")]
use crate::ops::training;

/// The call of a function in `flex`, or with gradients in `training`, where these are compiled.
macro_rules! on_flex {
    ($function:ident($($argument:ident),*)) => {{
        #[cfg(feature = "flex")]
        let done = flex::$function($($argument),*).or_else(|| training::$function($($argument),*));
        #[cfg(not(feature = "flex"))]
        let done = {
            let _ = ($($argument),*);
            None
        };
        done
    }};
}

#[cfg(feature = "flex")]
mod flex {
    use burn::backend::Flex;
    use burn::tensor::{Bool, Device, Int, Tensor};
    use lora_flex::{FlexTensor, Rounding};

    /// What Flex holds of a tensor without gradients.
    pub(super) fn primitive<const D: usize>(tensor: &Tensor<D>) -> Option<FlexTensor> {
        let device = tensor.device();
        if device.is_autodiff() || device != Device::flex() {
            return None;
        }
        tensor.clone().try_into_primitive::<Flex>().ok()
    }

    pub(super) fn rms_norm<const D: usize>(
        x: &Tensor<D>,
        gamma: &Tensor<1>,
        epsilon: f64,
    ) -> Option<Tensor<D>> {
        let y = lora_flex::rms_norm(&primitive(x)?, &primitive(gamma)?, epsilon)?;
        Some(Tensor::from_primitive::<Flex>(y))
    }

    pub(super) fn rotate(x: &Tensor<3>, cos: &Tensor<4>, sin: &Tensor<4>) -> Option<Tensor<4>> {
        let y = lora_flex::rotate(&primitive(x)?, &primitive(cos)?, &primitive(sin)?)?;
        Some(Tensor::from_primitive::<Flex>(y))
    }

    pub(super) fn attend(
        q: &Tensor<4>,
        k: &Tensor<4>,
        v: &Tensor<4>,
        scale: f64,
        hidden: Option<&Tensor<4, Bool>>,
        rounds: bool,
    ) -> Option<Tensor<4>> {
        let rounding = if rounds { Rounding::EachOperation } else { Rounding::Output };
        let [q, k, v] = [primitive(q)?, primitive(k)?, primitive(v)?];
        let hidden = match hidden {
            Some(hidden) => Some(hidden.clone().try_into_primitive::<Flex>().ok()?),
            None => None,
        };
        let y = lora_flex::attend(&q, &k, &v, scale as f32, hidden.as_ref(), rounding)?;
        Some(Tensor::from_primitive::<Flex>(y))
    }

    pub(super) fn cross_entropy(logits: &Tensor<2>, targets: &Tensor<1, Int>) -> Option<Tensor<1>> {
        let logits = primitive(logits)?; // before the targets are waited for
        let targets = targets.to_data();
        let targets: Option<Vec<usize>> =
            targets.iter::<i64>().map(|target| usize::try_from(target).ok()).collect();
        let losses = lora_flex::cross_entropy(&logits, &targets?)?;
        Some(Tensor::from_primitive::<Flex>(losses))
    }

    pub(super) fn gated<const D: usize>(gate: &Tensor<D>, up: &Tensor<D>) -> Option<Tensor<D>> {
        let y = lora_flex::gated(&primitive(gate)?, &primitive(up)?)?;
        Some(Tensor::from_primitive::<Flex>(y))
    }
}

/// gamma · x / sqrt(mean(x²) + epsilon) over the last axis.
pub(crate) fn rms_norm<const D: usize>(
    x: &Tensor<D>,
    gamma: &Tensor<1>,
    epsilon: f64,
) -> Option<Tensor<D>> {
    on_flex!(rms_norm(x, gamma, epsilon))
}

/// `[batch, length, heads * head_dim]` to `[batch, heads, length, head_dim]`, rotated by the angles of
/// which cos and sin `[1 or batch, 1, length, head_dim]` are given.
pub(crate) fn rotate(x: &Tensor<3>, cos: &Tensor<4>, sin: &Tensor<4>) -> Option<Tensor<4>> {
    on_flex!(rotate(x, cos, sin))
}

/// softmax(scale q k^T) v: q `[batch, heads, rows, head_dim]`, k and v `[batch, heads, positions, head_dim]`; row r
/// does not see the keys that `hidden` `[1 or batch, 1, length, positions]` has for query r modulo length. Scores are in
/// f32; `rounds` rounds them to the dtype as eager operations do.
pub(crate) fn attend(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    scale: f64,
    hidden: Option<&Tensor<4, Bool>>,
    rounds: bool,
) -> Option<Tensor<4>> {
    on_flex!(attend(q, k, v, scale, hidden, rounds))
}

/// silu(gate) · up.
pub(crate) fn gated<const D: usize>(gate: &Tensor<D>, up: &Tensor<D>) -> Option<Tensor<D>> {
    on_flex!(gated(gate, up))
}

/// `-ln softmax(logits)[target]` of each row, in f32: logits `[rows, classes]`, targets `[rows]`.
pub(crate) fn cross_entropy(logits: &Tensor<2>, targets: &Tensor<1, Int>) -> Option<Tensor<1>> {
    on_flex!(cross_entropy(logits, targets))
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{DType, Device};

    use super::*;

    fn ones<const D: usize>(shape: [usize; D], device: &Device, dtype: DType) -> Tensor<D> {
        Tensor::ones(shape, (device, dtype))
    }

    /// Which of them a device has for a dtype: with hidden keys, and of a single query too.
    fn has(device: &Device, dtype: DType) -> [bool; 6] {
        let x = || ones([1, 3, 8], device, dtype);
        let heads = || ones([1, 2, 3, 4], device, dtype);
        let hidden = Tensor::<4, Bool>::from_data([[[[false, true, true]; 3]]], device);
        let angles = || ones([1, 1, 3, 4], device, dtype);
        let targets = Tensor::<1, Int>::from_data([1, 0], device);
        [
            rms_norm(&x(), &ones([8], device, dtype), 1e-5).is_some(),
            rotate(&x(), &angles(), &angles()).is_some(),
            attend(&heads(), &heads(), &heads(), 1.0, Some(&hidden), false).is_some(),
            gated(&x(), &x()).is_some(),
            cross_entropy(&ones([2, 5], device, dtype), &targets).is_some(),
            attend(&heads(), &heads(), &heads(), 1.0, None, false).is_some()
                && attend(&heads(), &heads(), &heads(), 1.0, Some(&hidden), true).is_some(),
        ]
    }

    #[test]
    fn flex_has_all_of_them_and_those_of_training_with_gradients() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            assert_eq!(has(&Device::flex(), dtype), [true; 6], "{dtype:?}");
            let training = [true, true, true, true, true, false];
            assert_eq!(has(&Device::flex().autodiff(), dtype), training, "{dtype:?}");
        }
        for device in [Device::flex(), Device::flex().autodiff()] {
            assert_eq!(has(&device, DType::F64), [false; 6]);
        }
    }
}
