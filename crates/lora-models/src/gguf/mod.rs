//! GGUF: llama.cpp's single-file format, read as a Hugging Face checkpoint; adapters in and out.
//!
//! The way of the data: **header** (`header.rs`: counts, keys, tensor places; every number checked
//! before it is believed) -> **file** (`reader.rs`: [`GgufFile`], its keys and its bytes) ->
//! **blocks** (`blocks.rs`: packed bytes to f32) -> **names** (`names.rs`: llama.cpp's names to
//! Hugging Face's) -> **weights** (`weights.rs`: [`WeightSource`](crate::WeightSource), with the
//! rows of q and k put back in Hugging Face's order). Beside it: the sizes (`config.rs`) and the
//! tokenizer (`tokenizer.rs`, with `pre_tokenizer.rs` for byte-level vocabularies and
//! `sentence_piece.rs` for SentencePiece's), from the keys (`value.rs`).
//!
//! Out: **writer** (`writer.rs`: the bytes of any GGUF file) and, for both ways, **adapter**
//! (`adapter.rs`: what llama.cpp's adapter files hold).
//!
//! # Format
//!
//! Little endian, version 2 or 3 (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>):
//!
//! ```text
//! magic "GGUF" | version u32 | tensor count u64 | key count u64
//! key count    x  string key, u32 value type, value
//! tensor count x  string name, u32 n_dims, n_dims x u64 (innermost first), u32 type, u64 offset
//! padding up to general.alignment (32 where the key is absent)
//! tensor data; offsets count from here, and each is a multiple of the alignment
//! ```
//!
//! A string is a u64 length and that many UTF-8 bytes; an array is a u32 element type, a u64 length
//! and the elements.

mod adapter;
mod blocks;
mod config;
mod header;
mod names;
mod pre_tokenizer;
mod reader;
mod sentence_piece;
mod tokenizer;
mod value;
mod weights;

mod writer;

pub use adapter::{read_gguf_adapter, save_gguf_adapter};
pub use reader::GgufFile;
pub use tokenizer::TokenizerParts;
pub use value::Value;
