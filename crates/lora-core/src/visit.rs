//! The one seam: a model shows its adaptable layers with their paths, in a stable order.

mod burn;

use crate::frozen::FrozenLayer;
use crate::layer::{Adaptable, AdaptableLayer};

/// What is called with the path of each adaptable layer and the layer.
pub type VisitLayer<'v, 'a> = dyn FnMut(&str, &'a dyn AdaptableLayer) + 'v;

/// What is called with the path of each adaptable layer and the layer, to change it.
pub type VisitLayerMut<'v> = dyn FnMut(&str, &mut dyn AdaptableLayer) + 'v;

/// A model, or a part of one, with adaptable layers.
///
/// `#[derive(VisitLora)]` writes it for a struct or enum. It visits every field, in the order in which
/// they stand, so that no layer is forgotten: a field's type must implement `VisitLora` too, or the
/// field be marked `#[lora(skip)]`. [`AdaptableLinear`](crate::AdaptableLinear) and the other slots show
/// themselves; numbers, tensors, parameters and those of Burn's modules that have nothing to adapt
/// (norms, dropout, activations, ...) show nothing; `Vec`, `Option`, arrays and tuples show what they hold. Burn's `Linear` and other layers with
/// weights to adapt don't implement it.
///
/// Paths are dotted field names, with positions for the elements of a `Vec`, array or tuple:
/// `layers.0.self_attn.q_proj`. They are the names in target rules and in adapter files. What is in an
/// `Option`, or in a variant of an enum, stands under the path of the whole.
///
/// | attribute | on | does |
/// |---|---|---|
/// | `#[lora(skip)]` | a field | leaves it out, as Burn's `#[module(skip)]` does too |
/// | `#[lora(rename = "name")]` | a field | names it in paths, to match a checkpoint for instance |
/// | `#[lora(output = "path")]` | a struct | is [`output_layer`](Self::output_layer) |
/// | `#[lora(tied = "path")]` | a struct | is [`tied_embedding`](Self::tied_embedding) |
/// | `#[lora(crate = "path")]` | a type | where lora-core is, if it was renamed |
///
/// # Example
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::module::Module;
/// use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
/// use lora_core::{AdaptableLinear, VisitLora};
///
/// #[derive(Module, Debug, VisitLora)]
/// struct Block {
///     norm: LayerNorm,
///     #[lora(rename = "proj")]
///     projection: AdaptableLinear,
/// }
///
/// #[derive(Module, Debug, VisitLora)]
/// #[lora(output = "head")]
/// struct Net {
///     #[lora(skip)]
///     stem: Linear, // frozen, and never a target
///     blocks: Vec<Block>,
///     head: AdaptableLinear,
/// }
///
/// let device = burn::tensor::Device::flex();
/// let linear = || LinearConfig::new(8, 8).init(&device);
/// let block =
///     || Block { norm: LayerNormConfig::new(8).init(&device), projection: linear().into() };
/// let net = Net { stem: linear(), blocks: vec![block(), block()], head: linear().into() };
///
/// let mut paths = Vec::new();
/// net.visit_lora("", &mut |path, _| paths.push(path.to_owned()));
/// assert_eq!(paths, ["blocks.0.proj", "blocks.1.proj", "head"]);
/// assert_eq!(net.output_layer(), Some("head"));
/// # }
/// ```
/// A layer that was forgotten does not compile:
///
/// ```compile_fail,E0277
/// use burn::nn::Linear;
/// use lora_core::VisitLora;
///
/// #[derive(VisitLora)]
/// struct Net {
///     layers: Vec<Linear>, // neither an AdaptableLinear nor marked #[lora(skip)]
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be searched for layers to adapt",
    label = "`VisitLora` is not implemented for `{Self}`",
    note = "a `Linear` that may get an adapter is an `AdaptableLinear`: change the field's type and \
            make it with `.into()`; likewise `AdaptableEmbedding`, `AdaptableConv1d` and \
            `AdaptableConv2d`",
    note = "a module of your own needs `#[derive(VisitLora)]`",
    note = "anything that shall get no adapter is marked `#[lora(skip)]`"
)]
pub trait VisitLora {
    /// Shows every adaptable layer; `path` is where `self` stands, empty for a whole model.
    fn visit_lora<'a>(&'a self, path: &str, visit: &mut VisitLayer<'_, 'a>);

    /// Shows every adaptable layer, to be changed in place, in the same order.
    fn visit_lora_mut(&mut self, path: &str, visit: &mut VisitLayerMut<'_>);

    /// The path of the layer that makes the model's output, if it is adaptable; `AllLinear` leaves
    /// it out. The whole model is asked and none of its parts: a struct around a model names the output
    /// again, by its own path.
    fn output_layer(&self) -> Option<&str> {
        None
    }

    /// The path of the embedding whose weight makes the output where the model shows no
    /// [`output_layer`](Self::output_layer): the two are tied. What adapts the embedding is not the
    /// output's, and [`merge`](crate::merge) says so.
    fn tied_embedding(&self) -> Option<&str> {
        None
    }
}

