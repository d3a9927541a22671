//! A model without what adapts it, for a while.

use std::ops::Deref;

use crate::visit::VisitLora;

/// Switches off all that adapts the model; it is the bare model until the guard is dropped.
///
/// Then each layer is as it was, those that were switched off already too, also when a panic unwinds
/// past the guard. A merged layer is its base meanwhile. The reference model of preference training is
/// such a model, in the memory of one.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Tensor};
/// use lora_core::{AdaptableLinear, LoraConfig, disable, inject};
///
/// let device = Device::flex().autodiff();
/// let model: Vec<AdaptableLinear> = vec![LinearConfig::new(8, 4).init(&device).into()];
/// let x = Tensor::<2>::ones([1, 8], &device);
/// let base = model[0].forward(x.clone()).into_data();
///
/// let (mut model, _) = inject(model, &LoraConfig::new(2, 4.0))?;
/// let adapter = model[0].as_lora_mut().unwrap().adapter_mut();
/// adapter.lora_a = adapter.lora_a.clone().map(|a| a + 1.0);
/// let adapted = model[0].forward(x.clone()).into_data();
/// assert_ne!(adapted, base);
/// assert_eq!(disable(&mut model)[0].forward(x.clone()).into_data(), base);
/// assert_eq!(model[0].forward(x).into_data(), adapted);
/// # }
/// # Ok::<(), lora_core::Error>(())
/// ```
pub fn disable<M: VisitLora>(model: &mut M) -> Disabled<'_, M> {
    let mut enabled = Vec::new();
    model.visit_lora_mut("", &mut |_, layer| {
        enabled.push(layer.is_enabled());
        layer.set_enabled(false);
    });
    Disabled { model, enabled }
}

/// The model without what adapts it; see [`disable`].
#[derive(Debug)]
#[must_use = "what adapts the model acts again as soon as this is dropped"]
pub struct Disabled<'m, M: VisitLora> {
    model: &'m mut M,
    enabled: Vec<bool>, // in the model's order
}

impl<M: VisitLora> Deref for Disabled<'_, M> {
    type Target = M;

    fn deref(&self) -> &M {
        self.model
    }
}

impl<M: VisitLora> Drop for Disabled<'_, M> {
    fn drop(&mut self) {
        let mut enabled = self.enabled.iter();
        self.model.visit_lora_mut("", &mut |_, layer| {
            layer.set_enabled(*enabled.next().unwrap_or(&true));
        });
    }
}
