//! What LoRA needs of Flex, Burn's pure-Rust CPU backend, beyond Burn's own operations: products of a
//! small inner or outer size, the rank.
//!
//! `lora-core` uses this crate when its feature `flex` is on; nobody else needs it.
//!
//! ```text
//! add_product          y + left · right       [rows, columns] + [rows, rank] [rank, columns]
//! transposed_product   left^T · right         [rows, rank]^T [rows, columns]
//! ```

#![deny(unsafe_code)] // but for the one call in `product.rs`

mod product;
#[cfg(test)]
mod samples;
mod transposed;

use burn::backend::{Flex, tensor::FloatTensor};

pub use product::{add_product, add_product_in_blocks};
pub use transposed::{transposed_product, transposed_product_by_matmul};

/// A float tensor of Flex.
pub type FlexTensor = FloatTensor<Flex>;
