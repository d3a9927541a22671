//! Where the tensors of a checkpoint come from, whatever the file format.

use std::path::Path;

use crate::error::Result;

/// One tensor on the host, row-major, converted to f32.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Sizes, outermost first, as in the Hugging Face checkpoint (a linear weight is `[d_output, d_input]`).
    pub shape: Vec<usize>,
    /// `shape.product()` values.
    pub data: Vec<f32>,
}

/// A checkpoint that can be read tensor by tensor, under the names of the Hugging Face checkpoint
/// (`model.layers.0.self_attn.q_proj.weight`) and in its layout.
pub trait WeightSource {
    /// The file or folder, for messages.
    fn path(&self) -> &Path;

    /// The names of all tensors, sorted.
    fn names(&self) -> Vec<String>;

    /// The shape of one tensor, or `None` when the checkpoint has no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// Reads one tensor and converts it to f32.
    ///
    /// # Errors
    /// When the tensor is absent, or its bytes cannot be read or decoded.
    fn read(&self, name: &str) -> Result<HostTensor>;
}
