//! Llama-like decoders for [Burn](https://burn.dev), read from Hugging Face folders and GGUF files.
//!
//! Every projection is a [`lora_core::AdaptableLinear`] under its Hugging Face path, so that
//! [`lora_core::inject`] adapts a decoder and PEFT's adapter files fit it.
//!
//! The flow: [`Checkpoint::open`] reads config and tokenizer; [`Checkpoint::decoder`] brings the
//! weights onto a device; [`Decoder::forward`] gives logits; [`Decoder::generate`] writes text, as a
//! [`Sampling`] says. [`Tokenizer::render`] makes a conversation of [`Message`]s the text that the model
//! was trained to see, and [`Tokenizer::stream`] makes ids text as they come. With the feature `hub`,
//! `Hub::fetch` brings a model of the Hugging Face Hub.

#![doc(test(attr(deny(warnings))))]

mod attention;
mod block;
mod cache;
mod checkpoint;
mod config;
mod decoder;
mod error;
mod experts;
mod family;
mod generate;
mod gguf;
mod hf;
mod hub;
mod kernels;
mod layout;
mod load;
mod loss;
mod memory;
mod message;
mod mlp;
mod norm;
mod ops;
mod random;
mod rope;
mod sampling;
mod template;
mod token_stream;
mod tokenizer;
mod weights;

pub use attention::Attention;
pub use block::{Block, FeedForward};
pub use cache::KvCache;
pub use checkpoint::Checkpoint;
pub use config::{AttentionBias, DecoderConfig, ExpertsConfig, RopeScaling, SlidingWindow};
pub use decoder::{Decoder, DecoderStack};
pub use error::{Error, ErrorKind, Result};
pub use experts::Experts;
pub use family::{FAMILIES, Family};
pub use generate::Continuation;
pub use gguf::{GgufFile, TokenizerParts, Value, read_gguf_adapter, save_gguf_adapter};
pub use hf::{
    GenerationConfig, SafetensorsFile, SafetensorsShards, SaveOptions, config_to_json,
    open_weights, read_config, save_folder, save_folder_with,
};
#[cfg(feature = "hub")]
pub use hub::{Download, Hub};
pub use hub::{HubModel, HubProblem};
pub use layout::Packing;
pub use loss::cross_entropy;
pub use message::Message;
pub use mlp::Mlp;
pub use random::RandomWeights;
pub use sampling::{Sampler, Sampling};
pub use template::{ChatTemplates, Date, MarkedText, RenderOptions};
pub use token_stream::TokenStream;
pub use tokenizer::Tokenizer;
pub use weights::{HostTensor, HostValues, WeightDtype, WeightSource};

/// Its example is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
