use lora_core::{AdaptableLinear, VisitLora};

#[derive(VisitLora)]
struct Net {
    up: AdaptableLinear,
    #[lora(rename = "up")]
    down: AdaptableLinear,
}

fn main() {}
