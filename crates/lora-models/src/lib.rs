//! Llama-like decoders for [Burn](https://burn.dev), read from Hugging Face folders and GGUF files.
//!
//! Every projection is a [`lora_core::AdaptableLinear`] under its Hugging Face path, so that
//! [`lora_core::inject`] adapts a decoder and PEFT's adapter files fit it.
//!
//! The flow: [`Checkpoint::open`] reads config and tokenizer; [`Checkpoint::decoder`] brings the
//! weights onto a device; [`Decoder::forward`] gives logits; [`Decoder::generate`] writes text.
//! [`Tokenizer::render`] makes a conversation of [`Message`]s the text that the model was trained to see,
//! and [`Tokenizer::stream`] makes ids text as they come.

#![doc(test(attr(deny(warnings))))]

mod attention;
mod block;
mod checkpoint;
mod config;
mod decoder;
mod error;
mod generate;
mod gguf;
mod hf;
mod load;
mod message;
mod mlp;
mod random;
mod rope;
mod template;
mod token_stream;
mod tokenizer;
mod weights;

pub use attention::Attention;
pub use block::Block;
pub use checkpoint::Checkpoint;
pub use config::DecoderConfig;
pub use decoder::{Decoder, DecoderStack, KvCache};
pub use error::{Error, ErrorKind, Result};
pub use generate::Sampling;
pub use gguf::{GgufFile, TokenizerParts, Value, read_gguf_adapter, save_gguf_adapter};
pub use hf::{SafetensorsFile, SaveDtype, config_to_json, read_config, save_folder};
pub use message::Message;
pub use mlp::Mlp;
pub use random::RandomWeights;
pub use template::{ChatTemplates, Date, MarkedText, RenderOptions};
pub use token_stream::TokenStream;
pub use tokenizer::Tokenizer;
pub use weights::{HostTensor, WeightSource};

/// Its example is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
