//! Adapters for the programs that serve them: what each of them can read, and files that all of them
//! read as the same function.
//!
//! The way of the data: **rules** (`rules.rs`: what a [`Reader`] cannot read, before and after
//! training) -> **save** (`save.rs`: [`save_portable`], one folder with every scaling folded into B
//! and every rank padded) with **mlx** (`mlx.rs`: mlx-lm's own format). A GGUF adapter, which needs to
//! know the model's heads, is written by lora-models.
//!
//! What the readers do was read in their sources: vLLM's `vllm/lora` (`peft_helper.py`, `utils.py`,
//! `lora_model.py`, `layers/`) and `vllm/config/lora.py` as of 2026, llama.cpp's
//! `convert_lora_to_gguf.py` and `src/llama-adapter.cpp` as of 2026, mlx-lm 0.32.2's `tuner/utils.py`
//! and `tuner/lora.py`, mistral.rs' `mistralrs-quant/src/lora` as of 2026.

mod mlx;
mod rules;
mod save;

pub use mlx::{read_mlx_adapter, save_mlx_adapter};
pub(crate) use rules::sentences;
pub use rules::{
    PortabilityProblem, PortabilityRule, Reader, check_config_for, check_model_for,
    check_written_for,
};
pub use save::{PortableReport, save_portable};