impl<F: FrozenLayer> VisitLora for Adaptable<F> {
    fn visit_lora<'a>(&'a self, path: &str, visit: &mut VisitLayer<'_, 'a>) {
        visit(path, self);
    }

    fn visit_lora_mut(&mut self, path: &str, visit: &mut VisitLayerMut<'_>) {
        visit(path, self);
    }
}

impl<T: VisitLora> VisitLora for [T] {
    fn visit_lora<'a>(&'a self, path: &str, visit: &mut VisitLayer<'_, 'a>) {
        for (index, part) in self.iter().enumerate() {
            part.visit_lora(&join_path(path, &index.to_string()), visit);
        }
    }

    fn visit_lora_mut(&mut self, path: &str, visit: &mut VisitLayerMut<'_>) {
        for (index, part) in self.iter_mut().enumerate() {
            part.visit_lora_mut(&join_path(path, &index.to_string()), visit);
        }
    }
}

impl<T: VisitLora> VisitLora for Vec<T> {
    fn visit_lora<'a>(&'a self, path: &str, visit: &mut VisitLayer<'_, 'a>) {
        self.as_slice().visit_lora(path, visit);
    }

    fn visit_lora_mut(&mut self, path: &str, visit: &mut VisitLayerMut<'_>) {
        self.as_mut_slice().visit_lora_mut(path, visit);
    }
}

impl<T: VisitLora, const N: usize> VisitLora for [T; N] {
    fn visit_lora<'a>(&'a self, path: &str, visit: &mut VisitLayer<'_, 'a>) {
        self.as_slice().visit_lora(path, visit);
    }

    fn visit_lora_mut(&mut self, path: &str, visit: &mut VisitLayerMut<'_>) {
        self.as_mut_slice().visit_lora_mut(path, visit);
    }
}

macro_rules! visit_tuple {
    ($($type:ident $index:tt),+) => {
        impl<$($type: VisitLora),+> VisitLora for ($($type,)+) {
            fn visit_lora<'a>(&'a self, path: &str, visit: &mut VisitLayer<'_, 'a>) {
                $(self.$index.visit_lora(&join_path(path, stringify!($index)), visit);)+
            }

            fn visit_lora_mut(&mut self, path: &str, visit: &mut VisitLayerMut<'_>) {
                $(self.$index.visit_lora_mut(&join_path(path, stringify!($index)), visit);)+
            }
        }
    };
}

visit_tuple!(T0 0);
visit_tuple!(T0 0, T1 1);
visit_tuple!(T0 0, T1 1, T2 2);
visit_tuple!(T0 0, T1 1, T2 2, T3 3);
visit_tuple!(T0 0, T1 1, T2 2, T3 3, T4 4);
visit_tuple!(T0 0, T1 1, T2 2, T3 3, T4 4, T5 5);

impl<T: VisitLora> VisitLora for Option<T> {
    fn visit_lora<'a>(&'a self, path: &str, visit: &mut VisitLayer<'_, 'a>) {
        if let Some(part) = self {
            part.visit_lora(path, visit);
        }
    }

    fn visit_lora_mut(&mut self, path: &str, visit: &mut VisitLayerMut<'_>) {
        if let Some(part) = self {
            part.visit_lora_mut(path, visit);
        }
    }

    fn output_layer(&self) -> Option<&str> {
        self.as_ref()?.output_layer()
    }

    fn tied_embedding(&self) -> Option<&str> {
        self.as_ref()?.tied_embedding()
    }
}

/// The path of the first layer that is as asked.
pub(crate) fn first_path<M: VisitLora>(
    model: &M,
    is_asked: impl Fn(&str, &dyn AdaptableLayer) -> bool,
) -> Option<String> {
    let mut first = None;
    model.visit_lora("", &mut |path, layer| {
        if first.is_none() && is_asked(path, layer) {
            first = Some(path.to_owned());
        }
    });
    first
}

/// `path.name`, or `name` at the top.
pub fn join_path(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}
