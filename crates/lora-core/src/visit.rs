//! The one seam: a model shows its adaptable layers with their paths, in a stable order.

use crate::frozen::FrozenLayer;
use crate::layer::{Adaptable, AdaptableLayer};

/// What is called for every layer, with its path.
pub type VisitLayer<'v, 'a> = dyn FnMut(&str, &'a dyn AdaptableLayer) + 'v;

/// The same, for layers that are changed in place.
pub type VisitLayerMut<'v> = dyn FnMut(&str, &mut dyn AdaptableLayer) + 'v;

/// A model, or a part of one, with adaptable linear layers.
///
/// [`impl_visit_lora!`](crate::impl_visit_lora) writes it for a struct from the list of its fields.
/// Paths are dotted field names, with positions for the elements of a `Vec`:
/// `layers.0.self_attn.q_proj`. They are the names in target rules and in adapter files.
pub trait VisitLora {
    /// Shows every adaptable layer; `path` is where `self` stands, empty for a whole model.
    fn visit_lora<'a>(&'a self, path: &str, visit: &mut VisitLayer<'_, 'a>);

    /// Shows every adaptable layer, to be changed in place, in the same order.
    fn visit_lora_mut(&mut self, path: &str, visit: &mut VisitLayerMut<'_>);

    /// The path of the layer that makes the model's output, if it is adaptable; `AllLinear` leaves
    /// it out.
    fn output_layer(&self) -> Option<&str> {
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

impl<T: VisitLora> VisitLora for Vec<T> {
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
}

/// `path.name`, or `name` at the top.
pub fn join_path(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// Implements [`VisitLora`](crate::VisitLora) for a struct: the type, then the fields that are or
/// contain [`AdaptableLinear`](crate::AdaptableLinear), in the order in which they are visited.
///
/// `impl_visit_lora!(Mlp { gate_proj, up_proj, down_proj });` With `output = "head"` at the end, the
/// layer at that path is the model's output layer.
#[macro_export]
macro_rules! impl_visit_lora {
    ($type:ty { $($field:ident),+ $(,)? } $(, output = $output:expr)?) => {
        impl $crate::VisitLora for $type {
            fn visit_lora<'a>(
                &'a self,
                path: &str,
                visit: &mut $crate::VisitLayer<'_, 'a>,
            ) {
                $($crate::VisitLora::visit_lora(
                    &self.$field,
                    &$crate::join_path(path, stringify!($field)),
                    visit,
                );)+
            }

            fn visit_lora_mut(
                &mut self,
                path: &str,
                visit: &mut $crate::VisitLayerMut<'_>,
            ) {
                $($crate::VisitLora::visit_lora_mut(
                    &mut self.$field,
                    &$crate::join_path(path, stringify!($field)),
                    visit,
                );)+
            }

            $(fn output_layer(&self) -> Option<&str> {
                Some($output)
            })?
        }
    };
}
