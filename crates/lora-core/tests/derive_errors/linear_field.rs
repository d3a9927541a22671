use burn::nn::Linear;
use lora_core::{AdaptableLinear, VisitLora};

#[derive(VisitLora)]
struct Net {
    layers: Vec<Linear>,
    head: AdaptableLinear,
}

fn main() {}
