//! What LoRA needs of Flex, Burn's pure-Rust CPU backend, beyond Burn's own operations: products of a
//! small inner or outer size, the rank or the tokens of one step of decoding.
//!
//! `lora-core` uses this crate when its feature `flex` is on; nobody else needs it.
//!
//! ```text
//! add_product          y + left · right       [rows, columns] + [rows, rank] [rank, columns]
//! transposed_product   left^T · right         [rows, rank]^T [rows, columns]
//! product_of_few_rows  x · W                  [rows, d_input] [d_input, d_output]
//! ```

#![deny(unsafe_code)] // but for the one call in `product.rs`

mod few_rows;
mod product;
#[cfg(test)]
mod samples;
mod transposed;

use burn::backend::{Flex, tensor::FloatTensor};

pub use few_rows::product_of_few_rows;
pub use product::{add_product, add_product_in_blocks};
pub use transposed::{transposed_product, transposed_product_by_matmul};

/// A float tensor of Flex.
pub type FlexTensor = FloatTensor<Flex>;
