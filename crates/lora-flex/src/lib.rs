//! What LoRA and decoders need of Flex, Burn's pure-Rust CPU backend, beyond Burn's own operations:
//! products of a small inner or outer size, the rank or the tokens of one step of decoding, and what
//! stands between these in such a step.
//!
//! `lora-core` and `lora-models` use this crate when their feature `flex` is on; nobody else needs it.
//!
//! ```text
//! scaled_product       scaling · x · factor   [rows, inner] [inner, columns], one of both the rank
//! add_product          y + left · right       [rows, columns] + [rows, rank] [rank, columns]
//! transposed_product   left^T · right         [rows, m]^T [rows, n], one of them narrow
//! linear               x · W + b              [rows, d_input] [d_input, d_output]
//! attend               softmax(q k^T) v       queries over a cache of keys and values
//! rms_norm             x / rms(x) · gamma     [..., width]
//! rotate               rotary positions       [batch, length, heads * head_dim]
//! gated                silu(gate) · up        [...]
//! cross_entropy        -ln softmax [target]   [rows, classes]
//! ```
//!
//! The last five have a gradient each, `..._backward`.
//!
//! [`WeightMemory`] puts a model's weights on large pages of memory.

#![deny(unsafe_code)] // but for the calls in `product.rs`, `prefetch.rs` and `memory.rs`

mod attend;
mod backward;
mod crew;
mod cross_entropy;
mod exponential;
mod few_rows;
mod halves;
mod linear;
mod memory;
mod pointwise;
mod prefetch;
mod product;
#[cfg(test)]
mod samples;
mod transposed;
mod weight;

use burn::backend::{Flex, tensor::FloatTensor};

pub use attend::{Rounding, attend, attend_backward};
pub use backward::{gated_backward, rms_norm_backward, rotate_backward};
pub use cross_entropy::{cross_entropy, cross_entropy_backward};
pub use linear::linear;
pub use memory::WeightMemory;
pub use pointwise::{gated, rms_norm, rotate};
pub use product::{add_product, scaled_product};
pub use transposed::transposed_product;

/// A float tensor of Flex.
pub type FlexTensor = FloatTensor<Flex>;
