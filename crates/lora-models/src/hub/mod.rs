//! Models of the Hugging Face Hub: how they are named, and with the feature `hub` how they come here.

mod name;
mod problem;

#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod fetch;

#[cfg(feature = "hub")]
pub use fetch::{Download, Hub};
pub use name::HubModel;
pub use problem::HubProblem;
