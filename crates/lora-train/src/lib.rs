//! Fine-tuning of causal language models with LoRA on [Burn](https://burn.dev): instruction data,
//! loss on the response, the loop, and the folder that a run leaves behind.
//!
//! The flow: [`read_conversations`] reads a file; [`Conversation::encode`] makes tokens and marks
//! those that are trained; [`split`] holds some back; [`lora_core::inject`] adapts the model;
//! [`train`](fn@train) runs the steps; [`RunFolder`] keeps settings, metrics, picture and adapter.

#![doc(test(attr(deny(warnings))))]

mod curve;
mod data;
mod error;
mod loss;
mod model;
mod run;
mod schedule;
mod train;

pub use curve::draw_loss_curve;
pub use data::{Batch, Batches, Conversation, Place, Sample, SplitData, read_conversations, split};
pub use error::{Error, ErrorKind, Result};
pub use loss::{batch_loss, evaluate};
pub use model::CausalLm;
pub use run::RunFolder;
pub use schedule::Schedule;
pub use train::{StepReport, TrainConfig, train};

/// Its example is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
