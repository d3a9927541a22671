#![doc = include_str!("../docs/guide.md")]

#[doc = include_str!("../docs/own_model.md")]
pub mod own_model {}

#[doc = include_str!("../docs/targets.md")]
pub mod targets {}

#[doc = include_str!("../docs/variants.md")]
pub mod variants {}

#[doc = include_str!("../docs/starting_values.md")]
pub mod starting_values {}

#[doc = include_str!("../docs/merging.md")]
pub mod merging {}

#[doc = include_str!("../docs/several_adapters.md")]
pub mod several_adapters {}

#[doc = include_str!("../docs/peft_files.md")]
pub mod peft_files {}

#[doc = include_str!("../docs/other_programs.md")]
pub mod other_programs {}

#[doc = include_str!("../docs/backends.md")]
pub mod backends {}

#[doc = include_str!("../docs/processor.md")]
pub mod processor {}

#[doc = include_str!("../docs/libtorch.md")]
pub mod libtorch {}

#[doc = include_str!("../docs/graphics.md")]
pub mod graphics {}

#[doc = include_str!("../docs/nvidia.md")]
pub mod nvidia {}
